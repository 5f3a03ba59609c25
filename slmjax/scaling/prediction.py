"""What one new run will show under a fit: where the law lies, how runs scatter about it, and how it goes wrong far out.

A prediction interval holds three things: the bootstrap draws of the law, bias-corrected; the residuals of the runs
nearest in compute, for small and large runs scatter differently; and the discrepancy of the form, whose size grows in
proportion to the distance beyond the fitted runs. The last cannot be read off a fit: `backtest.py` learns it by hiding
runs.

Letters: K draws, n fitted points, m targets, J scatter nodes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from slmjax.scaling.bias_corrected import bias_corrected
from slmjax.scaling.fitted import Fit

LEVELS = (0.8, 0.95)
LEAST_NEAR = 20  # residuals that speak for the scatter at a target: one in each 5% tail
NUM_NODES = 31  # quantiles that stand for those residuals

Targets = Mapping[str, np.ndarray]  # input name, and C, to values [m]
Ends = dict[float, tuple[np.ndarray, np.ndarray]]  # level to low [m] and high [m]


class Discrepancy(NamedTuple):
    """The form's own error: of standard deviation `rate` times the distance, as `num_cuts` nested forecasts showed."""

    rate: float
    num_cuts: int

    def half_width(self, level: float, distance_m: np.ndarray) -> np.ndarray:
        """Student's t: a rate learned from few cuts is itself uncertain."""
        from scipy.special import stdtrit

        return float(stdtrit(self.num_cuts, (1 + level) / 2)) * self.rate * distance_m


NO_DISCREPANCY = Discrepancy(0.0, 1)


class Prediction(NamedTuple):
    """Of m targets: the law's value, ends of the interval by level relative to it, standard deviation, distance.

    All in the scale of the fit's residuals (log or raw loss); draws and scatter only, without discrepancy.
    """

    value_m: np.ndarray
    ends: Ends
    deviation_m: np.ndarray
    distance_m: np.ndarray

    def widened(self, discrepancy: Discrepancy) -> Ends:
        """Ends relative to the value, with the discrepancy added in quadrature."""
        out = {}
        for level, (low_m, high_m) in self.ends.items():
            extra_m = discrepancy.half_width(level, self.distance_m)
            # Draws that all lie on one side of the estimate leave the other end at it, never beyond it.
            out[level] = (-np.hypot(np.minimum(low_m, 0), extra_m), np.hypot(np.maximum(high_m, 0), extra_m))
        return out


def predict(fit: Fit, targets: Targets) -> Prediction:
    """What a new run at each target will show, in the scale of the fit's residuals.

    Args:
      targets: every input of the law, and C, which says which fitted runs are near.
    """
    form = fit.form
    u_Fm = np.log([targets[name] for name in form.inputs]) - fit.centre[:, None]
    with np.errstate(all="ignore"):
        value_m = _scaled(fit, form.loss(fit.theta[None], u_Fm)[0])[0]
        shift_Km = _scaled(fit, form.loss(fit.draws, u_Fm)[0]) - value_m
    shift_Km = bias_corrected(np.where(np.isnan(shift_Km), np.inf, shift_Km), np.zeros(len(value_m)))
    scatter_mk = _scatter(fit, np.log(targets["C"]))
    node_Jm = np.quantile(scatter_mk, (np.arange(NUM_NODES) + 0.5) / NUM_NODES, axis=1)
    both_Xm = (shift_Km[:, None] + node_Jm[None]).reshape(-1, len(value_m))
    # Order statistics: an infinite draw stays infinite and does not become nan.
    ends = {
        level: tuple(np.quantile(both_Xm, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest"))
        for level in LEVELS
    }
    with np.errstate(invalid="ignore", over="ignore"):
        deviation_m = np.sqrt(shift_Km.var(axis=0) + (scatter_mk**2).mean(axis=1))
    deviation_m = np.where(np.isfinite(deviation_m), deviation_m, np.inf)
    return Prediction(value_m, ends, deviation_m, distance(fit, targets))


def distance(fit: Fit, targets: Targets) -> np.ndarray:
    """How far outside the fitted runs each target lies [m]: the largest log ratio beyond their range of C or of an
    input of the law, 0 inside."""
    out_m = np.zeros(len(targets["C"]))
    for name in {"C", *fit.form.inputs}:
        u_n, u_m = np.log([p[name] for p in fit.points]), np.log(targets[name])
        out_m = np.maximum(out_m, np.maximum(u_m - u_n.max(), u_n.min() - u_m))
    return out_m


def to_loss(fit: Fit, value: float) -> float:
    """From the scale of the residuals to the loss."""
    if fit.residual == "raw":
        return float(value)
    return math.exp(value) if value < 700 else math.inf


def _scaled(fit, loss):
    return np.log(loss) if fit.residual == "log" else loss


def _scatter(fit, log_C_m):
    """Residuals [m, k] of the third of the runs that is nearest in compute, corrected for the parameters fitted."""
    n = len(fit.points)
    residual_n = fit.residuals() * math.sqrt(n / max(n - fit.num_free, 1))
    near = min(n, max(LEAST_NEAR, n // 3))
    log_C_n = np.log([p["C"] for p in fit.points])
    nearest_mk = np.argsort(np.abs(log_C_m[:, None] - log_C_n), axis=1, kind="stable")[:, :near]
    return residual_n[nearest_mk]
