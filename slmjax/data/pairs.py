"""COUNT fixed pairs of codes, for asking whether a model that has learnt A → B knows B → A.

A row is [start, A, separator, B]: two codes of LENGTH tokens, A of symbols 0-15 and B of 16-31. All A are distinct and
all B are, so that either code determines the other, by nothing but memory, and a row has log COUNT nats.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from slmjax.config import ConfigError
from slmjax.data.order import key, permute, uniform

SYMBOLS = 16  # of each code
SEPARATOR, START = 2 * SYMBOLS, 2 * SYMBOLS + 1
MAX_LENGTH = 12  # 16^12 codes are numbered in 48 bits
MAX_COUNT = 1 << 20  # pairs are held in memory
_DIRECTIONS = ("forward", "reverse")


class Pairs(NamedTuple):
    count: int
    length: int
    seed: int
    direction: str  # forward: A first | reverse: B first, of the same pairs

    @property
    def row_len(self) -> int:
        """Tokens of a row, the start token left out."""
        return 2 * self.length + 1


def parse(spec: str) -> Pairs:
    """Of a `pairs:COUNT:LENGTH:SEED[:forward|:reverse]` source.

    Raises:
      ConfigError: not of that form, or a number out of range.
    """
    name, *numbers = spec.split(":")
    direction = numbers.pop() if len(numbers) == 4 else "forward"
    digits = len(numbers) == 3 and all(p.isascii() and p.isdigit() for p in numbers)
    if name != "pairs" or not digits or direction not in _DIRECTIONS:
        raise ConfigError(
            f"data.sources={spec!r} is not of the form pairs:COUNT:LENGTH:SEED[:forward|:reverse], e.g. pairs:1000:4:0"
        )
    count, length, seed = map(int, numbers)
    if not 1 <= length <= MAX_LENGTH:
        raise ConfigError(f"data.sources={spec!r} has codes of {length} tokens; use 1 to {MAX_LENGTH}")
    most = min(SYMBOLS**length, MAX_COUNT)
    if not 1 <= count <= most:
        raise ConfigError(f"data.sources={spec!r} has {count} pairs; use 1 to {most}")
    return Pairs(count, length, seed, direction)


def vocab_size(spec: str) -> int:
    """Both alphabets, the separator and the start token."""
    parse(spec)
    return 2 * SYMBOLS + 2


def entropy(spec: str, num_tokens: int, context: bool) -> float:
    """Nats per token of a row, its start token left out: log COUNT over the row's 2 LENGTH + 1.

    Rows are whole, whatever `num_tokens`, and the start token tells nothing: with it as `context` it is the same.
    """
    pairs = parse(spec)
    return math.log(pairs.count) / pairs.row_len


@lru_cache(maxsize=4)
def rows(pairs: Pairs) -> np.ndarray:
    """int32 [COUNT, T + 1]: each pair's row."""
    codes_2NL = [_codes(pairs, code) + code * SYMBOLS for code in (0, 1)]
    first_NL, second_NL = codes_2NL if pairs.direction == "forward" else codes_2NL[::-1]
    column = np.ones((pairs.count, 1), int)
    return np.concatenate([START * column, first_NL, SEPARATOR * column, second_NL], axis=1).astype(np.int32)


def sampler(spec: str, split: str, length: int) -> Callable[[np.ndarray], np.ndarray]:
    """read(windows int64 [N]) -> int32 [N, length]: one row a window, the same whenever it is asked for.

    A window of `train` is a pair drawn uniformly, with replacement; window i of `held_out` is pair i modulo COUNT.
    """
    pairs = parse(spec)
    if length != pairs.row_len + 1:
        raise ConfigError(
            f"data.seq_len={length - 1} does not fit the rows of data.sources={spec!r}; use {pairs.row_len}"
        )
    stream = key("pairs windows", *pairs)

    def read(windows_N):
        if split == "held_out":
            return rows(pairs)[windows_N % pairs.count]
        u_N = uniform(stream, windows_N.astype(np.uint64))
        return rows(pairs)[(u_N * pairs.count).astype(np.int64)]

    return read


def _codes(pairs: Pairs, code: int) -> np.ndarray:
    """int64 [COUNT, LENGTH] of symbols 0-15: the first numbers of a permutation of all codes, in base 16."""
    stream = key("pairs codes", pairs.count, pairs.length, pairs.seed, code)
    number_N = permute(np.arange(pairs.count), SYMBOLS**pairs.length, stream)
    return number_N[:, None] // SYMBOLS ** np.arange(pairs.length)[None] % SYMBOLS
