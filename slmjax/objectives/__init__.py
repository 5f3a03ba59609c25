"""What a model is asked to do: the seam between data and model, and the cross-entropy every objective shares.

An objective is a module with `build(cfg: ObjectiveConfig) -> Objective`; `objective.name` names it. It never sees the
model: it says what to show (`View`) and which attention to use, and the trainer brings the two together.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import ObjectiveConfig, exported


class View(NamedTuple):
    """What the model is shown and scored on. Losses are sums of weight x nll over positions, divided by `count`."""

    inputs_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    segments_BT: jax.Array | None
    count: jax.Array  # of the whole batch, so that micro-batches add up to it


class Objective(NamedTuple):
    """view: (tokens_BT1, segments_BT1 or None, key) → View, pure. T + 1 tokens give T inputs and T targets.

    attention: "causal" or "full". kind: whether the loss is the `exact` negative log-likelihood or an upper `bound`.
    """

    view: Callable
    attention: str
    kind: str


def build(cfg: ObjectiveConfig) -> Objective:
    name = cfg.name if "." in cfg.name else f"slmjax.objectives.{cfg.name}"
    return exported("objective.name", name, "build")(cfg)


def cross_entropy(logits_NV, targets_N):
    """(nll_N, log_partition_N) in nats, float32, without a one-hot."""
    log_partition_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return log_partition_N - target_N, log_partition_N


def token_losses(unembed, params, x_BTD, targets_BT, chunk: int = 0):
    """nll_BT in nats; at most `chunk` tokens' logits (rounded to a divisor of B·T) are in memory at once."""
    x_ND, targets_N = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    size = _chunk_size(targets_N.size, chunk)
    nll_KN = jax.lax.map(
        lambda xt: cross_entropy(unembed(params, xt[0]), xt[1])[0],
        (x_ND.reshape(-1, size, x_ND.shape[-1]), targets_N.reshape(-1, size)),
    )
    return nll_KN.reshape(targets_BT.shape)


def weighted_loss(unembed, params, x_BTD, view: View, z_loss, chunk: int = 0):
    """(loss, nll): loss = sum of weight x (nll + z_loss x log_partition²) / count, and its nll part alone.

    `params` are those that `unembed` reads. With `chunk`, a scan takes the tokens a chunk at a time and makes each
    chunk's gradient while its logits are at hand: the whole batch's are never in memory, and none are computed twice.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    rows = (x_ND, view.targets_BT.reshape(-1), view.weights_BT.reshape(-1))
    size = _chunk_size(rows[1].size, chunk)
    if size == rows[1].size:
        total, nll = _sums(unembed, params, *rows, z_loss)
    else:
        rows = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), rows)
        total, nll = _chunked_sums(unembed, params, *rows, z_loss)
    return total / view.count, jax.lax.stop_gradient(nll) / view.count


def _chunk_size(num_tokens: int, chunk: int) -> int:
    """The largest divisor of num_tokens not above `chunk`; all of them when chunk is 0."""
    if not chunk or chunk >= num_tokens:
        return num_tokens
    return next(size for size in range(chunk, 0, -1) if num_tokens % size == 0)


def _sums(unembed, params, x_ND, targets_N, weights_N, z_loss):
    nll_N, log_partition_N = cross_entropy(unembed(params, x_ND), targets_N)
    nll = jnp.sum(weights_N * nll_N)
    return nll + z_loss * jnp.sum(weights_N * jnp.square(log_partition_N)), nll


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(unembed, params, x_KND, targets_KN, weights_KN, z_loss):
    def body(sums, chunk):
        return jax.tree.map(jnp.add, sums, _sums(unembed, params, *chunk, z_loss)), None

    return jax.lax.scan(body, (0.0, 0.0), (x_KND, targets_KN, weights_KN))[0]


def _chunked_sums_forward(unembed, params, x_KND, targets_KN, weights_KN, z_loss):
    def body(carry, chunk):
        sums, params_grad = carry
        x_ND, *rest = chunk
        total, backward, nll = jax.vjp(lambda p, x: _sums(unembed, p, x, *rest, z_loss), params, x_ND, has_aux=True)
        p_grad, x_grad_ND = backward(jnp.ones_like(total))
        return (jax.tree.map(jnp.add, sums, (total, nll)), jax.tree.map(jnp.add, params_grad, p_grad)), x_grad_ND

    zeros = (0.0, 0.0), jax.tree.map(jnp.zeros_like, params)
    (sums, params_grad), x_grad_KND = jax.lax.scan(body, zeros, (x_KND, targets_KN, weights_KN))
    return sums, (params_grad, x_grad_KND)


def _chunked_sums_backward(unembed, gradients, cotangents):
    # Only the first output, the total, is differentiated: `weighted_loss` stops the other one's gradient.
    scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return *scaled, None, None, None


_chunked_sums.defvjp(_chunked_sums_forward, _chunked_sums_backward)
