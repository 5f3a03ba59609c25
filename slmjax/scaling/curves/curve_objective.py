"""The minimisation behind a fit of loss curves: Huber of log-loss residuals, and what may hold or draw the response.

The response, how a change of the rate sets in (C, beta, gamma), is what few curves tell least: two or three schedules
fit about as well with a quick response as with a slow one. A pull is a ridge on these three coordinates.

Letters: K resamples, S starts, n logged steps of all curves, P parameters, Q free ones.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling.curves import multi_power
from slmjax.scaling.curves.curve_tables import Curve
from slmjax.scaling.laws._projection import best_cells
from slmjax.scaling.minimise import Minimum, minimise

GROUP_WIDTH = 16
POSITIVE = np.array([name not in ("alpha", "gamma") for name in multi_power.PARAMETERS])
RESPONSE = slice(4, 7)  # C, beta and gamma among the parameters
# Exponents past these ends are terms the curves do not show; the others are bounded by the data or by nothing.
LOW_P = np.array([-np.inf, -np.inf, 0.01, np.log(1e-6), np.log(1e-6), np.log(0.01), -1.0])
HIGH_P = np.array([np.inf, np.inf, 3.0, np.log(1e3), np.log(1e9), np.log(10.0), 3.0])
# beta, C and gamma of the starts, in units of the peak rate and of the typical sum of rates
SHAPES = tuple(itertools.product((0.3, 0.6, 1.2), (1.0, 10.0, 100.0, 1000.0), (0.3, 0.7)))
MAX_STEPS = 600


class Problem(NamedTuple):
    """Curves in units of their peak rate `rate` and typical sum of rates `total`, and the pull on the parameters.

    pull_P: a coordinate at distance x from `towards_P` costs pull x^2/2, in the units of a point at delta from the law,
    which costs 1/2; inf holds it there.
    """

    knots: list[multi_power.Knots]
    loss_n: np.ndarray
    delta: float
    rate: float
    total: float
    towards_P: np.ndarray
    pull_P: np.ndarray

    @property
    def free_P(self) -> np.ndarray:
        return np.isfinite(self.pull_P)

    @property
    def floor(self) -> float:
        return (1e-14 / self.delta) ** 2

    def natural(self, theta_P: np.ndarray) -> np.ndarray:
        """Values in natural units [P] of coordinates."""
        return multi_power.natural(_values(theta_P), self.rate, self.total)

    def starts(self, num: int) -> np.ndarray:
        """Coordinates [S, P], best first: with alpha and the response on a grid the law is linear in L0, A and B."""
        spent_n = np.concatenate([curve.spent_n for curve in self.knots])
        response = {
            cell: np.concatenate([multi_power.response(*cell, curve) for curve in self.knots]) for cell in SHAPES
        }
        cells = [(alpha, *shape) for alpha in (0.3, 0.5, 0.8) for shape in SHAPES]
        ones_n = np.ones(len(self.loss_n))
        features = [np.stack([ones_n, spent_n ** -cell[0], response[cell[1:]]], axis=1) for cell in cells]
        best_S, log_S3 = best_cells(np.stack(features), self.loss_n, num)
        alpha, beta, C, gamma = np.array(cells)[best_S].T
        start_SP = np.stack([log_S3[:, 0], log_S3[:, 1], alpha, log_S3[:, 2], np.log(C), np.log(beta), gamma], axis=1)
        return np.where(self.free_P, start_SP, self.towards_P)

    def minimum(
        self,
        start_KP: np.ndarray,
        weight_Kn: np.ndarray | None = None,
        tolerance: float = 1e-12,
        max_steps: int = MAX_STEPS,
    ) -> Minimum:
        """From each start, with each weighting of the points; equal weights unless told."""
        weight_Kn = np.ones((len(start_KP), len(self.loss_n))) if weight_Kn is None else weight_Kn
        curvature_PP = self._curvature(start_KP[0])
        return minimise(self._objective(weight_Kn), start_KP, curvature_PP, max_steps, tolerance, self.floor)

    def misfit(self, theta_P: np.ndarray) -> float:
        """Sum of Huber of the residuals, without the pull."""
        unpulled = self._replace(pull_P=np.where(self.free_P, 0.0, self.pull_P))
        value_K, _ = unpulled._objective(np.ones((1, len(self.loss_n))))(theta_P[None], np.array([0]))
        return float(value_K[0] * len(self.loss_n) * self.delta**2)

    def _objective(self, weight_Kn):
        """Mean Huber in units of delta squared with the pull, and its gradient by the free coordinates, with a parabola
        outside LOW_P to HIGH_P."""
        n, log_n, delta = len(self.loss_n), np.log(self.loss_n), self.delta
        pull_P = np.where(self.free_P, self.pull_P, 0.0) / n

        def value_and_gradient(theta_KP, lanes_K):
            value_K, gradient_KP = np.empty(len(theta_KP)), np.empty_like(theta_KP)
            outside_KP = theta_KP - np.clip(theta_KP, LOW_P, HIGH_P)
            away_KP = theta_KP - self.towards_P
            with np.errstate(all="ignore"):  # a wild trial overflows; the optimiser takes it back
                for k, theta_P in enumerate(theta_KP):
                    predicted_n, jacobian_nP = _predict(theta_P, self.knots)
                    r_n = (np.log(predicted_n) - log_n) / delta
                    force_n = np.clip(r_n, -1.0, 1.0)
                    weight_n = weight_Kn[lanes_K[k]]
                    value_K[k] = weight_n @ (force_n * (r_n - 0.5 * force_n))
                    gradient_KP[k] = (weight_n * force_n / predicted_n) @ jacobian_nP
            value_K = value_K / n + (outside_KP**2).sum(axis=1) + 0.5 * away_KP**2 @ pull_P
            return value_K, (gradient_KP / (n * delta) + 2 * outside_KP + away_KP * pull_P) * self.free_P

        return value_and_gradient

    def _curvature(self, theta_P):
        """Inverse of the reweighted Gauss-Newton matrix of the free coordinates [P, P]: Huber's majoriser."""
        predicted_n, jacobian_nP = _predict(theta_P, self.knots)
        jacobian_nQ = (jacobian_nP / predicted_n[:, None])[:, self.free_P]
        n, delta = len(self.loss_n), self.delta
        weight_n = 1 / np.maximum(np.abs(np.log(predicted_n / self.loss_n)) / delta, 1.0)
        normal_QQ = (jacobian_nQ * weight_n[:, None]).T @ jacobian_nQ / (n * delta**2)
        normal_QQ += 1e-9 * np.trace(normal_QQ) * np.eye(len(normal_QQ)) + np.diag(self.pull_P[self.free_P]) / n
        inverse_PP = np.zeros((len(theta_P), len(theta_P)))
        inverse_PP[np.ix_(self.free_P, self.free_P)] = np.linalg.inv(normal_QQ)
        return inverse_PP


