"""Published numbers, computed again: every module here compares slmjax with one source. `slmjax fit --verify=DIR`.

A module defines `checks(folder) -> Iterator[Check]`, where `folder` holds the public tables (their names stand in each
module) or is None, when only what needs no table is computed. No registry: a new file here is a new source.
"""

import importlib
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slmjax.scaling import show


class Check(NamedTuple):
    """One number held against its reference.

    `published` is what the source prints, `measured` what an independent computation on the same data found (None where
    there is none). It holds when ours is within `tolerance` of the reference that `against` names (at most `reference +
    tolerance` when `at_most`). With tolerance inf it is only shown: nothing is claimed, so nothing holds or fails.
    """

    source: str
    what: str
    ours: float
    published: float | None = None
    measured: float | None = None
    tolerance: float = 0.0
    against: str = "published"  # or "measured"
    at_most: bool = False

    @property
    def judged(self) -> bool:
        return self.tolerance < math.inf

    @property
    def holds(self) -> bool:
        reference = getattr(self, self.against)
        return self.ours - reference <= self.tolerance if self.at_most else abs(self.ours - reference) <= self.tolerance


def run(folder: Path | None) -> Iterator[Check]:
    """Every check of every source here, in the order of the file names; a source whose table is missing says so."""
    for module in pkgutil.iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{module.name}").checks(folder)


def table(checks: list[Check]) -> str:
    """One line per check, and how many hold."""

    def text(value):
        return "" if value is None else f"{value:.10g}"

    rows = [("source", "what", "ours", "published", "measured", "tolerance", "")]
    rows += [
        (
            check.source,
            check.what,
            text(check.ours),
            text(check.published),
            text(check.measured),
            f"{'<= +' if check.at_most else '+-'}{check.tolerance:.3g} of {check.against}",
            ("holds" if check.holds else "FAILS") if check.judged else "shown",
        )
        for check in checks
    ]
    judged = [check for check in checks if check.judged]
    return "\n".join([*show.columns(rows), "", f"{sum(check.holds for check in judged)} of {len(judged)} hold"]) + "\n"
