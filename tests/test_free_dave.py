"""FreeDave decodes what static decoding does, in fewer calls and never in more, on hundreds of random denoisers."""

import numpy as np
import pytest
from random_denoisers import DIGITS, MASK, CallsPerRow, T, many, uneven

from slmjax.decoding import free_dave, ordered

NUM = 200


def replay(decoded, tokens_BT) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, log-confidences) as the trace has them; each position is filled once."""
    tokens_BT, log_confidence_BT = tokens_BT.copy(), np.zeros(tokens_BT.shape)
    for reveal in decoded.trace:
        assert (tokens_BT[reveal.rows_N, reveal.positions_N] == MASK).all()
        tokens_BT[reveal.rows_N, reveal.positions_N] = reveal.values_N
        log_confidence_BT[reveal.rows_N, reveal.positions_N] = reveal.log_confidence_N
    return tokens_BT, log_confidence_BT


@pytest.mark.parametrize("per_call, block, num", [(1, 0, NUM), (2, 0, NUM), (1, 8, 60), (3, 8, 60)])
def test_tokens_are_static_and_calls_never_more(seed, per_call, block, num):
    denoiser, tokens_BT = many(seed, num)
    static = CallsPerRow(denoiser, num)
    expected = ordered.static(static, tokens_BT, mask_id=MASK, per_call=per_call, block=block)
    calls = {}
    for depth in (1, 2, 4, 8):
        drafted = CallsPerRow(denoiser, num)
        found = free_dave.decode(drafted, tokens_BT, mask_id=MASK, depth=depth, per_call=per_call, block=block)
        np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
        assert (drafted.calls_B <= static.calls_B).all() and drafted.num_calls <= static.num_calls
        assert drafted.shapes <= {(num, DIGITS + T), (num * depth, DIGITS + T)}
        calls[depth] = drafted.calls_B
    np.testing.assert_array_equal(calls[1], static.calls_B)
    assert calls[2].mean() < static.calls_B.mean()
    if per_call == 1:
        assert calls[4].mean() < calls[2].mean() and calls[4].mean() <= 0.8 * static.calls_B.mean()


def test_drafts_stop_at_the_edge_of_the_block(seed):
    denoiser, tokens_BT = many(seed, 60)

    def watching(tokens_NT):
        masked_NKP = (tokens_NT[:, DIGITS:] == MASK).reshape(len(tokens_NT), -1, 8)
        started_NK, finished_NK = ~masked_NKP.all(2), ~masked_NKP.any(2)
        assert (finished_NK[:, :-1] | ~started_NK[:, 1:]).all(), "a block was begun before the one before was filled"
        return denoiser(tokens_NT)

    free_dave.decode(watching, tokens_BT, mask_id=MASK, depth=4, block=8)


def test_rows_of_unequal_prompts_and_lengths(seed):
    denoiser, tokens_BT = many(seed, 60)
    tokens_BT = uneven(tokens_BT, seed)
    static, drafted = CallsPerRow(denoiser, 60), CallsPerRow(denoiser, 60)
    settings = {"mask_id": MASK, "per_call": 2, "block": 5}
    expected = ordered.static(static, tokens_BT, **settings)
    found = free_dave.decode(drafted, tokens_BT, **settings)
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_array_equal(found.tokens_BT[tokens_BT != MASK], tokens_BT[tokens_BT != MASK])
    assert (drafted.calls_B <= static.calls_B).all() and drafted.calls_B.sum() < static.calls_B.sum()


def test_a_row_decodes_alone_as_in_a_batch(seed):
    denoiser, tokens_BT = many(seed, 12)
    batch = CallsPerRow(denoiser, 12)
    found = free_dave.decode(batch, tokens_BT, mask_id=MASK)
    for b in range(12):
        alone = CallsPerRow(denoiser, 12)
        row = free_dave.decode(alone, tokens_BT[b : b + 1], mask_id=MASK)
        np.testing.assert_array_equal(row.tokens_BT[0], found.tokens_BT[b])
        assert alone.num_calls == batch.calls_B[b]


def test_the_trace_has_every_position_once_with_the_confidence_of_static(seed):
    denoiser, tokens_BT = many(seed, NUM)
    expected = replay(ordered.static(denoiser, tokens_BT, mask_id=MASK), tokens_BT)
    counted = CallsPerRow(denoiser, NUM)
    found = free_dave.decode(counted, tokens_BT, mask_id=MASK)
    for one, other in zip(replay(found, tokens_BT), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(replay(found, tokens_BT)[0], found.tokens_BT)
    assert [reveal.call for reveal in found.trace] == list(range(counted.num_calls))


def test_a_verifier_that_accepts_every_draft_is_caught(seed, monkeypatch):
    """The negative control: it is static decoding of `depth` positions a call, which the first test tells apart."""
    denoiser, tokens_BT = many(seed, NUM)
    static, faster = (ordered.static(denoiser, tokens_BT, mask_id=MASK, per_call=k).tokens_BT for k in (1, 4))
    monkeypatch.setattr(free_dave, "accepted", lambda _, drafts_BJT: np.full(NUM, drafts_BJT.shape[1] - 1))
    found = free_dave.decode(denoiser, tokens_BT, mask_id=MASK, depth=4).tokens_BT
    np.testing.assert_array_equal(found, faster)
    assert (found != static).any(1).mean() > 0.9


def test_settings_that_cannot_be_are_refused():
    denoiser, tokens_BT = many(0, 1)
    for wrong in ({"depth": 0}, {"per_call": 0}, {"block": -1}):
        with pytest.raises(ValueError, match="begin at 1"):
            free_dave.decode(denoiser, tokens_BT, mask_id=MASK, **wrong)
