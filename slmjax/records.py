"""What a run writes about itself, and how it is read back: the only interface between training and fitting.

    OUT/<study>/study.json
    OUT/<study>/<run_id>/config.json provenance.json status.json attempt-NNN.jsonl tb/ checkpoints/ DONE

An attempt file holds one JSON object a line, of kind `start`, `train`, `eval` or `end`; each launch of a run writes its
own. Where two attempts logged the same step, one having been killed past its last checkpoint, the later wins. Written
on a disk; read there, or in the copy that an object store has (`slmjax.mirror`).
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax import paths

STATES = ("queued", "running", "preempted", "failed", "diverged", "done")
TRAIN = '{"kind": "train", '  # how RunWriter begins these lines
MOST_REMEMBERED = 20_000  # attempts: a few kB each
_landmarks: dict[Path, tuple[tuple, list[dict]]] = {}  # (size, time of change), what was read


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` in one step, so that a reader or a kill never sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """The value in `path`, or None when there is no such file."""
    try:
        return json.loads(paths.read_text(path))
    except FileNotFoundError:
        return None


def finite(value):
    """A float that JSON can carry: NaN and infinities become null, never a number."""
    return float(value) if value is not None and math.isfinite(value) else None


class RunWriter:
    """Writes one attempt of one run; every line is on disk when `write` returns."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        files = attempt_files(run_dir)
        self.run_dir, self.attempt = run_dir, attempt_number(files[-1]) + 1 if files else 0
        self._file = open(run_dir / f"attempt-{self.attempt:03d}.jsonl", "x", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, **values) -> None:
        self._file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def status(self, state: str, **values) -> None:
        """Rewrites status.json: the run's truth for tables and launchers, with the time as heartbeat."""
        assert state in STATES, state
        owner = {"pid": os.getpid(), "attempt": self.attempt, "time": time.time()}
        write_json(self.run_dir / "status.json", {"state": state, **owner, **values})

    def done(self) -> None:
        (self.run_dir / "DONE").touch()

    def close(self) -> None:
        self._file.close()


class SilentWriter:
    """In the place of a RunWriter, in a process that leaves the writing to another."""

    attempt = None

    def write(self, kind: str, **values) -> None:
        pass

    def status(self, state: str, **values) -> None:
        pass

    def done(self) -> None:
        pass

    def close(self) -> None:
        pass


def write_failure(run_dir: Path, total_steps: int, reason: str) -> None:
    """Says of a run that it failed where no attempt of its own could: before it began, or in another's hands."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "status.json"
    left = {"step": 0, "total_steps": total_steps, "loss": None, "tokens_per_s": 0, "attempt": 0}
    now = {"state": "failed", "pid": os.getpid(), "time": time.time(), "reason": reason}
    write_json(path, left | (read_json(path) or {}) | now)


@dataclass
class RunRecords:
    """Everything one run folder says. `train` and `evals` are in step order, each step once."""

    run_id: str
    config: dict | None
    provenance: dict | None
    status: dict | None
    start: dict | None = None  # the first attempt's
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    end: dict | None = None  # the last attempt's; None while running or after a kill
    num_attempts: int = 0
    device_hours: float = 0.0

    @property
    def done(self) -> bool:
        return self.end is not None and self.end["status"] == "done"


def attempt_files(run_dir: Path) -> list[Path]:
    """In the order of the attempts."""
    files = (p for p in run_dir.glob("attempt-*.jsonl") if re.fullmatch(r"attempt-\d+\.jsonl", p.name))
    return sorted(files, key=attempt_number)


def attempt_number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def read_lines(path: Path) -> list[dict]:
    """The records of an attempt; a last line cut short by a kill is left out, any other bad line raises ValueError."""
    lines = paths.read_text(path).split("\n")
    return _parsed(path, lines, range(len(lines)))


def read_landmarks(path: Path) -> list[dict]:
    """The records of an attempt without its `train` lines but the last two: what tells how it stands, and what it cost.

    Train lines are nearly all of a file, and are not even parsed; the rest is remembered for as long as the file stays
    as it is. So a table of hundreds of runs can be made anew every other second.
    """
    about = path.stat()
    seen = (about.length, about.mtime) if paths.is_remote(path) else (about.st_size, about.st_mtime_ns)
    before, landmarks = _landmarks.get(path, (None, []))
    if before != seen:
        lines = paths.read_text(path).split("\n")
        passed = {i for i, line in enumerate(lines) if line.startswith(TRAIN)}
        passed -= set(sorted(passed)[-2:])  # of two, one is whole
        landmarks = _parsed(path, lines, [i for i in range(len(lines)) if i not in passed])
        if len(_landmarks) >= MOST_REMEMBERED:
            _landmarks.clear()
        _landmarks[path] = seen, landmarks
    return landmarks


def _parsed(path: Path, lines: list[str], chosen: Iterable[int]) -> list[dict]:
    records = []
    for i in chosen:
        if not lines[i]:
            continue
        try:
            records.append(json.loads(lines[i]))
        except json.JSONDecodeError as error:
            if i == len(lines) - 1:  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}:{i + 1}: not a JSON record ({error.msg})") from None
    return records


def device_hours(attempt: list[dict]) -> float:
    """What an attempt has cost up to its last line, from its records or its landmarks.

    Its devices are those of its mesh, without those that other runs of its pack trained on.
    """
    start = next((record for record in attempt if record["kind"] == "start"), None)
    if start is None:
        return 0.0
    devices = math.prod(size for axis, size in start.get("mesh", {}).items() if axis != "population")
    return devices * max(record.get("wall_s", 0.0) for record in attempt) / 3600


def load_run(run_dir: Path | str, read: Callable[[Path], list[dict]] = read_lines) -> RunRecords:
    """read: of an attempt file; with `read_landmarks` `train` has little of it, and the run comes at once."""
    run_dir = paths.as_path(run_dir)
    run = RunRecords(
        run_dir.name,
        read_json(run_dir / "config.json"),
        read_json(run_dir / "provenance.json"),
        read_json(run_dir / "status.json"),
    )
    for path in attempt_files(run_dir):
        attempt = read(path)
        run.num_attempts += 1
        run.device_hours += device_hours(attempt)
        run.end = None
        for record in attempt:
            match record["kind"]:
                case "start":
                    run.start = run.start or record
                    # What an earlier attempt logged past this point was redone.
                    run.train = [r for r in run.train if r["step"] <= record["step"]]
                    run.evals = [r for r in run.evals if r["step"] <= record["step"]]
                case "train":
                    run.train.append(record)
                case "eval":
                    # A run killed between its last checkpoint and DONE is evaluated there again.
                    run.evals = [r for r in run.evals if r["step"] != record["step"]] + [record]
                case "end":
                    run.end = record
    return run


def load_study(
    study_dir: Path | str, read: Callable[[Path], list[dict]] = read_lines
) -> tuple[dict, dict[str, RunRecords]]:
    """study.json and the records of each of its runs that has a folder, in the study's order.

    read: of an attempt file, as in `load_run`.

    Raises:
      ValueError: no study.json there.
    """
    study_dir = paths.as_path(study_dir)
    study = read_json(study_dir / "study.json")
    if study is None:
        raise ValueError(f"{study_dir} is not a study folder: it has no study.json")
    run_ids = [run["run_id"] for run in study["runs"]]

    def load(run_id: str) -> RunRecords | None:
        folder = study_dir / run_id
        return load_run(folder, read) if folder.is_dir() else None

    found = zip(run_ids, paths.each(study_dir, load, run_ids), strict=True)
    return study, {run_id: run for run_id, run in found if run is not None}
