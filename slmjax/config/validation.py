"""What can be refused of a config before data are read or anything compiles."""

import dataclasses
import itertools
import math

from slmjax.config.fields import (
    MASKING,
    ConfigError,
    DiffusionConfig,
    ModelConfig,
    MoeConfig,
    RunConfig,
    StartConfig,
)
from slmjax.config.keys import flatten, nearest
from slmjax.config.phases import decay_start, decay_steps
from slmjax.config.synthetic import is_synthetic


def validate(cfg: RunConfig) -> None:
    """Everything that can be refused without reading data or compiling; raises ConfigError with the way out."""
    _validate_choices(cfg)
    _validate_ranges(cfg)
    _validate_shapes(cfg)
    _validate_moe(cfg)
    _validate_objective(cfg)
    _validate_start(cfg)
    _validate_data(cfg)
    _validate_schedule(cfg)


def _validate_choices(cfg: RunConfig) -> None:
    model = cfg.model
    _check_choice("model.build", model.build, ("transformer",), extensible=True)
    _check_choice("model.activation", model.activation, ("swiglu", "geglu", "gelu", "relu2"))
    _check_choice("model.dtype", model.dtype, ("float32", "bfloat16"))
    _check_choice("model.remat", model.remat, ("none", "dots", "full"))
    for kind in model.attention_pattern:
        _check_choice("model.attention_pattern", kind, ("global", "window"))
    schemes = ("sp", "mup", "minicpm", "completep", "umup")
    _check_choice("model.parametrization.name", model.parametrization.name, schemes)
    _check_choice("model.moe.gate", model.moe.gate, ("softmax", "topk_softmax", "sigmoid"))
    _check_choice("model.moe.dispatch", model.moe.dispatch, ("dropless", "capacity", "expert_choice"))
    _check_choice("objective.name", cfg.objective.name, ("next_token", *MASKING), extensible=True)
    _check_choice("model.mask_row", model.mask_row, ("auto", "yes", "no"))
    _check_choice("objective.prompt", cfg.objective.prompt, ("scored", "shown"))
    _check_choice("objective.normaliser", cfg.objective.normaliser, ("token", "sequence"))
    noise, key = cfg.objective.diffusion, "objective.diffusion"
    _check_choice(f"{key}.estimator", noise.estimator, ("bernoulli", "l_uniform"))
    _check_choice(f"{key}.time", noise.time, ("jitter", "low_discrepancy", "antithetic", "iid"))
    _check_choice(f"{key}.schedule", noise.schedule, ("linear", "cosine", "polynomial"))
    _check_choice(f"{key}.weighting", noise.weighting, ("elbo", "flat", "clipped"))
    _check_choice(f"{key}.alignment", noise.alignment, ("same", "shifted"))
    _check_choice("data.packing", cfg.data.packing, ("segments", "concat"))
    _check_choice("optim.name", cfg.optim.name, ("adamw", "muon"), extensible=True)
    _check_choice("optim.decay_rule", cfg.optim.decay_rule, ("lr", "independent"))
    _check_choice("schedule.name", cfg.schedule.name, ("constant", "cosine", "linear", "wsd", "wsd_s"), extensible=True)
    shapes = ("linear", "1-sqrt", "cosine", "inverse", "exponential", "half_life")
    _check_choice("schedule.decay_shape", cfg.schedule.decay_shape, shapes)
    _check_choice("schedule.after_end", cfg.schedule.after_end, ("refuse", "hold"))


