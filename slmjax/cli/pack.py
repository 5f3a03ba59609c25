"""slmjax pack FILE [--task=K] [--cores=0,1,...] [--distributed]

Trains the runs of a pack file, as launchers write them, in this process, or task K of a submission file; with
--distributed, in all that the same command was started in.
"""

from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment, launchers
from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.launchers import submissions


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_integer("task", None, "FILE is a submission: which of its packs, from 0", flag_values=flag_values)
    absl_flags.DEFINE_list("cores", None, "cores to stay on; all when not given", flag_values=flag_values)
    options.define_distributed(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"pack takes one file, not {len(args)}")
    if flags.cores:
        environment.pin([int(core) for core in flags.cores])
    environment.prepare()
    file = Path(args[0]) if flags.task is None else submissions.pack_file(Path(args[0]), flags.task)
    pack = launchers.read_pack(file)
    with options.joined(flags):
        return launchers.train_pack(pack)
