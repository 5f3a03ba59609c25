"""An upcycled model is the dense one until its first update; its runs resume, branch and are counted like others."""

import shlex
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
import runs
import tiny

from slmjax import cli, config, environment, ladder, models, records, study, train, upcycle
from slmjax.config import ConfigError, StartConfig
from slmjax.launchers import Pack, driver, local
from slmjax.launchers.compare import compare
from slmjax.launchers.plan import make_plan
from slmjax.scaling.envelope import curves_of_runs
from slmjax.scaling.points.runs import load_runs, points_of_study
from slmjax.study import Cell, Run, Study, axis, branch, chain, product

START = {"start.run": "dense", "start.step": 1}


def experts(num: int, active: int, width: int = 0, **more) -> dict:
    return {
        "model.moe.num_experts": num,
        "model.moe.experts_per_token": active,
        "model.moe.expert_width": width,
        "model.moe.router_std": 0.5,  # routers that have an opinion
        **{f"model.moe.{key}": value for key, value in more.items()},
    }


class Upcycled(NamedTuple):
    dense: models.Model
    dense_params: dict
    model: models.Model
    params: dict


def upcycled(seed: int, moe: dict, dense: dict | None = None, noise=0.0, redrawn=0.0, growth=1.0) -> Upcycled:
    """A dense model, and what `upcycle` makes of it; growth: of the feed-forward's weights from layer to layer."""
    before, cfg = tiny.tiny(dense), tiny.tiny((dense or {}) | moe | START)
    dense_model, start = models.build(before.model), StartConfig("dense", 1, noise, redrawn)
    dense_params = tiny.draw(dense_model, seed)
    for a_LXY in dense_params["blocks"]["mlp"].values():
        a_LXY *= growth ** np.arange(len(a_LXY), dtype=np.float32)[:, None, None]
    make = jax.jit(lambda params, key: upcycle.upcycle(params, before.model, cfg.model, start, key))
    params = jax.tree.map(np.asarray, make(dense_params, jax.random.key(seed)))
    return Upcycled(dense_model, dense_params, models.build(cfg.model), params)


def drawn(model: models.Model, seed: int) -> dict:
    """The experts of random weights."""
    return jax.tree.map(np.asarray, jax.jit(lambda key: model.init(key)["blocks"]["moe"])(jax.random.key(seed)))


# ---- the weights ----------------------------------------------------------------------------------------------------

LEADING, EVERY, ONE = {"model.num_layers": 3}, {"model.num_layers": 4}, {"model.num_layers": 1}
COMPLETEP = {"model.parametrization.name": "completep", "model.tied_embeddings": False, "model.activation": "geglu"}
SAME = {  # mlp_width is 24
    "copies": (experts(4, 2), {}),
    "copies, top 3": (experts(8, 3, routed_scale=2.5), ONE | {"model.activation": "relu2"}),
    "2 groups": (experts(6, 4, 12, gate="topk_softmax"), ONE | {"model.activation": "gelu"}),
    "3 groups, one copy per token": (experts(6, 3, 8, gate="sigmoid"), ONE | {"model.parametrization.name": "umup"}),
    "4 groups": (experts(8, 8, 6, routed_scale=4.0), ONE | COMPLETEP),
    "leading dense layer": (experts(4, 2, 12, leading_dense_layers=1), LEADING),
    "leading dense layer, scanned": (experts(4, 2, 12, leading_dense_layers=1), LEADING | {"model.scan_layers": True}),
    "every 2nd layer": (experts(4, 2, 12, every=2), EVERY),
    "every 2nd layer, scanned": (experts(4, 2, 12, every=2), EVERY | {"model.scan_layers": True}),
    "capacity without drops": (experts(4, 2, dispatch="capacity", capacity_factor=2.0), ONE),
}


@pytest.mark.parametrize("name", SAME)
def test_logits_are_the_dense_models(name, seed):
    made = upcycled(seed, *SAME[name])
    tokens, segments = tiny.random_tokens(seed, 2, 16), tiny.random_segments(seed, 2, 16)

    @jax.jit
    def logits(dense_params, params, tokens, segments):
        apply = (made.dense.apply, dense_params), (made.model.apply, params)
        return [apply_one(its, tokens, segments)[0] for apply_one, its in apply]

    wanted, found = map(np.asarray, logits(made.dense_params, made.params, tokens, segments))
    assert np.max(np.abs(found - wanted)) < 1e-5 < 0.1 * np.std(wanted)


def of_experts(params: dict) -> dict:
    return {name: params["blocks"]["moe"][name] for name in ("up", "gate", "down")}


