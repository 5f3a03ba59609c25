"""Decoders by order and by threshold: how many, which and in what order they fill, and when they equal one another."""

import functools

import chains
import jax.numpy as jnp
import numpy as np
import pytest
import random_denoisers
from random_denoisers import MASK, random_denoiser

from slmjax.decoding import blocks, ordered, threshold
from slmjax.denoiser import PAD, Counted

SURE = 1e-6  # as in test_samplers

# Prompts of 3, 0, 9 and 5 tokens with answers of 10, 13, 1 and 0, and a row with two gaps; PAD behind each.
UNEQUAL_BT = np.full((5, 14), PAD)
for row, (prompt, answer) in enumerate(((3, 10), (0, 13), (9, 1), (5, 0), (2, 12))):
    UNEQUAL_BT[row, :prompt] = np.arange(prompt) % 7
    UNEQUAL_BT[row, prompt : prompt + answer] = MASK
UNEQUAL_BT[4, 5:8] = 1

GREEDY = {
    "static": ordered.static,
    "static of 3 in blocks of 4": functools.partial(ordered.static, per_call=3, block=4),
    "margin in 5 steps": functools.partial(ordered.decode, order="margin", num_steps=5),
    "entropy in blocks of 5": functools.partial(ordered.decode, order="entropy", num_steps=6, block=5),
    "threshold": functools.partial(threshold.decode, threshold=0.5, block=6),
    "factor": functools.partial(threshold.by_factor, factor=1.3),
}


def fixed(seed: int, T: int, V: int):
    """(denoiser, probs_TV): a distribution for each position whatever the tokens are."""
    probs_TV = np.random.default_rng(seed).dirichlet(np.ones(V), T)
    return lambda tokens_BT: np.broadcast_to(np.log(probs_TV), (len(tokens_BT), T, V)), probs_TV


def masks(B: int, T: int, mask_id: int = MASK) -> np.ndarray:
    return np.full((B, T), mask_id)


def num_filled(decoded, B: int) -> list[list[int]]:
    """For each row, how many positions each call filled, zeros at the end left out."""
    counts_BC = np.array([np.bincount(reveal.rows_N, minlength=B) for reveal in decoded.trace]).T
    return [np.trim_zeros(row.tolist(), "b") for row in counts_BC]


@pytest.mark.parametrize("num_steps", [1, 4, 7, 13, 20])
def test_steps_share_the_masks_evenly_with_the_remainder_first(num_steps, seed):
    decoded = ordered.decode(random_denoiser(seed), UNEQUAL_BT, mask_id=MASK, num_steps=num_steps)
    for row, counts in zip(UNEQUAL_BT, num_filled(decoded, 5), strict=True):
        n = (row == MASK).sum()
        assert sum(counts) == n and len(counts) == min(n, num_steps)
        assert counts == sorted(counts, reverse=True) and (not n or max(counts) - min(counts) <= 1)
    assert blocks.schedule(13, 4) == [4, 3, 3, 3]


