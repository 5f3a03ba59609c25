"""What a decoder reads of log-probabilities: the best or a drawn value of every position, and how sure it is of it.

Confidence is always that of the untempered softmax. Ties go to the lowest token, and of positions to the lowest index.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Guess(NamedTuple):
    """NumPy arrays of [B, T]; the float ones are float32 natural logs or nats, of the untempered distribution."""

    values: np.ndarray  # int32
    log_confidence: np.ndarray  # log-probability of the value
    margin: np.ndarray  # probability of the best token less that of the second best
    entropy: np.ndarray
    logit_gap: np.ndarray  # log-probability of the best token less that of the second best


def guess(log_probs_BTV, temperature: float = 0.0, key: jax.Array | None = None) -> Guess:
    """A value for every position: the most probable, or at a temperature above 0 a draw from softmax(log_probs / it).

    `key` is needed for a temperature; a row's draw depends on the key and the row's place.
    """
    log_probs_BTV = jnp.asarray(log_probs_BTV, jnp.float32)
    return Guess(*map(np.asarray, _guess(log_probs_BTV, temperature, key)))


@partial(jax.jit, static_argnums=1)
def _guess(log_probs_BTV, temperature, key):
    chosen_BTV = log_probs_BTV
    if temperature > 0:
        # mode="high": float32's plain Gumbel noise ends at 16.6, so that tokens rarer than e^-16 would never be drawn
        # (2409.02908).
        chosen_BTV = log_probs_BTV + temperature * jax.random.gumbel(key, log_probs_BTV.shape, mode="high")
    values_BT = jnp.argmax(chosen_BTV, axis=-1).astype(jnp.int32)
    log_confidence_BT = jnp.take_along_axis(log_probs_BTV, values_BT[..., None], axis=-1)[..., 0]
    best_BT2 = jax.lax.top_k(log_probs_BTV, min(2, log_probs_BTV.shape[-1]))[0]
    first_BT, second_BT = best_BT2[..., 0], best_BT2[..., -1]
    probs_BTV = jnp.exp(log_probs_BTV)
    entropy_BT = -jnp.sum(jnp.where(probs_BTV > 0, probs_BTV * log_probs_BTV, 0.0), axis=-1)
    return values_BT, log_confidence_BT, jnp.exp(first_BT) - jnp.exp(second_BT), entropy_BT, first_BT - second_BT


def rows_at(log_probs_BTV, rows_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """float64 log_probs_NV of some positions; of a device array, only these come to the host.

    Indices are padded to a power of two, so that few shapes are compiled.
    """
    if isinstance(log_probs_BTV, np.ndarray):
        return log_probs_BTV[rows_N, positions_N].astype(np.float64)
    padded = 1 << max(0, len(rows_N) - 1).bit_length()
    rows, positions = (np.pad(a, (0, padded - len(a))) for a in (rows_N, positions_N))
    return np.asarray(_take(log_probs_BTV, rows, positions), np.float64)[: len(rows_N)]


@jax.jit
def _take(log_probs_BTV, rows_N, positions_N):
    return log_probs_BTV[rows_N, positions_N]


def draw(
    log_probs_BTV, rows_N: np.ndarray, positions_N: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(values_N, their log-probabilities): an exact draw at each position, by inversion in float64."""
    log_probs_NV = rows_at(log_probs_BTV, rows_N, positions_N)
    cumulative_NV = np.cumsum(np.exp(log_probs_NV), axis=1)
    u_N = rng.random(len(rows_N)) * cumulative_NV[:, -1]
    values_N = (cumulative_NV <= u_N[:, None]).sum(1).astype(np.int32)  # u < the last sum, so some token is left
    return values_N, np.take_along_axis(log_probs_NV, values_N[:, None], 1)[:, 0]
