"""Drives a study through a backend: hands over what is left, in an order that lets every run start, and watches.

Everything is derived again at every look: what is done, failed or saved from the run folders, what is in hand from the
backend. So the driver keeps nothing that matters: kill it, start it again, and it goes on. Ctrl-C saves and stops
processes that are its own (`attached`); those of a scheduler go on, and the driver leaves.
"""

import contextlib
import signal
import threading
import time
from pathlib import Path

from slmjax import launchers, records
from slmjax.launchers import Pack, budget
from slmjax.launchers.backend import Backend, BackendError, Tended, waits_for
from slmjax.launchers.board import Board
from slmjax.launchers.command import Refused
from slmjax.study import Study

MAX_LAUNCHES = 4  # of a pack that ends without a word: killed for lack of memory, most often, or its machine was lost
COUNT_INTERVAL_S = 10.0  # between two counts of device-hours, which read every record of the study
BACKOFF_S = 1.0  # before the second launch of such a pack; doubled for each further one


def run(plan: Study, folder: Path, place: Backend, watch: bool) -> int:
    """Trains what the study, saved in `folder`, has left to train.

    watch: stay until nothing is left to do; else leave, with 0, once all that can be handed over has been. A backend
    whose processes are attached, or that has to be tended, is always watched. Otherwise the exit code is 0 when all
    runs are done, 1 when some failed, 3 when they were stopped, 4 when some diverged.

    Raises:
      ValueError: another launcher runs this study.
      BackendError: the backend could not be asked, or refused.
    """
    (folder / "packs").mkdir(exist_ok=True)
    lock = folder / "packs" / "launcher.lock"
    with launchers.held(lock) as mine:
        if not mine:
            said = launchers.said_by_holder(lock)
            who = f"pid {said.get('pid')} on {said.get('host')}"
            raise ValueError(f"{folder} is being run by another launcher, {who}; see slmjax study status")
        driver = _Driver(plan, folder, place)
        stays = watch or place.attached or isinstance(place, Tended)
        return driver.watch() if stays else driver.hand_over()


def preview(plan: Study, folder: Path, place: Backend) -> list[str]:
    """What `run` would do first, to be read by a person. Nothing is written, and nothing handed over."""
    try:
        driver, lines = _Driver(plan, folder, place), []
    except BackendError as error:
        return [f"{place.name}: {error}"]
    for pack in driver.in_hand.values():
        lines.append(f"pack {pack.name} is in hand: {len(pack.unfinished)} unfinished runs")
    for pack in driver.waiting:
        must = " after packs in hand or before it" if driver.must_wait(pack) else ""
        lines.append(f"pack {pack.name}{must}: {' '.join(run.run_id for run in pack.unfinished)}")
    ready = driver.ready()[: place.places]
    return lines + place.preview(ready, {pack.name: driver.followed(pack) for pack in ready})


