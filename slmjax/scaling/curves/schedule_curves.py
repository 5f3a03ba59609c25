"""Loss curves under learning-rate schedules: reading them, fitting the Multi-Power Law, and what it says of a schedule.

A fit is scored on schedules it has not seen: a full minimum of the training objective, which a flexible law reaches,
is not the best predictor. The law itself is `multi_power.py`.

Letters: K resamples, T steps of a run, n logged steps, P parameters.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.curves import multi_power
from slmjax.scaling.curves.curve_tables import Curve
from slmjax.scaling.laws._projection import best_cells
from slmjax.scaling.minimise import minimise

FORMAT = "slmjax-schedule-fit-1"
GROUP_WIDTH = 16
BLOCKS_PER_CURVE = 10
POSITIVE = np.array([name not in ("alpha", "gamma") for name in multi_power.PARAMETERS])
# Exponents past these ends are terms the curves do not show; the others are bounded by the data or by nothing.
LOW_P = np.array([-np.inf, -np.inf, 0.01, np.log(1e-6), np.log(1e-6), np.log(0.01), -1.0])
HIGH_P = np.array([np.inf, np.inf, 3.0, np.log(1e3), np.log(1e9), np.log(10.0), 3.0])
# beta, C and gamma of the starts, in units of the peak rate and of the typical sum of rates
SHAPES = tuple(itertools.product((0.3, 0.6, 1.2), (1.0, 10.0, 100.0, 1000.0), (0.3, 0.7)))


class Score(NamedTuple):
    """How well losses are predicted: R2, mean absolute and root mean square error (nats), mean and worst relative."""

    r2: float
    mae: float
    rmse: float
    mean_relative: float
    worst_relative: float


def score(predicted_n: np.ndarray, loss_n: np.ndarray) -> Score:
    error_n = predicted_n - loss_n
    return Score(
        r2=float(1 - (error_n**2).sum() / ((loss_n - loss_n.mean()) ** 2).sum()),
        mae=float(np.abs(error_n).mean()),
        rmse=float(np.sqrt((error_n**2).mean())),
        mean_relative=float(np.abs(error_n / loss_n).mean()),
        worst_relative=float(np.abs(error_n / loss_n).max()),
    )


@dataclasses.dataclass(frozen=True)
class ScheduleFit:
    """The Multi-Power Law estimated from loss curves.

    Attributes:
      values: L0, A, alpha, B, C, beta, gamma in natural units (rates as given, steps as steps) [P]; `draws` [K, P].
      curves: the names of the fitted curves; objective: sum over their points of Huber_delta of log-loss residuals.
      stop: "minimum", or "early" for an optimisation ended after `num_steps` steps, which is no minimum of anything.
      resample: what the bootstrap draws: "blocks" of consecutive points of each curve, or whole "curves".
      response: whether C, beta and gamma were "fitted", or held at the "published" ones of the source's largest model.
    """

    values: np.ndarray
    draws: np.ndarray
    curves: list[str]
    num_points: int
    objective: float
    delta: float
    seed: int
    stop: str
    num_steps: int
    num_starts: int
    num_agreeing: int
    resample: str
    response: str

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(multi_power.PARAMETERS, self.values.tolist(), strict=True))

    def predict(self, lr_T: np.ndarray, steps_n: np.ndarray | None = None) -> np.ndarray:
        """Loss after each of the steps [n] of a run with rate lr_T[s] at step s; every step [T] unless told.

        The cost is steps times changes of the rate: a few seconds for every step of a cosine over 24,000.
        """
        return self._loss(self.values, lr_T, steps_n)

    def predict_draws(self, lr_T: np.ndarray, steps_n: np.ndarray | None = None) -> np.ndarray:
        """The same under each bootstrap draw [K, n]."""
        return np.stack([self._loss(values_P, lr_T, steps_n) for values_P in self.draws])

    def _loss(self, values_P, lr_T, steps_n):
        lr_T = valid_rates(lr_T)
        steps_n = np.arange(len(lr_T)) if steps_n is None else np.asarray(steps_n)
        if len(steps_n) == 0 or steps_n.min() < 0 or steps_n.max() >= len(lr_T):
            raise ValueError(f"steps must lie within 0 to {len(lr_T) - 1}, the steps of the schedule given")
        return multi_power.loss(values_P, multi_power.knots(lr_T, steps_n))

    def scores(self, curves: Sequence[Curve]) -> dict[str, Score]:
        """The five metrics of each curve, by name."""
        return {curve.name: score(self.predict(curve.lr_T, curve.steps_n), curve.loss_n) for curve in curves}

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Percentile intervals; an end is -inf or inf where draws rest on the bounds of the fit."""
        low_P, high_P = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
        ends = dict(zip(multi_power.PARAMETERS, zip(low_P.tolist(), high_P.tolist(), strict=True), strict=True))
        for name, i in (("alpha", 2), ("beta", 5), ("gamma", 6)):
            low, high = (math.exp(x) if POSITIVE[i] else x for x in (LOW_P[i], HIGH_P[i]))
            ends[name] = (
                -math.inf if ends[name][0] <= low else ends[name][0],
                math.inf if ends[name][1] >= high else ends[name][1],
            )
        return ends

    def weakly_identified(self) -> dict[str, str]:
        """Parameters the curves hardly constrain, each with the reason."""
        weak = {}
        for name, (low, high) in self.intervals(0.95).items():
            if math.isinf(low) or math.isinf(high):
                weak[name] = "its 95% interval is unbounded"
            elif low <= 0:
                weak[name] = "its 95% interval holds zero"
            elif high / low > 4:
                weak[name] = f"its 95% interval spans a factor {high / low:.3g}"
        return weak

    def table(self) -> str:
        i80, i95 = self.intervals(0.80), self.intervals(0.95)
        rows = [("parameter", "estimate", "80% interval", "95% interval")]
        rows += [(k, f"{v:.6g}", show.interval(i80[k]), show.interval(i95[k])) for k, v in self.parameters.items()]
        if self.stop == "minimum":
            end = f"minimum: {self.num_agreeing} of {self.num_starts} starts agree to 1e-6"
        else:
            end = f"stopped early, after {self.num_steps} steps: not a minimum"
        drawn = (
            f"{BLOCKS_PER_CURVE} blocks of consecutive points of each curve" if self.resample == "blocks" else "curves"
        )
        lines = [
            f"multi_power: {multi_power.FORMULA}",
            f"{self.num_points} points of {len(self.curves)} curves: {', '.join(self.curves)}",
            "",
            *show.columns(rows),
            "",
            f"objective: sum of Huber({self.delta:g}) of log-loss residuals = {self.objective:.10g}; {end}",
            f"intervals: bootstrap of {drawn}, {len(self.draws)} draws (seed {self.seed}); they say nothing of a "
            "schedule unlike the fitted ones: score those",
        ]
        if self.response == "published":
            lines.append("C, beta and gamma are not fitted but the published ones of 400M parameters")
        lines += [f"weakly identified: {name}: {why}" for name, why in self.weakly_identified().items()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body |= {"format": FORMAT, "values": self.values.tolist(), "draws": self.draws.tolist()}
        body |= {"formula": multi_power.FORMULA, "source": multi_power.SOURCE, "parameters": self.parameters}
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ScheduleFit":
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"not a fit of loss curves of this version (expected format {FORMAT!r}); fit them again")
        body |= {"values": np.array(body["values"]), "draws": np.array(body["draws"])}
        return cls(**{field.name: body[field.name] for field in dataclasses.fields(cls)})


