"""Decoding under a grammar: charts against enumeration, validity whatever the denoiser says, the law drawn from."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from slmjax.decoding import grammar, ordered
from slmjax.denoiser import PAD, Counted

V = MASK = 5
NAMES = {"a": 0, "(": 1, ")": 2, "[": 3, "]": 4}
ITEMS = grammar.parse("S -> I S | I \n I -> a | ( S ) | [ S ]", NAMES)
BALANCED = grammar.parse("S -> B S | B \n B -> ( ) | ( S ) | [ ] | [ S ]", NAMES)
COUNTS = [
    1, 1, 3, 7, 17, 45, 119, 323, 893, 2497, 7067, 20191, 58153, 168693, 492383, 1445051,
]  # fmt: skip
CLOSES = {2: 1, 4: 3}


def is_valid(tokens) -> bool:
    """By a stack: brackets close what was opened last, and nothing is empty."""
    stack, filled = [], False
    for token in tokens:
        if token == 0:
            filled = True
        elif token in CLOSES:
            if not stack or not filled or stack.pop() != CLOSES[token]:
                return False
        elif token in CLOSES.values():
            stack.append(token)
            filled = False
        else:
            return False
    return filled and not stack


def strings(length: int) -> np.ndarray:
    return np.array(list(itertools.product(range(V), repeat=length)))


def valid_strings(length: int) -> np.ndarray:
    all_NT = strings(length)
    return all_NT[[is_valid(tokens_T) for tokens_T in all_NT]]


def random_denoiser(seed: int, T: int, vocab: int = V):
    """Logits that depend on every visible token, of standard deviation 2."""
    rng = np.random.default_rng(seed)
    weights_TUTV = rng.normal(size=(T, vocab + 2, T, vocab)) * 2 / math.sqrt(T)

    def denoiser(tokens_BT):
        logits_BTV = weights_TUTV[np.arange(T), np.asarray(tokens_BT)].sum(1)
        return logits_BTV - np.log(np.exp(logits_BTV).sum(2, keepdims=True))

    return denoiser


def uniform(tokens_BT):
    return np.full((*tokens_BT.shape, V), -math.log(V))


def masks(B: int, T: int) -> np.ndarray:
    return np.full((B, T), MASK, np.int32)


# ------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("length", range(1, 7))
def test_a_string_is_recognised_as_by_a_stack(length):
    all_NT = strings(length)
    accepted_N = grammar.allowed(ITEMS, all_NT, mask_id=MASK).any(2).all(1)
    assert np.array_equal(accepted_N, [is_valid(tokens_T) for tokens_T in all_NT])
    assert accepted_N.sum() == COUNTS[length - 1]


def test_what_masks_may_become_is_what_enumeration_finds(seed):
    rng = np.random.default_rng(seed)
    feasible = 0
    for length in (1, 2, 4, 6, 7):
        valid_NT = valid_strings(length)
        # Half of the rows are strings with some tokens hidden, half anything.
        rows_BT = np.concatenate([valid_NT[rng.integers(len(valid_NT), size=40)], rng.integers(V, size=(40, length))])
        rows_BT = np.where(rng.random(rows_BT.shape) < rng.uniform(0.2, 1, (len(rows_BT), 1)), MASK, rows_BT)
        found_BTV = grammar.allowed(ITEMS, rows_BT, mask_id=MASK)
        for row_T, found_TV in zip(rows_BT, found_BTV, strict=True):
            fits_NT = valid_NT[((row_T == MASK) | (valid_NT == row_T)).all(1)]
            assert np.array_equal(found_TV, (fits_NT[:, :, None] == np.arange(V)).any(0))
            feasible += len(fits_NT) > 0
    assert 150 < feasible < 400


def test_prompts_and_padding_are_outside_the_string():
    rows_BT = np.array([[4, 4, MASK, 0, MASK, PAD], [2, MASK, MASK, MASK, MASK, MASK]])
    found_BTV = grammar.allowed(ITEMS, rows_BT, mask_id=MASK, first=[2, 1])
    assert not found_BTV[0, [0, 1, 5]].any() and not found_BTV[1, 0].any()
    for row, start, length in ((0, 2, 3), (1, 1, 5)):
        alone_BTV = grammar.allowed(ITEMS, rows_BT[row : row + 1, start : start + length], mask_id=MASK)
        assert np.array_equal(found_BTV[row, start : start + length], alone_BTV[0])
    assert found_BTV[0, 2].tolist() == [True, True, False, True, False]


# ------------------------------------------------------------------------------------------------------- rules


def test_any_productions_become_the_same_strings():
    """Unary chains and cycles, long productions, tokens with several ids, symbols used in both ways."""
    written = grammar.parse(
        """
        List -> Inner
        Inner -> List | open Items close
        Items -> Item | Item comma Items
        Item -> digit | List
        """,
        {"open": 7, "close": 8, "comma": 9, "digit": (0, 1, 2)},
    )

    def parses(text: str) -> bool:
        try:
            return isinstance(json.loads(text), list) and "[]" not in text
        except json.JSONDecodeError:
            return False

    words = {0: "true", 2: "null", 7: "[", 8: "]", 9: ","}
    for length in range(1, 7):
        rows_NT = np.array(list(itertools.product(words, repeat=length)))
        accepted_N = grammar.allowed(written, rows_NT, mask_id=100).any(2).all(1)
        assert accepted_N.tolist() == [parses("".join(words[token] for token in row)) for row in rows_NT.tolist()]
        assert accepted_N.any() == (length in (3, 5))


@pytest.mark.parametrize(
    ("productions", "message"),
    [
        ("S -> a S |", "empty alternative"),
        ("S ->", "empty alternative"),
        ("S = a", "not of the form"),
        ("S T -> a", "not of the form"),
        ("S -> a T", "'T' in a production of 'S' is neither"),
        ("S -> a \n a -> a", "'a' is both"),
        ("S -> a S", "'S' derives no string"),
        ("", "without productions"),
    ],
)
def test_what_is_no_grammar_is_refused(productions, message):
    with pytest.raises(ValueError, match=message):
        grammar.parse(productions, NAMES)


def test_padding_adds_end_tokens_behind_shorter_strings():
    end = 6
    longer = grammar.padded(ITEMS, end)
    assert [grammar.count(longer, n) for n in range(1, 13)] == list(itertools.accumulate(COUNTS[:12]))
    drawn_NT = grammar.sample_uniform(longer, 7, 300, seed=0)
    for tokens_T in drawn_NT:
        kept = tokens_T[: len(tokens_T) - np.argmin(tokens_T[::-1] == end)]
        assert is_valid(kept)
    assert len({(tokens_T == end).sum() for tokens_T in drawn_NT}) > 4
    with pytest.raises(ValueError, match="end_id=2 is a token of the grammar"):
        grammar.padded(ITEMS, 2)


# ----------------------------------------------------------------------------------------------------- counting


def test_counts_are_the_published_ones():
    assert [grammar.count(ITEMS, n) for n in range(1, 17)] == COUNTS
    assert grammar.count(ITEMS, 32) == 67615034329515
    assert grammar.count(BALANCED, 3) == 0


def test_draws_are_uniform_over_all_strings(seed):
    valid_NT = valid_strings(6)
    drawn_NT = grammar.sample_uniform(ITEMS, 6, 9000, seed)
    strings, counts = np.unique(drawn_NT, axis=0, return_counts=True)
    assert np.array_equal(strings, valid_NT) and len(valid_NT) == 45
    assert stats.chisquare(counts).pvalue > 1e-4


def test_draws_of_a_long_grammar_are_its_strings():
    drawn_NT = grammar.sample_uniform(ITEMS, 32, 50, seed=1)
    assert all(is_valid(tokens_T) for tokens_T in drawn_NT) and len(np.unique(drawn_NT, axis=0)) == 50


def test_an_ambiguous_grammar_is_refused_where_it_would_bias_draws():
    ambiguous = grammar.parse("S -> S S | a | ( S )", NAMES)
    assert len(grammar.sample_uniform(ambiguous, 2, 5, seed=0)) == 5
    with pytest.raises(ValueError, match=r"ambiguous.* has 1?\d derivations"):
        grammar.sample_uniform(ambiguous, 5, 50, seed=0)
    with pytest.raises(ValueError, match=r"no string of length 3 in the grammar; it has \[2, 4\]"):
        grammar.sample_uniform(BALANCED, 3, 5, seed=0)


# ----------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("law", ["allowed", "completions"])
@pytest.mark.parametrize("order", ["confidence", "random", "left_to_right"])
def test_every_decode_is_valid_whatever_the_denoiser_says(order, law, seed):
    denoiser, rng = random_denoiser(seed, T=12), np.random.default_rng(seed)
    prompts_BT = masks(100, 12)
    prompts_BT[50:, :3] = rng.integers(V, size=(50, 3))
    counted = Counted(denoiser)
    first = np.where(np.arange(100) < 50, 0, 3)
    decoded = grammar.decode(
        counted, prompts_BT, mask_id=MASK, grammar=ITEMS, first=first, order=order, law=law, temperature=1.0, seed=seed
    )
    assert all(is_valid(tokens_T[start:]) for tokens_T, start in zip(decoded.tokens_BT, first, strict=True))
    assert np.array_equal(decoded.tokens_BT[50:, :3], prompts_BT[50:, :3])
    assert counted.num_calls == 12 and not decoded.deterministic
    plain = ordered.decode(denoiser, masks(100, 12), mask_id=MASK, per_call=1, temperature=1.0, seed=seed)
    assert np.mean([is_valid(tokens_T) for tokens_T in plain.tokens_BT]) < 0.1
    if order == "left_to_right":
        assert [reveal.positions_N[0] for reveal in decoded.trace] == list(range(12))


def test_tokens_the_denoiser_calls_impossible_are_taken_when_nothing_else_is_allowed():
    only_closes = np.full((1, 1, V), -np.inf)
    only_closes[..., 2] = 0
    for law in ("allowed", "completions"):
        decoded = grammar.decode(
            lambda tokens_BT: np.broadcast_to(only_closes, (*tokens_BT.shape, V)),
            masks(2, 8), mask_id=MASK, grammar=ITEMS, law=law,
        )  # fmt: skip
        assert all(is_valid(tokens_T) for tokens_T in decoded.tokens_BT)
        assert sum(np.isneginf(reveal.log_confidence_N).sum() for reveal in decoded.trace) > 0


def test_a_valid_greedy_output_comes_out_unchanged(seed):
    """Of denoisers leaning towards a string of the grammar, so that many find one by themselves, and many do not."""
    same = different = 0
    for draw in range(40):
        rng = np.random.default_rng((seed, draw))
        target_T = valid_strings(6)[rng.integers(45)]
        random, lean = random_denoiser(rng.integers(2**32), T=6), (1.0, 4.0, 8.0)[draw % 3]

        def denoiser(tokens_BT, random=random, lean=lean, target_T=target_T):
            leaning_BTV = random(tokens_BT) + lean * (target_T[:, None] == np.arange(V))
            return leaning_BTV - np.log(np.exp(leaning_BTV).sum(2, keepdims=True))

        plain = ordered.static(denoiser, masks(1, 6), mask_id=MASK)
        held = grammar.decode(denoiser, masks(1, 6), mask_id=MASK, grammar=ITEMS)
        assert held.deterministic
        if is_valid(plain.tokens_BT[0]):
            same += 1
            assert np.array_equal(held.tokens_BT, plain.tokens_BT)
            for a, b in zip(held.trace, plain.trace, strict=True):
                assert (a.positions_N, a.values_N) == (b.positions_N, b.values_N)
                assert a.log_confidence_N == pytest.approx(b.log_confidence_N, abs=1e-5)
        else:
            different += 1
            assert is_valid(held.tokens_BT[0])
    assert same > 3 and different > 3


@pytest.mark.parametrize(
    ("rows_BT", "message"),
    [
        (masks(2, 7), r"row 0: the grammar has no string of length 7; the nearest lengths are 6 and 8"),
        ([[MASK] * 4, [MASK, MASK, 1, MASK]], None),
        ([[MASK] * 4, [MASK, MASK, MASK, 1]], r"row 1: no string of length 4 of the grammar agrees"),
        ([[MASK] * 4, [0, MASK, MASK, MASK]], r"row 1: no string of length 4 of the grammar agrees"),
    ],
)
def test_what_no_string_fits_is_refused_before_any_call(rows_BT, message):
    counted = Counted(uniform)
    if message is None:
        assert grammar.decode(counted, np.array(rows_BT), mask_id=MASK, grammar=BALANCED).tokens_BT.max() < V
        return
    with pytest.raises(ValueError, match=message):
        grammar.decode(counted, np.array(rows_BT), mask_id=MASK, grammar=BALANCED)
    assert not counted.num_calls


def test_masks_in_a_prompt_and_masks_that_are_tokens_are_refused():
    with pytest.raises(ValueError, match="masks before its string"):
        grammar.decode(uniform, masks(1, 4), mask_id=MASK, grammar=ITEMS, first=1)
    with pytest.raises(ValueError, match="mask_id=3 is a token of the grammar"):
        grammar.decode(uniform, np.full((1, 4), 3), mask_id=3, grammar=ITEMS)
    with pytest.raises(ValueError, match="order='entropy'"):
        grammar.decode(uniform, masks(1, 4), mask_id=MASK, grammar=ITEMS, order="entropy")
    with pytest.raises(ValueError, match="the grammar has token 4, the denoiser only 3"):
        grammar.decode(lambda x_BT: uniform(x_BT)[..., :3], masks(1, 4), mask_id=MASK, grammar=ITEMS)


@pytest.mark.parametrize("order", ["random", "left_to_right"])
def test_weighing_completions_makes_a_uniform_denoiser_draw_strings_uniformly(order, seed):
    def p_value(law):
        decoded = grammar.decode(
            uniform, masks(2700, 6), mask_id=MASK, grammar=ITEMS, order=order, law=law, temperature=1.0, seed=seed
        )
        strings, counts = np.unique(np.concatenate([valid_strings(6), decoded.tokens_BT]), axis=0, return_counts=True)
        assert len(strings) == 45
        return stats.chisquare(counts - 1).pvalue

    assert p_value("completions") > 1e-4
    assert p_value("allowed") < 1e-10, "candidates by themselves favour what has few completions"


def test_weighing_completions_gives_the_law_of_independent_draws_that_are_valid(seed):
    probs_TV = np.random.default_rng(seed).dirichlet(np.full(V, 2.0), 6)
    valid_NT = valid_strings(6)
    law_N = probs_TV[np.arange(6), valid_NT].prod(1)
    decoded = grammar.decode(
        lambda tokens_BT: np.broadcast_to(np.log(probs_TV), (*tokens_BT.shape, V)), masks(2700, 6), mask_id=MASK,
        grammar=ITEMS, order="random", law="completions", temperature=1.0, seed=seed,
    )  # fmt: skip
    index_B = (decoded.tokens_BT[:, None] == valid_NT).all(2).argmax(1)
    expected_N = 2700 * law_N / law_N.sum()
    common_N = expected_N >= 10
    observed = np.append(np.bincount(index_B, minlength=45)[common_N], np.sum(~common_N[index_B]))
    expected = np.append(expected_N[common_N], expected_N[~common_N].sum())
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-4
