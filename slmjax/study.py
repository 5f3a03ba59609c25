"""A Study: a named list of Runs with tags, made by combining axes of config overrides. No JAX: planning is instant.

sizes = axis("size", {"s": ladder.shape(64, 2), "m": ladder.shape(128, 4)})
study = Study("wsd_ladder", base, branch(product(sizes, axis("optim.lr", [0.01])), [1000, 2000], decay_fraction=0.1))
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax import config, ladder, records
from slmjax.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Cell:
    """Overrides of the base config, and the tags by which tables and plots name the run.

    dense: of a cell made by `upcycle`, in what the dense run it begins from differs from it beside having no experts.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Any] | None = None

    def merged(self, other: "Cell") -> "Cell":
        dense = self.dense if other.dense is None else {**(self.dense or {}), **other.dense}
        return Cell({**self.changes, **other.changes}, {**self.tags, **other.tags}, dense)


def axis(name: str, values: Iterable | Mapping[str, Mapping]) -> list[Cell]:
    """One cell per value of a config key; or, from a mapping, one per named set of overrides (`name` is the tag)."""
    if isinstance(values, Mapping):
        return [Cell(dict(changes), {name: label}) for label, changes in values.items()]
    return [Cell({name: value}, {_tag(name): value}) for value in values]


def _tag(key: str) -> str:
    """The last word of a config key, or all of it where another key ends alike, as data.seed and train.seed do."""
    word = key.split(".")[-1]
    return word if sum(other.split(".")[-1] == word for other in config.flatten(RunConfig())) == 1 else key


def product(*axes: list[Cell]) -> list[Cell]:
    """Every combination, the last axis varying fastest."""
    return [functools.reduce(Cell.merged, cells, Cell()) for cells in itertools.product(*axes)]


def zipped(*axes: list[Cell]) -> list[Cell]:
    """The first cells merged, the second ones merged, and so on.

    Raises:
      ConfigError: axes of different lengths.
    """
    if len({len(cells) for cells in axes}) > 1:
        raise ConfigError(f"zipped axes have {[len(cells) for cells in axes]} cells; they need one length")
    return [functools.reduce(Cell.merged, cells, Cell()) for cells in zip(*axes, strict=True)]


def chain(*lists: list[Cell]) -> list[Cell]:
    return list(itertools.chain(*lists))


def branch(cells: list[Cell], steps: Callable[[Cell], Iterable[int]] | Iterable[int], **schedule) -> list[Cell]:
    """Each cell as a trunk and one WSD branch per run length: many token budgets for little more than one stable run.

    Args:
      cells: what to train.
      steps: run lengths, decay included, the same for all cells or a function of the cell.
      schedule: overrides of `schedule`, e.g. decay_fraction=0.1, decay_shape="1-sqrt".
    """
    wsd = {"schedule.name": "wsd", **{f"schedule.{key}": value for key, value in schedule.items()}}
    branches = []
    for cell in cells:
        lengths = sorted(steps(cell) if callable(steps) else steps)
        for length in lengths:
            changes = {**cell.changes, **wsd, "train.steps": length}
            tags = {**cell.tags, "steps": length, "role": "branch"}
            branches.append(dataclasses.replace(cell, changes=changes, tags=tags))
    return branches


def upcycle(
    cells: list[Cell],
    at: Callable[[Cell], int] | int,
    dense: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    redrawn: float = 0.0,
) -> list[Cell]:
    """Each cell, which has experts, begins from step `at` of a dense run: its own config without the experts.

    The dense run is at a constant rate, as a trunk is, and becomes part of the study. It is the beginning of the dense
    trunk where the study has one of that config, and costs nothing then. Lengths and schedules of the cells count its
    steps too. `branch` takes such cells, for a trunk with experts and its branches.

    Args:
      cells: what to train.
      at: step, the same for all cells or a function of the cell.
      dense: overrides of the dense run, of what shall not be as in the cell, e.g. {"optim.lr": 0.01}.
      noise, redrawn: what makes the copies differ, see `slmjax.upcycle`.
    """
    upcycled = []
    for cell in cells:
        step = at(cell) if callable(at) else at
        start = {"start.step": step, "start.noise": noise, "start.redrawn": redrawn}
        upcycled.append(Cell({**cell.changes, **start}, cell.tags, dense or {}))
    return upcycled


