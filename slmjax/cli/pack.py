"""slmjax pack FILE [--task=K] [--cores=0,1,...] [--distributed] [--mirror=URL/NAME]
slmjax pack URL/NAME/packs/ID.json [--out=DIR]

Trains the runs of a pack file, as launchers write them, in this process, or task K of a submission file; with
--distributed, in all that the same command was started in.

With a mirror, an object store (gs://, s3://) or a mounted folder has a copy of the study: what is there is gone on
with, and what is new is sent every few seconds. A FILE in the store is its own mirror, and DIR/NAME the scratch folder.
"""

import os
import signal
import sys
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment, launchers, paths
from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.launchers import submissions


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_integer("task", None, "FILE is a submission: which of its packs, from 0", flag_values=flag_values)
    absl_flags.DEFINE_list("cores", None, "cores to stay on; all when not given", flag_values=flag_values)
    absl_flags.DEFINE_string("mirror", None, "the study's copy in a store: gs://BUCKET/.../NAME, or a folder",
                             flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_string("out", "OUT", "with a FILE in a store: folder to train in", flag_values=flag_values)
    absl_flags.DEFINE_float("mirror_every", 15.0, "seconds between two looks at what is new", flag_values=flag_values)
    options.define_distributed(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"pack takes one file, not {len(args)}")
    file, mirror = paths.as_path(args[0]), flags.mirror and paths.as_path(flags.mirror)
    if paths.is_remote(file) and flags.task is not None:
        raise ConfigError(f"--task is for the submission files of a scheduler; {file} is in a store")
    if paths.is_remote(file) and mirror is not None:
        raise ConfigError(f"{file} is in the store that has its copy: leave out --mirror={flags.mirror}")
    if flags.cores:
        environment.pin([int(core) for core in flags.cores])
    environment.prepare()
    if paths.is_remote(file):
        mirror = file.parent.parent
        file = _brought(file, Path(flags.out) / mirror.name)
    if flags.task is not None:
        file = submissions.pack_file(file, flags.task)
    try:
        pack = launchers.read_pack(file)
    except ValueError as error:
        for path in launchers.refuse_pack(file, error):
            if mirror is not None:
                paths.copy(path, mirror / path.parent.name / path.name)
        raise
    with options.joined(flags):
        return launchers.train_pack(pack) if mirror is None else _train_mirrored(pack, mirror, flags.mirror_every)


def _brought(file: paths.Path, folder: Path) -> Path:
    """The pack file, and what its process reads beside it, copied to the folder where it is trained."""
    study = file.parent.parent
    paths.copy(file, folder / "packs" / file.name)
    for name in ("study.json", "budget.json"):
        if (study / name).exists():
            paths.copy(study / name, folder / name)
    return folder / "packs" / file.name


def _train_mirrored(pack: launchers.Pack, mirror: paths.Path, every_s: float) -> int:
    from slmjax.mirror.hosts import mirrored
    from slmjax.mirror.session import MirrorError

    try:
        with mirrored(pack.runs, pack.folder, mirror, pack.name, every_s=every_s, stop=_stop_training):
            return launchers.train_pack(pack, study_folder=mirror)
    except MirrorError as error:
        print(f"slmjax pack: {error}", file=sys.stderr)
        return 1


def _stop_training() -> bool:
    """Asks this process's training to save and stop; False when it is not training, and would be killed."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        return False
    os.kill(os.getpid(), signal.SIGTERM)
    return True
