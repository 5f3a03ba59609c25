"""Forecasts from a Fit: the compute-optimal N and D at a budget, and the loss a run will reach, with intervals.

Two kinds of uncertainty are told apart. Where the law lies (bootstrap draws) gives the intervals of N, D and D/N; what
one new run will show (the law plus the scatter of runs around it) gives the interval of a loss. Every forecast says how
far beyond the fitted runs it reaches: no interval here knows whether the law still holds there.
"""

import dataclasses
import json
import math
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.fit import Fit

LEVELS = (0.8, 0.95)
COSTS = ("6ND", "logged")


class Cost(NamedTuple):
    """Training FLOPs C = 6 N D (1 + coefficient N^-exponent): the excess is the head and attention of small models."""

    name: str
    coefficient: float = 0.0
    exponent: float = 0.0

    def flops(self, N, D):
        return 6 * N * D * (1 + self.coefficient * N**-self.exponent)

    def tokens(self, N, flops):
        """D that spends the budget on a model of N parameters."""
        return flops / (6 * N * (1 + self.coefficient * N**-self.exponent))

    def slope(self, N):
        """d log C / d log N at fixed D."""
        excess = self.coefficient * N**-self.exponent
        return 1 - self.exponent * excess / (1 + excess)

    def __str__(self):
        if not self.coefficient:
            return "C = 6 N D"
        sign = "+" if self.coefficient > 0 else "-"
        return f"C = 6 N D (1 {sign} {abs(self.coefficient):.4g} N^{-self.exponent:.3f}), as the runs logged it"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A forecast number with its intervals by level; an end is inf (or 0) where the data do not bound it."""

    name: str
    value: float
    intervals: dict[float, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A prediction at a target.

    Attributes:
      target: what was asked: {"flops"} or {"N", "D"}.
      quantities: by name: N, D, tokens_per_param, flops, loss, as far as they are not given.
      reach: target over the largest fitted value of N, D and C; above 1 is extrapolation.
    """

    law: str
    cost: str
    target: dict[str, float]
    quantities: dict[str, Quantity]
    reach: dict[str, float]
    notes: list[str]

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
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def optimum(fit: Fit, flops: float, cost: str = "6ND") -> Forecast:
    """The N and D that reach the lowest loss with a training budget, and the loss one run there will show.

    Args:
      flops: budget C.
      cost: how N and D spend it. "6ND", or "logged": the FLOPs per token the fitted runs logged, head and attention
        counted, as a power law of N that returns to 6ND for large N.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"flops={flops} must be a positive number")
    price = make_cost(fit, cost)
    N, D = allocate(fit, fit.theta[None], flops, price)
    if not (np.isfinite(N[0]) and N[0] > 0):
        raise ValueError(
            f"the fitted law has no compute-optimal size at {flops:.3g} FLOPs: its parameters are {fit.parameters}"
        )
    N_K, D_K = allocate(fit, fit.draws, flops, price)
    point = {"N": float(N[0]), "D": float(D[0])}
    quantities = [
        _quantity("N", point["N"], N_K),
        _quantity("D", point["D"], D_K),
        _quantity("tokens_per_param", point["D"] / point["N"], D_K / np.maximum(N_K, 1e-300)),
        _loss_quantity(fit, point),
    ]
    notes = [f"{q.name} is weakly identified: its 95% interval {_span(q)}" for q in quantities[:3] if _ratio(q) > 30]
    return _forecast(fit, price, {"flops": float(flops)}, quantities, point | {"C": float(flops)}, notes)


def loss(fit: Fit, N: float, D: float, cost: str = "6ND") -> Forecast:
    """The held-out loss of one run with N parameters and D tokens. A law of C takes C as the fitted runs logged it."""
    for name, value in (("N", N), ("D", D)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a positive number")
    price, point = make_cost(fit, "logged" if "C" in fit.form.inputs else cost), {"N": float(N), "D": float(D)}
    C = float(price.flops(N, D))
    quantities = [
        Quantity("flops", C, {}),
        Quantity("tokens_per_param", D / N, {}),
        _loss_quantity(fit, point | {"C": C}),
    ]
    return _forecast(fit, price, point, quantities, point | {"C": C}, [])


def allocate(fit: Fit, theta_KP: np.ndarray, flops: float, cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """Compute-optimal N [K] and D [K] of each candidate law at one budget, by bisection on log N.

    At the optimum a further unit of log C spent on N or on D lowers the loss alike:
    (dL/dlog N) / (dlog C/dlog N) = dL/dlog D. Where no size is best, N is 0 or inf.
    """
    if fit.form.inputs != ("N", "D"):
        raise ValueError(
            f"{fit.law} is a law of {', '.join(fit.form.inputs)}; a compute-optimal N and D need a law of N and D"
        )
    # From one parameter to a model that sees one token.
    low_K, high_K = np.zeros(len(theta_KP)), np.full(len(theta_KP), math.log(flops))

    def gain_of_larger_N(log_N_K):
        N_K = np.exp(log_N_K)
        log_inputs_FK = np.stack([log_N_K, np.log(cost.tokens(N_K, flops))])
        slope_N_K, slope_D_K = fit.form.slopes(theta_KP, log_inputs_FK - fit.centre[:, None])
        return cost.slope(N_K) * slope_D_K - slope_N_K

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        never_K, always_K = gain_of_larger_N(low_K) <= 0, gain_of_larger_N(high_K) >= 0
        for _ in range(64):
            middle_K = 0.5 * (low_K + high_K)
            larger_K = gain_of_larger_N(middle_K) > 0
            low_K, high_K = np.where(larger_K, middle_K, low_K), np.where(larger_K, high_K, middle_K)
    N_K = np.where(never_K, 0.0, np.where(always_K, np.inf, np.exp(high_K)))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        D_K = np.where(never_K, np.inf, np.where(always_K, 0.0, cost.tokens(N_K, flops)))
    return N_K, D_K


def make_cost(fit: Fit, name: str) -> Cost:
    """The named rule for C. "logged" fits C/(6 N D) - 1 = c N^-g to the points, which must all lie on one side of 0."""
    if name not in COSTS:
        raise ValueError(f"cost={name!r} is not one of {', '.join(COSTS)}")
    if name == "6ND":
        return Cost("6ND")
    N, D, C = (np.array([p[key] for p in fit.points], float) for key in ("N", "D", "C"))
    excess = C / (6 * N * D) - 1
    if np.abs(excess).max() < 0.005:
        return Cost("logged")
    if not ((excess > 0).all() or (excess < 0).all()) or np.ptp(np.log(N)) == 0:
        raise ValueError(
            "the logged FLOPs lie above 6 N D for some runs and below for others, so they cannot be extrapolated; "
            "use cost=6ND"
        )
    slope, intercept = np.polyfit(np.log(N), np.log(np.abs(excess)), 1)
    return Cost("logged", float(np.sign(excess[0]) * np.exp(intercept)), float(-slope))


def _quantity(name, value, draws_K):
    draws_K = np.where(np.isnan(draws_K), np.inf, draws_K)
    return Quantity(name, value, {level: _percentiles(draws_K, level) for level in LEVELS})


def _percentiles(draws, level):
    """Ends of the central interval: order statistics, so that infinite draws stay infinite and do not become nan."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low) if low > 0 else -math.inf, float(high)


