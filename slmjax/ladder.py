"""Closed forms at plan time: parameter and FLOP counts, from a size knob to a shape, from tokens to steps. No JAX here.

Counts are by formula because XLA's cost analysis counts the body of a scan once. Tests hold them equal to the specs.
"""

import re
from dataclasses import asdict, dataclass

from slmjax.config import ConfigError, ModelConfig, RunConfig

BYTE_VOCAB = 257  # 256 bytes and the document mark
GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class Counts:
    """Parameters by group. `non_embedding` keeps norm gains and leaves out both ends (MiniCPM's N)."""

    embedding: int
    head: int  # an untied output matrix; 0 when tied
    dense: int  # attention, feed-forward, norms
    experts: int = 0
    active_experts: int = 0

    @property
    def non_embedding(self) -> int:
        return self.dense + self.experts

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def active(self) -> int:
        return self.embedding + self.head + self.dense + self.active_experts

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"non_embedding": self.non_embedding, "active": self.active, "total": self.total}


def vocab_size(cfg: RunConfig) -> int:
    """Tokens the model tells apart, known before any tokenizer is trained or shard opened."""
    if cfg.model.vocab_size:
        return cfg.model.vocab_size
    if cfg.data.tokenizer == "bpe":
        return cfg.data.vocab_size
    if cfg.data.tokenizer == "byte":
        return BYTE_VOCAB
    markov = re.fullmatch(r"markov:(\d+):\d+", cfg.data.sources[0])
    if markov:
        return int(markov[1])
    raise ConfigError(
        f"model.vocab_size=0 cannot be read off data.tokenizer={cfg.data.tokenizer!r}; set model.vocab_size"
    )


def count_params(model: ModelConfig, vocab: int) -> Counts:
    """Parameters of the dense transformer: L(D·C(2H + 2K) + (2 or 3)·D·F + 2D) + D, embeddings apart."""
    D = model.width
    gains = 2 * D + (2 * model.head_dim if model.qk_norm else 0)
    dense = model.num_layers * (_block_matmuls(model) + gains) + D
    return Counts(embedding=vocab * D, head=0 if model.tied_embeddings else vocab * D, dense=dense)


def _block_matmuls(model: ModelConfig) -> int:
    D, C, H, K, F = model.width, model.head_dim, model.num_heads, model.num_kv_heads, model.mlp_width
    return D * C * (2 * H + 2 * K) + (3 if model.activation in GATED else 2) * D * F


def flops_per_token(model: ModelConfig, vocab: int, seq_len: int, dense: int = 0) -> dict[str, int]:
    """Training FLOPs per token (forward and backward, 3 x forward), with and without the output head.

    Matmul weights count 6 each. Attention scores and values count 12·H·C·S per layer, S the keys a query may see
    without the causal mask (T, or the window): the convention of PaLM and DeepSeek (2401.02954), where a dense model
    with H·C = D has M = 72·L·D² + 12·L·D·T. Rotary embeddings, norms and softmax are left out; recomputation is too.
    A family with other weights than the dense decoder's says how many with `dense`, all taken to be in products.
    """
    C, H = model.head_dim, model.num_heads
    added = dense - count_params(model, vocab).dense if dense else 0
    windows = [min(model.window, seq_len) if kind == "window" else seq_len for kind in model.attention_pattern]
    keys = sum(windows) * (model.num_layers // len(windows))
    body = 6 * (model.num_layers * _block_matmuls(model) + added) + 12 * H * C * keys
    return {"with_head": body + 6 * vocab * model.width, "without_head": body}


def num_tokens(cfg: RunConfig) -> int:
    """D: trained tokens of a run."""
    return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len


def train_flops(cfg: RunConfig) -> int:
    """C: training FLOPs of a run, head and attention included."""
    return flops_per_token(cfg.model, vocab_size(cfg), cfg.data.seq_len)["with_head"] * num_tokens(cfg)


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
