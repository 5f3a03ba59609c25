"""Rows of a table into Points: cells of a run brought together, one row of each run chosen, values checked.

A cell that cannot be used is refused with its place, unless the map says which runs did not finish.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slmjax.scaling.points.columns import FILE, ColumnMap
from slmjax.scaling.points.names import is_empty, number
from slmjax.scaling.points.point import Condition, Excluded, Point
from slmjax.scaling.points.tables import STEP, Table, refuse_unclear

ROWS = ("last", "all", "min")
FINISHED = ("done", "finished", "completed", "complete", "success", "succeeded", "ok")
NOT_FINISHED = ("running queued pending scheduled preempted killed cancelled canceled stopped unfinished timeout "
                "failed crashed error diverged oom nan").split()  # fmt: skip
SHORT_OF_PLAN = 0.01  # the last batch or a rounded step count may leave this much of the planned tokens unseen


class Row(NamedTuple):
    """Cells of one run at one step."""

    run_id: str
    place: str
    cells: Mapping[str, Any]


def points_of_table(
    table: Table,
    columns: ColumnMap,
    n: str | None,
    flops: str | None,
    rows: str,
    conditions: Sequence[Condition],
) -> tuple[list[Point], list[Excluded], list[str]]:
    """Points, runs left out, and notes. `conditions` are those on columns of this table."""
    refuse_unclear(table, [*columns.headers(*columns.products, *columns.texts), *(c.name for c in conditions)])
    if flops and "C" not in columns.products:
        raise ValueError(f"{table.path}: --flops={flops} says what its FLOPs count, and no column is C; map C=col")
    runs, copies = _runs(table, columns, {c.name for c in conditions})
    runs, left_out, notes = _filtered(table, runs, conditions)
    if any(len(of_run) > 1 for of_run in runs.values()):
        notes.append(_choice(table, runs, rows))
    points, excluded = [], copies + left_out
    for run_id, of_run in runs.items():
        chosen = _chosen(of_run, columns, rows)
        if not chosen:
            reason = _unfinished(of_run[-1], columns) or "no row of it holds a loss"
            excluded.append(Excluded(run_id, reason, source=str(table.path)))
        for row in chosen:
            found = _point(row, columns, n, flops, str(table.path))
            (points if isinstance(found, Point) else excluded).append(found)
    if "C" not in columns.products and {"N", "D"} <= set(columns.products):
        notes.append(f"{table.path.name}: no FLOPs column, so C = 6 N D")
    return points, excluded, notes


def _runs(table: Table, columns: ColumnMap, also_read: set[str]) -> tuple[dict[str, list[Row]], list[Excluded]]:
    """Rows by run, in order of appearance, and rows that are copies; without a run column each row is a run of its own.

    Rows of one run and step become one, later cells before earlier ones. A cell that a run gives once and for all (its
    size, its status) and that some of its rows lack holds for all of them.
    """
    run_header, step_header = columns.texts.get("run_id"), _step_header(table, columns)
    runs: dict[str, dict] = {}
    copies, first_of = [], {}
    for i, (row, place) in enumerate(zip(table.rows, table.places, strict=True)):
        cells = {header: cell for header, cell in row.items() if not is_empty(cell)}
        run_id = str(cells.get(run_header)) if run_header else f"{table.label}:{i + 1}"
        if run_header and run_header not in cells:
            raise ValueError(f"{place}: {run_header} is empty, so its run is not known; correct or remove the row")
        if not run_header:
            # Two runs that agree in every digit of every cell are one, pasted twice; a bootstrap would count both.
            twin = first_of.setdefault(tuple((h, str(c)) for h, c in sorted(cells.items())), place)
            if twin != place:
                copies.append(Excluded(run_id, f"a copy of {twin}, cell by cell", source=str(table.path)))
                continue
        step = number(cells.get(step_header)) if step_header else None
        key = ("row", i) if step is None else ("step", step)
        of_run = runs.setdefault(run_id, {})
        before = of_run[key].cells if key in of_run else {}
        of_run[key] = Row(run_id, place, {**before, **cells})
    once = _given_once(columns, also_read)
    return {run_id: _completed(list(of_run.values()), once) for run_id, of_run in runs.items()}, copies


def _step_header(table, columns):
    """The column that orders a run's rows, when it is one. Raises ValueError for steps of unknown runs."""
    if "step" not in columns.products:
        return None
    if "run_id" not in columns.texts:
        raise ValueError(
            f"{table.path}: a step orders the rows of a run, and no column says which run; map run_id=col, or "
            "run_id=file when each file is one run"
        )
    headers = columns.products["step"].headers
    return headers[0] if len(headers) == 1 else None


