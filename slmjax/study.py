"""A Study: a named list of Runs with tags, made by combining axes of config overrides. No JAX: planning is instant.

sizes = axis("size", {"s": ladder.shape(64, 2), "m": ladder.shape(128, 4)})
study = Study("wsd_ladder", base, branch(product(sizes, axis("optim.lr", [0.01])), [1000, 2000], decay_fraction=0.1))
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax import config, ladder, records
from slmjax.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Cell:
    """Overrides of the base config, and the tags by which tables and plots name the run."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)

    def merged(self, other: "Cell") -> "Cell":
        return Cell({**self.changes, **other.changes}, {**self.tags, **other.tags})


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
            branches.append(Cell(changes, {**cell.tags, "steps": length, "role": "branch"}))
    return branches


@dataclass(frozen=True)
class Run:
    """One training of one RunConfig. A branch has a `parent`, the trunk, and `branch_step`, where it leaves it.

    A branch's config is that of the uninterrupted WSD run of its length: the two are the same run, bit for bit.
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
        return self.branch_step or 0


@dataclass(frozen=True)
class Study:
    name: str
    base: RunConfig
    cells: list[Cell]

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Validated runs, trunks before their branches.

        Raises:
          ConfigError: an unknown key, a value that cannot run, or two cells that are the same run.
        """
        configs = [_configure(self.base, cell.changes) for cell in self.cells]
        leaving: dict[str, set[int]] = {}
        for cell, cfg in zip(self.cells, configs, strict=True):
            if cell.tags.get("role") == "branch":
                leaving.setdefault(_stem_id(cfg), set()).add(config.decay_start(cfg))
        runs, trunks = [], {}
        for cell, cfg in zip(self.cells, configs, strict=True):
            if cell.tags.get("role") != "branch":
                runs.append(Run(cfg, cell.tags))
                continue
            if _stem_id(cfg) not in trunks:
                trunks[_stem_id(cfg)] = _trunk(cell, cfg, leaving[_stem_id(cfg)])
                runs.append(trunks[_stem_id(cfg)])
            trunk = trunks[_stem_id(cfg)]
            assert config.shared_steps(trunk.config, cfg) >= config.decay_start(cfg), "a branch must extend its trunk"
            runs.append(Run(cfg, cell.tags, trunk.run_id, config.decay_start(cfg)))
        _refuse_repeats(runs)
        return runs

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


def _configure(base: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    cfg = config.override(base, changes)
    config.validate(cfg)
    return cfg


def _stem(cfg: RunConfig, steps: int) -> RunConfig:
    """The stable phase of a WSD config, `steps` long."""
    plain = config.ScheduleConfig(name="constant", warmup_steps=cfg.schedule.warmup_steps)
    changes = {f"schedule.{key}": value for key, value in config.to_dict(plain).items()}
    return config.override(cfg, {**changes, "train.steps": steps, "data.decay_weights": ()})


def _stem_id(cfg: RunConfig) -> str:
    """Equal for branches that can leave the same trunk."""
    return config.run_id(_stem(cfg, steps=1))


def _trunk(cell: Cell, cfg: RunConfig, leaving: set[int]) -> Run:
    tags = {key: value for key, value in cell.tags.items() if key != "steps"}
    trunk = _stem(cfg, max(leaving))
    config.validate(trunk)
    return Run(trunk, {**tags, "role": "trunk"}, save_steps=tuple(sorted(leaving)))


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
    cfg = run.config
    per_token = ladder.flops_per_token(cfg.model, ladder.vocab_size(cfg), cfg.data.seq_len)["with_head"]
    return per_token * trained_tokens(run)
