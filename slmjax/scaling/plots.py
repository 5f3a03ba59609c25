"""The report's figures as Matplotlib Figures, and saving them as SVG and PDF with the same bytes every time.

Matplotlib is imported when the first figure is drawn. Model size is always a sequential ramp, light for small and dark
for large, that survives colour blindness and grey printing; one accent colour is kept for the law.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.scaling import forecast, show
from slmjax.scaling.fit import Fit
from slmjax.scaling.points import PointSet, Run

LAW_COLOUR = "#b3421f"
INK, MUTED, HAIRLINE = "#22262b", "#6b7280", "#e3e6ea"
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "slmjax",
    "text.color": INK,
    "axes.edgecolor": "#9aa1aa",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
}


@contextlib.contextmanager
def _style():
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _figure(width, height, columns=1):
    """Figure and axes, inches, without pyplot and so without global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _size_colours(sizes):
    """{N: colour} from light (small) to dark (large), by rank so that any spacing of sizes stays legible."""
    from matplotlib import colormaps

    ramp, ranked = colormaps["viridis_r"], sorted(set(sizes))
    return {N: ramp(0.18 + 0.78 * (i / (len(ranked) - 1) if len(ranked) > 1 else 1)) for i, N in enumerate(ranked)}


def _size_legend(axes, colours, **where):
    from matplotlib.lines import Line2D

    shown = list(colours)
    if len(shown) > 8:  # a ramp needs no more than eight names
        shown = [shown[round(i * (len(shown) - 1) / 7)] for i in range(8)]
    handles = [Line2D([], [], color=colours[N], linewidth=2, label=show.count(N)) for N in shown]
    axes.add_artist(axes.legend(handles=handles, title="parameters N", title_fontsize=8.5, alignment="left", **where))


def loss_curves(runs: Sequence[Run], n: str = "non_embedding") -> Any:
    """Train loss (faint) and held-out loss (solid) against tokens; a branch is drawn from where it leaves its trunk."""
    started = [run for run in runs if run.start and (run.train or run.evals)]
    by_id = {run.run_id: run for run in started}
    colours = _size_colours(run.start["counts"][n] for run in started)
    with _style():
        figure, (axes,) = _figure(8.6, 4.4)
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
        axes.set(xscale="log", xlabel="tokens D", ylabel="loss (nats per token)")
        _plain_ticks(axes)
        _size_legend(axes, colours, loc="upper right")
        _trunk_legend(axes)
    return figure


def _trunk_legend(axes):
    from matplotlib.lines import Line2D

    look = {"color": MUTED, "linewidth": 1.5}
    axes.legend(
        handles=[
            Line2D([], [], **look, label="held-out, trunk or single run"),
            Line2D([], [], **look, linestyle=(0, (3, 1.2)), label="held-out, decay branch"),
            Line2D([], [], color=MUTED, alpha=0.4, linewidth=0.8, label="train"),
            Line2D([], [], color=MUTED, marker="o", linestyle="", markersize=4.5, label="finished, used in the fit"),
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


def loss_against_compute(point_set: PointSet, fit: Fit | None, cost: str, budgets: Sequence[float] = ()) -> Any:
    """Every run, the law at each size, and its compute-optimal frontier with bands out to the largest budget."""
    points = point_set.points
    colours = _size_colours(p.N for p in points)
    with _style():
        figure, (axes,) = _figure(8.6, 4.6)
        largest = max(p.C for p in points)
        if fit is not None:
            _draw_frontier(axes, fit, cost, min(p.C for p in points), max([largest, *budgets]))
            price = forecast.make_cost(fit, cost)
        for N, colour in colours.items():
            group = sorted((p for p in points if p.N == N), key=lambda p: p.C)
            if fit is not None and len(group) > 1:
                C = np.geomspace(group[0].C, group[-1].C, 40)
                axes.plot(C, [fit.predict(N=N, D=price.tokens(N, c)) for c in C], color=colour, linewidth=1)
            errors = [p.se or 0 for p in group]
            axes.errorbar(
                [p.C for p in group],
                [p.loss for p in group],
                yerr=errors,
                fmt="o",
                color=colour,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                elinewidth=0.8,
                zorder=3,
            )
        if max(budgets, default=0) > largest:
            axes.axvline(largest, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                " extrapolation →",
                (largest, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                color=MUTED,
                fontsize=8.5,
            )
        axes.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel="held-out loss (nats per token)")
        _size_legend(axes, colours, loc="upper right")
        if fit is not None:
            axes.legend(loc="lower left")
    return figure


def _draw_frontier(axes, fit, cost, low, high):
    budgets = np.geomspace(low, high, 32)
    made = [forecast.optimum(fit, float(C), cost)["loss"] for C in budgets]
    for level, alpha in ((0.95, 0.13), (0.8, 0.2)):
        axes.fill_between(
            budgets,
            [q.intervals[level][0] for q in made],
            [q.intervals[level][1] for q in made],
            color=LAW_COLOUR,
            alpha=alpha,
            linewidth=0,
            label=f"{level:.0%} interval of one run",
        )
    axes.plot(
        budgets, [q.value for q in made], color=LAW_COLOUR, linewidth=1.8, label="compute-optimal frontier of the law"
    )


def residuals(fit: Fit) -> Any:
    """Observed over predicted loss against N, D and D/N: structure here is what the law misses."""
    percent = 100 * np.expm1(fit.residuals())
    colours = _size_colours(p["N"] for p in fit.points)
    panels = (
        ("parameters N", lambda p: p["N"]),
        ("tokens D", lambda p: p["D"]),
        ("tokens per parameter D/N", lambda p: p["D"] / p["N"]),
    )
    with _style():
        figure, all_axes = _figure(8.6, 2.7, columns=len(panels))
        for axes, (label, value) in zip(all_axes, panels, strict=True):
            band = 100 * fit.residual_rms()
            axes.axhspan(-band, band, color=LAW_COLOUR, alpha=0.1, linewidth=0)
            axes.axhline(0, color=LAW_COLOUR, linewidth=1)
            axes.scatter(
                [value(p) for p in fit.points],
                percent,
                color=[colours[p["N"]] for p in fit.points],
                s=26,
                edgecolor="white",
                linewidth=0.6,
                zorder=3,
            )
            axes.set(xscale="log", xlabel=label)
            _plain_ticks(axes)
        all_axes[0].set_ylabel("observed − predicted loss (%)")
        for axes in all_axes[1:]:
            axes.sharey(all_axes[0])
            axes.tick_params(labelleft=False)
    return figure


def _plain_ticks(axes):
    """Counts as 100k, 1M on a logarithmic axis; less than two decades get a tick at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show.count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def svg(figure: Any) -> str:
    """The figure as SVG text, equal for equal figures (no date, fixed ids)."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save(figure: Any, path: str | Path) -> str:
    """Write the figure at `path` with suffixes .svg and .pdf; returns the SVG text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = svg(figure)
    path.with_suffix(".svg").write_text(text)
    with _style():
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return text


def _finite(value):
    return value is not None and math.isfinite(value)
