"""The bound by Monte Carlo: hide some of the scored tokens, weigh the others' surprise, average (SMDM, LLaDA, RADD)."""

import math

import numpy as np

from slmjax.denoiser import Denoiser, log_prob_of
from slmjax.likelihood import Likelihood, scored

ESTIMATORS = ("l_uniform", "bernoulli", "antithetic")


def monte_carlo(
    denoiser: Denoiser,
    tokens_BT,
    *,
    mask_id: int,
    scored_BT=None,
    estimator: str = "l_uniform",
    num_draws: int = 128,
    noise: str = "row",
    seed: int = 0,
    rows_per_call: int = 64,
) -> Likelihood:
    """Each row's bound over `scored_BT` given the rest, from `num_draws` noise levels spread evenly over 0..1.

    Args:
      estimator: l_uniform hides exactly l of n tokens, l uniform on 1..n, and weighs by n / l; 128 draws are enough,
        and one for a single token. bernoulli hides each token at a rate t, weight 1 / t: the same mean, three times the
        spread. antithetic is l_uniform in pairs, of levels and masks that complete each other.
      noise: row draws masks for every row; shared gives rows the same, to compare answers to one question.
      rows_per_call: how many noised rows a call of the denoiser gets.

    The standard error is that of independent draws: levels are stratified, so it errs on the wide side. It is NaN for
    one draw, or one pair of them.
    """
    tokens_BT, scored_BT = scored(tokens_BT, scored_BT, mask_id)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is none of {', '.join(ESTIMATORS)}")
    if estimator == "antithetic" and num_draws % 2:
        raise ValueError(f"num_draws={num_draws} is odd, and antithetic draws come in pairs; use {num_draws + 1}")
    B, _ = tokens_BT.shape
    rng = np.random.default_rng(seed)
    hidden_KBT, weight_KB = _masks(rng, scored_BT, estimator, num_draws, noise)
    row_N = np.tile(np.arange(B), num_draws)
    hidden_NT, nats_N = hidden_KBT.reshape(len(row_N), -1), np.zeros(len(row_N))
    for start in range(0, len(row_N), rows_per_call):
        part = slice(start, start + rows_per_call)
        truth_nT, hidden_nT = tokens_BT[row_N[part]], hidden_NT[part]
        log_probs_nT = log_prob_of(
            denoiser(_filled(np.where(hidden_nT, mask_id, truth_nT), rows_per_call)), _filled(truth_nT, rows_per_call)
        )
        nats_N[part] = -np.where(hidden_nT, log_probs_nT[: len(truth_nT)], 0.0).sum(1)
    nats_KB = weight_KB * nats_N.reshape(num_draws, B)
    if estimator == "antithetic":
        nats_KB = nats_KB.reshape(-1, 2, B).mean(1)
    spread_B = nats_KB.std(0, ddof=1) if len(nats_KB) > 1 else np.full(B, np.nan)
    return Likelihood(
        estimator, "bound", nats_KB.mean(0), spread_B / math.sqrt(len(nats_KB)), num_draws, scored_BT.sum(1)
    )


def _filled(rows_nT: np.ndarray, num: int) -> np.ndarray:
    """`num` rows, the last ones repeated: one compiled shape for the last, shorter call."""
    return rows_nT[np.minimum(np.arange(num), len(rows_nT) - 1)]


def _masks(rng, scored_BT: np.ndarray, estimator: str, num_draws: int, noise: str):
    """(hidden_KBT, weight_KB) of all draws."""
    if noise not in ("row", "shared"):
        raise ValueError(f"noise={noise!r} is neither row nor shared")
    B, T = scored_BT.shape
    rows = B if noise == "row" else 1
    pairs = 2 if estimator == "antithetic" else 1
    K = num_draws // pairs
    # One offset a row, levels 1/K apart: over all of 0..1 with whatever number of draws.
    level_Kb = 1.0 - (rng.random((1, rows)) + np.arange(K)[:, None] / K) % 1.0
    uniform_KbT = rng.random((K, rows, T))
    if pairs == 2:
        # A level and its complement, and the positions in the opposite order: what one hides the other shows.
        level_Kb = np.stack([level_Kb, np.maximum(1.0 - level_Kb, np.finfo(float).tiny)], 1).reshape(-1, rows)
        uniform_KbT = np.stack([uniform_KbT, 1.0 - uniform_KbT], 1).reshape(-1, rows, T)
    level_KB, uniform_KBT = (np.broadcast_to(a, (len(a), B, *a.shape[2:])) for a in (level_Kb, uniform_KbT))
    if estimator == "bernoulli":
        return scored_BT & (uniform_KBT < level_KB[..., None]), 1.0 / level_KB
    num_B = scored_BT.sum(1)
    count_KB = np.ceil(level_KB * num_B)
    rank_KBT = np.argsort(np.argsort(np.where(scored_BT, uniform_KBT, 2.0), -1), -1)
    return scored_BT & (rank_KBT < count_KB[..., None]), num_B / np.maximum(count_KB, 1)
