"""Left to right, of an autoregressive model: each row's next token from all before it, keys and values kept.

At temperature 1 this samples the model exactly. Rows have prompts and lengths of their own, and every token its own
place: a row comes out as it would alone, up to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.decoding import Decoded, Reveal, loop
from slmjax.denoiser import PAD
from slmjax.models import Model


class NextToken:
    """Log-probabilities of each row's next token, after tokens that are given once and remembered.

    Compiled once for each shape; `restart` before other rows. num_calls and num_positions count the work.
    """

    def __init__(self, model: Model, params):
        if model.extend is None:
            raise ValueError("this model family has no extend, so that no token of it can be remembered")
        readout = model.readout(params)

        def log_probs(params, readout, tokens_Bt, positions_Bt, memory):
            S = memory[0][0].shape[1]
            seen_BtS = jnp.arange(S)[None, None] <= positions_Bt[..., None]
            x_BtD, memory = model.extend(params, tokens_Bt, positions_Bt, memory, seen_BtS)
            last_B11 = jnp.argmax(jnp.where(positions_Bt < S, positions_Bt, -1), axis=1)[:, None, None]
            x_BD = jnp.take_along_axis(x_BtD, last_B11, axis=1)[:, 0]
            return jax.nn.log_softmax(model.unembed(readout, x_BD), axis=-1), memory

        compiled = jax.jit(log_probs, donate_argnums=4)
        self._compute = lambda *args: compiled(params, readout, *args)
        self._empty = model.memory
        self.num_calls = self.num_positions = 0

    def restart(self, B: int, S: int) -> None:
        """Forgets everything: B rows of S positions come next."""
        self._memory, self._length = self._empty(B, S), S
        self.num_calls = self.num_positions = 0

    def __call__(self, tokens_Bt: np.ndarray, positions_Bt: np.ndarray) -> np.ndarray:
        """float64 log_probs_BV after the last of these tokens, which stand at these places; S is none: nothing there.

        Of a row that is given nothing they mean nothing.
        """
        self.num_calls += 1
        self.num_positions += int((positions_Bt < self._length).sum())
        log_probs_BV, self._memory = self._compute(
            tokens_Bt.astype(np.int32), positions_Bt.astype(np.int32), self._memory
        )
        return np.asarray(log_probs_BV, np.float64)


def decode(
    next_token: NextToken,
    tokens_BT,
    *,
    mask_id: int,
    temperature: float = 1.0,
    end_id: int | None = None,
    seed: int = 0,
) -> Decoded:
    """Fills the masks at each row's end, one a call; the first call reads the prompts.

    temperature: draws from softmax(log_probs / it); 0 takes the most probable token, of equal ones the lowest. A row's
      draws depend on the seed and its place in the batch, not on other rows.
    end_id: a row that drew it is done, and filled up with it.

    Raises:
      ValueError: a row without a prompt, or with a token after a mask: neither can be conditioned on.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0; use 0 for the most probable token, 1 for a draw")
    tokens_BT, trace = loop.checked(tokens_BT, mask_id), []
    B, T = tokens_BT.shape
    _check_rows(tokens_BT, mask_id)
    uniform_BT = np.stack([np.random.default_rng((seed, row)).random(T) for row in range(B)])
    next_token.restart(B, T)
    # All prompts at once; from then on, each row's last token.
    given_BT = (tokens_BT != mask_id) & (tokens_BT != PAD)
    read_BT = given_BT & (tokens_BT == mask_id).any(1, keepdims=True)
    longest = int(np.flatnonzero(read_BT.any(0))[-1]) + 1
    width = min(T, 1 << (longest - 1).bit_length())  # so that few shapes are compiled
    shown_Bt = np.where(read_BT, tokens_BT, 0)[:, :width]
    positions_Bt = np.where(read_BT, np.arange(T)[None], T)[:, :width]
    while True:
        log_probs_BV = next_token(shown_Bt, positions_Bt)
        rows_N = np.flatnonzero((tokens_BT == mask_id).any(1))
        positions_N = (tokens_BT[rows_N] == mask_id).argmax(1)
        values_N = _values(log_probs_BV[rows_N], temperature, uniform_BT[rows_N, positions_N])
        log_confidence_N = log_probs_BV[rows_N, values_N]
        loop.require_finite(log_confidence_N)
        trace.append(Reveal(len(trace), rows_N, positions_N, values_N, log_confidence_N))
        tokens_BT = loop.filled(tokens_BT, trace[-1])
        ended_B = np.zeros(B, bool)
        ended_B[rows_N] = values_N == end_id
        tokens_BT = np.where(ended_B[:, None] & (tokens_BT == mask_id), np.int32(end_id or 0), tokens_BT)
        going_N = (tokens_BT[rows_N] == mask_id).any(1)
        if not going_N.any():
            return Decoded(tokens_BT, tuple(trace), deterministic=temperature == 0)
        shown_Bt, positions_Bt = np.zeros((B, 1), np.int32), np.full((B, 1), T)
        shown_Bt[rows_N[going_N], 0] = values_N[going_N]
        positions_Bt[rows_N[going_N], 0] = positions_N[going_N]


def _values(log_probs_NV: np.ndarray, temperature: float, uniform_N: np.ndarray) -> np.ndarray:
    """int32 [N]: by inversion in float64, exact for rare tokens too."""
    if temperature == 0:
        return log_probs_NV.argmax(1).astype(np.int32)
    scaled_NV = (log_probs_NV - log_probs_NV.max(1, keepdims=True)) / temperature
    cumulative_NV = np.cumsum(np.exp(scaled_NV), axis=1)
    return (cumulative_NV <= uniform_N[:, None] * cumulative_NV[:, -1:]).sum(1).astype(np.int32)


def _check_rows(tokens_BT: np.ndarray, mask_id: int) -> None:
    masked_BT = tokens_BT == mask_id
    bad_B = masked_BT[:, 0]
    if bad_B.any():
        raise ValueError(
            f"row {bad_B.argmax()} begins with a mask, and its first token has nothing before it to be predicted from; "
            "give a prompt of one token or more"
        )
    bad_B = (masked_BT[:, :-1] & ~masked_BT[:, 1:] & (tokens_BT[:, 1:] != PAD)).any(1)
    if bad_B.any():
        raise ValueError(
            f"row {bad_B.argmax()} has a token after a mask, which a model that reads left to right would not see; "
            "fill the ends of rows alone"
        )
