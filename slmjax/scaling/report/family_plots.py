"""Model families on one compute axis, as a figure.

Letters: n runs, m places on a curve.
"""

from typing import Any

import numpy as np

from slmjax.scaling import allocation, prediction
from slmjax.scaling.backtest import back_test
from slmjax.scaling.families import Families
from slmjax.scaling.leverage import logged_cost, trained_with
from slmjax.scaling.report import drawing

# Told apart without colour too: by marker, and by the label of the line.
LOOKS = (("#2f5d8a", "o"), ("#b3421f", "s"), ("#4d7c3a", "^"), ("#7a4a8c", "D"))
LEVEL = 0.8


def families_on_compute(found: Families) -> Any:
    """Every run by family, and each family's compute-optimal line with the interval of one run; dashed outside its own
    runs.

    Raises:
      ValueError: the points have no C.
    """
    all_points = [p for point_set in found.points.values() for p in point_set.points if p.C is not None]
    if not all_points:
        raise ValueError("the runs have no FLOPs, so there is no compute axis to compare families on")
    ends = min(p.C for p in all_points), max(p.C for p in all_points)
    with drawing.style():
        figure, (axes,) = drawing.new_figure(8.6, 4.6)
        for i, (name, point_set) in enumerate(found.points.items()):
            colour, marker = LOOKS[i % len(LOOKS)]
            points = [p for p in point_set.points if p.C is not None]
            look = {"color": colour, "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7, "zorder": 3}
            errors = [p.se or 0 for p in points]
            axes.errorbar([p.C for p in points], [p.loss for p in points], yerr=errors, fmt=marker, elinewidth=0.8,
                          label=f"{found.labels[name]}: runs", **look)  # fmt: skip
            if name in found.fits:
                _draw_line(axes, found.labels[name], found.fits[name], np.geomspace(*ends, 80), colour)
        bounds = [name for name, kind in found.loss_kinds.items() if kind != "exact"]
        kind = f"of {', '.join(bounds)} its upper bound" if len(bounds) < len(found.points) else "bound"
        label = drawing.loss_label(kind if bounds else "exact")
        axes.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel=label)
        drawing.flops_ticks(axes.xaxis)
        axes.legend(loc="upper right")
    return figure


def _draw_line(axes, name, fit, C_m, colour):
    """Nothing for a law without a compute-optimal size: the text beside the figure says so."""
    try:
        cost = logged_cost(fit)
        N_m, D_m, _ = allocation.frontier(fit, C_m, cost)
    except ValueError:
        return
    usable_m = np.isfinite(N_m) & (N_m > 0)
    targets = {key: value_m[usable_m] for key, value_m in (("C", C_m), ("N", N_m), ("D", D_m))}
    if not usable_m.any():
        return
    made = prediction.predict(fit, targets)
    low_m, high_m = made.widened(back_test(fit).discrepancy)[LEVEL]
    scaled = np.exp if fit.residual == "log" else np.asarray
    said = f"{name}: {LEVEL:.0%} interval of one run"
    axes.fill_between(targets["C"], scaled(made.value_m + low_m), scaled(made.value_m + high_m), color=colour,
                      alpha=0.15, linewidth=0, label=said)  # fmt: skip
    low, high = trained_with(fit)
    below_m, above_m = targets["C"] < low, targets["C"] > high
    line_m, own_m = scaled(made.value_m), ~(below_m | above_m)
    axes.plot(targets["C"][own_m], line_m[own_m], color=colour, linewidth=1.8, label=f"{name}: compute-optimal")
    for outside_m in (below_m, above_m):
        axes.plot(targets["C"][outside_m], line_m[outside_m], color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
