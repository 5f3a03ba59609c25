"""Tables as they come: CSV, TSV and JSONL files read into rows, a tracker's wide and long exports turned into rows of
runs and steps, and a second table joined to them. What the columns mean is `columns`' business.
"""

import ast
import csv
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax import records
from slmjax.scaling.points.columns import FILE, LONG, TEXTS, factors
from slmjax.scaling.points.names import did_you_mean, is_empty, listing, number

FILES = (".csv", ".tsv", ".jsonl")
RUN, STEP = "run", "step"  # the columns of a wide export or an event folder that its layout gives


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one source.

    rows: cells by header, text from CSV, values from JSON. places: where each row stands, for errors.
    by_layout: columns the layout itself names, such as {"run_id": "run", "step": "step"}; a map need not repeat them.
    unclear: headers that mean two things, with the reason; only a map that uses one is refused.
    label: what the ids of runs begin with that have none of their own.
    """

    path: Path
    headers: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...]
    by_layout: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unclear: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    label: str = ""


def read_table(path: Path) -> Table:
    """A CSV, TSV or JSONL file. Raises ValueError for one without rows or with rows that do not fit its header."""
    try:
        rows, unclear, notes = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table in UTF-8 ({error}); save it as one") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    rows = [_unfolded(row) for row in rows]
    headers = tuple(dict.fromkeys(header for row in rows for header in row))
    if FILE not in headers:
        rows = [row | {FILE: path.as_posix()} for row in rows]
    places = tuple(f"{path} row {i}" for i in range(1, len(rows) + 1))
    return Table(path, headers, tuple(rows), places, unclear=unclear, notes=notes, label=path.stem)


def _read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin their files with a mark
        first = file.readline()
        file.seek(0)
        # Spreadsheets in countries with a decimal comma separate cells by semicolons.
        separator = max("\t,;" if path.suffix == ".tsv" else ",;\t", key=first.count)
        header, *lines = [*csv.reader(file, delimiter=separator)] or [[]]
    header = [name.strip() for name in header]
    for i, line in enumerate(lines, 1):
        if len(line) > len(header):
            raise ValueError(f"{path} row {i}: {len(line)} cells under a header of {len(header)}; quote the cell")
    twice = {name: f"stands in the header of {path} twice" for name in header if header.count(name) > 1}
    return [dict(zip(header, line, strict=False)) for line in lines if line], twice, ()


def _read_jsonl(path):
    rows = records.read_lines(path)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {i} is {json.dumps(row)[:40]}, not an object of names and values")
    num_lines = sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line)
    cut = num_lines - len(rows)
    return rows, {}, (f"{path.name}: its last line was cut while it was written, and is left out",) if cut else ()


def _unfolded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects as dotted columns: JSON's own, and the dictionaries that trackers' exports write into a cell."""
    flat = {}
    for header, cell in row.items():
        cell = _dictionary(cell) if isinstance(cell, str) and cell.startswith("{") else cell
        if isinstance(cell, Mapping):
            flat |= {f"{header}.{key}": value for key, value in _unfolded(cell).items()}
        else:
            flat[header] = cell
    return flat


def _dictionary(text):
    """The dictionary that a cell holds as JSON or as Python prints it; the text itself when it is neither."""
    for read in (json.loads, _python_literal):
        try:
            value = read(text)
        except (ValueError, SyntaxError):
            continue
        return value if isinstance(value, dict) else text
    return text


def _python_literal(text):
    return ast.literal_eval(_Floats().visit(ast.parse(text, mode="eval")))


class _Floats(ast.NodeTransformer):
    """nan and inf as Python prints them, in the summary of a run that diverged."""

    def visit_Name(self, node):
        return ast.copy_location(ast.Constant(float(node.id)), node) if node.id in ("nan", "inf") else node


# --- layouts ---------------------------------------------------------------------------------------------------------


def reshape(table: Table, columns: Mapping[str, str] | None) -> Table:
    """A wide or long export as rows of runs and steps; any other table as it is.

    Long: the map names `metric` and `value`. Wide: it names a metric that is no column while columns called
    `RUN - METRIC` are.
    """
    if not columns:
        return table
    if set(LONG) & set(columns):
        return _from_long(table, columns)
    wanted = {factor for name, text in columns.items() if name not in TEXTS for factor in factors(text)}
    return _from_wide(table, sorted(f for f in wanted if f not in table.headers and number(f) is None))


