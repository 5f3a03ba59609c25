"""The bound of masked diffusion against truths: what it is on exact conditionals, and what wrong forms of it give.

With exact conditionals every order of the tokens gives the same product, so the bound is -log p(x) itself, for every x.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import T6, all_sequences, entropy, log_prob, posterior, random_chain

from slmjax import objectives
from slmjax.config import DiffusionConfig, ObjectiveConfig
from slmjax.likelihood import chains, exact, monte_carlo
from slmjax.objectives import noise

V, L = 3, 6


def surprises(chain) -> np.ndarray:
    """[V^L, 2^L, L] of the chain's exact posterior."""
    return np.stack([exact.surprise(posterior(chain), x, mask_id=V) for x in all_sequences(V, L)])


@pytest.fixture(scope="module")
def t6():
    """(surprises of every sequence, their probabilities, by-size mean surprise in nats per sequence)."""
    chance_X = np.exp(log_prob(T6, all_sequences(V, L)))
    nats_XM = surprises(T6).sum(2)
    size_M = exact.sizes(L)
    by_size = [(chance_X @ nats_XM[:, size_M == l]).mean() for l in range(L + 1)]
    return surprises(T6), chance_X, np.array(by_size)


def by_quadrature(cfg: DiffusionConfig, by_size, change=lambda rate, weight: (rate, weight)) -> float:
    """E over time of weight x surprise, as training estimates it with `estimator=bernoulli`, by Gauss and Legendre."""
    with jax.enable_x64(True):
        x_K, w_K = np.polynomial.legendre.leggauss(400)
        rate_K, weight_K = change(*(np.asarray(a) for a in noise.rate_and_weight(cfg, jnp.asarray((x_K + 1) / 2))))
    l = np.arange(L + 1)
    chance_Kl = np.array([math.comb(L, i) for i in l]) * rate_K[:, None] ** l * (1 - rate_K[:, None]) ** (L - l)
    return float(w_K / 2 * weight_K @ (chance_Kl @ by_size))


def test_with_exact_conditionals_the_bound_is_the_likelihood_of_every_sequence(seed):
    chain = random_chain(seed, V)
    x_BT = all_sequences(V, L)
    likelihood = exact.exact(posterior(chain), x_BT, mask_id=V)
    np.testing.assert_allclose(likelihood.nats_B, -log_prob(chain, x_BT), atol=1e-9)
    for estimator in ("random_order",):
        other = exact.exact(posterior(chain), x_BT[::50], mask_id=V, estimator=estimator)
        np.testing.assert_allclose(other.nats_B, -log_prob(chain, x_BT[::50]), atol=1e-9)
    for order in chains.ORDERS:
        chained = chains.chain(posterior(chain), x_BT, mask_id=V, order=order)
        assert chained.kind == "exact" and likelihood.kind == "bound"
        np.testing.assert_allclose(chained.nats_B, -log_prob(chain, x_BT), atol=1e-9)


def test_of_an_imperfect_model_the_bound_lies_above_its_likelihood_and_that_above_the_entropy(seed):
    chain, V, L = random_chain(seed, 3), 3, 4
    table = np.random.default_rng(seed).normal(size=(4**L, L, V))
    table -= np.logaddexp.reduce(table, axis=-1, keepdims=True)
    x_BT, place = all_sequences(V, L), 4 ** np.arange(L)

    def random_tables(tokens_BT):
        return table[np.asarray(tokens_BT) @ place]

    bound, model = (
        exact.exact(random_tables, x_BT, mask_id=V, estimator=name).nats_B for name in ("exact_bound", "random_order")
    )
    assert np.exp(-model).sum() == pytest.approx(1, abs=1e-9)
    assert (bound >= model - 1e-12).all()
    chance = np.exp(log_prob(chain, x_BT))
    assert chance @ bound > chance @ model > entropy(chain, L)
    for order in chains.ORDERS:
        assert np.exp(-chains.chain(random_tables, x_BT, mask_id=V, order=order).nats_B).sum() == pytest.approx(1)


def test_the_bound_hangs_on_no_schedule(t6):
    *_, by_size = t6
    forms = [("linear", 2.0), ("cosine", 2.0), ("polynomial", 2.0), ("polynomial", 3.0)]
    cfgs = [DiffusionConfig(schedule=name, exponent=power, min_rate=1e-12) for name, power in forms]
    values = [by_quadrature(cfg, by_size) for cfg in cfgs]
    np.testing.assert_allclose(values, entropy(T6, L), atol=1e-8)
    flat = by_quadrature(cfgs[0], by_size, lambda rate, weight: (rate, np.ones_like(rate)))
    assert flat == pytest.approx(2.881066, abs=1e-6)
    # A mean over a batch's hidden tokens counts high noise too often: another number, for all that it trains well.
    assert by_size.sum() / sum(range(L + 1)) * L > entropy(T6, L) + 0.2


