"""What a fit reads: Points, the runs that are none and why, and the refusal to mix what cannot be compared.

No reading of files and no fitting lives here. Whatever leaves a PointSet stays listed in it as Excluded.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from slmjax.scaling.points.names import did_you_mean, is_empty, listing, number

# Of a mixture of experts, non_embedding counts every expert, active_non_embedding those that a token passes.
N_CONVENTIONS = ("non_embedding", "active_non_embedding", "total", "active")
FLOPS_CONVENTIONS = ("with_head", "without_head")


class Point(NamedTuple):
    """One finished run: N parameters, D tokens, C training FLOPs, held-out loss (nats per token) and its error.

    N, D or C is None where a table does not give it, for a law that does not read it.
    """

    run_id: str
    N: float | None
    D: float | None
    C: float | None
    loss: float
    se: float | None = None
    family: str | None = None
    tags: Mapping[str, Any] = {}
    n_convention: str = "unknown"
    flops_convention: str = "unknown"
    loss_kind: str = "exact"
    tokenizer: str | None = None
    corpus: str | None = None
    epochs: float | None = None
    source: str = ""
    inputs: Mapping[str, float] = {}  # what a law of more than N, D and C reads: E experts, V vocabulary, ...
    loss_unit: str = "nats per token"

    def value(self, name: str) -> float:
        """An input of a law, or the loss, by name."""
        return self.inputs[name] if name in self.inputs else getattr(self, name)


class Excluded(NamedTuple):
    """A run that did not become a Point, and why."""

    run_id: str
    reason: str
    tags: Mapping[str, Any] = {}
    source: str = ""


# Point field: what is mixed when two points differ in it, and the way out.
CONVENTION_FIELDS = {
    "n_convention": ("ways of counting N", "load all sources with the same N, or fit them one at a time"),
    "flops_convention": ("ways of counting FLOPs", "load all sources with the same FLOPs, or fit them one at a time"),
    "loss_unit": ("units of loss", "give every source in one unit, as --columns=loss=column:bits turns bits into nats"),
    "loss_kind": ("exact losses and bounds", "fit the objectives separately"),
    "tokenizer": ("tokenizers (their losses per token are not comparable)", "fit each tokenizer's runs separately"),
    "corpus": ("corpora", "fit each corpus' runs separately"),
    "family": ("model families", "select one family first"),
}
# What a user may mix knowingly, under the name the flag takes. Two units of one quantity are never one quantity.
MIXABLE = {
    "n": "n_convention",
    "flops": "flops_convention",
    "loss_kind": "loss_kind",
    "tokenizer": "tokenizer",
    "corpus": "corpus",
    "family": "family",
}


@dataclasses.dataclass(frozen=True)
class PointSet:
    """Points of one or several sources, the runs left out of them, and remarks a reader must see.

    mixed: the Point fields in which the points may differ, because the user said so.
    """

    points: tuple[Point, ...]
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.points)

    def families(self) -> tuple[str, ...]:
        """Model families, "dense" first and the others in order of appearance; () where some points name none."""
        found = dict.fromkeys(p.family for p in self.points)
        return () if None in found else tuple(sorted(found, key=lambda family: family != "dense"))

    @property
    def loss_kind(self) -> str:
        """exact or bound, or how they are mixed."""
        kinds = self._values("loss_kind")
        return kinds[0] if len(kinds) == 1 else f"mixed: {', '.join(kinds)}"

    def only(self, family: str) -> "PointSet":
        """The points of one model family; the others become Excluded."""
        return self._split(lambda p: None if p.family == family else f"family {p.family!r}, not {family!r}")

    def where(self, condition: "Condition") -> "PointSet":
        """The points that meet a condition on their fields, inputs or tags; the others become Excluded."""
        known = {name for p in self.points for name in point_cells(p)}
        if self.points and condition.name not in known:
            raise ValueError(
                f"--where={condition.text}: no {condition.name!r} here{did_you_mean(condition.name, known)}; "
                f"there are {listing(sorted(known))}"
            )
        kept = self._split(lambda p: condition.fault(point_cells(p)))
        num = len(self) - len(kept)
        return kept.noted(f"--where={condition.text} leaves out {num} runs") if num else kept

    def drop_highest(self, num: int) -> "PointSet":
        """Leaves out the `num` points of highest loss, the habit of refits of published figures; a note says so."""
        if not 0 <= num < len(self.points):
            raise ValueError(f"--drop_highest={num} of {len(self.points)} points; give a number from 0 to the others")
        dropped = {id(p) for p in sorted(self.points, key=lambda p: -p.loss)[:num]}
        reason = f"one of the {num} highest losses (--drop_highest={num})"
        kept = self._split(lambda p: reason if id(p) in dropped else None)
        return kept.noted(f"the {num} points of highest loss are left out (--drop_highest={num})") if num else self

    def exclude(self, reasons: Mapping[str, str]) -> "PointSet":
        """Leaves out runs by id, each for its reason; a note names them."""
        known = {p.run_id for p in self.points}
        for run_id in reasons:
            if run_id not in known:
                raise ValueError(f"--exclude={run_id}: no point is of a run with this id{did_you_mean(run_id, known)}")
        kept = self._split(lambda p: reasons.get(p.run_id))
        return kept.noted(*(f"left out by hand: {run_id}: {reason}" for run_id, reason in reasons.items()))

    def mix(self, names: Collection[str]) -> "PointSet":
        """Allows the points to differ in these of MIXABLE. What does differ is noted, and `conventions` shows it."""
        for name in names:
            if name not in MIXABLE:
                raise ValueError(f"--mix={name!r} is not one of {', '.join(MIXABLE)}{did_you_mean(name, MIXABLE)}")
        fields = tuple(MIXABLE[name] for name in names)
        found = {name: self._values(MIXABLE[name]) for name in names}
        notes = [
            f"fitted together although they differ in {name}: {', '.join(values)} (--mix={name})"
            for name, values in found.items()
            if len(values) > 1
        ]
        return dataclasses.replace(self, mixed=self.mixed + fields).noted(*notes)

    def noted(self, *notes: str) -> "PointSet":
        return dataclasses.replace(self, notes=self.notes + notes)

    def conventions(self) -> dict[str, str | None]:
        """What N, C and the loss of these points mean. Raises ValueError when two points mean different things."""
        self.require_comparable()
        return {
            name: getattr(self.points[0], name)
            if len(self._values(name)) == 1
            else f"mixed: {', '.join(self._values(name))}"
            for name in CONVENTION_FIELDS
        }

    def require_comparable(self) -> None:
        """Raise ValueError unless all points share the conventions that decide what N, D, C and loss mean."""
        for name, (what, way_out) in CONVENTION_FIELDS.items():
            values = self._values(name)
            if len(values) > 1 and name not in self.mixed:
                told = next((f", or allow it: --mix={said}" for said, field in MIXABLE.items() if field == name), "")
                raise ValueError(
                    f"the points mix {what}: {', '.join(values)}; one law cannot describe both; {way_out}{told}"
                )

    def _values(self, field: str) -> list[str]:
        return sorted({str(getattr(p, field)) for p in self.points})

    def _split(self, fault: Callable[[Point], str | None]) -> "PointSet":
        """The points without a fault; the others become Excluded with theirs as the reason."""
        faults = [(p, fault(p)) for p in self.points]
        left_out = tuple(Excluded(p.run_id, why, p.tags, p.source) for p, why in faults if why is not None)
        kept = tuple(p for p, why in faults if why is None)
        return dataclasses.replace(self, points=kept, excluded=self.excluded + left_out)


def point_cells(p: Point) -> dict[str, Any]:
    """Everything of a point that a condition may name; its own fields come before tags of the same name."""
    hidden = ("tags", "inputs", "source")
    return {**p.tags, **p.inputs, **{name: getattr(p, name) for name in p._fields if name not in hidden}}


# --- conditions ------------------------------------------------------------------------------------------------------

COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """`name=value`, also !=, <, <=, > and >=; numbers compare as numbers, other cells as text, by = and != alone."""

    name: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        found = re.fullmatch(r"(.+?)(<=|>=|!=|=|<|>)(.*)", text)
        if not found:
            raise ValueError(f"--where={text!r} must read column=value, or with !=, <, <=, > or >= in the middle")
        condition = cls(*(part.strip() for part in found.groups()))
        if condition.sign not in ("=", "!=") and number(condition.value) is None:
            raise ValueError(f"--where={text!r}: {condition.sign} compares numbers, and {condition.value!r} is none")
        return condition

    @property
    def text(self) -> str:
        return f"{self.name}{self.sign}{self.value}"

    def fault(self, cells: Mapping[str, Any]) -> str | None:
        """Why these cells do not meet the condition; None when they do. An empty cell meets no inequality."""
        cell = "" if is_empty(cells.get(self.name)) else cells[self.name]
        left, right = number(cell), number(self.value)
        if left is None or right is None:
            met = self.sign in ("=", "!=") and COMPARISONS[self.sign](str(cell).strip(), self.value)
        else:
            met = COMPARISONS[self.sign](left, right)
        return None if met else f"not {self.text} (--where)"
