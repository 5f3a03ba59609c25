"""Closed forms at plan time: parameter and FLOP counts, from a size knob to a shape, from tokens to steps. No JAX here.

Counts are by formula because XLA's cost analysis counts the body of a scan once. Tests hold them equal to the specs.
"""

from dataclasses import asdict, dataclass, replace

from slmjax.config import MASKING, ConfigError, ModelConfig, MoeConfig, RunConfig, override, synthetic

BYTE_VOCAB = 257  # 256 bytes and the document mark
GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class Counts:
    """Parameters by group. `non_embedding` keeps norm gains and leaves out both ends (MiniCPM's N)."""

    embedding: int
    head: int  # an untied output matrix; 0 when tied
    dense: int  # attention, feed-forward, shared experts, routers, norms: what every token passes
    experts: int = 0  # routed ones
    active_experts: int = 0  # of them, those a token passes

    @property
    def non_embedding(self) -> int:
        return self.dense + self.experts

    @property
    def active_non_embedding(self) -> int:
        return self.dense + self.active_experts

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def active(self) -> int:
        return self.embedding + self.head + self.dense + self.active_experts

    def to_dict(self) -> dict[str, int]:
        sums = ("non_embedding", "active_non_embedding", "active", "total")
        return asdict(self) | {name: getattr(self, name) for name in sums}


def vocab_size(cfg: RunConfig) -> int:
    """Tokens the model tells apart, known before any tokenizer is trained or shard opened."""
    if cfg.model.vocab_size:
        return cfg.model.vocab_size
    if cfg.data.tokenizer == "bpe":
        return cfg.data.vocab_size
    if cfg.data.tokenizer == "byte":
        return BYTE_VOCAB
    sizes = [synthetic.vocab_size(source) for source in cfg.data.sources]
    if None not in sizes:
        return max(sizes)
    raise ConfigError(
        f"model.vocab_size=0 cannot be read off data.tokenizer={cfg.data.tokenizer!r}; set model.vocab_size"
    )


def resolved(cfg: RunConfig) -> RunConfig:
    """The config a model is built from: vocabulary size and mask row filled in."""
    mask_row = cfg.model.mask_row
    if mask_row == "auto":
        mask_row = "yes" if cfg.objective.name in MASKING else "no"
    return override(cfg, {"model.vocab_size": vocab_size(cfg), "model.mask_row": mask_row})


def run_counts(cfg: RunConfig) -> Counts:
    """Parameters of a run's model."""
    model = resolved(cfg).model
    return count_params(model, model.vocab_size)


def run_flops_per_token(cfg: RunConfig, dense: int = 0) -> dict[str, int]:
    """Training FLOPs per scored token of a run, as `flops_per_token` has them."""
    copies = 2 if cfg.objective.name == "block_diffusion" else 1
    return flops_per_token(cfg.model, vocab_size(cfg), cfg.data.seq_len, dense, copies)


def count_params(model: ModelConfig, vocab: int) -> Counts:
    """Parameters of the transformer: L(D·C(2H + 2K) + 2D) + D and its feed-forwards, embeddings apart.

    A dense feed-forward has (2 or 3)·D·F; one of experts a router of D·E and (2 or 3)·D times the width of each expert.
    """
    D, moe, num_moe = model.width, model.moe, model.feed_forwards.count("moe")
    gains = 2 * D + (2 * model.head_dim if model.qk_norm else 0)
    expert = num_moe * _feed_forward(model, expert_width(model))
    return Counts(
        embedding=(vocab + (model.mask_row == "yes")) * D,
        head=0 if model.tied_embeddings else vocab * D,
        dense=_always_matmuls(model) + model.num_layers * gains + D,
        experts=expert * moe.num_experts,
        active_experts=expert * moe.experts_per_token,
    )


def expert_width(model: ModelConfig) -> int:
    return model.moe.expert_width or model.mlp_width


def _feed_forward(model: ModelConfig, width: int) -> int:
    return (3 if model.activation in GATED else 2) * model.width * width


