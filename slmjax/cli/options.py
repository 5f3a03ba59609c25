"""What verbs share: flags and their help, `--config` with its overrides, experiment files, tables, JSON."""

import contextlib
import difflib
import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import rich.box
import rich.console
import rich.table
from absl import flags as absl_flags
from absl.flags import FlagValues
from ml_collections import config_flags

from slmjax import config
from slmjax.config import ConfigError, RunConfig
from slmjax.study import Study


def define_config(flag_values: FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "experiment: FILE.py[:ARG], or the name of one that comes along", flag_values, sys_argv=[]
    )


def define_out(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_string("out", "OUT", "folder to write to", flag_values=flag_values)


def define_json(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_boolean("json", False, "print JSON for a program to read", flag_values=flag_values)


def define_distributed(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_boolean(
        "distributed", False, "one of several processes, as srun or a TPU slice start them", flag_values=flag_values
    )


def joined(flags: FlagValues) -> contextlib.AbstractContextManager:
    """A block in which this process is one of several, if the flag says so; after `environment.prepare`."""
    from slmjax import processes

    return processes.joined(flags.distributed)


def parse(flag_values: FlagValues, argv: list[str]) -> list[str]:
    """Sets the flags and returns the other arguments.

    Raises:
      ConfigError: an unknown flag or config key, or a value of the wrong type; one line with the nearest valid choice.
    """
    if "config" in flag_values:
        argv = _with_paths(argv)
        flag_values["config"]._sys_argv = argv  # the flag looks there for its overrides, by default in sys.argv
    try:
        return flag_values(["slmjax", *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        known = [name for name in flag_values if "." not in name]
        near = difflib.get_close_matches(error.flagname, known, 1)
        hint = f"did you mean --{near[0]}?" if near else "flags: " + ", ".join(f"--{name}" for name in known)
        raise ConfigError(f"there is no flag --{error.flagname}; {hint}") from None
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _reraise(error, argv)


def _with_paths(argv: list[str]) -> list[str]:
    """`--config NAME` and `--config=NAME[:ARG]` as `--config=PATH[:ARG]`, put before the overrides as absl wants it."""
    argv = list(argv)
    for i, arg in enumerate(argv):
        if arg in ("--config", "-config") and i + 1 < len(argv):
            argv[i : i + 2] = [f"--config={argv[i + 1]}"]
            break
    for i, arg in enumerate(argv):
        if re.match(r"--?config=", arg):
            path, *rest = split(arg.split("=", 1)[1])
            return [f"--config={':'.join([str(path), *rest])}", *argv[:i], *argv[i + 1 :]]
    overrides = [arg for arg in argv if re.match(r"--?config\.", arg)]
    if overrides:
        raise ConfigError(f"{overrides[0]} needs --config=FILE[:ARG]")
    return argv


def _reraise(error: Exception, argv: list[str]) -> None:
    """The error of an override or of an experiment file, as one line where the user's value is at fault."""
    origin = error
    while origin.__cause__ or origin.__context__:
        origin = origin.__cause__ or origin.__context__
    if isinstance(origin, ConfigError):
        raise origin
    keys = [re.sub(r"^--?config\.", "", arg).split("=")[0] for arg in argv if re.match(r"--?config\.", arg)]
    known = config.flatten(RunConfig())
    for key in keys:
        if key not in known and not any(name.startswith(key + ".") for name in known):
            raise ConfigError(config.unknown_key(key)) from None
    if isinstance(error, absl_flags.Error) and "Error whilst parsing config file" not in str(error):
        text = str(error).removeprefix("flag ").replace("--config.", "")
        raise ConfigError(text) from None
    raise error


def config_of(flag_values: FlagValues) -> RunConfig:
    """The validated config of `--config` and its overrides."""
    if flag_values["config"].value is None:
        raise ConfigError(f"--config=FILE[:ARG] is needed; {_names()}")
    return config.resolve(flag_values["config"].value)


# --- experiments -----------------------------------------------------------------------------------------------------


def known_experiments() -> list[str]:
    """Names of the experiment files that come along."""
    package = importlib.util.find_spec("experiments")
    folders = package.submodule_search_locations if package else []
    return [module.name for module in pkgutil.iter_modules(folders)]


def _names() -> str:
    return f"experiments that come along: {', '.join(known_experiments())}"


def split(spec: str) -> list:
    """[path] or [path, argument] of FILE.py[:ARG] or NAME[:ARG].

    Raises:
      ConfigError: no such file or name.
    """
    name, *argument = spec.split(":", 1)
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"there is no experiment file {name!r}; {_names()}")
    else:
        known = known_experiments()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"there is no experiment {name!r}; " + (f"did you mean {near[0]!r}?" if near else _names())
            )
        path = Path(importlib.util.find_spec(f"experiments.{name}").origin)
    return [path, *argument]


def load_study(spec: str) -> Study:
    """The study of FILE.py[:ARG] or NAME[:ARG]."""
    path, *argument = split(spec)
    module_spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise ConfigError(f"{path} exports no get_study(arg), so it is no study; try slmjax train --config={spec}")
    return module.get_study(*argument)


def column_map(entries: list[str] | None) -> dict[str, str] | None:
    """{"N": expression, ...} of N=expression entries; what reads the table refuses names it does not know."""
    if entries is None:
        return None
    bad = [entry for entry in entries if "=" not in entry]
    if bad:
        raise ConfigError(f"--columns={bad[0]!r} must read name=header, e.g. --columns=N=params,D=tokens,loss=final")
    pairs = [entry.split("=", 1) for entry in entries]
    twice = [name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]
    if twice:
        raise ConfigError(f"--columns names {twice[0]} twice; give it one column")
    return dict(pairs)


# --- output ----------------------------------------------------------------------------------------------------------


def help_text(verb: ModuleType, flag_values: FlagValues) -> str:
    """The verb's docstring, then its flags."""
    names = sorted({flag_values[name].name for name in flag_values})  # a flag and its short name are one
    flags = [flag_values[name] for name in names]
    left = [f"--{flag.name}" if flag.boolean else f"--{flag.name}=..." for flag in flags]
    width = max(map(len, left), default=0)
    said = [flag.help.splitlines()[0].rstrip(";") for flag in flags]  # without absl's second line on repeatable flags
    lines = [
        f"  {name:{width}}  {text}" + (f" (default {flag.default})" if flag.default not in (None, False, []) else "")
        for name, text, flag in zip(left, said, flags, strict=True)
    ]
    return "\n".join([verb.__doc__.strip(), "", "flags:", *lines])


def write_text(path: str, text: str) -> None:
    """A file, with the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(rows: list[dict[str, str]], left: tuple[str, ...] = (), styles: dict[str, str] | None = None) -> None:
    """Rows as a table, see `make_table`."""
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe has no edge to wrap at
        console = rich.console.Console(width=10_000)
    console.print(make_table(rows, left, styles))


def make_table(
    rows: list[dict[str, str]], left: tuple[str, ...] = (), styles: dict[str, str] | None = None
) -> rich.table.Table:
    """Columns named by the rows' keys, those in `left` aligned to the left, numbers to the right; styles by state."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values(), style=(styles or {}).get(row.get("state", ""), ""))
    return table
