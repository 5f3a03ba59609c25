"""Classifier-free guidance: its formula, its corners, and what it costs."""

import functools

import chains
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.decoding import first_hitting, guidance, ordered
from slmjax.denoiser import PAD, Counted

V = MASK = 5
TOKENS_BT = np.array([[0, 1, MASK, MASK, 2], [3, MASK, MASK, 4, PAD]])
PROMPT_BT = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]], bool)  # the last is PAD: no prompt, whatever is said of it
HIDDEN_BT = np.array([[MASK, MASK, MASK, MASK, 2], [MASK, MASK, MASK, 4, PAD]])


def two_tables(seed: int):
    """(denoiser, conditional_BTV, unconditional_BTV): random logits with the prompt visible, others with it masked."""
    tables_NBTV = np.log(np.random.default_rng(seed).dirichlet(np.ones(V), (2, *TOKENS_BT.shape)))

    def denoiser(tokens_BT):
        if (tokens_BT == TOKENS_BT).all():
            return tables_NBTV[0]
        assert (tokens_BT == HIDDEN_BT).all(), "without the prompt, all else is as it was"
        return tables_NBTV[1]

    return denoiser, *tables_NBTV


def test_scale_zero_is_the_denoiser_itself(seed):
    denoiser, conditional_BTV, _ = two_tables(seed)
    counted = Counted(denoiser)
    assert (guidance.guided(counted, PROMPT_BT, 0.0, MASK)(TOKENS_BT) == conditional_BTV).all()
    assert counted.num_calls == 1


@pytest.mark.parametrize("scale", [-0.5, 0.6, 1.0, 1.6, 30.0])
def test_probabilities_are_those_of_the_formula(scale, seed):
    denoiser, conditional_BTV, unconditional_BTV = two_tables(seed)
    powers_BTV = np.exp(conditional_BTV) ** (1 + scale) / np.exp(unconditional_BTV) ** scale
    expected_BTV = powers_BTV / powers_BTV.sum(-1, keepdims=True)
    counted = Counted(denoiser)
    log_probs_BTV = guidance.guided(counted, PROMPT_BT, scale, MASK)(TOKENS_BT)
    assert log_probs_BTV.dtype == np.float64 and counted.num_calls == 2
    np.testing.assert_allclose(np.exp(log_probs_BTV), expected_BTV, rtol=1e-9, atol=1e-12)
    on_device = guidance.guided(lambda t: jnp.asarray(denoiser(t), jnp.float32), PROMPT_BT, scale, MASK)(TOKENS_BT)
    np.testing.assert_allclose(np.exp(on_device), expected_BTV, atol=1e-4)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 1.5, 10.0])
def test_a_prompt_that_says_nothing_changes_nothing(scale, seed):
    """The same tables for both: the guided denoiser is the plain one at any scale."""
    _, conditional_BTV, _ = two_tables(seed)
    log_probs_BTV = guidance.guided(lambda _: conditional_BTV, PROMPT_BT, scale, MASK)(TOKENS_BT)
    np.testing.assert_allclose(log_probs_BTV, conditional_BTV, atol=1e-12)


def test_scale_minus_one_forgets_the_prompt_and_its_neighbourhood_is_continuous(seed):
    denoiser, _, unconditional_BTV = two_tables(seed)
    counted = Counted(denoiser)
    np.testing.assert_allclose(guidance.guided(counted, PROMPT_BT, -1.0, MASK)(TOKENS_BT), unconditional_BTV)
    assert counted.num_calls == 1
    near_BTV = guidance.guided(denoiser, PROMPT_BT, -1.0 + 1e-9, MASK)(TOKENS_BT)
    np.testing.assert_allclose(near_BTV, unconditional_BTV, atol=1e-6)


def test_what_is_impossible_stays_impossible():
    """Where both distributions have a zero, the formula alone gives no number."""
    with np.errstate(divide="ignore"):
        conditional_BTV, unconditional_BTV = np.log([[[0.5, 0.5, 0.0, 0.0]]]), np.log([[[0.25, 0.5, 0.25, 0.0]]])
    tokens_BT, prompt_BT = np.array([[4]]), np.array([[False]])
    outputs = iter([conditional_BTV, unconditional_BTV])
    log_probs_BTV = guidance.guided(lambda _: next(outputs), prompt_BT, 1.0, 4)(tokens_BT)
    np.testing.assert_allclose(np.exp(log_probs_BTV), [[[2 / 3, 1 / 3, 0, 0]]])


def test_guidance_makes_the_decoded_text_follow_its_prompt_more(seed):
    """On a chain: the mean log-ratio of what follows the prompt, with it against without, rises with the scale."""
    tokens_BT = np.tile([[2, 3, 3]], (4000, 1))
    prompt_BT = tokens_BT == 2
    plain = chains.posterior(chains.T6)
    prior_V = np.exp(plain(np.array([[3, 3, 3]]))[0, 1])
    ratio_V = np.log(chains.T6.rows_VV[2]) - np.log(prior_V)

    def follows(scale):
        denoiser = guidance.guided(plain, prompt_BT, scale, 3)
        return ratio_V[first_hitting.sample(denoiser, tokens_BT, mask_id=3, seed=seed).tokens_BT[:, 1]].mean()

    ratios = [follows(scale) for scale in (-1.0, 0.0, 1.0, 3.0)]
    assert (np.diff(ratios) > 0.02).all()


def test_one_prompt_serves_all_rows_and_other_shapes_are_refused():
    tokens_BT, prompt_BT = np.array([[0, 1, 3, 3]] * 3), np.array([[True, True, False, False]])
    one, three = (guidance.guided(chains.posterior(chains.T6), p, 0.8, 3) for p in (prompt_BT, prompt_BT.repeat(3, 0)))
    assert (one(tokens_BT) == three(tokens_BT)).all()
    decode = functools.partial(ordered.static, tokens_BT=tokens_BT, mask_id=3)
    assert (decode(one).tokens_BT == decode(three).tokens_BT).all()
    with pytest.raises(ValueError, match=r"prompt has shape \(3, 4\), the tokens \(2, 4\).*\(1, 4\)"):
        three(tokens_BT[:2])
    with pytest.raises(ValueError, match=r"scale=-1\.5 is below -1"):
        guidance.guided(chains.posterior(chains.T6), prompt_BT, -1.5, 3)
