"""Trains packs on this machine: one process each, on its share of the cores and of the GPUs.

A process holds its pack's lock for as long as it lives, also when its launcher is gone: that is how the next launcher
finds it, and how nothing is started twice.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slmjax import environment, launchers, study
from slmjax.launchers import Pack
from slmjax.launchers.backend import BackendError, Seen, show_file
from slmjax.study import Study


@dataclass(frozen=True)
class Place:
    """A share of the machine. gpus: their names for CUDA_VISIBLE_DEVICES; None on a machine without."""

    cores: list[int]
    gpus: list[str] | None = None

    @property
    def variables(self) -> dict[str, str]:
        chosen = {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return environment.variables(len(self.cores)) | chosen


class Local:
    """Backend of `jobs` places, see `slmjax.launchers.backend`."""

    name, attached, queues_after, poll_s = "local", True, False, 0.2

    def __init__(self, folder: Path, jobs: int = 1):
        self.folder = folder
        self.free = make_places(environment.cores(), environment.gpus(), jobs)
        self.places = len(self.free)
        self.children: dict[str, tuple[Place, subprocess.Popen]] = {}

    def packs(self, plan: Study, folder: Path, busy: set[str]) -> list[Pack]:
        """One for each program, of all its runs, finished or not: how many train side by side decides last bits."""
        packs = [Pack(folder, runs, runs[0].program_id) for runs in study.packs(plan.runs)]
        return sorted(packs, key=lambda pack: -pack.flops)

    def submit(self, packs: list[Pack], after: Mapping[str, set[str]]) -> None:
        for pack in packs:
            lock = launchers.take_lock(pack.path("lock"), tries=2)
            if lock is None:
                raise BackendError(f"pack {pack.name} is being trained by another process")
            place = self._take_place()
            command = _command(pack, place)
            # Its own session, so that Ctrl-C reaches it once, through us; its own log, outliving our terminal.
            with open(pack.path("log"), "a") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                    env=os.environ | place.variables,
                )
            launchers.name_holder(lock, process.pid, cores=place.cores, gpus=place.gpus)
            os.close(lock)  # the child's copy holds it now
            self.children[pack.name] = place, process

    def preview(self, packs: list[Pack], after: Mapping[str, set[str]]) -> list[str]:
        places = [self.free[i % len(self.free)] for i in range(len(packs))]
        return [shlex.join(_command(pack, place)) for pack, place in zip(packs, places, strict=True)]

    def poll(self) -> dict[str, Seen]:
        seen = {path.stem: Seen("running", f"pid {launchers.holder_of(path)}") for path in self._held_locks()}
        for name, (place, process) in list(self.children.items()):
            if process.poll() is None:
                seen.setdefault(name, Seen("running", f"pid {process.pid}"))
            elif name not in seen:  # else it has ended since its lock was looked at, and counts at the next look
                del self.children[name]
                self.free.append(place)
        return seen

    def _held_locks(self) -> list[Path]:
        locks = self.folder.glob("packs/*.lock")
        return [path for path in locks if path.stem != "launcher" and launchers.is_held(path)]

    def _take_place(self) -> Place:
        """A free place, if possible on cores that no process of an earlier launcher has, and never on its GPUs.

        Raises:
          BackendError: there is none.
        """
        said = [launchers.said_by_holder(path) for path in self._held_locks() if path.stem not in self.children]
        cores, gpus = ({thing for one in said for thing in one.get(kind) or ()} for kind in ("cores", "gpus"))
        allowed = [place for place in self.free if not gpus & set(place.gpus or ())]
        if not allowed:
            raise BackendError("the GPUs are in use by processes of an earlier launch")
        place = min(allowed, key=lambda place: len(cores & set(place.cores)))
        self.free.remove(place)
        return place

    def logs(self, name: str, follow: bool) -> list[str] | None:
        path = self.folder / "packs" / f"{name}.log"
        return show_file(path, follow) if path.exists() else None

    def cancel(self, names: Iterable[str]) -> list[str]:
        asked = []
        for name in names:
            pid = launchers.holder_of(self.folder / "packs" / f"{name}.lock")
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, signal.SIGTERM)
                asked.append(f"pid {pid}")
        return asked


def _command(pack: Pack, place: Place) -> list[str]:
    cores = ",".join(map(str, place.cores))
    return [sys.executable, "-m", "slmjax", "pack", str(pack.path("json")), f"--cores={cores}"]


def make_places(cores: list[int], gpus: list[str], jobs: int) -> list[Place]:
    """The machine in `jobs` shares: cores, and GPUs where there are some.

    Raises:
      ValueError: fewer GPUs than jobs; two processes on one GPU would each want all its memory.
    """
    if gpus and jobs > len(gpus):
        raise ValueError(f"jobs={jobs} is more than the {len(gpus)} GPUs of this machine")
    of_gpus = shares(gpus, jobs) if gpus else [None] * jobs
    return [Place(*share) for share in zip(shares(cores, jobs), of_gpus, strict=True)]


def shares(things: list, jobs: int) -> list[list]:
    """What each of `jobs` places has of the cores or GPUs; with more places than things, some share one."""
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be >= 1")
    if jobs >= len(things):
        return [[things[i % len(things)]] for i in range(jobs)]
    bounds = [round(i * len(things) / jobs) for i in range(jobs + 1)]
    return [things[bounds[i] : bounds[i + 1]] for i in range(jobs)]
