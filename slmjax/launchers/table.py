"""The runs of a study as a table: once, or on a terminal as they change."""

import bisect
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import rich.console
import rich.live
import rich.table
from rich.text import Text

from slmjax import launchers, paths
from slmjax.launchers import backends, causes, status
from slmjax.launchers.status import RunStatus
from slmjax.scaling import show

STYLES = {"done": "green", "running": "cyan", "waiting": "yellow", "failed": "red", "diverged": "red", "killed": "red"}
LEFT = ("run", "tags", "state", "reason")
LONG = ("tags", "reason")
OVER = ("done", "failed", "diverged")
ACTIVE = ("running", "starting", "waiting")
BY_URGENCY = (*ACTIVE, "failed", "diverged", "killed", "preempted", "queued", "done")
UNSAID = "its process ended before it began; slmjax study logs {} --output says what it printed"
INTERVAL_S, LINES_INTERVAL_S = 2.0, 60.0


class Look(NamedTuple):
    """Rows to show, lines to show beside them, the rows as they are, and which schedulers could not be asked."""

    shown: list[dict[str, str]]
    notes: list[str]
    rows: list[RunStatus]
    troubles: list[str]


def look(folder: Path) -> Look:
    scheduled, troubles = backends.in_hand(folder)  # first: asking may bring the records home
    rows = status.study_status(folder)
    ended = set() if paths.is_remote(folder) or troubles else backends.begun_by(folder) - set(scheduled)
    rows = [replace(row, reason=UNSAID.format(row.run_id)) if _unsaid(row, ended) else row for row in rows]
    shown = [_row(row, scheduled.get(row.run_id)) for row in rows]
    states = [row["state"] for row in shown]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    hours = sum(row.device_hours for row in rows)
    notes = [f"{counts} of {len(rows)} runs, {hours:.3g} device-hours"]
    return Look(shown, notes + causes.summary(rows) + troubles, rows, troubles)


def _unsaid(row: RunStatus, ended: set[str]) -> bool:
    """Whether the run's process has ended before it could say anything: no environment, no memory, no budget."""
    return row.state == "queued" and row.run_id in ended


def _row(row: RunStatus, scheduled) -> dict[str, str]:
    state, reason = row.state, row.reason or ""
    if scheduled and state not in ("running", "done"):
        backend, seen = scheduled
        said = f"{backend} {seen.where} {seen.note}".strip()
        reason = said if state in ("queued", "preempted") else f"{reason} ({said})"
        state = "waiting" if seen.state == "waiting" else "starting"
    return {
        "run": row.run_id,
        "tags": " ".join(f"{key}={value}" for key, value in row.tags.items()),
        "state": state,
        "step": f"{row.step}/{row.total_steps}" if row.step is not None else "-",
        "loss": f"{row.loss:.4f}" if row.loss is not None else "-",
        "bits/byte": f"{row.bits_per_byte:.4f}" if row.bits_per_byte is not None else "-",
        "tok/s": f"{row.tokens_per_s:,}" if row.tokens_per_s else "-",
        "left": show.duration(row.eta_s) if row.eta_s is not None else "-",
        "heartbeat": show.duration(row.heartbeat_s) if row.state in ("running", "killed") else "-",
        "restarts": str(max(0, row.attempts - 1)),
        "reason": reason,
    }


def to_json(row: RunStatus) -> dict:
    kind = causes.cause(row)
    return {**row.to_json(), "cause": kind and kind[0]}


def watch(
    folder: Path, make_table: Callable[[list[dict]], rich.table.Table], print_look: Callable[[Look], None]
) -> None:
    """Shows the table until nothing is left to wait for or Ctrl-C; where there is no terminal, once each minute."""
    console = rich.console.Console()
    if console.is_terminal:
        with rich.live.Live(console=console, auto_refresh=False) as live:

            def show_look(seen: Look) -> None:
                live.update(_fitted(seen, make_table, console), refresh=True)

            last = _until_over(folder, show_look, INTERVAL_S)
    else:
        last = _until_over(folder, print_look, LINES_INTERVAL_S)
    if any(row["state"] not in OVER for row in last.shown):
        console.print("nothing is running and nothing is in hand; slmjax study run goes on", soft_wrap=True)


def _until_over(folder: Path, show_look: Callable[[Look], None], interval_s: float) -> Look:
    while True:
        seen = look(folder)
        show_look(seen)
        if _is_over(folder, seen):
            return seen
        time.sleep(interval_s)


def _is_over(folder: Path, seen: Look) -> bool:
    """Whether no run is running or in hand. While a pack begins only its lock or that of its launcher tells."""
    states = {row["state"] for row in seen.shown}
    if states.issubset(OVER):
        return True
    if seen.troubles or not states.isdisjoint(ACTIVE):
        return False
    return paths.is_remote(folder) or not any(launchers.is_held(path) for path in folder.glob("packs/*.lock"))


def _fitted(seen: Look, make_table: Callable, console: rich.console.Console) -> rich.table.Table:
    """The notes, and below them the runs: whole and in their order or, where the terminal has too few lines, a line
    each and the most urgent first."""
    urgent = sorted(seen.shown, key=lambda row: BY_URGENCY.index(row["state"]))
    short = [row | {name: Text(row[name], no_wrap=True, overflow="ellipsis") for name in LONG} for row in urgent]

    def grid(rows: list[dict]) -> rich.table.Table:
        left_out = len(seen.shown) - len(rows)
        grid = rich.table.Table.grid()
        for part in (*seen.notes, make_table(rows), *([f"{left_out} others are not shown"] if left_out else [])):
            grid.add_row(part)
        return grid

    def too_long(rows: list[dict]) -> bool:
        return len(rows) > console.height or len(console.render_lines(grid(rows), pad=False)) > console.height

    if not too_long(seen.shown):
        return grid(seen.shown)
    counts = range(1, len(short) + 1)
    return grid(short[: max(1, bisect.bisect_left(counts, True, key=lambda count: too_long(short[:count])))])
