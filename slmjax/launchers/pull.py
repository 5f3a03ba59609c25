"""Brings a study's results home: what fits, tables and reports read, no checkpoints; what is here is not read again.

Records only grow, so an attempt's file is read when its size or time has changed; the small JSON files are read each
time. A run that says DONE is final, and so is its copy once that says DONE: it comes last, and only when it was there
before the records were read.
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from slmjax import paths, records
from slmjax.mirror import lease

WHOLE = ("config.json", "provenance.json", "status.json", "error.txt")
PULLED = ".pulled"  # in a study's folder: of what it is a copy, and when it was made
GROWING = re.compile(r"attempt-\d+\.jsonl")


@dataclass
class Pulled:
    """What a pull did. files and bytes: of those that came. finished: runs that were complete here before."""

    folder: Path
    runs: int = 0
    finished: int = 0
    files: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)  # runs of the study that have not begun

    def add(self, other: "Pulled") -> None:
        self.runs += other.runs
        self.finished += other.finished
        self.files += other.files
        self.bytes += other.bytes
        self.missing += other.missing


def pull(source: paths.Path, out: Path, tensorboard: bool = False) -> Pulled:
    """Copies what is new in the study `source` to OUT/<the name of its folder>.

    Raises:
      ValueError: `source` is not a study folder.
    """
    plan = records.read_json(source / "study.json")
    if plan is None:
        raise ValueError(f"{source} is not a study folder: it has no study.json")
    total = Pulled(out / source.name)
    _copy_whole(source / "study.json", total.folder / "study.json", total)
    _copy_leases(source / lease.FOLDER, total.folder / lease.FOLDER)
    mark(total.folder, str(source))
    run_ids = [run["run_id"] for run in plan["runs"]]

    def one(run_id: str) -> Pulled:
        return _pull_run(source / run_id, total.folder / run_id, tensorboard)

    for pulled in paths.each(source, one, run_ids):
        total.add(pulled)
    return total


def _pull_run(there: paths.Path, here: Path, tensorboard: bool) -> Pulled:
    did = Pulled(here, runs=1)
    if is_final(here, tensorboard):
        return Pulled(here, runs=1, finished=1)
    found = paths.names(there)
    if not found:
        return Pulled(here, missing=[here.name])
    for name in found:
        if GROWING.fullmatch(name):
            _copy_grown(there / name, here / name, did)
        elif name in WHOLE:
            _copy_whole(there / name, here / name, did)
    if tensorboard and "tb" in found:
        for name in paths.names(there / "tb"):
            _copy_grown(there / "tb" / name, here / "tb" / name, did)
    if "DONE" in found:
        _copy_whole(there / "DONE", here / "DONE", did)
    return did


def mark(folder: Path, source: str) -> None:
    records.write_json(folder / PULLED, {"source": source, "time": time.time()})


def _copy_leases(there: paths.Path, here: Path) -> None:
    """Who trains what: so that the copy tells, as of now, what runs and what was killed."""
    contents = {name: paths.read_bytes(there / name) for name in paths.names(there)}
    for name in set(paths.names(here)) - set(contents):
        (here / name).unlink()
    for name, content in contents.items():
        paths.write_bytes(here / name, content)


def is_final(here: Path, tensorboard: bool) -> bool:
    """Whether a run's copy is complete."""
    return (here / "DONE").exists() and ((here / "tb").exists() or not tensorboard)


def _copy_whole(source: paths.Path, target: Path, did: Pulled) -> None:
    try:
        content = paths.read_bytes(source)
    except FileNotFoundError:  # deleted between the listing and now
        return
    if not target.exists() or target.read_bytes() != content:
        paths.write_bytes(target, content)
        did.files += 1
        did.bytes += len(content)


def _copy_grown(source: paths.Path, target: Path, did: Pulled) -> None:
    """By size and time, in whole seconds; some stores tell no time, and the size decides alone."""
    said = source.stat()
    size, at = (said.length, said.mtime) if hasattr(said, "length") else (said.st_size, said.st_mtime)
    if target.exists():
        mine = target.stat()
        if mine.st_size == size and (not at or int(mine.st_mtime) == int(at)):
            return
    content = paths.read_bytes(source)  # perhaps longer by now: the next pull sees the size that it had
    paths.write_bytes(target, content)
    if at:
        os.utime(target, (int(at), int(at)))
    did.files += 1
    did.bytes += len(content)
