"""How many strings of a length a grammar has, and uniform draws from them.

Derivations are what is counted. They are as many as strings only if the grammar is unambiguous, which cannot be decided
in general: `sample_uniform` refuses what it draws when it has two.
"""

import bisect
import itertools
import random

import numpy as np

from slmjax.decoding.grammar.chart import COUNTS, inside
from slmjax.decoding.grammar.rules import Grammar

_CHECKED = 1000  # strings of a sample whose derivations are counted


def count(grammar: Grammar, length: int) -> int:
    """Derivations of strings of `length` tokens, exact: of an unambiguous grammar its strings."""
    return _table(grammar, length)[length][grammar.start]


def nearest_lengths(grammar: Grammar, length: int) -> list[int]:
    """The lengths that the grammar has strings of and that are nearest to `length`, one below and one above.

    Fewer where there is none above before 2 length + 3, or none below; `length` alone if it is one.
    """
    has = [counts_A[grammar.start] > 0 for counts_A in _table(grammar, 2 * length + 2)]
    below = next((n for n in range(length, 0, -1) if has[n]), None)
    above = next((n for n in range(length, len(has)) if has[n]), None)
    return sorted({n for n in (below, above) if n is not None})


def sample_uniform(grammar: Grammar, length: int, num: int, seed: int) -> np.ndarray:
    """int32 [num, length]: strings drawn independently, each of that length equally likely.

    Raises:
      ValueError: no string of that length, or a drawn one has more than one derivation.
    """
    table = _table(grammar, length)
    if not table[length][grammar.start]:
        raise ValueError(f"no string of length {length} in the grammar; it has {nearest_lengths(grammar, length)}")
    rng, ways = random.Random(seed), {}
    emitted = [np.flatnonzero(row).tolist() for row in grammar.emits_AV]
    splits = _splits(grammar)
    tokens_NT = np.empty((num, length), np.int32)
    for row_T in tokens_NT:
        todo, position = [(grammar.start, length)], 0
        while todo:
            a, n = todo.pop()
            if n == 1:
                row_T[position] = rng.choice(emitted[a])
                position += 1
                continue
            if (a, n) not in ways:
                options = [(b, c, k) for b, c in splits[a] for k in range(1, n)]
                sizes = (table[k][b] * table[n - k][c] for b, c, k in options)
                ways[a, n] = options, list(itertools.accumulate(sizes))
            options, cumulative = ways[a, n]
            b, c, k = options[bisect.bisect_right(cumulative, rng.randrange(cumulative[-1]))]
            todo += [(c, n - k), (b, k)]  # the left part is taken first
    _refuse_ambiguous(grammar, tokens_NT[:_CHECKED])
    return tokens_NT


def _table(grammar: Grammar, length: int) -> list[list[int]]:
    """[n][a]: derivations of strings of n tokens from nonterminal a."""
    table, splits = [[0] * len(grammar.symbols), grammar.emits_AV.sum(1).tolist()], _splits(grammar)
    for n in range(2, length + 1):
        table.append([sum(table[k][b] * table[n - k][c] for b, c in pairs for k in range(1, n)) for pairs in splits])
    return table


def _splits(grammar: Grammar) -> list[list[tuple[int, int]]]:
    """The pairs that each nonterminal becomes."""
    splits = [[] for _ in grammar.symbols]
    for a, b, c in grammar.rules_R3.tolist():
        splits[a].append((b, c))
    return splits


def _refuse_ambiguous(grammar: Grammar, tokens_NT: np.ndarray) -> None:
    leaves_ANT = grammar.emits_AV[:, tokens_NT].astype(np.float64)
    spans = inside(grammar, leaves_ANT, COUNTS)
    derivations_N = spans.by_start[grammar.start, :, 0, tokens_NT.shape[1]]
    if (derivations_N != 1).any():
        worst = derivations_N.argmax()
        raise ValueError(
            f"the grammar is ambiguous: {tokens_NT[worst].tolist()} has {derivations_N[worst]:.0f} derivations, and "
            "draws are uniform over derivations; rewrite it so that every string has one"
        )
