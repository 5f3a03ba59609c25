"""How numbers read, in tables, reports and figures. No arithmetic on results, only their text."""

import math
from collections.abc import Callable, Iterable, Sequence


def count(value: float) -> str:
    """Three digits with a unit: 950, 1.25M, 74B; a power of ten beyond trillions."""
    if not math.isfinite(value):
        return "unbounded"
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if scale * 0.9995 <= value < scale * 999.5:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def count_range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{count(min(values))} to {count(max(values))}"


def interval(ends: tuple[float, float], text: Callable[[float], str] = "{:.4g}".format) -> str:
    """`low to high`; an end the data do not bound reads unbounded."""
    return " to ".join("unbounded" if math.isinf(end) else text(end) for end in ends)


def times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.3g}×"


def power_of_ten(value: float) -> str:
    """HTML: 2.06×10^17 with a raised exponent."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}×10<sup>{int(exponent)}</sup>"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def loss_name(kind: str | None) -> str:
    """What to call a loss of this kind; a bound is never called a loss alone."""
    return {"exact": "loss", "bound": "loss (upper bound)", None: "loss"}.get(kind, f"loss ({kind})")


def kind_of_loss(kind: str) -> str:
    return {"bound": "an upper bound"}.get(kind, kind)


def at_most(text: str, kind: str) -> str:
    """A loss as a number; `≤ 4.21` where it is an upper bound."""
    return f"≤ {text}" if kind == "bound" else text


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of an aligned text table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return ["  ".join(line).rstrip() for line in cells]
