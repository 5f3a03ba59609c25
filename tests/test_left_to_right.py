"""Left to right with a memory: the model's own log-probabilities, each row as it would be alone, drawn as they say."""

import chains
import jax
import numpy as np
import pytest
import tiny

from slmjax.decoding import left_to_right
from slmjax.decoding.left_to_right import NextToken, decode
from slmjax.denoiser import PAD

V = MASK = 32
MODELS = {
    "dense": {},
    "window": {"model.attention_pattern": ("window", "global"), "model.window": 4},
    "experts": {"model.moe.num_experts": 4, "model.moe.gate": "sigmoid", "model.qk_norm": True},
}


@pytest.fixture(params=MODELS)
def built(request):
    return tiny.built(MODELS[request.param])


_next_tokens = {}


def next_token_of(built) -> NextToken:
    """One for each model, so that a shape is compiled once."""
    if id(built) not in _next_tokens:
        _next_tokens[id(built)] = NextToken(built.model, built.params)
    return _next_tokens[id(built)]


def log_probs(built, tokens_BT):
    return np.asarray(jax.nn.log_softmax(built.apply(built.params, tokens_BT), axis=-1), np.float64)


def rows(seed: int, ends: dict[int, int]) -> np.ndarray:
    """A row of random tokens for each (prompt length: row length), masks behind the prompt."""
    tokens_BT = np.full((len(ends), max(ends.values())), PAD, np.int32)
    for row_T, (prompt, end) in zip(tokens_BT, ends.items(), strict=True):
        row_T[:prompt], row_T[prompt:end] = tiny.random_tokens(seed + prompt, prompt), MASK
    return tokens_BT


UNEQUAL = {3: 9, 7: 12, 5: 12, 1: 3}


def test_log_probs_are_those_of_the_whole_row(built, seed):
    B, T = 3, 12
    tokens_BT, lengths_B = tiny.random_tokens(seed, B, T), np.array([5, 2, 9])
    want_BTV = log_probs(built, tokens_BT)
    next_token = next_token_of(built)
    next_token.restart(B, T)
    positions_Bt = np.where(np.arange(9)[None] < lengths_B[:, None], np.arange(9)[None], T)
    got_BV = next_token(tokens_BT[:, :9], positions_Bt)
    for step in range(4):  # the longest row ends first, and is given nothing from then on
        place_B = lengths_B - 1 + step
        there_B = place_B < T
        np.testing.assert_allclose(
            got_BV[there_B], want_BTV[np.arange(B), np.minimum(place_B, T - 1)][there_B], atol=2e-5
        )
        next_B1 = np.minimum(lengths_B + step, T)[:, None]
        got_BV = next_token(np.take_along_axis(tokens_BT, np.minimum(next_B1, T - 1), axis=1), next_B1)
    assert next_token.num_calls == 5 and next_token.num_positions == 16 + 3 + 3 + 3 + 2


