"""A planner put to the test on a sweep that is already there: from its few cheapest runs, buy the cells the planner
names, refit, and ask how much of the sweep's FLOPs gives the interval that the whole sweep gives.

Letters: n points of the sweep.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from slmjax.scaling import forecast, planner
from slmjax.scaling.allocation import Cost, best
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.forecast import Forecast
from slmjax.scaling.points import Point

NUM_BOOTSTRAP = 300
ROUND = 0.1  # of the sweep's FLOPs: bought, then fitted again
# Widths of percentile intervals from 300 resamples scatter by about as much.
SAME_WIDTH = 1.05


class Round(NamedTuple):
    """After a round: runs and share of the sweep's FLOPs bought so far, and width of the forecast over the sweep's."""

    num_runs: int
    share: float
    width_ratio: float


@dataclasses.dataclass(frozen=True)
class Replay:
    """`width`: of the 95% interval from all runs, in log loss, for a forecast at `flops`."""

    flops: float
    width: float
    rounds: tuple[Round, ...]

    @property
    def share_used(self) -> float:
        """The least share of the FLOPs from which on the interval is, and stays, as narrow as the whole sweep's."""
        reached = 1.0
        for each in reversed(self.rounds):
            if each.width_ratio > SAME_WIDTH:
                break
            reached = each.share
        return reached


def replay(points: Sequence[Point], reach: float, law: str = "chinchilla", seed: int = 0) -> Replay:
    """Buy a sweep cell by cell for the forecast at `reach` times its largest run, until all its FLOPs are spent."""
    points = sorted(points, key=lambda p: (p.C, p.run_id))
    whole = fit(points, law, num_bootstrap=NUM_BOOTSTRAP, seed=seed)
    flops, total = reach * points[-1].C, sum(p.C for p in points)
    N, D = best(whole, flops, Cost("6ND"))
    width = _width(forecast.loss(whole, N, D))
    now, bought = _start(points, law, seed)
    rounds = []
    while True:
        spent = sum(points[i].C for i in bought)
        rounds.append(Round(len(bought), spent / total, _width(forecast.loss(now, N, D)) / width))
        left = [i for i in range(len(points)) if i not in bought]
        if not left:
            return Replay(flops, width, tuple(rounds))
        bought |= _next(now, points, left, planner.Candidate(N, D, flops), ROUND * total)
        now = fit([points[i] for i in sorted(bought)], law, num_bootstrap=NUM_BOOTSTRAP, seed=seed)


def _start(points, law, seed) -> tuple[Fit, set[int]]:
    """A fit to the fewest cheapest runs, three per parameter at least, that determine the law."""
    num_parameters = len(fit(points, law, num_bootstrap=100).theta)
    for num in range(3 * num_parameters, len(points) + 1):
        try:
            return fit(points[:num], law, num_bootstrap=NUM_BOOTSTRAP, seed=seed), set(range(num))
        except ValueError:  # a design still too narrow: one more
            continue
    raise ValueError(f"no proper part of the {len(points)} points determines {law}; a replay needs a wider sweep")


def _next(now, points, left, target, budget):
    """Cells of the next round: what the planner picks within the budget; when it says that none pays, the cheapest."""
    cells = {i: planner.Candidate(points[i].N, points[i].D, points[i].C) for i in left}
    affordable = {i: cell for i, cell in cells.items() if cell.flops <= budget}
    picked, spent = set(), 0.0
    for step in planner.choose_runs(now, target, list(affordable.values()), len(left), budget) if affordable else ():
        bought = planner.Candidate(step.N, step.D, step.flops)
        picked.add(next(i for i, cell in affordable.items() if i not in picked and cell == bought))
    if picked:
        return picked
    for i in left:  # in order of cost
        if picked and spent + cells[i].flops > budget:
            break
        picked.add(i)
        spent += cells[i].flops
    return picked


def _width(made: Forecast) -> float:
    low, high = made["loss"].intervals[planner.LEVEL]
    return math.log(high / low) if low > 0 else math.inf
