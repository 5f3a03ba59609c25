"""The bench: the baseline is the same model, what is timed is training, and numbers come out as they were measured."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny

from slmjax import bench, cli, environment, ladder, models, objectives, program, sharding
from slmjax.bench import plain_jax

SMALL = {"data.packing": "concat", "model.num_kv_heads": 4}


@pytest.fixture
def as_users_have_it():
    """The baseline is written as one writes JAX, which lets ranks be promoted; the tests forbid it to slmjax."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_baseline_is_the_same_model(as_users_have_it):
    """Same parameters, same tokens, same logits: what the ratio compares is speed and nothing else."""
    cfg = tiny(SMALL | {"model.parametrization.name": "sp"})
    model = models.build(cfg.model)
    params = model.init(jax.random.key(0), 0.2)
    blocks, names = params["blocks"], ("query", "key", "value", "out")

    def layer(i):
        attention = {name: blocks["attention"][name][i] for name in names}
        mlp = {name: blocks["mlp"][name][i] for name in ("gate", "up", "down")}
        norms = {"norm1": blocks["attention_norm"]["gain"][i], "norm2": blocks["mlp_norm"]["gain"][i]}
        return attention | mlp | norms

    plain = {"embed": params["embed"]["table"], "norm": params["final_norm"]["gain"]}
    plain["layers"] = [layer(i) for i in range(cfg.model.num_layers)]
    tokens_BT = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (4, cfg.data.seq_len), np.int32)
    ours, _ = model.apply(params, tokens_BT)
    np.testing.assert_allclose(plain_jax.logits(bench.plain_shape(cfg), plain, tokens_BT), ours, rtol=2e-4, atol=2e-4)


def test_the_baseline_has_as_many_parameters():
    cfg = tiny(SMALL)
    params = plain_jax.init(bench.plain_shape(cfg), jax.random.key(0))
    counts = ladder.count_params(cfg.model, cfg.model.vocab_size)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == counts.total


def test_the_baseline_learns(as_users_have_it):
    cfg = tiny(SMALL)
    step, params, opt_state = plain_jax.make_step(bench.plain_shape(cfg), lr=0.02)
    tokens = np.tile(np.arange(cfg.data.seq_len + 1, dtype=np.int32) % cfg.model.vocab_size, (4, 1))
    losses = []
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state, tokens)
        losses.append(float(loss))
    assert math.isclose(losses[0], math.log(cfg.model.vocab_size), rel_tol=0.05) and losses[-1] < 0.5 * losses[0]


def test_what_is_timed_makes_every_step():
    cfg = tiny(SMALL | {"optim.lr": 1e-3})
    seen = []
    prog = program.build(cfg, 1, sharding.make_mesh(cfg.mesh, devices=jax.devices()[:1]))

    def spying(state, *args):
        state, metrics = prog.train(state, *args)
        seen.append(state.step)
        return state, metrics

    bench.trainer(prog._replace(train=spying), cfg)(3)
    assert [int(step[0]) for step in seen[-1:]] == [3 * cfg.mesh.steps_per_dispatch]


def test_slices_are_taken_in_turn():
    order = []

    def pretend(name, speed):
        return lambda seconds: order.append((name, seconds)) or speed

    found = bench.interleaved({"a": pretend("a", 10.0), "b": pretend("b", 20.0)}, seconds=28)
    assert [name for name, _ in order] == ["a", "b"] * bench.ROUNDS
    assert sum(seconds for _, seconds in order) == pytest.approx(28)
    assert bench.median_ratio(found["b"], found["a"]) == 2.0


def test_a_ratio_is_of_neighbours_not_of_medians():
    """A machine that slows down by half in mid-run changes no ratio."""
    assert bench.median_ratio([10.0, 10.0, 5.0], [5.0, 5.0, 2.5]) == 2.0


def test_compiling_again_comes_from_the_cache_and_leaves_settings_alone():
    cfg = tiny(SMALL | {"model.num_layers": 3})
    prog = program.build(cfg, 1, sharding.make_mesh(cfg.mesh, devices=jax.devices()[:1]))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    cold, warm, megabytes = bench.compile_seconds(prog.train, *bench.train_arguments(prog, cfg))
    assert 0 < warm < cold and 0 < megabytes < 100
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)


def test_the_baseline_answers_in_its_own_process():
    cfg = tiny(SMALL)
    with bench.Worker([sys.executable, plain_jax.__file__], bench.plain_shape(cfg), bench.plain_environment()) as peer:
        assert peer.rate(0.05) > 0 and peer.first_step_s > 0
    assert peer.process.returncode == 0


def test_the_baselines_environment_is_free_of_ours(monkeypatch):
    for name, value in environment.variables(2, {}).items():
        monkeypatch.setenv(name, value)
    left = bench.plain_environment()
    assert "GLIBC_TUNABLES" not in left and "JAX_NUM_CPU_DEVICES" not in left and "PATH" in left


def test_builtin_shapes_are_those_of_the_tables():
    for name, sizes in {"a": (64, 4, 256, 16, 4096), "s": (64, 2, 128, 8, 512)}.items():
        cfg = bench.builtin(name)
        model = cfg.model
        assert sizes == (model.width, model.num_layers, cfg.data.seq_len, cfg.train.batch_size, model.vocab_size)
        objectives.build(cfg.objective), models.build(model)


def test_the_verb_prints_json_a_program_can_read(monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare", lambda *_: None)
    row = bench.Row("plain JAX", 1000.0, 1.0, 1.0, 2.0, 0.1, 3.0, 0.5, 7.0)
    result = bench.Result("s", "cpu", 1, 2, True, 20.0, "NumPy 512x512x512", [row])
    monkeypatch.setattr(bench, "measure", lambda cfg, name, seconds: result)
    assert cli.main(["bench", "--json"]) == 0
    assert [entry["rows"][0]["tokens_per_s"] for entry in json.loads(capsys.readouterr().out)] == [1000.0] * len(
        bench.BUILTIN
    )
    assert cli.main(["bench"]) == 0
    assert "1.00" in capsys.readouterr().out
    assert cli.main(["bench", "s"]) == 2


@pytest.mark.slow
def test_the_verb_measures():
    done = subprocess.run(
        [sys.executable, "-m", "slmjax", "bench", "--seconds=6", "--json"], capture_output=True, text=True, timeout=600
    )
    for entry in json.loads(done.stdout):
        assert entry["rows"][0]["ratio"] == 1.0 and all(0 < row["peak_share"] < 1 for row in entry["rows"])
        assert all(row["compile_warm_s"] < row["compile_cold_s"] for row in entry["rows"])