def test_greedy_decoding_takes_the_best_token_of_all_that_came_before(built, seed):
    tokens_BT = rows(seed, UNEQUAL)
    decoded = decode(next_token_of(built), tokens_BT, mask_id=MASK, temperature=0)
    assert decoded.deterministic
    given_BT = tokens_BT != MASK
    assert np.array_equal(decoded.tokens_BT[given_BT], tokens_BT[given_BT]) and not (decoded.tokens_BT == MASK).any()
    log_probs_BTV = log_probs(built, np.maximum(decoded.tokens_BT, 0))  # PAD comes last and is seen by nobody
    for reveal in decoded.trace:
        at = reveal.rows_N, reveal.positions_N - 1
        assert np.array_equal(reveal.values_N, decoded.tokens_BT[reveal.rows_N, reveal.positions_N])
        np.testing.assert_allclose(reveal.log_confidence_N, log_probs_BTV[at].max(1), atol=2e-5)
        np.testing.assert_allclose(
            log_probs_BTV[at][np.arange(len(at[0])), reveal.values_N], log_probs_BTV[at].max(1), atol=2e-5
        )
    filled = [(int(row), int(t)) for reveal in decoded.trace for row, t in zip(*reveal[1:3], strict=True)]
    assert sorted(filled) == sorted(zip(*(a.tolist() for a in np.nonzero(tokens_BT == MASK)), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_comes_out_as_it_would_alone(temperature, seed):
    built, tokens_BT = tiny.built(), rows(seed, UNEQUAL)
    next_token = next_token_of(built)
    together = decode(next_token, tokens_BT, mask_id=MASK, temperature=temperature, seed=seed)
    for row in range(len(tokens_BT)) if temperature == 0 else [0]:  # draws go by the row's place
        alone = decode(next_token, tokens_BT[row : row + 1], mask_id=MASK, temperature=temperature, seed=seed)
        assert np.array_equal(alone.tokens_BT[0], together.tokens_BT[row])
        sure, alone_sure = (
            np.concatenate([r.log_confidence_N[r.rows_N == b] for r in d.trace])
            for d, b in ((together, row), (alone, 0))
        )
        np.testing.assert_allclose(sure, alone_sure, atol=2e-5)
    others_BT = np.concatenate([tokens_BT[:2], rows(seed + 100, {2: 12, 8: 10})])
    again = decode(next_token, others_BT, mask_id=MASK, temperature=temperature, seed=seed)
    assert np.array_equal(again.tokens_BT[:2], together.tokens_BT[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_models_distribution(temperature, seed):
    built, num = tiny.built(), 4000
    prompt_T = tiny.random_tokens(seed, 4)
    tokens_BT = np.tile([*prompt_T, MASK, MASK], (num, 1))
    decoded = decode(next_token_of(built), tokens_BT, mask_id=MASK, temperature=temperature, seed=seed)
    assert not decoded.deterministic
    first_V = np.exp(log_probs(built, prompt_T[None])[0, -1] / temperature)
    assert chains.p_value(np.bincount(decoded.tokens_BT[:, 4], minlength=V), first_V) > 1e-4
    common = np.bincount(decoded.tokens_BT[:, 4]).argmax()
    second_V = np.exp(log_probs(built, np.array([[*prompt_T, common]]))[0, -1] / temperature)
    followed_N = decoded.tokens_BT[decoded.tokens_BT[:, 4] == common, 5]
    assert chains.p_value(np.bincount(followed_N, minlength=V), second_V) > 1e-4
    assert chains.p_value(np.bincount(decoded.tokens_BT[:, 4], minlength=V), np.ones(V)) < 1e-4, "a flat model"


def test_every_position_is_computed_once_and_the_last_never(seed):
    built = tiny.built()
    next_token = next_token_of(built)
    decode(next_token, rows(seed, UNEQUAL), mask_id=MASK)
    assert next_token.num_calls == 7
    assert next_token.num_positions == sum(end - 1 for end in UNEQUAL.values())
    decode(next_token, rows(seed, {2: 4}), mask_id=MASK)
    assert (next_token.num_calls, next_token.num_positions) == (2, 3)


def test_a_row_ends_at_its_end_token_and_costs_nothing_more(seed):
    built = tiny.built()
    next_token, tokens_BT = next_token_of(built), rows(seed, {3: 12, 4: 12, 5: 12})
    free = decode(next_token, tokens_BT, mask_id=MASK, seed=seed)
    end_id = int(free.tokens_BT[1, 6])
    ended = decode(next_token, tokens_BT, mask_id=MASK, seed=seed, end_id=end_id)
    positions = 0
    for free_T, ended_T, tokens_T in zip(free.tokens_BT, ended.tokens_BT, tokens_BT, strict=True):
        prompt = int((tokens_T != MASK).sum())
        ends = np.flatnonzero(free_T[prompt:] == end_id)
        last = prompt + ends[0] if len(ends) else 11
        assert np.array_equal(ended_T[: last + 1], free_T[: last + 1]) and (ended_T[last + 1 :] == end_id).all()
        positions += last
    assert next_token.num_positions == positions < 3 * 11
    revealed = {(int(row), int(t)) for reveal in ended.trace for row, t in zip(*reveal[1:3], strict=True)}
    assert len(revealed) == positions + 3 - 3 - 4 - 5


@pytest.mark.parametrize(
    "tokens, settings, said",
    [
        ([[MASK, MASK]], {}, "row 0 begins with a mask.*prompt of one token"),
        ([[1, MASK, PAD], [1, MASK, 2]], {}, "row 1 has a token after a mask"),
        ([[1, 2]], {}, "nothing to fill"),
        ([[1, MASK]], {"temperature": -1}, "temperature=-1 is below 0"),
    ],
)
def test_what_cannot_be_is_refused(tokens, settings, said):
    built = tiny.built()
    with pytest.raises(ValueError, match=said):
        decode(next_token_of(built), np.array(tokens), mask_id=MASK, **settings)


def test_a_family_without_a_memory_is_refused():
    with pytest.raises(ValueError, match="no extend"):
        left_to_right.NextToken(tiny.built().model._replace(extend=None), {})
