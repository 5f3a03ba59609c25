"""Which row of which source each step trains on: closed forms in (config, step), so that no part of it is state.

A resumed run, a branch and a run on another number of processes all see the same rows, because the only question ever
asked is "which rows does step t hold?". Nothing here reads data.
"""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from slmjax.config import ConfigError, RunConfig, decay_start

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 4


def key(*parts) -> np.uint64:
    """64 bits that name `parts` (their reprs): what every stateless draw here is seeded with."""
    return np.uint64(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little"))


def random_bits(seed: np.uint64, counter: np.ndarray) -> np.ndarray:
    """SplitMix64's output number `counter` (uint64, any shape) of the stream `seed`.

    Not numpy's Generator: its methods may change between releases (NEP 19), which would silently reorder every run.
    """
    z = seed + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits; same shape as `counter` (uint64)."""
    return (random_bits(seed, counter) >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, size: int, seed: np.uint64) -> np.ndarray:
    """Where `index` (int64 in [0, size)) goes in the pseudo-random permutation `seed` of range(size).

    A Feistel network over a grid of rows x columns >= size cells: each half-round adds a random function of one
    coordinate to the other, which is a bijection whatever the function; the few cells past `size` are walked on until
    they fall inside. Constant memory, so that an epoch of billions of windows costs what one of ten does.
    """
    if size < 2:
        return np.zeros_like(index)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    m, n = np.uint64(rows), np.uint64(columns)
    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(out.size)
    while walking.size:
        row, column = np.divmod(out[walking], n)
        for r in range(_ROUNDS):
            # Counters of different half-rounds must not meet: 2^40 columns are more windows than any disk holds.
            row = (row + random_bits(seed, column + np.uint64(2 * r << 40))) % m
            column = (column + random_bits(seed, row + np.uint64(2 * r + 1 << 40))) % n
        out[walking] = row * n + column
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


class Mixture(NamedTuple):
    """How many rows each source has given, in closed form."""

    counts: Callable[[int], list[int]]  # rows taken from each source by all steps before `step`
    num_sources: int


def build_mixture(cfg: RunConfig) -> Mixture:
    """Rows per source as a function of the step, for `data.weights` and, from `decay_start` on, `data.decay_weights`.

    Every source but the heaviest has given floor(rows * weight + 1/2) rows after `rows` rows, so it is never more than
    half a row from exact; the heaviest takes the rest, at most (sources - 1) / 2 from exact. The decay continues each
    source where the stable phase left it.

    Raises:
      ConfigError: the batch is too small to hold every light source's rounded-up share.
    """
    B = cfg.train.batch_size
    stable = _shares("data.weights", cfg.data.weights, B)
    decay = _shares("data.decay_weights", cfg.data.decay_weights, B) if cfg.data.decay_weights else stable
    if decay == stable:
        return Mixture(lambda step: _quota(stable, step * B), len(stable))
    start = decay_start(cfg)
    offset = _quota(stable, start * B)

    def counts(step):
        if step <= start:
            return _quota(stable, step * B)
        return [a + b for a, b in zip(offset, _quota(decay, (step - start) * B), strict=True)]

    return Mixture(counts, len(stable))


def split_rows(weights: tuple[float, ...], rows: int) -> list[int]:
    """`rows` divided over sources in proportion to `weights`, as `build_mixture` divides a step."""
    return _quota(_exact(weights), rows)


def _exact(weights) -> list[Fraction]:
    # Through str: 0.1 means one tenth, not the double nearest to it, so that rounding is the same on paper and here.
    exact = [Fraction(str(w)) for w in weights]
    return [w / sum(exact) for w in exact]


def _shares(field: str, weights, B: int) -> list[Fraction]:
    shares = _exact(weights)
    heaviest = shares.index(max(shares))
    light = sum(math.ceil(share * B) for i, share in enumerate(shares) if i != heaviest)
    if light > B:
        raise ConfigError(
            f"train.batch_size={B} is too small for {field}={weights}: the lighter sources may need {light} rows "
            f"of one batch; use train.batch_size >= {light} or fewer sources"
        )
    return shares


def _quota(shares: list[Fraction], rows: int) -> list[int]:
    # floor(share * rows + 1/2) in integers: Fraction's own arithmetic costs more than the batch.
    counts = [(2 * s.numerator * rows + s.denominator) // (2 * s.denominator) for s in shares]
    heaviest = shares.index(max(shares))
    counts[heaviest] += rows - sum(counts)
    return counts
