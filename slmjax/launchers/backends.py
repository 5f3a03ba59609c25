"""The backends by name, and what all of those that a study was handed to say about it."""

import importlib
import os
import signal
from pathlib import Path

from slmjax import launchers, records
from slmjax.config import ConfigError, nearest
from slmjax.launchers import status, submissions
from slmjax.launchers.backend import Backend, BackendError, Seen

BACKENDS = {
    "local": "slmjax.launchers.local.Local",
    "slurm": "slmjax.launchers.slurm.Slurm",
    "sky": "slmjax.launchers.sky.Sky",
    "tpu": "slmjax.launchers.tpu.Tpu",
}


def open_backend(name: str, folder: Path, **options) -> Backend:
    """The backend of a study's folder; without options, to ask it and to cancel.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in BACKENDS:
        raise ConfigError(f"--on={name} is not known; {nearest(name, BACKENDS)}")
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
      BackendError: a scheduler that has runs of it could not be asked; all others have been.
    """
    driver = launchers.holder_of(folder / "packs" / "launcher.lock")
    packs = {launchers.holder_of(path) for path in folder.glob("packs/*.lock")} - {None, driver}
    scheduled, troubles = in_hand(folder)
    alone = {
        row.pid
        for row in status.study_status(folder)
        if row.state == "running" and row.run_id not in scheduled and status.is_here(folder / row.run_id)
    }
    chosen = ((alone - packs) | {driver}) if driver else (alone | packs)
    for pid in sorted(chosen):
        os.kill(pid, signal.SIGTERM)
    asked = [f"pid {pid}" for pid in sorted(chosen)]
    for name in {name for name, _ in scheduled.values()}:
        place = open_backend(name, folder)
        asked += place.cancel(place.poll())
    if troubles:
        raise BackendError("; ".join(troubles))
    return asked
