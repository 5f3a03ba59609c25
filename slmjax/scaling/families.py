"""Model families of one study on one compute axis: each fitted alone, then compared at equal loss.

No law mixes exact losses and bounds: families are split first. The comparison across kinds is made knowingly, and says
so wherever it stands.

N counts the parameters that a token passes, in every family; C the training FLOPs as logged, a router's included.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slmjax.scaling.fit import Fit
from slmjax.scaling.leverage import (
    Leverage,
    bound_said,
    inside_budgets,
    leverage_table,
    measured_leverage,
    ratio_said,
)
from slmjax.scaling.leverage_pairs import PairedLeverage, paired_leverage
from slmjax.scaling.points import PointSet, load_points

ACTIVE = "active_non_embedding"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How much more compute one family needs than the other for an equal loss: by their laws, and by pairs of runs.

    names: the family whose compute is sought, and the one whose compute is given. Of an exact loss and a bound it is
      the bound's compute that is sought, so that the ratio is a bound as well; else that of the study's first family.
    kinds: of their losses.
    leverages, pairs: the result, or the sentence why there is none.
    """

    names: tuple[str, str]
    kinds: tuple[str, str]
    leverages: tuple[Leverage, ...] | str
    pairs: PairedLeverage | str

    @property
    def labels(self) -> tuple[str, str]:
        """The names, bounds marked as such."""
        sought, given = map(label, self.names, self.kinds)
        return sought, given

    @property
    def word(self) -> str:
        return "leverage" if self.kinds[0] == self.kinds[1] else "compute multiplier"

    @property
    def title(self) -> str:
        """A leverage is praise of the given family, a multiplier the price of the sought one."""
        sought, given = self.labels
        return f"{self.word} of " + (f"{given} over {sought}" if self.word == "leverage" else f"{sought} over {given}")

    @property
    def reading(self) -> str:
        """What bounds make of the ratio; nothing where both losses are exact."""
        return bound_said(self.names, self.kinds)

    def chosen(self) -> Leverage | None:
        """The one to quote: at the largest compute where no law is extrapolated, else where the least is."""
        if isinstance(self.leverages, str):
            return None
        inside = [one for one in self.leverages if not one.extrapolated]
        return inside[-1] if inside else min(self.leverages, key=lambda one: abs(math.log(max(one.sought_reach, 1e-9))))

    def table(self) -> str:
        parts = [self.title, ""]
        for title, made, text in (
            ("by the fitted laws", self.leverages,
             lambda: leverage_table(list(self.leverages), self.labels, self.word, self.reading)),
            ("by pairs of runs, no law", self.pairs, lambda: self.pairs.table(self.word, self.reading)),
        ):  # fmt: skip
            parts.append(f"{title}: not here: {made}\n" if isinstance(made, str) else f"{title}\n{text()}")
        return "\n".join(parts)

    def to_json(self) -> dict:
        """An unbounded end is None."""
        sought, given = self.names
        by_laws, by_pairs = ({"refused": made} if isinstance(made, str) else made
                             for made in (self.leverages, self.pairs))  # fmt: skip
        if not isinstance(self.leverages, str):
            by_laws = [
                {"C": one.flops, "loss": one.loss, **_ratio(one), "reach": {sought: _finite(one.sought_reach),
                 given: one.given_reach}, "extrapolated": one.extrapolated} for one in self.leverages
            ]  # fmt: skip
        if not isinstance(self.pairs, str):
            by_pairs = [
                {"D": one.D, "C": one.flops, "loss_difference": one.difference, **_ratio(one),
                 "num_sizes": one.num_sizes, "num_extrapolated": one.num_beyond} for one in self.pairs.means
            ]  # fmt: skip
        return {
            "title": self.title,
            "ratio": ratio_said(self.names),
            "sought": sought,
            "given": given,
            "loss_kinds": dict(zip(self.names, self.kinds, strict=True)),
            "bound": self.reading or None,
            "by_laws": by_laws,
            "by_pairs": by_pairs,
        }


def label(name: str, kind: str) -> str:
    """A family's name where its loss stands beside others: a bound is told from a loss."""
    return name if kind == "exact" else f"{name} ({kind})"


def _ratio(one):
    intervals = {str(level): [_finite(end) for end in ends] for level, ends in one.intervals.items()}
    return {"multiplier": _finite(one.value), "intervals": intervals}


def _finite(value):
    return value if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Families:
    """Every family's points and fit, or why it has none, the one to compare with first, and the comparisons."""

    points: Mapping[str, PointSet]
    fits: Mapping[str, Fit]
    refusals: Mapping[str, str]
    comparisons: tuple[Comparison, ...]

    @property
    def loss_kinds(self) -> dict[str, str]:
        return {name: point_set.loss_kind for name, point_set in self.points.items()}

    @property
    def labels(self) -> dict[str, str]:
        """Of every family its name, bounds marked as such."""
        return {name: label(name, kind) for name, kind in self.loss_kinds.items()}

    def to_json(self) -> dict:
        """What no fit alone says: kinds of loss, families without a fit, and the comparisons."""
        comparisons = [comparison.to_json() for comparison in self.comparisons]
        return {"loss_kinds": self.loss_kinds, "refusals": dict(self.refusals), "comparisons": comparisons}


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
    kinds = {name: points[name].loss_kind for name in (first, second)}
    sought, given = (second, first) if kinds[first] == "exact" != kinds[second] else (first, second)
    missing = [f"{name} has no law: {refusals[name]}" for name in (first, second) if name not in fits]
    leverages = "; ".join(missing) or _said(
        lambda: tuple(
            measured_leverage(fits[sought], fits[given], flops, mixed=("loss_kind",))
            for flops in inside_budgets(fits[sought], fits[given])
        )
    )
    made = Comparison((sought, given), (kinds[sought], kinds[given]), leverages, "")
    return dataclasses.replace(made, pairs=_said(lambda: _paired(points[sought], points[given], made.labels)))


def _paired(sought: PointSet, given: PointSet, names):
    """Kinds of loss may differ between the two, knowingly, but not within one of them unless its user said so."""
    sought.require_comparable()
    given.require_comparable()
    mixed = (*sought.mixed, *given.mixed, "family", "loss_kind")
    dataclasses.replace(sought, points=sought.points + given.points, mixed=mixed).require_comparable()
    return paired_leverage(sought.points, given.points, names)


def _said(make):
    try:
        return make()
    except ValueError as error:
        return str(error)


def family_file(path: str | Path, family: str) -> Path:
    """Where the fit of a further family is kept: fit-moe.json beside fit.json."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{family}{path.suffix}")


def comparisons_file(path: str | Path) -> Path:
    """Where what families say of each other is kept: fit.comparisons.json beside fit.json."""
    return Path(path).with_suffix(".comparisons.json")
