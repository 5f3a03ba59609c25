"""Profile likelihood: one parameter is held at each of many values, all others are fitted again, and the interval is
where the objective has not yet risen by what chance explains. A second opinion on the bootstrap, and the clearest view
of a parameter that the data do not bound.

Letters: K values of one parameter, n points, Q free coordinates.
"""

import dataclasses
import math
import statistics

import numpy as np

from slmjax.scaling import design, estimate, show
from slmjax.scaling.fitted import Fit
from slmjax.scaling.minimise import minimise
from slmjax.scaling.points import Point

LEVELS = (0.8, 0.95)
# Distances from the estimate, in standard deviations of the bootstrap, at which a parameter is held
STEPS = (0.3, 0.7, 1.0, 1.3, 1.7, 2.0, 2.4, 3.0, 4.0)
FAR_STEPS = (6.0, 10.0, 20.0, 40.0)  # on a side where those do not reach the end of the interval
STIFFNESS = 10.0  # of the spring that holds a parameter, in units of the objective's own curvature along it
TOLERANCE = 1e-10  # of the objective: 1e-8 of a statistic of order one
LEAST_INSIDE = 0.2  # share of residuals whose density near zero says how sharply the objective bends


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values of one parameter [K] ascending and the statistic there [K]: chi-square with one degree of freedom where
    that value is true."""

    value: np.ndarray
    statistic: np.ndarray


@dataclasses.dataclass(frozen=True)
class Profile:
    """Profiles of every free parameter of a fit.

    Attributes:
      estimate: the fit's parameters; bootstrap: its percentile intervals by level.
      limits: per parameter the values outside which it counts as unbounded (`Law.identified`).
    """

    law: str
    estimate: dict[str, float]
    curves: dict[str, Curve]
    limits: dict[str, tuple[float, float]]
    bootstrap: dict[float, dict[str, tuple[float, float]]]
    notes: tuple[str, ...]

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Ends at e.g. level=.95; an end is -inf or inf where no value is refused before the limit."""
        root = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        out = {}
        for name, curve in self.curves.items():
            low, high = self.limits[name]
            ends = (_crossing(curve, self.estimate[name], root, side) for side in (-1, 1))
            out[name] = tuple(
                end if low < end < high else side * math.inf for end, side in zip(ends, (-1, 1), strict=True)
            )
        return out

    def table(self) -> str:
        i80, i95 = self.intervals(0.8), self.intervals(0.95)
        rows = [("parameter", "estimate", "profile 80%", "profile 95%", "bootstrap 95%")]
        rows += [
            (
                name,
                f"{self.estimate[name]:.5g}",
                show.interval(i80[name]),
                show.interval(i95[name]),
                show.interval(self.bootstrap[0.95][name]),
            )
            for name in self.curves
        ]
        lines = [f"profile likelihood of {self.law}", "", *show.columns(rows)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def profile(fit: Fit) -> Profile:
    """Profile intervals of every free parameter.

    The statistic is 2 (objective - least objective) E[psi'] / E[psi^2], psi the derivative of Huber: for least squares
    the likelihood ratio with unknown variance, for Huber its robust form (Ronchetti 1982), asymptotically chi-square.
    """
    problem = problem_of(fit)
    limits = {name: ends[:2] for name, ends in fit.form.identified(float(problem.loss_n.min())).items()}
    curves, lowest = {}, 0.0
    for name in fit.parameters:
        if name not in fit.fixed:
            curves[name] = _profile(fit, problem, name, limits[name])
            lowest = min(lowest, float(curves[name].statistic.min()))
    notes = []
    if lowest < -1e-3:
        notes.append(
            f"a value was found where the objective is lower than at the estimate (statistic {lowest:.2g}): "
            "the fit had not converged"
        )
    if len({p["run_id"] for p in fit.points}) < len(fit.points):
        notes.append(
            "some runs have several points, which a profile takes for independent: trust the bootstrap over runs"
        )
    bootstrap = {level: fit.intervals(level) for level in LEVELS}
    return Profile(fit.law, fit.parameters, curves, limits, bootstrap, tuple(notes))


def problem_of(fit: Fit) -> estimate.Problem:
    """What a fit minimised, rebuilt from its own points."""
    points = [Point(p["run_id"], p["N"], p["D"], p["C"], p["loss"], p["se"]) for p in fit.points]
    log_x_Fn = np.log([[p[name] for p in fit.points] for name in fit.form.inputs])
    return estimate.Problem(
        law=fit.form,
        u_Fn=log_x_Fn - fit.centre[:, None],
        loss_n=np.array([p.loss for p in points]),
        weight_n=design.point_weights(points, fit.weights, fit.residual),
        residual=fit.residual,
        delta=fit.delta,
        held=estimate.hold(fit.form, fit.fixed, fit.theta, fit.centre),
    )


def chi_square_scale(problem: estimate.Problem, theta_P: np.ndarray) -> float:
    """Statistic per unit of `Problem.objective`: 2 n E[psi'] / E[psi^2], corrected for the parameters fitted."""
    n, num_free = len(problem.loss_n), int(problem.held.free_P.sum())
    r_n = np.abs(problem.residuals(theta_P)) / problem.delta
    # E[psi'] is the share of residuals inside delta. Where few are, their density is read from a wider middle.
    width = max(1.0, float(np.quantile(r_n, LEAST_INSIDE)))
    slope = float(problem.weight_n @ (r_n <= width)) / n / width
    square = float(problem.weight_n @ np.minimum(r_n, 1.0) ** 2) / (n - num_free)
    return 2 * n * slope / max(square, 1e-300)


def _profile(fit, problem, name, limits) -> Curve:
    spring = _Spring(fit, problem, name, positive=limits[0] >= 0)
    low, high = (_on_scale(end, spring.positive) for end in limits)
    here, spread = spring.here, _spread(fit, name, spring.positive) or spring.spread
    reached, statistic = np.array([here]), np.array([0.0])

    def extend(held_K):
        nonlocal reached, statistic
        again_K, more_K = spring.trace(np.clip(held_K, low, high))
        reached, statistic = np.append(reached, again_K), np.append(statistic, more_K)
        order = np.argsort(reached, kind="stable")
        reached, statistic = reached[order], statistic[order]

    def ends(level):
        root = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        return [_crossing(Curve(reached, statistic), here, root, side) for side in (-1, 1)]

    extend(here + spread * np.array([*(-s for s in STEPS[::-1]), *STEPS]))
    far = [side * s for side, end in zip((-1, 1), ends(LEVELS[-1]), strict=True) if math.isinf(end) for s in FAR_STEPS]
    if far:
        extend(here + spread * np.array(far))
    # Once more near every end: between two steps the root of the statistic is not quite a line.
    near = np.array([end for level in LEVELS for end in ends(level) if math.isfinite(end)])
    if len(near):
        extend(near + (near - here) / STIFFNESS)
    with np.errstate(over="ignore"):
        return Curve(np.exp(reached) if spring.positive else reached, statistic)


class _Spring:
    """Holds one parameter near a value: the objective plus half a stiffness times the squared distance.

    Where it comes to rest, all others are at their best for the value reached, so that point lies on the profile,
    whatever the law's coordinates are. A positive parameter is held on its logarithm.
    """

    def __init__(self, fit, problem, name, positive):
        self.fit, self.problem, self.positive = fit, problem, positive
        self.index, self.start_Q = fit.form.parameters.index(name), fit.theta[problem.held.free_P]
        self.base = problem.objective(np.ones((1, len(problem.loss_n))))
        self.scale = chi_square_scale(problem, fit.theta)
        self.least = float(self.base(self.start_Q[None], np.zeros(1, int))[0][0])
        inverse_QQ, _ = problem.curvature(self.start_Q)
        self.here, slope_Q = float(self.read(self.start_Q[None])[0]), self.slope(self.start_Q[None])[0]
        bent_Q = inverse_QQ @ slope_Q
        pliancy = float(slope_Q @ bent_Q)
        self.spread, self.stiffness = math.sqrt(pliancy / self.scale), STIFFNESS / pliancy
        # Sherman-Morrison: the spring's own curvature belongs in the first guess.
        self.inverse_QQ = inverse_QQ - np.outer(bent_Q, bent_Q) * self.stiffness / (1 + STIFFNESS)

    def read(self, theta_KQ):
        """The parameter [K], on the scale it is held on."""
        value_K = self.fit.form.values(self.problem.held.expand(theta_KQ), self.fit.centre)[:, self.index]
        with np.errstate(all="ignore"):
            return np.log(value_K) if self.positive else value_K

    def slope(self, theta_KQ, step=1e-5):
        """Its derivative by the free coordinates [K, Q]."""
        moves = step * np.eye(theta_KQ.shape[1])
        return np.stack([(self.read(theta_KQ + m) - self.read(theta_KQ - m)) / (2 * step) for m in moves], axis=1)

    def trace(self, held_K):
        """Values reached [K] and the statistic there [K]."""

        def objective(theta_KQ, lanes_K):
            value_K, gradient_KQ = self.base(theta_KQ, np.zeros(len(theta_KQ), int))
            pull_K = self.stiffness * (self.read(theta_KQ) - held_K[lanes_K])
            return (
                value_K + 0.5 * pull_K**2 / self.stiffness,
                gradient_KQ + pull_K[:, None] * self.slope(theta_KQ),
            )

        start_KQ = np.tile(self.start_Q, (len(held_K), 1))
        found = minimise(objective, start_KQ, self.inverse_QQ, tolerance=TOLERANCE, floor=self.problem.floor)
        reached_K = self.read(found.theta_KP)
        rise_K = found.value_K - 0.5 * self.stiffness * (reached_K - held_K) ** 2 - self.least
        return reached_K, self.scale * rise_K


def _on_scale(end, positive):
    return (math.log(end) if end > 0 else -math.inf) if positive else end


def _spread(fit, name, positive):
    """Half the central 68% of the bootstrap draws, on the scale the parameter is held on; 0 where it is infinite."""
    with np.errstate(all="ignore"):
        draw_K = np.log(fit.parameter_draws[name]) if positive else fit.parameter_draws[name]
        low, high = np.quantile(draw_K, [0.16, 0.84], method="nearest")
    return 0.5 * float(high - low) if math.isfinite(high - low) else 0.0


def _crossing(curve, here, root, side):
    """Where on one side of the estimate the root of the statistic first passes `root`; infinite if nowhere."""
    outward = curve.value[:: -1 if side < 0 else 1]
    beyond = side * (outward - here) > 0
    value = np.concatenate([[here], outward[beyond]])
    z = np.concatenate([[0.0], np.sqrt(np.maximum(curve.statistic[:: -1 if side < 0 else 1][beyond], 0.0))])
    past = np.flatnonzero(z >= root)
    if not len(past):
        return side * math.inf
    i = past[0]
    share = (root - z[i - 1]) / (z[i] - z[i - 1])
    return float(value[i - 1] + share * (value[i] - value[i - 1]))
