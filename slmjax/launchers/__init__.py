"""What every launcher shares: packs of runs written down, so that a process on any machine can train one.

    OUT/<study>/packs/<name>.json .log .lock

The file is all that a pack's process needs (`slmjax pack FILE`): experiment files may change or go after the launch. No
JAX is imported before `train_pack`. What can train packs is a backend, see `slmjax.launchers.backend`.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmjax import config, lease, records, study
from slmjax.study import Run


@dataclass(frozen=True)
class Pack:
    """Runs of one program, under a name, and where their study lives."""

    folder: Path  # of the study
    runs: list[Run]
    name: str

    def path(self, suffix: str) -> Path:
        return self.folder / "packs" / f"{self.name}.{suffix}"

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not (self.folder / run.run_id / "DONE").exists()]

    @property
    def flops(self) -> int:
        """What is left to spend, unfinished runs counted whole."""
        return sum(study.run_flops(run) for run in self.unfinished)


def write_packs(packs: list[Pack]) -> None:
    """Writes each pack where `slmjax pack` will read it."""
    for pack in packs:
        pack.path("json").parent.mkdir(exist_ok=True)
        records.write_json(pack.path("json"), {"runs": [_to_json(run) for run in pack.runs]})


def read_pack(path: Path) -> Pack:
    """The pack that `write_packs` wrote to `path`.

    Raises:
      ValueError: it is not a pack file, or its configs are no longer what their run_ids say.
    """
    with open(path) as file:
        runs = [_from_json(entry) for entry in json.load(file)["runs"]]
    return Pack(path.parent.parent, runs, path.stem)


def _to_json(run: Run) -> dict:
    return {
        "run_id": run.run_id,
        "config": config.to_dict(run.config),
        "tags": dict(run.tags),
        "parent": run.parent,
        "branch_step": run.branch_step,
        "save_steps": run.save_steps,
    }


def _from_json(entry: dict) -> Run:
    cfg = config.resolve(entry["config"])
    run = Run(cfg, entry["tags"], entry["parent"], entry["branch_step"], tuple(entry["save_steps"]))
    if run.run_id != entry["run_id"]:
        raise ValueError(
            f"run {entry['run_id']} was planned by another version of slmjax, which named it so; plan anew"
        )
    return run


def refuse_pack(path: Path, error: ValueError) -> list[Path]:
    """Makes what `read_pack` has raised the reason of the runs that the file names; their status files."""
    entries = json.loads(path.read_text())["runs"]
    for entry in entries:
        steps = entry["config"].get("train", {}).get("steps", 0)
        records.write_failure(path.parent.parent / entry["run_id"], steps, f"ConfigError: {error}")
    return [path.parent.parent / entry["run_id"] / "status.json" for entry in entries]


def train_pack(pack: Pack, study_folder: Path | None = None) -> int:
    """Trains a pack in this process and returns its exit code, once no killed process elsewhere holds a run of it.

    It is 1 at once when the study's budget is spent, by the records in `study_folder`, which is the pack's own when not
    given. Whatever ends the pack before its runs begin (a mesh that does not fit, no memory) becomes their reason as
    well; that another process is gone does not.
    """
    from slmjax import processes, train
    from slmjax.launchers import budget

    over = processes.of_first(lambda: budget.exceeded(study_folder or pack.folder)) if pack.unfinished else None
    if over is not None:
        print(f"{pack.folder}: {over}", file=sys.stderr)
        return 1
    processes.of_first(lambda: lease.wait_for([pack.folder / run.run_id for run in pack.unfinished]))
    try:
        return train.train_pack(pack.runs, pack.folder).exit_code
    except Exception as error:
        for run in pack.unfinished if processes.first() and not processes.has_lost(error) else ():
            _blame(pack.folder / run.run_id, run, error)
        raise


def _blame(run_dir: Path, run: Run, error: Exception) -> None:
    status = records.read_json(run_dir / "status.json") or {}
    if status.get("state") in ("failed", "diverged") and status.get("pid") == os.getpid():
        return  # it ended for a reason of its own
    records.write_failure(run_dir, run.config.train.steps, f"{type(error).__name__}: {error}")
    (run_dir / "error.txt").write_text("".join(traceback.format_exception(error)))


# --- locks: held by an open file, so that the kernel drops them when their process dies ------------------------------


def take_lock(path: Path, tries: int = 1) -> int | None:
    """An open descriptor that holds the lock, to be kept open or handed to a child; None while another has it.

    tries: 2 where None means to give up, since `is_held` has a lock for a moment.

    Raises:
      ValueError: the file system has no such locks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        if tries == 1:
            return None
        time.sleep(0.1)
        return take_lock(path, tries - 1)
    except OSError as error:
        os.close(fd)
        raise ValueError(
            f"{path} cannot be locked ({error}); a study's folder needs a file system with flock"
        ) from None
    return fd


def name_holder(fd: int, pid: int, **further) -> None:
    """Writes into a lock who has it."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"host": socket.gethostname(), "pid": pid, **further}).encode(), 0)


def is_held(path: Path) -> bool:
    if not path.exists():
        return False
    if (fd := take_lock(path)) is not None:
        os.close(fd)
    return fd is None


def said_by_holder(path: Path) -> dict:
    """What the holder of a lock has written into it; {} when it is free, or too new to have said."""
    if is_held(path):
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text())
    return {}


def holder_of(path: Path) -> int | None:
    """The process on this host that holds the lock; None when it is free, elsewhere, or too new to have said."""
    said = said_by_holder(path)
    return said.get("pid") if said.get("host") == socket.gethostname() else None


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Holds a lock for the length of the block; yields whether it could be had."""
    fd = take_lock(path, tries=2)
    if fd is None:
        yield False
        return
    try:
        name_holder(fd, os.getpid())
        yield True
    finally:
        os.close(fd)
