"""Porian et al. 2024 (arXiv 2406.19146): N* ~ C^a of ten RefinedWeb configurations, from Kaplan's .84 to .50.

Their method, with the noise their code applies: a constant .002 nats (the loss-dependent branch compares log losses
with thresholds of losses and never engages).
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.isoflop import isoflop
from slmjax.scaling.points import Point
from slmjax.scaling.verify import Check

SOURCE = "Porian 2024"
POINTS, REFERENCE = "porian_refinedweb_isoflop.csv", "porian_refinedweb_reference.csv"
CONFIGURATION = ("hparams", "warmup", "decay", "param_count", "loss_split")
NOISE = 0.002


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None or not all((folder / name).exists() for name in (POINTS, REFERENCE)):
        return
    num_warned = 0
    for name, (points, published) in configurations(folder).items():
        exponent = isoflop(points, method="akima", noise=NOISE).lines["N"].exponent
        low, high = exponent.interval(0.95)
        yield Check(SOURCE, f"{name}: a", exponent.value, published=published["a"], tolerance=0.005)
        yield Check(SOURCE, f"{name}: 95% low", low, published=published["low"], tolerance=0.01)
        yield Check(SOURCE, f"{name}: 95% high", high, published=published["high"], tolerance=0.01)
        plain = isoflop(points, method="all_points", noise=NOISE)
        num_warned += any("all points" in note for note in plain.notes)
    yield Check(SOURCE, "plain parabolas warned about", num_warned, published=10.0)


def configurations(folder: Path) -> dict[str, tuple[list[Point], dict[str, float]]]:
    """Per configuration its points and what was published: a, low and high."""
    out = {}
    for row in _rows(folder / REFERENCE):
        ends = ("published_n_exponent", "exp_ci_lo", "exp_ci_hi")
        published = {key: float(row[column]) for key, column in zip(("a", "low", "high"), ends, strict=True)}
        out.setdefault(_name(row), ([], published))
    for number, row in enumerate(_rows(folder / POINTS)):
        N, D, C, loss = (float(row[column]) for column in ("params", "tokens", "flops", "loss"))
        out[_name(row)][0].append(Point(f"row {number}", N, D, C, loss, n_convention=row["param_count"]))
    return out


def _name(row):
    return "/".join(row[field] for field in CONFIGURATION)


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