def _validate_ranges(cfg: RunConfig) -> None:
    flat = flatten(cfg)
    for key in (
        "model.width model.num_layers model.num_heads model.num_kv_heads model.head_dim model.mlp_width data.seq_len "
        "train.steps train.batch_size train.eval_sequences optim.micro_batches optim.max_skips log.log_every "
        "log.keep_checkpoints mesh.fsdp mesh.tensor mesh.expert mesh.steps_per_dispatch "
        "model.parametrization.base_width model.parametrization.base_layers model.moe.experts_per_token "
        "model.moe.every objective.diffusion.block objective.diffusion.eval_draws"
    ).split():
        _check_range(key, flat[key], 1)
    for key in (
        "model.rope_theta model.norm_eps optim.lr optim.eps model.parametrization.init_std "
        "model.parametrization.embed_multiplier model.parametrization.residual_multiplier "
        "model.parametrization.logits_multiplier model.moe.capacity_factor model.moe.routed_scale model.moe.router_std "
        "objective.diffusion.exponent objective.diffusion.max_weight"
    ).split():
        _check_range(key, flat[key], 0, open_low=True)
    for key in (
        "model.vocab_size model.window model.logit_softcap model.parametrization.base_head_dim objective.z_loss "
        "objective.loss_chunk optim.weight_decay optim.clip_norm optim.spike_factor schedule.warmup_steps "
        "schedule.decay_steps schedule.half_life_steps mesh.data log.eval_every log.checkpoint_every "
        "data.seed model.moe.num_experts model.moe.expert_width model.moe.num_shared_experts "
        "model.moe.leading_dense_layers model.moe.balance_weight model.moe.z_weight model.moe.bias_rate start.step "
        "start.noise"
    ).split():
        _check_range(key, flat[key], 0)
    _check_range("train.seed", cfg.train.seed, 0, 2**32 - 1)
    _check_range("data.vocab_size", cfg.data.vocab_size, 1)
    for key in ("optim.b1", "optim.b2", "optim.momentum", "optim.ema_decay"):
        _check_range(key, flat[key], 0, 0.999999999)
    _check_range("data.held_out", cfg.data.held_out, 0, 0.5, open_low=True)
    _check_range("model.parametrization.depth_alpha", cfg.model.parametrization.depth_alpha, 0.5, 1)
    _check_range("start.redrawn", cfg.start.redrawn, 0, 1)
    _check_range("objective.prompt_end", cfg.objective.prompt_end, 0)
    noise = cfg.objective.diffusion
    _check_range("objective.diffusion.max_rate", noise.max_rate, 0, 1, open_low=True)
    _check_range("objective.diffusion.min_rate", noise.min_rate, 0, noise.max_rate, open_low=True)
    _check_range("objective.diffusion.random_length", noise.random_length, 0, 1)
    _check_range("schedule.final_ratio", cfg.schedule.final_ratio, 0, 1)
    _check_range("schedule.decay_fraction", cfg.schedule.decay_fraction, 0, 1, open_low=True)


def _validate_shapes(cfg: RunConfig) -> None:
    model = cfg.model
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}; "
            f"use a divisor of {model.num_heads} for num_kv_heads"
        )
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim} must be even, because rotary embeddings pair its channels")
    if not model.attention_pattern or model.num_layers % len(model.attention_pattern):
        raise ConfigError(
            f"model.attention_pattern has {len(model.attention_pattern)} entries, which do not divide "
            f"model.num_layers={model.num_layers}"
        )
    if "window" in model.attention_pattern and model.window < 1:
        raise ConfigError(f"model.window={model.window} must be >= 1 when model.attention_pattern has window layers")
    if cfg.train.batch_size % cfg.optim.micro_batches:
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size} is not a multiple of "
            f"optim.micro_batches={cfg.optim.micro_batches}; use a divisor of it"
        )
    micro = cfg.train.batch_size // cfg.optim.micro_batches
    shards = max(cfg.mesh.data, 1) * cfg.mesh.fsdp * cfg.mesh.expert
    if micro % shards:
        raise ConfigError(
            f"a micro-batch of {micro} sequences does not split over mesh.data*mesh.fsdp*mesh.expert={shards} devices; "
            f"use a multiple of {shards} for train.batch_size/optim.micro_batches"
        )


