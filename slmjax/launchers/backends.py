"""The backends by name, and what all of those that a study was handed to say about it."""

import importlib
import os
import signal
import time
from pathlib import Path

from slmjax import launchers, records
from slmjax.config import ConfigError, nearest
from slmjax.launchers import status, submissions
from slmjax.launchers.backend import Backend, BackendError, Seen

LEAVE_S = 120.0  # that a launcher has to finish a hand-over and leave
BACKENDS = {
    "local": "slmjax.launchers.local.Local",
    "slurm": "slmjax.launchers.slurm.Slurm",
    "sky": "slmjax.launchers.sky.Sky",
    "tpu": "slmjax.launchers.tpu.Tpu",
}


def check_name(name: str) -> None:
    """Raises ConfigError: there is no backend of that name."""
    if name not in BACKENDS:
        raise ConfigError(f"--on={name} is not known; {nearest(name, BACKENDS)}")


def open_backend(name: str, folder: Path, **options) -> Backend:
    """The backend of a study's folder; without options, to ask it and to cancel.

    Raises:
      ConfigError: there is none of that name.
    """
    check_name(name)
    module, _, kind = BACKENDS[name].rpartition(".")
    return getattr(importlib.import_module(module), kind)(folder, **options)


def in_hand(folder: Path) -> tuple[dict[str, tuple[str, Seen]], list[str]]:
    """run_id → (backend, what is seen of its pack) of all runs in a scheduler's hands; and what could not be asked."""
    found, troubles = {}, []
    for name in submissions.backends(folder):
        try:
            seen = open_backend(name, folder).poll()
        except BackendError as error:
            troubles.append(f"{name}: {error}")
            continue
        for pack, what in seen.items():
            for run in records.read_json(folder / "packs" / f"{pack}.json")["runs"]:
                found[run["run_id"]] = name, what
    return found, troubles


def begun_by(folder: Path) -> set[str]:
    """run_ids of all packs that a process was started for, or a scheduler given, and that none here trains now."""
    names = {name for path in (folder / "submissions").glob("*.json") for name in submissions.read(path).packs}
    names |= {path.stem for path in folder.glob("packs/*.log") if not launchers.is_held(path.with_suffix(".lock"))}
    packs = (records.read_json(folder / "packs" / f"{name}.json") for name in names)
    return {run["run_id"] for pack in packs if pack for run in pack["runs"]}


def output_command(folder: Path, run_id: str, follow: bool) -> list[str]:
    """A command that shows what the processes of a run's pack have printed, where it was handed over last.

    Raises:
      ConfigError: no launcher has started it.
    """
    packs = [path for path in folder.glob("packs/*.json") if run_id in path.read_text()]
    for path in sorted(packs, key=lambda path: -path.stat().st_mtime):
        for name in (*submissions.backends(folder), "local"):
            command = open_backend(name, folder).logs(path.stem, follow)
            if command is not None:
                return command
    raise ConfigError(f"no process of run {run_id} has been started by a launcher of {folder}")


def cancel(folder: Path) -> list[str]:
    """Asks everything that trains runs of this study to save and stop, and its launcher to leave; what was asked.

    A launcher passes the signal on to its own processes, which therefore get none from here: a second signal would end
    them without saving. Nor do processes in a scheduler's hands, which would take their end for a time limit's.

    Raises:
      BackendError: its launcher is on another machine and would start it again; or a scheduler that has runs of it
        could not be asked, and all others have been.
    """
    lock = folder / "packs" / "launcher.lock"
    driver, said = launchers.holder_of(lock), launchers.said_by_holder(lock)
    if said and driver is None:
        who = f"pid {said.get('pid')} on {said.get('host')}"
        raise BackendError(f"its launcher, {who}, would hand over again what is cancelled here; stop that one first")
    packs = {launchers.holder_of(path) for path in folder.glob("packs/*.lock")} - {None, driver}
    scheduled, troubles = in_hand(folder)
    alone = {
        row.pid
        for row in status.study_status(folder)
        if row.state == "running" and row.run_id not in scheduled and status.is_here(folder / row.run_id)
    }
    chosen = ((alone - packs) | {driver}) if driver else (alone | packs)
    asked = [f"pid {pid}" for pid in sorted(chosen) if _stop(pid)]
    if scheduled and driver:  # it may be in the middle of a hand-over
        _wait_free(lock)
        scheduled, troubles = in_hand(folder)
    for name in {name for name, _ in scheduled.values()}:
        place = open_backend(name, folder)
        asked += place.cancel(place.poll())
    if troubles:
        raise BackendError("; ".join(troubles))
    return asked


def _stop(pid: int) -> bool:
    """Whether the process was there to be asked."""
    try:
        os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _wait_free(lock: Path) -> None:
    deadline = time.monotonic() + LEAVE_S
    while launchers.is_held(lock) and time.monotonic() < deadline:
        time.sleep(0.1)
