"""What the evidence for a law looks like: IsoFLOP budgets and their optima, back-tests, and forms by held-out error.

Letters: n sizes of one budget, m hidden points or places on a curve.
"""

import math
from typing import Any

import numpy as np

from slmjax.scaling import allocation, backtest
from slmjax.scaling.allocation import Cost
from slmjax.scaling.backtest import BackTest, Cut
from slmjax.scaling.choose import Choice
from slmjax.scaling.fit import Fit
from slmjax.scaling.isoflop import IsoFlop
from slmjax.scaling.report import drawing
from slmjax.scaling.report.drawing import INK, LAW_COLOUR, MUTED


def isoflop(found: IsoFlop, fit: Fit | None = None, cost: Cost | None = None, kind: str | None = None) -> Any:
    """Loss against N at each budget with a parabola through the sizes near the best; the best sizes against C.

    Args:
      fit, cost: a law of N and D, whose frontier is drawn beside the line through the optima.
      kind: of the losses.
    """
    colours = drawing.ramp(budget.C for budget in found.budgets)
    with drawing.style():
        figure, (left, right) = drawing.new_figure(8.6, 4.2, columns=2, widths=(1.45, 1))
        for budget in found.budgets:
            left.plot(np.exp(budget.log_N), budget.loss, "o", color=colours[budget.C], markersize=3.6)
            curve = _parabola(budget, found.window)
            if curve is not None:
                left.plot(*curve, color=colours[budget.C], linewidth=1)
        best = {"color": LAW_COLOUR, "markeredgecolor": "white", "markersize": 6}
        left.plot([o.N for o in found.optima], [o.loss for o in found.optima], "D", **best, label="best size")
        left.set(xscale="log", xlabel="parameters N", ylabel=drawing.loss_label(kind))
        drawing.count_ticks(left.xaxis)
        left.yaxis.get_major_locator().set_params(nbins=7)
        drawing.ramp_legend(left, colours, "budget C (FLOPs)", text=drawing.power_of_ten, loc="upper right")
        low, high = left.get_ylim()
        left.set_ylim(low, high + 0.18 * (high - low))
        left.legend(loc="lower left")
        _draw_sizes(right, found, fit, cost)
    return figure


def _parabola(budget, window):
    """Its parabola near the best size as (N [m], loss [m]); None where it bends downwards or sees too few sizes."""
    near_n = np.abs(budget.log_N - budget.log_N[budget.loss.argmin()]) <= window * math.log(10)
    if near_n.sum() < 3:
        return None
    u_n = budget.log_N[near_n]
    middle = float(u_n.mean())
    coefficients = np.polyfit(u_n - middle, budget.loss[near_n], 2)
    u_m = np.linspace(u_n[0], u_n[-1], 40)
    return (np.exp(u_m), np.polyval(coefficients, u_m - middle)) if coefficients[0] > 0 else None


def _draw_sizes(axes, found, fit, cost):
    C_G = np.array([o.C for o in found.optima])
    C_m = np.geomspace(C_G.min() / 1.5, C_G.max() * 1.5, 50)
    made = [found.lines["N"].at(float(C)) for C in C_m]
    low_m, high_m = np.array([one.interval(0.95) for one in made]).T
    axes.fill_between(C_m, low_m, high_m, color=LAW_COLOUR, alpha=0.13, linewidth=0, label="95% interval of the line")
    slope = f"{found.lines['N'].slope:.3f}"
    axes.plot(C_m, [one.value for one in made], color=LAW_COLOUR, linewidth=1.6, label=f"N* of slope {slope}")
    if fit is not None and cost is not None:
        axes.plot(C_m, allocation.frontier(fit, C_m, cost)[0], color=INK, linewidth=1.2, linestyle=(0, (4, 2)),
                  label=f"frontier of {fit.law}")  # fmt: skip
    ends_2G = np.array([[o.N * (1 - math.exp(-o.sd_log_N)), o.N * math.expm1(o.sd_log_N)] for o in found.optima]).T
    look = {"color": LAW_COLOUR, "markeredgecolor": "white", "markersize": 6, "elinewidth": 0.9, "zorder": 3}
    axes.errorbar(C_G, [o.N for o in found.optima], yerr=ends_2G, fmt="D", **look)
    axes.set(xscale="log", yscale="log", xlabel="budget C (FLOPs)", ylabel="best size N*")
    drawing.flops_ticks(axes.xaxis)
    drawing.count_ticks(axes.yaxis)
    axes.legend(loc="upper left")