@dataclass(frozen=True)
class Run:
    """One training of one RunConfig. A branch has a `parent`, the trunk, and `branch_step`, where it leaves it.

    A branch's config is that of the uninterrupted WSD run of its length: the two are the same run, bit for bit. An
    upcycled run's parent is the dense run that it begins from.
    """

    config: RunConfig
    tags: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    branch_step: int | None = None
    save_steps: tuple[int, ...] = ()  # where branches leave; these checkpoints are kept

    @functools.cached_property
    def run_id(self) -> str:
        return config.run_id(self.config)

    @functools.cached_property
    def program_id(self) -> str:
        return config.program_id(self.config)

    @property
    def first_step(self) -> int:
        return self.branch_step or self.config.start.step


@dataclass(frozen=True)
class Study:
    """name: that of its folder, and a part of the names of its jobs."""

    name: str
    base: RunConfig
    cells: list[Cell]

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise ConfigError(f"a study's name has letters, digits, '_', '.' and '-', 100 at most, not {self.name!r}")

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Validated runs, trunks before their branches.

        Raises:
          ConfigError: an unknown key, a value that cannot run, or two cells that are the same run.
        """
        configured = [(cell, *_configure(self.base, cell)) for cell in self.cells]
        trunks = _trunks(configured)
        shared, runs = {}, []

        def once(run: Run) -> Run:
            if run.run_id not in shared:
                shared[run.run_id] = run
                runs.append(run)
            return run

        for cell, cfg, dense in configured:
            if dense is not None:
                trunk = once(trunks[_stem_id(dense)])
                if trunk.run_id != cfg.start.run:
                    once(Run(dense, trunk.tags | {"steps": dense.train.steps}, trunk.run_id, dense.train.steps))
            if cell.tags.get("role") == "branch":
                trunk = once(trunks[_stem_id(cfg)])
                assert config.shared_steps(trunk.config, cfg) >= config.decay_start(cfg), "a branch extends its trunk"
                runs.append(Run(cfg, cell.tags, trunk.run_id, config.decay_start(cfg)))
            else:
                runs.append(Run(cfg, cell.tags, *_begun(cfg)))
        _refuse_repeats(runs)
        return _saving(runs)

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "runs": [
                {"run_id": r.run_id, "tags": dict(r.tags), "parent": r.parent, "branch_step": r.branch_step}
                for r in self.runs
            ],
        }

    def save(self, out: Path) -> Path:
        """Writes OUT/<name>/study.json and returns that folder; runs no longer in the study keep their folders."""
        folder = out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "study.json", self.to_json())
        return folder


def _configure(base: RunConfig, cell: Cell) -> tuple[RunConfig, RunConfig | None]:
    """A cell's config, and that of the dense run it begins from: the stable phase as far as there."""
    cfg, dense = config.override(base, cell.changes), None
    if cell.dense is not None:
        plain = config.flatten(RunConfig())
        without = {key: value for key, value in plain.items() if key.startswith(("model.moe.", "start."))}
        dense = _stem(config.override(cfg, {**without, **cell.dense}), cfg.start.step)
        config.validate(dense)
        cfg = config.override(cfg, {"start.run": config.run_id(dense)})
    config.validate(cfg)
    return cfg, dense


def _stem(cfg: RunConfig, steps: int) -> RunConfig:
    """The stable phase of a WSD config, `steps` long."""
    plain = config.ScheduleConfig(name="constant", warmup_steps=cfg.schedule.warmup_steps)
    changes = {f"schedule.{key}": value for key, value in config.to_dict(plain).items()}
    return config.override(cfg, {**changes, "train.steps": steps, "data.decay_weights": ()})


def _stem_id(cfg: RunConfig) -> str:
    """Equal for branches that can leave the same trunk."""
    return config.run_id(_stem(cfg, steps=1))


