"""The numbers of a fit: sums of Huber, parameters held fixed, minima from several starts, and refits of resamples.

Letters: K problems, n points, P parameters, Q free ones, H held ones, F inputs, S starts, M minima, A attempts.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from slmjax.scaling.laws import Law
from slmjax.scaling.minimise import minimise

NUM_STARTS = 8
NUM_HELD_STARTS = 32  # a law's order of its starts says nothing once some of their coordinates are replaced
MAX_MINIMA = 4  # local minima of the points from which every resample is refitted
BLOCK = 64  # problems evaluated together: their arrays stay in the level-2 cache
RESIDUALS = ("log", "raw")
AGREE = 1e-8  # relative excess over the best objective within which two starts found the same minimum


class Held(NamedTuple):
    """Which coordinates are free, and what the others are: theta_H = level_H + slope_HQ theta_Q.

    A coefficient held at its published value moves with its exponent in centred coordinates, along a straight line.
    """

    free_P: np.ndarray
    slope_HQ: np.ndarray
    level_H: np.ndarray

    def expand(self, theta_KQ: np.ndarray) -> np.ndarray:
        if self.free_P.all():
            return theta_KQ
        theta_KP = np.empty((len(theta_KQ), len(self.free_P)))
        theta_KP[:, self.free_P] = theta_KQ
        theta_KP[:, ~self.free_P] = self.level_H + theta_KQ @ self.slope_HQ.T
        return theta_KP

    def pull(self, gradient_KP: np.ndarray) -> np.ndarray:
        """d/d(theta_P) to d/d(theta_Q)."""
        if self.free_P.all():
            return gradient_KP
        return gradient_KP[:, self.free_P] + gradient_KP[:, ~self.free_P] @ self.slope_HQ


def hold(law: Law, fixed: dict[str, float], start_P: np.ndarray, centre_F: np.ndarray) -> Held:
    """What fixed values mean for coordinates. The line is read from the law itself, at Q + 1 places on it."""
    free_P = np.array([name not in fixed for name in law.parameters])
    unknown = [name for name in fixed if name not in law.parameters]
    if unknown:
        raise ValueError(f"fixed: {law.name} has no {unknown[0]!r}; its parameters are {', '.join(law.parameters)}")
    if not fixed:
        return Held(free_P, np.empty((0, len(free_P))), np.empty(0))
    if not free_P.any():
        raise ValueError(f"fixed: nothing is left to fit of {', '.join(law.parameters)}")
    Q = int(free_P.sum())
    places = np.tile(start_P, (Q + 2, 1))
    places[1 : Q + 1, free_P] += 0.5 * np.eye(Q)
    places[Q + 1, free_P] += 0.25
    values = law.values(places, centre_F)
    for name, value in fixed.items():
        values[:, law.parameters.index(name)] = value
    with np.errstate(invalid="ignore", divide="ignore"):
        on_line = law.coordinates(values, centre_F)
    if not np.isfinite(on_line).all():
        raise ValueError(f"fixed: {fixed} are no possible values of {law.formula}")
    free, held = on_line[:, free_P], on_line[:, ~free_P]
    slope_HQ = np.linalg.solve(free[1 : Q + 1] - free[0], held[1 : Q + 1] - held[0]).T
    level_H = held[0] - slope_HQ @ free[0]
    straight = np.allclose(level_H + slope_HQ @ free[Q + 1], held[Q + 1], rtol=1e-8, atol=1e-8)
    if not straight:
        raise ValueError(
            f"fixed: {law.name} cannot hold {', '.join(fixed)} alone; fix the parameters it multiplies too"
        )
    return Held(free_P, slope_HQ, level_H)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised: sum_i weight_i Huber_delta(residual_i), residual in log or raw loss."""

    law: Law
    u_Fn: np.ndarray
    loss_n: np.ndarray
    weight_n: np.ndarray
    residual: str
    delta: float
    held: Held

    @property
    def floor(self) -> float:
        """Residuals of rounding size, in the units of `objective`: such a fit is exact."""
        return (1e-14 / self.delta) ** 2

    @property
    def _target_n(self):
        return np.log(self.loss_n) if self.residual == "log" else self.loss_n

    def predict(self, theta_KP):
        """The law in the residual's scale [K, n], and its pullback to theta."""
        loss_Kn, pullback = self.law.loss(theta_KP, self.u_Fn)
        if self.residual == "raw":
            return loss_Kn, pullback
        return np.log(loss_Kn), lambda g_Kn: pullback(g_Kn / loss_Kn)

    def residuals(self, theta_P: np.ndarray) -> np.ndarray:
        """Observed minus predicted [n]."""
        return self._target_n - self.predict(theta_P[None])[0][0]

    def total(self, theta_P: np.ndarray) -> float:
        """The sum of Huber that tables print."""
        size_n = np.abs(self.residuals(theta_P))
        huber_n = np.where(size_n <= self.delta, size_n**2 / 2, self.delta * (size_n - self.delta / 2))
        return float(np.sum(self.weight_n * huber_n))

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends [Q] outside which a free coordinate is drawn back."""
        low_P, high_P = self.law.box(float(self.loss_n.min()))
        return low_P[self.held.free_P], high_P[self.held.free_P]

    def objective(self, resampled_Kn: np.ndarray):
        """Mean Huber in units of delta squared (order one) and its gradient, for problems with their own weights.

        Outside the law's box, and only there, a parabola is added: the minimum of a term without data must exist.
        """
        n, delta, target_n = len(self.loss_n), self.delta, self._target_n
        low_Q, high_Q = self.box()
        weight_Kn = resampled_Kn * self.weight_n

        def value_and_gradient(theta_KQ, lanes_K):
            value_K, gradient_KQ = np.empty(len(theta_KQ)), np.empty_like(theta_KQ)
            outside_KQ = theta_KQ - np.clip(theta_KQ, low_Q, high_Q)
            with np.errstate(all="ignore"):  # a wild trial overflows; the optimiser takes it back
                for b in range(0, len(theta_KQ), BLOCK):
                    rows = slice(b, b + BLOCK)
                    predicted, pullback = self.predict(self.held.expand(theta_KQ[rows]))
                    r = (predicted - target_n) / delta
                    force = np.clip(r, -1.0, 1.0)  # derivative of Huber: r inside, its sign outside
                    weight = weight_Kn[lanes_K[rows]]
                    value_K[rows] = np.einsum("kn,kn,kn->k", weight, force, r - 0.5 * force)
                    gradient_KQ[rows] = self.held.pull(pullback(weight * force))
            return value_K / n + (outside_KQ**2).sum(axis=1), gradient_KQ / (n * delta) + 2 * outside_KQ

        return value_and_gradient

    def curvature(self, theta_Q: np.ndarray) -> tuple[np.ndarray, float]:
        """Inverse of the reweighted Gauss-Newton matrix at theta [Q, Q], and the condition number of J'J.

        Beyond delta a residual weighs delta/|r|, Huber's majoriser: so one matrix is a first guess for every resample.
        """
        n, delta = len(self.loss_n), self.delta
        predicted_nn, pullback = self.predict(self.held.expand(np.tile(theta_Q, (n, 1))))
        jacobian_nQ = self.held.pull(pullback(np.eye(n)))
        weight_n = self.weight_n / np.maximum(np.abs(predicted_nn[0] - self._target_n) / delta, 1.0)
        normal_QQ = (jacobian_nQ * weight_n[:, None]).T @ jacobian_nQ / (n * delta**2)
        ridge = 1e-7 * np.trace(normal_QQ)  # a vanished term leaves a zero row
        condition = float(np.linalg.cond(jacobian_nQ) ** 2)
        return np.linalg.inv(normal_QQ + ridge * np.eye(len(theta_Q))), condition


class Estimate(NamedTuple):
    """The distinct minima found, best first [M, Q], a distant start [Q], a first inverse Hessian, and what the starts
    did."""

    minima_MQ: np.ndarray
    far_Q: np.ndarray
    inverse_QQ: np.ndarray
    converged: bool
    starts: dict[str, Any]

    @property
    def theta_Q(self) -> np.ndarray:
        return self.minima_MQ[0]


def starts(problem: Problem) -> np.ndarray:
    """Free coordinates [S, Q] to begin at, best first."""
    free_P, S = problem.held.free_P, NUM_STARTS if problem.held.free_P.all() else 1000
    start_SP = problem.law.starts(problem.u_Fn, problem.loss_n, S)
    if free_P.all():
        return start_SP
    start_SQ = np.unique(start_SP[:, free_P], axis=0)
    value_S, _ = problem.objective(np.ones((len(start_SQ), len(problem.loss_n))))(start_SQ, np.arange(len(start_SQ)))
    return start_SQ[np.argsort(value_S, kind="stable")[:NUM_HELD_STARTS]]


def solve(problem: Problem) -> Estimate:
    """The best minimum from all starts, and how far they agree."""
    start_SQ = starts(problem)
    S, n, names = len(start_SQ), len(problem.loss_n), np.array(problem.law.parameters)[problem.held.free_P]
    objective = problem.objective(np.ones((S, n)))
    found = minimise(objective, start_SQ, problem.curvature(start_SQ[0])[0], floor=problem.floor)
    best = int(np.argmin(found.value_K))
    theta_Q, least = found.theta_KP[best], found.value_K[best]
    inverse_QQ, condition = problem.curvature(theta_Q)
    excess_S = (found.value_K - least) / (least + 1e8 * problem.floor)
    low_Q, high_Q = problem.box()
    facts = {
        "num": S,
        "num_agreeing": int((excess_S <= AGREE).sum()),
        "spread": float(excess_S.max()),
        "num_steps": found.num_steps_K.tolist(),
        "gradient_norm": float(found.gradient_norm_K[best]),
        "condition": condition,
        "active_bounds": names[(theta_Q <= low_Q + 1e-9) | (theta_Q >= high_Q - 1e-9)].tolist(),
    }
    lowest_first = np.argsort(found.value_K, kind="stable")
    apart = np.diff(excess_S[lowest_first], prepend=-np.inf) > AGREE
    minima_MQ = found.theta_KP[lowest_first[apart][:MAX_MINIMA]]
    return Estimate(minima_MQ, start_SQ[-1], inverse_QQ, bool(found.converged_K[best]), facts)


def refit(problem: Problem, estimate: Estimate, resampled_Kn: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Minima [K, Q] of the resampled objectives. Each is sought from every minimum of the points themselves and from
    their worst start: agreement shows that no refit stopped early, and that none has two minima."""
    objective, K = problem.objective(resampled_Kn), len(resampled_Kn)
    found = [
        minimise(objective, np.tile(start_Q, (K, 1)), estimate.inverse_QQ, floor=problem.floor)
        for start_Q in (*estimate.minima_MQ, estimate.far_Q)
    ]
    value_AK = np.stack([minimum.value_K for minimum in found])
    lowest_K, best_K = value_AK.min(axis=0), value_AK.argmin(axis=0)
    draws_KQ = np.stack([minimum.theta_KP for minimum in found])[best_K, np.arange(K)]
    agree_K = value_AK.max(axis=0) - lowest_K <= 1e-6 * lowest_K + 1e-14
    num_converged = int(np.any([minimum.converged_K for minimum in found], axis=0).sum())
    return draws_KQ, {"num": K, "num_agreeing": int(agree_K.sum()), "num_converged": num_converged}
