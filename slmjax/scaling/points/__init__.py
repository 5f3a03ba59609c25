"""Points for fitting: one row (N, D, C, loss) per finished run, from study folders, tables and TensorBoard folders.

Nothing is dropped quietly: every run that is not a Point is an Excluded with its reason. Every Point carries what its
numbers mean (which N, which FLOPs, exact or bound loss, tokenizer, corpus), and `PointSet.require_comparable` refuses
to mix them. No fitting and no plotting lives here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slmjax.scaling.points import events, tables
from slmjax.scaling.points.columns import resolve
from slmjax.scaling.points.names import did_you_mean, listing
from slmjax.scaling.points.point import (
    FLOPS_CONVENTIONS,
    MIXABLE,
    N_CONVENTIONS,
    Condition,
    Excluded,
    Point,
    PointSet,
    point_cells,
)
from slmjax.scaling.points.rows import ROWS, points_of_table
from slmjax.scaling.points.runs import Run, load_runs, points_of_study

__all__ = [
    "FLOPS_CONVENTIONS",
    "MIXABLE",
    "N_CONVENTIONS",
    "ROWS",
    "Condition",
    "Excluded",
    "Point",
    "PointSet",
    "Run",
    "load_points",
    "load_runs",
]


class Reading(NamedTuple):
    """How tables are read: the arguments of `load_points`, checked."""

    columns: Mapping[str, str] | None
    n: str | None
    flops: str | None
    rows: str
    conditions: Sequence[Condition]
    join: tuple[str | Path, str] | None
    reads: Sequence[str]


def load_points(
    sources: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    n: str | None = None,
    flops: str | None = None,
    rows: str = "last",
    where: Sequence[str] = (),
    join: tuple[str | Path, str] | None = None,
    reads: Sequence[str] = ("N", "D"),
) -> PointSet:
    """Points from study folders, `.csv`, `.tsv` and `.jsonl` files, and folders of TensorBoard event files.

    Args:
      sources: paths. A folder must hold a `study.json` or event files.
      columns: for all but studies: names to columns, or to products of columns and numbers (see `columns`):
        {"N": "params_m*1e6", "D": "step*524288", "loss": "val/loss:bits"}. Also C, se, step, planned, epochs; family,
        run_id, status, tokenizer, corpus, loss_kind; metric and value of a long table; and any other input of a law,
        such as U, E or V. Without it the headers must be these names, or params, tokens, flops. Without C, C = 6 N D,
        and a note says so.
      n: which parameter count N is, one of N_CONVENTIONS. It chooses a study's (non_embedding when None) and tells what
        a table's column holds (unknown when None). To compare families, see `families.load`.
      flops: the same for C: with_head (a study's when None) or without_head.
      rows: which rows of a run with several become points: its last, the one of least loss, or all.
      where: conditions such as "family=dense" or "C<1e21", on a table's columns, or on fields and tags of points.
      join: a table with one row per run, and its column of run ids: its columns stand beside each row of the run.
      reads: what the law at hand reads (`Law.inputs`): the columns a table must give beside the loss.
    Raises:
      ValueError: what cannot be read or would have to be guessed, with its file and row.
    """
    for name, value, known in (("n", n, N_CONVENTIONS), ("flops", flops, FLOPS_CONVENTIONS), ("rows", rows, ROWS)):
        if value not in known and not (value is None and name != "rows"):
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    for source in sources:
        if "://" in str(source):
            raise ValueError(f"{source} is not on this machine; first: slmjax study pull --study={source} --out=DIR")
    reading = Reading(columns, n, flops, rows, [Condition.parse(text) for text in where], join, reads)
    points, excluded, notes = [], [], []
    sources = [Path(source) for source in sources]
    if sources and (columns or join) and all((source / "study.json").exists() for source in sources):
        raise ValueError("--columns and --join say how to read tables, and every source is a study folder")
    stems = [source.stem for source in sources]
    for i, source in enumerate(sources):
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        if (source / "study.json").exists():
            found, left_out = points_of_study(source, n or "non_embedding", flops or "with_head")
            made = _meeting(PointSet(tuple(found), tuple(left_out)), reading.conditions)
        else:
            table = _read(source)
            if stems.count(source.stem) > 1:  # a/runs.csv and b/runs.csv hold different runs
                table = dataclasses.replace(table, label=source.as_posix())
            made = _of_table(table, reading)
        points += [(i, p) for p in made.points]
        excluded += made.excluded
        notes += made.notes
    points, duplicates = _split_duplicates(points)
    notes += _shared_ids(points) + _repeated(points)
    return PointSet(tuple(points), tuple(excluded + duplicates), tuple(notes))


def _read(source: Path) -> tables.Table:
    if source.is_dir():
        if not events.holds_events(source):
            raise ValueError(f"{source} is no study folder (it has no study.json) and holds no TensorBoard event files")
        return events.read_events(source)
    if source.suffix not in tables.FILES:
        raise ValueError(f"{source}: not a study folder, a folder of event files, or a {', '.join(tables.FILES)} file")
    return tables.read_table(source)


def _of_table(table: tables.Table, reading: Reading) -> PointSet:
    """Reshaped, joined, mapped and filtered."""
    table = tables.reshape(table, reading.columns)
    excluded = []
    if reading.join is not None:
        path, key = reading.join
        run_header = {**table.by_layout, **(reading.columns or {})}.get("run_id")
        table, missing = tables.join(table, tables.read_table(Path(path)), key, run_header)
        table = tables.without_runs(table, run_header, missing)
        excluded = [Excluded(run_id, f"not in {path}", source=str(table.path)) for run_id in missing]
    columns = resolve(str(table.path), table.headers, reading.columns, table.by_layout, reading.reads)
    on_rows = [c for c in reading.conditions if c.name in table.headers]
    on_points = [c for c in reading.conditions if c.name not in table.headers]
    known = (*table.headers, *point_cells(Point("", 0, 0, 0, 0)), *columns.inputs)
    for condition in on_points:
        if condition.name not in known:
            raise ValueError(
                f"{table.path}: --where={condition.text}: no column {condition.name!r}"
                f"{did_you_mean(condition.name, known)}; it has {listing(table.headers)}"
            )
    points, left_out, notes = points_of_table(table, columns, reading.n, reading.flops, reading.rows, on_rows)
    return _meeting(PointSet(tuple(points), tuple(excluded + left_out), (*table.notes, *notes)), on_points)


def _meeting(points: PointSet, conditions: Sequence[Condition]) -> PointSet:
    for condition in conditions:
        points = points.where(condition)
    return points


def _repeated(points) -> list[str]:
    repeated = [p.epochs for p in points if p.epochs is not None and p.epochs > 1]
    if not repeated:
        return []
    return [f"{len(repeated)} of {len(points)} runs repeat data (up to {max(repeated):.3g} epochs)"]


def _shared_ids(points) -> list[str]:
    """A bootstrap draws all points of a run together, and knows runs by their ids."""
    sources: dict[str, set[str]] = {}
    for p in points:
        sources.setdefault(p.run_id, set()).add(p.source)
    shared = [run_id for run_id, of in sources.items() if len(of) > 1]
    return [f"taken for one run because sources give them one id: {', '.join(shared)}"] if shared else []


def _split_duplicates(numbered):
    """The same run met in two sources (a folder given twice, two studies sharing a run) must not count twice."""
    kept, duplicates, seen = [], [], {}
    for i, p in numbered:
        first, source = seen.setdefault((p.run_id, p.N, p.D, p.loss), (i, p.source))
        if first == i:
            kept.append(p)
        else:
            duplicates.append(Excluded(p.run_id, f"already read from {source}", p.tags, p.source))
    return kept, duplicates