def _always_matmuls(model: ModelConfig) -> int:
    """Weights in products that every token passes, both ends apart."""
    D, C, H, K = model.width, model.head_dim, model.num_heads, model.num_kv_heads
    moe, kinds = model.moe, model.feed_forwards
    shared = D * moe.num_experts + _feed_forward(model, moe.num_shared_experts * expert_width(model))
    return (
        model.num_layers * D * C * (2 * H + 2 * K)
        + kinds.count("mlp") * _feed_forward(model, model.mlp_width)
        + kinds.count("moe") * shared
    )


def flops_per_token(model: ModelConfig, vocab: int, seq_len: int, dense: int = 0, copies: int = 1) -> dict[str, int]:
    """Training FLOPs per token (forward and backward, 3 x forward), with and without the output head.

    Matmul weights count 6 each. Attention scores and values count 12·H·C·S per layer, S the keys a query may see
    without the causal mask (T, or the window): the convention of PaLM and DeepSeek (2401.02954), where a dense model
    with H·C = D has M = 72·L·D² + 12·L·D·T. Of experts, those that a token passes, and the router. Rotary embeddings,
    norms, softmax and the sorting of tokens to experts are left out; recomputation is too.
    Block diffusion passes a clean and a noisy copy of every token (`copies`); of one the logits are made.
    A family with other weights than the dense decoder's says how many with `dense`, all taken to be in products.
    """
    C, H = model.head_dim, model.num_heads
    counts = count_params(model, vocab)
    added = (dense - counts.dense if dense else 0) + counts.active_experts
    windows = [min(model.window, seq_len) if kind == "window" else seq_len for kind in model.attention_pattern]
    keys = sum(windows) * (model.num_layers // len(windows))
    body = copies * (6 * (_always_matmuls(model) + added) + 12 * H * C * keys)
    return {"with_head": body + 6 * vocab * model.width, "without_head": body}


def state_bytes(cfg: RunConfig) -> dict[str, int]:
    """Bytes of what training one run holds beside activations, over all its devices: float32 throughout.

    AdamW keeps two moments of every parameter, Muon one of the blocks' matrices; the average is there when it is on.
    """
    counts, model = run_counts(cfg), cfg.model
    routers = model.feed_forwards.count("moe") * model.width * model.moe.num_experts
    matrices = _always_matmuls(model) - routers + counts.experts
    moments = 2 * counts.total - (matrices if cfg.optim.name == "muon" else 0)
    sizes = {"params": counts.total, "gradients": counts.total, "moments": moments}
    sizes["ema"] = counts.total if cfg.optim.ema_decay else 0
    return {name: 4 * size for name, size in sizes.items()} | {"total": 4 * sum(sizes.values())}


def num_tokens(cfg: RunConfig) -> int:
    """D: trained tokens of a run."""
    return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len


def train_flops(cfg: RunConfig) -> int:
    """C: training FLOPs of a run from random weights, head and attention included."""
    assert not cfg.start.run, "what an upcycled run costs is study.total_flops"
    return run_flops_per_token(cfg)["with_head"] * num_tokens(cfg)


def steps_for(tokens: float, batch_size: int, seq_len: int) -> int:
    """Whole steps that train on at least `tokens`."""
    return max(1, -(-int(tokens) // (batch_size * seq_len)))


def shape(width: int, num_layers: int, head_dim: int = 64, mlp_ratio: float = 2.5, kv_heads: int = 0) -> dict:
    """Config overrides for a dense model of this width and depth; mlp_width = mlp_ratio x width (MiniCPM: 2.5).

    Raises:
      ConfigError: width is not a multiple of head_dim.
    """
    if width % head_dim:
        raise ConfigError(f"model.width={width} is not a multiple of model.head_dim={head_dim}")
    heads = width // head_dim
    return {
        "model.width": width,
        "model.num_layers": num_layers,
        "model.num_heads": heads,
        "model.num_kv_heads": kv_heads or heads,
        "model.head_dim": head_dim,
        "model.mlp_width": round(width * mlp_ratio),
    }


def mixture(mlp_width: int, num_experts: int, experts_per_token: int, num_shared: int = 0) -> dict:
    """Config overrides for experts with as many active parameters as a dense feed-forward of mlp_width.

    More and narrower experts per token are what Krajewski et al. (2402.07871) call a higher granularity,
    mlp_width / expert width.

    Raises:
      ConfigError: mlp_width is not a multiple of the active experts.
    """
    active = experts_per_token + num_shared
    if mlp_width % active:
        raise ConfigError(f"model.mlp_width={mlp_width} does not split into {active} active experts of one width")
    return {
        "model.moe.num_experts": num_experts,
        "model.moe.experts_per_token": experts_per_token,
        "model.moe.num_shared_experts": num_shared,
        "model.moe.expert_width": mlp_width // active,
    }


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The dense model of as many active parameters, but for routers and rounding: its feed-forwards are as wide as a
    token's experts together, on average over the layers."""
    active, kinds = model.moe.experts_per_token + model.moe.num_shared_experts, model.feed_forwards
    width = kinds.count("moe") * active * expert_width(model) + kinds.count("mlp") * model.mlp_width
    return replace(model, mlp_width=round(width / model.num_layers), moe=MoeConfig())


# MiniCPM's wind tunnel and its two released sizes (2404.06395, tables 2 and 8): name → (width, layers, kv_heads).
MINICPM = {
    "9m": (320, 8, 0),
    "30m": (512, 12, 0),
    "70m": (640, 14, 0),
    "0.1b": (768, 16, 0),
    "0.17b": (896, 18, 0),
    "0.2b": (1024, 20, 0),
    "0.5b": (1344, 24, 0),
    "1.2b": (1536, 52, 8),
    "2.4b": (2304, 40, 0),
}


def minicpm(size: str) -> dict:
    """Config overrides for a MiniCPM size, e.g. "1.2b"."""
    width, num_layers, kv_heads = MINICPM[size]
    return shape(width, num_layers, kv_heads=kv_heads)


# SMDM's grid (2410.18514), N = layers x (16 width² + 2 width) + width: name → (width, layers, heads). Its "220M" model
# is 170m, its "1.1B" model 1028m.
SMDM = {
    "6m": (256, 6, 4),
    "19m": (384, 8, 6),
    "34m": (512, 8, 8),
    "48m": (576, 9, 9),
    "66m": (640, 10, 10),
    "75m": (640, 16, 8),
    "85m": (640, 13, 10),
    "113m": (768, 12, 12),
    "142m": (768, 15, 12),
    "170m": (768, 18, 12),
    "180m": (896, 14, 14),
    "206m": (896, 16, 14),
    "231m": (896, 18, 14),
    "268m": (1024, 16, 16),
    "302m": (1024, 18, 16),
    "336m": (1024, 20, 16),
    "472m": (1280, 18, 10),
    "551m": (1280, 21, 10),
    "571m": (1408, 18, 11),
    "629m": (1280, 24, 10),
    "666m": (1408, 21, 11),
    "717m": (1536, 19, 12),
    "761m": (1408, 24, 11),
    "831m": (1536, 22, 12),
    "944m": (1536, 25, 12),
    "1028m": (1792, 20, 14),
    "1233m": (1792, 24, 14),
    "1476m": (2048, 22, 16),
    "1678m": (2048, 25, 16),
    "2121m": (2176, 28, 17),
}


def smdm(size: str) -> dict:
    """Config overrides for an SMDM size, e.g. "170m": a feed-forward of 4 x width (75m: 2.5), the head untied."""
    width, num_layers, heads = SMDM[size]
    mlp_ratio = 2.5 if size == "75m" else 4.0
    return shape(width, num_layers, width // heads, mlp_ratio) | {"model.tied_embeddings": False}
