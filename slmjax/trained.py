"""A run as it is used after training, from its folder alone: its parameters, and what reads them. Only reads."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax import config, data, denoiser, ladder, models, objectives, records
from slmjax.checkpoint import Checkpointer
from slmjax.config import ConfigError, RunConfig
from slmjax.data import Dataset
from slmjax.decoding.left_to_right import NextToken
from slmjax.denoiser import Denoiser
from slmjax.digests import CheckpointError
from slmjax.models import Model
from slmjax.objectives import Objective
from slmjax.program import TrainState, abstract_state
from slmjax.tokenizer import Tokenizer


class Trained(NamedTuple):
    """The functions open what they give at the first call, and give the same after; each may raise ConfigError.

    next_token: () → of a model that reads left to right, compiled once for each shape.
    denoiser: () → of objectives that hide tokens, compiled once for each shape; the mask is `mask_id`.
    dataset: (held-out windows, or None for as many as in training) → the run's data, checked to be what it trained on.
    tokenizer: () → the run's, or None where its tokens were given without one.
    """

    folder: Path
    cfg: RunConfig  # resolved
    model: Model
    objective: Objective
    params: Any  # the running mean of those trained (EMA), where there is one
    step: int
    next_token: Callable[[], NextToken]
    denoiser: Callable[[], Denoiser]
    dataset: Callable[..., Dataset]
    tokenizer: Callable[[], Tokenizer | None]

    @property
    def mask_id(self) -> int:
        return self.cfg.model.vocab_size


def load(run_dir: str | Path, step: int | None = None) -> Trained:
    """The run in `run_dir`, or the only one below it, at a checkpoint: its newest, or that of `step`.

    Raises:
      ConfigError: no such run or checkpoint, or one that is damaged.
    """
    folder = _run_folder(Path(run_dir))
    cfg = ladder.resolved(config.resolve(records.read_json(folder / "config.json")))
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    state = _restored(folder, abstract_state(cfg), step)
    params = jax.tree.map(jnp.asarray, state.ema if state.ema != () else state.params)
    trained_on = (records.read_json(folder / "provenance.json") or {}).get("data", {})

    def check(found: dict) -> None:
        for what, value in found.items():
            if trained_on.get(what) != value:
                raise ConfigError(
                    f"{folder} was trained with {what} {trained_on.get(what)}; data.sources={cfg.data.sources} and "
                    f"data.tokenizer={cfg.data.tokenizer!r} now give {value}: restore what it was trained with"
                )

    @cache
    def open_denoiser():
        if cfg.model.mask_row != "yes":
            raise ConfigError(
                f"{folder} has objective.name={cfg.objective.name!r}, which hides no tokens, so that it is no denoiser"
            )
        return denoiser.of_model(model, params, objective, cfg.model.vocab_size)

    @cache
    def open_dataset(num_held_out=None):
        changed = {} if num_held_out is None else {"train.eval_sequences": num_held_out}
        dataset = data.open_dataset(config.override(cfg, changed))
        check(dataset.fingerprint)
        return dataset

    @cache
    def open_tokenizer():
        tokenizer = data.open_tokenizer(cfg.data)
        if tokenizer is not None:
            check({"tokenizer": tokenizer.hash})
        return tokenizer

    next_token = cache(lambda: NextToken(model, params))
    opened = (next_token, open_denoiser, open_dataset, open_tokenizer)
    return Trained(folder, cfg, model, objective, params, int(state.step), *opened)


def _run_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; name that of a run, OUT/RUN_ID")
    found = sorted(path.parent for path in (*folder.glob("*/config.json"), *folder.glob("*/*/config.json")))
    if not found:
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.json")
    if len(found) > 1:
        names = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ConfigError(f"{folder} holds {len(found)} runs; name one: {names}")
    return found[0]


def _restored(folder: Path, abstract: TrainState, step: int | None) -> TrainState:
    """Of a named step always: the run may be training, and what restores the newest sets damaged ones aside."""
    with Checkpointer(folder / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ConfigError(f"{folder} has no checkpoint yet; train it first")
        wanted = steps[-1] if step is None else step
        if wanted not in steps:
            raise ConfigError(f"step={step}: {folder} has no checkpoint of it; there are: {', '.join(map(str, steps))}")
        try:
            return checkpoints.restore(abstract, wanted)[1]
        except CheckpointError as error:
            others = ", ".join(str(s) for s in steps if s != wanted) or "none"
            raise ConfigError(f"{error}; other checkpoints: {others}") from None