def fit_curves(
    curves: Sequence[Curve],
    delta: float = 1e-3,
    num_starts: int = 4,
    num_bootstrap: int = 100,
    seed: int = 0,
    early_steps: int | None = None,
    resample: str = "blocks",
    response: str = "fitted",
) -> ScheduleFit:
    """Fit the Multi-Power Law by the minimum of sum Huber_delta(log predicted - log observed) over all logged points.

    Args:
      curves: one model's; at least one must change its rate after the warm-up.
      early_steps: end every optimisation after so many steps. The fit then says that it is no minimum.
      resample: what a bootstrap draw is made of, see `ScheduleFit`. Neighbouring points of a curve err alike, so single
        points are never drawn.
      response: "published" takes C, beta and gamma, which tell how a change of rate sets in, from the source: few
        curves determine them weakly.
    Raises:
      ValueError: too few points, rates or losses that are not positive numbers, no schedule that tells the parameters.
    """
    _validate(curves, delta, num_bootstrap, resample, response)
    rate = max(float(curve.lr_T.max()) for curve in curves)
    spent = [np.cumsum(curve.lr_T)[curve.steps_n] for curve in curves]
    total = float(np.exp(np.mean(np.log(np.concatenate(spent)))))
    knots = [multi_power.knots(curve.lr_T, curve.steps_n, GROUP_WIDTH, rate, total) for curve in curves]
    loss_n = np.concatenate([curve.loss_n for curve in curves])
    n, floor = len(loss_n), (1e-14 / delta) ** 2

    start_SP = _starts(knots, loss_n, num_starts)
    max_steps = 600 if early_steps is None else early_steps
    free_P = np.ones(len(multi_power.PARAMETERS), bool)
    if response == "published":
        free_P[4:] = False
        start_SP[:, 4:] = _coordinates(multi_power.PUBLISHED["400M"], rate, total)[4:]
    curvature_PP = _curvature(knots, loss_n, delta, start_SP[0], free_P)
    objective = _objective(knots, loss_n, delta, np.ones((num_starts, n)), free_P)
    found = minimise(objective, start_SP, curvature_PP, max_steps, 1e-12, floor)
    best = int(np.argmin(found.value_K))
    excess_S = found.value_K / (found.value_K[best] + 1e8 * floor) - 1
    weight_Kn = _resample([len(curve.loss_n) for curve in curves], num_bootstrap, seed, resample)
    theta_P = found.theta_KP[best]
    again = minimise(
        _objective(knots, loss_n, delta, weight_Kn, free_P),
        np.tile(theta_P, (num_bootstrap, 1)),
        _curvature(knots, loss_n, delta, theta_P, free_P),
        max_steps,
        1e-7,
        floor,
    )
    values = [multi_power.natural(_values(theta_P), rate, total) for theta_P in (theta_P, *again.theta_KP)]
    return ScheduleFit(
        values=values[0],
        draws=np.stack(values[1:]),
        curves=[curve.name for curve in curves],
        num_points=n,
        objective=float(found.value_K[best] * n * delta**2),
        delta=delta,
        seed=seed,
        stop="minimum" if early_steps is None else "early",
        num_steps=int(found.num_steps_K[best]),
        num_starts=num_starts,
        num_agreeing=int((excess_S <= 1e-6).sum()),
        resample=resample,
        response=response,
    )


