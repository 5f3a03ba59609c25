"""The compiled step: one compilation for a sweep; the same numbers on any mesh, batch split or population; skips."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    Trained,
    assert_same,
    hypers,
    init,
    population,
    random_batches,
    random_tokens,
    solo,
    tiny,
    train,
    train_one,
)

from slmjax import config, models, objectives, optim, program, schedules, sharding, study
from slmjax.config import ConfigError
from slmjax.objectives import Objective, View


def member(state, index: int = 0):
    return jax.tree.map(lambda a: np.asarray(a[index]), state)


@contextlib.contextmanager
def compilations():
    """A list that grows by one for every program XLA is asked for, wherever in the process."""
    seen, active = [], True

    def listen(event: str, duration: float, **kwargs):
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active = False


def test_the_counter_counts():
    with compilations() as seen:
        jax.jit(lambda x: x + np.random.default_rng().integers(1 << 30))(1)
    assert len(seen) == 1


def test_a_sweep_of_one_shape_compiles_once():
    """6 learning rates x 2 seeds x 2 horizons, and everything else that is an input of the step."""
    sweep = study.product(
        study.axis("optim.lr", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
        study.axis("train.seed", [1, 2]),
        study.axis("train.steps", [3, 6]),
    )
    others = [
        {"model.parametrization.init_std": 0.05}, {"optim.weight_decay": 0.5}, {"optim.b1": 0.5}, {"optim.b2": 0.5},
        {"optim.eps": 1e-3}, {"optim.clip_norm": 0.1}, {"objective.z_loss": 0.1}, {"optim.ema_decay": 0.5},
        {"optim.spike_factor": 1.01}, {"schedule.name": "wsd", "schedule.decay_steps": 3},
        {"schedule.name": "cosine", "schedule.warmup_steps": 2}, {"train.eval_sequences": 3}, {"data.seed": 9},
    ]  # fmt: skip
    base = tiny({"optim.ema_decay": 0.9, "train.steps": 6})
    runs = study.Study("sweep", base, study.chain(sweep, [study.Cell(changes) for changes in others])).runs
    assert len(runs) == 24 + len(others) and len(study.packs(runs)) == 1
    prog, ends = solo({"optim.ema_decay": 0.9}), []
    train(prog, [runs[0].config], [random_batches(0, base, 6)])
    with compilations() as seen:
        for run in runs:
            batches = random_batches(run.config.data.seed, base, 6)
            ends.append(jax.device_get(train(prog, [run.config], [batches]).state))
    assert seen == []
    assert prog.train._cache_size() == 1
    # And each of them reached the step: no two runs end alike, but for the one that only counts evaluation rows.
    prints = [tuple(float(np.sum(np.abs(leaf), dtype=np.float64)) for leaf in jax.tree.leaves(e)) for e in ends]
    assert len(set(prints)) == len(runs) - 1


MESHES = [
    {"mesh.data": 4},
    {"mesh.data": 1, "mesh.fsdp": 4},
    {"mesh.data": 2, "mesh.tensor": 2},
    {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "objective.loss_chunk": 16, "optim.micro_batches": 2},
]
EXPERTS = {"model.moe.num_experts": 4, "model.moe.expert_width": 12, "model.moe.bias_rate": 0.01}
EXPERT_MESHES = [{"mesh.expert": 4}, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2},
                 {"mesh.data": 1, "mesh.tensor": 2, "mesh.expert": 2, "optim.micro_batches": 2}]  # fmt: skip


@pytest.mark.parametrize(
    "mesh",
    [*MESHES, *(EXPERTS | mesh for mesh in EXPERT_MESHES)],
    ids=lambda m: "-".join(f"{k.split('.')[1]}{v}" for k, v in m.items()),
)
def test_four_devices_give_the_losses_of_one(mesh, seed):
    changes = {"optim.lr": 0.02, "optim.eps": 1e-4, "train.steps": 8} | {k: v for k, v in mesh.items() if k in EXPERTS}
    # One batch, eight times: it is learned, so the updates must be the same too. An eps above the smallest gradients,
    # for of those that are rounding alone Adam makes whole steps.
    batches = [jax.tree.map(lambda a: np.repeat(a, 8, 0), random_batches(seed, tiny(), 1))]
    one, four = (train(solo(c, devices), [tiny(c)], batches) for c, devices in ((changes, 1), ({**changes, **mesh}, 4)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(four.state.params)} == {4}
    np.testing.assert_allclose(four.loss, one.loss, atol=1e-5, rtol=0)
    assert one.loss[0, -1] < one.loss[0, 0] - 0.1


def uneven_weights(tokens_BT1, segments_BT1, key) -> View:
    """Rows and positions that count for different amounts, some for nothing."""
    targets_BT = tokens_BT1[:, 1:]
    weights_BT = (targets_BT % 5) * (jnp.arange(targets_BT.shape[0])[:, None] + 1.0)
    return View(tokens_BT1[:, :-1], targets_BT, weights_BT, segments_BT1[:, :-1], jnp.sum(weights_BT))


def one_update(changes: dict, objective: Objective, tokens, segments):
    cfg = tiny({**changes, "objective.z_loss": 1e-2, "optim.eps": 1e-3})
    model = models.build(cfg.model)
    optimizer = optim.build(cfg.optim, model)
    state = program.init_member(model, optimizer, False, np.uint32(0), np.float32(0.2))
    step = jax.jit(program.make_train_step(cfg, model, objective, optimizer))
    return step(state, tokens, segments, optim.hyper_at(cfg, 1.0))


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("weights", ["even", "uneven"])
def test_micro_batches_are_one_batch(weights, changes, seed):
    objective = objectives.build(config.ObjectiveConfig())
    objective = objective if weights == "even" else objective._replace(view=uneven_weights)
    cfg = tiny()
    tokens, segments = (a[0] for a in random_batches(seed, cfg, 1))
    state, metrics = one_update(changes, objective, tokens, segments)
    for k in (2, 4):
        split, split_metrics = one_update({**changes, "optim.micro_batches": k}, objective, tokens, segments)
        assert_same(split_metrics, metrics, rtol=1e-5)
        assert_same(split.params, state.params, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_held_out_loss_of_the_same_batch_before_the_update(seed):
    cfg, prog = tiny({"train.steps": 1}), solo()
    tokens, segments = random_batches(seed, cfg, 1)
    nll, weight = prog.evaluate(init(prog, [cfg]), tokens, segments)
    trained = train(prog, [cfg], [(tokens, segments)])
    assert weight.shape == (1, 4) and (weight == 16).all()
    assert np.sum(nll) / np.sum(weight) == pytest.approx(trained.loss[0, 0], rel=1e-6)


def test_training_learns():
    cfg = tiny({"train.steps": 60, "optim.lr": 0.02})
    tokens = np.cumsum(np.full((60, 4, 17), 3), -1, dtype=np.int32) + random_tokens(0, 60, 4, 1)
    trained = train(solo(), [cfg], [(tokens % 32, np.ones_like(tokens))])
    assert trained.loss[0, 0] > 3 and trained.loss[0, -1] < 0.3


HORIZONS = [
    {"train.steps": 6, "optim.lr": 0.03},
    {"train.steps": 3, "train.seed": 7},
    {"train.steps": 8, "optim.b1": 0.5},
]


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("how", ["spread", "batched"])
def test_members_of_a_population_are_solo_runs(how, changes, seed):
    # eps above the smallest gradients, which without it rounding alone may move by a share of a whole update
    cfgs = [tiny({"optim.eps": 1e-3} | changes | horizon) for horizon in HORIZONS]
    batches = [random_batches(seed + i, cfg, cfg.train.steps) for i, cfg in enumerate(cfgs)]
    together = train(population(3, how, changes), cfgs, batches)
    for i, cfg in enumerate(cfgs):
        alone, n = train(solo(changes), [cfg], [batches[i]]), cfg.train.steps
        # The weights of two chosen experts magnify the rounding of their logits.
        np.testing.assert_allclose(together.loss[i, :n], alone.loss[0, :n], rtol=1e-5 if changes else 1e-6)
        assert (together.loss[i, n:] == 0).all() and (together.grad_norm[i, n:] == 0).all()
        assert int(together.state.step[i]) == int(alone.state.step[0]) == n
        # Where a gradient is about zero, Adam makes rounding a share of a whole update: allow a hundredth of one, and a
        # twentieth where it has passed a router.
        share = 0.05 if changes else 0.01
        assert_same(member(together.state, i), member(alone.state), rtol=2e-4, atol=share * cfg.optim.lr)
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(together.state)}
    assert devices == {3 if how == "spread" else 1}


def test_a_members_bits_depend_neither_on_its_place_nor_on_the_others(seed):
    """So a pack that is killed and goes on with fewer members, elsewhere placed, ends at the same bits."""
    cfgs = [tiny(changes) for changes in HORIZONS]
    batches = [random_batches(seed + i, cfg, cfg.train.steps) for i, cfg in enumerate(cfgs)]
    three = train(population(3, "spread"), cfgs, batches)
    for order in ((2, 0), (0, 1)):
        two = train(population(2, "spread"), [cfgs[i] for i in order], [batches[i] for i in order])
        for place, i in enumerate(order):
            assert_same(member(two.state, place), member(three.state, i))


@pytest.mark.parametrize("how", ["spread", "batched"])
def test_members_are_taken_out_and_put_back(how):
    prog, cfgs = population(3, how), [tiny(changes) for changes in HORIZONS]
    state = init(prog, cfgs)
    before = [member(state, i) for i in range(3)]
    taken = prog.take(state, 1)
    assert_same(jax.tree.map(np.asarray, taken), before[1])
    assert jax.tree.structure(taken) == jax.tree.structure(prog.abstract_member)
    state = prog.put(state, taken, 2)
    for place, expected in enumerate((before[0], before[1], before[1])):
        assert_same(member(state, place), expected)
    # What comes out of one program goes into another: a checkpoint does not know how it was trained.
    assert_same(member(solo().put(init(solo(), cfgs[:1]), jax.device_get(taken), 0)), before[1])


def test_a_stretch_may_be_cut_anywhere(seed):
    """A dispatch of 4 is the same as 1 + 3: a run can be resumed, evaluated or saved after any step."""
    cfg = tiny({"train.steps": 4, "schedule.name": "cosine"})
    prog, (tokens, segments) = solo(), random_batches(seed, cfg, 4)
    whole = train(prog, [cfg], [(tokens, segments)])
    state, losses = init(prog, [cfg]), []
    for first, count in ((0, 1), (1, 3)):
        index = np.minimum(np.arange(first, first + 4), 3)
        hyper = jax.tree.map(lambda a: a[None], hypers(cfg, index))
        rows = tokens[None, index], segments[None, index]
        state, metrics = prog.train(state, *rows, hyper, np.array([count], np.int32))
        losses.append(np.asarray(metrics.loss)[0, :count])
    assert_same(state, whole.state)
    np.testing.assert_array_equal(np.concatenate(losses), whole.loss[0])


def test_the_seed_and_the_init_scale_choose_the_start():
    prog = solo()
    a, b, wide = (init(prog, [tiny(c)]) for c in ({}, {"train.seed": 1}, {"model.parametrization.init_std": 0.4}))
    table = a.params["embed"]["table"]
    assert np.abs(table - b.params["embed"]["table"]).max() > 0.1
    np.testing.assert_allclose(wide.params["embed"]["table"], 2 * table, rtol=1e-6)
    assert a.step == 0 and a.ema == ()


def test_packing_concat_ignores_segments(seed):
    segments, concat = solo(), solo({"data.packing": "concat"})
    cfg = tiny({"train.steps": 1})
    tokens, marks = random_batches(seed, cfg, 1)
    ones = np.ones_like(marks)
    for prog, same in ((concat, True), (segments, False)):
        a, b = (train(prog, [cfg], [(tokens, m)]).loss[0, 0] for m in (marks, ones))
        assert (a == b) == same


def one_step_at_a_time(prog, cfg, batches):
    """The member's state after 0, 1, 2, ... steps."""
    state = init(prog, [cfg])
    states, (tokens, segments) = [member(state)], batches
    for step in range(cfg.train.steps):
        index = [step] * 4
        hyper = jax.tree.map(lambda a: a[None], hypers(cfg, index))
        state, _ = prog.train(state, tokens[None, index], segments[None, index], hyper, np.ones(1, np.int32))
        states.append(member(state))
    return states


