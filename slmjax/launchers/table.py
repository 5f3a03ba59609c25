"""The runs of a study as a table: once, or on a terminal as they change."""

import time
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.live
import rich.table

from slmjax.launchers import backends, causes, status
from slmjax.launchers.status import RunStatus
from slmjax.scaling import show

STYLES = {"done": "green", "running": "cyan", "waiting": "yellow", "failed": "red", "diverged": "red", "killed": "red"}
LEFT = ("run", "tags", "state", "reason")
OVER = ("done", "failed", "diverged")
INTERVAL_S = 2.0


def look(folder: Path) -> tuple[list[dict[str, str]], list[str], list[RunStatus]]:
    """Rows to show, lines to show below them, and the rows as they are."""
    rows = status.study_status(folder)
    scheduled, troubles = backends.in_hand(folder)
    shown = [_row(row, scheduled.get(row.run_id)) for row in rows]
    states = [row["state"] for row in shown]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    hours = sum(row.device_hours for row in rows)
    below = [f"{counts} of {len(rows)} runs, {hours:.3g} device-hours"]
    return shown, below + causes.summary(rows) + troubles, rows


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


def watch(folder: Path, make_table: Callable[[list[dict]], rich.table.Table], print_once: Callable[[], None]) -> None:
    """Shows the table until nothing is left to wait for or Ctrl-C; where there is no terminal, once each minute."""
    console = rich.console.Console()
    if not console.is_terminal:
        while True:
            print_once()
            if _is_over(status.study_status(folder)):
                return
            time.sleep(60)
    with rich.live.Live(console=console, auto_refresh=False) as live:
        while True:
            shown, below, rows = look(folder)
            grid = rich.table.Table.grid()
            grid.add_row(make_table(shown))
            for line in below:
                grid.add_row(line)
            live.update(grid, refresh=True)
            if _is_over(rows):
                return
            time.sleep(INTERVAL_S)


def _is_over(rows: list[RunStatus]) -> bool:
    return all(row.state in OVER for row in rows)