def leave_one_out(curves: Sequence[Curve], **options) -> dict[str, Score]:
    """Each curve predicted by a fit of the others: what tells a full minimum from an early stop, which in-sample error
    cannot. `options` as for `fit_curves`."""
    return {
        left_out.name: fit_curves([c for c in curves if c is not left_out], **options).scores([left_out])[left_out.name]
        for left_out in curves
    }


# --- the fit ---------------------------------------------------------------------------------------------------------


def valid_rates(lr_T):
    lr_T = np.asarray(lr_T, float)
    if lr_T.ndim != 1 or not np.isfinite(lr_T).all() or (lr_T < 0).any() or not lr_T.any():
        raise ValueError("a schedule is a list of learning rates, finite and not negative, one per step")
    return lr_T


def _validate(curves, delta, num_bootstrap, resample, response):
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta={delta} must be a positive number")
    if num_bootstrap < 40:
        raise ValueError(f"num_bootstrap={num_bootstrap} is too few for a 95% interval; use at least 40")
    if response not in ("fitted", "published"):
        raise ValueError(f"response={response!r} is neither fitted nor published")
    if resample not in ("blocks", "curves"):
        raise ValueError(f"resample={resample!r} is neither blocks nor curves")
    if resample == "curves" and len(curves) < 6:
        raise ValueError(f"{len(curves)} curves are too few to resample curves; use resample='blocks'")
    num_points = sum(len(curve.loss_n) for curve in curves)
    if num_points < 10 * len(multi_power.PARAMETERS):
        raise ValueError(
            f"{num_points} logged losses are too few for {len(multi_power.PARAMETERS)} parameters; "
            f"give at least {10 * len(multi_power.PARAMETERS)}, of two schedules or more"
        )
    for curve in curves:
        valid_rates(curve.lr_T)
        if len(curve.loss_n) < BLOCKS_PER_CURVE:
            raise ValueError(f"curve {curve.name}: {len(curve.loss_n)} points; give at least {BLOCKS_PER_CURVE}")
    if all(curve.lr_T[curve.steps_n].min() >= 0.99 * curve.lr_T.max() for curve in curves):
        raise ValueError(
            "degenerate design: no curve lowers its learning rate where its loss is logged, so nothing tells what a "
            "decay does; add a curve with a decay"
        )


def _values(theta_P):
    return np.where(POSITIVE, np.exp(np.where(POSITIVE, theta_P, 0.0)), theta_P)


