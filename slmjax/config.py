"""Every number and choice that configures a run: frozen dataclasses, which are the single home of defaults.

Experiment files hand over an `ml_collections.ConfigDict` (made by `config_dict()`); `resolve` turns it into a validated
`RunConfig`. No JAX here, nothing is compiled or read from disk, and nothing below `train` ever sees a ConfigDict.
"""

import dataclasses
import difflib
import hashlib
import importlib
import itertools
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: key, value, and the way out."""


@dataclass(frozen=True)
class ParametrizationConfig:
    """How initial scales, learning rates and multipliers follow width and depth; see `slmjax.parametrization`."""

    name: str = "sp"  # sp | mup | minicpm | completep | umup
    base_width: int = 64  # the width at which every scheme equals sp
    base_layers: int = 2  # the depth at which completep equals mup
    base_head_dim: int = 0  # 0: the head width does not change with size, so logits keep 1/sqrt(head_dim)
    depth_alpha: float = 1.0  # completep's exponent in [0.5, 1]
    init_std: float = 0.02  # of embeddings, and of hidden matrices at base_width; umup ignores it (unit variance)
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # minicpm's scale_depth
    logits_multiplier: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    build: str = "transformer"  # a module of slmjax.models, or any dotted path, exporting build(cfg) -> Model
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_width: int = 320
    activation: str = "swiglu"  # swiglu | geglu | gelu | relu2
    vocab_size: int = 0  # 0: the tokenizer's
    tied_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    logit_softcap: float = 0.0  # c > 0: logits become c * tanh(logits / c)
    attention_pattern: tuple[str, ...] = ("global",)  # repeated over the layers: global | window
    window: int = 0  # keys a `window` layer sees, itself included
    dtype: str = "float32"  # of matmuls and activations; parameters are always float32
    scan_layers: bool = False  # one compiled block for all layers: shorter compiles for deep models
    remat: str = "none"  # none | dots | full: what the backward pass recomputes
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    options: Mapping[str, Any] = field(default_factory=dict)  # a fork's own fields, read by its own build()


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "next_token"  # a module of slmjax.objectives, or any dotted path, exporting build(cfg) -> Objective
    z_loss: float = 0.0  # weight of the squared log-partition, 1e-4 in Wortsman et al. (2309.14322)
    loss_chunk: int = 0  # about how many tokens' logits are in memory at once; 0: all of them
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Sources: stdlib[:code|:prose], stdlib+deps[:...], markov:STATES:SEED, a file, a folder of shards, or a glob."""

    sources: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] = (1.0,)
    decay_weights: tuple[float, ...] = ()  # the mixture of the decay phase; (): the same
    tokenizer: str = "bpe"  # bpe (trained on the sources, cached) | byte | none (markov, shards) | path of a .model
    vocab_size: int = 1024  # of a bpe tokenizer to train
    seq_len: int = 128
    packing: str = "segments"  # segments: packed documents do not see each other | concat: they do
    text_key: str = "text"  # the field or column of .jsonl and .parquet files
    held_out: float = 0.05  # share of documents kept for evaluation, chosen by a hash of their name
    seed: int = 0


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | muon | any dotted path exporting direction(specs, rules, hyper), an optax chain
    lr: float = 1e-2  # peak
    weight_decay: float = 0.1
    decay_rule: str = "lr"  # lr: decays by schedule * lr * weight_decay | independent: by schedule * weight_decay
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # muon's
    clip_norm: float = 1.0  # 0: off
    ema_decay: float = 0.0  # 0: off
    micro_batches: int = 1
    spike_factor: float = 0.0  # skip an update whose gradient norm exceeds this multiple of its running mean; 0: off
    max_skips: int = 50  # consecutive skipped updates after which a run is called diverged


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = (
        "wsd"  # constant | cosine | linear | wsd | wsd_s | any dotted path exporting multiplier(cfg, steps, step)
    )
    warmup_steps: int = 0
    decay_steps: int = 0  # 0: decay_fraction of the run
    decay_fraction: float = 0.1
    decay_shape: str = "1-sqrt"  # linear | 1-sqrt | cosine | inverse | exponential | half_life
    final_ratio: float = 0.0  # the last step's multiple of the peak; also cosine's and linear's floor
    half_life_steps: int = 0  # of decay_shape=half_life: steps until the rate halves, not the decay's length
    period_ends: tuple[int, ...] = ()  # wsd_s: steps at which a decay ends and the peak rate resumes
    after_end: str = "refuse"  # what a step past the end gets: refuse | hold (the final rate)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 16  # sequences
    eval_sequences: int = 256
    seed: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; the same numbers up to rounding whatever the mesh, so it stays out of a run's identity."""

    data: int = 0  # 0: every device that is left
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    steps_per_dispatch: int = 16  # at most; the host looks at a run between dispatches


