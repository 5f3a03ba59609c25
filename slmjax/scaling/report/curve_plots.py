"""Training curves of a study's runs, as a figure."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.points import Run
from slmjax.scaling.report import drawing


def loss_curves(runs: Sequence[Run], n: str = "non_embedding") -> Any:
    """Train loss (faint) and held-out loss (solid) against tokens; a branch is drawn from where it leaves its trunk."""
    started = [run for run in runs if run.start and (run.train or run.evals)]
    by_id = {run.run_id: run for run in started}
    colours = drawing.ramp(run.start["counts"][n] for run in started)
    with drawing.style():
        figure, (axes,) = drawing.new_figure(8.6, 4.4)
        for run in started:
            colour = colours[run.start["counts"][n]]
            train, evals = _curve(run, run.train), _curve(run, run.evals)
            if run.parent in by_id:
                evals = _departure(by_id[run.parent], run.branch_step) + evals
            final = _curve(run, [run.end]) if run.status == "done" else []
            axes.plot(*_thin(train), color=colour, alpha=0.28, linewidth=0.7)
            # Trunks solid, branches dashed: which curve is the stable phase must be seen without colour.
            dashes = (0, (3, 1.2)) if run.parent else "-"
            axes.plot(*_thin(evals + final), color=colour, linewidth=1.5, linestyle=dashes)
            if final and run.end.get("phase") != "stable":
                axes.plot(*final[0], "o", color=colour, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)
        losses = [line["loss"] for run in started for line in [*run.evals, run.end or {}] if line.get("loss")]
        if losses:  # the first steps, at ln(vocabulary), would flatten everything that matters
            low, high = min(losses), float(np.quantile(losses, 0.9))
            top = high + 0.45 * (high - low)
            axes.set_ylim(low - 0.08 * (high - low), top)
            curves = [point for run in started for point in _curve(run, [*run.train, *run.evals])]
            axes.set_xlim(left=0.8 * min(tokens for tokens, loss in curves if loss <= top))
        kinds = sorted({run.start.get("loss_kind", "exact") for run in started})
        kind = kinds[0] if len(kinds) == 1 else f"mixed: {', '.join(kinds)}"
        axes.set(xscale="log", xlabel="tokens D", ylabel=f"{show.loss_name(kind)}, nats per token")
        drawing.count_ticks(axes.xaxis)
        drawing.ramp_legend(axes, colours, "parameters N", loc="upper right")
        _trunk_legend(axes)
    return figure


def _trunk_legend(axes):
    from matplotlib.lines import Line2D

    look = {"color": drawing.MUTED, "linewidth": 1.5}
    axes.legend(
        handles=[
            Line2D([], [], **look, label="held-out, trunk or single run"),
            Line2D([], [], **look, linestyle=(0, (3, 1.2)), label="held-out, decay branch"),
            Line2D([], [], color=drawing.MUTED, alpha=0.4, linewidth=0.8, label="train"),
            Line2D(
                [], [], color=drawing.MUTED, marker="o", linestyle="", markersize=4.5, label="finished, used in the fit"
            ),
        ],
        loc="lower left",
    )


def _curve(run, lines):
    return [(line["tokens"], line["loss"]) for line in lines if line["tokens"] > 0 and _finite(line["loss"])]


def _departure(trunk, branch_step):
    """The trunk's held-out loss at the branch point: on the line between its two evaluations around it."""
    steps = [line["step"] for line in trunk.evals if _finite(line["loss"])]
    if not steps or branch_step is None or not steps[0] <= branch_step <= steps[-1]:
        return []
    losses = [line["loss"] for line in trunk.evals if _finite(line["loss"])]
    return [(branch_step * trunk.start["tokens_per_step"], float(np.interp(branch_step, steps, losses)))]


def _thin(curve, most=400):
    """At most `most` points of a curve as (x, y); a report is read, not resampled."""
    kept = curve if len(curve) <= most else [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]
    return ([x for x, _ in kept], [y for _, y in kept])


def _finite(value):
    return value is not None and math.isfinite(value)
