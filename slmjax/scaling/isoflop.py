"""IsoFLOP (Hoffmann et al. 2022, approach 2): the best size of each budget, and power laws of N* and D* through them.

Three ways to read a budget's minimum: a parabola of the loss in log N near the best point, the minimum of an Akima
spline, and a parabola through all points, which is what many papers do and which is wrong on wide budgets (exponents of
1.2 for a published .84). No fit of a law of N and D lives here.

Letters: K noisy copies, n sizes of one budget, G budgets.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.lines import Estimate, Line, weighted_line
from slmjax.scaling.minima import METHODS, find_minima
from slmjax.scaling.points import Point, PointSet

RESAMPLINGS = ("noise", "cases")
SAME_BUDGET = 0.03  # neighbouring runs whose C differ by less belong to one budget
SAME_SIZE = 0.03  # and those whose N differ by less are one size: a spline through both would follow their noise
WIDEST_BUDGET = 0.25  # a chain of such runs longer than this in log C is a ladder, not a budget
MIN_SIZES = 4  # of a budget
WINDOW = 0.5  # decades of N either side of the best point
LARGEST_NOISE = 0.1  # of the smallest loss: copies must stay positive
# A minimum is not known better than a third of the distance between sizes, however small the noise (Porian et al.)
SPACING_SHARE = 0.33


@dataclasses.dataclass(frozen=True)
class Budget:
    """Runs of one compute budget, averaged by size: log N [n] ascending, log D [n], loss [n]; C is their mean."""

    C: float
    num_runs: int
    log_N: np.ndarray
    log_D: np.ndarray
    loss: np.ndarray


class Optimum(NamedTuple):
    """The best size of a budget: medians over the copies with an interior minimum, and those copies [K']."""

    C: float
    N: float
    D: float
    loss: float
    sd_log_N: float
    sd_log_D: float
    log_N_draws: np.ndarray
    log_D_draws: np.ndarray
    log_loss_draws: np.ndarray


class Discarded(NamedTuple):
    """A budget without a usable minimum, and why."""

    C: float
    reason: str


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Optima of every budget and the lines through them.

    Attributes:
      lines: {"N", "D", "loss"}: power laws of C; N and D weighted by 1/variance of the optima's logarithm.
      noise: standard deviation of a loss, in nats, that the copies were given (0 for resampling="cases").
    """

    method: str
    window: float
    resampling: str
    noise: float
    budgets: tuple[Budget, ...]
    optima: tuple[Optimum, ...]
    discarded: tuple[Discarded, ...]
    lines: dict[str, Line]
    notes: tuple[str, ...]

    def at(self, flops: float) -> dict[str, Estimate]:
        """N, D and tokens_per_param at a budget, each with its draws."""
        N, D = self.lines["N"].at(flops), self.lines["D"].at(flops)
        return {"N": N, "D": D, "tokens_per_param": Estimate(D.value / N.value, D.draws / N.draws)}

    def table(self) -> str:
        """Optima, lines and remarks as text."""
        rows = [("C", "N*", "D*", "D*/N*", "loss*", "sd log N*", "points")]
        sizes = {budget.C: len(budget.loss) for budget in self.budgets}
        rows += [
            (
                f"{o.C:.3g}",
                show.count(o.N),
                show.count(o.D),
                f"{o.D / o.N:.3g}",
                f"{o.loss:.4f}",
                f"{o.sd_log_N:.2g}",
                str(sizes[o.C]),
            )
            for o in self.optima
        ]
        laws = [("law", "exponent", "95% interval", "coefficient")]
        laws += [
            (
                f"{name}* = c C^a",
                f"{line.slope:.4f}",
                show.interval(line.exponent.interval(0.95), "{:.4f}".format),
                f"{line.coefficient.value:.4g}",
            )
            for name, line in self.lines.items()
        ]
        lines = [f"isoflop, {self.method}: {len(self.optima)} of {len(self.budgets)} budgets", ""]
        lines += [*show.columns(rows), "", *show.columns(laws)]
        lines += [f"discarded: {d.C:.3g} FLOPs: {d.reason}" for d in self.discarded]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def isoflop(
    points: PointSet | Sequence[Point],
    method: str = "akima",
    window: float = WINDOW,
    resampling: str = "noise",
    noise: float | None = None,
    num_copies: int = 1000,
    seed: int = 0,
    same_budget: float = SAME_BUDGET,
) -> IsoFlop:
    """The best N and D of each budget and their power laws of C, after Hoffmann et al. 2022 and Porian et al. 2024.

    Args:
      method: "akima" (Akima spline of log loss in log N, minimum on a grid 25 times finer than the points), "parabola"
        (of the loss in log N, within `window` decades of the best point) or "all_points" (a parabola through all).
      resampling: "noise" adds Gaussian noise to every loss; "cases" draws a budget's runs with replacement.
      noise: its standard deviation in nats; None estimates it from how far losses lie from their neighbours.
      num_copies: resamples. A budget counts when half of them have a minimum between its smallest and largest size.
      same_budget: relative difference of C within which neighbouring runs share a budget.
    Raises:
      ValueError: mixed conventions, no budgets, fewer than two budgets with an interior minimum, bad options.
    """
    _require_options(method, window, resampling, noise, num_copies)
    budgets, notes = group_budgets(points, same_budget)
    if resampling == "cases":
        noise = 0.0
    elif noise is None:
        noise = estimate_noise(budgets)
        notes.append(f"noise of a loss estimated from its neighbours: {noise:.2g} nats")
    smallest = min(float(budget.loss.min()) for budget in budgets)
    if noise > LARGEST_NOISE * smallest:
        raise ValueError(f"noise={noise:.3g} nats drowns losses of {smallest:.3g}; give a standard deviation in nats")
    rng = np.random.default_rng(seed)
    optima, discarded = [], []
    for budget in budgets:
        found = _optimum(budget, method, window, resampling, noise, num_copies, rng)
        (optima if isinstance(found, Optimum) else discarded).append(found)
    if len(optima) < 2:
        reasons = "; ".join(f"{d.C:.3g} FLOPs: {d.reason}" for d in discarded)
        raise ValueError(
            f"{len(optima)} of {len(budgets)} budgets have a minimum between their smallest and largest size, and a "
            f"power law needs two ({reasons}); add sizes on the side where the loss still falls"
        )
    if discarded:
        notes.append(f"{len(discarded)} of {len(budgets)} budgets discarded: no minimum inside their sizes")
    if len(optima) == 2:
        notes.append("two budgets: the line passes through both, and nothing tests it")
    if method == "all_points":
        notes.append(
            "a parabola through all points of a budget is biased when they are wide or off-centre: published exponents "
            "of .58 to .84 came out at .74 to 1.21; prefer akima, or the parabola within half a decade of the best"
        )
    return IsoFlop(
        method, window, resampling, noise, budgets, tuple(optima), tuple(discarded), _lines(optima), tuple(notes)
    )


def _require_options(method, window, resampling, noise, num_copies):
    for name, value, known in (("method", method, METHODS), ("resampling", resampling, RESAMPLINGS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    if num_copies < 100:
        raise ValueError(f"num_copies={num_copies} is too few for a 95% interval; use at least 100")
    if not window > 0:
        raise ValueError(f"window={window} must be a positive number of decades")
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise} must be a standard deviation in nats, zero or more")


def group_budgets(
    points: PointSet | Sequence[Point], same_budget: float = SAME_BUDGET
) -> tuple[tuple[Budget, ...], list[str]]:
    """Budgets of at least four sizes, by C, runs of one size averaged, and remarks on what belongs to none."""
    point_set = points if isinstance(points, PointSet) else PointSet(tuple(points))
    if not point_set.points:
        raise ValueError("no points: an IsoFLOP fit needs runs")
    point_set.require_comparable()
    for p in point_set.points:
        for name in ("N", "D", "C", "loss"):
            value = getattr(p, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"run {p.run_id}: {name}={value} is not a positive finite number")
    rows_n4 = np.log([[p.C, p.N, p.D, p.loss] for p in point_set.points])
    rows_n4 = rows_n4[np.lexsort(rows_n4.T[::-1])]
    groups = np.split(rows_n4, np.flatnonzero(np.diff(rows_n4[:, 0]) > math.log1p(same_budget)) + 1)
    budgets = [_budget(rows) for rows in groups if np.ptp(rows[:, 0]) <= WIDEST_BUDGET]
    budgets = tuple(budget for budget in budgets if len(budget.loss) >= MIN_SIZES)
    if not budgets:
        raise ValueError(
            f"no compute budget (C within {same_budget:.0%}) has {MIN_SIZES} sizes, so these {len(point_set)} runs are "
            "no IsoFLOP design; use the parametric fit or the envelope"
        )
    num_used, num_sizes = sum(b.num_runs for b in budgets), sum(len(b.loss) for b in budgets)
    notes = list(point_set.notes)
    if num_used < len(rows_n4):
        notes.append(f"{len(rows_n4) - num_used} of {len(rows_n4)} runs belong to no budget of {MIN_SIZES} sizes")
    if num_sizes < num_used:
        notes.append(f"{num_used - num_sizes} runs repeat a size of their budget: their losses were averaged")
    return budgets, notes


def _budget(rows_n4):
    rows_n4 = rows_n4[np.argsort(rows_n4[:, 1], kind="stable")]
    member_n = np.concatenate([[0], np.cumsum(np.diff(rows_n4[:, 1]) > math.log1p(SAME_SIZE))])
    count_n = np.bincount(member_n)
    log_N_n, log_D_n = (np.bincount(member_n, rows_n4[:, column]) / count_n for column in (1, 2))
    loss_n = np.bincount(member_n, np.exp(rows_n4[:, 3])) / count_n
    return Budget(math.exp(rows_n4[:, 0].mean()), len(rows_n4), log_N_n, log_D_n, loss_n)


def estimate_noise(budgets: Sequence[Budget]) -> float:
    """Standard deviation of a loss, in nats, pooled over the budgets' inner sizes within half a decade of the best.

    Each loss is compared with the polynomial through its nearest neighbours in log N (four, or all the others of a
    budget of four), so that curvature cancels; what is left, divided by the noise it amplifies, is noise. The median of
    its size, not the mean square: a size that failed is no noise.
    """
    away = []
    for budget in budgets:
        u_n, n = budget.log_N, len(budget.log_N)
        near_best = np.abs(u_n - u_n[budget.loss.argmin()]) <= WINDOW * math.log(10)
        for i in range(1, n - 1):
            first = min(max(i - 2, 0), max(n - 5, 0))
            others = np.array([j for j in range(first, min(first + 5, n)) if j != i])
            # Lagrange weights: the polynomial through the neighbours, read at u_i.
            weight_j = [np.prod([(u_n[i] - u_n[m]) / (u_n[j] - u_n[m]) for m in others if m != j]) for j in others]
            residual = budget.loss[i] - np.dot(weight_j, budget.loss[others])
            away += [abs(residual) / math.sqrt(1 + np.dot(weight_j, weight_j))] if near_best[i] else []
    if not away:
        raise ValueError("no budget has a size on both sides of its best, so the noise cannot be estimated; give noise")
    return 1.4826 * float(np.median(away))


def _optimum(budget, method, window, resampling, noise, K, rng) -> Optimum | Discarded:
    n = len(budget.loss)
    reason = find_minima(budget.log_N, budget.loss[None], np.ones((1, n)), method, window).reason(0)
    if resampling == "noise":
        loss_Kn, weight_Kn = budget.loss + noise * rng.standard_normal((K, n)), np.ones((K, n))
    else:
        loss_Kn = np.broadcast_to(budget.loss, (K, n))
        weight_Kn = rng.multinomial(n, np.full(n, 1 / n), size=K).astype(float)
    if reason:
        return Discarded(budget.C, reason)
    found = find_minima(budget.log_N, loss_Kn, weight_Kn, method, window)
    inside_K = found.inside_K
    if 2 * inside_K.sum() < K:
        return Discarded(
            budget.C,
            f"only {inside_K.mean():.0%} of its resamples have a minimum between the smallest and largest size",
        )
    log_N_K, log_loss_K = found.log_N_K[inside_K], np.log(found.loss_K[inside_K])
    log_D_K = np.interp(log_N_K, budget.log_N, budget.log_D)
    log_N, log_D, log_loss = (float(np.median(draws_K)) for draws_K in (log_N_K, log_D_K, log_loss_K))
    sd_log_N, sd_log_D = (
        max(float(draws_K.std()), SPACING_SHARE * float(np.ptp(u_n)) / (n - 1)) / float(inside_K.mean())
        for draws_K, u_n in ((log_N_K, budget.log_N), (log_D_K, budget.log_D))
    )
    return Optimum(
        budget.C,
        math.exp(log_N),
        math.exp(log_D),
        math.exp(log_loss),
        sd_log_N,
        sd_log_D,
        log_N_K,
        log_D_K,
        log_loss_K,
    )


def _lines(optima):
    """Lines through the optima. Budgets are independent, so the k-th valid copies of all make one resample."""
    log_C_G = np.log([o.C for o in optima])
    num = min(len(o.log_N_draws) for o in optima)
    weights = {
        "N": [o.sd_log_N**-2 for o in optima],
        "D": [o.sd_log_D**-2 for o in optima],
        "loss": [1.0] * len(optima),
    }
    return {
        name: weighted_line(
            log_C_G,
            np.log([getattr(o, name) for o in optima]),
            np.stack([getattr(o, f"log_{name}_draws")[:num] for o in optima], axis=1),
            np.array(weight_G),
        )
        for name, weight_G in weights.items()
    }
