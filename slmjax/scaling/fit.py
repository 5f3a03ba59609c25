"""Fitting a law to Points: sum of Huber on log loss, projected starts, bootstrap over runs, and what is identified.

The result, `Fit`, is self-contained: its JSON holds the points, the estimate and every bootstrap draw, so a forecast
needs nothing else. Equal points and seed give equal bytes. Forecasts live in `forecast.py`; forms in `laws.py`.

Letters: K resamples, n points, P parameters, F inputs.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmjax.scaling import laws, show
from slmjax.scaling.minimise import minimise
from slmjax.scaling.points import Point, PointSet

FORMAT = "slmjax-fit-1"
NUM_STARTS = 8
MIN_LEVELS = 3  # distinct values an input must take: E, A and alpha along one input are three unknowns
SAME_VALUE = 0.01  # values of an input closer than 1% are one level of the design
MIN_SPREAD = 0.02  # least ratio of singular values of the centred log inputs: below it the design is a line
POINT_FIELDS = ("run_id", "N", "D", "C", "loss", "se", "epochs")
BLOCK = 64  # problems evaluated together: their arrays stay in the level-2 cache


@dataclasses.dataclass(frozen=True)
class Fit:
    """An estimated law.

    Attributes:
      theta: best coordinates [P]; `centre`: mean log inputs [F] they refer to; `draws`: bootstrap coordinates [K, P].
      points: the fitted points, one dict each with run_id, N, D, C, loss, se, epochs.
      objective: sum over points of Huber_delta(log predicted - log observed loss).
      starts, bootstrap: what the optimiser did, as shown by `table`.
    """

    law: str
    theta: np.ndarray
    centre: np.ndarray
    draws: np.ndarray
    points: list[dict]
    conventions: dict[str, str | None]
    objective: float
    delta: float
    seed: int
    starts: dict[str, Any]
    bootstrap: dict[str, Any]
    notes: list[str]

    @property
    def form(self):
        return laws.load_law(self.law)

    @property
    def parameters(self) -> dict[str, float]:
        """Published parameters by name: for the Chinchilla form E, A, B, alpha, beta."""
        return dict(zip(self.form.parameters, self.form.values(self.theta[None], self.centre)[0].tolist(), strict=True))

    @property
    def parameter_draws(self) -> dict[str, np.ndarray]:
        """Bootstrap draws [K] of each published parameter."""
        return dict(zip(self.form.parameters, self.form.values(self.draws, self.centre).T, strict=True))

    def standard_errors(self) -> dict[str, float]:
        with np.errstate(invalid="ignore", over="ignore"):
            return {name: float(np.std(draw_K)) for name, draw_K in self.parameter_draws.items()}

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Percentile intervals at e.g. level=.95; an end is -inf or inf where the data do not bound the parameter."""
        limits = self._limits()
        out = {}
        for name, draw_K in self.parameter_draws.items():
            low, high = np.quantile(draw_K, [(1 - level) / 2, (1 + level) / 2], method="nearest")
            out[name] = (
                float(low) if low > limits[name][0] else -math.inf,
                float(high) if high < limits[name][1] else math.inf,
            )
        return out

    def weakly_identified(self) -> dict[str, str]:
        """Parameters the data hardly constrain, each with the reason."""
        limits, weak = self._limits(), {}
        for name, (low, high) in self.intervals(0.95).items():
            if math.isinf(low) or math.isinf(high):
                weak[name] = "its 95% interval is unbounded " + " and ".join(
                    side for side, end in (("below", low), ("above", high)) if math.isinf(end)
                )
            elif low > 0 and high / low > limits[name][2]:
                weak[name] = f"its 95% interval spans a factor {high / low:.3g}"
        return weak

    def _limits(self):
        return self.form.identified(min(p["loss"] for p in self.points))

    def predict(self, **inputs: float) -> float:
        """Loss of the fitted law, e.g. predict(N=1e8, D=2e9)."""
        return float(self._loss(self.theta[None], inputs)[0])

    def predict_draws(self, **inputs: float) -> np.ndarray:
        """Loss under each bootstrap draw [K]."""
        return self._loss(self.draws, inputs)

    def _loss(self, theta_KP, inputs):
        u_F1 = (np.log([inputs[name] for name in self.form.inputs]) - self.centre)[:, None]
        with np.errstate(over="ignore"):
            return np.exp(self.form.log_loss(theta_KP, u_F1)[0][:, 0])

    def residuals(self) -> np.ndarray:
        """log observed - log predicted loss of each point [n]."""
        u_Fn = np.log([[p[name] for p in self.points] for name in self.form.inputs]) - self.centre[:, None]
        return np.log([p["loss"] for p in self.points]) - self.form.log_loss(self.theta[None], u_Fn)[0][0]

    def residual_rms(self) -> float:
        """Root mean square log residual, corrected for the parameters fitted."""
        return math.sqrt(float(np.sum(self.residuals() ** 2)) / (len(self.points) - len(self.theta)))

    def to_json(self) -> str:
        """Everything a forecast needs. Draws are base64 of little-endian float64, row-major: exact, and short."""
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body |= {
            "format": FORMAT,
            "theta": self.theta.tolist(),
            "centre": self.centre.tolist(),
            "draws": _pack(self.draws),
            "formula": self.form.formula,
            "inputs": list(self.form.inputs),
            "parameters": self.parameters,
            "standard_errors": self.standard_errors(),
            "weakly_identified": self.weakly_identified(),
            "intervals": {str(level): self.intervals(level) for level in (0.8, 0.95)},
        }
        return json.dumps(_jsonable(body), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(
                f"not a fit of this version (expected format {FORMAT!r}); write it again with `slmjax fit --json`"
            )
        body |= {"theta": np.array(body["theta"]), "centre": np.array(body["centre"]), "draws": _unpack(body["draws"])}
        return cls(**{field.name: body[field.name] for field in dataclasses.fields(cls)})

    def table(self) -> str:
        """The estimate as text: parameters with intervals, objective, convergence, weak parameters, remarks."""
        errors, i80, i95 = self.standard_errors(), self.intervals(0.80), self.intervals(0.95)
        known = sorted((k.removesuffix("_convention"), v) for k, v in self.conventions.items() if v is not None)
        said = ", ".join(f"{name}: {value}" for name, value in known)
        rows = [("parameter", "estimate", "std. error", "80% interval", "95% interval")]
        rows += [
            (name, f"{value:.6g}", f"{errors[name]:.3g}", show.interval(i80[name]), show.interval(i95[name]))
            for name, value in self.parameters.items()
        ]
        lines = [
            f"{self.law}: {self.form.formula}",
            f"{len(self.points)} points ({said})",
            "",
            *show.columns(rows),
            "",
            f"objective: sum of Huber({self.delta:g}) of log-loss residuals = {self.objective:.10g}; "
            f"residual rms {self.residual_rms():.3g} in log loss",
            self.convergence(),
        ]
        lines += [f"weakly identified: {name}: {why}" for name, why in self.weakly_identified().items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"

    def convergence(self) -> str:
        """What the optimiser did, in one sentence per fact."""
        s, b = self.starts, self.bootstrap
        text = (
            f"convergence: {s['num_agreeing']} of {s['num']} starts end within 1e-8 of the best objective "
            f"(largest excess {s['spread']:.1e}); condition number {s['condition']:.2g}; "
            f"{b['num']} resamples of runs (seed {self.seed}), {b['num_agreeing']} with one minimum from two starts"
        )
        return text + (f", {b['num_redrawn']} degenerate ones redrawn" if b["num_redrawn"] else "")


def fit(
    points: PointSet | Sequence[Point],
    law: str = "chinchilla",
    delta: float = 1e-3,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit a law by the minimum of sum_i Huber_delta(log predicted_i - log observed_i), with a bootstrap over runs.

    Args:
      points: at least one more than the law has parameters, over at least three values of each input.
      law: a name in `laws.LAWS` or the dotted path of a module that defines `law`.
      delta: residual, in log loss, beyond which a point pulls with constant force. .1 is least squares in practice.
      num_bootstrap: resamples; runs (not points) are drawn with replacement, all points of a run together.
    Raises:
      ValueError: mixed conventions, too few points, a degenerate design, impossible values.
    """
    point_set = points if isinstance(points, PointSet) else PointSet(tuple(points))
    form = laws.load_law(law)
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta={delta} must be a positive number")
    if num_bootstrap < 100:
        raise ValueError(f"num_bootstrap={num_bootstrap} is too few for a 95% interval; use at least 100")
    x_Fn, loss_n = _validated(point_set, form)
    centre_F = np.log(x_Fn).mean(axis=1)
    u_Fn, target_n = np.log(x_Fn) - centre_F[:, None], np.log(loss_n)
    n, P = len(loss_n), len(form.parameters)

    floor = (1e-14 / delta) ** 2  # residuals of rounding size, in the objective's units: such a fit is exact

    start_SP = form.starts(u_Fn, loss_n, NUM_STARTS)
    objective = _objective(form, u_Fn, target_n, delta, np.ones((len(start_SP), n)))
    found = minimise(objective, start_SP, _curvature(form, start_SP[0], u_Fn, target_n, delta)[0], floor=floor)
    best = int(np.argmin(found.value_K))
    theta_P, least = found.theta_KP[best], found.value_K[best]
    inverse_PP, condition = _curvature(form, theta_P, u_Fn, target_n, delta)
    excess_S = (found.value_K - least) / (least + 1e8 * floor)
    starts = {
        "num": len(start_SP),
        "num_agreeing": int((excess_S <= 1e-8).sum()),
        "spread": float(excess_S.max()),
        "num_steps": found.num_steps_K.tolist(),
        "gradient_norm": float(found.gradient_norm_K[best]),
        "condition": condition,
    }
    run_ids = [p.run_id for p in point_set.points]
    weight_Kn, num_redrawn = _resample(run_ids, u_Fn, P, num_bootstrap, seed)
    objective = _objective(form, u_Fn, target_n, delta, weight_Kn)
    draws_KP, bootstrap = _refit(objective, theta_P, start_SP[-1], inverse_PP, num_bootstrap, floor)
    bootstrap |= {"num_runs": len(set(run_ids)), "num_redrawn": num_redrawn}
    return Fit(
        law=law,
        theta=theta_P,
        centre=centre_F,
        draws=draws_KP,
        points=[{name: getattr(p, name) for name in POINT_FIELDS} | dict(p.inputs) for p in point_set.points],
        conventions=point_set.conventions(),
        objective=float(least * n * delta**2),
        delta=delta,
        seed=seed,
        starts=starts,
        bootstrap=bootstrap,
        notes=[*point_set.notes, *_warnings(bool(found.converged_K[best]), bootstrap["num_runs"], P)],
    )


def _refit(objective, near_P, far_P, inverse_PP, num, floor):
    """Minima [num, P] of the resampled objectives. Each is sought from the estimate and from the worst projected start:
    agreement shows that no refit stopped early."""
    near, far = (
        minimise(objective, np.tile(start_P, (num, 1)), inverse_PP, floor=floor) for start_P in (near_P, far_P)
    )
    draws_KP = np.where((far.value_K < near.value_K)[:, None], far.theta_KP, near.theta_KP)
    agree_K = np.abs(far.value_K - near.value_K) <= 1e-6 * np.minimum(near.value_K, far.value_K) + 1e-14
    num_converged = int((near.converged_K | far.converged_K).sum())
    return draws_KP, {"num": num, "num_agreeing": int(agree_K.sum()), "num_converged": num_converged}


def _warnings(converged, num_runs, P):
    if not converged:
        yield "the optimiser still crept along a flat valley when it was stopped: these runs hardly determine the law"
    if num_runs < 2 * P:
        yield f"{num_runs} runs for {P} parameters: resamples of so few runs understate the uncertainty"


def _validated(point_set, form):
    """Inputs [F, n] and losses [n], or a ValueError that says what is missing."""
    points, P = point_set.points, len(form.parameters)
    if len(points) < P + 1:
        left_out = f" ({len(point_set.excluded)} runs were left out)" if point_set.excluded else ""
        raise ValueError(
            f"{len(points)} points{left_out} are too few: {form.formula} has {P} parameters "
            f"and needs at least {P + 1} finished runs"
        )
    point_set.require_comparable()
    for p in points:
        for name in (*form.inputs, "loss"):
            value = p.value(name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"run {p.run_id}: {name}={value} is not a positive finite number")
    x_Fn = np.array([[p.value(name) for p in points] for name in form.inputs], float)
    for name, x_n in zip(form.inputs, x_Fn, strict=True):
        num_levels = int(_levels(np.log(x_n)).max()) + 1
        if num_levels < MIN_LEVELS:
            raise ValueError(
                f"degenerate design: the runs have {num_levels} distinct {name} (values within 1% count as one), and "
                f"the effect of {name} needs at least {MIN_LEVELS}; add runs with other {name}"
            )
    if len(form.inputs) == 2 and _spread(np.log(x_Fn), np.ones((1, len(points))))[0] < MIN_SPREAD:
        raise ValueError(
            f"degenerate design: {form.inputs[1]} follows {form.inputs[0]} in all runs (one value of "
            f"{form.inputs[1]}/{form.inputs[0]}^k), so their effects cannot be told apart; "
            f"add runs with more or fewer {form.inputs[1]} at the same {form.inputs[0]}"
        )
    return x_Fn, np.array([p.loss for p in points], float)


def _levels(u_n):
    """Index of the design level of each value: sorted values less than SAME_VALUE apart in logarithm share a level."""
    order = np.argsort(u_n, kind="stable")
    level_n = np.empty(len(u_n), int)
    level_n[order] = np.concatenate([[0], np.cumsum(np.diff(u_n[order]) > SAME_VALUE)])
    return level_n


def _spread(u_Fn, weight_Kn):
    """Smallest over largest singular value [K] of the weighted, centred inputs."""
    total_K1 = weight_Kn.sum(axis=1, keepdims=True)
    mean_KF = weight_Kn @ u_Fn.T / total_K1
    second_KFF = np.einsum("kn,fn,gn->kfg", weight_Kn, u_Fn, u_Fn, optimize=True) / total_K1[:, :, None]
    eigenvalues_KF = np.linalg.eigvalsh(second_KFF - mean_KF[:, :, None] * mean_KF[:, None, :])
    return np.sqrt(np.maximum(eigenvalues_KF[:, 0], 0) / np.maximum(eigenvalues_KF[:, -1], 1e-300))


def _objective(form, u_Fn, target_n, delta, weight_Kn):
    """Mean Huber in units of delta squared (order one) and its gradient, for problems with their own point weights.

    Outside the law's box, and only there, a parabola is added: the minimum of a term without data must exist.
    """
    n = len(target_n)
    low_P, high_P = form.box(float(np.exp(target_n.min())))

    def value_and_gradient(theta_KP, lanes_K):
        value_K, gradient_KP = np.empty(len(theta_KP)), np.empty_like(theta_KP)
        outside_KP = theta_KP - np.clip(theta_KP, low_P, high_P)
        with np.errstate(all="ignore"):  # a wild trial overflows; the optimiser takes it back
            for b in range(0, len(theta_KP), BLOCK):
                rows = slice(b, b + BLOCK)
                log_loss, pullback = form.log_loss(theta_KP[rows], u_Fn)
                r = (log_loss - target_n) / delta
                force = np.clip(r, -1.0, 1.0)  # derivative of Huber: r inside, its sign outside
                weight = weight_Kn[lanes_K[rows]]
                value_K[rows] = np.einsum("kn,kn,kn->k", weight, force, r - 0.5 * force)
                gradient_KP[rows] = pullback(weight * force)
        return value_K / n + (outside_KP**2).sum(axis=1), gradient_KP / (n * delta) + 2 * outside_KP

    return value_and_gradient


def _curvature(form, theta_P, u_Fn, target_n, delta):
    """Inverse of the reweighted Gauss-Newton matrix at theta [P, P], and the condition number of J'J.

    Beyond delta a residual weighs delta/|r|, Huber's majoriser: so one matrix is a first guess for every resample.
    """
    n = len(target_n)
    log_loss_nn, pullback = form.log_loss(np.tile(theta_P, (n, 1)), u_Fn)
    jacobian_nP = pullback(np.eye(n))
    weight_n = 1 / np.maximum(np.abs(log_loss_nn[0] - target_n) / delta, 1.0)
    normal_PP = (jacobian_nP * weight_n[:, None]).T @ jacobian_nP / (n * delta**2)
    ridge = 1e-7 * np.trace(normal_PP)  # a vanished term leaves a zero row
    return np.linalg.inv(normal_PP + ridge * np.eye(len(theta_P))), float(np.linalg.cond(jacobian_nP) ** 2)


def _resample(run_ids, u_Fn, P, num, seed):
    """Point weights [num, n] of case resamples by run, and how many degenerate resamples were drawn again.

    A resample with fewer than P runs, fewer than three levels of an input, or inputs on a line determines no law.
    """
    runs = {run_id: i for i, run_id in enumerate(dict.fromkeys(run_ids))}
    run_n = np.array([runs[r] for r in run_ids])
    member_FnG = [np.eye(level_n.max() + 1)[level_n] for level_n in map(_levels, u_Fn)]
    rng = np.random.default_rng(seed)
    weights, sound = np.empty((0, len(run_ids))), np.empty(0, bool)
    while sound.sum() < num:
        if len(sound) >= 50 * num:
            raise ValueError(
                f"{np.sum(~sound)} of {len(sound)} resamples of the {len(runs)} runs determine no law; "
                "more runs are needed for intervals"
            )
        count_KR = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=num)
        weight_Kn = count_KR[:, run_n].astype(float)
        sound_K = (count_KR > 0).sum(axis=1) >= P
        for member_nG in member_FnG:
            sound_K &= (weight_Kn @ member_nG > 0).sum(axis=1) >= MIN_LEVELS
        if len(u_Fn) > 1:
            sound_K &= _spread(u_Fn, weight_Kn) >= MIN_SPREAD
        weights, sound = np.concatenate([weights, weight_Kn]), np.concatenate([sound, sound_K])
    used = np.flatnonzero(sound)[:num]
    return weights[used], int(used[-1]) + 1 - num


def _pack(array):
    return {
        "dtype": "<f8",
        "shape": list(array.shape),
        "base64": base64.b64encode(array.astype("<f8").tobytes()).decode(),
    }


def _unpack(packed):
    return np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"]).reshape(packed["shape"]).astype(float)


def _jsonable(value):
    """Infinite ends and undefined errors become null: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
