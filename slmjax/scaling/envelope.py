"""The training-curve envelope (Hoffmann et al. 2022, approach 1): the lowest loss that any run had reached at each
compute, which size reached it, and power laws of N* and D* through those sizes.

Reads whole training curves where they were logged, else final points. No law of N and D is fitted here.

Letters: K resamples, n points of all curves, R runs, m points on an envelope.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.lines import Estimate, Line, huber_lines
from slmjax.scaling.points import Point, PointSet
from slmjax.scaling.points.runs import flops_at

READINGS = ("records", "interpolated")
ENDS = ("drop", "keep")
SAME_SIZE = 0.03  # runs whose N differ by less are one size
MIN_SIZES = 3  # distinct sizes on the envelope


class Curve(NamedTuple):
    """What one run had reached: C [n] ascending, D [n], loss [n]; one point where only the end was logged."""

    run_id: str
    N: float
    C: np.ndarray
    D: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The frontier (one dict a point: run_id, C, N, D, loss) and power laws of N* and D* along it."""

    reading: str
    ends: str
    delta: float
    frontier: tuple[dict, ...]
    lines: dict[str, Line]
    notes: tuple[str, ...]

    def at(self, flops: float) -> dict[str, Estimate]:
        """N, D and tokens_per_param at a budget, each with its draws."""
        N, D = self.lines["N"].at(flops), self.lines["D"].at(flops)
        return {"N": N, "D": D, "tokens_per_param": Estimate(D.value / N.value, D.draws / N.draws)}

    def table(self) -> str:
        rows = [("law", "exponent", "95% interval", "coefficient")]
        rows += [
            (
                f"{name}* = c C^a",
                f"{line.slope:.4f}",
                show.interval(line.exponent.interval(0.95), "{:.4f}".format),
                f"{line.coefficient.value:.4g}",
            )
            for name, line in self.lines.items()
        ]
        C, N = ([point[name] for point in self.frontier] for name in ("C", "N"))
        lines = [
            f"envelope, {self.reading}: {len(self.frontier)} points, C {min(C):.3g} to {max(C):.3g}, "
            f"N {show.count_range(N)}",
            "",
            *show.columns(rows),
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def curves_of_points(points: PointSet | Sequence[Point]) -> tuple[Curve, ...]:
    """One curve a run_id: the rows of a table of checkpoints, or a finished run's single point."""
    point_set = points if isinstance(points, PointSet) else PointSet(tuple(points))
    if not point_set.points:
        raise ValueError("no points: an envelope needs runs")
    point_set.require_comparable()
    rows = {}
    for p in point_set.points:
        rows.setdefault(p.run_id, []).append((p.C, p.D, p.loss, p.N))
    for run_id, found in rows.items():
        if len({N for *_, N in found}) > 1:
            raise ValueError(f"run {run_id} has points of several N; a curve is one run's: give each run its run_id")
    return tuple(_curve(run_id, found[0][3], [row[:3] for row in found]) for run_id, found in rows.items())


def curves_of_runs(runs, n: str = "non_embedding", flops: str = "with_head") -> tuple[Curve, ...]:
    """Held-out losses along the runs of a study folder (`points.load_runs`); what an unfinished run reached counts."""
    curves = []
    for run in runs:
        rows = [
            (flops_at(run.start, line["tokens"], flops), line["tokens"], line["loss"])
            for line in run.evals
            if line["loss"] is not None and line["tokens"] > 0
        ]
        curves += [_curve(run.run_id, run.start["counts"][n], rows)] if rows else []
    return tuple(curves)


def _curve(run_id, N, rows) -> Curve:
    for value in (N, *(value for row in rows for value in row)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"run {run_id}: {value} among its N, C, D and losses is not a positive finite number")
    C_n, D_n, loss_n = np.array(sorted(rows), float).T
    return Curve(run_id, float(N), C_n, D_n, loss_n)


def envelope(
    curves: Sequence[Curve],
    reading: str = "records",
    ends: str = "drop",
    delta: float = math.inf,
    exponents: dict[str, float] | None = None,
    num_budgets: int = 300,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Envelope:
    """The envelope of training curves and power laws of N* and D* along it, with intervals by resampling runs.

    Args:
      reading: "records": every logged point that beats all cheaper ones, as Tao et al. 2024. "interpolated": the best
        curve at `num_budgets` budgets evenly spaced in log C, as Hoffmann et al. 2022; needs curves, not end points.
      ends: "drop" leaves out what the smallest and the largest size hold: there the next size was not run, so the size
        held is not the best one. "keep" keeps it.
      delta: Huber threshold of the lines in log N and log D; infinite is least squares.
      exponents: slopes that are imposed instead of fitted, e.g. {"N": 0.5}.
    Raises:
      ValueError: no envelope of three sizes, bad options.
    """
    exponents = dict(exponents or {})
    _require_options(reading, ends, delta, exponents, num_bootstrap)
    seen = _read(curves, reading, num_budgets)
    size_R = _sizes(np.array([curve.N for curve in curves]))
    rng, R = np.random.default_rng(seed), len(curves)
    held_KR = np.concatenate([np.ones((1, R), bool), rng.multinomial(R, np.full(R, 1 / R), num_bootstrap) > 0])
    on_Km = seen.frontier(held_KR)
    inner_Km = on_Km & _between(held_KR, size_R, seen.run_n) if ends == "drop" else on_Km
    num_sizes = len(set(size_R[seen.run_n[inner_Km[0]]].tolist()))
    if num_sizes < MIN_SIZES:
        ends_said = "between the smallest and the largest size " if ends == "drop" else ""
        raise ValueError(
            f"the envelope passes through {num_sizes} sizes {ends_said}and a power law along it needs {MIN_SIZES}; "
            "add sizes, or log more of each run"
        )
    # A resample whose envelope holds two sizes has no slope to speak of.
    sound_K = np.array([len(set(size_R[seen.run_n[on_m]].tolist())) >= MIN_SIZES for on_m in inner_Km])
    used_m = inner_Km[sound_K].any(axis=0)
    weight_Km, at = inner_Km[sound_K][:, used_m].astype(float), seen.take(used_m)
    log_N_m = np.log([curves[r].N for r in at.run_n])
    lines = {
        name: power_line(np.log(at.C_n), log_y_m, weight_Km, delta, exponents.get(name))
        for name, log_y_m in (("N", log_N_m), ("D", np.log(at.D_n)))
    }
    frontier = [
        {"run_id": curves[r].run_id, "C": C, "N": curves[r].N, "D": D, "loss": loss}
        for C, D, loss, r in zip(*(array[on_Km[0]].tolist() for array in seen[1:]), strict=True)
    ]
    notes = _notes(curves, ends, int(on_Km[0].sum() - inner_Km[0].sum()), len(frontier), int((~sound_K).sum()))
    return Envelope(reading, ends, delta, tuple(frontier), lines, tuple(notes))


def _require_options(reading, ends, delta, exponents, num_bootstrap):
    for name, value, known in (("reading", reading, READINGS), ("ends", ends, ENDS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    if not delta > 0:
        raise ValueError(f"delta={delta} must be a positive number")
    if num_bootstrap < 100:
        raise ValueError(f"num_bootstrap={num_bootstrap} is too few for a 95% interval; use at least 100")
    if set(exponents) - {"N", "D"}:
        raise ValueError(f"exponents: {sorted(set(exponents) - {'N', 'D'})} are not among N, D")


def record_lows(C_n: np.ndarray, loss_n: np.ndarray) -> np.ndarray:
    """Indices of the points that beat every cheaper one, by C; of equal C the lowest."""
    order_n = np.lexsort((loss_n, C_n))
    sorted_n = loss_n[order_n]
    return order_n[np.concatenate([[True], sorted_n[1:] < np.minimum.accumulate(sorted_n)[:-1]])]


def power_line(log_C_n, log_y_n, weight_Kn, delta: float, exponent: float | None = None) -> Line:
    """The line of the first row of weights; the other rows are its resamples."""
    slope_K, level_K, centre = huber_lines(log_C_n, log_y_n, weight_Kn, delta, exponent)
    return Line(centre, float(slope_K[0]), float(level_K[0]), slope_K[1:], level_K[1:])


class _Seen(NamedTuple):
    """Points of all curves in order of C, and how an envelope is read from those of the runs a resample holds."""

    reading: str
    C_n: np.ndarray
    D_n: np.ndarray
    loss_n: np.ndarray
    run_n: np.ndarray

    def take(self, used_n):
        return _Seen(self.reading, *(array[used_n] for array in self[1:]))

    def frontier(self, held_KR):
        """Which points [K, n] lie on the envelope of the runs held."""
        loss_Kn = np.where(held_KR[:, self.run_n], self.loss_n, np.inf)
        if self.reading == "records":
            lowest_Kn = np.minimum.accumulate(loss_Kn, axis=1)
            before_Kn = np.concatenate([np.full((len(loss_Kn), 1), np.inf), lowest_Kn[:, :-1]], axis=1)
            return loss_Kn < before_Kn
        first_g = np.flatnonzero(np.concatenate([[True], np.diff(self.C_n) > 0]))
        lowest_Kg = np.minimum.reduceat(loss_Kn, first_g, axis=1)
        count_g = np.diff(np.concatenate([first_g, [len(self.C_n)]]))
        return np.isfinite(loss_Kn) & (loss_Kn == np.repeat(lowest_Kg, count_g, axis=1))


def _read(curves, reading, num_budgets) -> _Seen:
    run_n = np.repeat(np.arange(len(curves)), [len(curve.C) for curve in curves])
    C_n, D_n, loss_n = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("C", "D", "loss"))
    if reading == "interpolated":
        long = [r for r, curve in enumerate(curves) if len(curve.C) > 1]
        if not long:
            raise ValueError("reading='interpolated' needs training curves, and every run has one point; use 'records'")
        grid_g = np.geomspace(C_n.min(), C_n.max(), num_budgets)
        parts = []
        for r in long:
            log_C = np.log(curves[r].C)
            reached_g = grid_g[(grid_g >= curves[r].C[0]) & (grid_g <= curves[r].C[-1])]
            D, loss = (
                np.exp(np.interp(np.log(reached_g), log_C, np.log(values))) for values in (curves[r].D, curves[r].loss)
            )
            parts.append((reached_g, D, loss, np.full(len(reached_g), r)))
        C_n, D_n, loss_n, run_n = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order_n = np.lexsort((loss_n, C_n))
    return _Seen(reading, *(array[order_n] for array in (C_n, D_n, loss_n, run_n)))


def _sizes(N_R):
    """Index [R] of each run's size."""
    order = np.argsort(N_R, kind="stable")
    size_R = np.empty(len(N_R), int)
    size_R[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(N_R[order])) > math.log1p(SAME_SIZE))])
    return size_R


def _between(held_KR, size_R, run_n):
    """Whether each point [K, n] belongs to neither the smallest nor the largest size that the resample holds."""
    smallest_K = np.where(held_KR, size_R, size_R.max() + 1).min(axis=1)
    largest_K = np.where(held_KR, size_R, -1).max(axis=1)
    size_n = size_R[run_n]
    return (size_n > smallest_K[:, None]) & (size_n < largest_K[:, None])


def _notes(curves, ends, num_at_ends, num_points, num_unsound):
    if any(len(curve.C) > 1 for curve in curves):
        yield (
            "losses along a run are those of its schedule so far, not of a run annealed there: "
            "the envelope finds longer training dearer than it is, unless the schedule was constant"
        )
    if ends == "drop" and num_at_ends:
        yield f"{num_at_ends} of {num_points} points, held by the smallest or largest size, are not in the lines"
    if num_unsound:
        yield f"{num_unsound} resamples whose envelope has fewer than {MIN_SIZES} sizes are not in the intervals"
