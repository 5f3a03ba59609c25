"""LocalLeap (2510.07081): a lower threshold beside what the denoiser is sure of.

Not lossless, neither against `ordered.static` nor against `threshold.decode`, which it equals at radius 0 or with both
thresholds the same. It saves calls by straying further from static decoding: report quality next to calls.
"""

import numpy as np

from slmjax.decoding import Decoded, blocks, loop
from slmjax.denoiser import Denoiser


def decode(
    denoiser: Denoiser,
    tokens_BT,
    *,
    mask_id: int,
    threshold: float = 0.9,
    relaxed: float = 0.75,
    radius: int = 4,
    block: int = 0,
) -> Decoded:
    """Each call reveals confidences of `threshold` or more, the anchors; of `relaxed` or more within `radius` positions
    of an anchor; and always the surest. Anchors, and all that they vouch for, are masked positions of the active block.
    """
    if relaxed > threshold or radius < 0 or block < 0:
        raise ValueError(
            f"relaxed={relaxed}, threshold={threshold}, radius={radius}, block={block}; relaxed is at most threshold, "
            "radius and block are at least 0"
        )
    starts_B = blocks.starts(np.asarray(tokens_BT) == mask_id)

    def choose(guesses, masked_BT, call):
        active_BT = blocks.active(masked_BT, starts_B, block)
        confidence_BT = np.exp(guesses.log_confidence)
        anchor_BT = active_BT & (confidence_BT >= threshold)
        positions_T = np.arange(masked_BT.shape[1])
        near_TT = np.abs(positions_T[:, None] - positions_T[None]) <= radius
        vouched_BT = anchor_BT @ near_TT
        surest_BT = blocks.best(guesses.log_confidence, active_BT, np.array([1]))
        return anchor_BT | surest_BT | (active_BT & vouched_BT & (confidence_BT >= relaxed))

    return loop.by_choice(denoiser, tokens_BT, mask_id, choose)
