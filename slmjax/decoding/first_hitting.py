"""First hitting: one position of each row at a time, uniformly chosen, its value drawn (Zheng et al. 2409.02908).

Lossless: the law of ancestral sampling with infinitely many steps, in as many calls as the longest row has masks. With
the exact posterior it samples the data's distribution. A denoiser that is told no time needs no times either.
"""

import numpy as np

from slmjax.decoding import Decoded, loop
from slmjax.denoiser import Denoiser


def hitting_times(num: int, rng: np.random.Generator) -> np.ndarray:
    """When each of `num` masked positions is revealed, from t = 1 down: with n left, t falls to t u^(1/n).

    These are `num` uniforms in descending order, for traces against the noise level.
    """
    return np.cumprod(rng.random(num) ** (1 / np.arange(num, 0, -1)))


def sample(denoiser: Denoiser, tokens_BT, *, mask_id: int, seed: int = 0) -> Decoded:
    """Each call reveals one position of every row that has a mask left."""
    rng = np.random.default_rng(seed)
    tokens_BT = loop.checked(tokens_BT, mask_id)
    masked_BT = tokens_BT == mask_id
    # Each masked position's rank in a random order of its row: uniform times sorted, those of visible positions last.
    times_BT = np.where(masked_BT, rng.random(masked_BT.shape), 2.0)
    step_BT = times_BT.argsort(1).argsort(1)
    return loop.by_plan(denoiser, tokens_BT, mask_id, step_BT, rng)
