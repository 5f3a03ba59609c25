"""Optimizers are optax's with each tensor's own factors; decay is apart from the rate; clipping and Hyper are exact."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_same, draw, tiny

from slmjax import config, models, optim
from slmjax.models import ParamSpec, is_spec
from slmjax.parametrization import Rule


def toy(**rules: Rule):
    """A model of one 6 x 4 tensor per rule, and one of its parameters."""
    specs = {name: ParamSpec((6, 4), ("embed", "mlp"), "hidden", 6) for name in rules}
    fake = types.SimpleNamespace(specs=specs, rules=lambda spec: NotImplemented)
    by_id = {id(specs[name]): rule for name, rule in rules.items()}
    fake.rules = lambda spec: by_id[id(spec)]
    return fake, {name: normal(i, 6, 4) for i, name in enumerate(rules)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hyper(**values) -> optim.Hyper:
    """Numbers of no special value, replaced by `values`."""
    base = optim.hyper_at(tiny({"optim.lr": 0.03, "optim.b1": 0.8, "optim.b2": 0.9, "optim.weight_decay": 0.2}), 1.0)
    return base._replace(**{key: np.float32(value) for key, value in values.items()})


def updates(cfg, model, params, gradients, hyper):
    """Parameters after each of some gradients."""
    optimizer = optim.build(cfg, model)
    update, state, seen = jax.jit(optimizer.update), optimizer.init(params), []
    for grads in gradients:
        params, state = update(grads, state, params, hyper)
        seen.append(params)
    return seen


def test_adamw_is_optaxs_when_factors_are_one(seed):
    model, params = toy(w=Rule(1.0))
    gradients = [{"w": normal(seed + i, 6, 4) * 10.0**i} for i in range(-3, 3)]
    h = hyper(eps=1e-3)
    theirs = optax.adamw(0.03, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2)
    state, expected = theirs.init(params), params
    for grads, ours in zip(gradients, updates(config.OptimConfig(), model, params, gradients, h), strict=True):
        step, state = theirs.update(grads, state, expected)
        expected = optax.apply_updates(expected, step)
        assert_same(ours, expected, rtol=2e-6, atol=1e-6)


def test_a_rate_factor_scales_the_step_and_not_the_decay(seed):
    model, params = toy(one=Rule(1.0), tenth=Rule(1.0, lr=0.1))
    params["tenth"] = params["one"]
    gradients = [dict.fromkeys(params, normal(seed, 6, 4))]
    [after] = updates(config.OptimConfig(), model, params, gradients, hyper())
    kept = params["one"] * np.float32(1 - 0.03 * 0.2)
    np.testing.assert_allclose(after["tenth"] - kept, 0.1 * (after["one"] - kept), atol=1e-6)


def test_an_eps_factor_is_adam_with_that_eps(seed):
    model, params = toy(scaled=Rule(1.0, eps=1 / 8), plain=Rule(1.0))
    params["plain"] = params["scaled"]
    gradients = [dict.fromkeys(params, 1e-3 * normal(seed + i, 6, 4)) for i in range(3)]
    with_factor = updates(config.OptimConfig(), model, params, gradients, hyper(eps=8e-3))
    with_eps = updates(config.OptimConfig(), model, params, gradients, hyper(eps=1e-3))
    for a, b in zip(with_factor, with_eps, strict=True):
        np.testing.assert_allclose(a["scaled"], b["plain"], rtol=1e-5, atol=1e-6)
        assert np.abs(a["scaled"] - a["plain"]).max() > 1e-3


SCHEMES = ("sp", "mup", "minicpm", "completep", "umup")


def scheme_model(scheme: str, **changes):
    values = {"name": scheme, "base_width": 4, "base_layers": 1, "depth_alpha": 0.5}
    parametrization = {f"model.parametrization.{key}": value for key, value in values.items()}
    model = models.build(tiny({**parametrization, "model.tied_embeddings": False, **changes}).model)
    return model, draw(model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_a_gradient_a_weight_decays_by_its_rule_whatever_its_rate(scheme, name):
    model, params = scheme_model(scheme)
    cfg = tiny({"optim.name": name, "optim.lr": 0.03, "optim.weight_decay": 0.2})
    independent = config.override(cfg, {"optim.decay_rule": "independent"})
    optimizer = optim.build(cfg.optim, model)
    update = jax.jit(lambda h: optimizer.update(zeros, optimizer.init(params), params, h)[0])
    zeros = jax.tree.map(np.zeros_like, params)
    rules = jax.tree.map(model.rules, model.specs, is_leaf=is_spec)
    for each, share in ((cfg, 0.5 * 0.2 * 0.03), (independent, 0.5 * 0.2)):
        h = optim.hyper_at(each, 0.5)
        assert h.decay == pytest.approx(share, rel=1e-6) and h.lr == pytest.approx(0.015, rel=1e-6)
        expected = jax.tree.map(lambda w, r: w * np.float32(1 - share * r.decay), params, rules)  # noqa: B023
        assert_same(update(h), expected, rtol=1e-6)
    factors = {"norm": 1.0 if scheme == "minicpm" else 0.0, "hidden": 1 / 4 if scheme == "minicpm" else 1.0}
    for spec in jax.tree.leaves(model.specs, is_leaf=is_spec):
        assert model.rules(spec).decay == factors.get(spec.role, 1.0)


@pytest.fixture(scope="module")
def muon_step():
    """(model, params, gradients, parameters after one Muon step without decay) at a rate of 1, under mup at m = 4."""
    model, params = scheme_model("mup", **{"model.width": 16, "model.mlp_width": 40})
    grads = jax.tree.map(lambda w: normal(w.size, *w.shape), params)
    h = hyper(lr=1.0, decay=0.0)
    optimizer = optim.build(config.OptimConfig(name="muon"), model)
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params, h)[0])
    return model, params, grads, update


def test_muon_updates_have_the_root_mean_square_of_adamws(seed):
    # Moonlight (2502.16982): 0.2 times the rate, within 10% because five Newton-Schulz steps are approximate; smaller
    # matrices than these come out up to 13% low.
    specs = {
        "in": ParamSpec((2, 256, 640), ("layer", "embed", "mlp"), "hidden", 256),
        "out": ParamSpec((2, 8, 80, 256), ("layer", "heads", "head", "embed"), "hidden", 640),
    }
    model = types.SimpleNamespace(specs=specs, rules=lambda spec: Rule(1.0, lr=7.0, orthogonal_lr=0.5))
    zeros = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    grads = {name: normal(seed, *spec.shape) for name, spec in specs.items()}
    [moved] = updates(config.OptimConfig(name="muon"), model, zeros, [grads], hyper(lr=1.0))
    for name in specs:
        for layer in range(2):
            assert np.sqrt(np.mean(np.square(moved[name][layer]))) == pytest.approx(0.5 * 0.2, rel=0.1), (name, layer)


def test_muon_orthogonalises_every_layer_by_itself(muon_step):
    _, params, grads, update = muon_step
    plain = update(grads)["blocks"]["mlp"]["up"]
    louder = jax.tree.map(np.copy, grads)
    louder["blocks"]["mlp"]["up"][0] *= 100
    np.testing.assert_allclose(update(louder)["blocks"]["mlp"]["up"], plain, atol=2e-3)
    other = jax.tree.map(np.copy, grads)
    other["blocks"]["mlp"]["up"][0] = normal(99, 16, 40)
    changed = update(other)["blocks"]["mlp"]["up"]
    np.testing.assert_array_equal(changed[1], plain[1])
    assert np.abs(changed[0] - plain[0]).max() > 0.01
    # A matrix near orthogonal: its singular values are alike, those of the gradient are not.
    moved = np.asarray(plain - params["blocks"]["mlp"]["up"])[1]
    values, before = (np.linalg.svd(a, compute_uv=False) for a in (moved, grads["blocks"]["mlp"]["up"][1]))
    assert values.max() / values.min() < 2 < before.max() / before.min()


def test_muon_orthogonalises_every_expert_by_itself(seed):
    """An expert whose gradient is louder moves no further than the others, and the router is left to Adam."""
    model = models.build(tiny({"model.moe.num_experts": 4, "model.moe.expert_width": 40}).model)
    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), model.specs, is_leaf=is_spec)
    grads = jax.tree.map(lambda w: normal(seed + w.size, *w.shape), params)
    louder = jax.tree.map(np.copy, grads)
    louder["blocks"]["moe"]["up"][:, 1] *= 100
    muon = config.OptimConfig(name="muon")
    ours, loud = (updates(muon, model, params, [g], hyper(lr=1.0))[0]["blocks"]["moe"] for g in (grads, louder))
    np.testing.assert_allclose(loud["up"], ours["up"], atol=2e-3)
    for expert in range(4):
        values = np.linalg.svd(ours["up"][0, expert], compute_uv=False)
        assert values.max() / values.min() < 2
    [adam] = updates(config.OptimConfig(), model, params, [grads], hyper(lr=1.0))
    assert_same(ours["router"], adam["blocks"]["moe"]["router"], rtol=1e-6, atol=1e-6)
    assert (np.asarray(ours["balance"]) == 0).all()


def test_muon_leaves_embedding_head_and_norms_to_adam(muon_step):
    model, params, grads, update = muon_step
    ours = update(grads)
    [adam] = updates(config.OptimConfig(), model, params, [grads], hyper(lr=1.0, decay=0.0))
    for tree in (ours, adam):
        for part in tree["blocks"].values():
            for name in set(part) - {"gain"}:
                del part[name]
    assert_same(ours, adam, rtol=1e-6, atol=1e-6)


def test_muons_momentum_is_an_input(muon_step):
    model, params, grads, _ = muon_step
    other = jax.tree.map(lambda g: normal(g.size + 1, *g.shape), grads)
    muon = config.OptimConfig(name="muon")
    low, high = (updates(muon, model, params, [grads, other], hyper(momentum=m))[1] for m in (0.1, 0.9))
    assert np.abs(low["blocks"]["mlp"]["up"] - high["blocks"]["mlp"]["up"]).max() > 1e-3
    np.testing.assert_array_equal(low["embed"]["table"], high["embed"]["table"])


def test_clip_scales_to_the_norm_and_leaves_smaller_gradients_alone(seed):
    grads = {"a": normal(seed, 3, 4), "b": {"c": normal(seed + 1, 5)}}
    norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads))))
    clipped, before = optim.clip(grads, 0.5)
    assert before == pytest.approx(norm, rel=1e-6)
    assert_same(clipped, jax.tree.map(lambda g: g * np.float32(0.5 / norm), grads), rtol=1e-5)
    for limit in (norm * 1.01, 0.0):
        same, before = optim.clip(grads, jnp.float32(limit))
        assert_same(same, grads)
        assert before == pytest.approx(norm, rel=1e-6)


def test_what_reaches_hyper_does_not_change_the_program():
    base = config.flatten(tiny())
    others = {"optim.decay_rule": "independent", "optim.name": "muon"}
    for key in base:
        if key.startswith(("optim.", "objective.", "train.")) and isinstance(base[key], int | float | str):
            value = others.get(key) or (base[key] * 0.5 or 0.25 if isinstance(base[key], float) else None)
            value = value or ("lab.mine" if isinstance(base[key], str) else base[key] * 2 or 1)
            reached = optim.hyper_at(config.override(tiny(), {key: value}), 0.5) != optim.hyper_at(tiny(), 0.5)
            assert reached == (key in config.HYPER - {"optim.max_skips", "train.steps", "train.eval_sequences"}), key


def test_hyper_is_the_configs_numbers_times_the_schedule():
    changes = {
        "optim.lr": 0.02, "optim.weight_decay": 0.3, "optim.b1": 0.7, "optim.b2": 0.8, "optim.eps": 1e-6,
        "optim.momentum": 0.6, "optim.clip_norm": 2.0, "optim.ema_decay": 0.5, "optim.spike_factor": 4.0,
        "objective.z_loss": 1e-4, "train.seed": 5, "model.moe.num_experts": 4, "model.moe.balance_weight": 0.03,
        "model.moe.z_weight": 0.002, "model.moe.bias_rate": 0.004,
    }  # fmt: skip
    h = optim.hyper_at(tiny(changes), 0.25)
    assert h == optim.Hyper(
        *(np.float32(v) for v in (0.005, 0.0015, 0.7, 0.8, 1e-6, 0.6, 2.0, 0.5, 4.0, 1e-4, 0.03, 0.002, 0.004)),
        seed=np.uint32(5),
    )
    assert {leaf.dtype for leaf in h[:-1]} == {np.dtype("float32")} and h.seed.dtype == np.uint32
