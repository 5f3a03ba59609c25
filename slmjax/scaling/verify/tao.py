"""Tao et al. 2024 (arXiv 2407.13623), approaches 1 and 2: lines along the envelope, and the derivative's exponent.

The printed lines of approach 1 are not the minima of their objective: of 400 runs of L-BFGS-B that stop early the one
with the least squared error is kept, on an envelope that counts one point twice. `published_frontier` and
`published_line` repeat both and must give the printed digits; what `vocabulary.allocate` finds stands beside them.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling import vocabulary
from slmjax.scaling.envelope import power_line
from slmjax.scaling.verify import Check

SOURCE = "Tao 2024"
TABLE = "vocab_tao2024.csv"
DELTA = 1e-3
SHAPE = (6, 10, 20)  # sizes, vocabularies, checkpoints
LINES = {"N": (-2.48465102, 0.5), "N_v": (-1.5890313, 0.41636226), "H": (1.85958504, 0.5)}
# Non-vocabulary parameters and widths of the models that approach 2's exponent is fitted on
SIZES = ((33e6, 512), (85e6, 768), (151e6, 768), (302e6, 1024), (631e6, 1536), (1130e6, 2048), (2870e6, 3200))
ANCHOR = (33e6, 2.7e17)  # the small model whose best vocabulary is read off, and its budget
GAMMA = 0.8353974035228025
WIDTHS = ((50e6, 512), (200e6, 768), (500e6, 1024), (1e9, 1536), (2e9, 2048))
# N, width, published V by approach 1 and by approach 2, in thousands
PREDICTED = ((3e9, 3200, 39, 43), (7e9, 4096, 62, 67), (70e9, 8192, 212, 231))


def checks(folder: Path | None) -> Iterator[Check]:
    sizes_n2 = np.array(SIZES, float)
    gamma = vocabulary.derivative_exponent(*sizes_n2.T, delta=DELTA)
    yield Check(SOURCE, "approach 2 exponent", gamma, published=GAMMA, tolerance=1e-6)
    if folder is None or not (folder / TABLE).exists():
        return
    runs = read_runs(folder / TABLE)
    dense = with_interpolated(runs)
    ours = vocabulary.allocate(
        dense["C"], dense["loss"], {name: dense[name] for name in LINES}, DELTA, {"N": 0.5, "H": 0.5}
    )
    low_m, lines = published_frontier(dense["C"], dense["loss"]), {}
    log_C_m = np.log(dense["C"][low_m])
    for name, (level, exponent) in LINES.items():
        log_y_m, imposed = np.log(dense[name][low_m]), 0.5 if name != "N_v" else None
        lines[name] = published_line(log_C_m, log_y_m, imposed)
        yield Check(SOURCE, f"approach 1 log coefficient of {name}", lines[name][0], published=level, tolerance=2e-8)
        if imposed is None:
            yield Check(SOURCE, f"approach 1 exponent of {name}", lines[name][1], published=exponent, tolerance=2e-8)
        line = power_line(log_C_m, log_y_m, np.ones((1, len(low_m))), DELTA, imposed)
        least = _huber(line.level + line.slope * (log_C_m - line.centre) - log_y_m)
        printed = _huber(level + exponent * log_C_m - log_y_m)
        what = f"approach 1 objective of {name}, minimum and printed"
        yield Check(SOURCE, what, least, published=printed, tolerance=1e-12, at_most=True)
        if imposed is not None:
            found = ours.lines[name].level - imposed * ours.lines[name].centre
            what = f"approach 1 log coefficient of {name}, at the minimum"
            yield Check(SOURCE, what, found, published=level, tolerance=5e-3)
    anchor_N_v = best_embedding(runs, *ANCHOR)
    for N, d, first, second in PREDICTED:
        C = (N / math.exp(lines["N"][0])) ** 2
        V = math.exp(lines["N_v"][0]) * C ** lines["N_v"][1] / d
        yield Check(SOURCE, f"approach 1 V at {N / 1e9:g}B", V, published=first * 1e3, tolerance=500)
        V = vocabulary.scaled_vocabulary(N, d, ANCHOR[0], anchor_N_v, gamma)
        yield Check(SOURCE, f"approach 2 V at {N / 1e9:g}B", V, published=second * 1e3, tolerance=500)


def read_runs(path: Path) -> dict[str, np.ndarray]:
    """Columns [sizes, vocabularies, checkpoints] by name."""
    names = {"V": "vocab_size", "d": "embed_dim", "H": "num_characters", "N": "Non_vocab_parameters"}
    names |= {"C": "FLOPs", "loss": "Lossu"}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[header]) for row in rows]).reshape(SHAPE) for name, header in names.items()}


def with_interpolated(runs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Points between the runs and then the runs, flat: for every vocabulary along a diagonal of (N, H), by cubic
    interpolation on triangles; for every size at its last checkpoint along V, by quadratic splines."""
    from scipy.interpolate import griddata, interp1d

    parts = []
    line_N, line_H = (_log_spaced(runs[name], 50) for name in ("N", "H"))
    for v in range(SHAPE[1]):
        seen = np.stack([runs["N"][:, v].ravel(), runs["H"][:, v].ravel()], axis=1)
        loss = griddata(seen, runs["loss"][:, v].ravel(), np.stack([line_N, line_H], axis=1), method="cubic")
        V = np.full(len(loss), runs["V"][0, v, 0])
        inside = np.isfinite(loss)
        parts.append({"N": line_N[inside], "V": V[inside], "H": line_H[inside], "loss": loss[inside]})
    line_V = _log_spaced(runs["V"], 20)
    for s in range(SHAPE[0]):
        spline = interp1d(runs["V"][s, :, 0], runs["loss"][s, :, -1], kind="quadratic", fill_value="extrapolate")
        tokens = runs["H"][s, 0, -1] * vocabulary.tokens_per_character(runs["V"][s, 0, -1])
        N = np.full(len(line_V), runs["N"][s, 0, 0])
        H = tokens / vocabulary.tokens_per_character(line_V)
        parts.append({"N": N, "V": line_V, "H": H, "loss": spline(line_V)})
    parts.append({name: runs[name].ravel() for name in ("N", "V", "H", "loss")})
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    widths = np.array([d for _, d in WIDTHS], float)[np.searchsorted([N for N, _ in WIDTHS], out["N"])]
    return out | {"N_v": out["V"] * widths, "C": vocabulary.flops(out["N"], out["V"], widths, out["H"])}


