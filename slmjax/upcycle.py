"""Upcycling (2212.05055): a dense run's checkpoint as the first parameters of a model with experts.

Every expert begins as a copy of its layer's feed-forward, so that at the first step the model gives the dense one's
logits, up to rounding. Experts narrower than the feed-forward by G take G "virtual groups" of its hidden units in turn
(2410.07524): expert i holds group i mod G, the G experts of one copy share their router weights, and so a token's best
experts are whole copies. What cannot be exact is refused where configs are checked (`config.validate`).

Letters as in `slmjax.models.moe`, and G groups.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import config, ladder, models, records
from slmjax.checkpoint import Checkpointer
from slmjax.config import ConfigError, ModelConfig, RunConfig, StartConfig
from slmjax.program import Program, TrainState, abstract_state, init_key

# What may differ between the dense model and the one that begins from it. Neither changes what the dense layers give.
FREE = ("moe.", "dtype", "scan_layers", "remat", "parametrization.init_std")


class Beginning(NamedTuple):
    """flops: FLOPs of the dense steps by convention, as `ladder.flops_per_token` has them per token."""

    state: TrainState
    tokens: int
    flops: dict[str, int]


def upcycle(dense_params, dense: ModelConfig, cfg: ModelConfig, start: StartConfig, key):
    """Parameters of `cfg` made of those of `dense`. Pure; both configs have their vocab_size resolved.

    Routers are drawn as `Model.init` draws them from `key`, and balance biases are 0. `start.noise` adds normal noise
    to every expert, the first one too, of that multiple of each matrix's own standard deviation. `start.redrawn` gives
    that share of every expert's hidden units, others in each, the values `Model.init` would (Drop-Upcycling,
    2502.19261, which draws them at the spread of the dense matrices).

    Raises:
      ConfigError: the models differ in more than their experts.
    """
    _check_models(dense, cfg)
    dense_model, model = models.build(dense), models.build(cfg)
    fresh, kinds = model.init(key)["blocks"]["moe"], np.array(cfg.feed_forwards)
    of_experts, of_mlp = (np.flatnonzero(kinds == kind) for kind in ("moe", "mlp"))
    dense_mlp, groups = dense_params["blocks"]["mlp"], cfg.mlp_width // ladder.expert_width(cfg)
    experts = {
        name: _copies(cfg, name, dense_mlp[name][of_experts]) * _scale(dense_model, model, cfg, name)
        for name in dense_mlp
    }
    experts = _redrawn(_noisy(experts, start.noise, key), fresh, start.redrawn, key)
    router_MDE = jnp.repeat(fresh["router"][..., ::groups], groups, -1)
    blocks = dense_params["blocks"] | {"moe": {**experts, "router": router_MDE, "balance": fresh["balance"]}}
    del blocks["mlp"]
    if of_mlp.size:
        blocks["mlp"] = jax.tree.map(lambda a: a[of_mlp], dense_mlp)
    return {**dense_params, "blocks": blocks}


def _copies(cfg: ModelConfig, name: str, matrix):
    """[M, D, F] or, of `down`, [M, F, D] → [M, E, D, F / G] or [M, E, F / G, D]."""
    F, E = ladder.expert_width(cfg), cfg.moe.num_experts
    groups = cfg.mlp_width // F
    if name == "down":
        M, _, D = matrix.shape
        split = matrix.reshape(M, groups, F, D)
    else:
        M, D, _ = matrix.shape
        split = jnp.moveaxis(matrix.reshape(M, D, groups, F), 2, 1)
    return jnp.tile(split, (1, E // groups, 1, 1))


def _scale(dense_model: models.Model, model: models.Model, cfg: ModelConfig, name: str) -> float:
    """Of an expert's matrix relative to the dense one's.

    A token's weights sum to routed_scale, 1 / G of it on each group, and every group must count once: the last matrix
    makes up for it, whatever the activation. With routed_scale = G no weight changes. A scheme that scales matrices by
    their fan-in as they are used (umup) sees a narrower one here.
    """
    before = dense_model.rules(dense_model.specs["blocks"]["mlp"][name]).forward
    after = model.rules(model.specs["blocks"]["moe"][name]).forward
    groups = cfg.mlp_width // ladder.expert_width(cfg)
    return before / after * (groups / cfg.moe.routed_scale if name == "down" else 1.0)


def _noisy(experts: dict, noise: float, key) -> dict:
    if not noise:
        return experts

    def one(name, matrix):
        spread = jnp.std(matrix, (-2, -1), keepdims=True)
        return matrix + noise * spread * jax.random.normal(_key(key, f"noise {name}"), matrix.shape)

    return {name: one(name, matrix) for name, matrix in experts.items()}


def _redrawn(experts: dict, fresh: dict, share: float, key) -> dict:
    M, E, F, _ = experts["down"].shape
    rank_MEF = jnp.argsort(jnp.argsort(jax.random.uniform(_key(key, "redrawn"), (M, E, F))))
    chosen_MEF = rank_MEF < round(share * F)

    def one(name, matrix):
        chosen = chosen_MEF[..., None] if name == "down" else chosen_MEF[:, :, None]
        return jnp.where(chosen, fresh[name], matrix)

    return {name: one(name, matrix) for name, matrix in experts.items()} if share else experts


def _key(key, name: str):
    return jax.random.fold_in(key, zlib.crc32(f"upcycle {name}".encode()))


def _check_models(dense: ModelConfig, cfg: ModelConfig) -> None:
    if dense.moe.num_experts:
        raise ConfigError(
            f"model.moe.num_experts={dense.moe.num_experts} in the run to begin from: only a dense one can be upcycled"
        )
    before, now = config.flatten(dense), config.flatten(cfg)
    for key, value in before.items():
        if now[key] != value and not key.startswith(FREE):
            raise ConfigError(
                f"model.{key}={now[key]!r} is {value!r} in the dense run to begin from; upcycling changes model.moe "
                "alone, so use that value"
            )


# --- from a run's folder ---------------------------------------------------------------------------------------------


def begin(source: Path, cfg: RunConfig, program: Program, fingerprint: dict) -> Beginning:
    """What the run `cfg` of `program` begins with: step `cfg.start.step` of the dense run in the folder `source`.

    fingerprint: of the new run's data, which must be the dense run's.

    Raises:
      ConfigError: no such run, no such step, or one that this run cannot go on from.
      CheckpointError: the step is damaged.
    """
    dense = _source_config(source, cfg, fingerprint)
    with Checkpointer(source / "checkpoints") as checkpoints:
        if cfg.start.step not in checkpoints.steps():
            steps = ", ".join(map(str, checkpoints.steps())) or "none"
            raise ConfigError(
                f"start.step={cfg.start.step}: run {source.name} has no checkpoint of it in {checkpoints.directory} "
                f"(there are: {steps}); use one of these, or train that run to it with log.checkpoint_every"
            )
        _, state, _ = checkpoints.restore(abstract_state(dense), cfg.start.step)
    model = ladder.resolved(cfg).model
    params = jax.jit(lambda params, seed: upcycle(params, dense.model, model, cfg.start, init_key(seed)))(
        state.params, np.uint32(cfg.train.seed)
    )
    tokens = cfg.start.step * dense.train.batch_size * dense.data.seq_len
    # Of a fork's dense model as many as its own start record says.
    counts = models.count_params(models.build(dense.model).specs, dense.model)
    per_token = ladder.run_flops_per_token(dense, counts.dense)
    flops = {name: each * tokens for name, each in per_token.items()}
    return Beginning(program.begin(params, np.int32(cfg.start.step)), tokens, flops)


def _source_config(source: Path, cfg: RunConfig, fingerprint: dict) -> RunConfig:
    """The dense run's, with its vocab_size resolved; refuses what the new run's steps cannot count on from."""
    said = records.read_json(source / "config.json")
    if said is None:
        raise ConfigError(f"start.run={source.name!r}: there is no run in {source}; train it there, or copy it there")
    dense = config.resolve(said)
    dense = ladder.resolved(dense)
    trained_on = (records.read_json(source / "provenance.json") or {}).get("data", {})
    for what in ("tokenizer", "corpus"):
        if trained_on.get(what) != fingerprint[what]:
            raise ConfigError(
                f"start.run={source.name!r} was trained with {what} {trained_on.get(what)}, and this run's is "
                f"{fingerprint[what]}; use the data and tokenizer of that run"
            )
    before, now = config.flatten(dense), config.flatten(cfg)
    for key in ("train.batch_size", "data.seq_len"):
        if before[key] != now[key]:
            raise ConfigError(
                f"{key}={now[key]} is {before[key]} in run {source.name}, from whose step {cfg.start.step} this one "
                "counts on; use that value"
            )
    _check_models(dense.model, ladder.resolved(cfg).model)
    return dense