def test_the_floor_of_the_mask_rate_errs_upwards(t6):
    *_, by_size = t6
    H = entropy(T6, L)
    assert pytest.approx(5.476179, abs=1e-6) == H
    for schedule in ("linear", "cosine", "polynomial"):
        assert H <= by_quadrature(DiffusionConfig(schedule=schedule), by_size) <= H + 0.002
    assert by_quadrature(DiffusionConfig(), by_size) == pytest.approx(5.476947, abs=1e-6)
    assert by_quadrature(DiffusionConfig(min_rate=0.1), by_size) == pytest.approx(5.554553, abs=1e-6)
    # MDLM's form, (1 - eps) t with weight 1/t, is the negative control: it lies below the entropy.
    t_form = by_quadrature(DiffusionConfig(min_rate=1e-12), by_size, lambda t, weight: ((1 - 1e-3) * t, 1 / t))
    assert t_form < H - 1e-3


def test_few_steps_bound_loosely(t6):
    surprise_XMn, chance_X, _ = t6
    steps = (1, 2, 4, 8, 16, 64, 1024)
    values = [chance_X @ [exact.bound_by_steps(nats_Mn, n) for nats_Mn in surprise_XMn] for n in steps]
    expected = (6.441894, 5.934528, 5.699115, 5.586080, 5.530738, 5.489745, 5.477026)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(values)) and values[-1] > entropy(T6, L)


def test_estimators_agree_with_enumeration_and_the_count_form_spreads_least(seed):
    chain, num_draws = random_chain(seed, V), 200_000
    x_1T = all_sequences(V, L)[[seed % V**L]]
    truth = exact.exact(posterior(chain), x_1T, mask_id=V).nats_B[0]
    spread = {}
    for name in monte_carlo.ESTIMATORS:
        found = monte_carlo.monte_carlo(
            posterior(chain), x_1T, mask_id=V, estimator=name, num_draws=num_draws, seed=seed, rows_per_call=50_000
        )
        assert abs(found.nats_B[0] - truth) < 4 * found.se_B[0], name
        assert found.num_draws == num_draws and found.kind == "bound"
        spread[name] = found.se_B[0] * math.sqrt(num_draws)
    assert spread["l_uniform"] < 0.5 * spread["bernoulli"]


@pytest.mark.parametrize("what, estimator", [("view", "bernoulli"), ("view", "l_uniform"), ("score", "l_uniform")])
@pytest.mark.parametrize("name, block", [("masked_diffusion", 16)] + [("block_diffusion", b) for b in (1, 2, 3, 6)])
def test_what_an_objective_weighs_in_training_and_evaluation_is_the_bound(name, block, what, estimator, seed):
    """Views of one sequence, many times, on exact conditionals: the mean is -log p(x), blocks or none."""
    chain, N = random_chain(seed, V), 20_000
    x_T = all_sequences(V, L)[seed % V**L]
    diffusion = DiffusionConfig(estimator=estimator, block=block, min_rate=1e-4, eval_draws=N)
    objective = objectives.build(ObjectiveConfig(name=name, diffusion=diffusion))
    tokens = np.broadcast_to(np.concatenate([[0], x_T]), (N, L + 1)).astype(np.int32)
    if what == "view":
        view = jax.jit(objective.view)(tokens, None, jax.random.key(seed))
    else:  # rows of the same tokens get the same noise, so it is the draws that differ
        score = jax.jit(jax.vmap(objective.score, (None, None, None, 0)))
        views = score(tokens[:1], None, jax.random.key(seed), jnp.arange(N))
        view = jax.tree.map(lambda a: a[:, 0] if a.ndim > 1 else a, views)
    hidden_BT = np.asarray(view.inputs_BT)[:, :L] == noise.HIDDEN
    nats_BT = _block_surprise(chain, x_T, hidden_BT, block if name == "block_diffusion" else L)
    nats_B = (np.asarray(view.noise.bound_BT) * nats_BT).sum(1)
    assert (np.asarray(view.noise.bound_BT > 0) == hidden_BT).all()
    truth, se = -log_prob(chain, x_T[None])[0], nats_B.std() / math.sqrt(N)
    assert abs(nats_B.mean() - truth) < 4 * se + (1e-3 if estimator == "bernoulli" else 1e-6)