def test_ema_is_the_average_it_says_and_what_is_evaluated(seed):
    cfg, prog = tiny({"optim.ema_decay": 0.7, "train.steps": 5}), solo({"optim.ema_decay": 0.7})
    batches = random_batches(seed, cfg, 5)
    states = one_step_at_a_time(prog, cfg, batches)
    # e_n = d^n p_0 + (1 - d) sum d^(n - i) p_i
    weights = [0.7**5] + [0.3 * 0.7 ** (5 - i) for i in range(1, 6)]
    expected = jax.tree.map(
        lambda *ps: sum(w * p for w, p in zip(weights, ps, strict=True)), *(state.params for state in states)
    )
    assert_same(states[-1].ema, expected, rtol=1e-5, atol=1e-6)
    tokens, segments = (a[:1] for a in batches)
    state = jax.tree.map(lambda a: a[None], states[-1])
    swapped = state._replace(params=jax.tree.map(np.zeros_like, state.params))
    assert_same(prog.evaluate(state, tokens, segments), prog.evaluate(swapped, tokens, segments))


@pytest.mark.parametrize("kind", ["nan", "inf", "spike"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_batch_is_skipped_as_if_the_optimizer_never_saw_it(kind, optimizer, seed):
    changes = {"optim.name": optimizer, "optim.spike_factor": 50.0, "optim.ema_decay": 0.5}
    cfg, prog = tiny({**changes, "train.steps": 6}), solo(changes)
    tokens, segments = random_batches(seed, cfg, 6)
    poison = {"nan": np.nan, "inf": np.inf, "spike": 1e4}[kind]  # z_loss's weight at that step

    def poisoned(first, hyper):
        z_loss = hyper.z_loss.copy()
        if first == 0:
            z_loss[0, 2] = poison
        return hyper._replace(z_loss=z_loss)

    bad = train(prog, [cfg], [(tokens, segments)], edit=poisoned)
    kept = [0, 1, 3, 4, 5]
    clean = train(prog, [tiny({**changes, "train.steps": 5})], [(tokens[kept], segments[kept])])
    np.testing.assert_array_equal(bad.loss[0, kept], clean.loss[0, :5])
    assert bad.state.skips.total == 1 and clean.state.skips.total == 0
    assert bad.state.skips.consecutive == 0
    assert bad.state.step == 6 and clean.state.step == 5
    skips = bad.state.skips._replace(total=clean.state.skips.total)
    assert_same(bad.state._replace(step=clean.state.step, skips=skips), clean.state)


def test_skips_in_a_row_are_counted_and_a_spike_is_not_one_when_the_factor_is_zero(seed):
    cfg = tiny({"train.steps": 4})
    data = random_batches(seed, cfg, 4)

    def poisoned(value):
        def edit(first, hyper):
            z_loss = np.zeros((1, 4), np.float32)
            z_loss[0, 2:] = value
            return hyper._replace(z_loss=z_loss)

        return edit

    nan, large = (train(solo(), [cfg], [data], edit=poisoned(value)).state.skips for value in (np.nan, 1e4))
    assert (nan.total, nan.consecutive) == (2, 2) and (large.total, large.consecutive) == (0, 0)
    assert np.isfinite(large.mean_norm)


def test_a_schedule_of_zero_and_no_decay_changes_nothing(seed):
    cfg = tiny({"train.steps": 4, "optim.weight_decay": 0.0})
    idle = train(
        solo(), [cfg], [random_batches(seed, cfg, 4)], edit=lambda first, h: h._replace(lr=np.zeros_like(h.lr))
    )
    assert_same(member(idle.state).params, member(init(solo(), [cfg])).params)


def test_the_rate_of_every_step_is_the_schedules(seed):
    """Under plain sign-like Adam (b1 = b2 = 0) a step moves a weight by the rate, so the rate can be read off it."""
    changes = {"optim.b1": 0.0, "optim.b2": 0.0, "optim.eps": 1e-30, "optim.weight_decay": 0.0, "optim.clip_norm": 0.0}
    cfg = tiny({**changes, "train.steps": 6, "schedule.name": "wsd", "schedule.warmup_steps": 2,
                "schedule.decay_steps": 3, "optim.lr": 0.01})  # fmt: skip
    states = one_step_at_a_time(solo(changes), cfg, random_batches(seed, cfg, 6))
    tables = [s.params["blocks"]["mlp"]["up"] for s in states]
    moved = [np.median(np.abs(b - a)) for a, b in itertools.pairwise(tables)]
    np.testing.assert_allclose(moved, 0.01 * schedules.multipliers(cfg, 0, 6), rtol=1e-3)


def test_a_population_that_does_not_fit_its_mesh_is_a_bug_of_ours():
    with pytest.raises(AssertionError):
        program.build(tiny(), 3, sharding.make_mesh(config.MeshConfig(data=1), 2, jax.devices()[:2]))


def test_a_shape_that_its_mesh_does_not_divide_is_refused_before_compiling():
    with pytest.raises(ConfigError, match=r"key has 2 along 'kv_heads'.*mesh.tensor=4"):
        solo({"mesh.tensor": 4}, devices=4)


def test_what_trained_gives_back_is_what_it_says():
    trained = train_one({}, 0, num_steps=5)
    assert isinstance(trained, Trained) and trained.loss.shape == (1, 8)
    assert (trained.loss[0, :5] > 0).all() and (trained.loss[0, 5:] == 0).all()
