"""Model families of one study on one compute axis: each fitted alone, then compared at equal loss.

N counts the parameters that a token passes, in every family; C the training FLOPs as logged, a router's included.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slmjax.scaling.fit import Fit
from slmjax.scaling.leverage import Leverage, inside_budgets, leverage_table, measured_leverage
from slmjax.scaling.leverage_pairs import PairedLeverage, paired_leverage
from slmjax.scaling.points import PointSet, load_points

ACTIVE = "active_non_embedding"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How much more compute the first family needs than the second: by their laws, and by pairs of runs.

    leverages, pairs: the result, or the sentence why there is none.
    """

    names: tuple[str, str]
    leverages: tuple[Leverage, ...] | str
    pairs: PairedLeverage | str

    def table(self) -> str:
        first, second = self.names
        parts = [f"leverage of {second} over {first}", ""]
        for title, made, text in (
            ("by the fitted laws", self.leverages, lambda: leverage_table(list(self.leverages), self.names)),
            ("by pairs of runs, no law", self.pairs, lambda: self.pairs.table()),
        ):
            parts.append(f"{title}: not here: {made}\n" if isinstance(made, str) else f"{title}\n{text()}")
        return "\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Families:
    """Every family's points and fit, or why it has none, the one to compare with first, and the comparisons."""

    points: Mapping[str, PointSet]
    fits: Mapping[str, Fit]
    refusals: Mapping[str, str]
    comparisons: tuple[Comparison, ...]


def load(sources: Sequence[str | Path], n: str | None = None, **reading) -> PointSet:
    """As `load_points`, but where study folders hold several families and `n` is None, N is active_non_embedding."""
    point_set = load_points(sources, n=n, **reading)
    studies = all((Path(source) / "study.json").exists() for source in sources)
    if n is None and studies and len(point_set.families()) > 1:
        return load_points(sources, n=ACTIVE, **reading)
    return point_set


def fit_families(point_set: PointSet, fit_one: Callable[[PointSet], Fit]) -> Families:
    """Each family fitted alone, and the others compared with the first.

    Args:
      point_set: of several families.
      fit_one: a fit of comparable points.
    Raises:
      ValueError: fewer than two families.
    """
    names = point_set.families()
    if len(names) < 2:
        raise ValueError(f"the points are of {len(names)} model families; a comparison needs two or more")
    points, fits, refusals = {name: point_set.only(name) for name in names}, {}, {}
    for name in names:
        try:
            fits[name] = fit_one(points[name])
        except ValueError as error:  # said beside the fits of the others
            refusals[name] = str(error)
    first, *others = names
    comparisons = tuple(_compare(first, name, points, fits, refusals) for name in others)
    return Families(points, fits, refusals, comparisons)


def _compare(first, second, points, fits, refusals):
    missing = [f"{name} has no law: {refusals[name]}" for name in (first, second) if name not in fits]
    leverages = "; ".join(missing) or _said(
        lambda: tuple(
            measured_leverage(fits[first], fits[second], flops) for flops in inside_budgets(fits[first], fits[second])
        )
    )
    pairs = _said(lambda: _paired(points[first], points[second], (first, second)))
    return Comparison((first, second), leverages, pairs)


def _paired(first: PointSet, second: PointSet, names):
    dataclasses.replace(first, points=first.points + second.points, mixed=("family",)).require_comparable()
    return paired_leverage(first.points, second.points, names)


def _said(make):
    try:
        return make()
    except ValueError as error:
        return str(error)


def family_file(path: str | Path, family: str) -> Path:
    """Where the fit of a further family is kept: fit-moe.json beside fit.json."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{family}{path.suffix}")
