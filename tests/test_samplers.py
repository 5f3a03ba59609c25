"""Samplers against distributions that are known exactly: first hitting samples them, ancestral sampling its own law."""

import functools
import itertools

import chains
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slmjax.decoding import ancestral, first_hitting, guess, loop, ordered
from slmjax.denoiser import PAD, Counted

SURE = 1e-6  # a right sampler's p-values stay above, of a hundred in all but one run of ten thousand


def fit(tokens_BT: np.ndarray, probs_N: np.ndarray, V: int) -> float:
    """p-value of the rows being draws from probs_N over all sequences."""
    return chains.p_value(np.bincount(chains.index(tokens_BT, V), minlength=len(probs_N)), probs_N)


def masks(B: int, T: int, mask_id: int) -> np.ndarray:
    return np.full((B, T), mask_id, np.int32)


def ancestral_law(chain: chains.Chain, L: int, times_N1: np.ndarray) -> np.ndarray:
    """Exact probabilities of all V^L results of ancestral sampling, by the law of all (V + 1)^L partly masked rows."""
    V = len(chain.start_V)
    states_SL = chains.all_sequences(V + 1, L)  # V is the mask
    S, masked_SL, probs_SLV = len(states_SL), states_SL == V, np.exp(chains.posterior(chain)(states_SL))
    law_S = np.zeros(S)
    law_S[chains.index(masks(1, L, V), V + 1)] = 1.0
    for t, s in itertools.pairwise(times_N1):
        reveal = (t - s) / t
        next_SLW = np.eye(V + 1)[states_SL]  # what a position of each state is next, a token or still the mask
        next_SLW[masked_SL] = np.concatenate([reveal * probs_SLV, np.full((S, L, 1), 1 - reveal)], 2)[masked_SL]
        move_SS = np.ones((S, S))
        for i in range(L):
            move_SS *= next_SLW[:, i, states_SL[:, i]]
        law_S = law_S @ move_SS
    return law_S[~masked_SL.any(1)]


def test_the_posterior_by_neighbours_is_the_posterior_by_enumeration(seed):
    rng = np.random.default_rng(seed)
    chain = chains.random_chain(seed, 3)
    tokens_BT = rng.integers(0, 4, (300, 5))
    tokens_BT[:50, 3:] = PAD
    hidden_BT = tokens_BT == 3
    near_BTV, far_BTV = chains.posterior(chain)(tokens_BT), chains.enumerated(chain, 5)(tokens_BT)
    np.testing.assert_allclose(near_BTV[hidden_BT], far_BTV[hidden_BT], atol=1e-12)
    log_prob_N = chains.log_prob(chain, chains.all_sequences(3, 5))
    np.testing.assert_allclose(np.exp(log_prob_N).sum(), 1.0)
    np.testing.assert_allclose(chains.entropy(chain, 5), -np.exp(log_prob_N) @ log_prob_N)


def test_t6_has_its_known_entropies():
    """Of six tokens, and of a masked token when l of the six are masked, averaged over which and what is visible."""
    sequences_NL = chains.all_sequences(3, 6)
    probs_N = np.exp(chains.log_prob(chains.T6, sequences_NL))
    known = (0.784763, 0.825403, 0.872298, 0.927225, 0.992841, 1.073649)
    np.testing.assert_allclose(chains.entropy(chains.T6, 6), 5.476179, atol=1e-6)
    denoiser, subsets_ML = chains.posterior(chains.T6), chains.all_sequences(2, 6).astype(bool)
    for num_masked, entropy in enumerate(known, 1):
        losses = []
        for masked_L in subsets_ML[subsets_ML.sum(1) == num_masked]:
            log_probs_NLV = denoiser(np.where(masked_L, 3, sequences_NL))
            ce_NL = -np.take_along_axis(log_probs_NLV, sequences_NL[..., None], 2)[..., 0]
            losses.append(probs_N @ ce_NL[:, masked_L].mean(1))
        np.testing.assert_allclose(np.mean(losses), entropy, atol=1e-6)


def test_first_hitting_samples_the_chain(seed):
    chain = chains.random_chain(seed, 3)
    decoded = first_hitting.sample(chains.posterior(chain), masks(40_000, 5, 3), mask_id=3, seed=seed)
    assert fit(decoded.tokens_BT, np.exp(chains.log_prob(chain, chains.all_sequences(3, 5))), 3) > SURE
    assert len(decoded.trace) == 5 and not decoded.deterministic
    for reveal in decoded.trace:
        assert (np.bincount(reveal.rows_N, minlength=40_000) == 1).all()
        assert chains.p_value(np.bincount(reveal.positions_N, minlength=5), np.ones(5)) > SURE


