"""The parts of a decoder block, in Linen: weights with roles, RMSNorm, rotary embeddings, attention, feed-forward.

Letters: B batch, T positions, D width, H query heads, K key/value heads, C channels per head, F feed-forward.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.ladder import GATED
from slmjax.models import ParamSpec
from slmjax.models.activation import activate
from slmjax.models.attention import attend, positions, recall
from slmjax.parametrization import Parametrization


class Declared(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter as a module declares it; `specs_of` reads the spec, and nothing after birth sees the box."""

    value: jax.Array
    spec: ParamSpec = flax.struct.field(pytree_node=False)

    def unbox(self, apply_constraint: bool = True):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        raise AssertionError("layers are stacked by slmjax.models.transformer, not by Linen's transforms")

    remove_axis = add_axis


def weight(module: nn.Module, name: str, shape, axes, role: str = "hidden", num_in: int = 1):
    """The one way a module gets a parameter, ready to use: at its forward scale, in the compute dtype.

    The first `num_in` dimensions, after that of experts, are the ones a product sums over. Values are drawn from the
    specs (`models.init_from_specs`), so the initializer here only gives the shape.
    """
    cfg = module.cfg
    first = axes.index("expert") + 1 if "expert" in axes else 0
    spec = ParamSpec(tuple(shape), tuple(axes), role, math.prod(shape[first : first + num_in]))
    value = module.param(name, lambda key: Declared(jnp.zeros(shape, jnp.float32), spec))
    forward = Parametrization(cfg).rule(role, spec.fan_in, in_block=True).forward
    value = value if role in ("norm", "router", "balance") else value.astype(cfg.dtype)
    return value if forward == 1.0 else forward * value


def specs_of(module: nn.Module, x: jax.ShapeDtypeStruct, *others) -> dict:
    """The ParamSpecs a module declares when called with an array like x and `others`; nothing is computed."""
    boxed = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *others), x)["params"]
    return jax.tree.map(lambda box: box.spec, boxed, is_leaf=lambda x: isinstance(x, Declared))


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in float32 (1910.07467)."""

    cfg: ModelConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        gain = weight(self, "gain", x.shape[-1:], (self.axis,), "norm")
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.cfg.norm_eps)
        return (x32 * inverse_rms * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)


def rotate(x_BTHC, positions_BT, theta: float):
    """Rotary position embedding (2104.09864), channel i paired with i + C/2. Of positions, B may be 1."""
    C = x_BTHC.shape[-1]
    frequency_c = theta ** (-jnp.arange(C // 2, dtype=jnp.float32) / (C // 2))
    angle_BTc = positions_BT.astype(jnp.float32)[..., None] * frequency_c[None, None]
    cos, sin = (f(angle_BTc)[:, :, None].astype(x_BTHC.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x_BTHC, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Memory(NamedTuple):
    """One layer's keys and values at all S positions of a row, and where the T inputs of a call stand among them.

    positions_BT: each input's place, whose key and value it replaces; S or more leaves them alone.
    seen_BTS: which places each input attends to.
    """

    key_BSKC: jax.Array
    value_BSKC: jax.Array
    positions_BT: jax.Array
    seen_BTS: jax.Array

    def updated(self, k_BTKC, v_BTKC) -> "Memory":
        rows_B1 = jnp.arange(len(self.positions_BT))[:, None]
        key_BSKC = self.key_BSKC.at[rows_B1, self.positions_BT].set(k_BTKC, mode="drop")
        value_BSKC = self.value_BSKC.at[rows_B1, self.positions_BT].set(v_BTKC, mode="drop")
        return self._replace(key_BSKC=key_BSKC, value_BSKC=value_BSKC)


class Attention(nn.Module):
    """Grouped-query self-attention, BTD → BTD; with a Memory, over what it holds, and the Memory with these inputs."""

    cfg: ModelConfig
    kind: str  # global | window

    @nn.compact
    def __call__(self, x_BTD, segments_BT, attention: str, memory: Memory | None = None):
        cfg = self.cfg
        D, H, K, C = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        query_DHC = weight(self, "query", (D, H, C), ("embed", "heads", "head"))
        key_DKC = weight(self, "key", (D, K, C), ("embed", "kv_heads", "head"))
        value_DKC = weight(self, "value", (D, K, C), ("embed", "kv_heads", "head"))
        out_HCD = weight(self, "out", (H, C, D), ("heads", "head", "embed"), num_in=2)
        q_BTHC = jnp.einsum("btd,dhc->bthc", x_BTD, query_DHC)
        k_BTKC = jnp.einsum("btd,dkc->btkc", x_BTD, key_DKC)
        v_BTKC = jnp.einsum("btd,dkc->btkc", x_BTD, value_DKC)
        if cfg.qk_norm:
            q_BTHC = RMSNorm(cfg, "head", name="query_norm")(q_BTHC)
            k_BTKC = RMSNorm(cfg, "head", name="key_norm")(k_BTKC)
        positions_BT = positions(attention, x_BTD.shape[1]) if memory is None else memory.positions_BT
        q_BTHC, k_BTKC = (rotate(a, positions_BT, cfg.rope_theta) for a in (q_BTHC, k_BTKC))
        window, scale = cfg.window if self.kind == "window" else 0, Parametrization(cfg).attention_scale
        if memory is None:
            y_BTHC = attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, attention=attention, window=window, scale=scale)
        else:
            memory, seen_BTS = memory.updated(k_BTKC, v_BTKC), memory.seen_BTS
            if window:
                away_BTS = positions_BT[..., None] - jnp.arange(seen_BTS.shape[-1])[None, None]
                seen_BTS = seen_BTS & (jnp.abs(away_BTS) < window)
            y_BTHC = recall(q_BTHC, memory.key_BSKC, memory.value_BSKC, seen_BTS, scale=scale)
        return jnp.einsum("bthc,hcd->btd", y_BTHC, out_HCD), memory


class Mlp(nn.Module):
    """Feed-forward of any width, BTD → BTD."""

    cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.cfg.width, self.width
        up_DF = weight(self, "up", (D, F), ("embed", "mlp"))
        down_FD = weight(self, "down", (F, D), ("mlp", "embed"))
        products = [x_BTD @ up_DF]
        if self.cfg.activation in GATED:
            products.insert(0, x_BTD @ weight(self, "gate", (D, F), ("embed", "mlp")))
        return activate(self.cfg.activation, *products) @ down_FD


def mean_abs(x):
    """What a coordinate check looks at. XLA drops it where nobody does."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32)))