def _block_surprise(chain, x_T, hidden_BT, block: int) -> np.ndarray:
    """Each hidden token's surprise given the shown ones of its block and all before it: later blocks are not seen."""
    nats_BT = np.zeros(hidden_BT.shape)
    for start in range(0, L, block):
        own = slice(start, start + block)
        shown_BT = np.full(hidden_BT.shape, V)
        shown_BT[:, :start] = x_T[:start]
        shown_BT[:, own] = np.where(hidden_BT[:, own], V, x_T[own])
        nats_BT[:, own] = -np.take_along_axis(posterior(chain)(shown_BT), x_T[None, :, None], -1)[:, own, 0]
    return np.where(hidden_BT, nats_BT, 0.0)


@pytest.mark.parametrize("num", [1, 7, 49, 98, 103, 107, 256])
def test_times_of_a_batch_are_one_in_each_stratum(num, seed):
    t = np.asarray(noise.times("jitter", jax.random.key(seed), num), np.float64)
    assert len(t) == num and (t > 0).all() and (t <= 1).all()
    assert (np.floor(t * num) == np.arange(num)).all()
    t = np.asarray(noise.times("low_discrepancy", jax.random.key(seed), num), np.float64)
    assert len(t) == num and (t > 0).all() and (t <= 1).all()
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / num, atol=1e-6)


@pytest.mark.parametrize("kind", ["iid", "jitter", "low_discrepancy", "antithetic"])
def test_every_time_is_uniform(kind, seed):
    drawn = jax.vmap(lambda key: noise.times(kind, key, 4))(jax.random.split(jax.random.key(seed), 4000))
    for t in np.asarray(drawn).T:  # within its stratum where there are strata, over all of 0..1 elsewhere
        width = 0.25 if kind == "jitter" else 0.25 if kind == "antithetic" else 1.0
        u = (t / width) % 1.0
        assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    if kind == "antithetic":
        np.testing.assert_allclose(drawn[:, :2] + drawn[:, 2:], 1.0, atol=1e-6)


def test_of_a_long_chain_the_estimate_is_its_entropy(seed):
    V, L, N = 8, 256, 4096
    chain, rng = random_chain(seed, V), np.random.default_rng(seed)
    x_NT = np.empty((N, L), np.int32)
    x_NT[:, 0] = rng.choice(V, N, p=chain.start_V)
    sums_VV = chain.rows_VV.cumsum(1)
    for i in range(1, L):
        x_NT[:, i] = np.minimum((sums_VV[x_NT[:, i - 1]] < rng.random((N, 1))).sum(1), V - 1)
    found = monte_carlo.monte_carlo(posterior(chain), x_NT, mask_id=V, num_draws=1, seed=seed, rows_per_call=512)
    se = found.nats_B.std() / math.sqrt(N)
    assert abs(found.nats_B.mean() - entropy(chain, L)) < 4 * se < 0.03 * entropy(chain, L)


def test_a_single_token_needs_one_draw_and_prompts_are_not_scored(seed):
    chain = random_chain(seed, V)
    x_BT = all_sequences(V, 4)
    last = np.zeros(x_BT.shape, bool)
    last[:, -1] = True
    given = -(log_prob(chain, x_BT) - log_prob(chain, x_BT[:, :-1]))
    once = monte_carlo.monte_carlo(posterior(chain), x_BT, mask_id=V, scored_BT=last, num_draws=1)
    np.testing.assert_allclose(once.nats_B, given, atol=1e-9)
    assert (once.num_scored_B == 1).all() and np.isnan(once.se_B).all()
    pair = x_BT[:, 2:]
    shared = monte_carlo.monte_carlo(posterior(chain), pair, mask_id=V, num_draws=8, noise="shared", seed=seed)
    one = monte_carlo.monte_carlo(posterior(chain), pair[:1], mask_id=V, num_draws=8, noise="shared", seed=seed)
    assert shared.nats_B[0] == pytest.approx(one.nats_B[0], abs=1e-9)  # the other answers change nothing
    with pytest.raises(ValueError, match="mask_id=3"):
        monte_carlo.monte_carlo(posterior(chain), np.full((1, 4), 3), mask_id=V)
    with pytest.raises(ValueError, match="17 tokens"):
        exact.surprise(posterior(chain), np.zeros(17, int), mask_id=V)
