"""Points for fitting: one row (N, D, C, loss) per finished run, from study folders, CSV or JSONL.

Nothing is dropped quietly: every run that is not a Point is an Excluded with its reason. Every Point carries what its
numbers mean (which N, which FLOPs, exact or bound loss, tokenizer, corpus), and `PointSet.require_comparable` refuses
to mix them. No fitting and no plotting lives here.
"""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmjax import records

N_CONVENTIONS = ("non_embedding", "total", "active")
FLOPS_CONVENTIONS = ("with_head", "without_head")
COLUMNS = ("N", "D", "loss", "C", "se", "family", "run_id")
REQUIRED_COLUMNS = ("N", "D", "loss")
# Header names that say what they hold; any other name needs a column map.
KNOWN_HEADERS = {"params": "N", "tokens": "D", "flops": "C", "loss_se": "se"}


class Point(NamedTuple):
    """One finished run: N parameters, D tokens, C training FLOPs, held-out loss (nats per token) and its error."""

    run_id: str
    N: float
    D: float
    C: float
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

    def value(self, name: str) -> float:
        """An input of a law, or the loss, by name."""
        return self.inputs[name] if name in self.inputs else getattr(self, name)


class Excluded(NamedTuple):
    """A run that did not become a Point, and why."""

    run_id: str
    reason: str
    tags: Mapping[str, Any] = {}
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study: its line in study.json and its merged logs; `start` is empty before the first attempt."""

    run_id: str
    path: str
    tags: dict
    parent: str | None
    branch_step: int | None
    config: dict
    provenance: dict
    start: dict
    train: list[dict]
    evals: list[dict]
    end: dict | None
    num_attempts: int

    @property
    def status(self) -> str:
        return self.end["status"] if self.end else ("unfinished" if self.start else "not started")


@dataclasses.dataclass(frozen=True)
class PointSet:
    """Points of one or several sources, the runs left out of them, and remarks a reader must see."""

    points: tuple[Point, ...]
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.points)

    def only(self, family: str) -> "PointSet":
        """The points of one model family; the others become Excluded."""
        kept = tuple(p for p in self.points if p.family == family)
        dropped = (p for p in self.points if p.family != family)
        left_out = tuple(Excluded(p.run_id, f"family {p.family!r}, not {family!r}", p.tags, p.source) for p in dropped)
        return dataclasses.replace(self, points=kept, excluded=self.excluded + left_out)

    def conventions(self) -> dict[str, str | None]:
        """What N, C and the loss of these points mean. Raises ValueError when two points mean different things."""
        self.require_comparable()
        first = self.points[0]
        return {name: getattr(first, name) for name in CONVENTION_FIELDS}

    def require_comparable(self) -> None:
        """Raise ValueError unless all points share the conventions that decide what N, D, C and loss mean."""
        for name, (what, way_out) in CONVENTION_FIELDS.items():
            values = sorted({str(getattr(p, name)) for p in self.points})
            if len(values) > 1:
                raise ValueError(f"the points mix {what}: {', '.join(values)}; one law cannot describe both; {way_out}")


CONVENTION_FIELDS = {
    "n_convention": ("ways of counting N", "load all sources with the same N, or fit them one at a time"),
    "flops_convention": ("ways of counting FLOPs", "load all sources with the same FLOPs, or fit them one at a time"),
    "loss_kind": ("exact losses and bounds", "fit the objectives separately"),
    "tokenizer": ("tokenizers (their losses per token are not comparable)", "fit each tokenizer's runs separately"),
    "corpus": ("corpora", "fit each corpus' runs separately"),
    "family": ("model families", "select one family first"),
}


def load_points(
    sources: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    n: str = "non_embedding",
    flops: str = "with_head",
) -> PointSet:
    """Points from study folders, `.csv` and `.jsonl` files.

    Args:
      sources: paths. A folder must hold a `study.json`.
      columns: for files: {"N": header, "D": header, "loss": header} and optionally "C", "se", "family", "run_id".
        Without it the headers must be these names, or params, tokens, flops. Without C, C = 6 N D, and a note says so.
      n: which parameter count of a study's runs is N: non_embedding, total or active.
      flops: which FLOPs per token make C = FLOPs per token x D: with_head or without_head.
    """
    for name, value, known in (("n", n, N_CONVENTIONS), ("flops", flops, FLOPS_CONVENTIONS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    points, excluded, notes = [], [], []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        if source.is_dir():
            runs = load_runs(source)
            trunks = {run.parent for run in runs}
            for run in runs:
                point = _point_of_run(run, n, flops, trunks)
                (points if isinstance(point, Point) else excluded).append(point)
        elif source.suffix in (".csv", ".jsonl"):
            rows, remarks = _points_of_table(source, columns)
            points += rows
            notes += remarks
        else:
            raise ValueError(f"{source}: not a study folder, .csv or .jsonl file")
    points, duplicates = _split_duplicates(points)
    repeated = [p.epochs for p in points if p.epochs is not None and p.epochs > 1]
    if repeated:
        notes.append(
            f"{len(repeated)} of {len(points)} runs repeat data (up to {max(repeated):.3g} epochs); "
            "the law takes a repeated token for a new one"
        )
    return PointSet(tuple(points), tuple(excluded + duplicates), tuple(notes))


def _split_duplicates(points):
    """The same run met twice (a folder given twice, two studies sharing a run) must not count twice."""
    kept, duplicates, seen = [], [], {}
    for p in points:
        if (p.run_id, p.loss) in seen and not p.source.endswith((".csv", ".jsonl")):
            duplicates.append(Excluded(p.run_id, f"already read from {seen[p.run_id, p.loss]}", p.tags, p.source))
        else:
            seen[p.run_id, p.loss] = p.source
            kept.append(p)
    return kept, duplicates


# --- study folders ---------------------------------------------------------------------------------------------------


def load_runs(study_dir: str | Path) -> list[Run]:
    """Every run that `study.json` lists, in its order, also those that have not started."""
    study, logged = records.load_study(study_dir)
    return [_join(Path(study_dir), entry, logged.get(entry["run_id"])) for entry in study["runs"]]


def _join(study_dir, entry, logged):
    """A run's line in study.json and what its folder says; `logged` is None before the folder exists."""
    return Run(
        run_id=entry["run_id"],
        path=str(study_dir / entry["run_id"]),
        tags=dict(entry.get("tags") or {}),
        parent=entry.get("parent"),
        branch_step=entry.get("branch_step"),
        config=(logged and logged.config) or {},
        provenance=(logged and logged.provenance) or {},
        start=(logged and logged.start) or {},
        train=logged.train if logged else [],
        evals=logged.evals if logged else [],
        end=logged and logged.end,
        num_attempts=logged.num_attempts if logged else 0,
    )


