"""The state of a study, from its folders alone: what tables, the local launcher and `cancel` go by."""

import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmjax import launchers, lease, records
from slmjax.config import ConfigError


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
    pid: int | None
    reason: str | None

    def to_json(self) -> dict:
        return asdict(self)


def study_status(folder: Path) -> list[RunStatus]:
    """One row for each run of the study, in its order, from records and status files.

    Raises:
      ValueError: `folder` is no study.
    """
    plan, logged = records.load_study(folder)
    return [_of_run(entry, folder / entry["run_id"], logged.get(entry["run_id"])) for entry in plan["runs"]]


def _of_run(entry: dict, run_dir: Path, run: records.RunRecords | None) -> RunStatus:
    said = (run and run.status) or {}
    evaluation = run.evals[-1] if run and run.evals else {}
    done = run is not None and (run_dir / "DONE").exists()
    state = "done" if done else said.get("state", "queued")
    if state == "running" and not writer_alive(run_dir):
        state = "killed"
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
        pid=said.get("pid") if state == "running" else None,
        reason=said.get("reason") or (_died(run_dir) if state == "killed" else None),
    )


def writer_alive(run_dir: Path) -> bool:
    """Whether the holder of the run's lease lives: by its process on this machine, by its heartbeat elsewhere."""
    holder = records.read_json(run_dir / lease.LEASE)
    if holder is None:
        return False
    if holder["place"] == lease._place():
        return lease._process_start(holder["pid"]) == holder["process_start"]
    return time.time() - holder["heartbeat"] <= holder["ttl_s"]


def _died(run_dir: Path) -> str:
    holder = records.read_json(run_dir / lease.LEASE)
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


def cancel(folder: Path) -> list[int]:
    """Asks every process on this machine that trains here to save and stop; their pids.

    A launcher passes the signal on to its own processes, which therefore get none from here: a second signal would end
    them without saving.
    """
    driver = launchers.holder_of(folder / "packs" / "launcher.lock")
    packs = {launchers.holder_of(path) for path in folder.glob("packs/*.lock")} - {None, driver}
    runs = {row.pid for row in study_status(folder) if row.state == "running" and _is_here(folder / row.run_id)}
    chosen = ((runs - packs) | {driver}) if driver else (runs | packs)
    for pid in sorted(chosen):
        os.kill(pid, signal.SIGTERM)
    return sorted(chosen)


def _is_here(run_dir: Path) -> bool:
    holder = records.read_json(run_dir / lease.LEASE)
    return holder is not None and holder["place"] == lease._place()
