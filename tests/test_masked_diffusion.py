"""What is hidden, seen, scored and averaged under masked and block diffusion, in the objective and through training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import make_run
from scipy import special, stats
from tiny import (
    assert_same,
    draw,
    hypers,
    init,
    population,
    random_batches,
    random_segments,
    random_tokens,
    solo,
    tiny,
    train,
    train_one,
)

from slmjax import config, denoiser, ladder, member, models, objectives, program
from slmjax.config import ConfigError, DiffusionConfig, ObjectiveConfig
from slmjax.objectives.noise import HIDDEN

MDM = {"objective.name": "masked_diffusion"}
BLOCK = {"objective.name": "block_diffusion", "objective.diffusion.block": 4}


def objective_of(changes: dict | None = None, **fields) -> objectives.Objective:
    cfg = ObjectiveConfig(name="masked_diffusion", diffusion=DiffusionConfig(**(changes or {})), **fields)
    return objectives.build(cfg)


def many_views(objective, tokens_BT1, seed: int, num: int, segments_BT1=None):
    """Views of one batch under `num` keys, stacked."""
    keys = jax.random.split(jax.random.key(seed), num)
    return jax.jit(jax.vmap(objective.view, (None, None, 0)))(tokens_BT1, segments_BT1, keys)


# ---- what is hidden --------------------------------------------------------------------------------------------------


def test_masks_are_binomial_at_their_rate_and_positions_independent(seed):
    objective = objective_of({"time": "iid"})
    views = many_views(objective, random_tokens(seed, 2, 33), seed, 4000)
    hidden_KBT, rate_KBT = np.asarray(views.inputs_BT) == HIDDEN, np.asarray(views.noise.rate_BT)
    assert (rate_KBT == rate_KBT[..., :1]).all()  # one level a row
    assert (rate_KBT[:, 0, 0] != rate_KBT[:, 1, 0]).mean() > 0.99  # each row its own
    rate_N, count_N = rate_KBT[..., 0].ravel(), hidden_KBT.sum(-1).ravel()
    u_N = stats.binom.cdf(count_N - 1, 32, rate_N) + np.random.default_rng(seed).random(len(rate_N)) * stats.binom.pmf(
        count_N, 32, rate_N
    )
    assert stats.kstest(u_N, "uniform").pvalue > 1e-6
    left_N, right_N = ((hidden_KBT[..., i] - rate_KBT[..., i]).ravel() for i in (3, 20))
    scale = np.sqrt(np.mean((rate_N * (1 - rate_N)) ** 2) / len(rate_N))
    assert abs(np.mean(left_N * right_N)) < 5 * scale
    assert (
        abs(np.mean((hidden_KBT[:, 0, 3] - rate_KBT[:, 0, 3]) * (hidden_KBT[:, 1, 3] - rate_KBT[:, 1, 3]))) < 5 * scale
    )


def test_the_count_form_hides_every_number_of_tokens_alike(seed):
    objective = objective_of({"estimator": "l_uniform", "time": "iid"})
    views = many_views(objective, random_tokens(seed, 1, 9), seed, 8000)
    count_N = (np.asarray(views.inputs_BT) == HIDDEN).sum(-1).ravel()
    assert stats.chisquare(np.bincount(count_N, minlength=9)[1:]).pvalue > 1e-6 and count_N.min() == 1
    np.testing.assert_allclose(views.noise.bound_BT.max(-1).ravel(), 8 / count_N, rtol=1e-6)


def test_weights_are_those_of_the_weighting_and_the_bound_is_kept_beside_them(seed):
    tokens = random_tokens(seed, 8, 33)
    views = {
        name: objective_of({"weighting": name, "max_weight": 3.0 if name == "clipped" else 10.0}).view(
            tokens, None, jax.random.key(seed)
        )
        for name in ("elbo", "flat", "clipped")
    }
    bound_BT = np.asarray(views["elbo"].noise.bound_BT)
    hidden_BT = np.asarray(views["elbo"].inputs_BT) == HIDDEN
    np.testing.assert_allclose(bound_BT, np.where(hidden_BT, 1 / np.asarray(views["elbo"].noise.rate_BT), 0), rtol=1e-6)
    np.testing.assert_array_equal(views["elbo"].weights_BT, bound_BT)
    np.testing.assert_array_equal(views["flat"].weights_BT, hidden_BT)
    np.testing.assert_array_equal(views["clipped"].weights_BT, np.minimum(bound_BT, 3.0))
    for view in views.values():
        np.testing.assert_array_equal(view.noise.bound_BT, bound_BT)
        assert view.count == 8 * 32  # of all tokens, never of those that happen to be hidden
        np.testing.assert_array_equal(np.where(hidden_BT, view.targets_BT, view.inputs_BT), tokens[:, 1:])


def test_block_diffusion_shows_a_clean_copy_and_stratifies_over_rows_and_blocks(seed):
    tokens, segments = random_tokens(seed, 4, 17), random_segments(seed, 4, 17)
    view = objectives.build(tiny(BLOCK).objective).view(tokens, segments, jax.random.key(seed))
    np.testing.assert_array_equal(view.inputs_BT[:, 16:], tokens[:, 1:])
    np.testing.assert_array_equal(view.segments_BT, np.concatenate([segments[:, 1:]] * 2, 1))
    level_G = np.asarray(view.noise.rate_BT).reshape(16, 4)
    assert (level_G == level_G[:, :1]).all()
    t_G = (level_G[:, 0] - 1e-3) / (1 - 1e-3)
    np.testing.assert_array_equal(np.sort(np.floor(t_G * 16 + 1e-5)), np.arange(16))


def test_rows_are_cut_for_short_contexts_and_no_token_is_lost(seed):
    rate, T, num = 0.3, 32, 3000
    objective = objective_of({"random_length": rate})
    views = many_views(objective, random_tokens(seed, 4, T + 1), seed, num)
    segments_NT = np.asarray(views.segments_BT).reshape(-1, T)
    first_N = (segments_NT == segments_NT[:, :1]).sum(1)
    assert (np.diff(segments_NT, axis=1) != 0).sum(1).max() == 1
    expected = T * (1 - rate) + rate * (1 + T) / 2
    assert abs(first_N.mean() - expected) < 5 * first_N.std() / math.sqrt(len(first_N))
    assert (np.asarray(views.count) == 4 * T).all()
    packed = random_segments(seed, 4, T + 1)
    cut = many_views(objective, random_tokens(seed, 4, T + 1), seed, 50, packed).segments_BT
    changes = np.diff(packed[:, 1:], axis=1) != 0
    assert (np.diff(np.asarray(cut), axis=2)[:, changes] != 0).all()  # documents stay apart


@pytest.mark.parametrize("changes", [MDM, BLOCK], ids=["masked", "block"])
@pytest.mark.parametrize("time", ["jitter", "low_discrepancy", "antithetic"])
def test_every_place_in_a_batch_meets_all_noise_levels_alike(changes, time, seed):
    """Places belong to sources of a mixture, and to blocks: none of them may always be the clean one."""
    objective = objectives.build(tiny(changes | {"objective.diffusion.time": time}).objective)
    rates = np.asarray(many_views(objective, random_tokens(seed, 4, 17), seed, 2000).noise.rate_BT)
    for rate_N in rates.reshape(2000, -1).T[:: 4 if changes is BLOCK else 16]:
        assert stats.kstest(rate_N, "uniform", (1e-3, 1 - 1e-3)).pvalue > 1e-6


# ---- what is seen ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """(model, params, logits of inputs and segments under full attention)."""
    cfg = ladder.resolved(tiny(MDM))
    model = models.build(cfg.model)
    return model, draw(model), jax.jit(lambda params, x, seg=None: model.apply(params, x, seg, "full")[0])


def test_every_shown_token_on_either_side_matters_and_a_hidden_one_does_not(network, seed):
    _, params, apply = network
    tokens = random_tokens(seed, 1, 17)
    hidden = np.zeros((1, 17), bool)
    hidden[0, 9] = True

    def logits(changed_at=None):
        changed = tokens.copy()
        if changed_at is not None:
            changed[0, changed_at] = (changed[0, changed_at] + 1) % 32
        return np.asarray(apply(params, np.where(hidden, HIDDEN, changed)[:, 1:]))[0]

    plain = logits()
    for place in (2, 8, 10, 16):
        assert np.abs(logits(place)[8] - plain[8]).max() > 1e-4, place
    np.testing.assert_array_equal(logits(9), plain)
    assert plain.shape[-1] == 32  # no column for the mask


def test_the_mask_has_an_embedding_of_its_own_that_is_counted_and_predicts_nothing():
    cfg, plain = (ladder.resolved(tiny(changes)) for changes in (MDM, {}))
    model = models.build(cfg.model)
    assert model.specs["embed"]["mask"].shape == (16,) and "mask" not in models.build(plain.model).specs["embed"]
    assert ladder.run_counts(cfg).embedding == ladder.run_counts(plain).embedding + 16
    assert models.count_params(model.specs, cfg.model) == ladder.run_counts(cfg)
    assert ladder.run_counts(tiny(MDM)) == ladder.run_counts(cfg)
    for key in ("flops_per_token", "non_embedding"):  # equal books: the objective alone differs
        a, b = (
            ladder.run_flops_per_token(c) if key == "flops_per_token" else ladder.run_counts(c).non_embedding
            for c in (cfg, plain)
        )
        assert a == b
    doubled = ladder.run_flops_per_token(tiny(BLOCK))
    assert doubled["without_head"] == 2 * ladder.run_flops_per_token(plain)["without_head"]
    assert doubled["with_head"] - doubled["without_head"] == 6 * 32 * 16
    with pytest.raises(ConfigError, match=r"model.mask_row='no'"):
        tiny({**MDM, "model.mask_row": "no"})


def test_the_loss_has_no_gradient_at_shown_positions(network, seed):
    model, params, _ = network
    view = jax.jit(objective_of().view)(random_tokens(seed, 4, 17), None, jax.random.key(seed))
    x_BTD, _ = jax.jit(model.hidden, static_argnums=3)(params, view.inputs_BT, None, "full")

    def loss(x_BTD, readout, view):
        return objectives.weighted_loss(model.unembed, readout, x_BTD, view, 0.0)[0]

    gradient_BT = np.abs(jax.jit(jax.grad(loss))(x_BTD, model.readout(params), view)).max(-1)
    assert ((gradient_BT > 0) == (np.asarray(view.inputs_BT) == HIDDEN)).all()


def test_a_later_block_does_not_leak_into_earlier_ones(seed):
    """Changing the clean copy of block j leaves the noisy blocks up to and with j as they are."""
    cfg = ladder.resolved(tiny(BLOCK))
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    params, tokens = draw(model), random_tokens(seed, 2, 16)
    apply = jax.jit(lambda params, x: model.apply(params, x, None, objective.attention)[0])
    noisy = np.where(np.random.default_rng(seed).random((2, 16)) < 0.5, HIDDEN, tokens)
    plain = np.asarray(apply(params, np.concatenate([noisy, tokens], 1)))[:, :16]
    for j in range(4):
        changed = tokens.copy()
        changed[:, 4 * j + 1] = (changed[:, 4 * j + 1] + 1) % 32
        differs_T = (np.asarray(apply(params, np.concatenate([noisy, changed], 1)))[:, :16] != plain).any((0, 2))
        assert not differs_T[: 4 * (j + 1)].any()
        assert j == 3 or differs_T[4 * (j + 1) :].all()


def test_one_block_is_masked_diffusion_and_blocks_of_one_are_the_chain_rule(seed):
    whole, masked = (tiny({**BLOCK, "objective.diffusion.block": 16}), tiny(MDM))
    cfg = ladder.resolved(whole)
    model = models.build(cfg.model)
    params, tokens = draw(model), random_tokens(seed, 4, 17)
    losses = []
    for each in (whole, masked):
        objective = objectives.build(each.objective)

        @jax.jit
        def loss_of(params, tokens, key, objective=objective):
            view = objective.view(tokens, None, key)
            x_BTD, _ = model.hidden(params, view.inputs_BT, None, objective.attention)
            return objectives.weighted_loss(model.unembed, model.readout(params), x_BTD[:, :16], view, 0.0)[0]

        losses.append(float(loss_of(params, tokens, jax.random.key(seed))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    one = objectives.build(tiny({**BLOCK, "objective.diffusion.block": 1}).objective)
    view = jax.jit(one.score)(tokens, None, jax.random.key(0), 0)  # all hidden: a block of one has no other level
    assert (np.asarray(view.inputs_BT)[:, :16] == HIDDEN).all() and (np.asarray(view.noise.bound_BT) == 1).all()

    @jax.jit
    def in_parallel(params, view):
        x_BTD, _ = model.hidden(params, view.inputs_BT, None, one.attention)
        return objectives.token_losses(model.unembed, model.readout(params), x_BTD[:, :16], view.targets_BT)

    nll_BT = np.asarray(in_parallel(params, view))
    log_probs = jax.jit(lambda params, x: jax.nn.log_softmax(model.apply(params, x, None, "block_causal:1")[0]))
    for t in range(16):  # a clean prefix and one mask, each on its own
        prefix = np.concatenate([tokens[:, 1 : t + 1], np.full((4, 1), HIDDEN)], 1)
        padded = np.pad(prefix, ((0, 0), (0, 15 - t)))
        alone = -np.asarray(log_probs(params, padded))[np.arange(4), t, tokens[:, t + 1]]
        np.testing.assert_allclose(nll_BT[:, t], alone, atol=1e-5)


def test_a_shifted_model_predicts_each_token_from_the_position_before_it(seed):
    tokens = random_tokens(seed, 64, 17)
    view = objective_of({"alignment": "shifted"}).view(tokens, None, jax.random.key(seed))
    inputs, hidden = np.asarray(view.inputs_BT), np.asarray(view.inputs_BT) == HIDDEN
    assert not hidden[:, 0].any() and hidden[:, 1:].any()
    np.testing.assert_array_equal(inputs[~hidden], tokens[:, :-1][~hidden])
    np.testing.assert_array_equal(view.targets_BT[:, :-1], tokens[:, 1:-1])
    np.testing.assert_array_equal(np.asarray(view.weights_BT)[:, :-1] > 0, hidden[:, 1:])
    assert (np.asarray(view.weights_BT)[:, -1] == 0).all() and view.count == 64 * 15


def test_a_shifted_network_is_a_denoiser_that_looks_up_the_position_before(seed):
    cfg = ladder.resolved(tiny(MDM | {"objective.diffusion.alignment": "shifted"}))
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    params, tokens = jax.tree.map(jnp.asarray, draw(model)), random_tokens(seed, 2, 16)
    tokens[:, 5:] = 32
    log_probs = denoiser.of_model(model, params, objective, mask_id=32)(tokens)
    shown = np.where(tokens == 32, HIDDEN, tokens)
    logits, _ = jax.jit(model.apply, static_argnums=3)(params, shown, np.ones_like(tokens), "full")
    np.testing.assert_allclose(log_probs[:, 1:], special.log_softmax(logits, -1)[:, :-1], atol=1e-5)
    trained = train_one(MDM | {"objective.diffusion.alignment": "shifted"}, seed, 2)
    assert np.isfinite(trained.loss).all()


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["next_token", "masked_diffusion", "block_diffusion"])
def test_a_shown_prompt_is_never_hidden_nor_scored(name, seed):
    end = 31
    tokens, segments = random_tokens(seed, 64, 17, vocab=31), random_segments(seed, 64, 17)
    tokens[np.random.default_rng(seed).random(tokens.shape) < 0.2] = end
    cfg = ObjectiveConfig(name=name, prompt="shown", prompt_end=end, diffusion=DiffusionConfig(block=4))
    view = objectives.build(cfg).view(tokens, segments, jax.random.key(seed))
    prompt_BT = np.zeros((64, 16), bool)
    for b in range(64):  # token by token
        for t in range(1, 17):
            same = [s for s in range(1, t) if segments[b, s] == segments[b, t]]
            prompt_BT[b, t - 1] = not any(tokens[b, s] == end for s in same)
    assert 0.2 < prompt_BT.mean() < 0.9
    weights_BT = np.asarray(view.weights_BT)
    assert not weights_BT[prompt_BT].any() and weights_BT[~prompt_BT].any()
    assert view.count == (~prompt_BT).sum()
    if name != "next_token":
        assert not (np.asarray(view.inputs_BT)[:, :16] == HIDDEN)[prompt_BT].any()
        np.testing.assert_array_equal(np.asarray(view.noise.scored_BT), ~prompt_BT)
    else:
        assert (weights_BT[~prompt_BT] == 1).all()


def test_the_normaliser_is_over_tokens_or_over_rows(seed):
    tokens = random_tokens(seed, 3, 17, vocab=31)
    for row, at in enumerate((4, 9, 15)):
        tokens[row, at] = 31
    for name in ("next_token", "masked_diffusion"):
        per = {}
        for normaliser in ("token", "sequence"):
            cfg = ObjectiveConfig(name=name, prompt="shown", prompt_end=31, normaliser=normaliser)
            per[normaliser] = objectives.build(cfg).view(tokens, None, jax.random.key(seed))
        answers_B1 = np.array([[12], [7], [1]])
        np.testing.assert_allclose(per["sequence"].weights_BT, per["token"].weights_BT / answers_B1, rtol=1e-6)
        assert (per["token"].count, per["sequence"].count) == (20, 3)


def test_rows_with_nothing_to_score_change_a_mean_and_no_sum(seed):
    tokens = random_tokens(seed, 2, 17, vocab=31)
    tokens[:, 1] = 31
    cfg = ObjectiveConfig(name="masked_diffusion", prompt="shown", prompt_end=31, diffusion=DiffusionConfig(time="iid"))
    objective = objectives.build(cfg)
    more = np.concatenate([tokens, np.full((1, 17), 7)])  # no prompt end: all prompt
    view = objective.view(more.astype(np.int32), None, jax.random.key(seed))
    assert view.count == objective.view(tokens, None, jax.random.key(seed)).count == 30
    assert not np.asarray(view.weights_BT)[2].any() and np.isfinite(np.asarray(view.noise.rate_BT)).all()


# ---- through training ------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_whole_batch(seed):
    """On the same masks: these are drawn for the whole batch before it is split."""
    whole = train_one(MDM, seed, 3)
    parts = train_one({**MDM, "optim.micro_batches": 4}, seed, 3)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    assert_same(parts.state.params, whole.state.params, atol=2e-3)


def test_two_devices_lose_as_much_as_one(seed):
    one, two = (train_one(MDM | {"mesh.data": n}, seed, 4, devices=n) for n in (1, 2))
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-5)


@pytest.mark.parametrize("changes", [MDM, MDM | {"objective.loss_chunk": 16}], ids=["whole", "chunks"])
def test_what_logs_show_is_the_bound_and_the_loss_by_noise_level(changes, seed):
    flat = {**changes, "objective.diffusion.weighting": "flat"}
    cfg, prog = tiny({**flat, "train.steps": 1}), solo(flat)
    batches = random_batches(seed, cfg, 1)
    state = init(prog, [cfg])
    params = jax.tree.map(lambda a: np.asarray(a[0]), state.params)
    hyper = jax.tree.map(lambda a: a[None], hypers(cfg, range(4)))
    tokens, segments = (np.repeat(a[None], 4, 1) for a in batches)
    _, metrics = prog.train(state, tokens, segments, hyper, np.ones(1, np.int32))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.train.seed), program.VIEW), 0)
    view = prog.objective.view(batches[0][0], batches[1][0], key)

    @jax.jit
    def losses(params, view):
        x_BTD, _ = prog.model.hidden(params, view.inputs_BT, view.segments_BT, "full")
        return objectives.token_losses(prog.model.unembed, prog.model.readout(params), x_BTD, view.targets_BT)

    nll_BT = np.asarray(losses(params, view))
    hidden_BT, rate_BT = np.asarray(view.inputs_BT) == HIDDEN, np.asarray(view.noise.rate_BT)
    shown = {name: np.asarray(values)[0, 0] for name, values in metrics.objective.items()}
    assert metrics.loss[0, 0] == pytest.approx(nll_BT[hidden_BT].sum() / 64, rel=1e-5)
    assert shown["nelbo"] == pytest.approx((nll_BT / rate_BT)[hidden_BT].sum() / 64, rel=1e-5)
    assert shown["masked"] == pytest.approx(hidden_BT.mean())
    for level in range(8):
        here = hidden_BT & (np.floor(rate_BT * 8).clip(0, 7) == level)
        np.testing.assert_allclose(
            shown["loss_by_noise"][level], nll_BT[here].mean() if here.any() else np.nan, rtol=1e-5
        )


def test_a_models_own_loss_is_added_once_whatever_the_noise(seed):
    """With experts whose router balances nothing, the auxiliary loss is the same at every weight of the bound."""
    experts = {"model.moe.num_experts": 4, "model.moe.expert_width": 12, "model.moe.balance_weight": 0.5}
    cfg = ladder.resolved(tiny(MDM | experts))
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    hyper = jax.tree.map(lambda a: a[0], hypers(cfg, [0]))
    view = objective.view(random_tokens(seed, 4, 17), None, jax.random.key(seed))
    gradient = jax.jit(program.make_gradient(cfg, model, objective))
    params = draw(model)
    heavy = view._replace(weights_BT=view.weights_BT * 7.0)
    silent = view._replace(weights_BT=view.weights_BT * 0.0)
    g, g7, g0 = (gradient(params, v, hyper)[0]["blocks"]["moe"]["router"] for v in (view, heavy, silent))
    np.testing.assert_allclose(g7 - g0, 7 * (g - g0), rtol=2e-3, atol=1e-6)
    assert np.abs(g0).max() > 1e-4  # the balance loss alone


@pytest.mark.parametrize(
    "changes",
    [MDM | {"optim.micro_batches": 2, "objective.diffusion.random_length": 0.2}, BLOCK | {"optim.ema_decay": 0.9}],
    ids=["masked", "block"],
)
def test_masks_go_on_bit_for_bit_after_a_stop(changes, tmp_path, seed):
    run = make_run({**changes, "log.eval_every": 8})
    runs.train_here(tmp_path / "straight", run)
    for step in sorted(np.random.default_rng(seed).choice(np.arange(1, 24), 2, replace=False)):
        runs.stop_at(tmp_path / "stopped", run, int(step))
    assert runs.train_here(tmp_path / "stopped", run) == {run.run_id: "done"}
    runs.assert_same(tmp_path / "straight", tmp_path / "stopped", run)
    logged = runs.load(tmp_path / "straight", run)
    assert logged.start["loss_kind"] == "bound" and logged.start["family"] in ("mdm", "block")
    assert {"nelbo", "loss_by_noise", "masked"} <= set(logged.train[-1])


def test_families_are_told_apart_by_what_their_loss_is():
    moe = {"model.moe.num_experts": 4}
    for changes, kind, expected in (
        ({}, "exact", "dense"), (moe, "exact", "moe"), (MDM, "bound", "mdm"), (MDM | moe, "bound", "mdm-moe"),
        (BLOCK, "bound", "block"), ({"objective.name": "lab.mine"}, "exact", "dense"),
        ({"objective.name": "lab.mine"}, "bound", "lab.mine"),
    ):  # fmt: skip
        assert member.family(tiny(changes), kind) == expected


def test_held_out_noise_hangs_on_the_row_alone(seed):
    """The same row has the same bound in whatever batch and company, and every run is judged on the same masks."""
    cfg, prog = tiny(MDM), solo(MDM)
    state = init(prog, [cfg])
    tokens, segments = (a[:1] for a in random_batches(seed, cfg, 1))
    nll, weight = prog.evaluate(state, tokens, segments)
    turned, _ = prog.evaluate(state, tokens[:, ::-1], segments[:, ::-1])
    np.testing.assert_allclose(turned[:, ::-1], nll, rtol=1e-5)
    assert (np.asarray(weight) == 16).all() and len(np.unique(np.asarray(nll))) == 4


def test_more_draws_have_the_same_mean_and_less_spread(seed):
    changes = MDM | {"data.packing": "concat"}
    cfg = tiny(changes)
    tokens = random_tokens(seed, 40, 4, 17)
    found = {}
    for draws in (1, 8, 64):
        prog = solo(changes | {"objective.diffusion.eval_draws": draws})
        state = init(prog, [cfg])
        found[draws] = np.array([prog.evaluate(state, t[None], np.ones_like(t)[None])[0] for t in tokens]).ravel()
    off = {draws: found[draws] - found[64] for draws in (1, 8)}
    assert off[8].std() < 0.6 * off[1].std()
    assert abs(off[1].mean()) < 5 * off[1].std() / math.sqrt(160)


def test_a_population_masks_each_member_by_its_own_seed(seed):

    prog = population(2, "spread", MDM)
    cfgs = [tiny(MDM | {"train.seed": s, "train.steps": 4}) for s in (0, 1)]
    batch = random_batches(seed, cfgs[0], 4)
    both = train(prog, cfgs, [batch, batch])
    alone = train(solo(MDM), cfgs[1:], [batch])
    np.testing.assert_allclose(both.loss[1], alone.loss[0], rtol=1e-5)
    assert (both.loss[0] != both.loss[1]).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective.diffusion.eps": 1.0}, "objective.diffusion"),
        ({"objective.diffusion.min_rate": 0.5}, "no effect with objective.name='next_token'"),
        (MDM | {"objective.diffusion.block": 8}, "no effect with objective.name='masked_diffusion'"),
        (BLOCK | {"objective.diffusion.block": 5}, "does not divide data.seq_len=16"),
        (BLOCK | {"objective.diffusion.random_length": 0.5}, "no effect"),
        (MDM | {"objective.diffusion.min_rate": 0.5, "objective.diffusion.max_rate": 0.4}, "min_rate=0.5"),
        (MDM | {"objective.diffusion.time": "stratified"}, "jitter"),
        (MDM | {"objective.diffusion.time": "antithetic", "train.batch_size": 3}, "train.batch_size=3"),
        (MDM | {"objective.diffusion.estimator": "l_uniform", "objective.diffusion.min_rate": 0.1}, "l_uniform"),
        (MDM | {"objective.diffusion.max_weight": 2.0}, "weighting='elbo'"),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(changes, words):
    with pytest.raises(config.ConfigError, match=words):
        tiny(changes)