def test_parameters_are_laid_out_as_the_models_own_and_the_rest_is_untouched(seed):
    made = upcycled(seed, *SAME["every 2nd layer"])  # of 4 layers, the 2nd and 4th have experts
    shapes = jax.tree.map(lambda spec: spec.shape, made.model.specs, is_leaf=models.is_spec)
    assert jax.tree.map(lambda a: a.shape, made.params) == shapes
    blocks, dense = made.params["blocks"], made.dense_params["blocks"]
    np.testing.assert_array_equal(blocks["mlp"]["up"], dense["mlp"]["up"][[0, 2]])
    np.testing.assert_array_equal(blocks["moe"]["up"][:, 3], dense["mlp"]["up"][[1, 3]][..., 12:])
    np.testing.assert_array_equal(blocks["moe"]["down"][:, 2], 2 * dense["mlp"]["down"][[1, 3], :12])
    for part in ("attention", "attention_norm", "mlp_norm"):
        tiny.assert_same(blocks[part], dense[part])
    assert not np.any(blocks["moe"]["balance"])


def test_routers_are_those_of_random_weights_and_one_for_all_groups_of_a_copy(seed):
    made = upcycled(seed, experts(4, 2))
    np.testing.assert_array_equal(made.params["blocks"]["moe"]["router"], drawn(made.model, seed)["router"])
    made = upcycled(seed, experts(6, 4, 12))
    router_MDE = made.params["blocks"]["moe"]["router"]
    np.testing.assert_array_equal(router_MDE[..., 0::2], router_MDE[..., 1::2])
    assert len(np.unique(router_MDE[0, 0])) == 3


def test_copies_are_equal_at_first_and_differ_after_training(seed):
    changes = experts(4, 2) | START | {"train.steps": 8}
    cfg, prog, made = tiny.tiny(changes), tiny.solo(changes), upcycled(seed, experts(4, 2))
    for name, a_MEDF in of_experts(made.params).items():
        np.testing.assert_array_equal(a_MEDF, np.broadcast_to(a_MEDF[:, :1], a_MEDF.shape), name)
    state = prog.put(tiny.init(prog, [cfg]), prog.begin(made.params, np.int32(0)), 0)
    trained = tiny.train(prog, [cfg], [tiny.random_batches(seed, cfg, 8)], state)
    for name, a_MEDF in of_experts(jax.tree.map(lambda a: np.asarray(a[0]), trained.state.params)).items():
        gap = min(np.max(np.abs(a_MEDF[:, i] - a_MEDF[:, j])) for i in range(4) for j in range(i))
        assert gap > 1e-3 * np.std(a_MEDF), name


def test_noise_is_relative_to_each_matrix_and_other_for_each_expert(seed):
    moe, dense = experts(4, 2, 12), {"model.width": 64}
    plain, noisy = (upcycled(seed, moe, dense, noise, growth=3.0).params for noise in (0.0, 0.1))
    for name, a_MEDF in of_experts(noisy).items():
        before_MEDF = of_experts(plain)[name]
        added_MEDF = a_MEDF - before_MEDF
        ratio_ME = np.std(added_MEDF, (-2, -1)) / np.std(before_MEDF, (-2, -1))
        np.testing.assert_allclose(ratio_ME, 0.1, rtol=0.15)  # of 768 draws each; the first expert too
        correlation_EE = np.corrcoef(added_MEDF[0].reshape(4, -1))
        assert np.max(np.abs(correlation_EE - np.eye(4))) < 0.25
    for name in ("router", "balance"):
        np.testing.assert_array_equal(noisy["blocks"]["moe"][name], plain["blocks"]["moe"][name])


def test_redrawn_units_are_those_of_random_weights_others_in_each_expert(seed):
    plain, made = (upcycled(seed, experts(4, 2), redrawn=share) for share in (0.0, 0.25))
    fresh, units = drawn(made.model, seed), {}
    for name, a in of_experts(made.params).items():
        inputs = -1 if name == "down" else -2
        new, old = (np.all(a == other[name], inputs) for other in (fresh, of_experts(plain.params)))
        assert np.all(new ^ old) and np.all(new.sum(-1) == 6)  # of 24
        units[name] = new
    np.testing.assert_array_equal(units["up"], units["down"])
    np.testing.assert_array_equal(units["up"], units["gate"])
    assert len(np.unique(units["up"].reshape(-1, 24), axis=0)) > 4


# ---- what cannot be exact -------------------------------------------------------------------------------------------

