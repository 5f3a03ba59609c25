"""The planner replayed on public sweeps: how wide the forecast's interval is with half of their FLOPs.

Every public table of runs over N and D with at least four runs per parameter of the law: Chinchilla, each of Porian's
ten configurations, and the runs of datablations that repeat no data. (Step Law's cells are 17, for five parameters, and
their replay needs all of its FLOPs.) The forecast is the loss at ten times the largest run. The bar is the whole
sweep's 95% interval, within 5%, about the resampling error of such a ratio. Three sweeps at least are to reach it: the
third best is judged, each is shown. Two readings: the intervals as printed, and with scatter and
discrepancy as the whole sweep shows them, so that only what was bought differs. Beside them stand other ways to spend
the same FLOPs, and about the least that hindsight could have reached.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.points import Point, load_points
from slmjax.scaling.replay import Sweep, hindsight, replay
from slmjax.scaling.verify import Check, porian

SOURCE = "planner"
REACH = 10.0
SAME_WIDTH = 0.05
LEAST_RUNS = 20
NUM_SWEEPS = 3


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    planned: dict[str, list[float]] = {}
    for name, points in sweeps(folder):
        if len(points) < LEAST_RUNS:
            continue
        sweep = Sweep.of(points, REACH)
        for how, (printed, known) in _ratios(sweep).items():
            for reading, ratio in (("as printed", printed), ("errors as the whole shows them", known)):
                if how == "planned":
                    planned.setdefault(reading, []).append(ratio)
                what = f"{name}: width with half of the FLOPs over the whole's, {how}, {reading}"
                yield Check(SOURCE, what, ratio, published=1.0, tolerance=math.inf, at_most=True)
        what = f"{name}: the least in hindsight, errors as the whole shows them"
        yield Check(SOURCE, what, hindsight(sweep), published=1.0, tolerance=math.inf, at_most=True)
    for reading, ratios in planned.items():
        if len(ratios) >= NUM_SWEEPS:
            what = f"width with half of the FLOPs, planned, {reading}: number {NUM_SWEEPS} of {len(ratios)} sweeps"
            third = sorted(ratios)[NUM_SWEEPS - 1]
            yield Check(SOURCE, what, third, published=1.0, tolerance=SAME_WIDTH, at_most=True)


def _ratios(sweep):
    """By order of buying: ratio of the widths as printed, and with errors as the whole sweep shows them."""
    ways = {"planned": "planned", "cheapest first": "cheapest", "random order": "random"}
    made = {said: replay(sweep, order) for said, order in ways.items()}
    return {said: (each.width_ratio, each.known_ratio) for said, each in made.items()}


def sweeps(folder: Path) -> Iterator[tuple[str, list[Point]]]:
    """The sweeps whose tables are there."""
    chinchilla, datablations = folder / "chinchilla_epoch.csv", folder / "datablations_c4_fit182.csv"
    if chinchilla.exists():
        yield "Chinchilla", list(load_points([chinchilla]).drop_highest(5).points)
    if all((folder / name).exists() for name in (porian.POINTS, porian.REFERENCE)):
        for name, (points, _) in porian.configurations(folder).items():
            yield f"Porian {name}", points
    if datablations.exists():
        columns = {"N": "params", "D": "tokens", "loss": "loss", "U": "unique_tokens"}
        points = load_points([datablations], columns).points
        yield "datablations, fresh data", [p for p in points if p.inputs["U"] >= p.D]