def _validate_moe(cfg: RunConfig) -> None:
    model, moe = cfg.model, cfg.model.moe
    if not moe.num_experts:
        unused = [f.name for f in dataclasses.fields(MoeConfig) if getattr(moe, f.name) != f.default]
        if unused:
            raise ConfigError(
                f"model.moe.{unused[0]}={getattr(moe, unused[0])!r} has no effect with model.moe.num_experts=0; "
                "set the number of experts"
            )
        return
    if moe.experts_per_token > moe.num_experts:
        raise ConfigError(
            f"model.moe.experts_per_token={moe.experts_per_token} is more than model.moe.num_experts={moe.num_experts}"
        )
    if moe.num_experts % cfg.mesh.expert:
        raise ConfigError(
            f"model.moe.num_experts={moe.num_experts} does not split over mesh.expert={cfg.mesh.expert} devices; "
            f"use a multiple of {cfg.mesh.expert}, or set mesh.expert to a divisor of {moe.num_experts}"
        )
    if "moe" not in model.feed_forwards:
        raise ConfigError(
            f"model.moe.leading_dense_layers={moe.leading_dense_layers} and model.moe.every={moe.every} leave none of "
            f"model.num_layers={model.num_layers} with experts"
        )
    _refuse_without_effect(moe)
    if moe.dispatch == "expert_choice" and cfg.objective.name == "next_token":
        raise ConfigError(
            "model.moe.dispatch='expert_choice' is no choice for the causal objective.name='next_token': whether an "
            "expert takes a token depends on the tokens after it, which leaks what is to be predicted; use 'dropless'"
        )
    period = math.lcm(len(model.attention_pattern), moe.every)
    rest = model.num_layers - moe.leading_dense_layers
    if model.scan_layers and (rest % period or moe.leading_dense_layers % len(model.attention_pattern)):
        raise ConfigError(
            f"model.scan_layers needs whole periods of {period} layers (model.attention_pattern and model.moe.every) "
            f"after model.moe.leading_dense_layers={moe.leading_dense_layers}; use scan_layers=False"
        )


def _refuse_without_effect(moe: MoeConfig) -> None:
    """Settings that change a run's name and nothing else, and a router that would learn nothing."""
    unread = {
        "dropless": ("capacity_factor",),
        "capacity": (),
        "expert_choice": ("gate", "renormalise", "bias_rate"),  # its gate is the score, and its loads are even
    }[moe.dispatch]
    for field in dataclasses.fields(MoeConfig):
        if field.name in unread and getattr(moe, field.name) != field.default:
            raise ConfigError(
                f"model.moe.{field.name}={getattr(moe, field.name)!r} has no effect with "
                f"model.moe.dispatch={moe.dispatch!r}; leave it at {field.default!r}"
            )
    if moe.gate == "topk_softmax" and not moe.renormalise:
        raise ConfigError(
            "model.moe.renormalise=False has no effect with model.moe.gate='topk_softmax', whose weights sum to 1; use "
            "gate='softmax'"
        )
    if moe.dispatch != "expert_choice" and moe.experts_per_token == 1 and moe.renormalise:
        raise ConfigError(
            "model.moe.experts_per_token=1 with model.moe.renormalise=True: the one weight is 1 whatever the router "
            "says, which then learns nothing from the loss; set renormalise=False, or use 2 experts per token"
        )


