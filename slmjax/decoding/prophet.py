"""Prophet (2508.19982): static decoding that fills all the rest at once when the answer looks settled.

Not lossless: what is committed early is the best guess of that moment. With infinite thresholds it is `ordered.static`.
"""

import numpy as np

from slmjax.decoding import Decoded, blocks, loop
from slmjax.denoiser import Denoiser


def decode(
    denoiser: Denoiser,
    tokens_BT,
    *,
    mask_id: int,
    thresholds: tuple[float, ...] = (7.5, 5.0, 2.5),
    answer_BT: np.ndarray | None = None,
    per_call: int = 1,
    block: int = 0,
) -> Decoded:
    """A row is filled, in all of its blocks, once its gap from best to second-best logits reaches the threshold.

    The gap is the mean over the masked positions of `answer_BT` (bool [B, T]; None for all), nats. `thresholds` are
    those of equal shares of progress, the fraction of the row's masks that is filled: by default of its thirds. Rows
    stop each at its own time; one whose answer is filled already goes on as static decoding.
    """
    if per_call < 1 or block < 0 or not thresholds:
        raise ValueError(
            f"thresholds={thresholds}, per_call={per_call}, block={block}; give one threshold or more, "
            "one position a call or more, and a block of 1 or more or 0 for whole rows"
        )
    tokens_BT = loop.checked(tokens_BT, mask_id)
    answer_BT = np.ones(tokens_BT.shape, bool) if answer_BT is None else np.asarray(answer_BT, bool)
    if answer_BT.shape != tokens_BT.shape:
        raise ValueError(f"answer_BT has shape {answer_BT.shape}, the tokens {tokens_BT.shape}; they must be equal")
    starts_B = blocks.starts(tokens_BT == mask_id)
    total_B = (tokens_BT == mask_id).sum(1)

    def choose(guesses, masked_BT, call):
        surest_BT = blocks.best(guesses.log_confidence, blocks.active(masked_BT, starts_B, block), np.array([per_call]))
        left_B = masked_BT.sum(1)
        share_B = (total_B - left_B) * len(thresholds) // np.maximum(total_B, 1)
        threshold_B = np.array([*thresholds, np.inf])[share_B]  # a row without masks has passed all shares
        settled_B = (gap(guesses.logit_gap, masked_BT & answer_BT) >= threshold_B) & (threshold_B < np.inf)
        return np.where(settled_B[:, None], masked_BT, surest_BT)

    return loop.by_choice(denoiser, tokens_BT, mask_id, choose)


def gap(logit_gap_BT: np.ndarray, asked_BT: np.ndarray) -> np.ndarray:
    """The mean gap of each row's asked positions; NaN, which reaches no threshold, where it has none.

    Positions without a second token are left out, lest one of them outweigh all others: a row of such alone has inf.
    """
    open_BT = asked_BT & np.isfinite(logit_gap_BT)
    total_B = np.where(open_BT, logit_gap_BT, 0.0).sum(1, dtype=np.float64)
    mean_B = total_B / np.maximum(open_BT.sum(1), 1)
    return np.where(open_BT.any(1), mean_B, np.where(asked_BT.any(1), np.inf, np.nan))
