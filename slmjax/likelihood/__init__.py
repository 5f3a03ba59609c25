"""How probable a masked-diffusion model finds given tokens: estimators with names, because they are different numbers.

    estimator                         what it is                                                              calls
    l_uniform, bernoulli, antithetic  Monte Carlo of the random-order bound, with standard error (`monte_carlo`)  draws
    exact_bound                       that bound, by enumeration of all masks (`exact`)                        2^T
    random_order                      the likelihood of filling in random order, below the bound (`exact`)     2^T
    left_to_right, confidence         the likelihood of a decoder with that one order (`chains`)               T

A bound is above the negative log-likelihood of the random-order model alone: the chains' models are other ones, and may
lie on either side of it. None is comparable with an autoregressive loss but as "at most" (bound) or "of this decoder".
"""

from typing import NamedTuple

import numpy as np

from slmjax.denoiser import PAD


class Likelihood(NamedTuple):
    """-log p of each row, in nats, over its scored tokens."""

    estimator: str
    kind: str  # bound | exact: of the model that the estimator names
    nats_B: np.ndarray
    se_B: np.ndarray  # standard error of the estimate of each row; 0 where nothing was drawn
    num_draws: int
    num_scored_B: np.ndarray


def scored(tokens_BT, scored_BT, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, bool [B, T] of those to score): all but PAD, unless `scored_BT` says which.

    Raises:
      ValueError: a token that is hidden already, or PAD to score.
    """
    tokens_BT = np.asarray(tokens_BT, np.int32)
    if (tokens_BT == mask_id).any():
        raise ValueError(f"the tokens hold mask_id={mask_id}; a likelihood is of known tokens")
    there_BT = tokens_BT != PAD
    scored_BT = there_BT if scored_BT is None else np.asarray(scored_BT, bool)
    if (scored_BT & ~there_BT).any():
        raise ValueError(f"scored_BT asks for positions that are PAD={PAD}")
    return tokens_BT, scored_BT
