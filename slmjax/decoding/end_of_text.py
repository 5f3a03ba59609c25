"""EoTP (2509.25188): once a row has decided on an end token, what lies behind it is not computed any more.

Around any decoder, which need not know of it: the denoiser it is given answers for the dropped positions itself, that
they are end tokens with probability 1. Lossless against the decoder without it, up to the end token, if the denoiser
ignores what is behind an end token and the decoder judges positions one by one (`ordered.static` with one position a
call, `threshold.decode`), or the denoiser knows by itself that only end tokens follow; near otherwise.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from slmjax.decoding import Decoded, Reveal
from slmjax.denoiser import PAD, Denoiser


def stopping(decoder: Callable[..., Decoded], end_id: int, multiple: int = 0) -> Callable[..., Decoded]:
    """The decoder, that ends rows at `end_id`: a decoder itself, with the same settings.

    A position is dropped as soon as an end token is filled in anywhere before it in its row; end tokens of the prompt
    end nothing. Dropped ones are PAD in later calls and `end_id` in the result, whatever had been filled in there;
    tokens that were visible from the start stay in the result. The trace leaves dropped positions out, and its `call`
    counts what the decoder asked: calls that would show the denoiser nothing new are not made.

    With `multiple`, columns that all rows have dropped are cut off, down to a multiple of it, so that a network
    computes less; it compiles once for each length. With 0 the shape stays, and a network computes its PADs.
    """

    def decode(denoiser: Denoiser, tokens_BT, *, mask_id: int, **settings) -> Decoded:
        if end_id == mask_id:
            raise ValueError(f"end_id={end_id} is the mask_id; an end token is one that the denoiser can predict")
        answer_BT = np.asarray(tokens_BT) == mask_id
        decoded = decoder(_Cut(denoiser, answer_BT, end_id, mask_id, multiple), tokens_BT, mask_id=mask_id, **settings)
        dropped_BT = behind(decoded.tokens_BT, answer_BT, end_id)
        tokens_BT = np.where(dropped_BT & answer_BT, np.int32(end_id), decoded.tokens_BT)
        trace = (_without(reveal, dropped_BT) for reveal in decoded.trace)
        return Decoded(tokens_BT, tuple(reveal for reveal in trace if len(reveal.rows_N)), decoded.deterministic)

    return decode


def behind(tokens_BT: np.ndarray, answer_BT: np.ndarray, end_id: int) -> np.ndarray:
    """bool [B, T]: positions behind the first end token of their row's answer."""
    ended_BT = (tokens_BT == end_id) & answer_BT
    return np.cumsum(ended_BT, axis=1) - ended_BT > 0


def _without(reveal: Reveal, dropped_BT: np.ndarray) -> Reveal:
    kept_N = ~dropped_BT[reveal.rows_N, reveal.positions_N]
    return Reveal(reveal.call, *(array_N[kept_N] for array_N in reveal[1:]))


class _Cut:
    """The denoiser that `stopping` hands to its decoder: a pure function of the tokens; it remembers one call."""

    def __init__(self, denoiser: Denoiser, answer_BT: np.ndarray, end_id: int, mask_id: int, multiple: int):
        self.denoiser, self.answer_BT, self.multiple = denoiser, answer_BT, multiple
        self.end_id, self.mask_id = end_id, mask_id
        self.shown_BT = self.log_probs_BTV = None

    def __call__(self, tokens_BT):
        # A decoder that asks for several states of each row keeps them side by side.
        answer_BT = np.repeat(self.answer_BT, len(tokens_BT) // len(self.answer_BT), axis=0)
        dropped_BT = behind(np.asarray(tokens_BT), answer_BT, self.end_id)
        shown_BT = np.where(dropped_BT, PAD, tokens_BT)
        known = self.shown_BT is not None and not (shown_BT == self.mask_id).any()
        if not known and not np.array_equal(shown_BT, self.shown_BT):
            self.shown_BT, self.log_probs_BTV = shown_BT, self.denoiser(shown_BT[:, : self._length(shown_BT)])
        xp = np if isinstance(self.log_probs_BTV, np.ndarray) else jnp
        V = self.log_probs_BTV.shape[2]
        end_11V = xp.where(xp.arange(V) == self.end_id, 0.0, -xp.inf)[None, None]
        if known:
            return xp.broadcast_to(end_11V, (*shown_BT.shape, V))
        cut = shown_BT.shape[1] - self.log_probs_BTV.shape[1]
        log_probs_BTV = xp.pad(self.log_probs_BTV, ((0, 0), (0, cut), (0, 0)))
        return xp.where(dropped_BT[..., None], end_11V, log_probs_BTV)

    def _length(self, shown_BT) -> int:
        """How many columns the denoiser is shown."""
        T = shown_BT.shape[1]
        live = T - int((shown_BT != PAD).any(0)[::-1].argmax())
        return min(T, -(-live // self.multiple) * self.multiple) if self.multiple else T