def _loss_quantity(fit, inputs):
    """Loss with prediction intervals: every draw of the law plus every residual, widened for the parameters fitted."""
    inputs = {name: inputs[name] for name in fit.form.inputs}
    n, P = len(fit.points), len(fit.theta)
    scatter_n = fit.residuals() * math.sqrt(n / (n - P))
    draws_K = np.log(fit.predict_draws(**inputs))
    return Quantity(
        "loss",
        fit.predict(**inputs),
        {
            level: tuple(
                math.exp(end)
                for end in np.quantile(
                    (draws_K[:, None] + scatter_n).ravel(), [(1 - level) / 2, (1 + level) / 2]
                ).tolist()
            )
            for level in LEVELS
        },
    )


def _forecast(fit, cost, target, quantities, at, notes):
    reach = {name: at[name] / max(p[name] for p in fit.points) for name in ("N", "D", "C")}
    beyond = {name: value for name, value in reach.items() if value > 1.05}
    notes = [
        *notes,
        f"loss interval: bootstrap of the law plus the scatter of runs ({fit.residual_rms():.2g} in log loss)",
    ]
    if beyond:
        notes.append(
            "extrapolation: "
            + ", ".join(f"{name} is {value:.3g}x the largest fitted" for name, value in beyond.items())
            + "; the intervals assume that the law holds there, which these runs cannot show"
        )
    for name, why in fit.weakly_identified().items():
        notes.append(f"{name} is weakly identified: {why}")
    return Forecast(
        law=fit.law, cost=str(cost), target=target, quantities={q.name: q for q in quantities}, reach=reach, notes=notes
    )


def _ratio(q):
    low, high = q.intervals[0.95]
    return high / low if low > 0 else math.inf


def _span(q):
    return "is unbounded" if math.isinf(_ratio(q)) else f"spans a factor {_ratio(q):.3g}"


def _finite(value):
    return value if math.isfinite(value) else None
