"""Back-tests: hide every run above a compute cut, fit the rest, forecast the hidden ones, and count what the intervals
held.

The cuts form a ladder, and each is forecast with what lies below it alone: how fast the form goes wrong beyond its runs
(`Discrepancy`) is learned from the forecasts that the lower cuts made of runs still below this one. So no interval is
calibrated on the runs that judge it, and one fit per cut serves both purposes (rolling-origin evaluation).

Letters: m hidden points, n fitted points.
"""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from slmjax.scaling import prediction, show
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.points import Point
from slmjax.scaling.prediction import LEVELS, NO_DISCREPANCY, Discrepancy, Prediction

NUM_CUTS = 8
LEAST_BELOW = 0.3  # of the runs lie below the lowest cut
LEAST_LESSONS = 2  # cuts that a discrepancy is learned from
SAME_FLOPS = 0.01  # budgets closer than 1% are one budget: no cut between them
NUM_BOOTSTRAP = 100


class Cut(NamedTuple):
    """Hidden points and their forecast from the points below a compute cut. Errors are observed minus predicted; a
    point's share is one over the hidden points of its run, for checkpoints of one run go wrong together."""

    flops: float
    num_fitted: int
    largest: float  # FLOPs of the largest fitted run
    C_m: np.ndarray
    share_m: np.ndarray
    error_m: np.ndarray
    forecast: Prediction


class Outcome(NamedTuple):
    """How the forecasts of one cut fared. `reach`: FLOPs of the largest hidden run over those of the largest fitted."""

    flops: float
    num_fitted: int
    num_hidden: int
    reach: float
    bias: float
    error: float  # mean absolute
    covered: dict[float, float]