def _trunks(configured: list[tuple[Cell, RunConfig, RunConfig | None]]) -> dict[str, Run]:
    """Stem id → the trunk that branches and upcycled runs leave, as long as the last of them needs.

    Its tags are its first branch's; without branches, what the upcycled cells have in common.
    """
    stems, leaving, tags = {}, {}, {}
    for cell, cfg, _ in configured:
        if cell.tags.get("role") == "branch":
            stem = _stem_id(cfg)
            stems.setdefault(stem, cfg)
            leaving.setdefault(stem, set()).add(config.decay_start(cfg))
            tags.setdefault(stem, cell.tags)
    branched = set(tags)
    for cell, _, dense in configured:
        if dense is not None:
            stem = _stem_id(dense)
            stems.setdefault(stem, dense)
            leaving.setdefault(stem, set()).add(dense.train.steps)
            if stem not in branched:
                before = tags.setdefault(stem, cell.tags)
                tags[stem] = {key: value for key, value in before.items() if cell.tags.get(key) == value}
    return {stem: _trunk(cfg, max(leaving[stem]), tags[stem]) for stem, cfg in stems.items()}


def _trunk(cfg: RunConfig, steps: int, tags: Mapping[str, Any]) -> Run:
    trunk = _stem(cfg, steps)
    config.validate(trunk)
    tags = {key: value for key, value in tags.items() if key != "steps"}
    return Run(trunk, {**tags, "role": "trunk"}, *_begun(trunk))


def _begun(cfg: RunConfig) -> tuple[str | None, int | None]:
    """Parent and branch step of a run that leaves no trunk: of an upcycled one, the dense run."""
    return (cfg.start.run, cfg.start.step) if cfg.start.run else (None, None)


def _saving(runs: list[Run]) -> list[Run]:
    """The runs, each keeping its checkpoints where others leave it."""
    by_id, leaving = {run.run_id: run for run in runs}, {}
    for run in runs:
        if run.parent is not None:
            if run.parent not in by_id:
                raise ConfigError(f"start.run={run.parent!r} is no run of this study; study.upcycle makes it one")
            if run.branch_step > (steps := by_id[run.parent].config.train.steps):
                raise ConfigError(f"start.step={run.branch_step} is past the {steps} steps of run {run.parent}")
            leaving.setdefault(run.parent, set()).add(run.branch_step)
    return [
        dataclasses.replace(run, save_steps=tuple(sorted(leaving[run.run_id]))) if run.run_id in leaving else run
        for run in runs
    ]


def _refuse_repeats(runs: list[Run]) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        twin = seen.setdefault(run.run_id, run)
        if twin is not run:
            raise ConfigError(f"two cells are the same run {run.run_id}: {dict(twin.tags)} and {dict(run.tags)}")


def packs(runs: list[Run]) -> list[list[Run]]:
    """Runs grouped by compiled program, in the order of the study; the work of one process each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.program_id, []).append(run)
    return list(groups.values())


def trained_tokens(run: Run) -> int:
    """Tokens this run itself trains on: a branch starts from its trunk's."""
    cfg = run.config
    return (cfg.train.steps - run.first_step) * cfg.train.batch_size * cfg.data.seq_len


def run_flops(run: Run) -> int:
    """FLOPs this run itself costs."""
    return _flops_per_token(run.config) * trained_tokens(run)


def total_flops(run: Run, by_id: Mapping[str, Run]) -> int:
    """C: FLOPs behind the finished model, those of the dense run that it began from included.

    by_id: the runs of the study by run_id.
    """
    cfg, start = run.config, run.config.start
    tokens_per_step = cfg.train.batch_size * cfg.data.seq_len
    own = _flops_per_token(cfg) * (cfg.train.steps - start.step) * tokens_per_step
    if not start.run:
        return own
    return own + _flops_per_token(by_id[start.run].config) * start.step * tokens_per_step


def _flops_per_token(cfg: RunConfig) -> int:
    return ladder.run_flops_per_token(cfg)["with_head"]
