"""Where points came from: digests of their sources, and the public tables among them whose published fits are known.

A table is known by its bytes, never by its name; published parameters describe it only with as many runs as they were
fitted to.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from slmjax.scaling.fit import Fit
from slmjax.scaling.points import PointSet


class Source(NamedTuple):
    """A file, or the folder of a run or of event files; sha256 over the bytes of its records."""

    path: str
    num_points: int
    sha256: str


class Known(NamedTuple):
    """A public table by its digest: what it is, and which published parameters (`Law.published`) describe how many of
    its runs."""

    sha256: str
    title: str
    law: str
    label: str
    num_points: int


KNOWN = (
    Known(
        "af1fa61368ae2671a9dd4e027860588d3ad77ff5372642211c139a363d95fd7f",
        "the Chinchilla runs as Besiroglu et al. 2024 recovered them, the five of highest loss left out",
        "chinchilla",
        "besiroglu2024",
        240,
    ),
    Known(
        "8ab8299ef2ab578fbfd4865b2c0155fb3503e950708b9641c160e507c01e6acf",
        "the runs of the data-constrained fit of Muennighoff et al. 2023",
        "data_constrained",
        "muennighoff2023",
        182,
    ),
    Known(
        "6571e877469a44cb50b2d05e1fa485587369ee1c47941a4b3b2bfef80496f1b2",
        "the vocabulary runs of Tao et al. 2024 from 2.18e17 FLOPs",
        "vocabulary_parity",
        "tao2024",
        1054,
    ),
)


def sources(point_set: PointSet) -> list[Source]:
    """Every source of the points that is still there, in their order; runs of one study folder are one source."""
    paths = {}
    for p in point_set.points:
        path = Path(p.source)
        if p.source and path.exists():
            shared = path.parent if (path.parent / "study.json").exists() else path
            paths.setdefault(shared, []).append(path)
    return [Source(shared.as_posix(), len(inner), _digest(sorted(set(inner)))) for shared, inner in paths.items()]


def _digest(paths):
    found = hashlib.sha256()
    if len(paths) == 1 and paths[0].is_file():  # as sha256sum prints it
        found.update(paths[0].read_bytes())
        return found.hexdigest()
    for path in paths:
        records = [*path.glob("attempt-*.jsonl"), *path.rglob("*tfevents*")] if path.is_dir() else [path]
        for record in sorted(records):
            found.update(f"{path.name}/{record.name}\0".encode() + record.read_bytes())
    return found.hexdigest()


def known(found: list[Source], fit: Fit) -> Known | None:
    """The published fit of the same law to the same runs, or None."""
    if len(found) != 1:
        return None
    return next(
        (
            table
            for table in KNOWN
            if (table.sha256, table.law, table.num_points) == (found[0].sha256, fit.law, len(fit.points))
        ),
        None,
    )
