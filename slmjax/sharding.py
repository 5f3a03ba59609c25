"""Where arrays live: the mesh, and one table from logical axes to mesh axes."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slmjax.config import ConfigError, MeshConfig

AXES = ("population", "data", "fsdp", "tensor", "expert")

RULES = {
    "population": "population",
    "batch": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "choice": None,
    "layer": None,
    "head": None,
    "seq": None,
}


def make_mesh(cfg: MeshConfig, population: int = 1, devices=None) -> Mesh:
    """A mesh of all devices with Auto axes: population x data x fsdp x tensor x expert.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = population * cfg.fsdp * cfg.tensor * cfg.expert
    data = cfg.data or max(1, len(devices) // fixed)
    if data * fixed != len(devices):
        raise ConfigError(
            f"mesh population={population} x data={data} x fsdp={cfg.fsdp} x tensor={cfg.tensor} x expert={cfg.expert} "
            f"needs {data * fixed} devices and there are {len(devices)}; make the product of mesh.* that number"
        )
    shape = (population, data, cfg.fsdp, cfg.tensor, cfg.expert)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(axes: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    """The placement of one array.

    Raises:
      ConfigError: a dimension that its mesh axes do not divide.
    """
    spec = partition(axes)
    for axis, size, mesh_axes in zip(axes, shape, spec, strict=True):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        names = [name for name in names if mesh.shape[name] > 1]
        shards = math.prod(mesh.shape[n] for n in names)
        if size % shards:
            raise ConfigError(
                f"{name} has {size} along {axis!r}, which mesh.{'*mesh.'.join(names)}={shards} does not divide; "
                f"use a multiple of {shards}, or set mesh.{names[-1]} to a divisor of {size}"
            )
    return NamedSharding(mesh, spec)