def test_first_hitting_samples_the_chain_behind_a_prompt(seed):
    """One of an unequal batch: rows 1 2 ? ? and ? ? ? ? 0, the other's PAD behind it."""
    chain = chains.random_chain(seed, 3)
    tokens_BT = np.tile([[1, 2, 3, 3, PAD], [3, 3, 3, 3, 0]], (10_000, 1))
    result_BT, trace, _ = first_hitting.sample(chains.posterior(chain), tokens_BT, mask_id=3, seed=seed)
    assert [np.bincount(reveal.rows_N % 2).tolist() for reveal in trace] == [[10_000] * 2] * 2 + [[0, 10_000]] * 2
    counts = np.bincount(trace[0].positions_N[trace[0].rows_N % 2 == 0], minlength=4)
    assert chains.p_value(counts, np.array([0, 0, 1, 1])) > SURE
    assert (result_BT[tokens_BT != 3] == tokens_BT[tokens_BT != 3]).all()
    for first, length in ((0, 4), (1, 5)):
        x_NT, given_T = chains.all_sequences(3, length), tokens_BT[first, :length]
        probs_N = np.exp(chains.log_prob(chain, x_NT)) * ((x_NT == given_T) | (given_T == 3)).all(1)
        assert fit(result_BT[first::2, :length], probs_N, 3) > SURE


def test_the_law_of_ancestral_sampling_nears_the_chain_as_the_steps_become_many():
    probs_N = np.exp(chains.log_prob(chains.T6, chains.all_sequences(3, 4)))
    variation, divergence = [], []
    for num_steps in (1, 2, 4, 8, 16, 32, 64):
        law_N = ancestral_law(chains.T6, 4, ancestral.times(num_steps))
        np.testing.assert_allclose(law_N.sum(), 1.0)
        variation.append(np.abs(law_N - probs_N).sum() / 2)
        divergence.append(probs_N @ np.log(probs_N / law_N))
    np.testing.assert_allclose(variation, (0.43223, 0.22215, 0.11300, 0.05711, 0.02870, 0.01439, 0.00720), atol=1e-5)
    np.testing.assert_allclose(divergence, (0.58452, 0.15186, 0.04242, 0.01167, 0.00311, 0.00081, 0.00021), atol=1e-5)


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 4, 8, 32])
def test_ancestral_samples_follow_the_law_of_their_steps(num_steps, grid, seed):
    """Of few steps they must not fit the chain itself: a sampler that ignores num_steps would."""
    for chain in (chains.T6, chains.random_chain(seed, 3)):
        tokens_BT = masks(40_000, 4, 3)
        result_BT = ancestral.sample(
            chains.posterior(chain), tokens_BT, mask_id=3, num_steps=num_steps, grid=grid, seed=seed
        ).tokens_BT
        law_N = ancestral_law(chain, 4, ancestral.times(num_steps, grid))
        assert fit(result_BT, law_N, 3) > SURE
        if chain is chains.T6 and num_steps <= 8:
            probs_N = np.exp(chains.log_prob(chain, chains.all_sequences(3, 4)))
            assert fit(result_BT, probs_N, 3) < 1e-10


def test_the_grids_are_their_formulas():
    u = np.linspace(1, 0, 9)
    np.testing.assert_allclose(ancestral.times(8), u)
    np.testing.assert_allclose(ancestral.times(8, "cosine"), np.cos(np.pi / 2 * (1 - u)), atol=1e-15)
    for grid in ("uniform", "cosine"):
        assert ancestral.times(37, grid)[0] == 1 and ancestral.times(37, grid)[-1] == 0
    with pytest.raises(ValueError, match=r"'linear'.*uniform or cosine"):
        ancestral.times(8, "linear")
    with pytest.raises(ValueError, match="num_steps=0"):
        ancestral.times(0)


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_a_step_reveals_its_binomial_share_of_what_is_masked(grid, seed):
    times_N1 = ancestral.times(6, grid)
    step_RM = ancestral.steps((20_000, 9), times_N1, np.random.default_rng(seed))
    left_R = np.full(20_000, 9)
    for step, (t, s) in enumerate(itertools.pairwise(times_N1)):
        count_R = (step_RM == step).sum(1)
        for num_left in range(1, 10):
            counts = count_R[left_R == num_left]
            if s == 0:
                assert (counts == num_left).all()
            elif len(counts) > 1000:
                binomial = stats.binom.pmf(np.arange(num_left + 1), num_left, (t - s) / t)
                assert chains.p_value(np.bincount(counts, minlength=num_left + 1), binomial) > SURE
        left_R = left_R - count_R
    assert (left_R == 0).all()


