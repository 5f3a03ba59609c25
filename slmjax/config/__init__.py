"""What configures a run: frozen dataclasses (`fields`), made from experiment files and dotted keys, and checked.

Experiment files hand over an `ml_collections.ConfigDict` (made by `config_dict()`); `resolve` turns it into a validated
`RunConfig`. No JAX here, nothing is compiled or read from disk, and nothing below `train` ever sees a ConfigDict.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from slmjax.config.fields import (
    HYPER,
    MASKING,
    NOT_IDENTITY,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    ObjectiveConfig,
    OptimConfig,
    ParametrizationConfig,
    RunConfig,
    ScheduleConfig,
    StartConfig,
    TrainConfig,
)
from slmjax.config.keys import build, flatten, nearest, to_dict, unknown_key
from slmjax.config.phases import decay_start, decay_steps, shared_steps
from slmjax.config.validation import validate

__all__ = [
    "HYPER",
    "MASKING",
    "NOT_IDENTITY",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParametrizationConfig",
    "RunConfig",
    "ScheduleConfig",
    "StartConfig",
    "TrainConfig",
    "config_dict",
    "decay_start",
    "decay_steps",
    "exported",
    "flatten",
    "nearest",
    "override",
    "program_id",
    "resolve",
    "run_id",
    "shared_steps",
    "to_dict",
    "unknown_key",
    "validate",
]


def config_dict(cfg: RunConfig | None = None) -> ConfigDict:
    """The defaults (or `cfg`) as a ConfigDict, locked but for `options`: where every experiment file starts."""
    values = ConfigDict(to_dict(cfg or RunConfig())).lock()
    for group in (values.model, values.objective):
        group.options.unlock()
    return values


def resolve(source: ConfigDict | Mapping) -> RunConfig:
    """The validated RunConfig of a ConfigDict or of the nested dict in a `config.json`.

    Raises:
      ConfigError: an unknown key (the nearest valid one is named), a wrong type, or a value that cannot run.
    """
    values = source.to_dict() if isinstance(source, ConfigDict) else source
    cfg = build(RunConfig, values, "")
    validate(cfg)
    return cfg


def override(cfg: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`cfg` with dotted keys replaced, e.g. {"optim.lr": 3e-3}; an unknown key raises, `validate` checks values."""
    values = to_dict(cfg)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or (last not in node and path[-1:] != ["options"]):
            raise ConfigError(unknown_key(key))
        node[last] = value
    return build(RunConfig, values, "")


def run_id(cfg: RunConfig) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical config, `mesh` and `log` left out."""
    identity = {k: v for k, v in to_dict(cfg).items() if k not in NOT_IDENTITY}
    return _digest(identity)


def program_id(cfg: RunConfig) -> str:
    """Digest of what the compiled step depends on: the config without the inputs of the step (`HYPER`)."""
    flat = {
        k: v for k, v in flatten(cfg).items() if not k.startswith(("log.", "schedule.", "start.")) and k not in HYPER
    }
    flat["ema"] = cfg.optim.ema_decay > 0
    return _digest(flat)


def exported(key: str, module: str, name: str):
    """What the module that a config key names exports under `name`; imports it.

    Raises:
      ConfigError: no such module, or it has no such name.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not
        raise ConfigError(f"{key}={module!r} cannot be imported: there is no module {error.name!r}") from None
    if not hasattr(found, name):
        raise ConfigError(f"{key}={module!r} does not export {name!r}")
    return getattr(found, name)


def _digest(tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()[:10]