class _Driver:
    """One launch. `waiting` are packs to hand over, `in_hand` those that the backend has, by name."""

    def __init__(self, plan: Study, folder: Path, place: Backend):
        self.plan, self.folder, self.place = plan, folder, place
        seen = place.poll()
        before = {name: launchers.read_pack(folder / "packs" / f"{name}.json") for name in seen}
        busy = {run.run_id for pack in before.values() for run in pack.runs}
        packs = {pack.name: pack for pack in place.packs(plan, folder, busy)}
        self.in_hand = {name: packs.pop(name, pack) for name, pack in before.items()}
        self.waiting = [pack for pack in packs.values() if pack.unfinished]
        self.board = Board(folder, plan.runs)
        self.launches: dict[str, int] = {}  # since the pack last got further
        self.reached: dict[str, int] = {}  # steps of its runs together, at its last launch
        self.not_before: dict[str, float] = {}
        self.said_before = {run.run_id: self.status(run.run_id).get("time") for run in plan.runs}
        self.counted_at = float("-inf")
        self.stopping, self.trouble = False, None
        self.woken = threading.Event()

    def hand_over(self) -> int:
        """Gives the backend all it can be given now."""
        launchers.write_packs(self.waiting)
        if (over := budget.exceeded(self.folder)) is not None:
            raise BackendError(over)
        self.submit()
        if self.waiting:
            self.board.say(
                f"{len(self.waiting)} packs wait for a place or for a run's checkpoint: the same command hands them "
                "over then, and with --watch does so by itself"
            )
        return 0

    def watch(self) -> int:
        launchers.write_packs(self.waiting)
        with self.catching_signals(), self.board:
            for name in self.in_hand:
                self.board.say(f"pack {name} is in hand from an earlier launch: waiting for it")
            while self.in_hand or (self.waiting and not self.stopping):
                self.tick()
                if self.stopping and not self.place.attached:
                    break
                self.board.update([*self.in_hand.values()], len(self.waiting))
                self.woken.wait(self.place.poll_s)
                self.woken.clear()
            self.board.update([], 0)
        return self.exit_code()

    def tick(self) -> None:
        """Sees which packs have ended, and hands over those that can start. Nothing follows from a failed look."""
        try:
            for line in self.place.tend() if isinstance(self.place, Tended) else []:
                self.board.say(line)
            seen = self.place.poll()
            for pack in [pack for pack in self.waiting if pack.name in seen]:  # handed over, and the answer was lost
                self.waiting.remove(pack)
                self.in_hand[pack.name] = pack
            for name in [name for name in self.in_hand if name not in seen]:
                self.ended(self.in_hand.pop(name))
            if not self.stopping and (over := self.over_budget()) is not None:
                self.place.cancel(self.in_hand)
                self.stopping = True
                self.board.say(over)
            if not self.stopping:
                self.submit()
            self.trouble = None
        except BackendError as error:
            refusals = max((self.launches.get(pack.name, 0) for pack in self.waiting), default=0)
            if isinstance(error, Refused) and not self.in_hand and refusals >= MAX_LAUNCHES:
                raise  # it means it
            if str(error) != self.trouble:
                self.board.say(f"{self.place.name}: {error}; trying again")
            self.trouble = str(error)

    def over_budget(self) -> str | None:
        if time.monotonic() - self.counted_at < COUNT_INTERVAL_S:
            return None
        self.counted_at = time.monotonic()
        return budget.exceeded(self.folder)

    def submit(self) -> None:
        """Hands over the packs that can start, and those that can once packs before them have ended."""
        while ready := self.ready():
            places = self.place.places
            free = len(ready) if places is None else max(0, places - len(self.in_hand))
            chosen = ready[:free]
            if not chosen:
                return
            for pack in chosen:  # counted first: some of them may have been taken when there is trouble
                self.count(pack)
            try:
                self.place.submit(chosen, {pack.name: self.followed(pack) for pack in chosen})
            except BackendError:
                for pack in chosen:
                    self.not_before[pack.name] = time.monotonic() + self.pause_s(pack)
                raise
            for pack in chosen:
                self.waiting.remove(pack)
                self.in_hand[pack.name] = pack

    def count(self, pack: Pack) -> None:
        """Counts a launch; from anew once its runs have got further, for then what ended the last was passing."""
        self.launches[pack.name] = 1 if self.got_further(pack) else self.launches.get(pack.name, 0) + 1
        self.reached[pack.name] = self.steps(pack)

    def pause_s(self, pack: Pack) -> float:
        """Before the next launch; 0 before the first."""
        count = self.launches.get(pack.name, 0)
        return BACKOFF_S * 2 ** (count - 1) if count else 0.0

    def got_further(self, pack: Pack) -> bool:
        return self.steps(pack) > self.reached.get(pack.name, 0)

    def steps(self, pack: Pack) -> int:
        return sum(self.status(run.run_id).get("step", 0) for run in pack.runs)

    def ready(self) -> list[Pack]:
        """Of the waiting packs, those that can be handed over now; any, when nothing else could set them free."""
        due = [pack for pack in self.waiting if time.monotonic() >= self.not_before.get(pack.name, 0)]
        ready = [pack for pack in due if not self.must_wait(pack)]
        return ready or (due if not self.in_hand and len(due) == len(self.waiting) else [])

    def must_wait(self, pack: Pack) -> bool:
        """Whether a run that is still coming has to save a checkpoint first that runs of this pack begin from."""
        starts = waits_for(pack)
        if not starts:
            return False
        coming = {run.run_id for other in self.waiting if other is not pack for run in other.unfinished}
        if not self.place.queues_after:
            coming |= {run.run_id for other in self.in_hand.values() for run in other.unfinished}
        return bool(starts & coming)

    def followed(self, pack: Pack) -> set[str]:
        """Names of the packs in hand that this one has to follow."""
        starts = waits_for(pack)
        return {name for name, other in self.in_hand.items() if starts & {run.run_id for run in other.unfinished}}

    def ended(self, pack: Pack) -> None:
        """Puts a pack back in line that ended without a word about its unfinished runs."""
        left = [run.run_id for run in pack.unfinished if not self.said_why(run.run_id)]
        if not left or self.stopping:
            return
        count = self.launches.get(pack.name, 0)
        log = f"; its output: {pack.path('log')}" if pack.path("log").exists() else ""
        if count >= MAX_LAUNCHES and not self.got_further(pack):
            self.board.say(f"pack {pack.name} ended with {len(left)} runs unfinished: giving it up{log}")
            return
        pause_s = self.pause_s(pack)
        if count:  # else it is an earlier launch's, with whatever has come to the study since
            self.board.say(f"pack {pack.name} ended with {len(left)} runs unfinished: again in {pause_s:.0f} s{log}")
        self.not_before[pack.name] = time.monotonic() + pause_s
        self.waiting.insert(0, pack)
        launchers.write_packs([pack])

    def said_why(self, run_id: str) -> bool:
        """Whether the run has ended since this launch began by its own word, which starting it again would not change.

        Stopped and saved is such a word from a process of our own; from elsewhere it means that its machine was wanted.
        """
        final = ("failed", "diverged", "preempted") if self.place.attached else ("failed", "diverged")
        said = self.status(run_id)
        # Not whether it is later than our clock: the run may have been written by another.
        return said.get("state") in final and said["time"] != self.said_before[run_id]

    def status(self, run_id: str) -> dict:
        return records.read_json(self.folder / run_id / "status.json") or {}

    @contextlib.contextmanager
    def catching_signals(self):
        """SIGINT and SIGTERM save and stop what is attached, a second one ends it; else the driver just leaves."""

        def caught(number, frame):
            name, again = signal.Signals(number).name, self.stopping
            self.stopping = True
            self.woken.set()
            if not self.place.attached:
                self.board.say(f"{name}: leaving; what is handed over goes on")
                return
            self.board.say(f"{name}: {'stopping at once' if again else 'saving and stopping; again to stop at once'}")
            self.place.cancel(self.in_hand)

        before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def exit_code(self) -> int:
        """From the run folders: what is not done is either stopped, failed or diverged."""
        states = set()
        for run in self.plan.runs:
            if not (self.folder / run.run_id / "DONE").exists():
                said = records.read_json(self.folder / run.run_id / "status.json") or {"state": "queued"}
                states.add(said["state"])
        if self.stopping or "preempted" in states:
            return 3 if states else 0
        return 4 if states == {"diverged"} else 1 if states else 0
