"""What a model is asked to do: the seam between data and model, and the cross-entropy every objective shares.

An objective is a module with `build(cfg: ObjectiveConfig) -> Objective`; `objective.name` names it. It never sees the
model: it says what to show (`View`) and which attention to use, and the trainer brings the two together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import ObjectiveConfig, exported


class View(NamedTuple):
    """What the model is shown and scored on. Losses are sums of weight x nll over positions, divided by `count`.

    Where inputs are longer than T, the first T positions are scored. An input of -1 is a hidden token.
    """

    inputs_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    segments_BT: jax.Array | None
    count: jax.Array  # of the whole batch, so that micro-batches add up to it
    noise: Any = None  # of objectives that hide tokens, a `noise.Noise`


class Objective(NamedTuple):
    """view: (tokens_BT1, segments_BT1 or None, key) → View, pure. T + 1 tokens give T inputs and T targets.

    attention: "causal", "full", or "block:N" (a noisy copy of the row and a clean one, `models.attention`).
    kind: whether the loss is the `exact` negative log-likelihood or an upper `bound`.
    score: as `view` with the number of the draw, for held-out losses; None: `view`. Rows are scored `num_draws` times.
    ratios: (view, nll_BT) → {name: (sum, count)}, which add over micro-batches and are logged as sum / count.
    alignment: whether position i speaks of token i (`same`) or of i + 1 (`shifted`), where the model is a denoiser.
    decoding: the attention of a denoiser, where it is another one.
    hides: whether many positions have no weight.
    """

    view: Callable
    attention: str
    kind: str
    score: Callable | None = None
    num_draws: int = 1
    ratios: Callable = lambda view, nll_BT: {}
    alignment: str = "same"
    decoding: str | None = None
    hides: bool = False


def build(cfg: ObjectiveConfig) -> Objective:
    name = cfg.name if "." in cfg.name else f"slmjax.objectives.{cfg.name}"
    return exported("objective.name", name, "build")(cfg)


def cross_entropy(logits_NV, targets_N):
    """(nll_N, log_partition_N) in nats, float32, without a one-hot."""
    log_partition_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return log_partition_N - target_N, log_partition_N


def token_losses(unembed, params, x_BTD, targets_BT, chunk: int = 0):
    """nll_BT in nats; the logits of about `chunk` tokens are in memory at once, as `weighted_loss` takes them."""

    def losses(chunk):
        x_ND, targets_N = chunk
        return cross_entropy(unembed(params, x_ND), targets_N)[0]

    return _whole(jax.lax.map(losses, _in_chunks((x_BTD, targets_BT), chunk)), targets_BT.shape)


def weighted_loss(unembed, params, x_BTD, view: View, z_loss, chunk: int = 0, batch_shards: int | None = None):
    """(loss, nll_BT): loss = sum of weight x (nll + z_loss x log_partition²) / count, and each position's nll, through
    which no gradient flows.

    `params` are what `unembed` reads. With `chunk`, a scan takes that many tokens at a time, or one position of every
    sequence if those are more, and makes each chunk's gradient while its logits are at hand: the whole batch's are
    never in memory, and none are computed twice.

    With `batch_shards`, how many devices the rows are split over, each of them puts its tokens without a weight last,
    and chunks of them alone are left out: half of the work of masked diffusion. Their nll is 0. None takes all tokens.
    """
    rows = (x_BTD, view.targets_BT, view.weights_BT)
    if batch_shards:
        return _weighted_first(unembed, params, *rows, view.count, z_loss, chunk, batch_shards)
    rows = _in_chunks(rows, chunk)
    if len(rows[0]) == 1:
        total, nll_N = _sums(unembed, params, *(a[0] for a in rows), z_loss)
        nll_KN = nll_N[None]
    else:
        total, nll_KN = _chunked_sums(unembed, "all", params, *rows, z_loss)
    return total / view.count, jax.lax.stop_gradient(_whole(nll_KN, view.targets_BT.shape))


def _weighted_first(unembed, params, x_BTD, targets_BT, weights_BT, count, z_loss, chunk: int, S: int):
    B, T, D = x_BTD.shape
    N = B * T // S  # tokens of one device
    first_SN = weights_BT.reshape(S, N) != 0
    last_SN = jnp.sum(first_SN, 1, keepdims=True) + jnp.cumsum(~first_SN, 1) - 1
    place_SN = jnp.where(first_SN, jnp.cumsum(first_SN, 1) - 1, last_SN)  # where each token goes
    order_SN = jnp.argsort(~first_SN, axis=1, stable=True)
    n = _positions(1, N, -(-chunk // S) or -(-N // 8))

    def chunks(a_SN):
        return jnp.moveaxis(a_SN.reshape(S, N // n, n, *a_SN.shape[2:]), 1, 0).reshape(N // n, S * n, *a_SN.shape[2:])

    x_KND = chunks(_moved(x_BTD.reshape(S, N, D), order_SN, place_SN))
    rows = (chunks(_along(a.reshape(S, N), order_SN)) for a in (targets_BT, weights_BT))
    total, nll_KN = _chunked_sums(unembed, "weighted", params, x_KND, *rows, z_loss)
    nll_SN = jnp.moveaxis(nll_KN.reshape(N // n, S, n), 1, 0).reshape(S, N)
    return total / count, jax.lax.stop_gradient(_along(nll_SN, place_SN).reshape(B, T))


def _along(a_SNX, index_SN):
    """Each device's tokens by its own index. vmap keeps the gather on the device, where take_along_axis does not."""
    return jax.vmap(lambda a_NX, index_N: a_NX[index_N])(a_SNX, index_SN)


