"""Efficiency leverage without laws: pairs of runs, one of each family, equal in size and tokens.

Each pair is read on the sought family's runs of its size (of dense models, say): the compute at which their curve of
loss against log C, straight between neighbours, has the given family's loss (a mixture's, say). No form is assumed, so
this holds where a few small runs determine no law; it compares at equal shape, not at each family's best one. Laws:
`leverage.py`.

Letters: S sizes, or averages over them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.leverage import times
from slmjax.scaling.points import Point
from slmjax.scaling.prediction import LEVELS

SAME_SIZE = 0.05  # in log N: a router is on top of the active parameters that the pair has in common
SAME_TOKENS = 0.01


class Pair(NamedTuple):
    """Runs of one size and length, averaged where there are several.

    N, D: of the sought runs; flops: of the given ones; sought_flops: at which the sought runs of this size have their
    loss; beyond: that lies outside these runs, along the straight line through the two at that end.
    """

    N: float
    D: float
    flops: float
    sought_loss: float
    loss: float
    sought_flops: float
    beyond: bool


class Mean(NamedTuple):
    """Over the sizes of one budget (D) that has several, or over all (D is None).

    Intervals are Student's over sizes, whose runs are independent of each other; those of one size may share a trunk.
    One size tells no scatter: unbounded.
    """

    D: float | None
    flops: float
    num_sizes: int
    num_beyond: int
    difference: float
    value: float
    intervals: dict[float, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class PairedLeverage:
    """Pairs, their means by budget and over all, and why other pairs say nothing."""

    names: tuple[str, str]
    pairs: tuple[Pair, ...]
    means: tuple[Mean, ...]
    notes: tuple[str, ...]

    def table(self, word: str = "leverage", further: str = "") -> str:
        """One line per budget; word and further as in `leverage_table`."""
        sought, given = self.names
        rows = [("D", "mean C", "sizes", f"loss {given} - {sought}", word, "80% interval", "95% interval")]
        rows += [
            (
                "all" if mean.D is None else show.count(mean.D),
                f"{mean.flops:.3g}",
                str(mean.num_sizes),
                f"{mean.difference:+.4f}",
                times(mean.value),
                *(show.interval(mean.intervals[level], times) for level in LEVELS),
            )
            for mean in self.means
        ]
        said = f"{word}: {self.reading()}" + (f"; {further}" if further else "")
        return "\n".join([*show.columns(rows), said, *self.notes]) + "\n"

    def reading(self) -> str:
        """How the numbers are meant, in one sentence."""
        sought, given = self.names
        outside = sum(pair.beyond for pair in self.pairs)
        return (
            f"compute {sought} needs, over C, for the loss of {given} at the same size; {len(self.pairs)} pairs of "
            f"equal size and tokens, read between {sought}'s runs of the size"
            + (f", {outside} outside them along the slope at that end (extrapolation)" if outside else "")
        )


def paired_leverage(
    sought: Sequence[Point], given: Sequence[Point], names: tuple[str, str] = ("dense", "moe")
) -> PairedLeverage:
    """Pairs of two families and what they say.

    Args:
      sought, given: points with N, D and C; N counts active parameters.
    Raises:
      ValueError: no pair, or none whose sought runs show a slope.
    """
    curves, pairs, notes = _curves(sought), [], []
    for (N, D), runs in _cells(given).items():
        curve = next((curve for size, curve in curves.items() if abs(math.log(N / size)) < SAME_SIZE), None)
        if curve is None or not any(abs(D / other[0] - 1) < SAME_TOKENS for other in curve):
            continue
        found = _pair(N, D, runs, curve, names[0])
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            notes.append(f"no leverage at N={show.count(N)}, D={show.count(D)}: {found}")
    if not pairs:
        why = "; ".join(notes) or (
            f"no run of {names[1]} has the tokens and, within {SAME_SIZE:.0%}, the N of a run of {names[0]}; train "
            "both at equal active parameters and count these, n=active_non_embedding"
        )
        raise ValueError(why)
    budgets = {D: [p for p in pairs if p.D == D] for D in sorted({p.D for p in pairs})}
    # A budget of one size is in the mean over all, and alone says no more than its two runs do.
    means = [_mean(D, of_budget) for D, of_budget in budgets.items() if len(of_budget) > 1]
    if len(means) != 1 or len(budgets) > 1:
        means.append(_mean(None, pairs))
    return PairedLeverage(names, tuple(pairs), tuple(means), tuple(notes))


def _cells(points):
    """{(N, D): runs}, largest last."""
    if any(None in (p.N, p.D, p.C) for p in points):
        raise ValueError("not all runs have N, D and C")
    cells = {}
    for p in sorted(points, key=lambda p: (p.N, p.D)):
        cells.setdefault((p.N, p.D), []).append(p)
    return cells


def _curves(points):
    """{N: [(D, C, loss), ...]} of the sought runs, by tokens."""
    curves = {}
    for (N, D), runs in _cells(points).items():
        curves.setdefault(N, []).append((D, _mean_of(runs, "C"), _mean_of(runs, "loss")))
    return curves


def _mean_of(runs, name):
    return float(np.mean([getattr(p, name) for p in runs]))


def _pair(N, D, runs, curve, sought):
    """The Pair, or why there is none."""
    if len(curve) < 2:
        return f"one {sought} run of this size shows no slope"
    i = min(range(len(curve)), key=lambda i: abs(math.log(curve[i][0] / D)))
    loss, C = _mean_of(runs, "loss"), _mean_of(runs, "C")
    step = 1 if loss < curve[i][2] else -1
    last = len(curve) - 1 if step > 0 else 0
    j = i  # from the run of equal tokens outwards, so that a kink of the noise elsewhere is not met first
    while j != last and (curve[j + step][2] - loss) * step > 0:
        j += step
    beyond = j == last
    (_, C_1, loss_1), (_, C_2, loss_2) = (curve[j - step], curve[j]) if beyond else (curve[j], curve[j + step])
    slope = (loss_2 - loss_1) / math.log(C_2 / C_1)
    if not slope < 0:
        return f"the loss of {sought} does not fall with compute there"
    reached = C_1 * math.exp((loss - loss_1) / slope)
    return Pair(N, curve[i][0], C, curve[i][2], loss, reached, beyond)


def _mean(D, pairs):
    """Of pairs: the mean log leverage of each size, then over sizes."""
    from scipy.special import stdtrit

    sizes = {}
    for pair in pairs:
        sizes.setdefault(pair.N, []).append(math.log(pair.sought_flops / pair.flops))
    log_S = np.array([np.mean(logs) for logs in sizes.values()])
    middle, intervals = float(log_S.mean()), {}
    for level in LEVELS:
        if len(log_S) < 2:
            intervals[level] = (-math.inf, math.inf)
            continue
        half = float(stdtrit(len(log_S) - 1, (1 + level) / 2) * log_S.std(ddof=1)) / math.sqrt(len(log_S))
        intervals[level] = tuple(math.exp(min(middle + side * half, 700)) for side in (-1, 1))
    return Mean(
        D=D,
        flops=math.exp(np.mean([math.log(pair.flops) for pair in pairs])),
        num_sizes=len(log_S),
        num_beyond=sum(pair.beyond for pair in pairs),
        difference=float(np.mean([pair.loss - pair.sought_loss for pair in pairs])),
        value=math.exp(middle),
        intervals=intervals,
    )