def make_problem(curves: Sequence[Curve], delta: float, pull: float) -> Problem:
    """The fit of these curves with a pull on the response towards the published one of 400M parameters."""
    rate = max(float(curve.lr_T.max()) for curve in curves)
    spent = [np.cumsum(curve.lr_T)[curve.steps_n] for curve in curves]
    total = float(np.exp(np.mean(np.log(np.concatenate(spent)))))
    scaled_P = multi_power.natural(np.asarray(multi_power.PUBLISHED["400M"]), 1 / rate, 1 / total)
    pull_P = np.zeros(len(multi_power.PARAMETERS))
    pull_P[RESPONSE] = pull
    return Problem(
        knots=[multi_power.knots(curve.lr_T, curve.steps_n, GROUP_WIDTH, rate, total) for curve in curves],
        loss_n=np.concatenate([curve.loss_n for curve in curves]),
        delta=delta,
        rate=rate,
        total=total,
        towards_P=np.where(POSITIVE, np.log(np.where(POSITIVE, scaled_P, 1.0)), scaled_P),
        pull_P=pull_P,
    )


def _values(theta_P):
    return np.where(POSITIVE, np.exp(np.where(POSITIVE, theta_P, 0.0)), theta_P)


def _predict(theta_P, knots):
    parts = [multi_power.loss_and_jacobian(_values(theta_P), curve) for curve in knots]
    return np.concatenate([loss_n for loss_n, _ in parts]), np.concatenate([jacobian_nP for _, jacobian_nP in parts])
