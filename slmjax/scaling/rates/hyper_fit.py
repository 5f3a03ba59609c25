"""Learning-rate and batch laws from a sweep: the optimum of every (N, D) cell, then powers of N and D through them.

How an optimum is read off a noisy grid moves the exponents by more than the sampling error of any one way, so a fit
carries every reading beside its own, and says what they span.

Letters: K resamples, c cells, n rows, P coefficients of a regression.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.rates.hyper_laws import beyond

FORMAT = "slmjax-hyper-fit-1"
COLUMNS = ("N", "D", "lr", "batch", "loss")
READINGS = ("argmin", "basin", "quadratic", "quadratic_near", "profile")
BASIN = 0.0025  # relative excess of loss within which Step Law and DeepSeek call a setting near-optimal
WINDOW, NEAR_WINDOW = 0.01, 0.005  # relative excess of loss within which a parabola is fitted
OUTPUTS = {"lr": ("N", "D"), "batch": ("D",)}  # Step Law's finding: the batch follows the tokens alone
MIN_SPREAD = 0.02  # least ratio of singular values of the centred log inputs, as in `fit`


class Optimum(NamedTuple):
    """The best setting of one cell under one reading: rate, batch, and the loss there."""

    N: float
    D: float
    lr: float
    batch: float
    loss: float


class Unread(NamedTuple):
    """A cell without an optimum under a reading, and why."""

    N: float
    D: float
    reason: str


class Recommendation(NamedTuple):
    """Rate and batch with intervals, and by input the factor by which the target lies outside the sweep (1: within)."""

    lr: float
    lr_interval: tuple[float, float]
    batch: float
    batch_interval: tuple[float, float]
    reach: dict[str, float]

    def table(self) -> str:
        rows = [("", "best", "interval")]
        rows.append(("lr", f"{self.lr:.4g}", show.interval(self.lr_interval, "{:.3g}".format)))
        rows.append(("batch", show.count(self.batch), show.interval(self.batch_interval, show.count)))
        far = [
            f"{name} lies {show.times(factor)} outside the sweep" for name, factor in self.reach.items() if factor > 1
        ]
        return "\n".join([*show.columns(rows), *far]) + "\n"


def load_sweep(
    path: str | Path, columns: Mapping[str, str] | None = None, batch_unit: float = 1.0
) -> dict[tuple[float, float], np.ndarray]:
    """Rows [n, 3] of (lr, batch, loss) by cell (N, D), from a CSV; `batch_unit` is the tokens in one unit of batch."""
    columns = dict(zip(COLUMNS, COLUMNS, strict=True)) | dict(columns or {})
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise ValueError(f"columns: {sorted(unknown)[0]!r} is not one of {', '.join(COLUMNS)}")
    cells: dict[tuple[float, float], list[tuple[float, float, float]]] = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        for name, header in columns.items():
            if header not in (reader.fieldnames or []):
                has = ", ".join(reader.fieldnames or [])
                raise ValueError(f"{path}: no column {header!r} for {name}; it has {has}")
        for number, row in enumerate(reader, 1):
            N, D, lr, batch, loss = (_number(row[columns[name]], f"{path} row {number}: {name}") for name in COLUMNS)
            cells.setdefault((N, D), []).append((lr, batch * batch_unit, loss))
    return {cell: np.array(rows) for cell, rows in sorted(cells.items())}


def _number(text, where):
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where} is {text!r}, not a positive finite number; correct or remove the row")
    return value


# --- the optimum of a cell -------------------------------------------------------------------------------------------


def read_optimum(rows_n3: np.ndarray, reading: str) -> tuple[float, float, float] | str:
    """(lr, batch, loss) of a cell's best setting, or the reason why this reading finds none.

    argmin: the best row. basin: geometric mean of the rows within .25% of its loss. quadratic, quadratic_near: vertex
    of a quadratic surface in log lr and log batch through the rows within 1% or .5%. profile: for lr and batch in turn,
    the best loss over the other, and the vertex of the parabola through the least of those and its two neighbours.
    """
    log_n2, loss_n = np.log(rows_n3[:, :2]), rows_n3[:, 2]
    best = int(np.argmin(loss_n))
    excess_n = loss_n / loss_n[best] - 1
    if reading == "argmin":
        return tuple(rows_n3[best].tolist())
    if reading == "basin":
        near = excess_n <= BASIN
        return (*np.exp(log_n2[near].mean(axis=0)).tolist(), float(loss_n[near].mean()))
    if reading == "profile":
        found = [_profile_vertex(log_n2[:, i], loss_n) for i in range(2)]
        reasons = [vertex for vertex in found if isinstance(vertex, str)]
        return reasons[0] if reasons else (math.exp(found[0]), math.exp(found[1]), float(loss_n[best]))
    if reading in ("quadratic", "quadratic_near"):
        near = excess_n <= (WINDOW if reading == "quadratic" else NEAR_WINDOW)
        return _surface_vertex(log_n2[near], loss_n[near])
    raise ValueError(f"reading={reading!r} is not one of {', '.join(READINGS)}")


def _profile_vertex(x_n, loss_n):
    x_m, group_n = np.unique(x_n, return_inverse=True)
    least_m = np.full(len(x_m), np.inf)
    np.minimum.at(least_m, group_n, loss_n)
    best = int(np.argmin(least_m))
    if best in (0, len(x_m) - 1):
        return "the best value is the first or last of the grid"
    around = slice(best - 1, best + 2)
    curvature, slope, _ = np.polyfit(x_m[around] - x_m[best], least_m[around], 2)
    return float(x_m[best] - slope / (2 * curvature)) if curvature > 0 else "no curvature"


def _surface_vertex(log_n2, loss_n):
    if len(loss_n) < 8:
        return f"{len(loss_n)} rows near the best are too few for a quadratic surface (8)"
    centre_2 = log_n2.mean(axis=0)
    x, y = (log_n2 - centre_2).T
    features_nP = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    if np.linalg.matrix_rank(features_nP, tol=1e-6) < 6:
        return "the rows near the best do not determine a quadratic surface"
    c0, cx, cy, cxx, cxy, cyy = np.linalg.lstsq(features_nP, loss_n, rcond=None)[0]
    hessian_22 = np.array([[2 * cxx, cxy], [cxy, 2 * cyy]])
    if np.linalg.eigvalsh(hessian_22)[0] <= 0:
        return "the quadratic surface has no minimum"
    vertex_2 = np.linalg.solve(hessian_22, [-cx, -cy])
    at_2 = vertex_2 + centre_2
    if (at_2 < log_n2.min(axis=0)).any() or (at_2 > log_n2.max(axis=0)).any():
        return "the vertex lies outside the rows near the best"
    loss = c0 + 0.5 * (cx * vertex_2[0] + cy * vertex_2[1])
    return (*np.exp(at_2).tolist(), float(loss))


def optima(sweep: Mapping[tuple[float, float], np.ndarray], reading: str) -> tuple[list[Optimum], list[Unread]]:
    """The optimum of every cell, and the cells that have none."""
    read, unread = [], []
    for (N, D), rows_n3 in sweep.items():
        found = read_optimum(rows_n3, reading)
        if isinstance(found, str):
            unread.append(Unread(N, D, found))
        else:
            read.append(Optimum(N, D, *found))
    return read, unread


# --- powers through the optima ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HyperFit:
    """lr = c N^a D^b and batch = c D^b through the optima of a sweep, with a bootstrap over its cells.

    Attributes:
      coefficients: by output its [log c, exponents ...] [P]; draws: the same of every resample [K, P].
      scatter: by output the standard deviation of log optimum around the law.
      readings: by reading and output the same coefficients, as far as a reading gives them.
    """

    reading: str
    coefficients: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    scatter: dict[str, float]
    optima: list[Optimum]
    unread: list[Unread]
    readings: dict[str, dict[str, list[float]]]
    seed: int

    @property
    def exponents(self) -> dict[str, float]:
        """By name: lr_N, lr_D, batch_D."""
        return {
            f"{output}_{x}": float(self.coefficients[output][1 + i])
            for output, inputs in OUTPUTS.items()
            for i, x in enumerate(inputs)
        }

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the exponents under this fit's reading."""
        found = {}
        for output, inputs in OUTPUTS.items():
            for i, x in enumerate(inputs):
                low, high = np.quantile(self.draws[output][:, 1 + i], [(1 - level) / 2, (1 + level) / 2])
                found[f"{output}_{x}"] = (float(low), float(high))
        return found

    def spans(self) -> dict[str, tuple[float, float]]:
        """Least and largest of each exponent over the readings."""
        return {
            f"{output}_{x}": (min(values), max(values))
            for output, inputs in OUTPUTS.items()
            for i, x in enumerate(inputs)
            for values in [[found[output][1 + i] for found in self.readings.values()]]
        }

    def recommend(self, N: float, D: float, level: float = 0.95) -> Recommendation:
        """Rate and batch at (N, D). The interval holds the optimum of one more cell: the law's own uncertainty, and how
        far single cells scatter around it."""
        for name, value in (("N", N), ("D", D)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} is not a positive finite number")
        target = {"N": math.log(N), "D": math.log(D)}
        rng = np.random.default_rng(self.seed)
        values = {}
        for output, inputs in OUTPUTS.items():
            x_P = np.array([1.0, *(target[x] for x in inputs)])
            log_K = self.draws[output] @ x_P + self.scatter[output] * rng.standard_normal(len(self.draws[output]))
            low, high = np.exp(np.quantile(log_K, [(1 - level) / 2, (1 + level) / 2]))
            values[output] = (math.exp(self.coefficients[output] @ x_P), (float(low), float(high)))
        reach = {
            name: beyond(value, (min(seen), max(seen)))
            for name, value in (("N", N), ("D", D))
            for seen in [[getattr(optimum, name) for optimum in self.optima]]
        }
        return Recommendation(*values["lr"], *values["batch"], reach)

    def table(self) -> str:
        i95, spans = self.intervals(0.95), self.spans()
        rows = [("exponent", "estimate", "95% interval", "span of the readings")]
        rows += [
            (
                name,
                f"{value:.3f}",
                show.interval(i95[name], "{:.3f}".format),
                show.interval(spans[name], "{:.3f}".format),
            )
            for name, value in self.exponents.items()
        ]
        (log_lr, lr_N, lr_D), (log_batch, batch_D) = self.coefficients["lr"], self.coefficients["batch"]
        lines = [
            f"lr = {math.exp(log_lr):.4g} N^{lr_N:.3f} D^{lr_D:.3f}; batch = {math.exp(log_batch):.4g} D^{batch_D:.3f}",
            f"{len(self.optima)} cells read by {self.reading}; {len(self.draws['lr'])} resamples of cells "
            f"(seed {self.seed}); cells scatter by a factor {math.exp(self.scatter['lr']):.2f} (lr) and "
            f"{math.exp(self.scatter['batch']):.2f} (batch)",
            "",
            *show.columns(rows),
            "",
        ]
        lines += [f"left out: N={show.count(u.N)}, D={show.count(u.D)}: {u.reason}" for u in self.unread]
        lines += [
            f"{output}_{x}: the interval is of one reading; {len(self.readings)} readings span "
            f"{show.interval(spans[f'{output}_{x}'], '{:.2f}'.format)}, which it does not hold"
            for output, inputs in OUTPUTS.items()
            for x in inputs
            if not i95[f"{output}_{x}"][0] <= spans[f"{output}_{x}"][0]
            or not spans[f"{output}_{x}"][1] <= i95[f"{output}_{x}"][1]
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "reading": self.reading,
            "coefficients": {name: values.tolist() for name, values in self.coefficients.items()},
            "draws": {name: values.tolist() for name, values in self.draws.items()},
            "scatter": self.scatter,
            "optima": [optimum._asdict() for optimum in self.optima],
            "unread": [cell._asdict() for cell in self.unread],
            "readings": self.readings,
            "seed": self.seed,
            "exponents": self.exponents,
            "intervals": {str(level): self.intervals(level) for level in (0.8, 0.95)},
        }
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "HyperFit":
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"not a fit of a sweep of this version (expected format {FORMAT!r}); fit it again")
        return cls(
            reading=body["reading"],
            coefficients={name: np.array(values) for name, values in body["coefficients"].items()},
            draws={name: np.array(values) for name, values in body["draws"].items()},
            scatter=body["scatter"],
            optima=[Optimum(**optimum) for optimum in body["optima"]],
            unread=[Unread(**cell) for cell in body["unread"]],
            readings=body["readings"],
            seed=body["seed"],
        )


