"""The planner replayed on public sweeps: the share of their FLOPs that gives the whole sweep's forecast interval.

The forecast is the loss at ten times the largest run. Buying starts from the few cheapest runs; the share is the least
from which on the 95% interval stays as narrow as with all runs (within 5%, the resampling error of such a width).
"""

from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.points import Point, load_points
from slmjax.scaling.replay import replay
from slmjax.scaling.verify import Check

SOURCE = "planner"
REACH = 10.0
MOST_FLOPS = 0.5
TUNED = ("hparams=tuned", "warmup=short", "decay=const", "param_count=standard", "loss_split=val")
COSINE = ("hparams=base", "warmup=short", "decay=chinchilla", "param_count=standard", "loss_split=val")


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    for name, points in sweeps(folder):
        made = replay(points, REACH)
        what = f"{name}: share of the FLOPs of {len(points)} runs that gives their interval"
        yield Check(SOURCE, what, made.share_used, published=MOST_FLOPS, tolerance=0.0, at_most=True)


def sweeps(folder: Path) -> Iterator[tuple[str, list[Point]]]:
    """The sweeps whose tables are there. Of datablations, the runs that repeat no data."""
    chinchilla, porian = folder / "chinchilla_epoch.csv", folder / "porian_refinedweb_isoflop.csv"
    datablations = folder / "datablations_c4_fit182.csv"
    if chinchilla.exists():
        yield "Chinchilla", list(load_points([chinchilla]).drop_highest(5).points)
    if porian.exists():
        yield "Porian, tuned", list(load_points([porian], where=TUNED).points)
        yield "Porian, Chinchilla's schedule", list(load_points([porian], where=COSINE).points)
    if datablations.exists():
        columns = {"N": "params", "D": "tokens", "loss": "loss", "U": "unique_tokens"}
        points = load_points([datablations], columns).points
        yield "datablations, fresh data", [p for p in points if p.inputs["U"] >= p.D]