@dataclass(frozen=True)
class LogConfig:
    log_every: int = 10
    eval_every: int = 0  # 0: at the end only
    checkpoint_every: int = 0  # steps; 0: every minute or so of wall time and at the end
    keep_checkpoints: int = 2
    tensorboard: bool = True


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)


NOT_IDENTITY = ("mesh", "log")

# Fields that are inputs of the compiled step or never reach it: runs that differ only here share one Program.
HYPER = frozenset(
    "optim.lr optim.weight_decay optim.decay_rule optim.b1 optim.b2 optim.eps optim.momentum optim.clip_norm "
    "optim.ema_decay optim.spike_factor optim.max_skips objective.z_loss model.parametrization.init_std "
    "train.steps train.seed train.eval_sequences data.seed data.weights data.decay_weights data.held_out "
    "data.text_key".split()
)


def config_dict(cfg: RunConfig | None = None) -> ConfigDict:
    """The defaults (or `cfg`) as a ConfigDict, locked but for `options`: where every experiment file starts."""
    values = ConfigDict(to_dict(cfg or RunConfig())).lock()
    for group in (values.model, values.objective):
        group.options.unlock()
    return values


def to_dict(cfg) -> dict:
    """Nested plain dict of a config dataclass; tuples stay tuples."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(cfg, f.name)) else _thaw(v)
        for f in dataclasses.fields(cfg)
    }


def resolve(source: ConfigDict | Mapping) -> RunConfig:
    """The validated RunConfig of a ConfigDict or of the nested dict in a `config.json`.

    Raises:
      ConfigError: an unknown key (the nearest valid one is named), a wrong type, or a value that cannot run.
    """
    values = source.to_dict() if isinstance(source, ConfigDict) else source
    cfg = _build(RunConfig, values, "")
    validate(cfg)
    return cfg


def override(cfg: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`cfg` with dotted keys replaced, e.g. {"optim.lr": 3e-3}; an unknown key raises, `validate` checks values."""
    values = to_dict(cfg)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or (last not in node and path[-1:] != ["options"]):
            raise ConfigError(unknown_key(key))
        node[last] = value
    return _build(RunConfig, values, "")


def run_id(cfg: RunConfig) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical config, `mesh` and `log` left out."""
    identity = {k: v for k, v in to_dict(cfg).items() if k not in NOT_IDENTITY}
    return _digest(identity)


def program_id(cfg: RunConfig) -> str:
    """Digest of what the compiled step depends on: the config without the inputs of the step (`HYPER`)."""
    flat = {k: v for k, v in flatten(cfg).items() if not k.startswith(("log.", "schedule.")) and k not in HYPER}
    flat["ema"] = cfg.optim.ema_decay > 0
    return _digest(flat)


def flatten(cfg) -> dict[str, Any]:
    """Dotted key → value."""

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict) and key != "options":
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(cfg), ""))


def unknown_key(key: str) -> str:
    """One line for a key that does not exist, with the nearest that does."""
    known = list(flatten(RunConfig()))
    near = difflib.get_close_matches(key, known, 1, 0.5) or [k for k in known if k.endswith("." + key.split(".")[-1])]
    return f"unknown config key {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    )


def nearest(value: str, choices) -> str:
    """`a, b or c`, with the closest match to `value` named first when there is one."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, 1)
    listed = ", ".join(choices)
    return f"did you mean {near[0]!r}? (choices: {listed})" if near else f"choices: {listed}"