def test_hitting_times_are_the_order_statistics_of_uniforms(seed):
    rng, num = np.random.default_rng(seed), 7
    times_RM = np.stack([first_hitting.hitting_times(num, rng) for _ in range(4000)])
    assert (np.diff(times_RM) < 0).all()
    for i in range(num):  # the i-th largest of `num` uniforms
        assert stats.kstest(times_RM[:, i], stats.beta(num - i, i + 1).cdf).pvalue > SURE
    ratio_RM = times_RM[:, 1:] / times_RM[:, :-1]  # t falls by independent factors, not merely to these marginals
    assert stats.kstest(ratio_RM[:, 2], stats.beta(num - 3, 1).cdf).pvalue > SURE
    assert abs(stats.spearmanr(ratio_RM[:, 0], ratio_RM[:, 3]).statistic) < 0.07


def test_many_steps_and_tokens_do_not_stall(seed):
    """A step of 4096 reveals 16 of 65,536 positions at any vocabulary; one categorical over V + 1 in float32 none.

    At V = 16,384 flat log-probabilities the chance of an unmasking into a given token is e^-18.
    """
    V, M, N = 16_384, 65_536, 4096
    flat_BTV = np.broadcast_to(np.float32(-np.log(V)), (1, M, V))
    left = []

    def stub(tokens_BT):
        left.append((tokens_BT == V).sum())
        if len(left) == 40:
            raise StopIteration
        return flat_BTV

    with pytest.raises(StopIteration):
        ancestral.sample(stub, masks(1, M, V), mask_id=V, num_steps=N, seed=seed)
    revealed = -np.diff(left)
    mean, sigma = M / N, np.sqrt(M / N / len(revealed))
    assert abs(revealed.mean() - mean) < 5 * sigma
    step_M = ancestral.steps((M,), ancestral.times(N), np.random.default_rng(seed))
    assert chains.p_value(np.bincount(step_M, minlength=N), np.ones(N)) > SURE


def test_draws_are_in_proportion_and_nothing_impossible_is_drawn(seed):
    rows_N = np.zeros(100_000, int)
    with np.errstate(divide="ignore"):
        log_probs_BTV = np.log([[[0.0, 0.5, 0.0, 0.499, 0.001, 0.0]]])
    values_N, log_confidence_N = guess.draw(log_probs_BTV, rows_N, rows_N, np.random.default_rng(seed))
    counts = np.bincount(values_N, minlength=6)
    assert chains.p_value(counts, np.exp(log_probs_BTV[0, 0])) > SURE
    assert (log_confidence_N == log_probs_BTV[0, 0, values_N]).all()


def test_steps_that_reveal_nothing_make_no_call(seed):
    """N (1 - (1 - 1/N)^M) calls on average; the spread is estimated from the runs themselves."""
    N, M, runs = 12, 10, 300
    calls = []
    for run in range(runs):
        denoiser = Counted(chains.posterior(chains.T6))
        trace = ancestral.sample(denoiser, masks(2, 5, 3), mask_id=3, num_steps=N, seed=seed + run).trace
        assert denoiser.num_calls == len(trace) and all(len(reveal.rows_N) for reveal in trace)
        calls.append(denoiser.num_calls)
    assert abs(np.mean(calls) - N * (1 - (1 - 1 / N) ** M)) < 5 * np.std(calls) / np.sqrt(runs)


def test_a_step_reads_only_what_was_visible_before_it():
    """Both masks of `0 ? ?` revealed in one step are drawn from one call that saw neither."""
    seen = []

    def denoiser(tokens_BT):
        seen.append(tokens_BT)
        return chains.posterior(chains.T6)(tokens_BT)

    tokens_BT = np.array([[0, 3, 3]])
    decoded = ancestral.sample(denoiser, tokens_BT, mask_id=3, num_steps=1)
    assert len(seen) == 1 and (seen[0] == tokens_BT).all(), "what a denoiser was shown has been changed since"
    assert (tokens_BT == [[0, 3, 3]]).all(), "the caller's tokens have been changed"
    (reveal,) = decoded.trace
    expected = chains.posterior(chains.T6)(tokens_BT)[0, reveal.positions_N, reveal.values_N]
    np.testing.assert_allclose(reveal.log_confidence_N, expected)


