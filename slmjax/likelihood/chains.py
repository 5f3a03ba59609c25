"""The likelihood of a decoder with one order: every token scored, then shown, one call each (SMDM's chain rule).

A true likelihood, for the order depends on shown tokens alone, but of that decoder: left to right it was better than
the bound on some tasks, and worse on others (SMDM, 2410.18514).
"""

import numpy as np

from slmjax.decoding.guess import guess
from slmjax.denoiser import Denoiser, log_prob_of
from slmjax.likelihood import Likelihood, scored

ORDERS = ("left_to_right", "confidence")


def chain(denoiser: Denoiser, tokens_BT, *, mask_id: int, scored_BT=None, order: str = "left_to_right") -> Likelihood:
    """Hides all scored tokens, then scores and shows one at a time: the first hidden, or the one whose best value is
    the most probable (confidence; ties to the lowest position)."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is none of {', '.join(ORDERS)}")
    tokens_BT, scored_BT = scored(tokens_BT, scored_BT, mask_id)
    hidden_BT, nats_B = scored_BT.copy(), np.zeros(len(tokens_BT))
    while hidden_BT.any():
        log_probs_BTV = denoiser(np.where(hidden_BT, mask_id, tokens_BT))
        score_BT = -np.arange(tokens_BT.shape[1], dtype=float)[None]
        if order == "confidence":
            score_BT = guess(log_probs_BTV).log_confidence
        (rows_N,) = np.nonzero(hidden_BT.any(1))
        places_N = np.where(hidden_BT, score_BT, -np.inf).argmax(1)[rows_N]
        nats_B[rows_N] -= log_prob_of(log_probs_BTV, tokens_BT)[rows_N, places_N]
        hidden_BT[rows_N, places_N] = False
    return Likelihood(order, "exact", nats_B, np.zeros(len(nats_B)), 0, scored_BT.sum(1))
