"""The dense decoder: embedding, a stack of pre-norm blocks, a final norm, and a tied or untied output matrix."""

import functools

import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.models import Model, ParamSpec, init_from_specs, is_spec
from slmjax.models.layers import Block, RMSNorm, mean_abs, specs_of
from slmjax.parametrization import Parametrization

_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def build(cfg: ModelConfig) -> Model:
    parametrization = Parametrization(cfg)
    specs = _specs(cfg)
    return Model(
        init=init_from_specs(specs, cfg),
        hidden=functools.partial(_hidden, cfg),
        readout=functools.partial(_readout, cfg),
        unembed=functools.partial(_unembed, cfg),
        specs=specs,
        rules=lambda spec: parametrization.rule(spec.role, spec.fan_in, spec.in_block),
    )


def _specs(cfg: ModelConfig) -> dict:
    L, D, V = cfg.num_layers, cfg.width, cfg.vocab_size
    x_BTD = jax.ShapeDtypeStruct((1, 2, D), cfg.dtype)
    block = specs_of(Block(cfg, "global"), x_BTD, None, "causal", _scales(cfg, 0))
    specs = {
        "embed": {"table": ParamSpec((V, D), ("vocab", "embed"), "embed", V)},
        "blocks": jax.tree.map(
            lambda s: s._replace(shape=(L, *s.shape), axes=("layer", *s.axes)), block, is_leaf=is_spec
        ),
        "final_norm": specs_of(RMSNorm(cfg), x_BTD),
    }
    if not cfg.tied_embeddings:
        specs["head"] = {"kernel": ParamSpec((D, V), ("embed", "vocab"), "readout", D)}
    return specs


def _scales(cfg: ModelConfig, layer: int):
    parametrization = Parametrization(cfg)
    return parametrization.residual(2 * layer), parametrization.residual(2 * layer + 1)


def _hidden(cfg: ModelConfig, params, tokens_BT, segments_BT=None, attention: str = "causal"):
    x_BTD = params["embed"]["table"][tokens_BT].astype(cfg.dtype)
    multiplier = Parametrization(cfg).embed_multiplier
    x_BTD = x_BTD if multiplier == 1.0 else multiplier * x_BTD
    run = _scanned if cfg.scan_layers else _unrolled
    y_BTD, activations = run(cfg, params["blocks"], x_BTD, segments_BT, attention)
    extras = {"activations": {"embed": mean_abs(x_BTD), **activations}}
    return RMSNorm(cfg).apply({"params": params["final_norm"]}, y_BTD), extras


def _block(cfg: ModelConfig, kind: str, segments_BT, attention: str):
    def apply(params, x_BTD, scales):
        return Block(cfg, kind).apply({"params": params}, x_BTD, segments_BT, attention, scales)

    return apply if cfg.remat == "none" else jax.checkpoint(apply, policy=_REMAT[cfg.remat])


def _unrolled(cfg: ModelConfig, blocks, x_BTD, segments_BT, attention: str):
    L, pattern = cfg.num_layers, cfg.attention_pattern
    # split, not indexing: its gradient is one concatenation instead of L padded arrays added up.
    pieces, tree = jax.tree.flatten(jax.tree.map(lambda a: jax.lax.split(a, (1,) * L), blocks), is_leaf=_is_pieces)
    activations = []
    for layer in range(L):
        params = jax.tree.unflatten(tree, [piece[layer][0] for piece in pieces])
        apply = _block(cfg, pattern[layer % len(pattern)], segments_BT, attention)
        x_BTD, seen = apply(params, x_BTD, _scales(cfg, layer))
        activations.append(seen)
    return x_BTD, jax.tree.map(lambda *a_L: jnp.stack(a_L), *activations)


def _is_pieces(x) -> bool:
    return isinstance(x, list | tuple)


def _scanned(cfg: ModelConfig, blocks, x_BTD, segments_BT, attention: str):
    L, P = cfg.num_layers, len(cfg.attention_pattern)
    scales_L22 = jnp.asarray([_scales(cfg, layer) for layer in range(L)], cfg.dtype)
    groups = jax.tree.map(lambda a: a.reshape(L // P, P, *a.shape[1:]), (blocks, scales_L22))

    def body(x_BTD, group):
        activations = []
        for i, kind in enumerate(cfg.attention_pattern):
            params, scales = jax.tree.map(lambda a: a[i], group)  # noqa: B023
            x_BTD, seen = _block(cfg, kind, segments_BT, attention)(params, x_BTD, scales)
            activations.append(seen)
        return x_BTD, jax.tree.map(lambda *a_P: jnp.stack(a_P), *activations)

    x_BTD, activations = jax.lax.scan(body, x_BTD, groups)
    return x_BTD, jax.tree.map(lambda a: a.reshape(L), activations)


def _readout(cfg: ModelConfig, params):
    """The output matrix DV. Tied, it is the table turned once: its gradient in chunks then adds up as DV too, which
    XLA's CPU backend multiplies 3 times faster than VD."""
    return params["embed"]["table"].T if cfg.tied_embeddings else params["head"]["kernel"]


def _unembed(cfg: ModelConfig, readout_DV, x):
    """float32 logits of the last axis of x."""
    logits = jnp.einsum("...d,dv->...v", x, readout_DV.astype(cfg.dtype))
    logits = logits.astype(jnp.float32) * Parametrization(cfg).logits_multiplier
    return cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits
