"""Mixture of experts: what the router chooses and reports, what balances it, and what a run of it trains and records.
What experts compute and how tokens reach them is tested in test_experts and test_dispatch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import train_here
from tiny import assert_same, built, draw, init, random_batches, random_tokens, solo, tiny, train, train_one

from slmjax import config, models, objectives, optim, program, records, study
from slmjax.config import ConfigError, MoeConfig
from slmjax.models import is_spec, moe
from slmjax.models.layers import Mlp

EXPERTS = {"model.moe.num_experts": 4, "model.moe.experts_per_token": 2, "model.moe.expert_width": 12}
GATES = ("softmax", "topk_softmax", "sigmoid")


route = jax.jit(moe.route, static_argnums=2)


def routed(logits_NE, bias_E=None, **fields) -> moe.Routing:
    cfg = MoeConfig(num_experts=logits_NE.shape[1], **fields)
    bias_E = np.zeros(cfg.num_experts, np.float32) if bias_E is None else np.asarray(bias_E, np.float32)
    return jax.tree.map(lambda a: np.asarray(a)[0], route(jnp.asarray(logits_NE)[None], bias_E, cfg))


def random_logits(seed, N=64, E=8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, E)).astype(np.float32)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize("gate", GATES)
def test_the_largest_logits_are_chosen_and_weighted_by_the_gate(gate, seed):
    logits_NE = random_logits(seed)
    routing = routed(logits_NE, gate=gate, experts_per_token=3, renormalise=False, routed_scale=2.5)
    order_NA = np.argsort(-logits_NE, axis=1)[:, :3]
    assert (routing.expert_BTA == order_NA).all()
    chosen_NA = np.take_along_axis(logits_NE, order_NA, 1)
    expected = {
        "softmax": np.take_along_axis(softmax(logits_NE), order_NA, 1),
        "topk_softmax": softmax(chosen_NA),
        "sigmoid": 1 / (1 + np.exp(-chosen_NA)),
    }[gate]
    np.testing.assert_allclose(routing.weight_BTA, 2.5 * expected, rtol=1e-5)
    np.testing.assert_allclose(routing.probability_BTE.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_renormalised_weights_sum_to_one(gate, seed):
    weight_NA = routed(random_logits(seed), gate=gate, renormalise=True).weight_BTA
    np.testing.assert_allclose(weight_NA.sum(1), 1, rtol=1e-5)
    if gate == "softmax":  # over all and then renormalised is over the chosen ones
        other_NA = routed(random_logits(seed), gate="topk_softmax", renormalise=False).weight_BTA
        np.testing.assert_allclose(weight_NA, other_NA, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_the_bias_moves_the_choice_and_not_the_weights(gate, seed):
    logits_NE = random_logits(seed)
    plain, biased = (routed(logits_NE, bias, gate=gate, renormalise=False) for bias in (None, [9] + [0] * 7))
    assert (biased.expert_BTA[:, 0] == 0).all() and not (plain.expert_BTA[:, 0] == 0).all()
    score_NE = logits_NE if gate == "topk_softmax" else plain.score_BTE
    weight_NA = np.take_along_axis(score_NE, biased.expert_BTA, 1)
    np.testing.assert_allclose(
        biased.weight_BTA, softmax(weight_NA) if gate == "topk_softmax" else weight_NA, rtol=1e-5
    )


def sums_of(count_E, probability_E) -> moe.Sums:
    """Of one layer, for tokens that chose and were sure as said."""
    count_E, tokens = np.asarray(count_E, np.float32)[None], np.float32(np.sum(probability_E))[None]
    zero = np.zeros(1, np.float32)
    return moe.Sums(count_E, np.asarray(probability_E, np.float32)[None], zero, zero, zero, tokens)


def balance(count_E, probability_E) -> float:
    sums = sums_of(count_E, probability_E)
    return float(moe.balance_loss(sums, sums)[0])


def test_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all():
    assert balance([10] * 8, [5] * 8) == pytest.approx(1, abs=1e-6)
    assert balance([80] + [0] * 7, [80] + [0] * 7) == pytest.approx(8, abs=1e-6)
    assert float(moe.max_violation(np.full((1, 8), 10.0))[0]) == 0
    assert float(moe.max_violation(np.array([[80.0] + [0] * 7]))[0]) == pytest.approx(7)
    skew = [balance(q, q) for s in (0, 1, 2, 4) for q in [80 * softmax(s * np.linspace(0, 1, 8))]]
    assert all(a < b for a, b in itertools.pairwise(skew))


def of_layer(changes, seed):
    """(params, function of them and x) of one expert layer: output and Sums."""
    cfg = tiny(EXPERTS | changes).model
    layer = moe.Moe(cfg)
    specs = models.build(cfg).specs["blocks"]["moe"]
    params = jax.tree.map(lambda a: a[0], draw(models.build(cfg)._replace(specs=specs), seed))
    return params, lambda params, x_BTD: layer.apply({"params": params}, x_BTD, "causal"), cfg


def test_the_balance_loss_has_a_gradient_that_evens_the_load(seed):
    params, apply, _ = of_layer({"model.moe.experts_per_token": 1, "model.moe.renormalise": False}, seed)
    x_BTD = np.random.default_rng(seed).normal(size=(4, 32, 16)).astype(np.float32)
    x_BTD[..., 0] = 1  # what all tokens share makes them prefer the first experts
    params["router"][0] = np.linspace(1, -1, 4)

    def loss(params):
        _, sums = apply(params, x_BTD)
        sums = jax.tree.map(lambda a: a[None], sums)
        return moe.balance_loss(sums, jax.lax.stop_gradient(sums))[0], moe.max_violation(sums.count_E)[0]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, uneven), grad = step(params)
    assert np.abs(grad["router"]).max() > 1e-3
    assert all(np.abs(grad[name]).max() == 0 for name in ("up", "gate", "down", "balance"))
    for _ in range(100):
        params = {**params, "router": params["router"] - 0.3 * step(params)[1]["router"]}
    (after, even), _ = step(params)  # may lie a little below 1: loads and probabilities are not the same numbers
    assert after < 1.02 < 1.05 < before and even < uneven / 2


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_the_loss_free_bias_evens_a_skewed_router_and_leaves_its_weights_alone(gate, seed):
    """A router that much prefers its first experts, on new tokens at every step (2408.15664)."""
    rng, E = np.random.default_rng(seed), 8
    cfg = MoeConfig(num_experts=E, gate=gate)
    skew_E = np.linspace(1, -1, E).astype(np.float32)
    bias_ME = np.zeros((1, E), np.float32)
    loads = []
    for step in range(400):
        logits_BTE = (skew_E + rng.normal(size=(1, 2048, E))).astype(np.float32)
        routing = moe.route(logits_BTE, bias_ME[0], cfg)
        count_ME = np.bincount(np.ravel(routing.expert_BTA), minlength=E)[None].astype(np.float32)
        loads.append(float(moe.max_violation(count_ME)[0]))
        bias_ME = np.asarray(moe.next_bias(bias_ME, count_ME, 0.01 if step < 300 else 0.001, gate))
    assert loads[0] > 0.5 and np.mean(loads[-20:]) < 0.1
    assert abs(bias_ME.sum()) < 1e-4


def test_an_even_load_leaves_the_bias_where_it_is():
    bias_ME = np.array([[0.5, -0.25, -0.25]], np.float32)
    for gate in ("sigmoid", "softmax"):
        assert_same(moe.next_bias(bias_ME, np.full((1, 3), 7.0, np.float32), 0.1, gate), bias_ME)


SHARED = {"model.moe.num_shared_experts": 2}


@pytest.mark.parametrize("changes", [{}, SHARED, {"model.moe.gate": "sigmoid", "model.moe.routed_scale": 2.0}],
                         ids=["plain", "shared", "sigmoid"])  # fmt: skip
def test_the_layer_is_the_weighted_sum_of_its_experts(changes, seed):
    params, apply, cfg = of_layer(changes, seed)
    x_BTD = np.random.default_rng(seed).normal(size=(2, 16, 16)).astype(np.float32)
    y_BTD, sums = apply(params, x_BTD)
    routing = moe.route(x_BTD @ params["router"], params["balance"], cfg.moe)
    expected_BTD, mlp = np.zeros_like(x_BTD), Mlp(cfg, 12)
    for e in range(4):
        weights = {name: params[name][e] for name in ("up", "gate", "down")}
        weight_BT = np.where(np.asarray(routing.expert_BTA) == e, routing.weight_BTA, 0).sum(-1)
        expected_BTD = expected_BTD + weight_BT[..., None] * mlp.apply({"params": weights}, x_BTD)
    if changes == SHARED:
        expected_BTD = expected_BTD + Mlp(cfg, 24).apply({"params": params["shared"]}, x_BTD)
    np.testing.assert_allclose(y_BTD, expected_BTD, atol=1e-5)
    assert float(sums.count_E.sum()) == 2 * 16 * 2 and float(sums.tokens) == 32


def test_what_the_router_reports_is_what_it_is(seed):
    params, apply, _ = of_layer({}, seed)
    x_BTD = np.random.default_rng(seed).normal(size=(2, 16, 16)).astype(np.float32)
    _, sums = apply(params, x_BTD)
    logits_BTE = x_BTD @ params["router"]
    p_BTE = softmax(logits_BTE)
    np.testing.assert_allclose(sums.probability_E, p_BTE.sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(sums.entropy, -(p_BTE * np.log(p_BTE)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.squared_partition, (np.log(np.exp(logits_BTE).sum(-1)) ** 2).sum(), rtol=1e-4)


def test_a_model_of_dense_and_expert_layers_is_the_same_scanned():
    mixed = {**EXPERTS, "model.num_layers": 5, "model.moe.leading_dense_layers": 1, "model.moe.every": 2}
    cfg = tiny(mixed).model
    assert cfg.feed_forwards == ("mlp", "mlp", "moe", "mlp", "moe")
    specs = models.build(cfg).specs["blocks"]
    assert {name: jax.tree.leaves(part, is_leaf=is_spec)[0].shape[0] for name, part in specs.items()} == {
        "attention": 5, "attention_norm": 5, "mlp_norm": 5, "mlp": 3, "moe": 2}  # fmt: skip
    one, scanned = (built(mixed | {"model.scan_layers": scan}) for scan in (False, True))
    tokens_BT = random_tokens(0, 2, 16)
    np.testing.assert_allclose(one.apply(one.params, tokens_BT), scanned.apply(one.params, tokens_BT), atol=2e-5)


def test_expert_choice_refuses_a_causal_objective_and_takes_another(seed):
    chosen = {**EXPERTS, "model.moe.dispatch": "expert_choice"}
    with pytest.raises(ConfigError, match="leaks what is to be predicted"):
        tiny(chosen)
    cfg = config.override(tiny(EXPERTS), {"model.moe.dispatch": "expert_choice"})
    model = models.build(cfg.model)
    with pytest.raises(ConfigError, match="leaks what is to be predicted"):
        model.hidden(draw(model), random_tokens(0, 2, 16), None, "causal")
    _, extras = jax.jit(model.hidden, static_argnums=3)(draw(model), random_tokens(seed, 2, 16), None, "full")
    assert (np.ptp(extras["sums"].count_E, axis=1) == 0).all()  # every expert takes as many


def test_a_capacity_of_every_token_is_dropless_and_a_small_one_drops(seed):
    tokens_BT = random_tokens(seed, 2, 16)
    dropless = built(EXPERTS)
    capacity = {**EXPERTS, "model.moe.dispatch": "capacity"}
    wide, narrow = (built({**capacity, "model.moe.capacity_factor": factor}) for factor in (2.0, 0.5))
    logits = [np.asarray(m.apply(dropless.params, tokens_BT)) for m in (dropless, wide, narrow)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert np.abs(logits[2] - logits[0]).max() > 1e-3
    _, extras = jax.jit(narrow.model.hidden)(dropless.params, tokens_BT)
    assert (extras["sums"].dropped >= 2 * 2 * 16 / 2).all()  # half as many places as choices


BALANCED = {**EXPERTS, "model.moe.balance_weight": 0.5, "model.moe.z_weight": 0.1, "model.moe.bias_rate": 0.01}


def test_the_balance_of_a_split_batch_is_that_of_the_whole(seed):
    """Loads are the whole batch's: the update is the same from micro-batches and from devices that share the batch."""
    whole = train_one({**BALANCED, "optim.eps": 1e-3}, seed, 4)
    for changes, devices in (({"optim.micro_batches": 4}, 1), ({"mesh.data": 2, "mesh.expert": 2}, 4)):
        split = train_one({**BALANCED, "optim.eps": 1e-3, **changes}, seed, 4, devices)
        np.testing.assert_allclose(split.loss, whole.loss, rtol=1e-5)
        assert_same(jax.device_get(split.state.params), jax.device_get(whole.state.params), rtol=1e-3, atol=1e-5)


