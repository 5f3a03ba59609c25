"""Between config dataclasses, nested dicts and dotted keys; what is said of a key that does not exist."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from typing import Any

from slmjax.config.fields import ConfigError, RunConfig


def to_dict(cfg) -> dict:
    """Nested plain dict of a config dataclass; tuples stay tuples."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(cfg, f.name)) else _thaw(v)
        for f in dataclasses.fields(cfg)
    }


def flatten(cfg) -> dict[str, Any]:
    """Dotted key → value."""

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict) and key != "options":
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(cfg), ""))


def unknown_key(key: str) -> str:
    """One line for a key that does not exist, with the nearest that does."""
    known = list(flatten(RunConfig()))
    near = difflib.get_close_matches(key, known, 1, 0.5) or [k for k in known if k.endswith("." + key.split(".")[-1])]
    return f"unknown config key {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    )


def nearest(value: str, choices) -> str:
    """`a, b or c`, with the closest match to `value` named first when there is one."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, 1)
    listed = ", ".join(choices)
    return f"did you mean {near[0]!r}? (choices: {listed})" if near else f"choices: {listed}"


def build(kind, values: Mapping, prefix: str):
    """A `kind` from nested values, type by type; ints are accepted for floats and lists for tuples, nothing else."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}={values!r} must be a group of keys: {', '.join(hints)}")
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key(prefix + key))
    return kind(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def _coerce(hint, value, key: str):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} must be a list, e.g. ({value!r},)")
        return tuple(_coerce(typing.get_args(hint)[0], v, key) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        return _plain(value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key}={value!r} must be {hint.__name__}, not {type(value).__name__}")
    return value


def _plain(value, key: str) -> dict:
    """A fork's own options as JSON gives them back, so that a run's identity and its config.json agree."""
    try:
        if isinstance(value, Mapping):
            return json.loads(json.dumps(_thaw(value), allow_nan=False))
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{key}={value!r} must be a mapping that JSON can carry: names, finite numbers, lists, mappings")


def _thaw(value):
    return {k: _thaw(v) for k, v in value.items()} if isinstance(value, Mapping) else value
