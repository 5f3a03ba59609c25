"""Power laws y = coefficient * C^exponent, fitted as straight lines in log-log, many copies of the data at once.

IsoFLOP optima and envelopes both end here. Laws with a floor are `laws`' business.

Letters: K copies (resamples), n points.
"""

import dataclasses
import math

import numpy as np

from slmjax.scaling.minimise import minimise

MAX_ROUNDS = 100  # of a Huber line that stopped early


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its resampled values [K]; an end that no resample bounds is infinite."""

    value: float
    draws: np.ndarray

    def interval(self, level: float) -> tuple[float, float]:
        """Percentile interval at e.g. level=.95."""
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Line:
    """log y = level + slope (log C - centre), and the same for every resample [K].

    The level is kept at the middle of the data: at C = 1 it would be known to many orders of magnitude only.
    """

    centre: float
    slope: float
    level: float
    slope_draws: np.ndarray
    level_draws: np.ndarray

    @property
    def exponent(self) -> Estimate:
        return Estimate(self.slope, self.slope_draws)

    @property
    def coefficient(self) -> Estimate:
        """y at C = 1."""
        return self.at(1.0)

    def at(self, C: float) -> Estimate:
        """y at a budget of C FLOPs."""
        if not (math.isfinite(C) and C > 0):
            raise ValueError(f"flops={C} must be a positive number")
        away = math.log(C) - self.centre
        return Estimate(math.exp(self.level + self.slope * away), np.exp(self.level_draws + self.slope_draws * away))


def weighted_line(log_C_n: np.ndarray, log_y_n: np.ndarray, draws_Kn: np.ndarray, weight_n: np.ndarray) -> Line:
    """Weighted least squares through log y [n] and through every resample of it [K, n], with the same weights."""
    if len(log_C_n) < 2 or np.ptp(log_C_n) == 0:
        raise ValueError(f"a line needs two budgets; there are {len(set(log_C_n.tolist()))}")
    share_n = weight_n / weight_n.sum()
    centre = float(share_n @ log_C_n)
    away_n = log_C_n - centre
    slope_of_n = share_n * away_n / (share_n @ away_n**2)
    return Line(
        centre, float(slope_of_n @ log_y_n), float(share_n @ log_y_n), draws_Kn @ slope_of_n, draws_Kn @ share_n
    )


def huber_lines(
    log_C_n: np.ndarray, log_y_n: np.ndarray, weight_Kn: np.ndarray, delta: float, exponent: float | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Lines of least sum_n weight_kn Huber_delta(level + slope (log C - mean log C) - log y), one a row of weights.

    Args:
      delta: residual, in log y, beyond which a point pulls with constant force; infinite is least squares.
      exponent: a slope that is imposed instead of fitted.
    Returns: slopes [K], levels [K], and the mean log C they refer to.
    """
    centre = float(log_C_n.mean())
    away_n = log_C_n - centre
    design_nP = np.ones((len(away_n), 1)) if exponent is not None else np.stack([np.ones(len(away_n)), away_n], axis=1)
    target_n = log_y_n if exponent is None else log_y_n - exponent * away_n
    theta_KP = _least_squares(design_nP, target_n, weight_Kn)
    if math.isfinite(delta):
        theta_KP = _huber(design_nP, target_n, weight_Kn, delta, theta_KP)
    slope_K = theta_KP[:, 1] if exponent is None else np.full(len(theta_KP), exponent)
    return slope_K, theta_KP[:, 0], centre


def _least_squares(design_nP, target_n, weight_Kn):
    normal_KPP = np.einsum("kn,np,nq->kpq", weight_Kn, design_nP, design_nP, optimize=True)
    return np.linalg.solve(normal_KPP, ((weight_Kn * target_n) @ design_nP)[:, :, None])[:, :, 0]


def _huber(design_nP, target_n, weight_Kn, delta, start_KP):
    total_K = weight_Kn.sum(axis=1)

    def value_and_gradient(theta_KP, lanes_K):
        r_Kn = (theta_KP @ design_nP.T - target_n) / delta
        force_Kn, weight = np.clip(r_Kn, -1.0, 1.0), weight_Kn[lanes_K] / total_K[lanes_K, None]
        value_K = np.einsum("kn,kn,kn->k", weight, force_Kn, r_Kn - 0.5 * force_Kn)
        return value_K, (weight * force_Kn) @ design_nP / delta

    def majoriser(theta_P, weight_n):
        """Matrix [P, P] and minimum [P] of Huber's parabola from above: a residual beyond delta weighs delta/|r|."""
        pull_n = weight_n / np.maximum(np.abs(design_nP @ theta_P - target_n) / delta, 1.0)
        normal_PP = (design_nP * pull_n[:, None]).T @ design_nP
        return normal_PP / (weight_n.sum() * delta**2), np.linalg.solve(normal_PP, design_nP.T @ (pull_n * target_n))

    normal_PP, _ = majoriser(start_KP[0], np.ones(len(target_n)))
    found = minimise(value_and_gradient, start_KP, np.linalg.inv(normal_PP))
    theta_KP = found.theta_KP.copy()
    # One in a hundred stops at a kink, its Hessian worn out: a step to the majoriser's minimum always descends.
    for k in np.flatnonzero(~found.converged_K):
        for _ in range(MAX_ROUNDS):
            normal_PP, next_P = majoriser(theta_KP[k], weight_Kn[k])
            again = minimise(
                lambda theta_KP, _, k=k: value_and_gradient(theta_KP, np.full(len(theta_KP), k)),
                next_P[None],
                np.linalg.inv(normal_PP),
            )
            theta_KP[k] = again.theta_KP[0]
            if again.converged_K[0]:
                break
    return theta_KP
