"""Loss curves from a table: one row per logged step, with the learning rate of that step.

A table logs some steps only, and the law needs the rate of all: what lies between two logged steps is said by the
reader's caller, never guessed. Whoever has the schedule itself builds a `Curve` from it directly.
"""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

COLUMNS = {"model": "model", "schedule": "schedule", "step": "step", "lr": "lr", "loss": "loss"}
BETWEEN = ("linear", "hold")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The logged losses of one run: rate lr_T[s] at step s = 0 .. T-1, loss_n (nats) after the increasing steps_n."""

    name: str
    model: str
    lr_T: np.ndarray
    steps_n: np.ndarray
    loss_n: np.ndarray

    def __post_init__(self):
        if len(self.steps_n) != len(self.loss_n) or (np.diff(self.steps_n) <= 0).any():
            raise ValueError(f"curve {self.name}: its logged steps must increase, with one loss each")
        if not (np.isfinite(self.loss_n) & (self.loss_n > 0)).all():
            raise ValueError(f"curve {self.name}: a loss is not a positive finite number; remove the step")
        if self.steps_n[0] < 0 or self.steps_n[-1] >= len(self.lr_T):
            raise ValueError(
                f"curve {self.name}: steps {self.steps_n[0]} to {self.steps_n[-1]} are logged, "
                f"but the schedule has rates for 0 to {len(self.lr_T) - 1}"
            )


def load_curves(
    path: str | Path, columns: Mapping[str, str] | None = None, warmup_steps: int = 0, between: str = "linear"
) -> list[Curve]:
    """Curves of a CSV, in the order of their first rows.

    Args:
      columns: {"model", "schedule", "step", "lr", "loss": header}; where a name is left out, the header of that name. A
        table without a model column holds one model.
      warmup_steps: the rate rises from 0 at step 0 to the first logged rate at the last of these steps; with 0 the
        first logged rate holds from step 0.
      between: the rate between two logged steps: on a line, or held until the next.
    """
    if between not in BETWEEN:
        raise ValueError(f"between={between!r} is not one of {', '.join(BETWEEN)}")
    unknown = set(columns or {}) - set(COLUMNS)
    if unknown:
        raise ValueError(f"columns: {sorted(unknown)[0]!r} is not one of {', '.join(COLUMNS)}")
    columns = COLUMNS | dict(columns or {})
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows, headers = list(reader), reader.fieldnames or []
    for name, header in columns.items():
        if header not in headers and (name != "model" or header != COLUMNS["model"]):
            raise ValueError(f"{path}: no column {header!r} for {name}; it has {', '.join(headers)}")
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for number, row in enumerate(rows, 1):
        key = (row.get(columns["model"], ""), row[columns["schedule"]])
        groups.setdefault(key, []).append(tuple(_number(row, columns[c], path, number) for c in ("step", "lr", "loss")))
    if not groups:
        raise ValueError(f"{path}: no rows")
    return [_curve(model, schedule, rows, warmup_steps, between) for (model, schedule), rows in groups.items()]


def _number(row, header, path, number):
    try:
        return float(row[header])
    except (TypeError, ValueError):
        raise ValueError(f"{path} row {number}: {header} is {row[header]!r}, not a number") from None


def _curve(model, schedule, rows, warmup_steps, between):
    step_n, lr_n, loss_n = np.array(sorted(rows)).T
    steps_n = step_n.astype(int)
    if (steps_n != step_n).any() or steps_n[0] < 0:
        raise ValueError(f"curve {schedule}: steps must be whole numbers from 0 on")
    if warmup_steps > steps_n[0]:
        raise ValueError(f"curve {schedule}: warmup_steps={warmup_steps}, but step {steps_n[0]} is logged already")
    T = np.arange(steps_n[-1] + 1)
    if between == "linear":
        lr_T = np.interp(T, steps_n, lr_n)
    else:
        lr_T = lr_n[np.maximum(np.searchsorted(steps_n, T, side="right") - 1, 0)]
    lr_T[:warmup_steps] = np.linspace(0.0, lr_n[0], warmup_steps)
    return Curve(schedule, model, lr_T, steps_n, loss_n)
