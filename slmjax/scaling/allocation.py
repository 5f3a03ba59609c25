"""How a budget is spent on parameters and tokens: the rule for C, the compute-optimal split, and what leaving it costs.

Point estimates and draws of a law of N and D; intervals and targets live in `forecast.py`.

Letters: K candidate laws.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling.fitted import Fit

COSTS = ("6ND", "logged")
FARTHEST = 1e9  # times a given number of tokens: what is not reached by then is never reached
WASTE_SEARCHED = (1e-4, 1.01)  # times a budget: where the budget is sought that its waste would have sufficed for
SIZE_FACTORS = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)


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


class Trade(NamedTuple):
    """A model of another size than the optimum, N = factor N*.

    `same_loss_D`, `same_loss_flops`: what it takes to reach the optimum's loss; inf where no data suffice.
    `same_flops_loss`: the loss it reaches with the optimum's budget; `waste`: that budget over the one whose optimum
    has that loss, so 1.1 is a tenth of the FLOPs lost; inf where that is more than a factor 10,000.
    """

    factor: float
    N: float
    same_loss_D: float
    same_loss_flops: float
    same_flops_loss: float
    waste: float


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


def allocate(fit: Fit, theta_KP: np.ndarray, flops: float | np.ndarray, cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """Compute-optimal N [K] and D [K] of each candidate law at one budget or a budget each, by bisection on log N.

    At the optimum a further unit of log C spent on N or on D lowers the loss alike:
    (dL/dlog N) / (dlog C/dlog N) = dL/dlog D. Where no size is best, N is 0 or inf.
    """
    if fit.form.inputs != ("N", "D"):
        raise ValueError(
            f"{fit.law} is a law of {', '.join(fit.form.inputs)}; a compute-optimal N and D need a law of N and D"
        )
    # From one parameter to a model that sees one token.
    low_K, high_K = np.zeros(len(theta_KP)), np.log(np.asarray(flops, float)) * np.ones(len(theta_KP))

    def gain_of_larger_N(log_N_K):
        N_K = np.exp(log_N_K)
        log_inputs_FK = np.stack([log_N_K, np.log(cost.tokens(N_K, flops))])
        slope_N_K, slope_D_K = fit.form.slopes(theta_KP, log_inputs_FK - fit.centre[:, None])
        return cost.slope(N_K) * slope_D_K - slope_N_K

    with np.errstate(all="ignore"):
        never_K, always_K = gain_of_larger_N(low_K) <= 0, gain_of_larger_N(high_K) >= 0
        for _ in range(64):
            middle_K = 0.5 * (low_K + high_K)
            larger_K = gain_of_larger_N(middle_K) > 0
            low_K, high_K = np.where(larger_K, middle_K, low_K), np.where(larger_K, high_K, middle_K)
        N_K = np.where(never_K, 0.0, np.where(always_K, np.inf, np.exp(high_K)))
        D_K = np.where(never_K, np.inf, np.where(always_K, 0.0, cost.tokens(N_K, flops)))
    return N_K, D_K


def frontier(fit: Fit, C_m: np.ndarray, cost: Cost) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute-optimal N [m], D [m] and loss [m] of the estimate at many budgets."""
    N_m, D_m = allocate(fit, np.tile(fit.theta, (len(C_m), 1)), C_m, cost)
    with np.errstate(all="ignore"):
        u_Fm = np.log([N_m, D_m]) - fit.centre[:, None]
        return N_m, D_m, fit.form.loss(fit.theta[None], u_Fm)[0][0]


def best(fit: Fit, flops: float, cost: Cost) -> tuple[float, float]:
    """Compute-optimal N and D of the estimate, or a ValueError where no size is best."""
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"flops={flops} must be a positive number")
    N, D = (float(each[0]) for each in allocate(fit, fit.theta[None], flops, cost))
    if not (math.isfinite(N) and N > 0):
        raise ValueError(
            f"the fitted law has no compute-optimal size at {flops:.3g} FLOPs: its parameters are {fit.parameters}"
        )
    return N, D


def trades(fit: Fit, flops: float, cost: Cost, factors: Sequence[float] = SIZE_FACTORS) -> list[Trade]:
    """What smaller and larger models than the optimum of a budget cost: over-training for cheap inference, and the
    price of a size that was not quite right."""
    N_best, D_best = best(fit, flops, cost)
    least = fit.predict(N=N_best, D=D_best)
    C_m = flops * np.geomspace(*WASTE_SEARCHED, 1 + round(100 * math.log10(WASTE_SEARCHED[1] / WASTE_SEARCHED[0])))
    frontier_m = frontier(fit, C_m, cost)[2]
    out = []
    for factor in factors:
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factor={factor} of the optimal size must be a positive number")
        N = factor * N_best
        D = _crossing(lambda D, N=N: fit.predict(N=N, D=D) - least, D_best)
        loss = fit.predict(N=N, D=float(cost.tokens(N, flops)))
        # The frontier falls with C: its log C at a loss, read between the points of a fine grid.
        even = float(np.exp(np.interp(-loss, -frontier_m, np.log(C_m), left=-np.inf)))
        waste = flops / even if even > 0 else math.inf
        out.append(Trade(factor, N, D, float(cost.flops(N, D)) if math.isfinite(D) else math.inf, loss, waste))
    return out


def _crossing(falling: Callable[[float], float], near: float) -> float:
    """Where a falling function of a positive number crosses 0: 0 or inf when it does not within FARTHEST of `near`."""
    low, high = math.log(near / FARTHEST), math.log(near * FARTHEST)
    if not falling(math.exp(high)) <= 0:
        return math.inf
    if not falling(math.exp(low)) >= 0:
        return 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if falling(math.exp(middle)) > 0 else (low, middle)
    return math.exp(high)
