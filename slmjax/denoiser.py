"""What samplers, decoders and likelihoods ask of a masked-diffusion model: one function of the tokens.

    denoiser(tokens_BT) → log_probs_BTV

tokens_BT are ints: 0..V-1 where visible, `mask_id` where hidden, PAD where a row has ended. log_probs_BTV are natural
logs of each position's distribution over the V tokens given all that is visible, a NumPy or JAX array; they are read at
hidden positions only. Any callable will do: a network (`of_model`), a table, the exact posterior of a Markov chain.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.models import Model
from slmjax.objectives import Objective
from slmjax.objectives.noise import HIDDEN

PAD = -1  # a position that its row does not have: never attended to, filled or scored

Denoiser = Callable[[np.ndarray], jax.Array | np.ndarray]


def of_model(model: Model, params, objective: Objective, mask_id: int) -> Denoiser:
    """The denoiser of a trained network, compiled once for each shape; PAD becomes a segment of its own."""
    readout = model.readout(params)

    @jax.jit
    def log_probs(params, readout, tokens_BT):
        segments_BT = jnp.where(tokens_BT == PAD, 0, 1)
        shown_BT = jnp.where(tokens_BT == mask_id, HIDDEN, jnp.maximum(tokens_BT, 0))
        x_BTD, _ = model.hidden(params, shown_BT, segments_BT, objective.decoding or objective.attention)
        log_probs_BTV = jax.nn.log_softmax(model.unembed(readout, x_BTD), axis=-1)
        # A shifted model's position i speaks of token i + 1; of the first, which it is always shown, nothing is asked.
        return jnp.roll(log_probs_BTV, 1, axis=1) if objective.alignment == "shifted" else log_probs_BTV

    return lambda tokens_BT: log_probs(params, readout, jnp.asarray(tokens_BT, jnp.int32))


class Counted:
    """A denoiser that counts what is asked of it: calls, rows, and positions of all rows, PAD left out."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.num_calls, self.num_rows, self.num_positions = denoiser, 0, 0, 0

    def __call__(self, tokens_BT):
        self.num_calls += 1
        self.num_rows += len(tokens_BT)
        self.num_positions += int(np.sum(np.asarray(tokens_BT) != PAD))
        return self.denoiser(tokens_BT)


def log_prob_of(log_probs_BTV, tokens_BT) -> np.ndarray:
    """float64 [B, T]: the log-probability of each token where it stands; anything at PAD."""
    wanted_BT1 = np.maximum(np.asarray(tokens_BT), 0)[..., None]
    if isinstance(log_probs_BTV, np.ndarray):
        return np.take_along_axis(log_probs_BTV, wanted_BT1, -1)[..., 0].astype(np.float64)
    return np.asarray(_take(log_probs_BTV, wanted_BT1), np.float64)[..., 0]


@jax.jit
def _take(log_probs_BTV, tokens_BT1):
    return jnp.take_along_axis(log_probs_BTV, tokens_BT1, axis=-1)