@jax.custom_vjp
def _moved(x_SND, order_SN, place_SN):
    """Rows in another order; the gradient is a gather by the inverse order, where a scatter would be derived."""
    return _along(x_SND, order_SN)


_moved.defvjp(
    lambda x_SND, order_SN, place_SN: (_moved(x_SND, order_SN, place_SN), place_SN),
    lambda place_SN, dy_SND: (_along(dy_SND, place_SN), None, None),
)


def _in_chunks(arrays_BT, chunk: int):
    """[B, T, ...] as [K, N, ...]: every chunk has the same positions of all sequences, so that a batch that is split
    over devices stays split."""
    B, T = arrays_BT[0].shape[:2]
    t = _positions(B, T, chunk)
    return tuple(
        jnp.moveaxis(a.reshape(B, T // t, t, *a.shape[2:]), 1, 0).reshape(T // t, B * t, *a.shape[2:])
        for a in arrays_BT
    )


def _whole(nll_KN, shape: tuple[int, int]):
    """Of all chunks again [B, T]."""
    B, T = shape
    return jnp.moveaxis(nll_KN.reshape(-1, B, T // nll_KN.shape[0]), 0, 1).reshape(B, T)


def _positions(B: int, T: int, chunk: int) -> int:
    """How many positions of B sequences make a chunk: the most that divide T and give at most `chunk` tokens, or 1."""
    return next((t for t in range(T, 0, -1) if T % t == 0 and B * t <= chunk), 1) if chunk else T


def _sums(unembed, params, x_ND, targets_N, weights_N, z_loss):
    nll_N, log_partition_N = cross_entropy(unembed(params, x_ND), targets_N)
    total = jnp.sum(weights_N * nll_N) + z_loss * jnp.sum(weights_N * jnp.square(log_partition_N))
    return total, nll_N


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sums(unembed, tokens: str, params, x_KND, targets_KN, weights_KN, z_loss):
    def body(total, chunk):
        added, nll_N = _sums(unembed, params, *chunk, z_loss)
        return total + added, nll_N

    return jax.lax.scan(_skipping(tokens, body), 0.0, (x_KND, targets_KN, weights_KN))


def _skipping(tokens: str, body: Callable) -> Callable:
    """The body of a scan over (x_ND, targets_N, weights_N), which with "weighted" leaves weightless chunks out."""
    if tokens == "all":
        return body

    def step(carry, chunk):
        given = jax.eval_shape(body, carry, chunk)[1]
        skip = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), given)
        return jax.lax.cond(jnp.any(chunk[2] != 0), body, lambda carry, chunk: (carry, skip), carry, chunk)

    return step


def _chunked_sums_forward(unembed, tokens: str, params, x_KND, targets_KN, weights_KN, z_loss):
    def body(carry, chunk):
        total, params_grad = carry
        x_ND, *rest = chunk
        added, backward, nll_N = jax.vjp(lambda p, x: _sums(unembed, p, x, *rest, z_loss), params, x_ND, has_aux=True)
        p_grad, x_grad_ND = backward(jnp.ones_like(added))
        return (total + added, jax.tree.map(jnp.add, params_grad, p_grad)), (x_grad_ND, nll_N)

    zeros = 0.0, jax.tree.map(jnp.zeros_like, params)
    scanned = jax.lax.scan(_skipping(tokens, body), zeros, (x_KND, targets_KN, weights_KN))
    (total, params_grad), (x_grad_KND, nll_KN) = scanned
    return (total, nll_KN), (params_grad, x_grad_KND)


def _chunked_sums_backward(unembed, tokens, gradients, cotangents):
    # Only the first output, the total, is differentiated: `weighted_loss` stops the other one's gradient.
    scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return *scaled, None, None, None


_chunked_sums.defvjp(_chunked_sums_forward, _chunked_sums_backward)