def fit_sweep(
    sweep: Mapping[tuple[float, float], np.ndarray], reading: str = "argmin", num_bootstrap: int = 1000, seed: int = 0
) -> HyperFit:
    """Least squares of log optimum on log N and log D over the cells of a sweep (`load_sweep`).

    Raises:
      ValueError: an unknown reading, fewer than five cells with an optimum, or N and D that rise together.
    """
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r} is not one of {', '.join(READINGS)}")
    if num_bootstrap < 100:
        raise ValueError(f"num_bootstrap={num_bootstrap} is too few for a 95% interval; use at least 100")
    read, unread = optima(sweep, reading)
    if len(read) < 5:
        why = f"; {unread[0].reason}" if unread else ""
        raise ValueError(f"{len(read)} cells (N, D) with an optimum are too few for powers of N and D; give five{why}")
    if _spread(read) < MIN_SPREAD:
        raise ValueError(
            "degenerate sweep: D follows N (or one of them never changes), so their powers cannot be told apart; "
            "add cells with more or fewer tokens at the same size"
        )
    coefficients = _regress(read)
    draws, rng = {output: [] for output in OUTPUTS}, np.random.default_rng(seed)
    for _ in range(50 * num_bootstrap):
        sample = [read[i] for i in rng.integers(len(read), size=len(read))]
        if _spread(sample) < MIN_SPREAD:
            continue  # too few distinct cells: such a resample determines no law
        for output, values_P in _regress(sample).items():
            draws[output].append(values_P)
        if len(draws["lr"]) == num_bootstrap:
            break
    else:
        raise ValueError("most resamples of the cells determine no law; more cells are needed for intervals")
    readings = {name: optima(sweep, name)[0] for name in READINGS}
    return HyperFit(
        reading=reading,
        coefficients=coefficients,
        draws={output: np.stack(values) for output, values in draws.items()},
        scatter={output: _scatter(read, output, values_P) for output, values_P in coefficients.items()},
        optima=read,
        unread=unread,
        readings={
            name: {output: values_P.tolist() for output, values_P in _regress(found).items()}
            for name, found in readings.items()
            if len(found) >= 5 and _spread(found) >= MIN_SPREAD
        },
        seed=seed,
    )


def _design(read: Sequence[Optimum], inputs):
    return np.stack([np.ones(len(read)), *(np.log([getattr(o, x) for o in read]) for x in inputs)], axis=1)


def _regress(read):
    """By output [log c, exponents ...]."""
    return {
        output: np.linalg.lstsq(_design(read, inputs), np.log([getattr(o, output) for o in read]), rcond=None)[0]
        for output, inputs in OUTPUTS.items()
    }


def _scatter(read, output, values_P):
    residual_c = np.log([getattr(o, output) for o in read]) - _design(read, OUTPUTS[output]) @ values_P
    return float(np.sqrt((residual_c**2).sum() / (len(read) - len(values_P))))


def _spread(read):
    centred_c2 = _design(read, ("N", "D"))[:, 1:]
    singular = np.linalg.svd(centred_c2 - centred_c2.mean(axis=0), compute_uv=False)
    return singular[1] / singular[0] if singular[0] > 0 else 0.0
