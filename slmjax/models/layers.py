"""The parts of a decoder block, in Linen: weights with roles, RMSNorm, rotary embeddings, attention, feed-forward.

Letters: B batch, T positions, D width, H query heads, K key/value heads, C channels per head, F feed-forward.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.ladder import GATED
from slmjax.models import ParamSpec
from slmjax.models.activation import activate
from slmjax.models.attention import attend
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


def rotate(x_BTHC, theta: float):
    """Rotary position embedding (2104.09864), channel i paired with i + C/2."""
    T, C = x_BTHC.shape[1], x_BTHC.shape[-1]
    frequency_c = theta ** (-jnp.arange(C // 2, dtype=jnp.float32) / (C // 2))
    angle_Tc = jnp.arange(T, dtype=jnp.float32)[:, None] * frequency_c[None]
    cos, sin = (f(angle_Tc)[None, :, None].astype(x_BTHC.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x_BTHC, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nn.Module):
    """Grouped-query self-attention, BTD → BTD."""

    cfg: ModelConfig
    kind: str  # global | window

    @nn.compact
    def __call__(self, x_BTD, segments_BT, attention: str):
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
        q_BTHC, k_BTKC = (rotate(a, cfg.rope_theta) for a in (q_BTHC, k_BTKC))
        y_BTHC = attend(
            q_BTHC,
            k_BTKC,
            v_BTKC,
            segments_BT,
            causal=attention == "causal",
            window=cfg.window if self.kind == "window" else 0,
            scale=Parametrization(cfg).attention_scale,
        )
        return jnp.einsum("bthc,hcd->btd", y_BTHC, out_HCD)


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
