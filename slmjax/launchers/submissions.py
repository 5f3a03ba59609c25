"""What was handed to a scheduler, written down before it is: no crash in between can lead to a second hand-over.

    OUT/<study>/submissions/<name>.json    backend, names of packs in the order of the array, when

The name is the job's in the scheduler. A launcher that dies after the scheduler has taken the job, and before it has
heard so, leaves this file, and the next launcher finds the job by its name.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from slmjax import records
from slmjax.launchers import Pack


@dataclass(frozen=True)
class Submission:
    """One job, or one array of jobs, of a scheduler; task i of an array trains packs[i].

    taken: whether the scheduler has said that it has it; until then it may not have heard of it yet.
    """

    name: str
    backend: str
    packs: tuple[str, ...]
    time: float
    taken: bool = False

    def path(self, folder: Path) -> Path:
        return folder / "submissions" / f"{self.name}.json"


def plan(folder: Path, backend: str, packs: list[Pack], earlier: int = 0) -> Submission:
    """The submission of these packs, under a name that no earlier one of the study has.

    earlier: how many are planned and not written yet.
    """
    count = len([*(folder / "submissions").glob("*.json")]) + earlier
    names = tuple(pack.name for pack in packs)
    digest = hashlib.sha256(f"{folder.resolve()} {count} {' '.join(names)}".encode()).hexdigest()[:8]
    return Submission(f"slmjax-{folder.name}-{digest}", backend, names, time.time())


def write(folder: Path, submission: Submission) -> Path:
    path = submission.path(folder)
    path.parent.mkdir(exist_ok=True)
    records.write_json(path, asdict(submission))
    return path


def read(path: Path) -> Submission:
    """Raises ValueError: it is not a submission file."""
    said = json.loads(path.read_text())
    try:
        return Submission(said["name"], said["backend"], tuple(said["packs"]), said["time"], said["taken"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a submission file") from None


def unfinished(folder: Path, backend: str) -> list[Submission]:
    """The submissions to a backend, oldest first, that have packs with unfinished runs."""
    return [s for s in _of(folder, backend) if any(_is_left(folder, name) for name in s.packs)]


def newest(folder: Path, backend: str, pack: str) -> Submission | None:
    """The last submission of a pack to a backend."""
    return next((s for s in reversed(_of(folder, backend)) if pack in s.packs), None)


def _of(folder: Path, backend: str) -> list[Submission]:
    """Oldest first."""
    found = [read(path) for path in (folder / "submissions").glob("*.json")]
    return sorted((s for s in found if s.backend == backend), key=lambda s: (s.time, s.name))


def _is_left(folder: Path, name: str) -> bool:
    said = records.read_json(folder / "packs" / f"{name}.json") or {"runs": []}
    return any(not (folder / run["run_id"] / "DONE").exists() for run in said["runs"])


def backends(folder: Path) -> Iterable[str]:
    """Names of the backends that were given packs of this study."""
    return sorted({read(path).backend for path in (folder / "submissions").glob("*.json")})


def pack_file(path: Path, task: int) -> Path:
    """The pack file of one task of a submission.

    Raises:
      ValueError: it has no such task.
    """
    submission = read(path)
    if not 0 <= task < len(submission.packs):
        raise ValueError(f"{path} has tasks 0 to {len(submission.packs) - 1}, not {task}")
    return path.parent.parent / "packs" / f"{submission.packs[task]}.json"
