"""Softmax attention over grouped heads, by the kernel that suits the device."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

CPU_BLOCK = 64  # queries; measured on 2 cores at T 256, where 32, 64 and 128 are within noise of each other


def attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, *, attention: str, window: int, scale: float):
    """BTHC. Keys of other segments, that `attention` hides, or `window` and more positions away are not seen.

    Query head h reads key/value head h // (H / K). window 0 is no window. attention:
      causal: itself and what came before; full: everything.
      block:N: the first half is a noisy copy of the row and the second a clean one. A noisy block of N positions sees
        itself and the clean blocks before it; a clean one itself and those before (2503.09573).
      block_causal:N: a block of N sees itself and the blocks before it.
    """
    mask = _Mask(*parse(attention), window)
    if jax.default_backend() == "cpu":
        return _blocked(mask, q_BTHC, k_BTKC, v_BTKC, segments_BT, scale=scale)
    seen_BTS = None
    if mask.block:
        every = slice(0, q_BTHC.shape[1])
        seen_BTS = mask.seen(every.stop, every, every, segments_BT)
    elif segments_BT is not None:
        seen_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal, window = mask.kind == "causal", 0 if mask.block else window
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        mask=None if seen_BTS is None else seen_BTS[:, None],
        scale=scale,
        is_causal=causal,
        local_window_size=(window - 1, 0 if causal else window - 1) if window else None,
        implementation=_implementation(q_BTHC),
    )


def parse(attention: str) -> tuple[str, int]:
    """(kind, block length or 0).

    Raises:
      ValueError: none of those that `attend` lists.
    """
    kind, _, block = attention.partition(":")
    if attention in ("causal", "full") or (kind in ("block", "block_causal") and block.isdigit() and int(block)):
        return kind, int(block or 0)
    raise ValueError(f"attention={attention!r} is none of causal, full, block:N, block_causal:N")


def positions(attention: str, T: int):
    """int32 [1, T], the place of each input in its row: both copies of `block` count from 0."""
    return (jnp.arange(T) % (T // 2) if parse(attention)[0] == "block" else jnp.arange(T))[None]


def recall(q_BTHC, k_BSKC, v_BSKC, seen_BTS, *, scale: float):
    """BTHC of some positions of a row against keys and values of all S of them; `seen_BTS` is the whole rule."""
    return jax.nn.dot_product_attention(q_BTHC, k_BSKC, v_BSKC, mask=seen_BTS[:, None], scale=scale)


def _implementation(q_BTHC) -> str | None:
    # cuDNN's flash attention takes half precision and head widths to 128 in steps of 8; None lets XLA choose.
    fits = q_BTHC.dtype == jnp.bfloat16 and q_BTHC.shape[-1] % 8 == 0 and q_BTHC.shape[-1] <= 128
    return "cudnn" if fits and jax.default_backend() == "gpu" else None


class _Mask(NamedTuple):
    """What a query sees, beside its segment: hashable, for it shapes the program."""

    kind: str
    block: int
    window: int

    def blocks(self, T: int) -> list[tuple[slice, slice]]:
        """Positions of each block of queries, and of a range of keys that holds all that any of its queries can see."""
        size = CPU_BLOCK if T % CPU_BLOCK == 0 else T
        return [(slice(start, start + size), self._keys(T, start, start + size)) for start in range(0, T, size)]

    def _keys(self, T: int, start: int, stop: int) -> slice:
        half = T // 2
        if self.kind == "block" and start < half < stop:  # of both copies
            return slice(0, T)
        if self.block:
            first, end = start // self.block * self.block, -(-stop // self.block) * self.block
            if self.kind == "block" and stop <= half:  # from its own block to the clean copies of those before it
                return slice(first, min(T, half + end))
            return slice(half if self.kind == "block" else 0, min(T, end))
        before = self.window - 1 if self.window else T
        after = 0 if self.kind == "causal" else before
        return slice(max(0, start - before), min(T, stop + after))

    def seen(self, T: int, queries: slice, keys: slice, segments_BT):
        """bool [B or 1, t, s]. Every query sees itself."""
        t_t1, s_1s = jnp.arange(queries.start, queries.stop)[:, None], jnp.arange(keys.start, keys.stop)[None]
        clean_t1, clean_1s = False, False
        if self.kind == "block":
            clean_t1, clean_1s = t_t1 >= T // 2, s_1s >= T // 2
            t_t1, s_1s = t_t1 % (T // 2), s_1s % (T // 2)
        seen_ts = jnp.ones((t_t1.shape[0], s_1s.shape[1]), bool)
        if self.kind == "causal":
            seen_ts &= t_t1 >= s_1s
        if self.block:
            of_t, of_s = t_t1 // self.block, s_1s // self.block
            if self.kind == "block":
                own_ts, before_ts = (of_t == of_s) & (clean_t1 == clean_1s), (of_s < of_t) & clean_1s
                seen_ts &= own_ts | before_ts
            else:
                seen_ts &= of_s <= of_t
        if self.window:
            seen_ts &= jnp.abs(t_t1 - s_1s) < self.window
        seen_Bts = seen_ts[None]
        if segments_BT is not None:
            seen_Bts = seen_Bts & (segments_BT[:, queries, None] == segments_BT[:, None, keys])
        return seen_Bts

    def apply(self, scores_BKGts, T: int, queries: slice, keys: slice, segments_BT):
        """Scores of unseen pairs become the least number: every query sees itself, so their weight is exactly 0."""
        seen_Bts = self.seen(T, queries, keys, segments_BT)
        return jnp.where(seen_Bts[:, None, None], scores_BKGts, jnp.finfo(jnp.float32).min)


def _blocked(mask: _Mask, q_BTHC, k_BTKC, v_BTKC, segments_BT, *, scale: float):
    """The same for CPU: blocks of queries, each against the keys it can see; half the work when causal.

    Heads come before positions, so that every product is a batch of plain matrix products.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    q_BKGTC = q_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4) * scale
    k_BKTC, v_BKTC = (a.transpose(0, 2, 1, 3) for a in (k_BTKC, v_BTKC))
    y_BKGTC = _blocks(mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT)
    return y_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


