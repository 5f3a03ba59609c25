"""Loss curves under learning-rate schedules: reading them, fitting the Multi-Power Law, and what it says of a schedule.

A fit is scored on schedules it has not seen: a full minimum of the training objective, which a flexible law reaches,
is not the best predictor. The law itself is `multi_power.py`.

Letters: K resamples, T steps of a run, n logged steps, P parameters.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.curves import multi_power
from slmjax.scaling.curves.curve_objective import HIGH_P, LOW_P, MAX_STEPS, POSITIVE, make_problem
from slmjax.scaling.curves.curve_tables import Curve

FORMAT = "slmjax-schedule-fit-2"
BLOCKS_PER_CURVE = 10
DRAW_TOLERANCE = 1e-7  # of refits that stand for an uncertainty
RESPONSES = ("fitted", "published", "shrunk")
PULLS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4)  # of a shrunk response; the last all but holds it


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
      without: the values of the fit without each curve [P] by its name; None where the others determine no law.
      stop: "minimum", or "early" for an optimisation ended after `num_steps` steps, which is no minimum of anything.
      resample: what the bootstrap draws: "blocks" of consecutive points of each curve, or whole "curves".
      response: whether C, beta and gamma were "fitted", held at the "published" ones of the source's largest model, or
        "shrunk" towards those; pull: how strongly, see `curve_objective`.
    """

    values: np.ndarray
    draws: np.ndarray
    without: dict[str, list[float] | None]
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
    pull: float | None = None

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(multi_power.PARAMETERS, self.values.tolist(), strict=True))

    def predict(self, lr_T: np.ndarray, steps_n: np.ndarray | None = None) -> np.ndarray:
        """Loss after each of the steps [n] of a run with rate lr_T[s] at step s; every step [T] unless told.

        The cost is steps times changes of the rate: a few seconds for every step of a cosine over 24,000.
        """
        return _loss(self.values, lr_T, steps_n)

    def predict_draws(self, lr_T: np.ndarray, steps_n: np.ndarray | None = None) -> np.ndarray:
        """The same under each bootstrap draw [K, n]."""
        return np.stack([_loss(values_P, lr_T, steps_n) for values_P in self.draws])

    def predict_without(self, lr_T: np.ndarray, steps_n: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The same [n] by the fit without each curve, by its name, where the others determine one."""
        return {
            name: _loss(np.array(values_P), lr_T, steps_n)
            for name, values_P in self.without.items()
            if values_P is not None
        }

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
        if self.response == "shrunk":
            lines.append(
                "C, beta and gamma are shrunk towards the published ones of 400M parameters, with the pull that "
                f"predicts best a curve left out, {self.pull:g}"
            )
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
      response: few curves determine weakly how a change of the rate sets in (C, beta, gamma). "published" takes it from
        the source; "shrunk" fits it with a pull towards that, of the strength in PULLS that predicts best the curves
        left out, one at a time.
    Raises:
      ValueError: too few points, rates or losses that are not positive numbers, no schedule that tells the parameters.
    """
    _validate(curves, delta, num_bootstrap, resample, response)
    max_steps = MAX_STEPS if early_steps is None else early_steps
    pulls = {"fitted": (0.0,), "published": (math.inf,), "shrunk": PULLS}[response]
    pull, without = _best_pull(curves, delta, num_starts, max_steps, pulls)
    problem = make_problem(curves, delta, pull)
    found = problem.minimum(problem.starts(num_starts), max_steps=max_steps)
    best = int(np.argmin(found.value_K))
    theta_P = found.theta_KP[best]
    excess_S = found.value_K / (found.value_K[best] + 1e8 * problem.floor) - 1
    weight_Kn = _resample([len(curve.loss_n) for curve in curves], num_bootstrap, seed, resample)
    again = problem.minimum(np.tile(theta_P, (num_bootstrap, 1)), weight_Kn, DRAW_TOLERANCE, max_steps)
    return ScheduleFit(
        values=problem.natural(theta_P),
        draws=np.stack([problem.natural(one_P) for one_P in again.theta_KP]),
        without={name: None if values_P is None else values_P.tolist() for name, values_P in without.items()},
        curves=[curve.name for curve in curves],
        num_points=len(problem.loss_n),
        objective=problem.misfit(theta_P),
        delta=delta,
        seed=seed,
        stop="minimum" if early_steps is None else "early",
        num_steps=int(found.num_steps_K[best]),
        num_starts=num_starts,
        num_agreeing=int((excess_S <= 1e-6).sum()),
        resample=resample,
        response=response,
        pull=pull if response == "shrunk" else None,
    )


def leave_one_out(curves: Sequence[Curve], fit: ScheduleFit) -> dict[str, Score]:
    """Each of the fitted curves predicted by the fit to the others, where those determine one: what in-sample error
    cannot tell."""
    return {
        curve.name: score(fit.predict_without(curve.lr_T, curve.steps_n)[curve.name], curve.loss_n)
        for curve in curves
        if fit.without.get(curve.name) is not None
    }


# --- the fit ---------------------------------------------------------------------------------------------------------


def _without_each(curves, delta, num_starts, max_steps, pull):
    """Values [P] of the fit without each curve, by name; None where the others determine no law."""
    without = {}
    for left_out in curves:
        others = [curve for curve in curves if curve is not left_out]
        try:
            _require_design(others)
        except ValueError:
            without[left_out.name] = None
            continue
        problem = make_problem(others, delta, pull)
        found = problem.minimum(problem.starts(num_starts), tolerance=DRAW_TOLERANCE, max_steps=max_steps)
        without[left_out.name] = problem.natural(found.theta_KP[int(np.argmin(found.value_K))])
    return without


def _best_pull(curves, delta, num_starts, max_steps, pulls):
    """The pull whose fits predict the curves left out with the least mean relative error, of equals the stronger; and
    these fits."""
    tried = []
    for pull in sorted(pulls, reverse=True):
        without = _without_each(curves, delta, num_starts, max_steps, pull)
        errors = [
            float(np.abs(_loss(without[curve.name], curve.lr_T, curve.steps_n) / curve.loss_n - 1).mean())
            for curve in curves
            if without[curve.name] is not None
        ]
        tried.append((np.mean(errors) if errors else math.inf, pull, without))
    error, pull, without = min(tried, key=lambda each: each[0])
    if len(pulls) > 1 and math.isinf(error):
        raise ValueError(
            f"response='shrunk' leaves each of the {len(curves)} curves out in turn, and never do the others determine "
            "the law; add a curve with a decay, or use response='published'"
        )
    return pull, without


def _loss(values_P, lr_T, steps_n):
    lr_T = valid_rates(lr_T)
    steps_n = np.arange(len(lr_T)) if steps_n is None else np.asarray(steps_n)
    if len(steps_n) == 0 or steps_n.min() < 0 or steps_n.max() >= len(lr_T):
        raise ValueError(f"steps must lie within 0 to {len(lr_T) - 1}, the steps of the schedule given")
    return multi_power.loss(values_P, multi_power.knots(lr_T, steps_n))


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
    if response not in RESPONSES:
        raise ValueError(f"response={response!r} is not one of {', '.join(RESPONSES)}")
    if resample not in ("blocks", "curves"):
        raise ValueError(f"resample={resample!r} is neither blocks nor curves")
    if resample == "curves" and len(curves) < 6:
        raise ValueError(f"{len(curves)} curves are too few to resample curves; use resample='blocks'")
    _require_design(curves)


def _require_design(curves):
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