def _given_once(columns: ColumnMap, also_read: set[str]) -> set[str]:
    """Columns that a run may give in one row for all: not those that a run moves through, as its loss or its tokens."""
    moving = columns.headers("loss", "se", "step") | {STEP, FILE}
    for name in ("D", "C", "epochs"):
        found = columns.headers(name)
        moving |= found if len(found) == 1 else set()
    return (columns.headers(*columns.products, *columns.texts) | also_read) - moving


def _completed(rows: list[Row], once: set[str]) -> list[Row]:
    if len(rows) == 1:
        return rows
    values = {h: {str(row.cells[h]): row.cells[h] for row in rows if h in row.cells} for h in once}
    known = {h: next(iter(found.values())) for h, found in values.items() if len(found) == 1}
    return [row._replace(cells={**known, **row.cells}) for row in rows]


def _filtered(table, runs, conditions):
    """The rows that meet the conditions; a run left without rows is Excluded, with the reason of its last row."""
    kept, excluded, notes, num_cut = {}, [], [], 0
    for run_id, of_run in runs.items():
        faults = [next(filter(None, (c.fault(row.cells) for c in conditions)), None) for row in of_run]
        kept_rows = [row for row, fault in zip(of_run, faults, strict=True) if fault is None]
        if kept_rows:
            kept[run_id] = kept_rows
            num_cut += len(of_run) - len(kept_rows)
        else:
            excluded.append(Excluded(run_id, faults[-1], source=str(table.path)))
    if num_cut or excluded:
        said = " ".join(f"--where={c.text}" for c in conditions)
        parts = [f"{len(excluded)} runs"] * bool(excluded) + [f"{num_cut} rows of other runs"] * bool(num_cut)
        notes.append(f"{table.path.name}: {said} leaves out {' and '.join(parts)}")
    return kept, excluded, notes


def _choice(table, runs, rows):
    num_rows = sum(map(len, runs.values()))
    taken = {"last": "the last row", "min": "the row of least loss", "all": "every row"}[rows]
    return f"{table.path.name}: {num_rows} rows of {len(runs)} runs; {taken} of each run is a point (--rows={rows})"


def _chosen(of_run: list[Row], columns: ColumnMap, rows: str) -> list[Row]:
    """The rows of one run that become points: those with a loss, all or one of them."""
    if len(of_run) == 1:
        return of_run
    with_loss = [row for row in of_run if columns.headers("loss") <= set(row.cells)]
    if rows == "all" or len(with_loss) < 2:
        return with_loss
    if rows == "min":
        losses = [_measure(row, columns, "loss") for row in with_loss]
        return [min(zip(losses, with_loss, strict=True), key=lambda at: (math.isnan(at[0]), at[0]))[1]]
    by = "step" if "step" in columns.products else "D"
    for row in with_loss:
        if math.isnan(_measure(row, columns, by)):
            raise ValueError(
                f"{row.place}: {columns.products[by].text} is missing beside a loss, so that its place in the run is "
                "not known; map step=col, or leave the row out with --where"
            )
    return [max(enumerate(with_loss), key=lambda at: (_measure(at[1], columns, by), at[0]))[1]]


def _measure(row, columns, name) -> float:
    """A product's value for ordering; NaN where a cell is no number."""
    product = columns.products[name]
    values = [number(row.cells.get(h)) for h in product.headers]
    return math.nan if None in values else product.factor * math.prod(values)