SAMPLERS = {
    "first_hitting": first_hitting.sample,
    "ancestral": functools.partial(ancestral.sample, num_steps=4),
    "confidence": functools.partial(ordered.decode, num_steps=3),
    "random": functools.partial(ordered.decode, order="random", per_call=2, temperature=1.0),
    "in one call": functools.partial(ordered.decode, per_call=99, temperature=1.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_masks_are_filled_and_none_is_left(name, seed):
    """Neither prompts, nor PAD, nor suffixes change, and no mask is drawn: not even one that is among the V itself."""
    tokens_BT = np.array([[0, 1, 9, 9, 9, 9], [9, 9, 9, PAD, PAD, PAD], [2, 9, 0, 9, 1, 9], [0, 0, 0, 1, 1, 1]])
    flat_BTV = np.log(np.full((4, 6, 3), 1 / 3))
    for mask_id in (3, 2, 7):
        # The mask's own column, where it has one, is all but certain.
        V = 4 if mask_id == 3 else 3
        given_BT = np.where(tokens_BT == 9, mask_id, np.where(tokens_BT == 2, 0, tokens_BT))
        sure_BTV = np.log(np.full((4, 6, V), 1e-9))
        sure_BTV[..., mask_id if mask_id < V else 0] = np.log(1 - 1e-9)
        for log_probs_BTV in (sure_BTV, flat_BTV if V == 3 else sure_BTV, jnp.asarray(sure_BTV)):
            result_BT = SAMPLERS[name](lambda _, out=log_probs_BTV: out, given_BT, mask_id=mask_id, seed=seed).tokens_BT
            masked_BT = given_BT == mask_id
            assert result_BT.dtype == np.int32
            assert (result_BT[~masked_BT] == given_BT[~masked_BT]).all()
            assert (result_BT[masked_BT] >= 0).all() and (result_BT[masked_BT] < V).all()
            assert not (result_BT == mask_id).any()


def test_a_mask_within_the_vocabulary_leaves_the_others_their_proportions(seed):
    log_probs_BTV = np.broadcast_to(np.log([0.1, 0.6, 0.1, 0.2]), (20_000, 1, 4))
    result_BT = first_hitting.sample(lambda _: log_probs_BTV, masks(20_000, 1, 1), mask_id=1, seed=seed).tokens_BT
    counts = np.bincount(result_BT[:, 0], minlength=4)
    assert chains.p_value(counts, np.array([1, 0, 1, 2])) > SURE
    np.testing.assert_allclose(np.exp(loop.ask(lambda _: log_probs_BTV, result_BT, 1)).sum(-1), 1.0)


@pytest.mark.parametrize("name", ["first_hitting", "ancestral", "random", "in one call"])
def test_a_seed_repeats_its_sample_and_another_gives_another(name, seed):
    a, b, c = (
        SAMPLERS[name](chains.posterior(chains.T6), masks(20, 12, 3), mask_id=3, seed=s) for s in (seed, seed, seed + 1)
    )
    assert (a.tokens_BT == b.tokens_BT).all() and (a.tokens_BT != c.tokens_BT).any()
    assert not a.deterministic


def test_greedy_decodings_are_flagged_as_no_sample():
    """All rows are one guess: its entropy is 0 on a chain of 5.5 nats."""
    tokens_BT = masks(20, 6, 3)
    for order in ordered.ORDERS[:3]:
        decoded = ordered.decode(chains.posterior(chains.T6), tokens_BT, mask_id=3, order=order, per_call=1)
        assert decoded.deterministic and (decoded.tokens_BT == decoded.tokens_BT[0]).all()


def test_bad_tokens_are_refused():
    denoiser, good_BT = chains.posterior(chains.T6), np.array([[0, 3, 3]])
    cases = [
        (good_BT.astype(float), 3, "float64; give integers"),
        (good_BT[0], 3, r"shape \(3,\)"),
        (good_BT, 4, "none of the 3 tokens is mask_id=4"),
        (good_BT - 2, 1, "least token is -2"),
        (good_BT, -1, "mask_id=-1"),
        (np.array([[3, 3, 0], [PAD, 3, 0]]), 3, "row 1 goes on after PAD"),
        (np.array([[3, 3, 5]]), 3, "token 5 is not among the denoiser's 3"),
    ]
    for tokens_BT, mask_id, message in cases:
        for sampler in SAMPLERS.values():
            with pytest.raises(ValueError, match=message):
                sampler(lambda _: np.zeros((1, 3, 3)), tokens_BT, mask_id=mask_id)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="infinite or NaN"):
            sampler(lambda tokens_BT: denoiser(tokens_BT) * np.nan, good_BT, mask_id=3)
