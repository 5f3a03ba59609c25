"""Parallel decoding by confidence: whatever is sure enough is revealed together (Fast-dLLM 2505.22618, no cache).

Greedy, and not lossless against `ordered.static`: n positions filled together are sure to be their joint's best
values only if every confidence is above 1 - ε with (n + 1) ε <= 1, a bound that is tight.
"""

import numpy as np

from slmjax.decoding import Decoded, blocks, loop
from slmjax.denoiser import Denoiser


def decode(denoiser: Denoiser, tokens_BT, *, mask_id: int, threshold: float = 0.9, block: int = 0) -> Decoded:
    """Each call reveals all of the active block with that confidence or more, and always its surest position.

    A threshold above 1 is `ordered.static` of one position a call; 0 is one call a block.
    """
    return _decode(denoiser, tokens_BT, mask_id, block, lambda confidence_BT: (confidence_BT >= threshold).sum(1))


def by_factor(denoiser: Denoiser, tokens_BT, *, mask_id: int, factor: float = 1.0, block: int = 0) -> Decoded:
    """Each call reveals the largest n of the active block's surest with (n + 1) (1 - the n-th's confidence) < factor.

    With factor 1 these are the best values of the positions jointly, by the theorem.
    """

    def count(confidence_BT):
        ordered_BT = -np.sort(-confidence_BT, axis=1)
        n_BT = np.arange(1, confidence_BT.shape[1] + 1)[None]
        return ((n_BT + 1) * (1 - ordered_BT) < factor).sum(1)  # the left side grows with n

    return _decode(denoiser, tokens_BT, mask_id, block, count)


def _decode(denoiser, tokens_BT, mask_id, block, count) -> Decoded:
    """count(confidence_BT) → how many of each row's best, where confidence_BT is -1 outside of the active block."""
    if block < 0:
        raise ValueError(f"block={block} is below 0; use 0 for whole rows")
    tokens_BT = loop.checked(tokens_BT, mask_id)
    starts_B = blocks.starts(tokens_BT == mask_id)

    def choose(guesses, masked_BT, call):
        active_BT = blocks.active(masked_BT, starts_B, block)
        confidence_BT = np.where(active_BT, np.exp(guesses.log_confidence), -1.0)
        return blocks.best(guesses.log_confidence, active_BT, np.maximum(count(confidence_BT), 1))

    return loop.by_choice(denoiser, tokens_BT, mask_id, choose)