def _coordinates(values_P, rate, total):
    scaled_P = multi_power.natural(np.asarray(values_P), 1 / rate, 1 / total)
    return np.where(POSITIVE, np.log(np.where(POSITIVE, scaled_P, 1.0)), scaled_P)


def _starts(knots, loss_n, num):
    """Coordinates [S, P], best first: with the four shape parameters on a grid the law is linear in L0, A and B."""
    spent_n = np.concatenate([curve.spent_n for curve in knots])
    response = {cell: np.concatenate([multi_power.response(*cell, curve) for curve in knots]) for cell in SHAPES}
    cells = [(alpha, *shape) for alpha in (0.3, 0.5, 0.8) for shape in SHAPES]
    features = [np.stack([np.ones(len(loss_n)), spent_n ** -cell[0], response[cell[1:]]], axis=1) for cell in cells]
    best_S, log_S3 = best_cells(np.stack(features), loss_n, num)
    alpha, beta, C, gamma = np.array(cells)[best_S].T
    return np.stack([log_S3[:, 0], log_S3[:, 1], alpha, log_S3[:, 2], np.log(C), np.log(beta), gamma], axis=1)


def _objective(knots, loss_n, delta, weight_Kn, free_P):
    """Mean Huber in units of delta squared and its gradient by the free coordinates, with a parabola outside LOW_P to
    HIGH_P."""
    n, log_n = len(loss_n), np.log(loss_n)

    def value_and_gradient(theta_KP, lanes_K):
        value_K, gradient_KP = np.empty(len(theta_KP)), np.empty_like(theta_KP)
        outside_KP = theta_KP - np.clip(theta_KP, LOW_P, HIGH_P)
        with np.errstate(all="ignore"):  # a wild trial overflows; the optimiser takes it back
            for k, theta_P in enumerate(theta_KP):
                predicted_n, jacobian_nP = _predict(theta_P, knots)
                r_n = (np.log(predicted_n) - log_n) / delta
                force_n = np.clip(r_n, -1.0, 1.0)
                weight_n = weight_Kn[lanes_K[k]]
                value_K[k] = weight_n @ (force_n * (r_n - 0.5 * force_n))
                gradient_KP[k] = (weight_n * force_n / predicted_n) @ jacobian_nP
        return value_K / n + (outside_KP**2).sum(axis=1), (gradient_KP / (n * delta) + 2 * outside_KP) * free_P

    return value_and_gradient


def _predict(theta_P, knots):
    parts = [multi_power.loss_and_jacobian(_values(theta_P), curve) for curve in knots]
    return np.concatenate([loss_n for loss_n, _ in parts]), np.concatenate([jacobian_nP for _, jacobian_nP in parts])


def _curvature(knots, loss_n, delta, theta_P, free_P):
    """Inverse of the reweighted Gauss-Newton matrix of the free coordinates [P, P]: Huber's majoriser, as in `fit`."""
    predicted_n, jacobian_nP = _predict(theta_P, knots)
    jacobian_nQ = (jacobian_nP / predicted_n[:, None])[:, free_P]
    weight_n = 1 / np.maximum(np.abs(np.log(predicted_n / loss_n)) / delta, 1.0)
    normal_QQ = (jacobian_nQ * weight_n[:, None]).T @ jacobian_nQ / (len(loss_n) * delta**2)
    inverse_PP = np.zeros((len(theta_P), len(theta_P)))
    inverse_PP[np.ix_(free_P, free_P)] = np.linalg.inv(
        normal_QQ + 1e-9 * np.trace(normal_QQ) * np.eye(int(free_P.sum()))
    )
    return inverse_PP


def _resample(lengths, num, seed, what):
    """Point weights [K, n]: blocks of consecutive points within each curve, or whole curves, drawn with replacement."""
    rng = np.random.default_rng(seed)
    if what == "curves":
        count_KC = rng.multinomial(len(lengths), np.full(len(lengths), 1 / len(lengths)), size=num)
        return np.repeat(count_KC, lengths, axis=1).astype(float)
    parts = []
    for length in lengths:
        count_KB = rng.multinomial(BLOCKS_PER_CURVE, np.full(BLOCKS_PER_CURVE, 1 / BLOCKS_PER_CURVE), size=num)
        parts.append(count_KB[:, np.arange(length) * BLOCKS_PER_CURVE // length])
    return np.concatenate(parts, axis=1).astype(float)