def back_test(tested: BackTest, cuts: list[Cut], residual: str = "log") -> Any:
    """Hidden runs against what was forecast for them, by distance; and the share of them that the intervals held.

    Args:
      cuts: of `tested`, those that it judged among them.
      residual: the scale of the errors, "log" or "raw".
    """
    judged = {outcome.flops for outcome in tested.outcomes}
    shown = [cut for cut in cuts if cut.flops in judged]
    colours = drawing.ramp(cut.flops for cut in shown)
    with drawing.style():
        figure, (left, right) = drawing.new_figure(8.6, 3.6, columns=2, widths=(1.45, 1))
        for cut in shown:
            error_m = 100 * np.expm1(cut.error_m) if residual == "log" else cut.error_m
            low_m, high_m = cut.forecast.widened(backtest.learn(cuts, cut.flops))[0.95]
            missed_m = (cut.error_m < low_m) | (cut.error_m > high_m)
            x_m = cut.C_m / cut.largest
            left.plot(x_m, error_m, "o", color=colours[cut.flops], markersize=4.5, markeredgecolor="white",
                      markeredgewidth=0.5)  # fmt: skip
            ring = {"facecolor": "none", "edgecolor": LAW_COLOUR, "linewidth": 1.1, "zorder": 4}
            left.scatter(x_m[missed_m], error_m[missed_m], s=48, **ring)
        left.axhline(0, color=LAW_COLOUR, linewidth=1)
        left.scatter([], [], s=48, **ring, label="outside its 95% interval")
        left.set(xscale="log", xlabel="compute of the hidden run / largest fitted run")
        left.set_ylabel("observed − forecast loss" + (" (%)" if residual == "log" else ""))
        low, high = left.get_ylim()
        left.set_ylim(low - 0.45 * (high - low), high)
        drawing.count_ticks(left.xaxis)
        where = {"loc": "lower right", "ncols": 2, "columnspacing": 1.2}
        drawing.ramp_legend(left, colours, "fitted below C (FLOPs)", text=drawing.power_of_ten, **where)
        left.legend(loc="lower left")
        _draw_coverage(right, tested)
    return figure


def _draw_coverage(axes, tested):
    """Held share at each cut, and nominal."""
    C = [outcome.flops for outcome in tested.outcomes]
    for level, colour, marker in ((0.95, INK, "o"), (0.8, MUTED, "s")):
        axes.axhline(100 * level, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
        held = [100 * outcome.covered[level] for outcome in tested.outcomes]
        said = f"{level:.0%} intervals: {100 * tested.covered(level):.0f}% held"
        axes.plot(C, held, marker, color=colour, markersize=5.5, markeredgecolor="white", label=said)
    look = {"ha": "center", "va": "bottom", "fontsize": 8, "color": MUTED, "transform": axes.get_xaxis_transform()}
    for outcome in tested.outcomes:
        axes.text(outcome.flops, 1.02, str(outcome.num_hidden), **look)
    axes.set_title("hidden runs above each cut", fontsize=8.5, color=MUTED, pad=16)
    axes.set(xscale="log", ylim=(0, 103), xlabel="cut C (FLOPs)", ylabel="hidden runs inside (%)")
    axes.margins(x=0.12)
    drawing.flops_ticks(axes.xaxis)
    axes.legend(loc="lower left")


def choice(found: Choice) -> Any:
    """Mean held-out error of every form, and its error at each cut."""
    scores = found.scores[::-1]
    with drawing.style():
        figure, (axes,) = drawing.new_figure(8.6, 0.9 + 0.34 * len(scores))
        for y, score in enumerate(scores):
            percent = [100 * math.expm1(error) for error in score.error_G]
            colour = LAW_COLOUR if score.law == found.winner else INK
            axes.plot(percent, [y] * len(percent), "o", color=MUTED, alpha=0.45, markersize=4, markeredgewidth=0)
            mean = 100 * math.expm1(score.error)
            axes.plot([mean], [y], "D", color=colour, markersize=6.5, markeredgecolor="white", zorder=3)
        axes.set_yticks(range(len(scores)), [f"{s.law} ({s.num_parameters})" for s in scores])
        axes.set(xscale="log", xlabel="mean absolute error of hidden larger runs (%); small: at each cut")
        drawing.percent_ticks(axes.xaxis)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-0.6, len(scores) - 0.4)
    return figure
