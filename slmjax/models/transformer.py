"""The transformer: embedding, a stack of pre-norm blocks, dense or with experts, a final norm, and an output matrix."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.models import Model, ParamSpec, init_from_specs, is_spec, moe
from slmjax.models.block import Block
from slmjax.models.layers import Memory, RMSNorm, mean_abs, specs_of
from slmjax.parametrization import Parametrization

FEED_FORWARDS = ("mlp", "moe")

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
        memory=functools.partial(_memory, cfg),
        extend=functools.partial(_extend, cfg),
        readout=functools.partial(_readout, cfg),
        unembed=functools.partial(_unembed, cfg),
        specs=specs,
        rules=lambda spec: parametrization.rule(spec.role, spec.fan_in, spec.in_block),
        auxiliary=moe.auxiliary(cfg) if "moe" in cfg.feed_forwards else None,
    )


def _specs(cfg: ModelConfig) -> dict:
    """Layers are stacked on axis 0: all of them for what every layer has, those of its kind for each feed-forward."""
    D, V, kinds = cfg.width, cfg.vocab_size, cfg.feed_forwards
    x_BTD = jax.ShapeDtypeStruct((1, 2, D), cfg.dtype)
    blocks = {}
    for kind in sorted(set(kinds)):
        # Parameters do not depend on which attention is asked for; expert choice exists under full attention alone.
        parts = specs_of(Block(cfg, "global", kind), x_BTD, None, "full", _scales(cfg, 0))
        num = {name: kinds.count(kind) if name == kind else cfg.num_layers for name in parts}
        blocks |= {name: _stacked(part, num[name]) for name, part in parts.items()}
    specs = {
        "embed": {"table": ParamSpec((V, D), ("vocab", "embed"), "embed", V)},
        "blocks": blocks,
        "final_norm": specs_of(RMSNorm(cfg), x_BTD),
    }
    if cfg.mask_row == "yes":
        specs["embed"]["mask"] = ParamSpec((D,), ("embed",), "embed", V)
    if not cfg.tied_embeddings:
        specs["head"] = {"kernel": ParamSpec((D, V), ("embed", "vocab"), "readout", D)}
    return specs


def _stacked(specs, num_layers: int):
    return jax.tree.map(
        lambda s: s._replace(shape=(num_layers, *s.shape), axes=("layer", *s.axes)), specs, is_leaf=is_spec
    )


def _scales(cfg: ModelConfig, layer: int):
    parametrization = Parametrization(cfg)
    return parametrization.residual(2 * layer), parametrization.residual(2 * layer + 1)


def _hidden(cfg: ModelConfig, params, tokens_BT, segments_BT=None, attention: str = "causal"):
    x_BTD = _embed(cfg, params["embed"], tokens_BT)
    run = _scanned if cfg.scan_layers else _unrolled
    y_BTD, activations, sums = run(cfg, params["blocks"], x_BTD, segments_BT, attention)
    extras = {"activations": {"embed": mean_abs(x_BTD), **activations}}
    if sums is not None:
        extras["sums"] = sums
    return RMSNorm(cfg).apply({"params": params["final_norm"]}, y_BTD), extras


def _embed(cfg: ModelConfig, params, tokens_BT):
    """A hidden token, -1, has an embedding that is no row of the table: the readout must not predict it."""
    x_BTD = params["table"][jnp.maximum(tokens_BT, 0) if "mask" in params else tokens_BT]
    if "mask" in params:
        x_BTD = jnp.where((tokens_BT < 0)[..., None], params["mask"][None, None], x_BTD)
    multiplier = Parametrization(cfg).embed_multiplier
    x_BTD = x_BTD.astype(cfg.dtype)
    return x_BTD if multiplier == 1.0 else multiplier * x_BTD


def _memory(cfg: ModelConfig, B: int, S: int):
    """Keys and values of no token yet: a (key, value) of zeros [B, S, K, C] for every layer."""
    shape = (B, S, cfg.num_kv_heads, cfg.head_dim)
    return tuple((jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)) for _ in range(cfg.num_layers))


def _extend(cfg: ModelConfig, params, tokens_BT, positions_BT, memory, seen_BTS):
    """As `_hidden` of the tokens at some positions of rows whose other keys and values are in `memory`."""
    x_BTD, kinds = _embed(cfg, params["embed"], tokens_BT), _kinds(cfg)
    remembered = []
    for layer, (kind, of_layer, (key_BSKC, value_BSKC)) in enumerate(
        zip(kinds, _layers(params["blocks"], kinds), memory, strict=True)
    ):
        before = Memory(key_BSKC, value_BSKC, positions_BT, seen_BTS)
        x_BTD, _, _, after = Block(cfg, *kind).apply(
            {"params": of_layer}, x_BTD, None, "full", _scales(cfg, layer), before
        )
        remembered.append((after.key_BSKC, after.value_BSKC))
    return RMSNorm(cfg).apply({"params": params["final_norm"]}, x_BTD), tuple(remembered)


def _kinds(cfg: ModelConfig) -> list[tuple[str, str]]:
    """(attention, feed-forward) of each layer."""
    return list(zip(itertools.cycle(cfg.attention_pattern), cfg.feed_forwards, strict=False))


def _block(cfg: ModelConfig, kind: tuple[str, str], segments_BT, attention: str):
    def apply(params, x_BTD, scales):
        return Block(cfg, *kind).apply({"params": params}, x_BTD, segments_BT, attention, scales)

    return apply if cfg.remat == "none" else jax.checkpoint(apply, policy=_REMAT[cfg.remat])


def _layers(blocks, kinds: list[tuple[str, str]]) -> list[dict]:
    """The parameters of each layer, taken apart."""
    pieces = {name: iter(_split(part)) for name, part in blocks.items()}
    names = [[name for name in blocks if name not in FEED_FORWARDS or name == kind] for _, kind in kinds]
    return [{name: next(pieces[name]) for name in of_layer} for of_layer in names]


def _split(stacked) -> list:
    # split, not indexing: its gradient is one concatenation instead of L padded arrays added up.
    leaves, tree = jax.tree.flatten(stacked)
    num = len(leaves[0])
    pieces = [jax.lax.split(leaf, (1,) * num) for leaf in leaves]
    return [jax.tree.unflatten(tree, [piece[i][0] for piece in pieces]) for i in range(num)]


def _unrolled(cfg: ModelConfig, blocks, x_BTD, segments_BT, attention: str):
    kinds = _kinds(cfg)
    scales = [_scales(cfg, layer) for layer in range(cfg.num_layers)]
    return _through(cfg, kinds, _layers(blocks, kinds), scales, x_BTD, segments_BT, attention)


def _through(cfg: ModelConfig, kinds, layers, scales, x_BTD, segments_BT, attention: str):
    """x_BTD after these layers, their activations stacked, and the stacked sums of those with experts, or None."""
    activations, sums = [], []
    for kind, params, scale in zip(kinds, layers, scales, strict=True):
        x_BTD, seen, of_experts, _ = _block(cfg, kind, segments_BT, attention)(params, x_BTD, scale)
        activations.append(seen)
        sums += [of_experts] if of_experts is not None else []
    return x_BTD, _stack(activations), _stack(sums)


def _stack(trees: list):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None


def _scanned(cfg: ModelConfig, blocks, x_BTD, segments_BT, attention: str):
    """One compiled period of layers for all that repeat it; leading dense layers have a shorter one of their own."""
    P = len(cfg.attention_pattern)
    leading = cfg.moe.leading_dense_layers if cfg.moe.num_experts else 0
    activations, sums = [], []
    spans = ((0, leading, P), (leading, cfg.num_layers, math.lcm(P, cfg.moe.every if cfg.moe.num_experts else 1)))
    for first, last, period in spans:
        if last > first:
            x_BTD, seen, of_experts = _scan(cfg, first, last, period, blocks, x_BTD, segments_BT, attention)
            activations.append(seen)
            sums += [of_experts] if of_experts is not None else []
    return x_BTD, _concatenate(activations), _concatenate(sums)


def _concatenate(trees: list):
    return jax.tree.map(lambda *a: jnp.concatenate(a), *trees) if trees else None


def _scan(cfg: ModelConfig, first: int, last: int, period: int, blocks, x_BTD, segments_BT, attention: str):
    """As `_through`, for layers first..last-1, which repeat every `period`."""
    kinds, repeats = _kinds(cfg), (last - first) // period
    scales_L22 = jnp.asarray([_scales(cfg, layer) for layer in range(first, last)], cfg.dtype)

    def grouped(name, stacked):
        begin, end = (sum(name not in FEED_FORWARDS or name == kind for _, kind in kinds[:n]) for n in (first, last))
        return jax.tree.map(lambda a: a[begin:end].reshape(repeats, (end - begin) // repeats, *a.shape[1:]), stacked)

    present = {kind for _, kind in kinds[first:last]}
    groups = {name: grouped(name, b) for name, b in blocks.items() if name not in FEED_FORWARDS or name in present}

    def body(x_BTD, group):
        params, scales_P22 = group
        layers = _layers(params, kinds[first : first + period])
        x_BTD, *seen = _through(cfg, kinds[first : first + period], layers, scales_P22, x_BTD, segments_BT, attention)
        return x_BTD, seen

    x_BTD, seen = jax.lax.scan(body, x_BTD, (groups, scales_L22.reshape(repeats, period, 2, 2)))
    return x_BTD, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), seen)


def _readout(cfg: ModelConfig, params):
    """The output matrix DV. Tied, it is the table turned once: its gradient in chunks then adds up as DV too, which
    XLA's CPU backend multiplies 3 times faster than VD."""
    return params["embed"]["table"].T if cfg.tied_embeddings else params["head"]["kernel"]


def _unembed(cfg: ModelConfig, readout_DV, x):
    """float32 logits of the last axis of x."""
    logits = jnp.einsum("...d,dv->...v", x, readout_DV.astype(cfg.dtype))
    logits = logits.astype(jnp.float32) * Parametrization(cfg).logits_multiplier
    return cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits
