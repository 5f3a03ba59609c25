"""A source whose best possible loss is known exactly: a random order-1 Markov chain over `states` tokens.

Tokens are pure functions of (seed, split, window), so the data is endless, never repeats and needs no file. A model's
loss minus `entropy_rate` is what it has left to learn, to the last nat.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from slmjax.config import ConfigError
from slmjax.data.order import key, uniform

MAX_STATES = 4096  # the transition matrix has states^2 float64
_BLOCK_TOKENS = 1 << 17  # drawn at once: the loop over positions costs the same for 16 windows as for 1,000


class Chain(NamedTuple):
    transition_SS: np.ndarray  # float64; row s is the distribution of the token after s
    stationary_S: np.ndarray  # float64; of the first token, hence of every token
    entropy_rate: float  # nats per token


def parse(spec: str) -> tuple[int, int]:
    """(states, seed) of a `markov:STATES:SEED` source.

    Raises:
      ConfigError: not of that form, or a number out of range.
    """
    parts = spec.split(":")
    if len(parts) != 3 or parts[0] != "markov" or not all(p.isascii() and p.isdigit() for p in parts[1:]):
        raise ConfigError(f"data.sources={spec!r} is not of the form markov:STATES:SEED, e.g. markov:64:0")
    states, seed = int(parts[1]), int(parts[2])
    if not 2 <= states <= MAX_STATES:
        raise ConfigError(f"data.sources={spec!r} has {states} states; use 2 to {MAX_STATES}")
    return states, seed


def vocab_size(spec: str) -> int:
    return parse(spec)[0]


def entropy(spec: str, num_tokens: int, context: bool) -> float:
    """Nats per token of `num_tokens` tokens in a row: given the token before them (context), or nothing."""
    law = chain(*parse(spec))
    if context:
        return law.entropy_rate
    first = -float(law.stationary_S @ np.log(law.stationary_S))
    return (first + (num_tokens - 1) * law.entropy_rate) / num_tokens


@lru_cache(maxsize=4)
def chain(states: int, seed: int) -> Chain:
    """The chain of (states, seed). Every transition is possible, so it is ergodic and its entropy rate is unique.

    Rows are cubes of exponential draws, normalised. Plain exponentials (a flat Dirichlet) would leave only 0.42 nats
    to learn whatever the number of states; cubed, 1.4 (16 states) to 1.9 (256).
    """
    draws = uniform(key("markov", states, seed), np.arange(states * states, dtype=np.uint64)).reshape(states, states)
    weights_SS = (-np.log1p(-draws) + 1e-3) ** 3
    transition_SS = weights_SS / weights_SS.sum(1, keepdims=True)
    # pi (P - I) = 0 has rank S - 1; the last equation gives way to sum(pi) = 1.
    system_SS = transition_SS.T - np.eye(states)
    system_SS[-1] = 1.0
    stationary_S = np.linalg.solve(system_SS, np.eye(states)[-1])
    entropy_S = -(transition_SS * np.log(transition_SS)).sum(1)
    return Chain(transition_SS, stationary_S, float(stationary_S @ entropy_S))


def sampler(spec: str, split: str, length: int) -> Callable[[np.ndarray], np.ndarray]:
    """read(windows int64 [N]) -> int32 [N, length]: windows of the chain `spec`, the same whenever they are asked for.

    `split` (train, held_out) names independent streams of the one chain.
    """
    states, seed = parse(spec)
    law = chain(states, seed)
    stream = key("markov windows", states, seed, split)
    per_block = max(1, _BLOCK_TOKENS // length)

    @lru_cache(maxsize=4)
    def block(index):
        return _draw(law, stream, np.arange(index * per_block, (index + 1) * per_block), length)

    def read(windows_N):
        blocks, offsets = np.divmod(windows_N, per_block)
        out = np.empty((len(windows_N), length), np.int32)
        for index in np.unique(blocks):
            chosen = blocks == index
            out[chosen] = block(int(index))[offsets[chosen]]
        return out

    return read


def _draw(law: Chain, stream: np.uint64, windows_N: np.ndarray, length: int) -> np.ndarray:
    """int32 [N, length] by inverting the cumulative distribution, all windows one position at a time."""
    S = len(law.stationary_S)
    counters = windows_N.astype(np.uint64)[None, :] * np.uint64(length) + np.arange(length, dtype=np.uint64)[:, None]
    u_TN = uniform(stream, counters)
    # One sorted array holds every row's cumulative sums, row s shifted by s, so one search serves all states.
    cumulative = (np.cumsum(law.transition_SS, 1) + np.arange(S)[:, None]).ravel()
    tokens_TN = np.empty(u_TN.shape, np.int32)
    state_N = np.minimum(np.searchsorted(np.cumsum(law.stationary_S), u_TN[0], "right"), S - 1)
    tokens_TN[0] = state_N
    for t in range(1, length):
        found_N = np.searchsorted(cumulative, state_N + u_TN[t], "right") - S * state_N
        state_N = np.clip(found_N, 0, S - 1)  # the sums end within rounding of s + 1, not on it
        tokens_TN[t] = state_N
    return np.ascontiguousarray(tokens_TN.T)
