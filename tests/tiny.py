"""The smallest run that has every part of a real one, and what tests do with it. Compiled things are made once."""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from slmjax import config, models, optim, program, schedules, sharding
from slmjax.config import RunConfig
from slmjax.program import Program

TINY = {
    "model.width": 16,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.mlp_width": 24,
    "model.vocab_size": 32,
    "model.parametrization.base_width": 16,
    "model.parametrization.init_std": 0.2,  # large enough for every part of the model to matter
    "data.sources": ("markov:32:0",),
    "data.tokenizer": "none",
    "data.seq_len": 16,
    "train.batch_size": 4,
    "train.steps": 8,
    "schedule.name": "constant",
    "mesh.data": 1,
    "mesh.steps_per_dispatch": 4,
}


def tiny(changes: dict | None = None) -> RunConfig:
    """The tiny config with dotted keys replaced, validated."""
    cfg = config.override(RunConfig(), TINY | (changes or {}))
    config.validate(cfg)
    return cfg


class Built(NamedTuple):
    cfg: RunConfig
    model: models.Model
    params: dict
    apply: object  # (params, tokens, segments or None) → logits, compiled


def built(changes: dict | None = None, attention: str = "causal") -> Built:
    """A model, parameters at its scales, and its compiled logits."""
    return _built(tuple(sorted((changes or {}).items())), attention)


@functools.cache
def _built(changes: tuple, attention: str) -> Built:
    cfg = tiny(dict(changes))
    model = models.build(cfg.model)
    apply = jax.jit(lambda params, tokens, segments=None: model.apply(params, tokens, segments, attention)[0])
    return Built(cfg, model, draw(model), apply)


def draw(model: models.Model, seed: int = 0) -> dict:
    """Parameters at the scales `model.init` uses, but norm gains too; made by NumPy, for it compiles nothing."""
    rng = np.random.default_rng(seed)

    def one(spec):
        if spec.role == "norm":
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return rng.normal(scale=model.rules(spec).init_std, size=spec.shape).astype(np.float32)

    return jax.tree.map(one, model.specs, is_leaf=models.is_spec)


def random_tokens(seed: int, *shape: int, vocab: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def random_segments(seed: int, *shape: int) -> np.ndarray:
    """int32, starting at 1 and one more at random places along the last axis."""
    starts = np.random.default_rng(seed).random(shape) < 0.2
    return 1 + np.cumsum(starts, -1, dtype=np.int32)


_programs: dict[tuple, Program] = {}


def solo(changes: dict | None = None, devices: int = 1) -> Program:
    """The Program of one run over the first `devices` devices."""
    return _program(tiny(changes), 1, devices, 1)


def population(num_members: int, how: str, changes: dict | None = None) -> Program:
    """The Program of several runs, `how` is spread (a device each) or batched (vmap on one device)."""
    places = num_members if how == "spread" else 1
    return _program(tiny(changes), num_members, places, places)


def _program(cfg: RunConfig, num_members: int, num_devices: int, places: int) -> Program:
    key = (config.program_id(cfg), num_members, num_devices, places)
    if key not in _programs:
        mesh = sharding.make_mesh(cfg.mesh, places, jax.devices()[:num_devices])
        _programs[key] = program.build(cfg, num_members, mesh)
    return _programs[key]


class Trained(NamedTuple):
    state: program.TrainState
    loss: np.ndarray  # [P, N]
    grad_norm: np.ndarray  # [P, N]


def random_batches(seed: int, cfg: RunConfig, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), each [N, B, T + 1]."""
    shape = (num_steps, cfg.train.batch_size, cfg.data.seq_len + 1)
    return random_tokens(seed, *shape), random_segments(seed + 1, *shape)


def init(prog: Program, cfgs: list[RunConfig]) -> program.TrainState:
    seeds = np.array([cfg.train.seed for cfg in cfgs], np.uint32)
    stds = np.array([cfg.model.parametrization.init_std for cfg in cfgs], np.float32)
    return prog.init(seeds, stds)


def hypers(cfg: RunConfig, steps: Iterable[int]) -> optim.Hyper:
    """Hyper with leaves [N]. Steps past the end of the run, which the program will not make, get zeros."""
    each = [optim.hyper_at(cfg, schedules.multiplier(cfg, s) if s < cfg.train.steps else 0.0) for s in steps]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def train(prog: Program, cfgs: list[RunConfig], batches: list, state=None, edit=lambda step, hyper: hyper) -> Trained:
    """Trains member p on batches[p] for cfgs[p].train.steps steps. `edit` may change a dispatch's Hyper."""
    K = cfgs[0].mesh.steps_per_dispatch
    state = init(prog, cfgs) if state is None else state
    num_steps = np.array([cfg.train.steps for cfg in cfgs])
    losses, norms = [], []
    for first in range(0, num_steps.max(), K):
        counts = np.clip(num_steps - first, 0, K).astype(np.int32)
        index_K = np.minimum(np.arange(first, first + K), [[n - 1] for n in num_steps])
        tokens, segments = (np.stack([b[i][k] for b, k in zip(batches, index_K, strict=True)]) for i in range(2))
        hyper = jax.tree.map(lambda *leaves: np.stack(leaves), *(hypers(c, range(first, first + K)) for c in cfgs))
        state, metrics = prog.train(state, tokens, segments, edit(first, hyper), counts)
        losses.append(np.asarray(metrics.loss))
        norms.append(np.asarray(metrics.grad_norm))
    return Trained(state, np.concatenate(losses, 1), np.concatenate(norms, 1))


def train_one(changes: dict, seed: int, num_steps: int = 8, devices: int = 1, **kwargs) -> Trained:
    """One run of `num_steps` on random batches."""
    cfg = tiny({**changes, "train.steps": num_steps})
    return train(solo(changes, devices), [cfg], [random_batches(seed, cfg, num_steps)], **kwargs)


def assert_same(a, b, **tolerance):
    """Two trees are equal: exactly, or within `tolerance` as in np.testing.assert_allclose."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    check = functools.partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        check(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def differ(a, b) -> bool:
    return bool(np.any(np.asarray(a) != np.asarray(b)))


def subsets(fields: dict) -> list[dict]:
    """Every combination of one value per key."""
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
