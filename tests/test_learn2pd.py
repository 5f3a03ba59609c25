"""Learn2PD: the oracle, the filter trained on it, decoding with it; and stopping at an end token."""

import jax
import numpy as np
import pytest
from random_denoisers import DIGITS, MASK, CallsPerRow, T, many, planted, uneven, with_end
from scipy.stats import rankdata

from slmjax.decoding import end_of_text, free_dave, learn2pd, ordered, threshold
from slmjax.denoiser import PAD, Counted

NUM, BLOCK, END = 200, 8, 0


def area_under_curve(score_N, correct_N) -> float:
    """The probability that a correct one scores above a wrong one."""
    num_correct = correct_N.sum()
    assert 0 < num_correct < len(correct_N)
    ranks = rankdata(score_N)[correct_N].sum() - num_correct * (num_correct + 1) / 2
    return ranks / (num_correct * (len(correct_N) - num_correct))


def examples_of(seed):
    denoiser, tokens_BT = planted(seed, NUM)
    reference = ordered.static(denoiser, tokens_BT, mask_id=MASK, block=BLOCK)
    return learn2pd.oracle(denoiser, tokens_BT, reference.tokens_BT, mask_id=MASK, block=BLOCK)[1]


@pytest.mark.parametrize("block", [24, 8, 7])
def test_the_oracle_ends_at_the_reference_in_fewer_calls(seed, block):
    denoiser, tokens_BT = many(seed, NUM)
    static, asked = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    reference = ordered.static(static, tokens_BT, mask_id=MASK, block=block)
    found, examples = learn2pd.oracle(asked, tokens_BT, reference.tokens_BT, mask_id=MASK, block=block)
    np.testing.assert_array_equal(found.tokens_BT, reference.tokens_BT)
    assert (asked.calls_B <= static.calls_B).all() and asked.calls_B.mean() < 0.6 * static.calls_B.mean()
    assert len(examples) == asked.calls_B.sum()


def test_a_reference_that_is_never_guessed_is_reached_as_slowly_as_static(seed):
    denoiser, tokens_BT = many(seed, 8)
    worst_BT = np.where(tokens_BT == MASK, 0, tokens_BT)

    def never_0(tokens_BT):
        log_probs_BTV = denoiser(tokens_BT)
        log_probs_BTV[..., 0] = -50
        return log_probs_BTV

    found, examples = learn2pd.oracle(never_0, tokens_BT, worst_BT, mask_id=MASK, block=BLOCK)
    np.testing.assert_array_equal(found.tokens_BT, worst_BT)
    assert len(found.trace) == T and not np.stack([example.correct_P for example in examples]).any()
    assert all((reveal.log_confidence_N == -50).all() for reveal in found.trace)


