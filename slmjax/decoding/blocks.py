"""Where a decoder may work now: the leftmost unfinished block of each row, and the best positions there."""

import numpy as np


def active(masked_BT: np.ndarray, starts_B: np.ndarray, block: int) -> np.ndarray:
    """bool [B, T]: the masked positions of each row's first block that has any; block 0 is the whole row.

    Blocks are `block` positions long and begin at the row's `starts_B`, its first mask before decoding began; the last
    may be shorter.
    """
    if not block:
        return masked_BT
    T = masked_BT.shape[1]
    block_BT = (np.arange(T)[None] - starts_B[:, None]) // block
    first_B1 = np.where(masked_BT, block_BT, T).min(1, keepdims=True)
    return masked_BT & (block_BT == first_B1)


def starts(masked_BT: np.ndarray) -> np.ndarray:
    """Each row's first masked position; T where there is none."""
    return np.where(masked_BT.any(1), masked_BT.argmax(1), masked_BT.shape[1])


def best(score_BT: np.ndarray, allowed_BT: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """bool [B, T]: of each row's allowed positions the counts_B highest scores; ties go to the lowest index."""
    order_BT = np.argsort(np.where(allowed_BT, -score_BT.astype(np.float64), np.inf), axis=1, kind="stable")
    chosen_BT = np.zeros_like(allowed_BT)
    np.put_along_axis(chosen_BT, order_BT, np.arange(score_BT.shape[1])[None] < counts_B[:, None], axis=1)
    return chosen_BT & allowed_BT


def schedule(num_masked: int, num_steps: int) -> list[int]:
    """How many positions each step fills: num_masked over num_steps, the remainder one each to the first steps."""
    share, rest = divmod(num_masked, num_steps)
    return [share + (step < rest) for step in range(num_steps)]
