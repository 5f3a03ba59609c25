"""Prophet: static decoding at one end of its thresholds, one call at the other, and each row's own stop between."""

import numpy as np
import pytest
from random_denoisers import DIGITS, MASK, CallsPerRow, T, V, many, rows_of

from slmjax.decoding import ordered, prophet

NUM = 100


@pytest.mark.parametrize("per_call, block", [(1, 0), (2, 8)])
def test_thresholds_out_of_reach_are_static_and_below_all_one_call(seed, per_call, block):
    denoiser, tokens_BT = many(seed, NUM)
    settings = {"mask_id": MASK, "per_call": per_call, "block": block}
    expected = ordered.static(denoiser, tokens_BT, **settings)
    never, at_once = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    found = prophet.decode(never, tokens_BT, thresholds=(np.inf,) * 3, **settings)
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    assert never.num_calls == len(expected.trace) == T // per_call
    found = prophet.decode(at_once, tokens_BT, thresholds=(-np.inf,) * 3, **settings)
    assert at_once.num_calls == 1
    best_BT = np.argmax(denoiser(tokens_BT).astype(np.float32), axis=2)
    np.testing.assert_array_equal(found.tokens_BT, np.where(tokens_BT == MASK, best_BT, tokens_BT))


def test_rows_stop_each_at_its_own_time_as_they_would_alone(seed):
    denoiser, tokens_BT = many(seed, 16, sharpness=(2.0, 4.0))
    batch = CallsPerRow(denoiser, 16)
    found = prophet.decode(batch, tokens_BT, mask_id=MASK)
    assert len(set(batch.calls_B)) > 2
    for b in range(16):
        alone = CallsPerRow(denoiser, 16)
        row = prophet.decode(alone, tokens_BT[b : b + 1], mask_id=MASK)
        np.testing.assert_array_equal(row.tokens_BT[0], found.tokens_BT[b])
        assert alone.num_calls == batch.calls_B[b]


def with_gaps(gap_BT):
    """Rows of `many` whose best logit is that far above all others, everywhere and always."""

    def denoiser(tokens_BT):
        logits_BTV = np.zeros((*np.shape(tokens_BT), V))
        logits_BTV[..., 3] = gap_BT[rows_of(tokens_BT)]
        return logits_BTV - np.log(np.exp(logits_BTV).sum(2, keepdims=True))

    return denoiser


def test_each_third_of_the_progress_has_its_threshold():
    _, tokens_BT = many(0, 5)
    gap_BT = np.repeat([[8.0], [6.0], [3.0], [2.0], [5.01]], DIGITS + T, axis=1)
    counted = CallsPerRow(with_gaps(gap_BT), 5)
    prophet.decode(counted, tokens_BT, mask_id=MASK)
    assert counted.calls_B.tolist() == [1, T // 3 + 1, 2 * T // 3 + 1, T, T // 3 + 1]
    counted = CallsPerRow(with_gaps(gap_BT), 5)
    prophet.decode(counted, tokens_BT, mask_id=MASK, thresholds=(6.5, 2.5))
    assert counted.calls_B.tolist() == [1, T // 2 + 1, T // 2 + 1, T, T // 2 + 1]


def test_only_the_answer_is_asked():
    _, tokens_BT = many(0, 2)
    answer_BT = np.zeros(tokens_BT.shape, bool)
    answer_BT[:, -4:] = True
    gap_BT = np.where(answer_BT, [[9.0], [0.1]], [[0.1], [9.0]])  # sure of the answer; sure of all but the answer
    counted = CallsPerRow(with_gaps(gap_BT), 2)
    prophet.decode(counted, tokens_BT, mask_id=MASK, answer_BT=answer_BT)
    assert counted.calls_B.tolist() == [1, T]
    counted = CallsPerRow(with_gaps(gap_BT), 2)
    prophet.decode(counted, tokens_BT, mask_id=MASK)
    assert counted.calls_B[0] > 1


def test_infinite_gaps_weigh_nothing_and_reach_no_infinite_threshold():
    gap_BT = np.array([[4.0, 2.0, 9.0], [4.0, np.inf, 9.0], [np.inf, np.inf, 9.0], [1.0, 1.0, 9.0]])
    asked_BT = np.array([[True, True, False]] * 3 + [[False] * 3])
    np.testing.assert_array_equal(prophet.gap(gap_BT, asked_BT), [3.0, 4.0, np.inf, np.nan])
    certain_V = np.where(np.arange(V) == 3, 0.0, -np.inf)
    for thresholds, calls in (((7.5,), 1), ((np.inf,), T)):
        counted = CallsPerRow(lambda tokens_BT: np.broadcast_to(certain_V, (*tokens_BT.shape, V)), 1)
        prophet.decode(counted, many(0, 1)[1], mask_id=MASK, thresholds=thresholds)
        assert counted.num_calls == calls


def test_settings_that_cannot_be_are_refused():
    denoiser, tokens_BT = many(0, 2)
    for wrong in ({"per_call": 0}, {"block": -1}, {"thresholds": ()}):
        with pytest.raises(ValueError, match="give one threshold or more"):
            prophet.decode(denoiser, tokens_BT, mask_id=MASK, **wrong)
    with pytest.raises(ValueError, match="must be equal"):
        prophet.decode(denoiser, tokens_BT, mask_id=MASK, answer_BT=np.ones((1, T), bool))