def test_what_the_filter_sees():
    """A prompt of two, a visible token inside, blocks of four, and a last one of two with PAD behind."""
    tokens_BT = np.array([[5, 6, MASK, 7, MASK, MASK, MASK, MASK, PAD]])
    best_T = np.array([0, 0, 1, 0, 2, 3, 4, 5, 0])
    confidence_T = np.array([0.1, 0.1, 0.9, 0.1, 0.5, 0.6, 0.7, 0.8, 0.1])

    def denoiser(tokens_BT):
        log_probs_TV = np.log(np.repeat((1 - confidence_T)[:, None] / 11, 12, axis=1))
        log_probs_TV[np.arange(9), best_T] = np.log(confidence_T)
        return np.stack([log_probs_TV] * len(tokens_BT))

    reference_BT = np.array([[5, 6, 1, 7, 9, 3, 4, 5, PAD]])
    found, examples = learn2pd.oracle(denoiser, tokens_BT, reference_BT, mask_id=MASK, block=4)
    np.testing.assert_array_equal(found.tokens_BT, reference_BT)
    confidences, masked, correct = (np.stack(arrays) for arrays in zip(*examples, strict=True))
    np.testing.assert_allclose(confidences, [[0.9, 1, 0.5, 0.6], [1, 1, 0.5, 1], [0.7, 0.8, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(masked, [[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(correct, [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]])


def test_the_filter_has_2112_parameters_at_block_32():
    params = learn2pd.init_filter(jax.random.key(0), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2112


def test_a_trained_filter_ranks_held_out_guesses(seed):
    train, held_out = examples_of(seed), learn2pd.Example(*map(np.stack, zip(*examples_of(seed + 1), strict=True)))
    params = learn2pd.train_filter(train, BLOCK)

    logits_BP = np.asarray(learn2pd.filter_logits(params, held_out.confidence_P))
    assert area_under_curve(logits_BP[held_out.masked_P], held_out.correct_P[held_out.masked_P]) > 0.75

    denoiser, tokens_BT = planted(seed + 1, NUM)
    static, filtered = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    expected_BT = ordered.static(static, tokens_BT, mask_id=MASK, block=BLOCK).tokens_BT
    found_BT = learn2pd.decode(filtered, tokens_BT, mask_id=MASK, params=params).tokens_BT
    at_once_BT = learn2pd.decode(denoiser, tokens_BT, mask_id=MASK, params=params, threshold=-1).tokens_BT
    assert filtered.calls_B.mean() < 0.6 * static.calls_B.mean()
    wrong, wrong_at_once = (np.mean(tokens_BT != expected_BT) for tokens_BT in (found_BT, at_once_BT))
    assert wrong < 0.3 * wrong_at_once


def test_thresholds_out_of_reach_are_static_and_below_all_one_call_a_block(seed):
    denoiser, tokens_BT = many(seed, NUM)
    tokens_BT = uneven(tokens_BT, seed)
    params = learn2pd.init_filter(jax.random.key(seed), 5)
    never, at_once = CallsPerRow(denoiser, NUM), CallsPerRow(denoiser, NUM)
    found = learn2pd.decode(never, tokens_BT, mask_id=MASK, params=params, threshold=1)
    expected = ordered.static(denoiser, tokens_BT, mask_id=MASK, block=5)
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_array_equal(never.calls_B, (tokens_BT == MASK).sum(1))
    found = learn2pd.decode(at_once, tokens_BT, mask_id=MASK, params=params, threshold=-1)
    np.testing.assert_array_equal(found.tokens_BT[tokens_BT != MASK], tokens_BT[tokens_BT != MASK])
    num_blocks = [len({(p - at[0]) // 5 for p in at}) for at in map(np.flatnonzero, tokens_BT == MASK)]
    assert at_once.calls_B.tolist() == num_blocks


def test_examples_of_another_block_are_refused():
    with pytest.raises(ValueError, match=r"\[8\] positions, the filter is of 32"):
        learn2pd.train_filter(examples_of(0), 32)


class WorkPerRow:
    """Counts the positions of each row that a denoiser is shown, PAD left out."""

    def __init__(self, denoiser, num: int):
        self.denoiser, self.positions_B, self.num_calls = denoiser, np.zeros(num, int), 0

    def __call__(self, tokens_BT):
        self.num_calls += 1
        self.positions_B += (np.asarray(tokens_BT) != PAD).sum(1)
        return self.denoiser(tokens_BT)


def some_filter():
    """Of blocks of 8; it accepts about half."""
    return learn2pd.init_filter(jax.random.key(1), BLOCK)._replace(out_P=np.zeros(BLOCK, np.float32))


DECODERS = [
    pytest.param(ordered.static, {}, False, id="static"),
    pytest.param(ordered.static, {"block": 8}, False, id="blocks"),
    pytest.param(threshold.decode, {"threshold": 0.7}, False, id="threshold"),
    pytest.param(ordered.static, {"per_call": 2}, True, id="static-2"),
    pytest.param(learn2pd.decode, {"params": some_filter(), "threshold": 0.5}, True, id="learn2pd"),
]


@pytest.mark.parametrize("decoder, settings, sure", DECODERS)
def test_stopping_keeps_all_up_to_the_end_and_shows_less(seed, decoder, settings, sure):
    """`sure`: decoders that weigh a block's positions together need a denoiser that knows what follows an end."""
    denoiser, tokens_BT = many(seed, NUM)
    tokens_BT[::2, DIGITS] = END  # in the prompt: it ends nothing
    plain, stopped = (WorkPerRow(with_end(denoiser, END, bias=1, sure=sure), NUM) for _ in range(2))

    # The denoiser of the tests knows prompts by their length.
    def behind_prompt(work):
        def shown(tokens_BT):
            tokens_BT = np.array(tokens_BT)
            tokens_BT[::2, DIGITS] = END + 1
            return work(tokens_BT)

        return shown

    expected = decoder(behind_prompt(plain), tokens_BT, mask_id=MASK, **settings)
    found = end_of_text.stopping(decoder, END)(behind_prompt(stopped), tokens_BT, mask_id=MASK, **settings)
    behind_BT = end_of_text.behind(expected.tokens_BT, tokens_BT == MASK, END)
    np.testing.assert_array_equal(found.tokens_BT, np.where(behind_BT, END, expected.tokens_BT))
    assert 0.5 < behind_BT.any(1).mean() < 1

    # Less work, for every row that knew of its end when it was shown again.
    assert (stopped.positions_B <= plain.positions_B).all() and stopped.num_calls <= plain.num_calls
    end_B = np.where(behind_BT.any(1), behind_BT.argmax(1) - 1, -1)
    ended = {(b, p) for reveal in expected.trace[:-1] for b, p in zip(reveal.rows_N, reveal.positions_N, strict=True)}
    knew_B = np.array([(b, end_B[b]) in ended for b in range(NUM)])
    assert knew_B.mean() > 0.5 and (stopped.positions_B[knew_B] < plain.positions_B[knew_B]).all()

    # What the trace has is what was decided, up to the end.
    filled_BT = np.zeros(tokens_BT.shape, int)
    for reveal in found.trace:
        filled_BT[reveal.rows_N, reveal.positions_N] += 1
        values_N = found.tokens_BT[reveal.rows_N, reveal.positions_N]
        np.testing.assert_array_equal(reveal.values_N, values_N)
    np.testing.assert_array_equal(filled_BT, (tokens_BT == MASK) & ~behind_BT)


def test_columns_that_all_rows_dropped_are_cut_off(seed):
    denoiser, tokens_BT = many(seed, 12)
    denoiser, shown = with_end(denoiser, END, bias=1), []

    def watching(tokens_BT):
        shown.append(tokens_BT)
        return denoiser(tokens_BT)

    cut_off = 0
    for rows_BT in np.split(tokens_BT, 6):
        expected = end_of_text.stopping(ordered.static, END)(watching, rows_BT, mask_id=MASK)
        live = [int((calls_BT != PAD).sum(1).max()) for calls_BT in shown]
        shown.clear()
        found = end_of_text.stopping(ordered.static, END, multiple=4)(watching, rows_BT, mask_id=MASK)
        assert [calls_BT.shape[1] for calls_BT in shown] == [min(DIGITS + T, -(-n // 4) * 4) for n in live]
        np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
        cut_off += sum(DIGITS + T - calls_BT.shape[1] for calls_BT in shown)
        shown.clear()
    assert cut_off


def test_stopping_composes_with_drafts(seed):
    """FreeDave's drafts may hold an end token that does not stand; each is judged by what it holds itself."""
    denoiser, tokens_BT = many(seed, NUM)  # not deaf to what is behind an end, so that wrong ends would show
    tokens_BT = uneven(tokens_BT, seed)
    static, drafted = Counted(denoiser), Counted(denoiser)
    expected = end_of_text.stopping(ordered.static, END)(static, tokens_BT, mask_id=MASK)
    found = end_of_text.stopping(free_dave.decode, END)(drafted, tokens_BT, mask_id=MASK, depth=4)
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    assert drafted.num_calls < static.num_calls


@pytest.mark.parametrize("place", [5, 0])
def test_what_is_behind_an_end_is_neither_asked_nor_read(place):
    """A call for each mask up to the end token, however many lie behind; with drafts no more."""
    log_probs_TV = np.full((DIGITS + T, 12), -30.0)
    log_probs_TV[:, 3] = -1e-3 * (1 + np.arange(DIGITS + T))  # surest first from the left
    log_probs_TV[DIGITS + place, END] = -1e-9  # but the end first of all
    tokens_BT = many(0, 2)[1]

    def denoiser(tokens_BT):
        return np.where((tokens_BT == PAD)[..., None], np.nan, log_probs_TV)

    static, drafted = Counted(denoiser), Counted(denoiser)
    for counted, decoder in ((static, ordered.static), (drafted, free_dave.decode)):
        found = end_of_text.stopping(decoder, END)(counted, tokens_BT, mask_id=MASK)
        assert found.tokens_BT[:, DIGITS:].tolist() == [[3] * place + [END] * (T - place)] * 2
    assert static.num_calls == place + 1
    assert static.num_positions == 2 * (DIGITS + T + place * (DIGITS + place + 1))
    assert drafted.num_calls <= place + 1


def test_the_mask_cannot_end_a_row():
    denoiser, tokens_BT = many(0, 1)
    with pytest.raises(ValueError, match=f"end_id={MASK} is the mask_id"):
        end_of_text.stopping(ordered.static, MASK)(denoiser, tokens_BT, mask_id=MASK)
