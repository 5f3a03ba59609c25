"""Every number and choice that configures a run, and its default: frozen dataclasses, and nothing that reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
class MoeConfig:
    """Mixture of experts in place of the feed-forward of some layers; see `slmjax.models.moe`."""

    num_experts: int = 0  # routed ones, in each such layer; 0: the model is dense
    experts_per_token: int = 2
    expert_width: int = 0  # of one expert; 0: model.mlp_width
    num_shared_experts: int = 0  # of expert_width each, which every token passes
    leading_dense_layers: int = 0
    every: int = 1  # after the leading layers, every n-th layer has experts
    gate: str = "softmax"  # softmax: over all experts, then top-k | topk_softmax: over the chosen ones | sigmoid
    renormalise: bool = True  # a token's weights of its chosen experts sum to 1
    routed_scale: float = 1.0  # multiplies what the routed experts give
    router_std: float = 0.01  # of the router's initial weights (MiniCPM-MoE's code); umup ignores it
    dispatch: str = "dropless"  # dropless | capacity: a bounded number of tokens | expert_choice: experts choose tokens
    capacity_factor: float = 1.25  # of capacity and expert_choice: an expert's places in a sequence over an even load
    balance_weight: float = 0.01  # of the load-balance loss, 1 when even
    z_weight: float = 0.001  # of the mean squared log-partition of the router
    bias_rate: float = 0.0  # step of the loss-free balance bias; 0: off


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
    mask_row: str = (
        "auto"  # an embedding of hidden tokens, which nothing predicts: yes | no | auto: as the objective is
    )
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
    moe: MoeConfig = field(default_factory=MoeConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    options: Mapping[str, Any] = field(default_factory=dict)  # a fork's own fields, read by its own build()

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """Of each layer, "mlp" or "moe"."""
        moe = self.moe
        after = range(1 - moe.leading_dense_layers, 1 - moe.leading_dense_layers + self.num_layers)
        return tuple("moe" if moe.num_experts and n > 0 and n % moe.every == 0 else "mlp" for n in after)


@dataclass(frozen=True)
class DiffusionConfig:
    """How masked and block diffusion hide tokens and weigh their losses; see `slmjax.objectives.noise`."""

    estimator: str = "bernoulli"  # bernoulli: each token at a drawn rate | l_uniform: a drawn number of tokens
    time: str = "jitter"  # of the draws over a batch: jitter, one a stratum | low_discrepancy | antithetic | iid
    schedule: str = "linear"  # masked share over time, of bernoulli: linear | cosine | polynomial
    exponent: float = 2.0  # of schedule=polynomial
    min_rate: float = 0.001  # mask rates of bernoulli are min_rate..max_rate; SMDM's and LLaDA's eps
    max_rate: float = 1.0
    weighting: str = (
        "elbo"  # elbo: the bound | flat: 1 for every hidden token | clipped: the bound's, at most max_weight
    )
    max_weight: float = 10.0
    block: int = 16  # tokens in a block of block diffusion
    random_length: float = 0.0  # share of rows cut in two at a random place, for short contexts; 0.01 in SMDM and LLaDA
    alignment: str = "same"  # same: position i predicts token i | shifted: token i + 1, as autoregression (Dream)
    eval_draws: int = 1  # noise levels a held-out row is scored at


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "next_token"  # a module of slmjax.objectives, or any dotted path, exporting build(cfg) -> Objective
    z_loss: float = 0.0  # weight of the squared log-partition, 1e-4 in Wortsman et al. (2309.14322)
    loss_chunk: int = 0  # about how many tokens' logits are in memory at once; 0: all of them
    prompt: str = "scored"  # scored: as all else | shown: never hidden nor scored, as far as the first prompt_end
    prompt_end: int = 0  # the token that ends a prompt
    normaliser: str = "token"  # token: mean over scored tokens | sequence: mean over rows of the mean over theirs
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Sources: stdlib[:code|:prose], stdlib+deps[:...], a file, a folder of shards, a glob; or synthetic ones alone.

    Synthetic: markov:STATES:SEED, line:TASK:ITEMS:SEED, pairs:COUNT:LENGTH:SEED[:forward|:reverse].
    """

    sources: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] = (1.0,)
    decay_weights: tuple[float, ...] = ()  # the mixture of the decay phase; (): the same
    tokenizer: str = "bpe"  # bpe (trained on the sources, cached) | byte | none (synthetic, shards) | path of a .model
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
class StartConfig:
    """What a run begins with in place of random weights: a dense run's checkpoint, upcycled; see `slmjax.upcycle`."""

    run: str = ""  # run_id of the dense run, in the same folder; "": random weights
    step: int = 0  # of its checkpoint; this run's steps count on from there
    noise: float = 0.0  # added to every copy of an expert, relative to the spread of each of its matrices
    redrawn: float = 0.0  # share of each copy's hidden units that are drawn anew, as for random weights


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 16  # sequences
    eval_sequences: int = 256
    seed: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; the same numbers up to rounding whatever the mesh, so it stays out of a run's identity.

    Where experts are chosen, a rounding may flip a choice between two that are as good as equal.
    """

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
    start: StartConfig = field(default_factory=StartConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)


MASKING = ("masked_diffusion", "block_diffusion")  # objectives that hide tokens
NOT_IDENTITY = ("mesh", "log")

# Fields that are inputs of the compiled step or never reach it: runs that differ only here share one Program.
HYPER = frozenset(
    "optim.lr optim.weight_decay optim.decay_rule optim.b1 optim.b2 optim.eps optim.momentum optim.clip_norm "
    "optim.ema_decay optim.spike_factor optim.max_skips objective.z_loss model.parametrization.init_std "
    "model.moe.balance_weight model.moe.z_weight model.moe.bias_rate "
    "train.steps train.seed train.eval_sequences data.seed data.weights data.decay_weights data.held_out "
    "data.text_key".split()
)
