"""Final losses of a study, one tag against another: which rate, schedule or size did best, and at what cost."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmjax import records
from slmjax.config import ConfigError, nearest
from slmjax.scaling.points.runs import flops_at


@dataclass(frozen=True)
class Comparison:
    """losses: (row, column) → (held-out loss, its standard error) of the finished runs.

    flops: by column, what its runs cost together: a trunk once, and a branch from where it left the trunk.
    loss_kinds: by column, exact or bound, or both.
    """

    rows: str
    columns: str
    row_values: list[Any]
    column_values: list[Any]
    losses: dict[tuple[Any, Any], tuple[float, float]]
    flops: dict[Any, float]
    loss_kinds: dict[Any, str]

    def best(self) -> dict[Any, Any]:
        """By row, the column with the lowest loss."""
        done = {row: [c for c in self.column_values if (row, c) in self.losses] for row in self.row_values}
        return {row: min(cs, key=lambda c: self.losses[row, c][0]) for row, cs in done.items() if cs}

    def differences(self) -> dict[Any, tuple[float, float]]:
        """By column after the first: mean loss less that of the first column over the rows that have both, and the
        standard error of that mean over these rows, two at least. Rows that are seeds make it a paired comparison."""
        first, out = self.column_values[0] if self.column_values else None, {}
        for column in self.column_values[1:]:
            pairs = [((row, column), (row, first)) for row in self.row_values]
            less = [self.losses[a][0] - self.losses[b][0] for a, b in pairs if a in self.losses and b in self.losses]
            if len(less) > 1:
                out[column] = statistics.mean(less), statistics.stdev(less) / math.sqrt(len(less))
        return out

    def to_json(self) -> dict:
        cells = [{self.rows: r, self.columns: c, "loss": v, "loss_se": se} for (r, c), (v, se) in self.losses.items()]
        best = [{self.rows: row, self.columns: column} for row, column in self.best().items()]
        less = [{self.columns: c, "mean": mean, "se": se} for c, (mean, se) in self.differences().items()]
        flops = [{self.columns: c, "flops": f, "loss_kind": self.loss_kinds.get(c)} for c, f in self.flops.items()]
        return {"losses": cells, "best": best, "differences": less, "flops": flops}


def compare(folder: Path, rows: str, columns: str) -> Comparison:
    """The table of two tags of a study.

    Raises:
      ConfigError: no run has one of the tags, or two finished runs fall into one cell.
    """
    study, logged = records.load_study(folder)
    tags = {run["run_id"]: run["tags"] for run in study["runs"]}
    known = dict.fromkeys(tag for each in tags.values() for tag in each)
    for tag in (rows, columns):
        if tag not in known:
            raise ConfigError(f"no run of {folder} has a tag {tag!r}; {nearest(tag, known)}")
    losses, flops, kinds = {}, {}, {}
    for run_id, run in logged.items():
        if not run.done or columns not in tags[run_id]:
            continue
        column = tags[run_id][columns]
        flops[column] = flops.get(column, 0) + _own_flops(run)
        if rows not in tags[run_id] or tags[run_id].get("role") == "trunk":
            continue
        cell = (tags[run_id][rows], column)
        if cell in losses:
            raise ConfigError(
                f"two runs have {rows}={cell[0]} and {columns}={cell[1]}; choose tags that tell them apart"
            )
        losses[cell] = (run.end["loss"], run.end["loss_se"])
        kinds.setdefault(column, set()).add(run.start.get("loss_kind", "exact"))
    kinds = {column: ", ".join(sorted(of_column)) for column, of_column in kinds.items()}
    return Comparison(rows, columns, *(_distinct(cell[i] for cell in losses) for i in (0, 1)), losses, flops, kinds)


def _distinct(values) -> list:
    """Numbers ascending, names in the order of the study."""
    seen = list(dict.fromkeys(values))
    return sorted(seen) if all(isinstance(value, int | float) for value in seen) else seen


def _own_flops(run: records.RunRecords) -> float:
    first = (run.start["branch_step"] or 0) * run.start["tokens_per_step"]
    first = max(first, run.start.get("inherited_tokens", 0))
    return flops_at(run.start, run.end["tokens"]) - flops_at(run.start, first)
