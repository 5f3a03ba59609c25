"""Distributions whose every conditional is known: what samplers, decoders and likelihoods are tested against.

Denoisers here are NumPy and float64; the mask id is V, and PAD counts as a position about which nothing is known.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import stats

from slmjax.denoiser import Denoiser


class Chain(NamedTuple):
    """A Markov chain: the first token's distribution, and the next token's for each token."""

    start_V: np.ndarray
    rows_VV: np.ndarray


T6 = Chain(np.array([1 / 2, 1 / 3, 1 / 6]), np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]))


def random_chain(seed: int, V: int, concentration: float = 1.0) -> Chain:
    """All rows drawn from a Dirichlet of that concentration: below 1 they are peaked, far above 1 they are flat.

    Every token has probability 1e-6 / V or more after every other, so that all sequences are possible.
    """
    draws_NV = np.random.default_rng(seed).dirichlet(np.full(V, concentration), V + 1)
    draws_NV = (1 - 1e-6) * draws_NV + 1e-6 / V
    return Chain(draws_NV[0], draws_NV[1:])


def all_sequences(V: int, L: int) -> np.ndarray:
    """int32 [V^L, L], in lexicographic order: row i is i written in base V."""
    return np.array(list(itertools.product(range(V), repeat=L)), np.int32)


def index(x_BT: np.ndarray, V: int) -> np.ndarray:
    """The row of all_sequences(V, T) that each row is."""
    return x_BT.astype(np.int64) @ V ** np.arange(x_BT.shape[1])[::-1]


def log_prob(chain: Chain, x_BT: np.ndarray) -> np.ndarray:
    """Natural log-probability of each row, without masks or PAD."""
    return np.log(chain.start_V)[x_BT[:, 0]] + np.log(chain.rows_VV)[x_BT[:, :-1], x_BT[:, 1:]].sum(1)


def entropy(chain: Chain, L: int) -> float:
    """Of L tokens together, in nats."""
    total, now_V = -(chain.start_V @ np.log(chain.start_V)), chain.start_V
    for _ in range(L - 1):
        total -= now_V @ (chain.rows_VV * np.log(chain.rows_VV)).sum(1)
        now_V = now_V @ chain.rows_VV
    return float(total)


def posterior(chain: Chain) -> Denoiser:
    """Of any length, from each position's nearest visible neighbours: what lies beyond them is independent of it."""
    V = len(chain.start_V)
    shown_WV = np.concatenate(
        [np.eye(V), np.zeros((2, V))]
    )  # token → its one-hot; nothing for the mask and PAD (row -1)

    def log_probs(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        B, T = tokens_BT.shape
        hidden_BT1 = ((tokens_BT < 0) | (tokens_BT >= V))[..., None]
        shown_BTV = shown_WV[tokens_BT]
        before_BTV, after_BTV = np.empty((2, B, T, V))  # p(token | left neighbour), p(right neighbour | token) ∝
        before_BTV[:, 0], after_BTV[:, -1] = chain.start_V, 1.0
        for i in range(1, T):
            before_BTV[:, i] = np.where(hidden_BT1[:, i - 1], before_BTV[:, i - 1], shown_BTV[:, i - 1]) @ chain.rows_VV
        for i in reversed(range(T - 1)):
            after_BTV[:, i] = np.where(hidden_BT1[:, i + 1], after_BTV[:, i + 1], shown_BTV[:, i + 1]) @ chain.rows_VV.T
        joint_BTV = before_BTV * after_BTV
        return np.log(joint_BTV / joint_BTV.sum(-1, keepdims=True))

    return log_probs


def table(probs_N: np.ndarray, V: int, L: int) -> Denoiser:
    """Of any joint distribution over all_sequences(V, L), by summing what agrees with the visible tokens."""
    sequences_NL = all_sequences(V, L)
    onehot_NLV = np.eye(V)[sequences_NL]

    def log_probs(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        hidden_BT = (tokens_BT < 0) | (tokens_BT >= V)
        agrees_BN = (hidden_BT[:, None] | (tokens_BT[:, None] == sequences_NL)).all(-1)
        mass_BTV = np.einsum("bn,nlv->blv", agrees_BN * probs_N, onehot_NLV)
        with np.errstate(divide="ignore"):  # a visible position's other tokens have probability 0
            return np.log(mass_BTV / mass_BTV.sum(-1, keepdims=True))

    return log_probs


def enumerated(chain: Chain, L: int) -> Denoiser:
    """`posterior` for rows of exactly L, by enumeration of all V^L sequences."""
    V = len(chain.start_V)
    return table(np.exp(log_prob(chain, all_sequences(V, L))), V, L)


def p_value(counts_N: np.ndarray, probs_N: np.ndarray) -> float:
    """Chi-square of counts being draws from probs_N, up to its sum; cells are pooled until each expects 10 or more."""
    probs_N = np.asarray(probs_N) / np.sum(probs_N)
    if np.any(np.asarray(counts_N)[probs_N == 0]):
        return 0.0
    order_N = np.argsort(-probs_N)
    observed, expected = np.asarray(counts_N)[order_N], np.sum(counts_N) * probs_N[order_N]
    num = max(1, int((expected >= 10).sum()))
    num -= num > 1 and expected[num:].sum() < 10  # what is pooled behind the last cell of its own must expect 10, too
    observed = np.append(observed[:num], observed[num:].sum())
    expected = np.append(expected[:num], expected[num:].sum())
    kept = expected > 0
    return float(stats.chisquare(observed[kept], expected[kept]).pvalue) if kept.sum() > 1 else 1.0