def exported(key: str, module: str, name: str):
    """What the module that a config key names exports under `name`; imports it.

    Raises:
      ConfigError: no such module, or it has no such name.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not
        raise ConfigError(f"{key}={module!r} cannot be imported: there is no module {error.name!r}") from None
    if not hasattr(found, name):
        raise ConfigError(f"{key}={module!r} does not export {name!r}")
    return getattr(found, name)


def _digest(tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()[:10]


def _thaw(value):
    return {k: _thaw(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _build(kind, values: Mapping, prefix: str):
    """A `kind` from nested values, type by type; ints are accepted for floats and lists for tuples, nothing else."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}={values!r} must be a group of keys: {', '.join(hints)}")
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key(prefix + key))
    return kind(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def _coerce(hint, value, key: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} must be a list, e.g. ({value!r},)")
        return tuple(_coerce(typing.get_args(hint)[0], v, key) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        return _plain(value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key}={value!r} must be {hint.__name__}, not {type(value).__name__}")
    return value


def _plain(value, key: str) -> dict:
    """A fork's own options as JSON gives them back, so that a run's identity and its config.json agree."""
    try:
        if isinstance(value, Mapping):
            return json.loads(json.dumps(_thaw(value), allow_nan=False))
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{key}={value!r} must be a mapping that JSON can carry: names, finite numbers, lists, mappings")


def _check_choice(key: str, value: str, choices: tuple[str, ...], extensible: bool = False) -> None:
    if value not in choices and not (extensible and "." in value):
        also = ", or a dotted module path" if extensible else ""
        raise ConfigError(f"{key}={value!r} is not known; {nearest(value, choices)}{also}")


def _check_range(key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    inside = (value > low if open_low else value >= low) and value <= high
    if not inside or not math.isfinite(value):
        bound = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ConfigError(f"{key}={value!r} must be {bound}")


def validate(cfg: RunConfig) -> None:
    """Everything that can be refused without reading data or compiling; raises ConfigError with the way out."""
    _validate_choices(cfg)
    _validate_ranges(cfg)
    _validate_shapes(cfg)
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
    _check_choice("objective.name", cfg.objective.name, ("next_token",), extensible=True)
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
        "model.parametrization.base_width model.parametrization.base_layers"
    ).split():
        _check_range(key, flat[key], 1)
    for key in (
        "model.rope_theta model.norm_eps optim.lr optim.eps model.parametrization.init_std "
        "model.parametrization.embed_multiplier model.parametrization.residual_multiplier "
        "model.parametrization.logits_multiplier"
    ).split():
        _check_range(key, flat[key], 0, open_low=True)
    for key in (
        "model.vocab_size model.window model.logit_softcap model.parametrization.base_head_dim objective.z_loss "
        "objective.loss_chunk optim.weight_decay optim.clip_norm optim.spike_factor schedule.warmup_steps "
        "schedule.decay_steps schedule.half_life_steps mesh.data log.eval_every log.checkpoint_every "
        "data.seed"
    ).split():
        _check_range(key, flat[key], 0)
    _check_range("train.seed", cfg.train.seed, 0, 2**32 - 1)
    _check_range("data.vocab_size", cfg.data.vocab_size, 1)
    for key in ("optim.b1", "optim.b2", "optim.momentum", "optim.ema_decay"):
        _check_range(key, flat[key], 0, 0.999999999)
    _check_range("data.held_out", cfg.data.held_out, 0, 0.5, open_low=True)
    _check_range("model.parametrization.depth_alpha", cfg.model.parametrization.depth_alpha, 0.5, 1)
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
    micro, shards = cfg.train.batch_size // cfg.optim.micro_batches, max(cfg.mesh.data, 1) * cfg.mesh.fsdp
    if micro % shards:
        raise ConfigError(
            f"a micro-batch of {micro} sequences does not split over mesh.data*mesh.fsdp={shards} devices; "
            f"use a multiple of {shards} for train.batch_size/optim.micro_batches"
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
    markov = [source.startswith("markov:") for source in data.sources]
    if any(markov) and (not all(markov) or data.tokenizer != "none"):
        raise ConfigError(f"data.sources={data.sources}: markov chains are tokens already; use data.tokenizer='none'")


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


def decay_steps(cfg: RunConfig) -> int:
    """Length of a decay in steps; 0 for schedules without one."""
    if cfg.schedule.name not in ("wsd", "wsd_s"):
        return 0
    span = cfg.train.steps if cfg.schedule.name == "wsd" else min(cfg.schedule.period_ends or (cfg.train.steps,))
    return cfg.schedule.decay_steps or max(1, round(cfg.schedule.decay_fraction * span))


def decay_start(cfg: RunConfig) -> int:
    """First step of the final decay: where a branch leaves its trunk. train.steps when nothing decays."""
    return cfg.train.steps - decay_steps(cfg)


def shared_steps(a: RunConfig, b: RunConfig) -> int:
    """How many first steps of two runs are the same computation: what one may take from the other's checkpoints.

    A WSD run, its trunk and every other branch of that trunk agree until the first of their decays begins (MiniCPM,
    2404.06395, section 4.2); runs that differ in anything else share nothing.
    """
    may_differ = ("train.steps", "train.eval_sequences", "data.decay_weights", "optim.max_skips")
    flat_a, flat_b = ({k: v for k, v in flatten(c).items() if k not in may_differ} for c in (a, b))
    same = {k: v for k, v in flat_a.items() if not k.startswith(("schedule.", "mesh.", "log."))}
    if any(flat_b[k] != v for k, v in same.items()) or a.schedule.warmup_steps != b.schedule.warmup_steps:
        return 0
    if not {a.schedule.name, b.schedule.name} <= {"constant", "wsd"}:
        return 0
    return min(decay_start(a), decay_start(b))
