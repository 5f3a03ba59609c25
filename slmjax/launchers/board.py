"""How a launcher shows a study while it runs: a live display on a terminal, plain lines elsewhere.

Everything comes from the run folders, so processes of an earlier launch are shown as well.
"""

import itertools
import sys
import time
from pathlib import Path

import rich.console
import rich.live
import rich.progress
import rich.table

from slmjax import records, study
from slmjax.launchers import Pack
from slmjax.scaling import show
from slmjax.study import Run

LOOK_INTERVAL_S = 1.0
LINE_INTERVAL_S = 15.0
MOST_LINES = 10  # of running runs, where there is no terminal to show them in place


class Board:
    """Context manager; `update` may be called as often as one likes."""

    def __init__(self, folder: Path, runs: list[Run]):
        self.folder, self.runs = folder, runs
        self.cost = {run.run_id: study.run_flops(run) for run in runs}
        self.done: set[str] = set()
        self.failed: dict[str, float] = {}  # run_id → when
        self.console = rich.console.Console(stderr=True)
        self.live = rich.live.Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.looked_at = self.printed_at = -1e9

    def __enter__(self):
        self.began = time.time()
        self.done = {run.run_id for run in self.runs if self._is_done(run)}
        self.paid_before = self._paid()
        before = f", {len(self.done)} finished before" if self.done else ""
        programs = len({run.program_id for run in self.runs})
        self.say(f"{self.folder}: {len(self.cost)} runs in {programs} programs{before}")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def update(self, running: list[Pack], num_waiting: int) -> None:
        """Tells which runs have ended, and how the running ones are."""
        now = time.monotonic()
        if running and now - self.looked_at < LOOK_INTERVAL_S:
            return
        self.looked_at = now
        for run in self.runs:
            self._tell_end(run)
        told = [(run, self._status(run)) for pack in running for run in pack.unfinished]
        told = [(run, said) for run, said in told if said.get("state") == "running"]
        head = self._head(num_waiting)
        if self.live:
            grid = rich.table.Table.grid()
            for line in [*itertools.starmap(_line, told), head]:
                grid.add_row(line)
            self.live.update(grid)
        elif running and now - self.printed_at > LINE_INTERVAL_S:
            self.printed_at = now
            print("\n  ".join([head, *_few_lines(told)]), file=sys.stderr, flush=True)

    def _tell_end(self, run: Run) -> None:
        if run.run_id in self.done:
            return
        said = self._status(run)
        if said.get("state") == "done" and self._is_done(run):
            self.done.add(run.run_id)
            self.say(f"done     {_name(run)}  loss {said['loss']:.4f}")
        elif said.get("state") in ("failed", "diverged"):
            # One from before this launch is old news: the run is tried again.
            if said["time"] > self.failed.get(run.run_id, self.began):
                self.say(f"{said['state']:8} {_name(run)}  {said['reason']}")
            self.failed[run.run_id] = said["time"]

    def _head(self, num_waiting: int) -> str:
        paid, total = self._paid(), sum(self.cost.values())
        elapsed = time.time() - self.began
        gained = paid - self.paid_before
        left = f", about {show.duration(elapsed * (total - paid) / gained)} left" if gained > 0.02 * total else ""
        waiting = f", {num_waiting} packs to start" if num_waiting else ""
        head = f"{len(self.done)}/{len(self.cost)} runs, {paid / total:.0%} of the compute"
        return f"{head}, {show.duration(elapsed)}{left}{waiting}"

    def _paid(self) -> float:
        """FLOPs spent on what is done and on what runs."""
        paid = 0.0
        for run in self.runs:
            if run.run_id in self.done:
                paid += self.cost[run.run_id]
            elif said := self._status(run):
                span = max(1, run.config.train.steps - run.first_step)
                paid += self.cost[run.run_id] * max(0, said.get("step", 0) - run.first_step) / span
        return paid

    def _is_done(self, run: Run) -> bool:
        return (self.folder / run.run_id / "DONE").exists()

    def _status(self, run: Run) -> dict:
        return records.read_json(self.folder / run.run_id / "status.json") or {}


def _few_lines(told: list[tuple[Run, dict]]) -> list[str]:
    """One for each run or, of more than can be followed in a log, for the few that are furthest behind."""
    if len(told) <= MOST_LINES:
        return [*itertools.starmap(_line, told)]
    behind = sorted(told, key=lambda each: each[1]["step"] / each[1]["total_steps"])[:3]
    return [*itertools.starmap(_line, behind), f"{len(told) - len(behind)} others are further on"]


def _line(run: Run, said: dict) -> str:
    loss = f"{said['loss']:.3f}" if said.get("loss") else "-"
    return f"{_name(run)}  step {said['step']}/{said['total_steps']}  loss {loss}  {said['tokens_per_s']:,} tok/s"


def _name(run: Run) -> str:
    return " ".join([run.run_id, *(f"{key}={value}" for key, value in run.tags.items())])
