"""Runs a study on this machine: one process per pack, `jobs` of them at a time, each on its share of the cores.

The truth is in the run folders, so the launcher keeps nothing: kill it, start it again, and it goes on. A process holds
its pack's lock for as long as it lives, also when its launcher is gone; the next launcher then waits for it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from slmjax import environment, launchers, records
from slmjax.launchers import Pack
from slmjax.launchers.board import Board
from slmjax.study import Run, Study

TICK_S = 0.2
MAX_LAUNCHES = 3  # of a pack whose process is killed from outside: for lack of memory, most often


@dataclass
class Place:
    """A share of the cores, and the pack that has it. process is None for one that an earlier launcher started."""

    cores: list[int]
    pack: Pack | None = None
    process: subprocess.Popen | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else launchers.holder_of(self.pack.path("lock"))


def run(plan: Study, out: Path, jobs: int = 1) -> int:
    """Trains what the study has left to train; the exit code: 0 all done, 1 some failed, 3 stopped, 4 some diverged.

    Raises:
      ValueError: another launcher runs this study.
    """
    packs = launchers.write_packs(plan, out)
    with launchers.held(packs[0].folder / "packs" / "launcher.lock") as mine:
        if not mine:
            pid = launchers.holder_of(packs[0].folder / "packs" / "launcher.lock")
            raise ValueError(f"{packs[0].folder} is being run by another launcher, pid {pid}; see slmjax study status")
        return _Launcher(packs, shares(environment.cores(), jobs)).run()


def shares(cores: list[int], jobs: int) -> list[list[int]]:
    """The cores of each of `jobs` places; with more places than cores, some share one."""
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be >= 1")
    if jobs >= len(cores):
        return [[cores[i % len(cores)]] for i in range(jobs)]
    bounds = [round(i * len(cores) / jobs) for i in range(jobs + 1)]
    return [cores[bounds[i] : bounds[i + 1]] for i in range(jobs)]


class _Launcher:
    def __init__(self, packs: list[Pack], cores: list[list[int]]):
        self.packs = packs
        self.waiting = [pack for pack in packs if pack.unfinished]
        self.places = [Place(share) for share in cores]
        self.launches: dict[str, int] = {}
        self.signals = 0
        self.board = Board(packs)

    def run(self) -> int:
        with self.catching_signals(), self.board:
            while self.busy() or (self.waiting and not self.signals):
                for place in self.places:
                    self.tend(place)
                self.board.update([place.pack for place in self.busy()], len(self.waiting))
                time.sleep(TICK_S)
            self.board.update([], 0)
        return self.exit_code()

    def busy(self) -> list[Place]:
        return [place for place in self.places if place.pack]

    def tend(self, place: Place) -> None:
        """Sees whether the place's pack has ended, and gives it the next one."""
        if place.pack and self.has_ended(place):
            self.ended(place)
        if place.pack is None and self.waiting and not self.signals:
            ready = [pack for pack in self.waiting if not self.must_wait(pack)]
            if ready or not self.busy():
                pack = (ready or self.waiting)[0]
                self.waiting.remove(pack)
                self.start(place, pack)

    def must_wait(self, pack: Pack) -> bool:
        """Whether another pack has still to reach a checkpoint that runs of this one begin from."""
        others = [other for other in (*self.waiting, *(place.pack for place in self.busy())) if other is not pack]
        coming = {run.run_id for other in others for run in other.unfinished}
        return any(run.parent in coming and not _saved(pack.folder, run) for run in pack.unfinished)

    def start(self, place: Place, pack: Pack) -> None:
        """Starts the pack's process; or takes on the one that an earlier launcher left behind."""
        place.pack, place.process = pack, None
        lock = launchers.take_lock(pack.path("lock"))
        if lock is None:
            self.board.say(f"pack {pack.program_id} is still running from an earlier launch: waiting for it")
            return
        self.launches[pack.program_id] = self.launches.get(pack.program_id, 0) + 1
        command = [sys.executable, "-m", "slmjax", "pack", str(pack.path("json"))]
        command += [f"--cores={','.join(map(str, place.cores))}"]
        # Its own session, so that Ctrl-C reaches it once, through us; its own log, so that it outlives our terminal.
        with open(pack.path("log"), "a") as log:
            place.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
                env=os.environ | environment.variables(len(place.cores)),
            )
        launchers.name_holder(lock, place.process.pid)
        os.close(lock)  # the child's copy holds it now

    def has_ended(self, place: Place) -> bool:
        if place.process:
            return place.process.poll() is not None
        lock = launchers.take_lock(place.pack.path("lock"))
        if lock is not None:
            os.close(lock)
        return lock is not None

    def ended(self, place: Place) -> None:
        """Frees the place. A pack goes back in line when its process was killed, or was not ours and left work."""
        pack, process = place.pack, place.process
        place.pack = place.process = None
        if self.signals or not pack.unfinished:
            return
        if process is None:
            self.waiting.insert(0, pack)
        elif process.returncode < 0 and process.returncode != -signal.SIGTERM:
            name, count = signal.Signals(-process.returncode).name, self.launches[pack.program_id]
            again = count < MAX_LAUNCHES
            verdict = "starting it again" if again else f"giving it up after {count} launches"
            self.board.say(f"pack {pack.program_id} was ended by {name}: {verdict}; its log: {pack.path('log')}")
            if again:
                self.waiting.insert(0, pack)
        elif process.returncode not in (0, 1, 3, 4):
            self.board.say(f"pack {pack.program_id} failed; its log: {pack.path('log')}")

    @contextlib.contextmanager
    def catching_signals(self):
        """Passes SIGINT and SIGTERM on to the packs, which save and stop; again on a second one, which ends them."""

        def stop(number, frame):
            self.signals += 1
            for place in self.busy():
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(place.pid, signal.SIGTERM)
            how = "saving and stopping; again to stop at once" if self.signals == 1 else "stopping at once"
            self.board.say(f"{signal.Signals(number).name}: {how}")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def exit_code(self) -> int:
        """From the run folders: what is not done is either stopped, failed or diverged."""
        states = set()
        for pack in self.packs:
            for run in pack.unfinished:
                said = records.read_json(pack.folder / run.run_id / "status.json") or {"state": "queued"}
                states.add(said["state"])
        if self.signals or "preempted" in states:
            return 3 if states else 0
        return 4 if states == {"diverged"} else 1 if states else 0


def _saved(folder: Path, run: Run) -> bool:
    """Whether the checkpoint is there that this run begins from; `slmjax.checkpoint` publishes it by a rename."""
    return (folder / run.parent / "checkpoints" / f"step-{run.branch_step:08d}").exists()
