"""Points of a study folder: every run that study.json lists, and which of them are finished, annealed and usable."""

import dataclasses
import math
from pathlib import Path

from slmjax import records
from slmjax.scaling.points.point import Excluded, Point


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study: its line in study.json and its merged logs; `start` is empty before the first attempt.

    said: status.json, which also tells of a run that failed before it could log anything.
    """

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
    said: dict = dataclasses.field(default_factory=dict)

    @property
    def status(self) -> str:
        if self.end and self.end["status"] == "done":
            return "done"
        # Of an attempt that failed before its first line only status.json knows; running there proves nothing.
        if self.said.get("state") in ("failed", "diverged"):
            return self.said["state"]
        return self.end["status"] if self.end else ("unfinished" if self.start else "not started")

    @property
    def reason(self) -> str | None:
        """Why it failed or diverged."""
        return self.said.get("reason") or (self.end or {}).get("reason")


def flops_at(start: dict, tokens: float, flops: str = "with_head") -> float:
    """C behind a model that has seen `tokens`, from its run's start record.

    An upcycled model's first tokens were seen by the dense one, at that one's cost.
    """
    inherited = start.get("inherited_flops", {}).get(flops, 0)
    # As integers these products overflow NumPy.
    return float(inherited + start["flops_per_token"][flops] * (tokens - start.get("inherited_tokens", 0)))


def load_runs(study_dir: str | Path) -> list[Run]:
    """Every run that `study.json` lists, in its order, also those that have not started."""
    study, logged = records.load_study(study_dir)
    return [_join(Path(study_dir), entry, logged.get(entry["run_id"])) for entry in study["runs"]]


def points_of_study(folder: Path, n: str, flops: str) -> tuple[list[Point], list[Excluded]]:
    """Its finished, annealed runs, and the others with the reason."""
    runs = load_runs(folder)
    trunks = {run.parent for run in runs}
    found = [_point_of_run(run, n, flops, trunks) for run in runs]
    return [f for f in found if isinstance(f, Point)], [f for f in found if isinstance(f, Excluded)]


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
        said=(logged and logged.status) or {},
    )


def _point_of_run(run: Run, n: str, flops: str, trunks: set[str | None]) -> Point | Excluded:
    """The run as a Point, or the reason why it is none."""

    def excluded(reason):
        return Excluded(run.run_id, reason, run.tags, run.path)

    if run.status == "not started":
        return excluded("not started")
    if run.status == "unfinished":
        last = max([line["step"] for line in (*run.train, *run.evals)], default=run.start["step"])
        return excluded(f"unfinished: at step {last} of {run.start['total_steps']}")
    if run.status != "done":
        return excluded(run.status + (f": {run.reason}" if run.reason else ""))
    # The stable phase of WSD has not been annealed: its loss lies above the law of finished runs.
    is_trunk = run.tags.get("role") == "trunk" or run.run_id in trunks or _schedule_name(run.config).startswith("wsd")
    if is_trunk and run.end.get("phase") != "decay":
        return excluded("stable phase: a trunk, not annealed")
    loss = run.end["loss"]
    if not (isinstance(loss, int | float) and math.isfinite(loss) and loss > 0):
        return excluded(f"done, but its held-out loss is {loss}")
    D = run.end["tokens"]
    return Point(
        run_id=run.run_id,
        N=float(_count(run, n)),
        D=float(D),
        C=flops_at(run.start, D, flops),
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


def _count(run, n):
    counts = run.start["counts"]
    # Logs from before there were mixtures do not say what is active: everything, without experts.
    if n == "active_non_embedding" and n not in counts and counts.get("experts") == 0:
        return counts["non_embedding"]
    if n not in counts:
        raise ValueError(f"{run.path}: its log counts {', '.join(counts)}, and no {n}; choose an n among these")
    return counts[n]


def _schedule_name(config):
    return str(config.get("schedule", {}).get("name", ""))