def _validate_objective(cfg: RunConfig) -> None:
    name, noise = cfg.objective.name, cfg.objective.diffusion
    _refuse_noise_without_effect(name, noise)
    if cfg.objective.prompt == "scored" and cfg.objective.prompt_end:
        raise ConfigError(
            f"objective.prompt_end={cfg.objective.prompt_end} has no effect with objective.prompt='scored'; use 'shown'"
        )
    if name not in MASKING:
        return
    if cfg.model.mask_row == "no":
        raise ConfigError(
            f"model.mask_row='no' leaves objective.name={name!r} nothing to show for a hidden token; use 'auto'"
        )
    if noise.time == "antithetic" and cfg.train.batch_size % 2:
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size} is odd, and objective.diffusion.time='antithetic' pairs rows; "
            "use an even number, or time='jitter'"
        )
    if name == "block_diffusion":
        if cfg.data.seq_len % noise.block:
            raise ConfigError(
                f"objective.diffusion.block={noise.block} does not divide data.seq_len={cfg.data.seq_len}; "
                "use a divisor"
            )
        if cfg.model.moe.num_experts and cfg.model.moe.dispatch != "dropless":
            raise ConfigError(
                f"model.moe.dispatch={cfg.model.moe.dispatch!r} with objective.name='block_diffusion': which tokens an "
                "expert takes depends on later blocks, which leaks what is to be predicted; use 'dropless'"
            )


def _refuse_noise_without_effect(name: str, noise: DiffusionConfig) -> None:
    """Fields of `objective.diffusion` that change a run's name and nothing else."""
    fields = {field.name: field.default for field in dataclasses.fields(DiffusionConfig)}
    if name not in MASKING:
        reason, unread = f"objective.name={name!r}", set() if "." in name else set(fields)
    elif name == "masked_diffusion":
        reason, unread = "objective.name='masked_diffusion'", {"block"}
    else:
        reason, unread = "objective.name='block_diffusion'", {"alignment", "random_length"}
    by_field = dict.fromkeys(unread, reason)
    if noise.estimator == "l_uniform":
        by_field |= dict.fromkeys(("schedule", "min_rate", "max_rate"), "objective.diffusion.estimator='l_uniform'")
    if noise.schedule != "polynomial" or noise.estimator == "l_uniform":
        by_field["exponent"] = "a schedule other than 'polynomial'"
    if noise.weighting != "clipped":
        by_field["max_weight"] = f"objective.diffusion.weighting={noise.weighting!r}"
    for field, reason in by_field.items():
        if getattr(noise, field) != fields[field]:
            raise ConfigError(
                f"objective.diffusion.{field}={getattr(noise, field)!r} has no effect with {reason}; leave it at "
                f"{fields[field]!r}"
            )


def _validate_start(cfg: RunConfig) -> None:
    start = cfg.start
    if not start.run:
        if start != StartConfig():
            raise ConfigError("start.step, start.noise and start.redrawn need start.run, the run to begin from")
        return
    if not cfg.model.moe.num_experts:
        raise ConfigError(f"start.run={start.run!r} upcycles a dense run, and model.moe.num_experts=0; set experts")
    if not 1 <= start.step < cfg.train.steps:
        raise ConfigError(
            f"start.step={start.step} must be a step of run {start.run} at least 1 and less than "
            f"train.steps={cfg.train.steps}, which counts the dense steps too"
        )
    if decay_start(cfg) <= start.step:
        raise ConfigError(
            f"start.step={start.step} leaves no step before step {decay_start(cfg)}, where the decay of "
            f"train.steps={cfg.train.steps} begins; begin from an earlier step, or train for longer"
        )
    _validate_upcycling(cfg.model)


def _validate_upcycling(model: ModelConfig) -> None:
    """What keeps the first step of an upcycled model from giving the dense model's logits (`slmjax.upcycle`)."""
    moe = model.moe
    if moe.gate != "topk_softmax" and not moe.renormalise:
        raise ConfigError(
            f"model.moe.renormalise=False with model.moe.gate={moe.gate!r}: a token's weights do not sum to 1, so that "
            "upcycled experts do not give what the dense layer gave; set model.moe.renormalise=True"
        )
    if moe.num_shared_experts:
        raise ConfigError(
            f"model.moe.num_shared_experts={moe.num_shared_experts} would add to what upcycled experts give, which is "
            "the dense layer's output already; use 0, and more experts_per_token"
        )
    never_drops = moe.capacity_factor * moe.experts_per_token >= moe.num_experts
    if moe.dispatch != "dropless" and not (moe.dispatch == "capacity" and never_drops):
        raise ConfigError(
            f"model.moe.dispatch={moe.dispatch!r} leaves tokens without their experts, so that an upcycled model is "
            "not the dense one; use 'dropless'"
        )
    width = moe.expert_width or model.mlp_width
    if model.mlp_width % width:
        raise ConfigError(
            f"model.moe.expert_width={width} does not split upcycled model.mlp_width={model.mlp_width} into equal "
            "groups; use a divisor of it"
        )
    groups = model.mlp_width // width
    for key in ("num_experts", "experts_per_token"):
        if getattr(moe, key) % groups:
            raise ConfigError(
                f"model.moe.{key}={getattr(moe, key)} is not a multiple of the {groups} groups that "
                f"model.moe.expert_width={width} makes of upcycled model.mlp_width={model.mlp_width}; use a multiple, "
                "for a token needs every group of a copy"
            )


