"""A fitted law: parameters with intervals, predictions, what is identified, its table and its JSON.

The JSON holds the points, the estimate and every bootstrap draw, so a forecast needs nothing else.

Letters: K resamples, n points, P parameters, F inputs.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slmjax.scaling import design, laws, show
from slmjax.scaling.bias_corrected import bias_corrected
from slmjax.scaling.points import Point

FORMAT = "slmjax-fit-3"
POINT_FIELDS = ("run_id", "N", "D", "C", "loss", "se", "epochs")
NEARLY_ONE = 0.9  # correlations of parameters worth a word


@dataclasses.dataclass(frozen=True)
class Fit:
    """An estimated law.

    Attributes:
      theta: best coordinates [P]; `centre`: log inputs [F] they refer to; `draws`: bootstrap coordinates [K, P].
      points: the fitted points, one dict each with run_id, N, D, C, loss, se, epochs and the law's own inputs.
      objective: sum over points of weight * Huber_delta(residual).
      starts, bootstrap: what the optimiser did, as shown by `table`.
      residual: "log" or "raw", the scale of the loss in which residuals were taken.
      weights: "equal" or "se"; `resample`: what the bootstrap drew, "run" or "ladder"; `fixed`: parameters held.
      left_out: run_id, reason and source of the runs that became no points; `choice`: how the form was chosen, if so.
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
    residual: str = "log"
    weights: str = "equal"
    resample: str = "run"
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)
    choice: dict[str, Any] | None = None

    @property
    def form(self) -> laws.Law:
        return laws.load_law(self.law)

    @property
    def loss_kind(self) -> str | None:
        """exact, bound, or how they were mixed knowingly."""
        return self.conventions.get("loss_kind")

    @property
    def num_free(self) -> int:
        return len(self.theta) - len(self.fixed)

    @property
    def parameters(self) -> dict[str, float]:
        """Published parameters by name: for the Chinchilla form E, A, B, alpha, beta."""
        found = dict(
            zip(self.form.parameters, self.form.values(self.theta[None], self.centre)[0].tolist(), strict=True)
        )
        return found | self.fixed

    @property
    def parameter_draws(self) -> dict[str, np.ndarray]:
        """Bootstrap draws [K] of each published parameter."""
        found = dict(zip(self.form.parameters, self.form.values(self.draws, self.centre).T, strict=True))
        return found | {name: np.full(len(self.draws), value) for name, value in self.fixed.items()}

    def standard_errors(self) -> dict[str, float]:
        with np.errstate(invalid="ignore", over="ignore"):
            return {name: float(np.std(draw_K, ddof=1)) for name, draw_K in self.parameter_draws.items()}

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Bias-corrected percentile intervals at e.g. level=.95, which hold the estimate; an end is -inf or inf where
        the data do not bound the parameter."""
        limits, estimate_P = self._limits(), np.array(list(self.parameters.values()))
        corrected_KP = bias_corrected(np.stack(list(self.parameter_draws.values()), axis=1), estimate_P)
        low_P, high_P = np.quantile(corrected_KP, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
        low_P, high_P = np.minimum(low_P, estimate_P), np.maximum(high_P, estimate_P)
        out = {}
        for name, low, high in zip(self.parameters, low_P, high_P, strict=True):
            out[name] = (
                float(low) if low > limits[name][0] or name in self.fixed else -math.inf,
                float(high) if high < limits[name][1] or name in self.fixed else math.inf,
            )
        return out

    def weakly_identified(self) -> dict[str, str]:
        """Parameters the data hardly constrain, each with the reason."""
        limits, weak = self._limits(), {}
        for name, (low, high) in self.intervals(0.95).items():
            if name in self.fixed:
                continue
            if math.isinf(low) and math.isinf(high):
                weak[name] = "not identified: its 95% interval is unbounded below and above"
            elif math.isinf(low) or math.isinf(high):
                weak[name] = f"its 95% interval is unbounded {'below' if math.isinf(low) else 'above'}"
            elif low > 0 and high / low > limits[name][2]:
                weak[name] = f"its 95% interval spans a factor {high / low:.3g}"
        return weak

    def _limits(self):
        return self.form.identified(min(p["loss"] for p in self.points))

    def correlations(self) -> dict[tuple[str, str], float]:
        """Correlations over the draws of every two free parameters, those of coefficients by their logarithm."""
        origin_F = np.zeros(len(self.centre))
        with np.errstate(all="ignore"):
            natural_KP = self.form.coordinates(self.form.values(self.draws, self.centre), origin_F)
            natural_KP = natural_KP[np.isfinite(natural_KP).all(axis=1)]
            if len(natural_KP) < 2:
                return {}
            matrix_PP = np.corrcoef(natural_KP.T)
        names, out = self.form.parameters, {}
        for p, first in enumerate(names):
            for q, second in enumerate(names[:p]):
                if np.isfinite(matrix_PP[p, q]) and not {first, second} & set(self.fixed):
                    out[second, first] = float(matrix_PP[p, q])
        return out

    def predict(self, **inputs: float) -> float:
        """Loss of the fitted law, e.g. predict(N=1e8, D=2e9)."""
        return float(self._loss(self.theta[None], inputs)[0])

    def predict_draws(self, **inputs: float) -> np.ndarray:
        """Loss under each bootstrap draw [K]."""
        return self._loss(self.draws, inputs)

    def _loss(self, theta_KP, inputs):
        missing = [name for name in self.form.inputs if name not in inputs]
        if missing:
            raise ValueError(f"{self.law} is a law of {', '.join(self.form.inputs)}; {', '.join(missing)} is not given")
        u_F1 = (np.log([inputs[name] for name in self.form.inputs]) - self.centre)[:, None]
        with np.errstate(over="ignore"):
            return self.form.loss(theta_KP, u_F1)[0][:, 0]

    def residuals(self) -> np.ndarray:
        """Observed minus predicted [n], of log loss or of raw loss as `residual` says."""
        return self._residuals(self.theta, self.centre)

    def _residuals(self, theta_P, centre_F):
        u_Fn = np.log([[p[name] for p in self.points] for name in self.form.inputs]) - centre_F[:, None]
        loss_n, predicted_n = np.array([p["loss"] for p in self.points]), self.form.loss(theta_P[None], u_Fn)[0][0]
        return np.log(loss_n / predicted_n) if self.residual == "log" else loss_n - predicted_n

    def residual_rms(self) -> float:
        """Root mean square residual, corrected for the parameters fitted."""
        return math.sqrt(float(np.sum(self.residuals() ** 2)) / (len(self.points) - self.num_free))

    def objective_at(self, values: Mapping[str, float]) -> float:
        """The objective that other parameters of the same law reach on these points, weighted as ours."""
        missing = [name for name in self.form.parameters if name not in values]
        if missing:
            raise ValueError(f"objective_at: {', '.join(missing)} missing; {self.law} has {self.form.parameters}")
        values_1P = np.array([[values[name] for name in self.form.parameters]], float)
        size_n = np.abs(self._residuals(self.form.coordinates(values_1P, self.centre)[0], self.centre))
        huber_n = np.where(size_n <= self.delta, size_n**2 / 2, self.delta * (size_n - self.delta / 2))
        points = [Point(**{name: p[name] for name in POINT_FIELDS}) for p in self.points]
        return float(np.sum(design.point_weights(points, self.weights, self.residual) * huber_n))

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

    def table(self, published: str | None = None) -> str:
        """The estimate as text: parameters with intervals, objective, convergence, weak parameters, remarks.

        published: a label of `law.published`: the column and the objective of those parameters stand beside ours. That
        they describe the same data is for the caller to know.
        """
        known = sorted((k.removesuffix("_convention"), v) for k, v in self.conventions.items() if v is not None)
        said = ", ".join(f"{name}: {value}" for name, value in known)
        of_loss = "log-loss" if self.residual == "log" else "loss"
        weighted = "" if self.weights == "equal" else ", weighted by the evaluations' standard errors"
        lines = [
            f"{self.law}: {self.form.formula}",
            f"{len(self.points)} points ({said})",
            "",
            *show.columns(self._rows(published)),
            "",
            f"objective: sum of Huber({self.delta:g}) of {of_loss} residuals{weighted} = {self.objective:.10g}; "
            f"residual rms {self.residual_rms():.3g} in {'log loss' if self.residual == 'log' else 'loss'}",
        ]
        if published is not None:
            theirs = self.objective_at(self._published(published))
            lines.append(f"published: {published}; its parameters reach {theirs:.10g} on these points")
            lines += [f"published: {remark}" for remark in [self.form.remarks.get(published)] if remark]
        lines.append(self.convergence())
        lines += [f"weakly identified: {name}: {why}" for name, why in self.weakly_identified().items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"

    def _rows(self, published):
        errors, i80, i95 = self.standard_errors(), self.intervals(0.80), self.intervals(0.95)
        rows = [["parameter", "estimate", "std. error", "80% interval", "95% interval"]]
        for name, value in self.parameters.items():
            if name in self.fixed:
                rows.append([name, f"{value:.6g}", "fixed", "", ""])
            else:
                ends = (show.interval(i80[name]), show.interval(i95[name]))
                rows.append([name, f"{value:.6g}", f"{errors[name]:.3g}", *ends])
        if published is not None:
            theirs = self._published(published)
            rows = [[*rows[0], "published"], *([*row, f"{theirs[row[0]]:.6g}"] for row in rows[1:])]
        return rows

    def _published(self, label):
        if label not in self.form.published:
            known = ", ".join(self.form.published) or "none"
            raise ValueError(f"published={label!r}: the values of {self.law} at hand are {known}")
        return self.form.published[label]

    def convergence(self) -> str:
        """What the optimiser did, in one phrase per fact."""
        s, b = self.starts, self.bootstrap
        strong = sorted(
            ((abs(r), pair) for pair, r in self.correlations().items() if abs(r) > NEARLY_ONE), reverse=True
        )
        facts = [
            f"{s['num_agreeing']} of {s['num']} starts end within 1e-8 of the best objective "
            f"(largest excess {s['spread']:.1e})",
            f"gradient norm {s['gradient_norm']:.1e}",
            f"at a bound: {', '.join(s['active_bounds'])}" if s["active_bounds"] else "no bound active",
            f"condition number {s['condition']:.2g}",
        ]
        if strong:
            pairs = ", ".join(f"{one} with {other} {r:.3f}" for r, (one, other) in strong[:3])
            facts.append(f"correlations {pairs} (of logs of coefficients)")
        whole = "runs" if self.resample == "run" else "whole ladders (all runs of a size)"
        refits = (
            f"{b['num']} resamples of {whole} (seed {self.seed}), {b['num_agreeing']} with one minimum from every start"
        )
        redrawn = f", {b['num_redrawn']} degenerate ones redrawn" if b["num_redrawn"] else ""
        return f"convergence: {'; '.join([*facts, refits])}{redrawn}"


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
