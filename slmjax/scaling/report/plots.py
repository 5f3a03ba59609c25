"""A law and the runs it was fitted to, as figures: contours over N and D, loss against compute, residuals.

Letters: n points, m places on a curve.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmjax.scaling import allocation, diagnose, prediction, show
from slmjax.scaling.allocation import Cost
from slmjax.scaling.backtest import back_test
from slmjax.scaling.fit import Fit
from slmjax.scaling.forecast import Forecast
from slmjax.scaling.points import PointSet
from slmjax.scaling.report import drawing
from slmjax.scaling.report.drawing import INK, LAW_COLOUR, MUTED

MOST_LINES = 12  # sizes that get a line of their own; more would hide the runs
NUM_CONTOURS = 9  # over the lower half of the plane
GRID = 90  # places along each axis of the contours
MARGIN = 1.4  # of N and D beyond what is shown


def contours(fit: Fit, cost: Cost, made: Sequence[Forecast] = ()) -> Any:
    """Loss of a law over N and D, with the runs, the compute-optimal frontier and the forecasts on it.

    Raises:
      ValueError: a law of other inputs has no such plane.
    """
    if fit.form.inputs != ("N", "D"):
        raise ValueError(
            f"{fit.law} is a law of {', '.join(fit.form.inputs)}, and contours over N and D need a law of just these"
        )
    N_n, D_n, loss_n = (np.array([p[name] for p in fit.points], float) for name in ("N", "D", "loss"))
    marked = [(f["N"].value, f["D"].value, f) for f in made]
    low_N, high_N, low_D, high_D = _window(N_n, D_n, marked)
    N_g, D_g = np.geomspace(low_N, high_N, GRID), np.geomspace(low_D, high_D, GRID)
    N_gg, D_gg = np.meshgrid(N_g, D_g)
    u_Fm = np.log([N_gg.ravel(), D_gg.ravel()]) - fit.centre[:, None]
    loss_gg = fit.form.loss(fit.theta[None], u_Fm)[0][0].reshape(N_gg.shape)
    with drawing.style():
        figure, (axes,) = drawing.new_figure(8.6, 5.6)
        shades = {"vmin": float(loss_n.min()), "vmax": float(np.quantile(loss_n, 0.95)), "cmap": "viridis"}
        lines = axes.contour(N_g, D_g, loss_gg, _loss_levels(loss_gg), colors="#9aa1aa", linewidths=0.8)
        axes.clabel(lines, fmt="%.4g", fontsize=8, colors=MUTED)
        dots = axes.scatter(N_n, D_n, c=loss_n, s=30, edgecolor="white", linewidth=0.6, zorder=3, **shades)
        _draw_optima(axes, fit, cost, (low_N, high_N, low_D, high_D), marked)
        axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D")
        axes.set(xlim=(low_N, high_N), ylim=(low_D, high_D))
        drawing.count_ticks(axes.xaxis)
        drawing.count_ticks(axes.yaxis)
        axes.grid(False)
        bar = figure.colorbar(dots, ax=axes, pad=0.015, aspect=40, extend="max")
        bar.set_label(f"observed {show.loss_name(fit.loss_kind)} of the runs, nats per token")
        bar.outline.set_visible(False)
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def _window(N_n, D_n, marked):
    N, D = [*N_n, *(N for N, _, _ in marked)], [*D_n, *(D for _, D, _ in marked)]
    for _, _, forecast in marked:
        N += [end for end in forecast["N"].intervals[0.8] if 0 < end < math.inf]
        D += [end for end in forecast["D"].intervals[0.8] if 0 < end < math.inf]
    return min(N) / MARGIN, max(N) * MARGIN, min(D) / MARGIN, max(D) * MARGIN


def _loss_levels(loss_gg):
    """Round losses, closer together where the loss is low: there the contours lie far apart."""
    low, middle, high = np.quantile(loss_gg, [0, 0.5, 1]).tolist()
    rough = (middle - low) / NUM_CONTOURS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(digit * unit for digit in (1, 2, 5, 10) if digit * unit >= rough)
    first = math.ceil(low / step) * step
    fine = np.arange(first, middle, step)
    return np.concatenate([fine, np.arange(fine[-1] + 2 * step if len(fine) else first, high, 2 * step)])


def _draw_optima(axes, fit, cost, window, marked):
    """Best N and D of every budget in the window, solid as far as runs were made, and the budgets asked for."""
    low_N, high_N, low_D, high_D = window
    C_m = np.geomspace(cost.flops(low_N, low_D), cost.flops(high_N, high_D), 160)
    N_m, D_m, _ = allocation.frontier(fit, C_m, cost)
    inside_m = (low_N <= N_m) & (N_m <= high_N) & (low_D <= D_m) & (D_m <= high_D)
    made_m = C_m <= max(p["C"] for p in fit.points)
    solid, dashed = inside_m & made_m, inside_m & ~made_m
    axes.plot(N_m[solid], D_m[solid], color=LAW_COLOUR, linewidth=1.8, label="compute-optimal frontier of the law")
    axes.plot(N_m[dashed], D_m[dashed], color=LAW_COLOUR, linewidth=1.6, linestyle=(0, (4, 2)), label="extrapolated")
    for i, (N, D, forecast) in enumerate(marked):
        low, high = forecast["N"].intervals[0.8]
        said = "forecast, 80% interval of N*" if i == 0 else None
        if 0 < low < high < math.inf:
            across = np.geomspace(low, high, 40)
            axes.plot(across, cost.tokens(across, forecast.target["flops"]), color=LAW_COLOUR, linewidth=4, alpha=0.25)
        axes.plot([N], [D], "D", color=LAW_COLOUR, markersize=5.5, markeredgecolor="white", label=said, zorder=4)


def loss_against_compute(
    point_set: PointSet, fit: Fit | None, cost: Cost | None = None, budgets: Sequence[float] = ()
) -> Any:
    """Every run, the law at each size, and its compute-optimal frontier with bands out to the largest budget.

    Args:
      cost: None for a law that is no law of N and D: a law of C is drawn all the same, any other as its runs alone.
    Raises:
      ValueError: the points have no C.
    """
    points = [p for p in point_set.points if p.C is not None]
    if not points:
        raise ValueError("the runs have no FLOPs, so there is no loss against compute to draw")
    colours = drawing.ramp(p.N for p in points if p.N is not None)
    largest = max(p.C for p in points)
    with drawing.style():
        figure, (axes,) = drawing.new_figure(8.6, 4.6)
        if fit is not None and (fit.form.inputs == ("C",) or cost is not None):
            _draw_frontier(axes, fit, cost, np.geomspace(min(p.C for p in points), max([largest, *budgets]), 80))
        for N in [*colours, *([None] if any(p.N is None for p in points) else [])]:
            group = sorted((p for p in points if p.N == N), key=lambda p: p.C)
            colour = colours.get(N, MUTED)
            if cost is not None and len(colours) <= MOST_LINES and len(group) > 1:
                C_m = np.geomspace(group[0].C, group[-1].C, 40)
                axes.plot(C_m, _loss(fit, N, cost.tokens(N, C_m)), color=colour, linewidth=1)
            _draw_runs(axes, group, colour)
        if max(budgets, default=0) > largest:
            _mark_extrapolation(axes, largest)
        axes.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel=drawing.loss_label(point_set.loss_kind))
        drawing.flops_ticks(axes.xaxis)
        if colours:
            drawing.ramp_legend(axes, colours, "parameters N", loc="upper right")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left")
    return figure


def _draw_runs(axes, group, colour):
    C_n, loss_n = [p.C for p in group], [p.loss for p in group]
    look = {"color": colour, "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7, "zorder": 3}
    if any(p.se for p in group):
        axes.errorbar(C_n, loss_n, yerr=[p.se or 0 for p in group], fmt="o", elinewidth=0.8, **look)
    else:
        axes.plot(C_n, loss_n, "o", **look)


def _mark_extrapolation(axes, largest):
    axes.axvline(largest, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    where = {"xycoords": ("data", "axes fraction"), "va": "top", "color": MUTED, "fontsize": 8.5}
    axes.annotate(" extrapolation →", (largest, 1), **where)


def _loss(fit, N, D_m):
    u_Fm = np.log([np.full(len(D_m), float(N)), D_m]) - fit.centre[:, None]
    return fit.form.loss(fit.theta[None], u_Fm)[0][0]


def _draw_frontier(axes, fit, cost, C_m):
    targets = {"C": C_m}
    if cost is not None:
        targets["N"], targets["D"], _ = allocation.frontier(fit, C_m, cost)
        usable_m = np.isfinite(targets["N"]) & (targets["N"] > 0)
        targets = {name: value_m[usable_m] for name, value_m in targets.items()}
    made = prediction.predict(fit, targets)
    ends = made.widened(back_test(fit).discrepancy)
    scaled = np.exp if fit.residual == "log" else np.asarray
    for level, alpha in ((0.95, 0.13), (0.8, 0.2)):
        low_m, high_m = (scaled(made.value_m + end_m) for end_m in ends[level])
        said = f"{level:.0%} interval of one run"
        axes.fill_between(targets["C"], low_m, high_m, color=LAW_COLOUR, alpha=alpha, linewidth=0, label=said)
    said = "the law" if cost is None else "compute-optimal frontier of the law"
    axes.plot(targets["C"], scaled(made.value_m), color=LAW_COLOUR, linewidth=1.8, label=said)


def residuals(fit: Fit) -> Any:
    """Observed minus predicted loss along every input and C: structure is what the law misses. Outliers ringed."""
    residual_n = fit.residuals()
    shown_n = 100 * np.expm1(residual_n) if fit.residual == "log" else residual_n
    rms = (100 if fit.residual == "log" else 1) * fit.residual_rms()
    flagged_n = np.abs(diagnose.robust_z(residual_n)) > diagnose.OUTLIER
    panels = _panels(fit)
    colours = drawing.ramp(p["N"] for p in fit.points if p["N"] is not None)
    with drawing.style():
        figure, all_axes = drawing.new_figure(8.6, 2.7, columns=len(panels))
        for axes, (label, x_n) in zip(all_axes, panels, strict=True):
            axes.axhspan(-rms, rms, color=LAW_COLOUR, alpha=0.1, linewidth=0)
            axes.axhline(0, color=LAW_COLOUR, linewidth=1)
            face = [colours.get(p["N"], MUTED) for p in fit.points]
            axes.scatter(x_n, shown_n, color=face, s=24, edgecolor="white", linewidth=0.6, zorder=3)
            ring = {"facecolor": "none", "edgecolor": LAW_COLOUR, "linewidth": 1.1, "zorder": 4}
            axes.scatter(x_n[flagged_n], shown_n[flagged_n], s=60, **ring)
            axes.set(xscale="log", xlabel=label)
            (drawing.flops_ticks if label.endswith("(FLOPs)") else drawing.count_ticks)(axes.xaxis)
        all_axes[0].set_ylabel(
            f"observed − predicted {show.loss_name(fit.loss_kind)}" + (", %" if fit.residual == "log" else ""),
            color=INK,
        )
        for axes in all_axes[1:]:
            axes.sharey(all_axes[0])
            axes.tick_params(labelleft=False)
    return figure


def _panels(fit):
    """(label, values [n]) of N, D, C and D/N as far as all points have them, and of the law's further inputs."""
    labels = {"N": "parameters N", "D": "tokens D", "C": "training compute C (FLOPs)"}
    found = {name: np.array([p[name] for p in fit.points], float) for name in (*labels, *fit.form.inputs)
             if all(p[name] is not None for p in fit.points)}  # fmt: skip
    panels = [(labels.get(name, name), value_n) for name, value_n in found.items()]
    if fit.form.inputs == ("N", "D"):
        panels.append(("tokens per parameter D/N", found["D"] / found["N"]))
    return panels
