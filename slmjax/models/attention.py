"""Softmax attention over grouped heads, by the kernel that suits the device."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

CPU_BLOCK = 64  # queries; measured on 2 cores at T 256, where 32, 64 and 128 are within noise of each other


def attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, *, causal: bool, window: int, scale: float):
    """BTHC. Keys of other segments, of the future (causal), or `window` and more positions away are not seen.

    Query head h reads key/value head h // (H / K). window 0 is no window.
    """
    if jax.default_backend() == "cpu":
        return _blocked(q_BTHC, k_BTKC, v_BTKC, segments_BT, causal=causal, window=window, scale=scale)
    mask = None if segments_BT is None else (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        mask=mask,
        scale=scale,
        is_causal=causal,
        local_window_size=(window - 1, 0 if causal else window - 1) if window else None,
        implementation=_implementation(q_BTHC),
    )


def _implementation(q_BTHC) -> str | None:
    # cuDNN's flash attention takes half precision and head widths to 128 in steps of 8; None lets XLA choose.
    fits = q_BTHC.dtype == jnp.bfloat16 and q_BTHC.shape[-1] % 8 == 0 and q_BTHC.shape[-1] <= 128
    return "cudnn" if fits and jax.default_backend() == "gpu" else None


class _Mask(NamedTuple):
    """What a query sees, beside its segment: hashable, for it shapes the program."""

    causal: bool
    window: int

    def blocks(self, T: int) -> list[tuple[slice, slice]]:
        """Positions of each block of queries, and of the keys that any of its queries can see."""
        size = CPU_BLOCK if T % CPU_BLOCK == 0 else T
        before = self.window - 1 if self.window else T
        after = 0 if self.causal else before
        return [
            (slice(start, start + size), slice(max(0, start - before), min(T, start + size + after)))
            for start in range(0, T, size)
        ]

    def apply(self, scores_BKGts, queries: slice, keys: slice, segments_BT):
        """Scores of unseen pairs become the least number: every query sees itself, so their weight is exactly 0."""
        away_ts = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None]
        seen = jnp.ones((1, *away_ts.shape), bool)
        if self.causal:
            seen &= (away_ts >= 0)[None]
        if self.window:
            seen &= (jnp.abs(away_ts) < self.window)[None]
        if segments_BT is not None:
            seen = seen & (segments_BT[:, queries, None] == segments_BT[:, None, keys])
        return jnp.where(seen[:, None, None], scores_BKGts, jnp.finfo(jnp.float32).min)


def _blocked(q_BTHC, k_BTKC, v_BTKC, segments_BT, *, causal: bool, window: int, scale: float):
    """The same for CPU: blocks of queries, each against the keys it can see; half the work when causal.

    Heads come before positions, so that every product is a batch of plain matrix products.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    q_BKGTC = q_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4) * scale
    k_BKTC, v_BKTC = (a.transpose(0, 2, 1, 3) for a in (k_BTKC, v_BTKC))
    y_BKGTC = _blocks(_Mask(causal, window), q_BKGTC, k_BKTC, v_BKTC, segments_BT)
    return y_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


# The gradient is written out for its products: automatic differentiation asks for [t, s]ᵀ [t, c], which XLA's CPU
# backend multiplies 4 times slower than [t, c]ᵀ [t, s], the same numbers transposed. Row sums of dO * O in place of
# those of dP * P, and probabilities made again from their logarithm, save passes over [t, s] (2205.14135, appendix B).
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(mask: _Mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT):
    return _blocks_forward(mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT)[0]


def _scores(mask: _Mask, q_BKNC, k_BKSC, shape, queries: slice, keys: slice, segments_BT):
    """Masked float32 scores BKGts of a block of queries; N = G x t."""
    scores_BKNS = jnp.einsum("bknc,bksc->bkns", q_BKNC, k_BKSC, preferred_element_type=jnp.float32)
    return mask.apply(scores_BKNS.reshape(*shape, scores_BKNS.shape[-1]), queries, keys, segments_BT)


