"""LocalLeap: threshold decoding where its neighbourhood is switched off, the rule itself on confidences set by hand."""

import numpy as np
import pytest
from random_denoisers import MASK, CallsPerRow, T, V, many

from slmjax.decoding import local_leap, ordered, threshold

NUM = 100


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("off", [{"radius": 0}, {"relaxed": 0.9}])
def test_without_a_neighbourhood_it_is_threshold_decoding(seed, off, block):
    denoiser, tokens_BT = many(seed, NUM)
    leaping, plain = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    found = local_leap.decode(leaping, tokens_BT, mask_id=MASK, block=block, **off)
    expected = threshold.decode(plain, tokens_BT, mask_id=MASK, threshold=0.9, block=block)
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_array_equal(leaping.calls_B, plain.calls_B)


def test_with_one_it_saves_calls_and_strays_further_from_static(seed):
    denoiser, tokens_BT = many(seed, NUM, sharpness=(2.0,))
    leaping, plain = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    static_BT = ordered.static(denoiser, tokens_BT, mask_id=MASK).tokens_BT
    found = local_leap.decode(leaping, tokens_BT, mask_id=MASK)
    expected = threshold.decode(plain, tokens_BT, mask_id=MASK)
    assert leaping.calls_B.mean() < 0.9 * plain.calls_B.mean()
    assert (found.tokens_BT == static_BT).mean() < (expected.tokens_BT == static_BT).mean()


def with_confidences(confidence_T):
    """A denoiser of one row whose best token is 3 everywhere, with these probabilities."""
    confidence_T = np.asarray(confidence_T, float)
    rest_T = (1 - confidence_T) / (V - 1)
    log_probs_TV = np.log(np.where(np.arange(V) == 3, confidence_T[:, None], rest_T[:, None]))
    return lambda tokens_BT: np.stack([log_probs_TV] * len(tokens_BT))


def first(confidence_T, **settings) -> list[int]:
    """The positions that the first call reveals."""
    masks_1T = np.full((1, len(confidence_T)), MASK)
    reveal = local_leap.decode(with_confidences(confidence_T), masks_1T, mask_id=MASK, **settings).trace[0]
    return reveal.positions_N.tolist()


def test_an_anchor_vouches_for_its_neighbours_in_the_block():
    confidence_T = np.full(T, 0.8)
    confidence_T[10] = 0.95
    assert first(confidence_T) == list(range(6, 15))
    assert first(confidence_T, radius=1) == [9, 10, 11]
    assert first(confidence_T, block=12) == list(range(6, 12))
    assert first(confidence_T, block=8) == [0]  # the anchor is in the second block, so the first has none
    confidence_T[12] = 0.7
    assert first(confidence_T) == [6, 7, 8, 9, 10, 11, 13, 14]
    confidence_T[10] = 0.85  # no anchor: the surest alone
    assert first(confidence_T) == [10]


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"relaxed": 0.95}, {"radius": -1}, {"block": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            first([0.5], **wrong)