REFUSED = {
    "renormalise": (experts(4, 2, renormalise=False), ("renormalise=False", "'softmax'")),
    "shared": (experts(4, 2, num_shared_experts=1), ("num_shared_experts=1",)),
    "drops": (experts(4, 2, dispatch="capacity"), ("dispatch='capacity'", "'dropless'")),
    "width": (experts(4, 2, 10), ("expert_width=10", "mlp_width=24")),
    "wider": (experts(4, 2, 48), ("expert_width=48", "mlp_width=24")),
    "experts": (experts(5, 2, 12), ("num_experts=5", "2 groups")),
    "active": (experts(6, 2, 8) | {"model.moe.num_experts": 6}, ("experts_per_token=2", "3 groups")),
    "decay": (
        experts(4, 2) | {"start.step": 7, "schedule.name": "wsd", "schedule.decay_steps": 4},
        ("start.step=7", "step 4"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_begin_as_the_dense_model_is_refused(name):
    changes, said = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        tiny.tiny(START | changes)
    assert all(word in str(error.value) for word in said), error.value


def test_models_that_differ_in_more_than_their_experts_are_refused(seed):
    dense = tiny.tiny()
    params = tiny.draw(models.build(dense.model), seed)
    for changes, said in (
        ({"model.width": 32}, "model.width=32 is 16"),
        ({"model.num_layers": 4}, "model.num_layers=4 is 2"),
        ({"model.parametrization.name": "mup"}, "model.parametrization.name='mup' is 'sp'"),
        ({"model.qk_norm": True}, "model.qk_norm"),
    ):
        cfg = tiny.tiny(experts(4, 2) | START | changes)
        with pytest.raises(ConfigError, match=said):
            upcycle.upcycle(params, dense.model, cfg.model, cfg.start, jax.random.key(seed))
    sparse = tiny.tiny(experts(4, 2))
    with pytest.raises(ConfigError, match="only a dense one"):
        upcycle.upcycle(params, sparse.model, sparse.model, sparse.start, jax.random.key(seed))


# ---- runs -----------------------------------------------------------------------------------------------------------

MOE = experts(4, 2, 16)  # two groups of 32 hidden units
FEATURES = {"optim.ema_decay": 0.9, "schedule.warmup_steps": 3}


def from_trunk(features=None, **start) -> list[Run]:
    """A dense run of 8 steps, the trunk with experts that begins from it, and its branches of 16 and 24 steps."""
    cells = study.upcycle([Cell(MOE | {"model.moe.bias_rate": 0.001})], at=8, **start)
    return Study("s", runs.make_config(features), branch(cells, (16, 24), decay_fraction=0.25)).runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of dense and upcycled branches, trained straight through."""
    out = tmp_path_factory.mktemp("upcycled")
    cells = chain(
        branch([Cell({}, {"family": "dense"})], [16, 24], decay_fraction=0.25),
        branch(study.upcycle([Cell(MOE, {"family": "moe"})], at=8), [16, 24], decay_fraction=0.25),
    )
    made = Study("s", runs.make_config(), cells)
    folder = made.save(out)
    for pack in study.packs(made.runs):
        assert set(runs.train_here(folder, *pack).values()) == {"done"}
    return folder, made


def test_a_study_goes_from_a_dense_trunk_to_branches_with_experts(trained):
    folder, made = trained
    trunk, _, _, source, sparse, *branches = made.runs
    assert (source.parent, source.branch_step, sparse.parent, sparse.branch_step) == (trunk.run_id, 8, source.run_id, 8)
    started = [runs.load(folder, run).start["step"] for run in (source, sparse, *branches)]
    assert started == [8, 8, 12, 18]
    first = runs.load(folder, sparse).train[0]
    assert first["step"] == 9 and first["tokens"] == 9 * 8 * 16
    # Before its first update the model is the dense one: of one batch they have one loss.
    after = next(line for line in runs.load(folder, trunk).train if line["step"] == 9)
    assert abs(first["loss"] - after["loss"]) < 1e-5 and first["load"] is not None
    assert runs.load(folder, sparse).train[3]["loss"] != pytest.approx(runs.load(folder, trunk).train[11]["loss"], 1e-5)


def test_the_cost_of_an_upcycled_model_is_dense_then_sparse(trained):
    folder, made = trained
    tokens = 8 * 16
    dense, sparse = (runs.make_config(changes).model for changes in ({}, MOE))
    each = {kind: ladder.flops_per_token(model, 16, 16) for kind, model in (("dense", dense), ("moe", sparse))}
    assert each["moe"]["with_head"] - each["dense"]["with_head"] == 6 * 16 * 4  # the router
    found, excluded = points_of_study(folder, "active_non_embedding", "without_head")
    cost = {(point.family, point.D / tokens): point.C for point in found}
    d, m = (each[kind]["without_head"] * tokens for kind in ("dense", "moe"))
    assert cost == {
        ("dense", 16): 16 * d,
        ("dense", 24): 24 * d,
        ("moe", 16): 8 * d + 8 * m,
        ("moe", 24): 8 * d + 16 * m,
    }
    assert {item.reason for item in excluded} == {"stable phase: a trunk, not annealed"}
    d, m = (each[kind]["with_head"] * tokens for kind in ("dense", "moe"))
    plan = {run.run_id: run for run in make_plan(made).runs}
    trunk, _, _, source, sparse, short, long = (plan[run.run_id] for run in made.runs)
    assert (source.C, source.own_flops, sparse.own_flops) == (8 * d, 0, 10 * m)
    assert (short.C, short.own_flops, long.C, long.own_flops) == (8 * d + 8 * m, 4 * m, 8 * d + 16 * m, 6 * m)
    assert (short.N_total - short.N, trunk.N_total - trunk.N) == (2 * 3 * 16 * 16, 0)  # two experts of width 16 rest
    assert compare(folder, "steps", "family").flops == {"dense": (18 + 4 + 6) * d, "moe": (10 + 4 + 6) * m}
    curve = {c.run_id: c for c in curves_of_runs(load_runs(folder))}[long.run_id]
    assert curve.C[-1] == 8 * d + 16 * m


def test_stopped_and_killed_it_goes_on_to_the_same_bits(tmp_path):
    source, run, *_ = from_trunk(FEATURES, noise=0.1, redrawn=0.25)
    runs.train_here(tmp_path / "straight", source)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    runs.train_here(tmp_path / "straight", run)
    with pytest.raises(RuntimeError, match="planned"):
        runs.train_here(tmp_path / "stopped", run, progress=runs.CrashAt(9))  # nothing saved: it begins again
    for step in (9, 14):
        assert runs.stop_at(tmp_path / "stopped", run, step) == {run.run_id: "preempted"}
    shutil.rmtree(tmp_path / "stopped" / source.run_id)  # needed no more
    assert runs.train_here(tmp_path / "stopped", run) == {run.run_id: "done"}
    runs.assert_same(tmp_path / "straight", tmp_path / "stopped", run, first=8)
    newest = records.read_lines(records.attempt_files(tmp_path / "stopped" / run.run_id)[-1])[0]
    assert newest["step"] == 14 and newest["inherited_tokens"] == 8 * 8 * 16
    assert newest["inherited_flops"] == runs.load(tmp_path / "straight", run).start["inherited_flops"]


def test_a_branch_is_the_uninterrupted_upcycled_run(tmp_path):
    source, sparse, short, long = from_trunk(FEATURES)
    runs.train_here(tmp_path / "study", source)
    shutil.copytree(tmp_path / "study", tmp_path / "whole")
    runs.train_here(tmp_path / "study", sparse, short, long)
    for run in (short, long):
        assert runs.load(tmp_path / "study", run).start["step"] == run.branch_step
        assert runs.load(tmp_path / "study", run).start["inherited_tokens"] == 8 * 8 * 16
    whole = Run(long.config)
    assert whole.first_step == 8
    runs.train_here(tmp_path / "whole", whole)
    assert runs.load(tmp_path / "whole", whole).start["step"] == 8
    runs.assert_same(tmp_path / "study", tmp_path / "whole", long, first=long.branch_step)


def test_a_sweep_from_one_dense_run_is_one_program_and_trains_at_once(tmp_path):
    cells = study.upcycle(product([Cell(MOE | {"train.steps": 12})], axis("optim.lr", [0.01, 0.02, 0.04])), 8,
                          dense={"optim.lr": 0.02})  # fmt: skip
    source, *sparse = Study("s", runs.make_config(), cells).runs
    assert len({run.program_id for run in sparse}) == 1 and {run.parent for run in sparse} == {source.run_id}
    assert train.build_program(sparse).num_members == 3
    runs.train_here(tmp_path / "together", source)
    shutil.copytree(tmp_path / "together", tmp_path / "alone")
    assert set(runs.train_here(tmp_path / "together", *sparse, members=2).values()) == {"done"}
    runs.train_here(tmp_path / "alone", sparse[2], members=2)
    runs.assert_same(tmp_path / "together", tmp_path / "alone", sparse[2], first=8)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"start.run": "0123456789"}, ("start.run='0123456789'", "no run in")),
        ({"start.step": 5}, ("start.step=5", "there are: 8")),
        ({"data.sources": ("markov:16:4",)}, ("corpus", "use the data")),
        ({"train.batch_size": 4}, ("train.batch_size=4 is 8", "counts on")),
        ({"model.mlp_width": 64, "model.moe.expert_width": 32}, ("model.mlp_width=64 is 32",)),
    ],
)
def test_what_a_run_cannot_begin_from_is_said_in_a_sentence(changes, said, trained, tmp_path):
    folder, made = trained
    source, sparse = made.runs[3:5]
    shutil.copytree(folder / source.run_id, tmp_path / source.run_id)
    run = Run(config.override(sparse.config, changes))
    assert runs.train_here(tmp_path, run) == {run.run_id: "failed"}
    reason = runs.load(tmp_path, run).end["reason"]
    assert reason.startswith("ConfigError") and all(word in reason for word in said), reason


def test_a_pack_waits_for_the_dense_checkpoint_and_no_longer(tmp_path):
    source, sparse, *branches = from_trunk()
    made, place = Study("s", runs.make_config(), []), local.Local(tmp_path)
    dense, upcycled = Pack(tmp_path, [source], "dense"), Pack(tmp_path, [sparse, *branches], "upcycled")
    launch = driver._Driver(made, tmp_path, place)
    launch.waiting = [upcycled, dense]
    assert launch.must_wait(upcycled) and not launch.must_wait(dense) and launch.ready() == [dense]
    launch.waiting.remove(dense)
    launch.in_hand["dense"] = dense
    assert launch.must_wait(upcycled) and launch.ready() == []
    place.queues_after = True  # as a scheduler does: it can be handed over, behind the other
    assert launch.ready() == [upcycled] and launch.followed(upcycled) == {"dense"}
    place.queues_after = False
    saved = tmp_path / source.run_id / "checkpoints" / "step-00000008" / "digests.json"
    saved.parent.mkdir(parents=True)
    assert launch.must_wait(upcycled), "the checkpoint is not complete yet"
    saved.touch()
    assert not launch.must_wait(upcycled)
    shutil.rmtree(tmp_path / source.run_id)
    launch.in_hand.clear()  # it has ended, without the checkpoint: the run will say so
    assert not launch.must_wait(upcycled)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_local_launcher_trains_the_dense_run_first(jobs, tmp_path):
    cells = branch(study.upcycle([Cell(MOE)], at=8), [16, 24], decay_fraction=0.25)
    made = Study("s", runs.make_config(), cells)
    folder = made.save(tmp_path)
    assert driver.run(made, folder, local.Local(folder, jobs), watch=True) == 0
    assert all((folder / run.run_id / "DONE").exists() for run in made.runs)


# ---- the command ----------------------------------------------------------------------------------------------------

EXPERIMENT = """
import runs
from slmjax import config

def get_config(arg=""):
    return config.config_dict(runs.make_config({changes}))
"""


def test_the_command_makes_a_run_that_train_goes_on_with(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    folder, made = trained
    dense, sparse = made.runs[3], made.runs[4]
    # The same as the study's trunk, but for the folder.
    schedule = {"schedule.name": "constant", "schedule.decay_fraction": 0.1, "train.steps": 18}
    (tmp_path / "moe.py").write_text(EXPERIMENT.format(changes=MOE | schedule | {"optim.lr": 0.5}))
    out = tmp_path / "out"
    words = [f"--config={tmp_path / 'moe.py'}", "--config.optim.lr=0.02", f"--out={out}"]
    assert cli.main(["upcycle", str(folder / dense.run_id), *words]) == 0
    said = capsys.readouterr().out
    assert str(out / sparse.run_id) in said and f"from step {dense.config.train.steps} " in said
    run = runs.load(out, sparse)
    assert (run.start["step"], run.end["status"], run.end["step"]) == (8, "preempted", 8)
    assert cli.main(["upcycle", str(folder / dense.run_id), *words]) == 2
    assert "begun already" in capsys.readouterr().err
    assert cli.main(shlex.split(said.splitlines()[-1])[1:]) == 0
    runs.assert_same(folder, out, sparse, first=8)
    assert runs.load(out, sparse).start["inherited_flops"] == runs.load(folder, sparse).start["inherited_flops"]
    noisy = ["--step=8", "--noise=0.1", "--redrawn=0.5"]
    assert cli.main(["upcycle", str(folder / dense.run_id), *words, *noisy, "--json"]) == 0
    assert len(list(out.iterdir())) == 2
    assert cli.main(["upcycle", str(folder / dense.run_id), *words, "--step=3"]) == 2
    assert "there are: 8" in capsys.readouterr().err
    assert cli.main(["upcycle", str(tmp_path), *words]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
