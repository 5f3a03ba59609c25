"""What all figures of a report share: style, colours, legends, ticks, and saving as SVG and PDF with equal bytes.

Matplotlib is imported when the first figure is drawn. What is ordered (model size, budget, loss) is always a sequential
ramp, light to dark, that survives colour blindness and grey printing; one accent colour is kept for the law.
"""

import contextlib
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slmjax.scaling import show

LAW_COLOUR = "#b3421f"
INK, MUTED, HAIRLINE = "#22262b", "#6b7280", "#e3e6ea"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MIN_TICKS, MAX_TICKS = 3, 9
MOST_NAMED = 8  # entries of a ramp in a legend
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
def style():
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float, columns: int = 1, widths: Iterable[float] | None = None) -> tuple[Any, Any]:
    """Figure and axes [columns], inches, without pyplot and so without global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = None if widths is None else list(widths)
    return figure, figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]


def loss_label(kind: str | None) -> str:
    """Of an axis of held-out losses of one kind."""
    return f"held-out {show.loss_name(kind)}, nats per token"


def ramp(values: Iterable[float]) -> dict[float, Any]:
    """{value: colour} from light (small) to dark (large), by rank so that any spacing stays legible."""
    from matplotlib import colormaps

    viridis, ranked = colormaps["viridis_r"], sorted(set(values))
    return {v: viridis(0.18 + 0.78 * (i / (len(ranked) - 1) if len(ranked) > 1 else 1)) for i, v in enumerate(ranked)}


def ramp_legend(axes: Any, colours: dict[float, Any], title: str, text=show.count, **where: Any) -> None:
    """Names at most eight colours of a ramp, its ends among them."""
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    shown = list(colours)
    if len(shown) > MOST_NAMED:
        shown = [shown[round(i * (len(shown) - 1) / (MOST_NAMED - 1))] for i in range(MOST_NAMED)]
    handles = [Line2D([], [], color=colours[value], linewidth=2) for value in shown]
    # Not axes.legend: that one is left for what else there is to name.
    look = {"title": title, "title_fontsize": 8.5, "alignment": "left", **where}
    axes.add_artist(Legend(axes, handles, [text(value) for value in shown], **look))


def power_of_ten(value: float) -> str:
    """2.9×10²¹, 3×10²¹, 10²¹. In plain letters: Matplotlib's own mathematics is slow to set."""
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(RAISED)
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}×{power}"


def count_ticks(axis: Any) -> None:
    """Counts as 100k, 1M on a logarithmic axis whose limits are final."""
    _ticks(axis, show.count)


def flops_ticks(axis: Any) -> None:
    """10¹⁸, 10¹⁹ or 3×10¹⁸ on a logarithmic axis whose limits are final."""
    _ticks(axis, power_of_ten)


def percent_ticks(axis: Any) -> None:
    """0.5, 1, 2 on a logarithmic axis whose limits are final."""
    _ticks(axis, "{:.3g}".format)


def _ticks(axis, text):
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    places = round_places(*axis.get_view_interval())
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([text(place) for place in places]))
    axis.set_minor_formatter(NullFormatter())


def round_places(low: float, high: float) -> list[float]:
    """Three to nine round numbers in a logarithmic range: powers of ten, else also 3-folds, or 2- and 5-folds."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10), [d / 10 for d in range(10, 100)]):
        places = [place for k in decades for d in digits if low <= (place := float(f"{d}e{k}")) <= high]
        if len(places) >= MIN_TICKS:
            break
    return places[:: math.ceil(len(places) / MAX_TICKS)]


def svg(figure: Any) -> str:
    """The figure as SVG text, equal for equal figures (no date, fixed ids)."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save(figure: Any, path: str | Path) -> str:
    """Write the figure at `path` with suffixes .svg and .pdf; returns the SVG text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once, not for every format
    text = svg(figure)
    path.with_suffix(".svg").write_text(text)
    with style():
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return text
