"""From masks to tokens: samplers and decoders of masked-diffusion models, each against any denoiser.

A decoder is a function (denoiser, tokens_BT, *, mask_id, ...) → Decoded: it fills every position that is `mask_id` and
touches no other. Rows are independent of each other: each has its own count of masks, and ends when it has none. The
loop runs on the host, one denoiser call a step; what it decides with are arrays [B, T], and log-probabilities stay on
the device except for the rows that a draw needs.

Each module says whether it is lossless, and against what. Nothing here trains or reads a config.
"""

from typing import NamedTuple

import numpy as np


class Reveal(NamedTuple):
    """Tokens filled after one call; arrays of one entry a token."""

    call: int
    rows_N: np.ndarray
    positions_N: np.ndarray
    values_N: np.ndarray
    log_confidence_N: np.ndarray  # the denoiser's untempered log-probability of the value


class Decoded(NamedTuple):
    tokens_BT: np.ndarray  # int32, without masks
    trace: tuple[Reveal, ...]
    deterministic: bool  # best guesses rather than a sample: their entropy says nothing of the model