def test_the_weights_of_the_router_losses_are_inputs_of_the_step(seed):
    """One program; and each of them reaches the parameters it should."""
    cfg, prog = tiny(EXPERTS), solo(EXPERTS)
    batches = [random_batches(seed, cfg, 8)]
    ends = {}
    off = {"model.moe.balance_weight": 0.0, "model.moe.z_weight": 0.0}
    for key in (None, "model.moe.balance_weight", "model.moe.z_weight", "model.moe.bias_rate"):
        run = tiny({**EXPERTS, **off, **({key: 0.5} if key else {})})
        assert config.program_id(run) == config.program_id(cfg)
        ends[key] = jax.device_get(train(prog, [run], batches).state.params["blocks"]["moe"])
    assert prog.train._cache_size() == 1
    for key in list(ends)[1:]:
        assert (ends[key]["router"] != ends[None]["router"]).any(), key
        assert (ends[key]["balance"] != 0).any() == (key == "model.moe.bias_rate"), key


def test_evaluation_sees_the_bias_and_leaves_it_alone(seed, tmp_path):
    """A run evaluated at every second step ends in the bits of one that was not."""
    cfg, prog = tiny(BALANCED), solo(BALANCED)
    tokens, segments = random_batches(seed, cfg, 1)
    state, losses = init(prog, [cfg]), []
    for pushed in (0, 100):
        balance = state.params["blocks"]["moe"]["balance"].at[:, :, 0].set(pushed)
        experts = {**state.params["blocks"]["moe"], "balance": balance}
        moved = state._replace(params={**state.params, "blocks": {**state.params["blocks"], "moe": experts}})
        losses.append(np.sum(prog.evaluate(moved, tokens, segments)[0]))
    assert losses[0] != losses[1]
    ends = []
    for every in (0, 2):
        run = study.Run(config.override(cfg, {"log.eval_every": every, "train.eval_sequences": 8}))
        assert train_here(tmp_path / str(every), run, members=1) == {run.run_id: "done"}
        logged = records.load_run(tmp_path / str(every) / run.run_id)
        ends.append([(line["loss"], line["load"]) for line in logged.train])
        assert len(logged.evals) == (4 if every else 1)
    assert ends[0] == ends[1]


