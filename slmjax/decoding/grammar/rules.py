"""A grammar as people write it, and as the charts read it: Chomsky normal form in arrays."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

Alternatives = dict[str, list[tuple[str, ...]]]  # of each left side, in the order written


class Grammar(NamedTuple):
    """Chomsky normal form over A nonterminals and V tokens: a derivation step makes one token or two nonterminals."""

    symbols: tuple[str, ...]  # A names, those that the conversion made included
    start: int
    emits_AV: np.ndarray  # bool: a → token v
    rules_R3: np.ndarray  # int64 rows (a, b, c): a → b c


def parse(productions: str, tokens: Mapping[str, int | Collection[int]]) -> Grammar:
    """The grammar of lines such as `S -> I S | I`: symbols apart by spaces, the first left side is the start.

    `tokens` names the token ids that symbols on the right stand for, one or any of several. What has no production and
    no token is refused, and so are empty productions: at a fixed length padding (`padded`) does what they are used for.

    Raises:
      ValueError: a line that is none of these, or a grammar without strings.
    """
    written = _read(productions, tokens)
    binary = _binarise(written, tokens)
    symbols = tuple(binary)
    number = {symbol: a for a, symbol in enumerate(symbols)}
    V = 1 + max(max(_ids(ids)) for ids in tokens.values())
    emits_AV, rules = np.zeros((len(symbols), V), bool), set()
    for a, symbol in enumerate(symbols):
        for reached in _by_units(symbol, binary):
            for right in binary[reached]:
                if len(right) == 2:
                    rules.add((a, number[right[0]], number[right[1]]))
                elif right[0] in tokens:
                    emits_AV[a, list(_ids(tokens[right[0]]))] = True
    grammar = Grammar(symbols, 0, emits_AV, np.array(sorted(rules), np.int64).reshape(-1, 3))
    if not _productive(grammar)[grammar.start]:
        raise ValueError(f"{symbols[0]!r} derives no string: every production needs another one first; give it an end")
    return grammar


def padded(grammar: Grammar, end_id: int) -> Grammar:
    """The strings of `grammar` followed by any number of end tokens, none included: its shorter strings at one length.

    Raises:
      ValueError: `end_id` is a token of the grammar, so that where a string ends could not be told.
    """
    A, V = grammar.emits_AV.shape
    if end_id < V and grammar.emits_AV[:, end_id].any():
        raise ValueError(f"end_id={end_id} is a token of the grammar; pad with one that is not")
    whole, ends, end = A, A + 1, A + 2  # whole → what the start does | start ends; ends → end | end ends
    emits_AV = np.zeros((A + 3, max(V, end_id + 1)), bool)
    emits_AV[:A, :V] = grammar.emits_AV
    emits_AV[whole, :V] = grammar.emits_AV[grammar.start]
    emits_AV[[ends, end], end_id] = True
    starts_R3 = grammar.rules_R3[grammar.rules_R3[:, 0] == grammar.start].copy()
    starts_R3[:, 0] = whole
    added_R3 = np.array([(whole, grammar.start, ends), (ends, end, ends)])
    names = (f"{grammar.symbols[grammar.start]} padded", "padding", "one end")
    return Grammar((*grammar.symbols, *names), whole, emits_AV, np.concatenate([grammar.rules_R3, starts_R3, added_R3]))


def _read(productions: str, tokens) -> Alternatives:
    written: Alternatives = {}
    for line in filter(str.strip, productions.splitlines()):
        left, arrow, right = line.partition("->")
        if not arrow or len(left.split()) != 1:
            raise ValueError(f"production {line.strip()!r} is not of the form 'A -> B c | d'")
        alternatives = [tuple(part.split()) for part in right.split("|")]
        if () in alternatives:
            raise ValueError(
                f"production {line.strip()!r} has an empty alternative; leave it out and write every rule that uses "
                f"{left.strip()!r} twice, with it and without"
            )
        written.setdefault(left.strip(), []).extend(alternatives)
    if not written:
        raise ValueError("a grammar without productions; give lines such as 'S -> a S | a'")
    for name, ids in tokens.items():
        if name in written:
            raise ValueError(f"{name!r} is both a left side and a token; rename one")
        if not _ids(ids) or min(_ids(ids)) < 0:
            raise ValueError(f"token {name!r} stands for {ids}; give ids from 0 on")
    for left, alternatives in written.items():
        for symbol in (symbol for right in alternatives for symbol in right):
            if symbol not in written and symbol not in tokens:
                raise ValueError(f"{symbol!r} in a production of {left!r} is neither a left side nor a token")
    return written


def _binarise(written: Alternatives, tokens) -> Alternatives:
    """At most two symbols on every right side, and no token in a pair."""
    # Made names hold spaces or quotes before one, which no written symbol can.
    binary: Alternatives = {left: [] for left in written}

    def nonterminal(symbols: tuple[str, ...]) -> str:
        if len(symbols) == 1 and symbols[0] not in tokens:
            return symbols[0]
        name = " ".join(symbols) if len(symbols) > 1 else f"token {symbols[0]}"
        if name not in binary:
            binary[name] = [symbols if len(symbols) == 1 else pair(symbols)]
        return name

    def pair(symbols: tuple[str, ...]) -> tuple[str, str]:
        return nonterminal(symbols[:1]), nonterminal(symbols[1:])

    for left, alternatives in written.items():
        binary[left] = [right if len(right) == 1 else pair(right) for right in alternatives]
    return binary


def _by_units(symbol: str, binary: Alternatives) -> list[str]:
    """Nonterminals that `symbol` becomes by productions of one nonterminal, itself first."""
    reached = [symbol]
    for left in reached:
        reached += {right[0] for right in binary[left] if len(right) == 1 and right[0] in binary} - set(reached)
    return reached


def _productive(grammar: Grammar) -> np.ndarray:
    """bool [A]: which nonterminals derive a string."""
    productive_A, known = grammar.emits_AV.any(1), -1
    while productive_A.sum() > known:
        known = productive_A.sum()
        a_R, b_R, c_R = grammar.rules_R3.T
        productive_A[a_R[productive_A[b_R] & productive_A[c_R]]] = True
    return productive_A


def _ids(ids) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int | np.integer) else tuple(ids)
