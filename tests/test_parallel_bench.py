"""Waiting lines: closed forms against enumeration and simulation, the perfect denoiser, and who counts the calls."""

import functools
import itertools
import math

import numpy as np
import pytest

from slmjax.data import waiting_line
from slmjax.data.waiting_line import TASKS, Line
from slmjax.decoding import Decoded, loop, ordered, parallel_bench, threshold

RANDOM = tuple(task for task in TASKS if task.endswith("_random") or task == "shuffle")


def responses(line: Line) -> np.ndarray:
    """[P, R]: every valid response to one prompt, found by trying all rows of tokens."""
    prompt_T = one_row(line)[: line.prompt_len]
    tried = itertools.product(range(2 * line.num_items), repeat=line.response_len)
    rows_NT = np.array([(*prompt_T, *response) for response in tried])
    return rows_NT[waiting_line.is_valid(line, rows_NT)][:, line.prompt_len :]


def one_row(line: Line) -> np.ndarray:
    return rows(line, 1)[0]


def rows(line: Line, num: int) -> np.ndarray:
    spec = f"line:{line.task}:{line.num_items}:7"
    return waiting_line.sampler(spec, "train", line.row_len + 1)(np.arange(num))[:, 1:]


def hidden(line: Line, rows_NT: np.ndarray) -> np.ndarray:
    hidden_NT = rows_NT.copy()
    hidden_NT[:, line.prompt_len :] = line.vocab_size
    return hidden_NT


# -------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("num_items", [2, 3, 4])
@pytest.mark.parametrize("task", TASKS)
def test_total_correlation_is_that_of_the_enumerated_responses(task, num_items):
    line = Line(task, num_items)
    valid_PR = responses(line)
    assert len(valid_PR) == line.num_responses
    marginals_RV = (valid_PR[:, :, None] == np.arange(line.vocab_size)).mean(0)
    entropies = -(marginals_RV * np.log2(np.where(marginals_RV > 0, marginals_RV, 1))).sum()
    assert parallel_bench.total_correlation(line) == pytest.approx(entropies - math.log2(len(valid_PR)), abs=1e-12)


def test_total_correlations_are_the_published_ones():
    def bits(task, num_items):
        return parallel_bench.total_correlation(Line(task, num_items))

    assert [round(bits("replace_random", n), 3) for n in (3, 6)] == [1.170, 1.315]
    assert bits("replace_random", 10**4) == pytest.approx(math.log2(math.e), abs=1e-3)
    assert [round(bits("shuffle", n), 3) for n in (3, 4, 6)] == [2.170, 3.415, 6.018]
    assert {task for task in TASKS if bits(task, 5) == 0} == set(TASKS) - set(RANDOM)


def test_ideal_accuracies_are_the_published_ones():
    def ideal(task, num_items, *per_call):
        return [parallel_bench.ideal_accuracy(Line(task, num_items), k) for k in per_call]

    assert ideal("shuffle", 4, 1, 2, 4) == pytest.approx([1, 0.375, 0.09375])
    assert ideal("shuffle", 6, 2, 3, 6) == pytest.approx([0.3125, 0.1235, 0.0154], abs=5e-5)
    assert ideal("replace_random", 4, 4, 2) == pytest.approx([0.421875, 0.65625])
    assert ideal("replace_random", 6, 6, 2) == pytest.approx([0.4019, 0.7335], abs=5e-5)
    assert ideal("sort", 6, 1, 6) == [1, 1] and ideal("insert_random", 4, 1) == [1]
    with pytest.raises(ValueError, match="no closed form of insert_random at 2"):
        ideal("insert_random", 4, 2)


@pytest.mark.parametrize(
    ("task", "num_items", "per_call"),
    [
        ("shuffle", 4, 2),
        ("shuffle", 6, 4),
        ("replace_random", 4, 4),
        ("replace_random", 6, 2),
        ("replace_random", 5, 3),
    ],
)
def test_draws_from_perfect_marginals_are_valid_as_often_as_the_closed_form_says(task, num_items, per_call, seed):
    line, num_rows = Line(task, num_items), 20000
    tokens_BT, rng = hidden(line, rows(line, num_rows)), np.random.default_rng(seed)
    rank_BR = rng.random((num_rows, line.response_len)).argsort(1)
    step_BT = np.pad(rank_BR // per_call, ((0, 0), (line.prompt_len, 0)))
    decoded = loop.by_plan(parallel_bench.perfect(line), tokens_BT, line.vocab_size, step_BT, rng)
    expected = parallel_bench.ideal_accuracy(line, per_call)
    found = waiting_line.is_valid(line, decoded.tokens_BT).mean()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / num_rows)


# ------------------------------------------------------------------------------------------- the perfect denoiser