def _from_long(table, columns):
    """One row per run and step from one row per run, step and metric; a value logged again replaces the earlier."""
    for name in (*LONG, "run_id"):
        if columns.get(name) not in (*table.headers, FILE):
            said = f"no column {columns[name]!r}{did_you_mean(columns[name], table.headers)}" if name in columns else ""
            raise ValueError(
                f"{table.path}: a long table needs metric=col, value=col and run_id=col; "
                f"{said or f'{name} is missing'}; it has {listing(table.headers)}"
            )
    metric, value = columns["metric"], columns["value"]
    # The step may be mapped, or be a factor of tokens: D=step*tokens_per_step.
    step = columns.get("step", STEP if STEP in table.headers else None)
    found, places = {}, {}
    for row, place in zip(table.rows, table.places, strict=True):
        key = (row.get(columns["run_id"]), row.get(step))
        cells = found.setdefault(key, {h: c for h, c in row.items() if h not in (metric, value)})
        places.setdefault(key, place)
        name = row[metric]
        if name in cells and step is None and cells[name] != row[value]:
            raise ValueError(f"{place}: run {key[0]} has several values of {name}; map the step too: step=col")
        cells[name] = row[value]
    headers = tuple(dict.fromkeys(header for cells in found.values() for header in cells if header != FILE))
    layout = {"step": step} if step else {}
    return dataclasses.replace(
        table, headers=headers, rows=tuple(found.values()), places=tuple(places.values()), by_layout=layout
    )


def _from_wide(table, metrics: Sequence[str]):
    """One row per run and step from columns `RUN - METRIC`, as W&B exports a chart; __MIN and __MAX stay out."""
    by_header = {h: [m for m in metrics if h.endswith(f" - {m}")] for h in table.headers}
    if not any(by_header.values()):
        return table
    for header, found in by_header.items():
        if len(found) > 1:
            raise ValueError(
                f"{table.path}: column {header!r} may be {' or '.join(map(repr, found))} of a run; rename it there"
            )
        if found and header in table.unclear:
            raise ValueError(f"{table.path}: {header!r} {table.unclear[header]}: two runs have one name; rename one")
    columns = {h: (h.removesuffix(f" - {found[0]}"), found[0]) for h, found in by_header.items() if found}
    runs = list(dict.fromkeys(run for run, _ in columns.values()))
    # Columns of other metrics belong to their runs; what is left, such as the step, belongs to every run.
    shared = [h for h in table.headers if not any(h.startswith(f"{run} - ") for run in runs)]
    step = next((h for h in shared if h.casefold() in (STEP, "_step", "global_step")), None)
    rows, places = [], []
    for run in runs:
        of_run = {metric: h for h, (of, metric) in columns.items() if of == run}
        for row, place in zip(table.rows, table.places, strict=True):
            cells = {metric: row.get(h) for metric, h in of_run.items()}
            if not all(map(is_empty, cells.values())):
                rows.append({RUN: run, FILE: row[FILE]} | {h: row.get(h) for h in shared} | cells)
                places.append(f"{place}, run {run}")
    headers = tuple(dict.fromkeys((RUN, *shared, *(metric for _, metric in columns.values()))))
    layout = {"run_id": RUN} | ({"step": step} if step else {})
    return dataclasses.replace(table, headers=headers, rows=tuple(rows), places=tuple(places), by_layout=layout)


# --- joining ---------------------------------------------------------------------------------------------------------


def join(table: Table, runs: Table, key: str, run_header: str | None) -> tuple[Table, list[str]]:
    """The table with the columns of `runs`, one row per run, beside each row of the run; and the runs not found there.

    Args:
      key: the column of `runs` that holds run ids; run_header: the column of `table` that does.
    """
    if key not in runs.headers:
        raise ValueError(
            f"{runs.path}: no column {key!r}{did_you_mean(key, runs.headers)}; it has {listing(runs.headers)}"
        )
    if run_header is None:
        raise ValueError(f"{table.path}: --join needs the column with the run: --columns=run_id=col,...")
    by_run = {}
    for row, place in zip(runs.rows, runs.places, strict=True):
        if str(row.get(key)) in by_run:
            raise ValueError(f"{place}: a second row with {key} {row.get(key)!r}; --join needs one row per run")
        by_run[str(row.get(key))] = row
    added = [h for h in runs.headers if h not in (key, FILE)]
    both = {h: f"is a column of both {table.path} and {runs.path}; rename one" for h in added if h in table.headers}
    rows = tuple(by_run.get(str(row.get(run_header)), {}) | row for row in table.rows)
    missing = dict.fromkeys(str(r.get(run_header)) for r in table.rows if str(r.get(run_header)) not in by_run)
    headers = tuple(dict.fromkeys((*table.headers, *added)))
    return dataclasses.replace(table, headers=headers, rows=rows, unclear={**table.unclear, **both}), list(missing)


def without_runs(table: Table, run_header: str, run_ids: Collection[str]) -> Table:
    kept = [i for i, row in enumerate(table.rows) if str(row.get(run_header)) not in run_ids]
    rows, places = ([of_table[i] for i in kept] for of_table in (table.rows, table.places))
    return dataclasses.replace(table, rows=tuple(rows), places=tuple(places))


def refuse_unclear(table: Table, headers: Iterable[str]) -> None:
    """Raises ValueError when a column that is used means two things."""
    for header in headers:
        if header in table.unclear:
            raise ValueError(f"{table.path}: column {header!r} {table.unclear[header]}")