def _point(row: Row, columns: ColumnMap, n: str | None, flops: str | None, source: str) -> Point | Excluded:
    """The row as a Point; Excluded when its status, its loss or its planned tokens say that the run did not finish."""
    reason = _unfinished(row, columns)
    if reason:
        return Excluded(row.run_id, reason, source=source)
    value = {name: _value(row, columns, name) for name in columns.products if name != "step"}
    text = {name: row.cells.get(header) for name, header in columns.texts.items()}
    kind = text.get("loss_kind") or "exact"
    if kind not in ("exact", "bound"):
        raise ValueError(f"{row.place}: {columns.texts['loss_kind']} is {kind!r}, and a loss is exact or a bound")
    if "planned" in value and value["D"] < (1 - SHORT_OF_PLAN) * value["planned"]:
        return Excluded(row.run_id, f"unfinished: {value['D']:.4g} of {value['planned']:.4g} tokens", source=source)
    inputs = {name: value[name] for name in columns.inputs}
    N, D, C, epochs = (value.get(name) for name in ("N", "D", "C", "epochs"))
    return Point(
        run_id=row.run_id,
        N=N,
        D=D,
        C=6 * N * D if C is None and N and D else C,
        loss=value["loss"],
        se=value.get("se"),
        family=_text(text.get("family")),
        n_convention=_convention(n, columns, "N", "not given"),
        flops_convention=_convention(flops, columns, "C", "6ND" if N and D else "not given"),
        loss_kind=kind,
        tokenizer=_text(text.get("tokenizer")),
        corpus=_text(text.get("corpus")),
        epochs=epochs if epochs or not (D and "U" in inputs) else D / inputs["U"],
        source=source,
        inputs=inputs,
        loss_unit=columns.unit.name,
    )


def _convention(stated, columns, name, otherwise) -> str:
    """What a column counts, as the user states it; a table does not say."""
    if name not in columns.products:
        return otherwise
    return stated or f"unknown (column {columns.products[name].text})"


def _text(cell):
    return None if is_empty(cell) else str(cell)


def _unfinished(row, columns) -> str | None:
    """Why the run did not finish, where a status column tells; without one nothing is assumed."""
    header = columns.texts.get("status")
    if header is None:
        return None
    status = str(row.cells.get(header, "")).strip()
    if status.casefold() in NOT_FINISHED:
        return f"{header} is {status}"
    if status.casefold() not in FINISHED:
        raise ValueError(
            f"{row.place}: {header} is {status!r}, neither finished ({', '.join(FINISHED)}) nor unfinished "
            f"({', '.join(NOT_FINISHED)}); choose runs with --where={header}=... and leave status out of the map"
        )
    values = {h: number(row.cells.get(h)) for h in columns.products["loss"].headers}
    bad = [h for h, value in values.items() if value is not None and not math.isfinite(value)]
    return f"diverged: {bad[0]} is {values[bad[0]]}" if bad else None


def _value(row: Row, columns: ColumnMap, name: str) -> float | None:
    """A product's value in our units. Raises ValueError unless it is positive and finite; only se may be empty."""
    product = columns.products[name]
    cells = [row.cells.get(header) for header in product.headers]
    if name == "se" and any(map(is_empty, cells)):
        return None
    values = [number(cell) for cell in cells]
    in_loss_units = name in ("loss", "se")
    lowest = columns.unit.lowest if name == "loss" else 0.0
    for header, cell, value in zip(product.headers, cells, values, strict=True):
        if value is None or not math.isfinite(value) or value <= lowest:
            raise ValueError(
                f"{row.place}: {header} is {'' if cell is None else str(cell)!r}, not a "
                f"{'' if lowest else 'positive '}finite number; correct the row, leave it out with --where, or map "
                "status=col when a column says which runs did not finish"
                + ("; a loss relative to a unigram model may be negative: loss=col:unigram_normalized"
                   if name == "loss" and value is not None and value < 0 else "")
            )  # fmt: skip
    return product.factor * math.prod(values) * (columns.unit.factor if in_loss_units else 1.0)