def _validate_data(cfg: RunConfig) -> None:
    data = cfg.data
    for key in ("weights", "decay_weights"):
        weights = getattr(data, key)
        if key == "decay_weights" and not weights:
            continue
        if len(weights) != len(data.sources):
            raise ConfigError(f"data.{key} has {len(weights)} entries for {len(data.sources)} data.sources")
        for weight in weights:
            _check_range(f"data.{key}", weight, 0)
        if not data.sources or sum(weights) <= 0:
            raise ConfigError(f"data.{key}={weights} must have a positive sum")
    drawn = [is_synthetic(source) for source in data.sources]
    if any(drawn) and (not all(drawn) or data.tokenizer != "none"):
        raise ConfigError(
            f"data.sources={data.sources}: synthetic sources are tokens already; use them alone, with "
            "data.tokenizer='none'"
        )


def _validate_schedule(cfg: RunConfig) -> None:
    schedule, steps = cfg.schedule, cfg.train.steps
    decay = decay_steps(cfg)
    if schedule.warmup_steps > steps:
        raise ConfigError(f"schedule.warmup_steps={schedule.warmup_steps} is longer than train.steps={steps}")
    if schedule.name == "wsd" and schedule.warmup_steps + decay > steps:
        raise ConfigError(
            f"schedule.decay_steps={decay} after schedule.warmup_steps={schedule.warmup_steps} is longer than "
            f"train.steps={steps}; shorten one or train for at least {schedule.warmup_steps + decay} steps"
        )
    if schedule.name in ("wsd", "wsd_s"):
        if schedule.decay_shape == "half_life" and schedule.half_life_steps < 1:
            raise ConfigError("schedule.half_life_steps=0 must be >= 1 for schedule.decay_shape='half_life'")
        if schedule.decay_shape in ("exponential", "inverse") and schedule.final_ratio <= 0:
            raise ConfigError(
                f"schedule.final_ratio={schedule.final_ratio} must be > 0 for "
                f"schedule.decay_shape={schedule.decay_shape!r}, which never reaches 0; 0.1 is usual"
            )
    if schedule.name == "wsd_s":
        ends = (schedule.warmup_steps, *schedule.period_ends)
        if not schedule.period_ends or ends[-1] != steps:
            raise ConfigError(f"schedule.period_ends={schedule.period_ends} must end at train.steps={steps}")
        if any(b - a < decay for a, b in itertools.pairwise(ends)):
            raise ConfigError(
                f"schedule.period_ends={schedule.period_ends} leaves a period shorter than its {decay} decay steps"
            )


def _check_choice(key: str, value: str, choices: tuple[str, ...], extensible: bool = False) -> None:
    if value not in choices and not (extensible and "." in value):
        also = ", or a dotted module path" if extensible else ""
        raise ConfigError(f"{key}={value!r} is not known; {nearest(value, choices)}{also}")


def _check_range(key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    inside = (value > low if open_low else value >= low) and value <= high
    if not inside or not math.isfinite(value):
        bound = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ConfigError(f"{key}={value!r} must be {bound}")