@pytest.mark.parametrize(("per_call", "block"), [(1, 0), (1, 5), (3, 0), (2, 5), (4, 5), (7, 5), (1, 40), (40, 40)])
def test_static_finishes_each_block_in_its_calls_before_the_next(per_call, block, seed):
    """13 masks in blocks of 5 are 5, 5 and 3: the last is shorter, and no call reaches over an edge."""
    denoiser = Counted(random_denoiser(seed))
    tokens_BT = np.concatenate([[[4, 2]], masks(1, 13)], 1)
    decoded = ordered.static(denoiser, tokens_BT, mask_id=MASK, per_call=per_call, block=block)
    sizes = [5, 5, 3] if block == 5 else [13]
    assert denoiser.num_calls == sum(-(-size // per_call) for size in sizes) == len(decoded.trace)
    if block == 5:
        visited = [set(((reveal.positions_N - 2) // 5).tolist()) for reveal in decoded.trace]
        assert all(len(v) == 1 for v in visited) and visited == sorted(visited, key=min)
    assert decoded.deterministic


def test_steps_are_shared_out_over_blocks():
    """In proportion to the masks of the block, one at the least; within a block the remainder goes first."""
    whole_T = np.ones(32, bool)
    assert ordered.plan(whole_T, 8, 4) == [8] * 4
    assert ordered.plan(whole_T, 8, 16) == [2] * 16
    assert ordered.plan(whole_T, 8, 6) == [4, 4, 4, 4, 8, 8]
    assert ordered.plan(whole_T, 0, 3) == [11, 11, 10]
    assert ordered.plan(np.ones(33, bool), 32, 32) == [2] + [1] * 30 + [1]
    assert ordered.plan(np.ones(5, bool), 4, 50) == [1] * 5
    # A prompt of three, and a middle block with nothing to fill: 4 masks, then none, then 2.
    assert ordered.plan(np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1], bool), 4, 3) == [2, 2, 2]
    assert ordered.plan(np.zeros(4, bool), 2, 3) == []
    with pytest.raises(ValueError, match=r"num_steps=3 is fewer than a row's 4 blocks of 8"):
        ordered.plan(whole_T, 8, 3)


def test_steps_in_blocks_fill_what_was_planned(seed):
    decoded = ordered.decode(random_denoiser(seed), UNEQUAL_BT, mask_id=MASK, num_steps=6, block=4)
    for row, counts in zip(UNEQUAL_BT, num_filled(decoded, 5), strict=True):
        assert counts == ordered.plan(row == MASK, 4, 6) and len(counts) <= 6


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_orders_are_what_they_are_called(order, seed):
    """Against a sort of a fixed table; the three orders of 12 positions with 5 tokens each all but never agree."""
    denoiser, probs_TV = fixed(seed, 12, 5)
    best_TV = -np.sort(-probs_TV, axis=1)
    score_T = {
        "confidence": best_TV[:, 0],
        "margin": best_TV[:, 0] - best_TV[:, 1],
        "entropy": np.sum(probs_TV * np.log(probs_TV), axis=1),
    }[order]
    decoded = ordered.decode(denoiser, masks(1, 12, 5), mask_id=5, order=order, per_call=1)
    assert [reveal.positions_N.item() for reveal in decoded.trace] == np.argsort(-score_T, kind="stable").tolist()
    assert (decoded.tokens_BT[0] == probs_TV.argmax(1)).all()


def test_a_random_order_is_uniform_and_differs_between_rows_and_seeds(seed):
    run = functools.partial(ordered.decode, fixed(seed, 6, 3)[0], masks(3000, 6, 3), mask_id=3, order="random")
    a, b = run(per_call=1, seed=seed), run(per_call=1, seed=seed + 1)
    for reveal in a.trace:
        assert chains.p_value(np.bincount(reveal.positions_N, minlength=6), np.ones(6)) > SURE
    assert (a.trace[0].positions_N != b.trace[0].positions_N).any()


def test_ties_go_to_the_lowest_position_and_token():
    flat_BTV = np.log(np.full((2, 6, 4), 0.25))
    for order in ("confidence", "margin", "entropy"):
        decoded = ordered.decode(lambda _: flat_BTV, masks(2, 6, 4), mask_id=4, order=order, per_call=2)
        assert [reveal.positions_N.tolist() for reveal in decoded.trace] == [[0, 1] * 2, [2, 3] * 2, [4, 5] * 2]
        assert (decoded.tokens_BT == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_draws_from_the_tempered_distribution_and_ranks_by_the_untempered(temperature, seed):
    denoiser, probs_TV = fixed(seed, 3, 4)
    decoded = ordered.decode(
        denoiser, masks(20_000, 3, 4), mask_id=4, order="random", per_call=3, temperature=temperature, seed=seed
    )
    tempered_TV = probs_TV ** (1 / temperature)
    for i in range(3):
        assert chains.p_value(np.bincount(decoded.tokens_BT[:, i], minlength=4), tempered_TV[i]) > SURE
    assert not decoded.deterministic
    # Confidence is the untempered probability of the value drawn: it decides which position comes first.
    decoded = ordered.decode(denoiser, masks(500, 3, 4), mask_id=4, per_call=1, temperature=temperature, seed=seed)
    for reveal in decoded.trace:
        log_prob_N = np.log(probs_TV)[reveal.positions_N, reveal.values_N]
        np.testing.assert_allclose(reveal.log_confidence_N, log_prob_N, atol=1e-5)


def test_only_one_at_a_time_in_random_order_samples_the_chain(seed):
    """The surest first does not, at temperature 1: what it draws is surer than the chain."""
    probs_N = np.exp(chains.log_prob(chains.T6, chains.all_sequences(3, 4)))

    def p_value(**how):
        tokens_BT = ordered.decode(
            chains.posterior(chains.T6), masks(20_000, 4, 3), mask_id=3, temperature=1.0, seed=seed, **how
        ).tokens_BT
        return chains.p_value(np.bincount(chains.index(tokens_BT, 3), minlength=81), probs_N)

    assert p_value(order="random", per_call=1) > SURE
    assert p_value(order="random", per_call=4) < 1e-10
    assert p_value(order="confidence", per_call=1) < 1e-10


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_row_is_the_same_alone_in_any_batch_and_for_any_seed(name, seed):
    """Its PAD cut off, too: prompts of unequal length are no trouble to one another."""
    denoiser = random_denoiser(seed)
    together_BT = GREEDY[name](denoiser, UNEQUAL_BT, mask_id=MASK).tokens_BT
    assert ((together_BT == PAD) == (UNEQUAL_BT == PAD)).all() and (together_BT != MASK).all()
    given_BT = (UNEQUAL_BT != MASK) & (UNEQUAL_BT != PAD)
    assert (together_BT[given_BT] == UNEQUAL_BT[given_BT]).all()
    shuffled_B = np.random.default_rng(seed).permutation(5)
    assert (GREEDY[name](denoiser, UNEQUAL_BT[shuffled_B], mask_id=MASK).tokens_BT == together_BT[shuffled_B]).all()
    for row_T, result_T in zip(UNEQUAL_BT, together_BT, strict=True):
        row_T, result_T = row_T[row_T != PAD], result_T[row_T != PAD]
        if (row_T == MASK).any():
            assert (GREEDY[name](denoiser, row_T[None], mask_id=MASK).tokens_BT[0] == result_T).all()


@pytest.mark.parametrize("order", ordered.ORDERS[:3])
def test_a_greedy_decoding_takes_no_seed_and_any_kind_of_array(order, seed):
    denoiser = random_denoiser(seed)
    run = functools.partial(ordered.decode, tokens_BT=UNEQUAL_BT, mask_id=MASK, order=order, per_call=2)
    expected = run(denoiser, seed=1)
    for other in (run(denoiser, seed=2), run(lambda tokens_BT: jnp.asarray(denoiser(tokens_BT), jnp.float32))):
        assert (other.tokens_BT == expected.tokens_BT).all()


def test_a_threshold_above_one_is_static_and_of_zero_a_call_a_block(seed):
    num = 100
    denoiser, tokens_BT = random_denoisers.many(seed, num)
    static = ordered.static(denoiser, tokens_BT, mask_id=MASK)
    above = random_denoisers.CallsPerRow(denoiser, num)
    assert (threshold.decode(above, tokens_BT, mask_id=MASK, threshold=1.01).tokens_BT == static.tokens_BT).all()
    assert (above.calls_B == 24).all()
    assert [len(reveal.rows_N) for reveal in static.trace] == [num] * 24
    for block, calls in ((0, 1), (8, 3), (7, 4)):
        zero = random_denoisers.CallsPerRow(denoiser, num)
        decoded = threshold.decode(zero, tokens_BT, mask_id=MASK, threshold=0.0, block=block)
        assert (zero.calls_B == calls).all() and (decoded.tokens_BT != MASK).all()


def test_calls_fall_with_the_threshold(seed):
    num, calls = 100, []
    denoiser, tokens_BT = random_denoisers.many(seed, num, sharpness=(2.0,))
    for tau in (1.01, 0.99, 0.9, 0.7, 0.5, 0.3, 0.0):
        counted = random_denoisers.CallsPerRow(denoiser, num)
        trace = threshold.decode(counted, tokens_BT, mask_id=MASK, threshold=tau).trace
        calls.append(counted.calls_B.mean())
        for reveal in trace:  # what was revealed beside the surest of its row was sure enough
            alone_N = np.bincount(reveal.rows_N, minlength=num)[reveal.rows_N] == 1
            assert (alone_N | (np.exp(reveal.log_confidence_N) >= tau - 1e-6)).all()
    print(calls)
    assert calls[0] == 24 and calls[-1] == 1 and (np.diff(calls) < 0).all()


@pytest.mark.parametrize("tau", [0.3, 0.6])
def test_a_threshold_reveals_all_that_is_sure_enough(tau, seed):
    """Of a fixed table: first everything at or above it, then one position a call, the surest first."""
    denoiser, probs_TV = fixed(seed, 12, 5)
    confidence_T = probs_TV.max(1)
    decoded = threshold.decode(denoiser, masks(1, 12, 5), mask_id=5, threshold=tau)
    sure = np.flatnonzero(confidence_T >= tau).tolist()
    rest = [i for i in np.argsort(-confidence_T).tolist() if i not in sure]
    expected = [sure] * bool(sure) + [[i] for i in rest]
    assert [reveal.positions_N.tolist() for reveal in decoded.trace] == expected


def test_the_threshold_itself_is_enough():
    half_BTV = np.log(np.full((1, 5, 2), 0.5))
    assert len(threshold.decode(lambda _: half_BTV, masks(1, 5, 2), mask_id=2, threshold=0.5).trace) == 1


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_the_factor_rule_reveals_the_largest_number_that_it_allows(factor, seed):
    for draw in range(10):
        rng = np.random.default_rng((seed, draw))
        probs_TV = np.clip(rng.dirichlet(np.full(3, 0.15), 8), 1e-5, None)
        log_probs_BTV = np.log(probs_TV / probs_TV.sum(1, keepdims=True))[None]
        confidence = sorted(np.exp(log_probs_BTV[0]).max(1).tolist(), reverse=True)
        expected = []
        while confidence:
            allowed = [n for n in range(1, len(confidence) + 1) if (n + 1) * (1 - confidence[n - 1]) < factor]
            expected.append(max([1, *allowed]))
            confidence = confidence[expected[-1] :]
        trace = threshold.by_factor(lambda _, out=log_probs_BTV: out, masks(1, 8, 3), mask_id=3, factor=factor).trace
        assert [len(reveal.rows_N) for reveal in trace] == expected


def test_a_confident_product_has_the_joint_distributions_best_values(seed):
    """Fast-dLLM's theorem: n positions each surer than 1 - ε, (n + 1) ε <= 1, filled at once are the joint's argmax."""
    rng, tried = np.random.default_rng(seed), 0
    for _ in range(300):
        n, V = int(rng.integers(2, 5)), int(rng.integers(2, 4))
        spread = rng.uniform(0, 1.2 / (n + 1) if rng.random() < 0.8 else 1)
        probs_N = spread * rng.dirichlet(np.full(V**n, 0.3))
        probs_N[rng.integers(V**n)] += 1 - spread
        denoiser, tokens_BT = chains.table(probs_N, V, n), masks(1, n, V)
        sure = np.exp(denoiser(tokens_BT)[0]).max(1).min() > 1 - 1 / (n + 1) + 1e-6
        at_once = [
            threshold.decode(denoiser, tokens_BT, mask_id=V, threshold=1 - 1 / (n + 1)),
            threshold.by_factor(denoiser, tokens_BT, mask_id=V),
        ]
        if sure:
            tried += 1
            for decoded in at_once:
                assert len(decoded.trace) == 1
                assert chains.index(decoded.tokens_BT, V)[0] == probs_N.argmax()
    assert tried > 100


def test_the_theorems_bound_is_tight():
    """P(01) = P(10) = a, P(00) = 1 - 2a: filled at once they are 00, which beyond a = 1/3 is not the best."""
    for a, together in ((0.32, True), (0.34, False)):
        probs_N = np.array([1 - 2 * a, a, a, 0.0])
        denoiser, tokens_BT = chains.table(probs_N, 2, 2), masks(1, 2, 2)
        forced = threshold.decode(denoiser, tokens_BT, mask_id=2, threshold=0.65)
        assert len(forced.trace) == 1
        assert (chains.index(forced.tokens_BT, 2)[0] == probs_N.argmax()) == together
        careful = threshold.by_factor(denoiser, tokens_BT, mask_id=2)
        assert len(careful.trace) == (1 if together else 2)
        assert probs_N[chains.index(careful.tokens_BT, 2)[0]] == probs_N.max()


def test_what_cannot_be_decoded_is_refused():
    cases = [
        ({"order": "surest", "per_call": 1}, "order='surest'.*confidence, margin, entropy, random"),
        ({}, "num_steps=None and per_call=None; give exactly one"),
        ({"per_call": 1, "num_steps": 2}, "num_steps=2 and per_call=1; give exactly one"),
        ({"per_call": 0}, "per_call=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"per_call": 1, "block": -1}, "block=-1"),
        ({"per_call": 1, "temperature": -0.1}, r"temperature=-0\.1"),
        ({"num_steps": 2, "block": 4}, "num_steps=2 is fewer than a row's 3 blocks of 4"),
    ]
    for how, message in cases:
        with pytest.raises(ValueError, match=message):
            ordered.decode(random_denoiser(0), UNEQUAL_BT, mask_id=MASK, **how)
    with pytest.raises(ValueError, match="block=-2"):
        threshold.decode(random_denoiser(0), UNEQUAL_BT, mask_id=MASK, block=-2)
