"""slmjax upcycle RUN_DIR --config=FILE[:ARG] [--config.a.b=value ...] [--step=N] --out=DIR

Makes a run with experts whose first checkpoint is that of the dense run in RUN_DIR: DIR/<run_id>, its experts copies of
the dense feed-forward. The model of --config is the dense one in all but model.moe. Prints the command that trains it;
its steps, schedule and data count on from those of the dense run.
"""

import shlex
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues
from ml_collections import config_flags

from slmjax import config, environment
from slmjax.cli import options
from slmjax.config import ConfigError, RunConfig
from slmjax.study import Run


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    options.define_out(flag_values)
    options.define_json(flag_values)
    absl_flags.DEFINE_integer("step", None, "checkpoint of the dense run; its newest when not given",
                              flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("noise", 0.0, "added to every expert, relative to the spread of each of its matrices",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("redrawn", 0.0, "share of each expert's hidden units that are drawn anew",
                            flag_values=flag_values)  # fmt: skip


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"upcycle takes one folder, of the dense run, not {len(args)}")
    source, folder = Path(args[0]), Path(flags.out)
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source} is not the folder of a run: it has no config.json")
    step = _newest(source) if flags.step is None else flags.step
    start = {"run": source.resolve().name, "step": step, "noise": flags.noise, "redrawn": flags.redrawn}
    run = Run(_config(flags, start))
    if any((folder / run.run_id / "checkpoints").glob("step-*")):
        raise ConfigError(f"{folder / run.run_id} has begun already; to go on: {_command(flags, start)}")
    _make(run, source, folder)
    if flags.json:
        options.print_json({"run_id": run.run_id, "folder": str(folder / run.run_id), "step": step})
    else:
        print(f"{folder / run.run_id} begins from step {step} of {source}; to train it:\n  {_command(flags, start)}")
    return 0


def _make(run: Run, source: Path, folder: Path) -> None:
    """An attempt that ends where it begins, with the upcycled checkpoint saved."""
    environment.prepare()
    from slmjax import train
    from slmjax.member import Member

    member = Member(run, folder, train.build_program([run]))
    try:
        member.open()
        state = member.restore(source)
        member.start()
        member.save(state)
        member.finish("preempted")
    except Exception as error:
        member.fail(error)
        raise


def _newest(source: Path) -> int:
    steps = sorted(int(path.name[5:]) for path in (source / "checkpoints").glob("step-*"))
    if not steps:
        raise ConfigError(f"{source} has no checkpoint yet; train it first")
    return steps[-1]


def _config(flags: FlagValues, start: dict) -> RunConfig:
    if flags["config"].value is None:
        options.config_of(flags)  # says what is missing
    given = flags["config"].value.to_dict()
    return config.resolve({**given, "start": start})


def _command(flags: FlagValues, start: dict) -> str:
    """Trains on what this makes."""
    overrides = config_flags.get_override_values(flags["config"]) | {f"start.{key}": v for key, v in start.items() if v}
    words = [f"--config={config_flags.get_config_filename(flags['config'])}"]
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    return shlex.join(["slmjax", "train", *words, f"--out={flags.out}"])