# The gradient is written out for its products: automatic differentiation asks for [t, s]ᵀ [t, c], which XLA's CPU
# backend multiplies 4 times slower than [t, c]ᵀ [t, s], the same numbers transposed. Row sums of dO * O in place of
# those of dP * P, and probabilities made again from their logarithm, save passes over [t, s] (2205.14135, appendix B).
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(mask: _Mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT):
    return _blocks_forward(mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT)[0]


def _scores(mask: _Mask, q_BKNC, k_BKSC, shape, T: int, queries: slice, keys: slice, segments_BT):
    """Masked float32 scores BKGts of a block of queries; N = G x t."""
    scores_BKNS = jnp.einsum("bknc,bksc->bkns", q_BKNC, k_BKSC, preferred_element_type=jnp.float32)
    return mask.apply(scores_BKNS.reshape(*shape, scores_BKNS.shape[-1]), T, queries, keys, segments_BT)


def _blocks_forward(mask: _Mask, q_BKGTC, k_BKTC, v_BKTC, segments_BT):
    outputs, log_sums = [], []
    for queries, keys in mask.blocks(q_BKGTC.shape[3]):
        q_BKGtC, k_BKSC, v_BKSC = q_BKGTC[..., queries, :], k_BKTC[:, :, keys], v_BKTC[:, :, keys]
        shape = q_BKGtC.shape[:-1]
        scores_BKGts = _scores(mask, _rows(q_BKGtC), k_BKSC, shape, q_BKGTC.shape[3], queries, keys, segments_BT)
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
        scores_BKGts = _scores(mask, q_BKNC, k_BKSC, shape, q_BKGTC.shape[3], queries, keys, segments_BT)
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