def _point_of_run(run: Run, n: str, flops: str, trunks: set[str | None]) -> Point | Excluded:
    """The run as a Point, or the reason why it is none."""

    def excluded(reason):
        return Excluded(run.run_id, reason, run.tags, run.path)

    if not run.start:
        return excluded("not started")
    if run.end is None:
        last = max([line["step"] for line in (*run.train, *run.evals)], default=run.start["step"])
        return excluded(f"unfinished: at step {last} of {run.start['total_steps']}")
    if run.end["status"] != "done":
        return excluded(run.end["status"] + (f": {run.end['reason']}" if run.end.get("reason") else ""))
    # The stable phase of WSD has not been annealed: its loss lies above the law of finished runs.
    is_trunk = run.tags.get("role") == "trunk" or run.run_id in trunks or _schedule_name(run.config).startswith("wsd")
    if is_trunk and run.end.get("phase") != "decay":
        return excluded("stable phase: a trunk, not annealed")
    loss = run.end["loss"]
    if not _is_positive(loss):
        return excluded(f"done, but its held-out loss is {loss}")
    D = run.end["tokens"]
    return Point(
        run_id=run.run_id,
        N=run.start["counts"][n],
        D=D,
        C=run.start["flops_per_token"][flops] * D,
        loss=loss,
        se=run.end.get("loss_se"),
        family=run.start.get("family"),
        tags=run.tags,
        n_convention=n,
        flops_convention=flops,
        loss_kind=run.start["loss_kind"],
        tokenizer=run.start["tokenizer"],
        corpus=run.start["corpus"],
        epochs=run.end.get("epochs"),
        source=run.path,
    )


def _schedule_name(config):
    return str(config.get("schedule", {}).get("name", ""))


# --- tables ----------------------------------------------------------------------------------------------------------


def _points_of_table(path: Path, columns: Mapping[str, str] | None) -> tuple[list[Point], list[str]]:
    """One Point per row of a CSV or JSONL file; refuses bad values with file and row."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = records.read_lines(path)
    if not rows:
        raise ValueError(f"{path}: no rows")
    headers = list(dict.fromkeys(name for row in rows for name in row))
    columns = _resolve_columns(path, headers, columns)
    notes = [] if "C" in columns else [f"{path.name}: no FLOPs column, so C = 6 N D"]
    flops_convention = f"column {columns['C']}" if "C" in columns else "6ND"
    points = []
    for number, row in enumerate(rows, 1):
        value = {name: row.get(header) for name, header in columns.items()}
        for name in ("N", "D", "loss", "C"):
            if name in columns:
                value[name] = _positive(value[name], f"{path} row {number}: {columns[name]}")
        se = None if value.get("se") in (None, "") else _positive(value["se"], f"{path} row {number}: {columns['se']}")
        points.append(
            Point(
                run_id=str(value.get("run_id", f"{path.stem}:{number}")),
                N=value["N"],
                D=value["D"],
                C=value.get("C", 6 * value["N"] * value["D"]),
                loss=value["loss"],
                se=se,
                family=value.get("family"),
                n_convention=f"column {columns['N']}",
                flops_convention=flops_convention,
                source=str(path),
            )
        )
    return points, notes


def _resolve_columns(path, headers, columns):
    """{"N": header, ...}: the user's map, or headers that say what they hold. Refuses unknown and missing ones."""
    syntax = "--columns=N=col,D=col,loss=col[,C=col,se=col,family=col,run_id=col]"
    if columns is None:
        columns = {KNOWN_HEADERS[name]: name for name in headers if name in KNOWN_HEADERS}
        columns |= {name: name for name in headers if name in COLUMNS}
    for name, header in columns.items():
        if name not in COLUMNS:
            raise ValueError(f"columns: {name!r} is not one of {', '.join(COLUMNS)}; write {syntax}")
        if header not in headers:
            raise ValueError(f"{path}: no column {header!r}; it has {', '.join(map(str, headers))}")
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}: which column is {' and '.join(missing)}? It has {', '.join(map(str, headers))}; say {syntax}"
        )
    return columns


def _is_positive(value):
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _positive(text, where):
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not _is_positive(value):
        raise ValueError(f"{where} is {text!r}, not a positive finite number; correct or remove the row")
    return value
