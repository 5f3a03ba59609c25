"""Back-tests on public sweeps: how many hidden, more expensive runs the forecast intervals hold.

The bands are our own promise (nominal 95% within .90 to .98, nominal 80% within .75 to .85), pooled over all forecasts
of all sweeps, a run counting once at each cut that hides it. Sweeps with repeated data (datablations) are fitted with
the law that knows of repetition; checkpoints of one vocabulary run are one run.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.backtest import BackTest, back_test
from slmjax.scaling.fit import fit
from slmjax.scaling.points import Point, load_points
from slmjax.scaling.verify import Check

SOURCE = "back-tests"
BANDS = {0.8: (0.80, 0.05), 0.95: (0.94, 0.04)}
NUM_BOOTSTRAP = 100
LEAST_VOCABULARY_FLOPS = 2.18e17  # the rows of the published fit
CONFIGURATION = ("hparams", "warmup", "decay", "param_count", "loss_split")


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    pooled: list[BackTest] = []
    for name, law, sweeps in sources(folder):
        tested = [back_test(fit(points, law, num_bootstrap=NUM_BOOTSTRAP)) for points in sweeps]
        pooled += tested
        for level, (middle, _) in BANDS.items():
            share, num = _pooled(tested, level)
            # One source is no test of the promise: its forecasts go wrong together. Shown, and held to nothing.
            what = f"{name}: coverage of {num} forecasts, nominal {level:.0%} (of record)"
            yield Check(SOURCE, what, share, published=middle, tolerance=math.inf)
    for level, (middle, tolerance) in BANDS.items():
        share, num = _pooled(pooled, level)
        what = f"all sweeps: coverage of {num} forecasts, nominal {level:.0%}"
        yield Check(SOURCE, what, share, published=middle, tolerance=tolerance)


def sources(folder: Path) -> Iterator[tuple[str, str, list[list[Point]]]]:
    """(name, law, sweeps) of every table that is there."""
    readers = (
        ("Chinchilla", "chinchilla_epoch.csv", "chinchilla", _chinchilla),
        ("Porian, ten configurations", "porian_refinedweb_isoflop.csv", "chinchilla", porian),
        ("datablations", "datablations_c4_fit182.csv", "data_constrained", _datablations),
        ("Step Law, best of each cell", "steplaw_dense.csv", "chinchilla", _step_law),
        ("routing", "routing_clark2022_dense_sbase_rlr.csv", "clark_routing", _routing),
        ("vocabulary", "vocab_tao2024.csv", "vocabulary", _vocabulary),
    )
    for name, table, law, read in readers:
        if (folder / table).exists():
            yield name, law, read(folder / table)


def _chinchilla(path):
    return [list(load_points([path]).drop_highest(5).points)]


def porian(path: Path) -> list[list[Point]]:
    """One sweep per configuration, in the order of the table."""
    sweeps: dict[tuple[str, ...], list[Point]] = {}
    for i, row in enumerate(_rows(path)):
        key = tuple(row[name] for name in CONFIGURATION)
        point = _point(f"row {i}", row["params"], row["tokens"], row["flops"], row["loss"])
        sweeps.setdefault(key, []).append(point)
    return list(sweeps.values())


def _datablations(path):
    return [
        [
            _point(r["run"], N, D, 6 * float(N) * float(D), r["loss"], U=r["unique_tokens"])
            for r in _rows(path)
            for N, D in [(r["params"], r["tokens"])]
        ]
    ]


def _step_law(path):
    """The lowest loss over learning rates and batch sizes of each (N, D)."""
    best: dict[tuple[float, float], float] = {}
    for r in _rows(path):
        cell = (float(r["N"]), float(r["D"]))
        best[cell] = min(best.get(cell, float("inf")), float(r["loss"]))
    return [[_point(f"{N:g} {D:g}", N, D, 6 * N * D, loss) for (N, D), loss in sorted(best.items())]]


def _routing(path):
    """Each router, as published: one expert per token, routing in every second layer. D is the same for all runs."""
    sweeps: dict[str, list[Point]] = {"S-Base": [], "RL-R": []}
    for r in _rows(path):
        if r["router_type"] in sweeps and r["k"] == "1" and float(r["routing_frequency"]) == 0.5:
            C = float(r["flops_per_step"]) * float(r["step"])
            N, loss = r["dense_parameter_count"], r["loss_validation"]
            point = _point(r["hyper_id"], N, C / (6 * float(N)), C, loss, E=r["num_experts"])
            sweeps[r["router_type"]].append(point)
    return list(sweeps.values())


def _vocabulary(path):
    points = []
    for r in _rows(path):
        if float(r["FLOPs"]) >= LEAST_VOCABULARY_FLOPS:
            N, V, H = r["Non_vocab_parameters"], r["vocab_size"], r["num_characters"]
            points.append(_point(f"{N} {V}", N, H, r["FLOPs"], r["Lossu"], V=V, d=r["embed_dim"], H=H))
    return [points]


def _point(run_id, N, D, C, loss, **inputs):
    values = {name: float(value) for name, value in inputs.items()}
    return Point(run_id, float(N), float(D), float(C), float(loss), inputs=values)


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _pooled(tested, level):
    """Share of hidden runs held, and their number."""
    num = sum(t.num_hidden for t in tested)
    return sum(t.covered(level) * t.num_hidden for t in tested if t.outcomes) / max(num, 1), num