@pytest.mark.parametrize("task", TASKS)
def test_the_perfect_denoiser_knows_the_law_of_every_token(task, seed):
    """Against the enumerated responses that agree with what is visible, for each of many partial responses."""
    line, rng = Line(task, 3), np.random.default_rng(seed)
    valid_PR = responses(line)
    shown_BR = valid_PR[rng.integers(len(valid_PR), size=40)]
    shown_BR = np.where(rng.random(shown_BR.shape) < 0.5, line.vocab_size, shown_BR)
    tokens_BT = np.concatenate([np.tile(one_row(line)[: line.prompt_len], (40, 1)), shown_BR], axis=1)
    probs_BTV = np.exp(parallel_bench.perfect(line)(tokens_BT))
    np.testing.assert_allclose(probs_BTV.sum(2), 1)
    for shown_R, probs_RV in zip(shown_BR, probs_BTV[:, line.prompt_len :], strict=True):
        masked_R = shown_R == line.vocab_size
        agree_PR = valid_PR[(masked_R | (valid_PR == shown_R)).all(1)]
        marginals_RV = (agree_PR[:, :, None] == np.arange(line.vocab_size)).mean(0)
        np.testing.assert_allclose(probs_RV[masked_R], marginals_RV[masked_R], atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_one_token_a_call_always_succeeds_and_all_at_once_only_where_nothing_is_random(task, seed):
    spec = f"line:{task}:4:3"
    line, _ = waiting_line.parse(spec)

    def accuracy(**options):
        decode = functools.partial(ordered.decode, order="random", temperature=1.0, seed=seed, **options)
        return parallel_bench.evaluate(
            parallel_bench.perfect(line), decode, spec, mask_id=line.vocab_size, num_rows=200
        ).accuracy

    assert accuracy(per_call=1) == 1
    assert (accuracy(num_steps=1) == 1) == (task not in RANDOM)


@pytest.mark.parametrize(("task", "edge"), [("shuffle", 1 / 2), ("replace_random", 3 / 4)])
def test_greedy_by_threshold_turns_from_never_to_always_valid_at_one_value(task, edge):
    spec = f"line:{task}:4:3"
    line, _ = waiting_line.parse(spec)
    for gamma, expected in ((edge - 0.01, 0), (edge + 0.01, 1)):
        decode = functools.partial(threshold.decode, threshold=gamma)
        score = parallel_bench.evaluate(
            parallel_bench.perfect(line), decode, spec, mask_id=line.vocab_size, num_rows=50
        )
        assert score.accuracy == expected and (score.calls == 4) == (expected == 1)


# ------------------------------------------------------------------------------------------------------ evaluation


def cheating(denoiser, tokens_BT, *, mask_id):
    """Says that it made one call, and decodes one token at a time."""
    decoded = ordered.static(denoiser, tokens_BT, mask_id=mask_id)
    return Decoded(decoded.tokens_BT, decoded.trace[:1], deterministic=True)


def test_calls_are_counted_and_not_believed():
    spec = "line:shuffle:4:0"
    line, _ = waiting_line.parse(spec)
    found = parallel_bench.evaluate(parallel_bench.perfect(line), cheating, spec, mask_id=line.vocab_size, num_rows=64)
    assert found.accuracy == 1 and found.calls == 4 and found.row_calls == 4 and found.num_rows == 64
    one = functools.partial(ordered.static, per_call=4)
    honest = parallel_bench.evaluate(parallel_bench.perfect(line), one, spec, mask_id=line.vocab_size, num_rows=64)
    assert honest.accuracy == 0 and honest.calls == 1 and honest.row_calls == 1
    assert 0 < honest.accuracy_se < 0.05 and honest.accuracy_se == pytest.approx(found.accuracy_se)


def test_rows_are_held_out_and_their_standard_error_is_the_binomial_one(seed):
    spec = "line:shuffle:4:0"
    line, _ = waiting_line.parse(spec)
    shown = []

    def perfect(tokens_BT):
        shown.append(np.array(tokens_BT))
        return parallel_bench.perfect(line)(tokens_BT)

    decode = functools.partial(ordered.decode, per_call=2, order="random", temperature=1.0, seed=seed)
    score = parallel_bench.evaluate(perfect, decode, spec, mask_id=line.vocab_size, num_rows=4000)
    assert abs(score.accuracy - 0.375) < 4 * score.accuracy_se
    assert score.accuracy_se == pytest.approx(math.sqrt(0.375 * 0.625 / 4000), rel=0.05)
    held_out = waiting_line.sampler(spec, "held_out", line.row_len + 1)(np.arange(4000))[:, 1:]
    assert np.array_equal(shown[0], hidden(line, held_out))


def test_a_decoder_that_changes_prompts_is_refused():
    def rewriting(denoiser, tokens_BT, *, mask_id):
        return Decoded(np.zeros_like(tokens_BT), (), deterministic=True)

    with pytest.raises(ValueError, match="changed a prompt"):
        parallel_bench.evaluate(parallel_bench.perfect(Line("copy", 3)), rewriting, "line:copy:3:0", mask_id=8)
