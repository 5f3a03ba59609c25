"""What every model family, objective, and fork of either is held to; they are found, not listed."""

import importlib
import math
import pkgutil
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_same, draw, random_segments, random_tokens, tiny, train

import slmjax.models
import slmjax.objectives
from slmjax import config, ladder, models, objectives, optim, program, schedules, sharding
from slmjax.models import ParamSpec, attention, init_from_specs, is_spec
from slmjax.parametrization import ROLES, Parametrization

SCHEMES = ("sp", "mup", "minicpm", "completep", "umup")


def families(package) -> list[str]:
    """Modules of a package that export build."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "build")]


OBJECTIVES = families(slmjax.objectives)
# Every family, and the transformer also with experts for its feed-forwards.
EXPERTS = {"model.moe.num_experts": 4, "model.moe.expert_width": 12, "model.moe.num_shared_experts": 1}
CAPACITY = {"model.moe.dispatch": "capacity", "model.moe.capacity_factor": 0.5}
FAMILIES = {name: {"model.build": name} for name in families(slmjax.models)}
FAMILIES |= {"moe": EXPERTS, "moe_capacity": EXPERTS | CAPACITY}
EVERY_PART = {"model.qk_norm": True, "model.tied_embeddings": False, "model.scan_layers": True}


def pair(family: str, objective: str):
    """(config, Model, Objective) with every optional part of a model switched on."""
    changes = {"objective.diffusion.block": 4} if objective == "block_diffusion" else {}
    if objective == "block_diffusion" and family == "moe_capacity":
        pytest.skip("a bounded number of places lets later blocks push out earlier ones: refused")
    cfg = ladder.resolved(tiny({**EVERY_PART, **FAMILIES[family], "objective.name": objective, **changes}))
    return cfg, models.build(cfg.model), objectives.build(cfg.objective)


def test_families_are_found():
    assert "transformer" in FAMILIES and {"next_token", "masked_diffusion", "block_diffusion"} <= set(OBJECTIVES)


def test_what_is_found_can_be_named_in_a_config():
    for family in FAMILIES:
        for objective in OBJECTIVES:
            if (family, objective) != ("moe_capacity", "block_diffusion"):
                pair(family, objective)  # validates


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_as_the_specs_say(family):
    cfg, model, _ = pair(family, OBJECTIVES[0])
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(model.specs, is_leaf=is_spec)
    for (path, spec), leaf in zip(specs_of(model), jax.tree.leaves(params), strict=True):
        assert leaf.shape == spec.shape and leaf.dtype == jnp.float32, path
        assert len(spec.axes) == len(spec.shape) and set(spec.axes) <= set(sharding.RULES), path
        assert spec.role in ROLES and spec.fan_in >= 1, path
        assert "layer" not in spec.axes[1:] and (not spec.in_block or spec.shape[0] == cfg.model.num_layers), path
        if spec.role == "hidden":
            # The dimensions a product sums over come first, after layers and experts; initial scales depend on it.
            inner = [n for n, axis in zip(spec.shape, spec.axes, strict=True) if axis not in ("layer", "expert")]
            assert spec.fan_in in np.cumprod(inner), path


def specs_of(model) -> list[tuple[str, ParamSpec]]:
    leaves = jax.tree_util.tree_leaves_with_path(model.specs, is_leaf=is_spec)
    return [(".".join(entry.key for entry in path), spec) for path, spec in leaves]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_have_their_shapes_and_the_readout_is_all_that_unembed_reads(family):
    cfg, model, _ = pair(family, OBJECTIVES[0])
    params, tokens_BT = draw(model), random_tokens(0, 2, 16)
    x_BTD, _ = jax.eval_shape(model.hidden, params, tokens_BT)
    assert x_BTD.shape == (2, 16, cfg.model.width)
    for shape in ((cfg.model.width,), (3, cfg.model.width), (2, 3, cfg.model.width)):
        logits = jax.eval_shape(model.unembed, model.readout(params), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert logits.shape == (*shape[:-1], 32) and logits.dtype == jnp.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_drawn_from_the_key_and_its_own_path_alone(family):
    cfg, model, _ = pair(family, OBJECTIVES[0])
    grown = {"aaa": {"first": ParamSpec((3, 5), ("embed", "mlp"), "hidden", 3)}, **model.specs}
    key = jax.random.key(3)
    a, b, other = (jax.jit(f)(k) for f, k in (
        (model.init, key), (init_from_specs(grown, cfg.model), key), (model.init, jax.random.key(4))
    ))  # fmt: skip
    assert_same({name: b[name] for name in a}, a)
    weights = [w for w in jax.tree.leaves(a) if np.ptp(w) > 0]
    assert len({float(w.ravel()[0]) for w in weights}) == len(weights)
    for w, w_other in zip(jax.tree.leaves(a), jax.tree.leaves(other), strict=True):
        assert np.ptp(w) == 0 or (np.asarray(w) != np.asarray(w_other)).any()


@pytest.fixture(params=[(f, o) for f in FAMILIES for o in OBJECTIVES], ids="-".join, scope="module")
def trio(request):
    """(Model, Objective, compiled (params, tokens, segments) → ((loss, logits), gradient))."""
    _, model, objective = pair(*request.param)

    def loss(params, tokens_BT1, segments_BT1):
        view = objective.view(tokens_BT1, segments_BT1, jax.random.key(0))
        x_BTD, _ = model.hidden(params, view.inputs_BT, view.segments_BT, objective.attention)
        x_BTD = x_BTD[:, : view.targets_BT.shape[1]]
        value, _ = objectives.weighted_loss(model.unembed, model.readout(params), x_BTD, view, 1e-3)
        return value, model.unembed(model.readout(params), x_BTD)

    return model, objective, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_gradients_are_finite_and_every_parameter_has_one(trio, seed):
    model, _, gradient = trio
    (loss, _), grads = gradient(draw(model), random_tokens(seed, 2, 17), random_segments(seed, 2, 17))
    assert math.isfinite(loss)
    for (path, spec), grad in zip(specs_of(model), jax.tree.leaves(grads), strict=True):
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad).max() > 0) == (spec.role != "balance"), path


def test_the_future_does_not_leak_where_the_objective_is_causal(trio, seed):
    model, objective, gradient = trio
    tokens, segments = random_tokens(seed, 2, 17), np.ones((2, 17), np.int32)
    for position in (4, 11):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 1) % 32
        a, b = (np.asarray(gradient(draw(model), t, segments)[0][1]) for t in (tokens, changed))
        differs_T = (a != b).any((0, 2))
        assert differs_T[position:].any()
        if objective.attention == "causal":
            assert not differs_T[:position].any()


def test_an_objective_says_what_it_is(trio):
    _, objective, _ = trio
    assert attention.parse(objective.attention) and objective.kind in ("exact", "bound")
    tokens, segments = random_tokens(0, 4, 17), random_segments(0, 4, 17)
    a, b = (objective.view(tokens, segments, jax.random.key(1)) for _ in range(2))
    assert_same(a, b)
    copies = 2 if objective.attention.startswith("block:") else 1
    assert a.inputs_BT.shape == a.segments_BT.shape == (4, copies * 16)
    assert a.targets_BT.shape == a.weights_BT.shape == (4, 16)
    assert a.count > 0 and (np.asarray(a.weights_BT) >= 0).all()
    assert objective.view(tokens, None, jax.random.key(1)).segments_BT is None


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "moe_capacity"])  # its tree is moe's
def test_the_parameter_tree_is_frozen(family, golden):
    """Paths and shapes are the format of checkpoints; scales and rates are what a result was trained with."""
    lines = []
    for scheme in SCHEMES:
        values = {"name": scheme, "base_width": 4, "base_layers": 1, "depth_alpha": 0.5, "init_std": 0.1}
        changes = {f"model.parametrization.{key}": value for key, value in values.items()}
        cfg = tiny({**EVERY_PART, **changes, **FAMILIES[family]}).model
        model, p = models.build(cfg), Parametrization(cfg)
        lines += [f"# {scheme}, 4 x the base width, 2 x the base depth", "path shape axes init decay lr_mult"]
        for path, spec in specs_of(model):
            rule = model.rules(spec)
            init = "1" if spec.role == "norm" else "0" if spec.role in ("bias", "balance") else f"{rule.init_std:.6g}"
            shape, axes = ("x".join(map(str, spec.shape)), ",".join(spec.axes))
            lines.append(f"{path} {shape} {axes} {init} {rule.decay:.6g} {rule.lr:.6g}")
        forward = (p.embed_multiplier, *p.residual(0), *p.residual(1), p.attention_scale, p.logits_multiplier)
        lines += ["embed, residual branches, attention and logits: " + " ".join(f"{x:.6g}" for x in forward), ""]
    golden(f"{family}.txt", "\n".join(lines))


FORK = {
    "model.py": """
        import jax
        import jax.numpy as jnp
        from slmjax.models import Model, ParamSpec, init_from_specs
        from slmjax.parametrization import Parametrization

        def build(cfg):
            V, D, N = cfg.vocab_size, cfg.width, cfg.options["context"]
            specs = {
                "table": ParamSpec((V, D), ("vocab", "embed"), "embed", V),
                "mix": {"kernel": ParamSpec((N * D, D), ("mlp", "embed"), "hidden", N * D)},
                "head": ParamSpec((D, V), ("embed", "vocab"), "readout", D),
            }
            parametrization = Parametrization(cfg)

            def hidden(params, tokens_BT, segments_BT=None, attention="causal"):
                x_BTD = params["table"][tokens_BT]
                shifted = [jnp.pad(x_BTD, ((0, 0), (n, 0), (0, 0)))[:, : x_BTD.shape[1]] for n in range(N)]
                return x_BTD + jnp.tanh(jnp.concatenate(shifted, -1) @ params["mix"]["kernel"]), {}

            return Model(
                init_from_specs(specs, cfg), hidden, lambda params: params["head"],
                lambda head_DV, x: (x @ head_DV).astype(jnp.float32), specs,
                lambda spec: parametrization.rule(spec.role, spec.fan_in, spec.in_block),
            )
    """,
    "objective.py": """
        import jax.numpy as jnp
        from slmjax.objectives import Objective, View

        def build(cfg):
            def view(tokens_BT1, segments_BT1, key):
                targets_BT = tokens_BT1[:, 1:]
                weights_BT = jnp.broadcast_to(jnp.arange(targets_BT.shape[1]) >= cfg.options["skip"], targets_BT.shape)
                return View(tokens_BT1[:, :-1], targets_BT, weights_BT.astype(jnp.float32),
                            None if segments_BT1 is None else segments_BT1[:, :-1], jnp.sum(weights_BT * 1.0))

            return Objective(view, attention="causal", kind="exact")
    """,
    "optimizer.py": """
        import jax
        import jax.numpy as jnp
        import optax

        def direction(specs, rules, hyper):
            return optax.chain(optax.trace(hyper.b1), optax.stateless(lambda g, p: jax.tree.map(jnp.sign, g)))
    """,
    "schedule.py": """
        def multiplier(schedule, steps, step):
            return 1 - step / steps
    """,
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A fork's package, `lab`, importable as any other."""
    (tmp_path / "lab").mkdir()
    for name, source in FORK.items():
        (tmp_path / "lab" / name).write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name == "lab" or name.startswith("lab.")]:
        del sys.modules[name]


