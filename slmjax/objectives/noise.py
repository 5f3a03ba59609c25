"""What masked diffusion hides and what it counts: noise levels, masks, and weights.

Time t runs over (0, 1], the masked share of a sequence from about 0 to 1. With the linear schedule a token is hidden
with probability p = t, and -log p(x) <= E_t (1/t) sum over hidden tokens of their cross-entropy. The bound's value does
not depend on the schedule, for the denoiser sees no time: only the variance of its estimate does (MDLM, 2406.07524).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import DiffusionConfig

HIDDEN = -1  # an input token that the model is not shown; its embedding is the mask's
NUM_LEVELS = 8  # of the noise, in what logs show


class Noise(NamedTuple):
    """Beside a View: how it was noised, and the bound, whatever the loss is weighted by."""

    rate_BT: jax.Array  # the noise level of each position: the share that is hidden, on average or in fact
    bound_BT: jax.Array  # weights of the bound; 0 where a token is shown
    scored_BT: jax.Array  # 1.0 where a token could have been hidden: what the bound is a sum over


def times(kind: str, key, num: int):
    """float32 [num] in (0, 1], each uniform on its own.

    jitter: one in each [i/num, (i+1)/num) (MDLM, RADD). low_discrepancy: one offset for all (VDM). antithetic: pairs i
    and i + num/2 add up to 1, jittered.
    """
    if kind == "iid":
        return 1.0 - jax.random.uniform(key, (num,))
    if kind == "antithetic":
        half = times("jitter", key, num // 2)
        return jnp.concatenate([half, jnp.maximum(1.0 - half, jnp.finfo(jnp.float32).tiny)])
    # arange(num) / num, not a floating step: that gives num + 1 strata for some num.
    lows = jnp.arange(num, dtype=jnp.float32) / num
    if kind == "low_discrepancy":
        shifted = lows + 1.0 - jax.random.uniform(key, ())
        return jnp.where(shifted > 1.0, shifted - 1.0, shifted)
    highs = jnp.arange(1, num + 1, dtype=jnp.float32) / num
    drawn = lows + jax.random.uniform(key, (num,)) / num
    # Rounding must not push a time over the edge of its stratum, nor to 0.
    return jnp.clip(drawn, jnp.nextafter(lows, 1.0), jnp.nextafter(highs, 0.0))


def masked_share(cfg: DiffusionConfig, t):
    """(1 - alpha_t, its derivative in t): 0 at t = 0, 1 at t = 1."""
    if cfg.schedule == "linear":
        return t, jnp.ones_like(t)
    if cfg.schedule == "cosine":  # MD4: alpha = 1 - cos(pi/2 (1 - t))
        angle = math.pi / 2 * (1 - t)
        return jnp.cos(angle), math.pi / 2 * jnp.sin(angle)
    return t**cfg.exponent, cfg.exponent * t ** (cfg.exponent - 1)


def rate_and_weight(cfg: DiffusionConfig, t):
    """(mask rate p, weight of the bound) at time t: the derivative of the masked share over p.

    p = min_rate + (max_rate - min_rate) x share, and the weight is 1/p of that p (SMDM, LLaDA): so the estimate's mean
    lies above the bound's by about half of min_rate, never below it. MDLM's form, which floors p but not the weight's,
    lies below the entropy.
    """
    share, slope = masked_share(cfg, t)
    rate = cfg.min_rate + (cfg.max_rate - cfg.min_rate) * share
    return rate, slope / rate


def by_rate(cfg: DiffusionConfig, t_G, uniform_GS, scorable_GS):
    """(hidden_GS, rate_GS, weight_GS): every scorable token of group g is hidden with its rate, on its own."""
    rate_G, weight_G = rate_and_weight(cfg, t_G)
    hidden_GS = scorable_GS & (uniform_GS < rate_G[:, None])
    return hidden_GS, *(jnp.broadcast_to(a[:, None], hidden_GS.shape) for a in (rate_G, weight_G))


def by_count(t_G, uniform_GS, scorable_GS):
    """As `by_rate`: exactly l of a group's n scorable tokens are hidden, l uniform on 1..n; the weight is n / l.

    The same mean with a third of the spread, and no floor (RADD's k-DCE, 2406.03736; LLaDA's likelihood).
    """
    n_G1 = jnp.sum(scorable_GS, -1, keepdims=True)
    l_G1 = jnp.ceil(t_G[:, None] * n_G1).astype(jnp.int32)  # t in (0, 1]
    order_GS = jnp.argsort(jnp.where(scorable_GS, uniform_GS, 2.0), -1)
    rank_GS = jnp.argsort(order_GS, -1)
    hidden_GS = scorable_GS & (rank_GS < l_G1)
    rate_GS = jnp.broadcast_to(l_G1 / jnp.maximum(n_G1, 1), hidden_GS.shape)
    return hidden_GS, rate_GS, 1.0 / jnp.maximum(rate_GS, jnp.finfo(jnp.float32).tiny)


def loss_weights(cfg: DiffusionConfig, weight_BT):
    """The bound's weights as the loss takes them: any other choice keeps the optimum but is no bound."""
    if cfg.weighting == "flat":
        return jnp.ones_like(weight_BT)
    return jnp.minimum(weight_BT, cfg.max_weight) if cfg.weighting == "clipped" else weight_BT