def _log_spaced(values, num):
    # Not geomspace, whose ends are exact: the twins that `published_frontier` speaks of come from this rounding.
    return np.logspace(np.log10(values.min()), np.log10(values.max()), num)


def published_frontier(C_n: np.ndarray, loss_n: np.ndarray) -> np.ndarray:
    """Indices of the points below every earlier one in order of C. Of equal C both may be: a run and the point
    interpolated at its own V differ by rounding, and where that point comes first and higher the run counts again."""
    order_n = np.argsort(C_n, kind="stable")
    sorted_n = loss_n[order_n]
    return order_n[np.concatenate([[True], sorted_n[1:] < np.minimum.accumulate(sorted_n)[:-1]])]


def published_line(log_C_m: np.ndarray, log_y_m: np.ndarray, exponent: float | None) -> tuple[float, float]:
    """Level and exponent as printed: of L-BFGS-B runs with default tolerances from a grid of starts, the end with the
    least squared error, though Huber is what each of them minimises."""
    from scipy.optimize import minimize

    def residuals(theta):
        return theta[0] + (exponent if exponent is not None else theta[1]) * log_C_m - log_y_m

    levels, slopes = np.linspace(-20, 15, 20), np.linspace(0, 1, 20)
    starts = [[level] for level in levels] if exponent is not None else [[k, a] for k in levels for a in slopes]
    ends = [minimize(lambda theta: _huber(residuals(theta)), start, method="L-BFGS-B").x for start in starts]
    best = min(ends, key=lambda theta: float(np.mean(residuals(theta) ** 2)))
    return float(best[0]), exponent if exponent is not None else float(best[1])


def best_embedding(runs: dict[str, np.ndarray], N: float, C: float) -> float:
    """N_v of the vocabulary with the lowest loss at a budget, for the runs of the size nearest to N."""
    from scipy.interpolate import interp1d

    s = int(np.abs(np.log(runs["N"][:, 0, 0] / N)).argmin())
    loss_v = [
        float(interp1d(C_n, loss_n, kind="quadratic", fill_value="extrapolate")(C))
        for C_n, loss_n in zip(runs["C"][s], runs["loss"][s], strict=True)
    ]
    best = int(np.argmin(loss_v))
    return float(runs["V"][s, best, 0] * runs["d"][s, best, 0])


def _huber(r_n):
    size_n = np.abs(r_n)
    return float(np.where(size_n <= DELTA, size_n**2 / 2, DELTA * (size_n - DELTA / 2)).sum())
