"""The bound and the random-order likelihood without sampling, by all 2^n masks: the truth that estimates are held
to."""

import math

import numpy as np

from slmjax.denoiser import Denoiser, log_prob_of
from slmjax.likelihood import Likelihood, scored

MOST = 16  # tokens: 65,536 masks


def surprise(denoiser: Denoiser, tokens_T, *, mask_id: int, scored_T=None, rows_per_call: int = 1024) -> np.ndarray:
    """nats [2^n, n] of one row's n scored tokens under every mask; 0 where a token is shown.

    Bit i of a row's number says whether scored token i is hidden.

    Raises:
      ValueError: more than MOST tokens to score.
    """
    tokens_1T, scored_1T = scored(np.asarray(tokens_T)[None], None if scored_T is None else scored_T[None], mask_id)
    (places_n,) = np.nonzero(scored_1T[0])
    n = len(places_n)
    if n > MOST:
        raise ValueError(f"{n} tokens have 2^{n} masks; enumeration takes at most {MOST}: use monte_carlo")
    hidden_Mn = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    nats_Mn = np.zeros((2**n, n))
    for start in range(0, 2**n, rows_per_call):
        part = slice(start, start + rows_per_call)
        noised_mT = np.repeat(tokens_1T, len(hidden_Mn[part]), 0)
        noised_mT[:, places_n] = np.where(hidden_Mn[part], mask_id, noised_mT[:, places_n])
        log_probs_mT = log_prob_of(denoiser(noised_mT), np.broadcast_to(tokens_1T, noised_mT.shape))
        nats_Mn[part] = np.where(hidden_Mn[part], -log_probs_mT[:, places_n], 0.0)
    return nats_Mn


def sizes(n: int) -> np.ndarray:
    """int [2^n]: how many tokens each mask hides."""
    return np.array([mask.bit_count() for mask in range(2**n)])


def bound(nats_Mn: np.ndarray) -> float:
    """The continuous-time bound in nats: the sum over masks S of the surprise in S / (|S| binom(n, |S|)).

    Every order of the tokens counts alike, so with exact conditionals it is -log p(x) itself.
    """
    n = nats_Mn.shape[1]
    size_M = sizes(n)
    weight_M = [0.0, *(1 / (size * math.comb(n, size)) for size in range(1, n + 1))]
    return float(np.array(weight_M)[size_M] @ nats_Mn.sum(1))


def bound_by_steps(nats_Mn: np.ndarray, num_steps: int) -> float:
    """The bound of a chain of that many equal steps of the linear schedule, in nats: it falls to `bound` as they grow.

    sum over i of (1 / i) E[surprise at t = i / num_steps]; one step is the sum of marginal surprises.
    """
    n = nats_Mn.shape[1]
    size_M, total_M = sizes(n), nats_Mn.sum(1)
    t_K = np.arange(1, num_steps + 1) / num_steps
    by_size_n = np.bincount(size_M, total_M, n + 1)
    chance_Kn = t_K[:, None] ** np.arange(n + 1) * (1 - t_K[:, None]) ** (n - np.arange(n + 1))
    return float((chance_Kn @ by_size_n / np.arange(1, num_steps + 1)).sum())


def random_order(nats_Mn: np.ndarray) -> float:
    """-log p(x), in nats, of the decoder that fills one uniformly chosen position after another.

    p = g(all), g(none) = 1, g(R) = mean over i in R of g(R without i) p(x_i | all but R). By Jensen below `bound`.
    """
    n = nats_Mn.shape[1]
    log_g_M = np.full(2**n, -np.inf)
    log_g_M[0] = 0.0
    for mask in range(1, 2**n):
        hidden = [i for i in range(n) if mask >> i & 1]
        terms = [log_g_M[mask ^ (1 << i)] - nats_Mn[mask, i] for i in hidden]
        log_g_M[mask] = np.logaddexp.reduce(terms) - math.log(len(hidden))
    return -float(log_g_M[-1])


def exact(denoiser: Denoiser, tokens_BT, *, mask_id: int, scored_BT=None, estimator="exact_bound") -> Likelihood:
    """`bound` or `random_order` of every row, by estimator exact_bound or random_order."""
    kinds = {"exact_bound": (bound, "bound"), "random_order": (random_order, "exact")}
    if estimator not in kinds:
        raise ValueError(f"estimator={estimator!r} is none of {', '.join(kinds)}")
    function, kind = kinds[estimator]
    tokens_BT, scored_BT = scored(tokens_BT, scored_BT, mask_id)
    nats_B = np.array(
        [
            function(surprise(denoiser, row_T, mask_id=mask_id, scored_T=scored_T))
            for row_T, scored_T in zip(tokens_BT, scored_BT, strict=True)
        ]
    )
    return Likelihood(estimator, kind, nats_B, np.zeros(len(nats_B)), 0, scored_BT.sum(1))
