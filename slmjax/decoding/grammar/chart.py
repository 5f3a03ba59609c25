"""Inside and outside charts of a grammar over rows of one width, by spans, in any semiring.

Inside: what a nonterminal derives of a span. Outside: what is around a span when the root derives the row. In booleans
both say whether something is possible, in counts in how many ways, in logs with what probability. O(T^3) per rule, as
array operations over rows, rules, spans and splits of one length.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slmjax.decoding.grammar.rules import Grammar


def log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    """The logarithm of the sum of exp(x) along an axis, also of zeros or none; np.logaddexp.reduce is slow."""
    largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    largest = np.where(np.isneginf(largest), 0.0, largest)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - largest).sum(axis)) + np.squeeze(largest, axis)


class Semiring(NamedTuple):
    times: np.ufunc
    plus: np.ufunc
    total: Callable  # total(x, axis): plus along an axis
    zero: float | bool
    one: float | bool


BOOLEAN = Semiring(np.logical_and, np.logical_or, np.any, False, True)
COUNTS = Semiring(np.multiply, np.add, np.sum, 0.0, 1.0)  # float64: exact to 2^53
LOGS = Semiring(np.add, np.logaddexp, log_sum, -np.inf, 0.0)


class Spans(NamedTuple):
    """One value for every nonterminal and span of every row, twice, so that all splits of a span lie side by side."""

    by_start: np.ndarray  # [A, B, T + 1, T + 1]: start, length
    by_end: np.ndarray  # [A, B, T + 1, T + 1]: end, length


def inside(grammar: Grammar, leaves_ABT: np.ndarray, ring: Semiring) -> Spans:
    """What every nonterminal derives of every span, given what it derives of single positions."""
    spans, T = _empty(leaves_ABT, ring), leaves_ABT.shape[2]
    spans.by_start[:, :, :T, 1] = spans.by_end[:, :, 1:, 1] = leaves_ABT
    parent_R, left_R, right_R = grammar.rules_R3.T
    by_parent = _by_symbol(parent_R)
    for length in range(2, T + 1):
        left_RBNK, right_RBNK = _splits(spans, left_R, right_R, length)
        ways_RBN = ring.total(ring.times(left_RBNK, right_RBNK), -1)
        for a, rules in by_parent:
            total_BN = ring.total(ways_RBN[rules], 0)
            spans.by_start[a, :, : T - length + 1, length] = spans.by_end[a, :, length:, length] = total_BN
    return spans


def outside_leaves(
    grammar: Grammar, spans: Spans, starts_B: np.ndarray, lengths_B: np.ndarray, ring: Semiring
) -> np.ndarray:
    """[A, B, T]: what is around nonterminal a at a position, the start symbol deriving each row's string.

    A row's string is the `lengths_B` positions from `starts_B` on.
    """
    B, T = spans.by_start.shape[1], spans.by_start.shape[2] - 1
    around = _empty(spans.by_start[:, :, :T, 1], ring)
    around.by_start[grammar.start, np.arange(B), starts_B, lengths_B] = ring.one
    parent_R, left_R, right_R = grammar.rules_R3.T
    by_left, by_right = _by_symbol(left_R), _by_symbol(right_R)
    for length in range(T, 1, -1):
        N = T - length + 1
        here_ABN = ring.plus(around.by_start[:, :, :N, length], around.by_end[:, :, length:, length])
        left_RBNK, right_RBNK = _splits(spans, left_R, right_R, length)
        parent_RBN1 = here_ABN[parent_R, :, :, None]
        # Around a left child is what is around its parent and inside its sister; it starts where the parent does.
        of_left_RBNK = ring.times(parent_RBN1, right_RBNK)
        for b, rules in by_left:
            sums_BNK = around.by_start[b, :, :N, 1:length]
            sums_BNK[:] = ring.plus(sums_BNK, ring.total(of_left_RBNK[rules], 0))
        # Right children end where the parent does, the longest first.
        of_right_RBNK = ring.times(parent_RBN1, left_RBNK)
        for c, rules in by_right:
            sums_BNK = around.by_end[c, :, length:, length - 1 : 0 : -1]
            sums_BNK[:] = ring.plus(sums_BNK, ring.total(of_right_RBNK[rules], 0))
    return ring.plus(around.by_start[:, :, :T, 1], around.by_end[:, :, 1:, 1])


def _splits(spans: Spans, left_R, right_R, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of every span of `length` [R, B, N]; the left one is 1, 2, ... length - 1 long along the last axis."""
    N = spans.by_start.shape[2] - length
    return spans.by_start[left_R, :, :N, 1:length], spans.by_end[right_R, :, length:, length - 1 : 0 : -1]


def _by_symbol(symbol_R: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each symbol with the rules that have it there."""
    return [(symbol, np.flatnonzero(symbol_R == symbol)) for symbol in np.unique(symbol_R).tolist()]


def _empty(leaves_ABT: np.ndarray, ring: Semiring) -> Spans:
    A, B, T = leaves_ABT.shape
    dtype = np.asarray(ring.zero).dtype
    return Spans(*(np.full((A, B, T + 1, T + 1), ring.zero, dtype) for _ in range(2)))
