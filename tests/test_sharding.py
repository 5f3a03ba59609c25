"""The mesh has the devices it is told to; every array is laid out by the one table; what does not divide is refused."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import built, init, solo, tiny, train_one

from slmjax import sharding
from slmjax.config import ConfigError, MeshConfig
from slmjax.models import is_spec


@pytest.mark.parametrize(
    "mesh, population, shape",
    [
        ({}, 1, (1, 4, 1, 1, 1)),
        ({}, 4, (4, 1, 1, 1, 1)),
        ({}, 2, (2, 2, 1, 1, 1)),
        ({"fsdp": 2}, 1, (1, 2, 2, 1, 1)),
        ({"data": 1, "tensor": 2, "expert": 2}, 1, (1, 1, 1, 2, 2)),
        ({"data": 2, "fsdp": 2}, 1, (1, 2, 2, 1, 1)),
    ],
)
def test_a_mesh_uses_every_device_once(mesh, population, shape):
    made = sharding.make_mesh(MeshConfig(**mesh), population)
    assert made.axis_names == sharding.AXES and made.devices.shape == shape
    assert set(made.devices.flat) == set(jax.devices())
    assert set(made.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 8}, {"data": 2}, {"fsdp": 3}, {"tensor": 8}])
def test_a_mesh_that_is_not_the_devices_is_refused(mesh):
    with pytest.raises(ConfigError, match=r"needs \d+ devices and there are 4.*mesh"):
        sharding.make_mesh(MeshConfig(**mesh))


def test_the_table_names_only_axes_of_the_mesh():
    for target in sharding.RULES.values():
        assert set([target] if isinstance(target, str) else target or ()) <= set(sharding.AXES)


def test_partition_follows_the_table():
    assert sharding.partition(("layer", "embed", "heads", "head")) == P(None, "fsdp", "tensor", None)
    assert sharding.partition(("vocab", "embed")) == P("tensor", "fsdp")
    assert sharding.partition(("population", "batch")) == P("population", ("data", "fsdp", "expert"))


def test_a_dimension_that_does_not_divide_names_both_numbers_and_the_way_out():
    mesh = sharding.make_mesh(MeshConfig(tensor=4))
    with pytest.raises(ConfigError, match=r"embed.table has 30 along 'vocab', which mesh.tensor=4.*set mesh.tensor"):
        sharding.sharding(mesh, ("vocab", "embed"), (30, 16), "embed.table")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2))
    with pytest.raises(ConfigError, match=r"rows has 6 along 'batch', which mesh.data\*mesh.fsdp=4"):
        sharding.sharding(mesh, ("batch",), (6,), "rows")
    assert sharding.sharding(mesh, ("batch",), (8,), "rows").spec == P(("data", "fsdp", "expert"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_and_what_mirrors_them_are_split_alike(optimizer):
    changes = {"optim.name": optimizer, "optim.ema_decay": 0.5, "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
    prog = solo(changes, devices=4)
    state = init(prog, [tiny(changes)])
    for path, spec in jax.tree_util.tree_leaves_with_path(built().model.specs, is_leaf=is_spec):
        expected = P("population", *(sharding.RULES[axis] for axis in spec.axes))
        mirrored = 0
        for state_path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if state_path[-len(path) :] == path and leaf.ndim == len(spec.shape) + 1:
                assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(prog.mesh, expected), leaf.ndim), (
                    jax.tree_util.keystr(state_path)
                )
                mirrored += 1
        muon = optimizer == "muon" and spec.role == "hidden"
        assert mirrored == (3 if muon else 4)  # params, ema, and a momentum and a second moment, or a momentum


def test_a_device_holds_its_share_of_the_state():
    trained = train_one({"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}, 0, num_steps=1, devices=4)
    table = trained.state.params["embed"]["table"]
    assert {shard.data.size for shard in table.addressable_shards} == {table.size // 4}
    assert np.isfinite(trained.loss[0, 0])
