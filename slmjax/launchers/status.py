"""The state of a study, from its folders alone: what tables, launchers and `cancel` go by."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmjax import lease, paths, records
from slmjax.config import ConfigError
from slmjax.launchers.pull import PULLED
from slmjax.mirror import lease as store_lease


@dataclass(frozen=True)
class RunStatus:
    """state: one of records.STATES, or `killed`: it says running, and its process is gone."""

    run_id: str
    tags: dict[str, Any]
    state: str
    step: int | None
    total_steps: int | None
    loss: float | None
    bits_per_byte: float | None
    tokens_per_s: int | None
    heartbeat_s: float | None  # age of the last sign of life
    attempts: int
    eta_s: float | None  # what is left to do at the present speed, of one that runs
    device_hours: float
    pid: int | None
    reason: str | None

    def to_json(self) -> dict:
        return asdict(self)


def study_status(folder: paths.Path) -> list[RunStatus]:
    """One row for each run of the study, in its order, from records and status files.

    A copy that was pulled tells how it was then.

    Raises:
      ValueError: `folder` is no study.
    """
    plan, logged = records.load_study(folder, records.read_landmarks)
    holders = store_lease.holders(folder)
    copied = (records.read_json(folder / PULLED) or {}).get("time")

    def row(entry: dict) -> RunStatus:
        run_id = entry["run_id"]
        return _of_run(entry, folder / run_id, logged.get(run_id), holders.get(run_id), copied)

    return paths.each(folder, row, plan["runs"])


def _of_run(
    entry: dict, run_dir: paths.Path, run: records.RunRecords | None, holder: dict | None, copied: float | None
) -> RunStatus:
    said = (run and run.status) or {}
    evaluation = run.evals[-1] if run and run.evals else {}
    done = run is not None and (run_dir / "DONE").exists()
    state = "done" if done else said.get("state", "queued")
    if state == "running":
        own = records.read_json(run_dir / lease.LEASE)  # of a process that trains in this very folder
        if own is not None:
            holder, copied = own, None
        # Of a copy that came over ssh there is nobody to ask.
        if holder is not None or copied is None:
            state = "running" if holder and store_lease.alive(holder, copied) else "killed"
    return RunStatus(
        run_id=entry["run_id"],
        tags=entry["tags"],
        state=state,
        step=said.get("step"),
        total_steps=said.get("total_steps"),
        loss=said.get("loss"),
        bits_per_byte=evaluation.get("bits_per_byte"),
        tokens_per_s=said.get("tokens_per_s"),
        heartbeat_s=max(0.0, time.time() - said["time"]) if "time" in said else None,
        attempts=run.num_attempts if run else 0,
        eta_s=_eta_s(run, said) if state == "running" else None,
        device_hours=run.device_hours if run else 0.0,
        pid=said.get("pid") if state == "running" else None,
        reason=said.get("reason") or (_died(holder) if state == "killed" else None),
    )


def _eta_s(run: records.RunRecords, said: dict) -> float | None:
    speed = said.get("tokens_per_s")
    if not speed or run.start is None:
        return None
    return max(0, said["total_steps"] - said["step"]) * run.start["tokens_per_step"] / speed


def writer_alive(run_dir: paths.Path) -> bool:
    """Whether the holder of the run's lease lives: by its process on this machine, by its heartbeat elsewhere."""
    holder = store_lease.holders(run_dir.parent).get(run_dir.name) or records.read_json(run_dir / lease.LEASE)
    return holder is not None and store_lease.alive(holder)


def _died(holder: dict | None) -> str:
    return f"pid {holder['pid']} on {holder['host']} is gone" if holder else "its process is gone"


def find_run(folder: Path, prefix: str) -> RunStatus:
    """The run whose id begins with `prefix`.

    Raises:
      ConfigError: none, or several.
    """
    rows = study_status(folder)
    found = [row for row in rows if row.run_id.startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} runs" if found else "no run"
        ids = ", ".join(row.run_id for row in found or rows)
        raise ConfigError(f"{what} of {folder} has an id that begins with {prefix!r}; ids: {ids}")
    return found[0]


def is_here(run_dir: Path) -> bool:
    """Whether the run's lease was taken by a process of this machine."""
    holder = records.read_json(run_dir / lease.LEASE)
    return holder is not None and holder["place"] == lease.place()