def _blocks_forward(mask: _Mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT):
    outputs, log_sums = [], []
    for queries, keys in mask.blocks(q_BKGTC.shape[3]):
        q_BKGtC, k_BKSC, v_BKSC = q_BKGTC[..., queries, :], k_BKTC[:, :, keys], v_BKTC[:, :, keys]
        shape = q_BKGtC.shape[:-1]
        scores_BKGts = _scores(mask, _rows(q_BKGtC), k_BKSC, shape, queries, keys, segments_BT)
        most_BKGt1 = jnp.max(scores_BKGts, -1, keepdims=True)
        weights_BKGts = jnp.exp(scores_BKGts - most_BKGt1)
        sum_BKGt1 = jnp.sum(weights_BKGts, -1, keepdims=True)
        y_BKNC = jnp.einsum("bkns,bksc->bknc", _rows(weights_BKGts.astype(v_BKSC.dtype)), v_BKSC)
        outputs.append((y_BKNC.reshape(q_BKGtC.shape) / sum_BKGt1).astype(v_BKSC.dtype))
        log_sums.append(most_BKGt1 + jnp.log(sum_BKGt1))
    y_BKGTC, log_sum_BKGT1 = jnp.concatenate(outputs, axis=3), jnp.concatenate(log_sums, axis=3)
    return y_BKGTC, (q_BKGTC, k_BKTC, v_BKTC, segments_BT, y_BKGTC, log_sum_BKGT1)


def _blocks_backward(mask: _Mask, kept, dy_BKGTC):
    q_BKGTC, k_BKTC, v_BKTC, segments_BT, y_BKGTC, log_sum_BKGT1 = kept
    mean_BKGT1 = jnp.sum(dy_BKGTC.astype(jnp.float32) * y_BKGTC, -1, keepdims=True)  # of dP under P
    dq_blocks, dk_BKCT, dv_BKCT = [], *(jnp.zeros(a.swapaxes(2, 3).shape, jnp.float32) for a in (k_BKTC, v_BKTC))
    for queries, keys in mask.blocks(q_BKGTC.shape[3]):
        q_BKGtC, dy_BKGtC = q_BKGTC[..., queries, :], dy_BKGTC[..., queries, :]
        q_BKNC, dy_BKNC, k_BKSC, v_BKSC = _rows(q_BKGtC), _rows(dy_BKGtC), k_BKTC[:, :, keys], v_BKTC[:, :, keys]
        shape = q_BKGtC.shape[:-1]
        scores_BKGts = _scores(mask, q_BKNC, k_BKSC, shape, queries, keys, segments_BT)
        p_BKGts = jnp.exp(scores_BKGts - log_sum_BKGT1[..., queries, :])
        dp_BKNS = jnp.einsum("bknc,bksc->bkns", dy_BKNC, v_BKSC, preferred_element_type=jnp.float32)
        ds_BKGts = p_BKGts * (dp_BKNS.reshape(p_BKGts.shape) - mean_BKGT1[..., queries, :])
        ds_BKNS, p_BKNS = _rows(ds_BKGts.astype(q_BKNC.dtype)), _rows(p_BKGts.astype(dy_BKNC.dtype))
        dq_blocks.append(jnp.einsum("bkns,bksc->bknc", ds_BKNS, k_BKSC).reshape(q_BKGtC.shape))
        dk_BKCT = dk_BKCT.at[..., keys].add(jnp.einsum("bknc,bkns->bkcs", q_BKNC, ds_BKNS))
        dv_BKCT = dv_BKCT.at[..., keys].add(jnp.einsum("bknc,bkns->bkcs", dy_BKNC, p_BKNS))
    dk_BKTC, dv_BKTC = dk_BKCT.swapaxes(2, 3).astype(k_BKTC.dtype), dv_BKCT.swapaxes(2, 3).astype(v_BKTC.dtype)
    return jnp.concatenate(dq_blocks, axis=3), dk_BKTC, dv_BKTC, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _rows(a_BKGtX):
    """Groups and queries as one axis: the rows of one matrix for each key/value head."""
    B, K, G, t, X = a_BKGtX.shape
    return a_BKGtX.reshape(B, K, G * t, X)
