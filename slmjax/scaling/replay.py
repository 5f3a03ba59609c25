"""A planner put to the test on a sweep that is already there: with part of its FLOPs, buy the runs the planner names,
and ask how wide the forecast's interval is beside that from the whole sweep.

One look, when the money is spent: an interval that was watched until it happened to be narrow would prove nothing. The
same look at runs bought in random order, or the cheapest first, says what planning was worth; and the linearised law of
the whole sweep, planned with in hindsight, says about how well anyone could have done. A part of a sweep never knows
the law better than the whole; its interval can be as wide only where scatter and discrepancy make most of both.

Letters: n points of the sweep.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import forecast, planner
from slmjax.scaling.allocation import Cost, best
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.planner import Candidate, Interval
from slmjax.scaling.points import Point

ORDERS = ("planned", "cheapest", "random")
SHARE = 0.5  # of the sweep's FLOPs
ROUNDS = 10  # in which they are spent, each planned with what the runs so far have shown
NUM_PLANNING, NUM_JUDGING = 300, 1000  # bootstrap resamples
LEAST_PER_PARAMETER = 2  # runs to begin with; with fewer a bootstrap understates the uncertainty


class Outcome(NamedTuple):
    """Runs and share of the sweep's FLOPs bought, and width of the forecast's interval over the whole sweep's.

    width_ratio: of the intervals as printed, each with the scatter and the discrepancy that its own runs show.
    known_ratio: had both known these as the whole sweep shows them. A discrepancy is learned from a few cuts of the
    runs at hand, so its estimate differs from part to part by more than the law's variance does.
    """

    num_runs: int
    share: float
    width_ratio: float
    known_ratio: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs in order of cost, the fit to all, and the forecast: the loss at `reach` times the largest run.

    width: of its 95% interval from all runs, in log loss.
    """

    points: tuple[Point, ...]
    whole: Fit
    target: Candidate
    width: float

    @classmethod
    def of(cls, points: Sequence[Point], reach: float, law: str = "chinchilla", seed: int = 0) -> "Sweep":
        points = tuple(sorted(points, key=lambda p: (p.C, p.run_id)))
        whole = fit(points, law, num_bootstrap=NUM_JUDGING, seed=seed)
        target = Candidate(*best(whole, reach * points[-1].C, Cost("6ND")), reach * points[-1].C)
        return cls(points, whole, target, _width(whole, target))

    @property
    def flops(self) -> float:
        return sum(p.C for p in self.points)

    def fit(self, bought: set[int], num_bootstrap: int) -> Fit:
        return fit([self.points[i] for i in sorted(bought)], self.whole.law, num_bootstrap=num_bootstrap,
                   seed=self.whole.seed)  # fmt: skip


def replay(sweep: Sweep, order: str = "planned", share: float = SHARE, seed: int = 0) -> Outcome:
    """Spend a share of a sweep's FLOPs on its runs, and look."""
    bought = buy(sweep, order, share, seed)
    now = sweep.fit(bought, NUM_JUDGING)
    part, whole = Interval.of(now, sweep.target), Interval.of(sweep.whole, sweep.target)
    known = dataclasses.replace(part, fit=sweep.whole, scatter=whole.scatter).width() / whole.width()
    return Outcome(len(bought), _cost(sweep, bought) / sweep.flops, _width(now, sweep.target) / sweep.width, known)


def buy(sweep: Sweep, order: str = "planned", share: float = SHARE, seed: int = 0) -> set[int]:
    """Indices of the runs that a share of the sweep's FLOPs buys.

    Args:
      order: "planned": from the cheapest runs that determine the law, in rounds, each a plan for all the money left of
        which the first part is carried out; "cheapest" first; or "random", as `seed` has it, what is too dear left out.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    if not 0 < share < 1:
        raise ValueError(f"share={share} of the sweep's FLOPs must lie between 0 and 1")
    budget, n = share * sweep.flops, len(sweep.points)
    if order != "planned":
        return _afford(sweep, range(n) if order == "cheapest" else np.random.default_rng(seed).permutation(n), budget)
    bought = _start(sweep, budget)
    while chosen := _next(sweep, bought, budget):
        bought |= chosen
    return bought


def hindsight(sweep: Sweep, share: float = SHARE) -> float:
    """About the least width over the whole sweep's that a share of its FLOPs can give, had law, scatter and discrepancy
    been known beforehand as the whole sweep shows them: the linearised law's, for a plan from the same start."""
    all_runs, budget = Interval.of(sweep.whole, sweep.target), share * sweep.flops
    bought = _start(sweep, budget)
    model = all_runs.of_only([sweep.whole.points[i] for i in sorted(bought)])
    steps = planner.spend(model, list(_cells(sweep, bought).values()), budget - _cost(sweep, bought))
    return (steps[-1].width if steps else model.width()) / all_runs.width()


def _start(sweep, budget):
    """The fewest cheapest runs, two per parameter at least, that determine the law."""
    for num in range(LEAST_PER_PARAMETER * sweep.whole.num_free, len(sweep.points)):
        bought = set(range(num))
        if _cost(sweep, bought) > budget:
            break
        try:
            sweep.fit(bought, NUM_PLANNING)
            return bought
        except ValueError:  # a design still too narrow: one more
            continue
    raise ValueError(
        f"{budget:.3g} FLOPs do not pay for the cheapest runs that determine {sweep.whole.law}; "
        "a replay needs a wider sweep or a larger share"
    )


def _next(sweep, bought, budget):
    """Indices of the runs of the next round; none when nothing is affordable."""
    left = budget - _cost(sweep, bought)
    cells = {i: cell for i, cell in _cells(sweep, bought).items() if cell.flops <= left}
    if not cells:
        return set()
    model, chosen = Interval.of(sweep.fit(bought, NUM_PLANNING), sweep.target), set()
    for step in planner.spend(model, list(cells.values()), left):
        run = Candidate(step.N, step.D, step.flops)
        chosen.add(next(i for i, cell in cells.items() if i not in chosen and cell == run))
        if _cost(sweep, chosen) >= budget / ROUNDS:
            break
    return chosen


def _afford(sweep, order_n, budget):
    bought, spent = set(), 0.0
    for i in map(int, order_n):
        if spent + sweep.points[i].C <= budget:
            bought.add(i)
            spent += sweep.points[i].C
    return bought


def _cells(sweep, bought):
    return {i: Candidate(p.N, p.D, p.C) for i, p in enumerate(sweep.points) if i not in bought}


def _cost(sweep, bought):
    return sum(sweep.points[i].C for i in sorted(bought))


def _width(made: Fit, target: Candidate) -> float:
    low, high = forecast.loss(made, target.N, target.D)["loss"].intervals[planner.LEVEL]
    return math.log(high / low) if low > 0 else math.inf
