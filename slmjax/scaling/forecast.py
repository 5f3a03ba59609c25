"""Forecasts from a Fit: the compute-optimal N and D at a budget, the loss a run will reach, the budget a loss takes.

Two kinds of uncertainty are told apart. Where the law lies (bootstrap draws) gives the intervals of N, D and D/N; what
one new run will show (the law, the scatter of runs, and how the form went wrong in back-tests) gives the interval of a
loss. Every forecast carries its back-test and says how far beyond the fitted runs it reaches.
"""

import dataclasses
import json
import math
from typing import NamedTuple

import numpy as np

from slmjax.scaling import prediction, show
from slmjax.scaling.allocation import COSTS, Cost, Trade, allocate, best, make_cost, trades
from slmjax.scaling.backtest import BackTest, back_test
from slmjax.scaling.fit import Fit
from slmjax.scaling.prediction import LEVELS

__all__ = ["COSTS", "LEVELS", "Cost", "Forecast", "Quantity", "Trade", "allocate", "budget", "loss", "make_cost",
           "optimum", "trade_table", "trades"]  # fmt: skip

BUDGETS_SEARCHED = (1e-3, 1e9)  # times the largest run's compute, for the budget that a loss takes
BUDGETS_PER_DECADE = 40


class Quantity(NamedTuple):
    """A forecast number with its intervals by level; an end is inf (or -inf) where the data do not bound it."""

    name: str
    value: float
    intervals: dict[float, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A prediction at a target.

    Attributes:
      target: what was asked: {"flops"}, {"N", "D"} or {"loss"}.
      quantities: by name: N, D, tokens_per_param, flops, loss, as far as they are not given.
      reach: target over the largest fitted value of N, D and C; above 1 is extrapolation.
      tested: what forecasts of this law from the cheaper of these runs were worth.
    """

    law: str
    cost: str
    target: dict[str, float]
    quantities: dict[str, Quantity]
    reach: dict[str, float]
    notes: list[str]
    tested: BackTest

    def __getitem__(self, name: str) -> Quantity:
        return self.quantities[name]

    def to_json(self) -> str:
        """Unbounded ends are null."""
        body = {
            "law": self.law,
            "cost": self.cost,
            "target": self.target,
            "reach": self.reach,
            "notes": self.notes,
            "back_test": self.tested.to_dict(),
            "quantities": {
                q.name: {
                    "value": _finite(q.value),
                    "intervals": {str(level): [_finite(e) for e in ends] for level, ends in q.intervals.items()},
                }
                for q in self.quantities.values()
            },
        }
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def table(self) -> str:
        target = ", ".join(f"{name}={value:.4g}" for name, value in self.target.items())
        lines = [f"forecast of {self.law} at {target} ({self.cost})"]
        for q in self.quantities.values():
            text = "{:.4g}".format if q.name == "loss" else "{:.3g}".format
            ends = "  ".join(f"{level:.0%} {show.interval(q.intervals[level], text)}" for level in q.intervals)
            lines.append(f"  {q.name:<16} {text(q.value):<10} {ends}".rstrip())
        lines.append(self.tested.sentence())
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def optimum(fit: Fit, flops: float, cost: str = "6ND") -> Forecast:
    """The N and D that reach the lowest loss with a training budget, and the loss one run there will show.

    Args:
      flops: budget C.
      cost: how N and D spend it. "6ND", or "logged": the FLOPs per token the fitted runs logged, head and attention
        counted, as a power law of N that returns to 6ND for large N.
    """
    price = make_cost(fit, cost)
    N, D = best(fit, flops, price)
    N_K, D_K = allocate(fit, fit.draws, flops, price)
    at = {"N": N, "D": D, "C": float(flops)}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_K = np.where(N_K > 0, D_K / N_K, np.inf)
    quantities = [
        _quantity("N", N, N_K),
        _quantity("D", D, D_K),
        _quantity("tokens_per_param", D / N, ratio_K),
        _loss_quantity(fit, at),
    ]
    notes = [f"{q.name} is weakly identified: its 95% interval {_span(q)}" for q in quantities[:3] if _ratio(q) > 30]
    return _forecast(fit, price, {"flops": float(flops)}, quantities, at, notes)


def loss(fit: Fit, N: float, D: float, cost: str = "6ND", **inputs: float) -> Forecast:
    """The held-out loss of one run with N parameters and D tokens. A law of C takes C as the fitted runs logged it.

    inputs: what a law of more than N, D and C reads, e.g. E=64 or U=1e9.
    """
    for name, value in {"N": N, "D": D, **inputs}.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a positive number")
    missing = [name for name in fit.form.inputs if name not in {"N", "D", "C", *inputs}]
    if missing:
        raise ValueError(f"{fit.law} is a law of {', '.join(fit.form.inputs)}; give {', '.join(missing)} too")
    price = make_cost(fit, "logged" if "C" in fit.form.inputs else cost)
    point = {"N": float(N), "D": float(D), **inputs}
    C = float(price.flops(N, D))
    quantities = [
        Quantity("flops", C, {}),
        Quantity("tokens_per_param", D / N, {}),
        _loss_quantity(fit, point | {"C": C}),
    ]
    return _forecast(fit, price, point, quantities, point | {"C": C}, [])


def budget(fit: Fit, loss: float, cost: str = "6ND") -> Forecast:
    """The least training compute whose optimal model will show a loss, with the N and D it takes.

    Its interval inverts that of the loss: an end is where an end of the loss interval reaches the target, unbounded
    where that does not happen within 1e9 times the largest run.
    """
    if not (math.isfinite(loss) and loss > 0):
        raise ValueError(f"loss={loss} must be a positive number")
    if fit.residual != "log":
        raise ValueError(f"{fit.law} is fitted to raw losses; a budget for a loss needs a law of log loss")
    price, largest = make_cost(fit, cost), max(p["C"] for p in fit.points)
    low, high = (factor * largest for factor in BUDGETS_SEARCHED)
    C_m = np.geomspace(low, high, 1 + round(BUDGETS_PER_DECADE * math.log10(high / low)))
    N_m, D_m = allocate(fit, np.tile(fit.theta, (len(C_m), 1)), C_m, price)
    usable = np.isfinite(N_m) & (N_m > 0)
    if not usable.any():
        raise ValueError(f"the fitted law has no compute-optimal size: its parameters are {fit.parameters}")
    C_m, N_m, D_m = C_m[usable], N_m[usable], D_m[usable]
    made = prediction.predict(fit, {"N": N_m, "D": D_m, "C": C_m})
    C = _falls_to(C_m, made.value_m, math.log(loss))
    if not math.isfinite(C):
        raise ValueError(
            f"loss={loss:.4g} is not reached within {BUDGETS_SEARCHED[1]:.0e} times the largest run's compute, where "
            f"the law still predicts {math.exp(made.value_m[-1]):.4g}; ask for a loss above that"
        )
    ends = made.widened(back_test(fit).discrepancy)
    reached = {
        level: tuple(_falls_to(C_m, made.value_m + end_m, math.log(loss)) for end_m in ends[level]) for level in LEVELS
    }
    N, D = best(fit, C, price)
    quantities = [Quantity("flops", C, reached), Quantity("N", N, {}), Quantity("D", D, {})]
    return _forecast(fit, price, {"loss": float(loss)}, quantities, {"N": N, "D": D, "C": C}, [])


def trade_table(made: list[Trade]) -> str:
    """One line per size."""
    rows = [("N / N*", "N", "D for the same loss", "FLOPs for it", "loss at the same FLOPs", "FLOPs spent / needed")]
    rows += [
        (
            f"{t.factor:g}",
            show.count(t.N),
            show.count(t.same_loss_D),
            f"{t.same_loss_flops:.3g}" if math.isfinite(t.same_loss_flops) else "unbounded",
            f"{t.same_flops_loss:.4g}",
            f"{t.waste:.3g}",
        )
        for t in made
    ]
    return "\n".join(show.columns(rows)) + "\n"


def _falls_to(C_m, value_m, target):
    """The first C at which a curve has fallen to a target, interpolated in log C; -inf or inf outside the search."""
    below = np.flatnonzero(value_m <= target)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return -math.inf
    share = (value_m[i - 1] - target) / (value_m[i - 1] - value_m[i]) if np.isfinite(value_m[i - 1]) else 1.0
    return float(C_m[i - 1] * (C_m[i] / C_m[i - 1]) ** share)


def _quantity(name, value, draws_K):
    draws_K = np.where(np.isnan(draws_K), np.inf, draws_K)
    return Quantity(name, value, {level: _percentiles(draws_K, level) for level in LEVELS})


def _percentiles(draws, level):
    """Ends of the central interval: order statistics, so that infinite draws stay infinite and do not become nan."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low) if low > 0 else -math.inf, float(high)


def _loss_quantity(fit, at):
    """Loss of the law, with prediction intervals as back-tests calibrated them."""
    made = prediction.predict(fit, {name: np.array([at[name]]) for name in {"C", *fit.form.inputs}})
    value, ends = float(made.value_m[0]), made.widened(back_test(fit).discrepancy)
    intervals = {
        level: tuple(prediction.to_loss(fit, value + float(end_m[0])) for end_m in ends[level]) for level in LEVELS
    }
    return Quantity("loss", prediction.to_loss(fit, value), intervals)


def _forecast(fit, cost, target, quantities, at, notes):
    tested = back_test(fit)
    reach = {name: at[name] / max(p[name] for p in fit.points) for name in ("N", "D", "C")}
    beyond = {name: value for name, value in reach.items() if value > 1.05}
    grows = tested.discrepancy.rate * math.log(10)
    if fit.loss_kind not in ("exact", None):
        notes = [*notes, f"{show.loss_name(fit.loss_kind)}: as that of the fitted runs"]
    notes = [
        *notes,
        f"loss interval: bootstrap of the law, the scatter of runs ({fit.residual_rms():.2g} in {fit.residual} loss), "
        + (
            f"and the law's own error as back-tests showed it ({grows:.2g} per factor 10 beyond the runs)"
            if tested.outcomes or grows
            else "and no error of the law itself"
        ),
    ]
    if beyond:
        notes.append(
            "extrapolation: "
            + ", ".join(f"{name} is {value:.3g}x the largest fitted" for name, value in beyond.items())
            + (
                f"; hidden runs tested the law up to {tested.reach:.3g}x the compute fitted"
                if tested.outcomes
                else "; the intervals assume that the law holds there, which these runs cannot show"
            )
        )
    for name, why in fit.weakly_identified().items():
        notes.append(f"{name} is weakly identified: {why}")
    return Forecast(fit.law, str(cost), target, {q.name: q for q in quantities}, reach, notes, tested)


def _ratio(q):
    low, high = q.intervals[0.95]
    return high / low if low > 0 else math.inf


def _span(q):
    return "is unbounded" if math.isinf(_ratio(q)) else f"spans a factor {_ratio(q):.3g}"


def _finite(value):
    return value if math.isfinite(value) else None