def test_a_fork_trains_with_files_of_its_own_and_no_edits(lab):
    cfg = tiny({
        "model.build": "lab.model", "model.options": {"context": 2}, "objective.name": "lab.objective",
        "objective.options": {"skip": 2}, "optim.name": "lab.optimizer", "schedule.name": "lab.schedule",
        "optim.lr": 0.02, "optim.b1": 0.5, "train.steps": 60, "mesh.data": 2, "mesh.fsdp": 2,
    })  # fmt: skip
    assert config.resolve(config.config_dict(cfg)) == cfg
    prog = program.build(cfg, 1, sharding.make_mesh(cfg.mesh))
    tokens = np.cumsum(np.full((60, 4, 17), 3), -1, dtype=np.int32) + random_tokens(0, 60, 4, 1)
    trained = train(prog, [cfg], [(tokens % 32, np.ones_like(tokens))])
    assert trained.loss[0, 0] > 2.5 and trained.loss[0, -1] < 0.5
    _, weight = prog.evaluate(trained.state, tokens[:1] % 32, np.ones_like(tokens[:1]))
    assert (weight == 14).all()
    assert optim.hyper_at(cfg, 0.5).lr == pytest.approx(0.01)


@pytest.mark.parametrize("key", ["model.build", "objective.name", "optim.name", "schedule.name"])
def test_a_fork_that_does_not_exist_is_refused_with_its_key(key):
    with pytest.raises(config.ConfigError, match=rf"{key}='lab.nothing'"):
        cfg = tiny({key: "lab.nothing"})
        program.build(cfg, 1, sharding.make_mesh(cfg.mesh, devices=jax.devices()[:1]))
        schedules.multiplier(cfg, 0)


def test_a_forks_module_without_what_it_must_export_is_refused(tmp_path, monkeypatch):
    (tmp_path / "half_a_fork").mkdir()
    (tmp_path / "half_a_fork" / "model.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "half_a_fork" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(config.ConfigError, match=r"model.build='half_a_fork.empty' does not export 'build'"):
        models.build(tiny({"model.build": "half_a_fork.empty"}).model)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):  # its own mistake, with its own traceback
        models.build(tiny({"model.build": "half_a_fork.model"}).model)