def test_a_skipped_update_leaves_the_bias_alone(seed):
    cfg = tiny(BALANCED)
    model = models.build(cfg.model)
    optimizer = optim.build(cfg.optim, model)
    state = program.init_member(model, optimizer, False, np.uint32(0), np.float32(0.2))
    spiked = state._replace(skips=state.skips._replace(mean_norm=jnp.float32(1e-9)))
    step = jax.jit(program.make_train_step(cfg, model, objectives.build(cfg.objective), optimizer))
    tokens, segments = (a[0] for a in random_batches(seed, cfg, 1))
    hyper = optim.hyper_at(cfg, 1.0)
    after, _ = step(spiked, tokens, segments, hyper._replace(spike_factor=np.float32(2)))
    assert_same(after.params, state.params)


def test_a_run_records_load_violation_entropy_and_drops_of_every_layer(tmp_path):
    capacity = {"model.moe.dispatch": "capacity", "model.moe.capacity_factor": 0.5}
    cfg = tiny({**EXPERTS, **capacity, "log.log_every": 2, "train.eval_sequences": 8})
    run = study.Run(cfg)
    assert train_here(tmp_path, run, members=1) == {run.run_id: "done"}
    logged = records.load_run(tmp_path / run.run_id)
    assert logged.start["family"] == "moe" and logged.start["counts"]["experts"] > 0
    for line in logged.train:
        load_ME = np.array(line["load"])
        assert load_ME.shape == (2, 4) and load_ME.sum(1) == pytest.approx(1, abs=1e-4)
        assert np.array(line["max_vio"]) == pytest.approx(4 * load_ME.max(1) - 1, abs=1e-4)
        assert all(0 < h <= np.log(4) + 1e-4 for h in line["entropy"]) and all(0.4 < d < 1 for d in line["dropped"])
        assert len(line["balance_loss"]) == len(line["z_loss"]) == 2