@dataclasses.dataclass(frozen=True)
class BackTest:
    """What forecasts from the cheaper runs of a fit were worth.

    Attributes:
      outcomes: one per cut that had lower cuts to learn from. A run hidden by several cuts counts once in each.
      discrepancy: learned from all cuts; what a forecast beyond all runs takes.
      refusal: why there is no outcome, or empty.
      cuts: the forecasts themselves, of all cuts.
    """

    outcomes: tuple[Outcome, ...]
    discrepancy: Discrepancy
    refusal: str = ""
    cuts: tuple[Cut, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def num_hidden(self) -> int:
        return sum(o.num_hidden for o in self.outcomes)

    @property
    def reach(self) -> float:
        return max((o.reach for o in self.outcomes), default=math.nan)

    @property
    def bias(self) -> float:
        return self._mean(lambda o: o.bias)

    def covered(self, level: float) -> float:
        """Share of all hidden runs that the intervals of this level held."""
        return self._mean(lambda o: o.covered[level])

    def _mean(self, of):
        return sum(of(o) * o.num_hidden for o in self.outcomes) / self.num_hidden if self.outcomes else math.nan

    def sentence(self) -> str:
        if not self.outcomes:
            return f"not back-tested: {self.refusal}; the intervals assume that the law holds at the target"
        held = ", ".join(f"{level:.0%} intervals held {self.covered(level):.0%}" for level in LEVELS)
        return (
            f"back-test: {self.num_hidden} forecasts of hidden runs from {len(self.outcomes)} compute cuts, up to "
            f"{show.times(self.reach)} the compute fitted: {held}; bias {self.bias:+.2g}"
        )

    def table(self) -> str:
        """One line per cut, and the pooled one."""
        rows = [("cut (FLOPs)", "fitted", "hidden", "reach", "bias", "mean error", *(f"{v:.0%} held" for v in LEVELS))]
        rows += [
            (
                f"{o.flops:.3g}",
                str(o.num_fitted),
                str(o.num_hidden),
                show.times(o.reach),
                f"{o.bias:+.4f}",
                f"{o.error:.4f}",
                *(f"{o.covered[level]:.2f}" for level in LEVELS),
            )
            for o in self.outcomes
        ]
        return "\n".join([*(show.columns(rows) if self.outcomes else []), self.sentence()]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: coverage pooled and by cut, and the discrepancy that forecasts take."""
        pooled = {
            "num_hidden": self.num_hidden,
            "reach": self.reach,
            "bias": self.bias,
            "covered": {str(level): self.covered(level) for level in LEVELS},
        }
        cuts = [
            o._asdict() | {"covered": {str(level): share for level, share in o.covered.items()}} for o in self.outcomes
        ]
        return {
            "refusal": self.refusal,
            "discrepancy": self.discrepancy._asdict(),
            "pooled": pooled if self.outcomes else None,
            "cuts": cuts,
        }


def back_test(fitted: Fit) -> BackTest:
    """Forecast the more expensive runs of a fit from the cheaper ones, at up to NUM_CUTS compute cuts.

    It costs a fit per cut, a fit never changes, and every forecast and every point of a curve asks: kept with the fit.
    """
    kept = vars(fitted)
    if "_back_test" not in kept:
        kept["_back_test"] = _back_test(fitted)
    return kept["_back_test"]


def _back_test(fitted):
    if any(p["C"] is None for p in fitted.points):
        return BackTest((), NO_DISCREPANCY, "the runs have no FLOPs, so none can be hidden by compute")
    cuts = hide(fitted)
    outcomes = [judge(cut, learned) for cut in cuts if (learned := learn(cuts, cut.flops))]
    discrepancy = learn(cuts)
    refusal = ""
    if not outcomes:
        refusal = (
            f"{len(fitted.points)} runs allow {len(cuts)} compute cuts with enough runs below to fit the law, "
            f"and {LEAST_LESSONS + 1} are needed"
        )
    return BackTest(tuple(outcomes), discrepancy or NO_DISCREPANCY, refusal, tuple(cuts))


def hide(fitted: Fit, num_cuts: int = NUM_CUTS) -> list[Cut]:
    """The ladder of cuts, lowest first; one whose lower runs determine no law is left out."""
    cuts = []
    C_n = np.array([p["C"] for p in fitted.points])
    for flops in compute_cuts(C_n, 2 * fitted.num_free, num_cuts):
        try:
            below = refit(fitted, [p for p in fitted.points if p["C"] < flops])
        except ValueError:  # a design below the cut that is degenerate or too small says why; it makes no forecast
            continue
        hidden = [p for p in fitted.points if p["C"] >= flops]
        targets = {name: np.array([p[name] for p in hidden]) for name in {"C", *fitted.form.inputs}}
        made = prediction.predict(below, targets)
        loss_m = np.array([p["loss"] for p in hidden])
        observed_m = np.log(loss_m) if fitted.residual == "log" else loss_m
        largest = max(p["C"] for p in below.points)
        runs = Counter(p["run_id"] for p in hidden)
        share_m = np.array([1 / runs[p["run_id"]] for p in hidden])
        cuts.append(Cut(flops, len(below.points), largest, targets["C"], share_m, observed_m - made.value_m, made))
    return cuts


def compute_cuts(C_n: np.ndarray, least_fitted: int, num_cuts: int) -> list[float]:
    """Up to `num_cuts` values of C between distinct budgets, spread evenly over the runs in order of compute."""
    C_n = np.sort(np.asarray(C_n, float))
    n = len(C_n)
    least = max(least_fitted, math.ceil(LEAST_BELOW * n))
    gaps = [i for i in range(least, n) if C_n[i] > C_n[i - 1] * (1 + SAME_FLOPS)]
    if not gaps:
        return []
    chosen = {min(gaps, key=lambda i: (abs(i - place), i)) for place in np.linspace(least, n - 1, num_cuts)}
    return [math.sqrt(C_n[i] * C_n[i - 1]) for i in sorted(chosen)]


def learn(cuts: list[Cut], below: float = math.inf) -> Discrepancy | None:
    """The discrepancy that the errors of these cuts show on runs below a compute; None when fewer than two cuts do.

    The rate solves mean(error^2 / (deviation^2 + rate^2 distance^2)) = 1, each cut weighing the same, and is 0 where
    draws and scatter explain the errors (Mandel and Paule 1982, the moment estimator of a variance between studies).
    """
    lessons = [(cut, cut.C_m < below) for cut in cuts if (cut.C_m < below).any() and cut.flops < below]
    if len(lessons) < LEAST_LESSONS:
        return None
    error_m = np.concatenate([cut.error_m[seen] for cut, seen in lessons])
    deviation_m = np.concatenate([cut.forecast.deviation_m[seen] for cut, seen in lessons])
    distance_m = np.concatenate([cut.forecast.distance_m[seen] for cut, seen in lessons])
    shares = [cut.share_m[seen] for cut, seen in lessons]
    weight_m = np.concatenate([share_m / share_m.sum() for share_m in shares]) / len(lessons)
    # Residuals of rounding size tell nothing of the form; they would ask for a rate to explain rounding.
    deviation_m = np.maximum(deviation_m, 1e-12)

    def excess(rate):
        return float(weight_m @ (error_m**2 / (deviation_m**2 + (rate * distance_m) ** 2))) - 1

    low, high = 0.0, 10 * float(np.max(np.abs(error_m) / np.maximum(distance_m, 1e-3)))
    if excess(low) <= 0:
        return Discrepancy(0.0, len(lessons))
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return Discrepancy(high, len(lessons))


def judge(cut: Cut, discrepancy: Discrepancy) -> Outcome:
    """Which hidden runs lie within their intervals."""
    weight_m = cut.share_m / cut.share_m.sum()
    covered = {
        level: float(weight_m @ ((low_m <= cut.error_m) & (cut.error_m <= high_m)))
        for level, (low_m, high_m) in cut.forecast.widened(discrepancy).items()
    }
    return Outcome(
        flops=cut.flops,
        num_fitted=cut.num_fitted,
        num_hidden=round(cut.share_m.sum()),
        reach=float(cut.C_m.max() / cut.largest),
        bias=float(weight_m @ cut.error_m),
        error=float(weight_m @ np.abs(cut.error_m)),
        covered=covered,
    )


def refit(fitted: Fit, points: list[dict]) -> Fit:
    """The same fit on other points of its kind, with few resamples."""
    return fit(
        points_of(fitted, points),
        fitted.law,
        fitted.delta,
        NUM_BOOTSTRAP,
        fitted.seed,
        residual=fitted.residual,
        weights=fitted.weights,
        resample=fitted.resample,
        fixed=fitted.fixed,
    )


def points_of(fitted: Fit, points: list[dict]) -> list[Point]:
    """Points of a fit as they were before it; they share the fit's conventions."""
    own = ("run_id", "N", "D", "C", "loss", "se", "epochs")
    shared = {name: value for name, value in fitted.conventions.items() if name in Point._fields}
    return [
        Point(
            **{name: p[name] for name in own},
            **shared,
            inputs={name: value for name, value in p.items() if name not in own},
        )
        for p in points
    ]