class RowDraws(NamedTuple):
    """Uniform numbers that depend on a row's own tokens, so that held-out noise is the same in whatever batch it
    lies."""

    time_G: jax.Array
    uniform_GS: jax.Array


def row_draws(key, tokens_BT, groups: int, draw, num_draws: int) -> RowDraws:
    """Times and mask noise of `groups` equal parts of each row, in draw number `draw` of num_draws.

    The draws of one row are spread evenly over noise levels; rows are independent.
    """
    B, T = tokens_BT.shape
    odd_T = 2 * jax.random.bits(jax.random.fold_in(key, 0), (T,)) + 1
    hashes_B = jnp.sum(tokens_BT.astype(jnp.uint32) * odd_T[None], axis=1)

    def one(row_hash):
        row_key = jax.random.fold_in(key, row_hash)
        time_key, mask_key = jax.random.fold_in(row_key, 1), jax.random.fold_in(jax.random.fold_in(row_key, 2), draw)
        offsets = jax.random.uniform(time_key, (groups,)) + draw / num_draws
        return 1.0 - offsets % 1.0, jax.random.uniform(mask_key, (T,))

    time_BG, uniform_BT = jax.vmap(one)(hashes_B)
    return RowDraws(time_BG.reshape(-1), uniform_BT.reshape(B * groups, T // groups))


def batch_draws(kind: str, key, shape: tuple[int, int], groups: int) -> RowDraws:
    """The same for a training batch: times are stratified over all groups of all rows together."""
    B, T = shape
    # In random order: a place in the batch may belong to a source or a block, which must meet all levels alike.
    strata_G = times(kind, jax.random.fold_in(key, 1), B * groups)
    t_G = jax.random.permutation(jax.random.fold_in(key, 4), strata_G)
    uniform_GS = jax.random.uniform(jax.random.fold_in(key, 2), (B * groups, T // groups))
    return RowDraws(t_G, uniform_GS)


def level_ratios(noise: Noise, nll_BT) -> dict[str, tuple[jax.Array, jax.Array]]:
    """name → (sum, count) of what logs show of a batch: the bound, and hidden tokens' cross-entropy by noise level.

    Levels are NUM_LEVELS equal bins of the masked share. It must rise with noise, to the unigram's entropy at the end.
    """
    hidden_BT = (noise.bound_BT > 0).astype(jnp.float32)
    level_BT = jnp.clip((noise.rate_BT * NUM_LEVELS).astype(jnp.int32), 0, NUM_LEVELS - 1)
    at_BTN = hidden_BT[..., None] * jax.nn.one_hot(level_BT, NUM_LEVELS)
    return {
        "nelbo": (jnp.sum(noise.bound_BT * nll_BT), jnp.sum(noise.scored_BT)),
        "loss_by_noise": (jnp.sum(at_BTN * nll_BT[..., None], (0, 1)), jnp.sum(at_BTN, (0, 1))),
        "masked": (jnp.sum(hidden_BT), jnp.sum(noise.scored_BT)),
    }
