"""Packs: each run is what it would be alone, whatever happens to the others, and its records say what happened."""

import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import make_run

from slmjax import config, data, program, records, schedules, train
from slmjax.checkpoint import Checkpointer
from slmjax.member import Member
from slmjax.objectives import next_token


@pytest.fixture(scope="module")
def pack():
    """Six runs of one program: other seeds, rates, horizons and schedules."""
    lengths = (24, 9, 17, 24, 6, 13)
    names = ("wsd", "constant", "cosine", "linear", "wsd", "cosine")
    cells = enumerate(zip(lengths, names, strict=True))
    return [
        make_run({"train.steps": n, "train.seed": i, "optim.lr": 0.01 * (i + 1), "schedule.name": name})
        for i, (n, name) in cells
    ]


@pytest.fixture(scope="module")
def trained(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    outcome = runs.train_here(folder, *pack, members=2)
    assert outcome == {run.run_id: "done" for run in pack} and outcome.exit_code == 0
    return folder


# ---- the same numbers -----------------------------------------------------------------------------------------------


def test_runs_of_a_pack_are_as_alone(pack, trained, tmp_path):
    for run in pack:
        runs.train_here(tmp_path, run, members=2)
        runs.assert_same(tmp_path, trained, run)


def recorded(folder, run) -> np.ndarray:
    return np.array([line["loss"] for line in runs.load(folder, run).train + runs.load(folder, run).evals])


@pytest.mark.parametrize("changes", [{}, {"mesh.data": 4}, {"mesh.data": 2, "mesh.fsdp": 2}], ids=str)
def test_one_device_four_devices_and_a_pack_agree(changes, pack, trained, tmp_path):
    run = make_run(config.flatten(pack[0].config) | changes)
    assert run.run_id == pack[0].run_id
    runs.train_here(tmp_path, run, members=1)
    assert math.prod(runs.load(tmp_path, run).start["mesh"].values()) == (4 if changes else 1)
    np.testing.assert_allclose(recorded(tmp_path, run), recorded(trained, run), atol=1e-5, rtol=0)
    assert recorded(tmp_path, run).size == 25


def test_devices_follow_the_work():
    def mesh(*pack, members=None):
        return {k: n for k, n in train.build_program(list(pack), members).mesh.shape.items() if n > 1}

    one, two = make_run({"mesh.data": 0}), make_run({"mesh.data": 0, "train.seed": 1})
    assert len(jax.devices()) == 4
    assert mesh(one) == {"data": 4}
    assert mesh(one, two) == {"population": 2}
    assert mesh(*runs.branches([12, 20], {"mesh.data": 0})) == {"data": 4}, "a trunk and its branches are one chain"
    # On host devices a batch takes what it divides by; 6 rows go to 3 of 4.
    assert mesh(make_run({"mesh.data": 0, "train.batch_size": 6})) == {"data": 3}
    assert mesh(make_run({"mesh.data": 1})) == {}


def test_a_relaunch_has_the_members_it_had(pack, trained, tmp_path):
    """Or the last bits of the runs that are left would differ from an undisturbed pack's."""
    first, second = (make_run(config.flatten(run.config) | {"mesh.data": 0}) for run in pack[3:5])
    runs.train_here(tmp_path / "straight", first, second)
    runs.train_here(tmp_path / "killed", first, second, progress=runs.StopAt(8))  # the second has ended by now
    assert (tmp_path / "killed" / second.run_id / "DONE").exists()
    assert runs.train_here(tmp_path / "killed", first, second).exit_code == 0
    runs.assert_same(tmp_path / "straight", tmp_path / "killed", first)


# ---- records --------------------------------------------------------------------------------------------------------


def test_records_say_what_happened(tmp_path):
    changes = {"train.steps": 22, "log.log_every": 3, "log.eval_every": 8}
    run = make_run(changes | {"schedule.warmup_steps": 4, "schedule.decay_steps": 6})
    runs.train_here(tmp_path, run)
    logged, cfg = runs.load(tmp_path, run), run.config
    assert [line["step"] for line in logged.train] == [3, 6, 9, 12, 15, 18, 21, 22]
    assert [line["step"] for line in logged.evals] == [8, 16, 22]
    for line in logged.train:
        assert line["tokens"] == line["step"] * 8 * 16
        assert line["lr"] == pytest.approx(cfg.optim.lr * schedules.multiplier(cfg, line["step"] - 1), rel=1e-12)
        assert line["num_skipped"] == 0 and line["grad_norm"] > 0
    assert [line["phase"] for line in logged.train] == ["warmup"] + ["stable"] * 4 + ["decay"] * 3
    assert [line["phase"] for line in logged.evals] == ["stable", "stable", "decay"]
    assert all(line["num_tokens"] == 20 * 16 and line["bits_per_byte"] is None for line in logged.evals)
    end = logged.end
    assert (end["status"], end["step"], end["tokens"], end["epochs"]) == ("done", 22, 22 * 128, 0.0)
    assert (end["loss"], end["loss_se"]) == (logged.evals[-1]["loss"], logged.evals[-1]["loss_se"])
    assert logged.done and logged.status["state"] == "done" and logged.num_attempts == 1
    assert logged.start["entropy"] == data.open_dataset(cfg).entropy and logged.start["loss_kind"] == "exact"
    assert config.resolve(logged.config) == cfg


def test_epochs_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i}, {i + 1}, {i + 2}; " * 20)
    run = make_run({"data.sources": (str(tmp_path / "*.txt"),), "data.tokenizer": "byte", "data.held_out": 0.3})
    runs.train_here(tmp_path / "out", run)
    logged = runs.load(tmp_path / "out", run)
    assert logged.end["epochs"] == data.open_dataset(run.config).epochs_at(24) > 1
    assert logged.end["bits_per_byte"] > 0


def test_the_standard_error_is_the_closed_form(pack, trained):
    run = pack[0]
    built = runs.program_of(run)
    with Checkpointer(trained / run.run_id / "checkpoints") as checkpoints:
        _, state, _ = checkpoints.restore(built.abstract_member, 24)
    tokens = data.open_dataset(run.config).held_out.tokens_BT1
    logits = built.model.apply(state.params, jnp.asarray(tokens[:, :-1]), None, "causal")[0]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -np.asarray(jnp.take_along_axis(log_p, jnp.asarray(tokens[:, 1:, None]), -1), np.float64)[..., 0]
    end = runs.load(trained, run).end
    assert end["loss"] == pytest.approx(nll.mean(), rel=1e-6)
    assert end["loss_se"] == pytest.approx(nll.mean(1).std(ddof=1) / math.sqrt(20), rel=1e-5)


def test_tensorboard_holds_the_records_after_a_crash(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run({"log.tensorboard": True, "log.eval_every": 7, "log.checkpoint_every": 10})
    with pytest.raises(RuntimeError, match="planned"):
        runs.train_here(tmp_path, run, progress=runs.CrashAt(15))
    assert runs.load(tmp_path, run).train[-1]["step"] > 10, "steps that are redone"
    runs.train_here(tmp_path, run)
    logged = runs.load(tmp_path, run)
    events = EventAccumulator(str(tmp_path / run.run_id / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    for tag, lines in (("train/loss", logged.train), ("train/lr", logged.train), ("eval/loss", logged.evals)):
        scalars = [(event.step, runs.hexed(event.value)) for event in events.Scalars(tag)]
        assert scalars == [(line["step"], runs.hexed(line[tag.split("/")[1]])) for line in lines]
    [final] = events.Scalars("hparams/loss")
    assert (final.step, runs.hexed(final.value)) == (24, runs.hexed(logged.end["loss"]))
    content = events.PluginTagToContent("hparams")
    assert any(b"optim.lr" in value for value in content.values())


# ---- the order of a pack --------------------------------------------------------------------------------------------


def test_places_are_refilled_in_the_order_of_dependence(tmp_path, monkeypatch):
    opened, saved = [], {}
    start, save = Member.start, Member.save

    def note_start(self):
        opened.append((self.run, {run_id: list(steps) for run_id, steps in saved.items()}))
        start(self)

    def note_save(self, state):
        save(self, state)
        saved.setdefault(self.run.run_id, []).append(self.step)

    monkeypatch.setattr(Member, "start", note_start)
    monkeypatch.setattr(Member, "save", note_save)
    studies = [runs.branches([8, 16, 24], {"train.seed": seed}) for seed in (0, 1)]
    mixed = [run for group in studies for run in reversed(group)]  # branches before their trunks
    assert set(runs.train_here(tmp_path, *mixed, members=3).values()) == {"done"}
    assert sorted(run.run_id for run, _ in opened) == sorted(run.run_id for run in mixed), "each once"
    for run, before in opened:
        if run.parent:
            assert run.branch_step in before[run.parent], "it started before its trunk was there"
            assert runs.load(tmp_path, run).start["step"] == run.branch_step
    assert any(run.parent and max(before[run.parent]) == 6 for run, before in opened), "none ran beside its trunk"


# ---- faults of one member -------------------------------------------------------------------------------------------

NAN, HUGE, SPIKE = -1, -2, -3  # a batch that starts with this token is poisoned


@pytest.fixture
def poison(monkeypatch):
    """poison({step: kind}, seed): those batches of the run with this train.seed are bad."""
    objective = types.ModuleType("poisoned.objective")

    def build(cfg):
        honest = next_token.build(cfg)

        def view(tokens_BT1, segments_BT1, key):
            mark, seen = tokens_BT1[0, 0], honest.view(jnp.maximum(tokens_BT1, 0), segments_BT1, key)
            # NaN everywhere; a finite loss whose gradient's norm overflows; a loss 1,000 times the usual.
            scale = jnp.select([mark == NAN, mark == HUGE, mark == SPIKE], [jnp.nan, 1e25, 1e3], 1.0)
            return seen._replace(weights_BT=seen.weights_BT * scale)

        return honest._replace(view=view)

    objective.build = build
    monkeypatch.setitem(sys.modules, "poisoned.objective", objective)
    open_dataset, bad = data.open_dataset, {}

    def open_poisoned(cfg):
        dataset = open_dataset(cfg)

        def batch_at(step):
            batch = dataset.batch_at(step)
            if step in bad.get(cfg.train.seed, {}):
                batch.tokens_BT1[0, 0] = bad[cfg.train.seed][step]
            return batch

        return dataset._replace(batch_at=batch_at)

    monkeypatch.setattr(data, "open_dataset", open_poisoned)
    return lambda steps, seed=0: bad.update({seed: steps})


POISONABLE = {"objective.name": "poisoned.objective", "schedule.name": "constant", "optim.spike_factor": 20.0}


def test_bad_updates_are_left_out_and_counted(poison, tmp_path, monkeypatch):
    run = make_run(POISONABLE | {"optim.ema_decay": 0.9})
    bad = {4: NAN, 9: HUGE, 10: HUGE, 17: SPIKE}
    poison(bad)
    assert runs.train_here(tmp_path / "bad", run) == {run.run_id: "done"}
    lines = {line["step"]: line for line in runs.load(tmp_path / "bad", run).train}
    assert lines[5]["loss"] is None and lines[5]["grad_norm"] is None
    assert lines[10]["loss"] > 1e20 and lines[10]["grad_norm"] is None
    assert lines[18]["loss"] > 1e3 and lines[18]["grad_norm"] > 100
    expected = [sum(step < s for step in bad) for s in range(1, 25)]
    assert [lines[s]["num_skipped"] for s in range(1, 25)] == expected
    assert runs.load(tmp_path / "bad", run).end["num_skipped"] == 4
    # A run that is never shown those batches has the same losses: nothing of them got into weights or moments.
    good = [step for step in range(24) if step not in bad]
    open_dataset = data.open_dataset

    def open_dropped(cfg):
        dataset = open_dataset(cfg)
        return dataset._replace(batch_at=lambda step: dataset.batch_at(good[step]))

    monkeypatch.setattr(data, "open_dataset", open_dropped)
    dropped = make_run(POISONABLE | {"optim.ema_decay": 0.9, "train.steps": len(good)})
    runs.train_here(tmp_path / "dropped", dropped)
    dropped_losses = [line["loss"] for line in runs.load(tmp_path / "dropped", dropped).train]
    assert [lines[step + 1]["loss"] for step in good] == dropped_losses
    a, b = runs.final_state(tmp_path / "bad", run), runs.final_state(tmp_path / "dropped", dropped)
    assert {k for k in a if a[k] != b[k]} == {".step", ".skips.total"}


@pytest.mark.parametrize("steps_per_dispatch", [1, 8])
def test_divergence_ends_one_member_only(steps_per_dispatch, poison, tmp_path):
    changes = POISONABLE | {"optim.max_skips": 3, "log.checkpoint_every": 2}
    changes |= {"mesh.steps_per_dispatch": steps_per_dispatch}
    pack = [make_run(changes | {"train.seed": seed}) for seed in range(4)]
    runs.train_here(tmp_path / "good", *pack, members=4)
    poison({3: NAN, 10: NAN, 11: HUGE, 12: NAN}, seed=2)  # three in a row, and then good batches again
    for _ in range(2):  # launched again, it diverges again
        outcome = runs.train_here(tmp_path / "bad", *pack, members=4)
        assert outcome == {run.run_id: "done" for run in pack} | {pack[2].run_id: "diverged"}
        assert outcome.exit_code == 4
    for run in pack[:2] + pack[3:]:
        runs.assert_same(tmp_path / "good", tmp_path / "bad", run)
    diverged = runs.load(tmp_path / "bad", pack[2])
    assert not diverged.done and not (tmp_path / "bad" / pack[2].run_id / "DONE").exists()
    assert diverged.end["status"] == diverged.status["state"] == "diverged" and "skipped" in diverged.end["reason"]
    assert diverged.end["loss"] is None and diverged.end["num_skipped"] >= 4


def test_branches_of_a_failed_trunk_are_not_trained(poison, tmp_path):
    changes = {"objective.name": "poisoned.objective", "optim.max_skips": 1}
    lost, kept = (runs.branches([8, 16], changes | {"train.seed": seed}) for seed in (0, 1))
    poison({2: NAN}, seed=0)
    outcome = runs.train_here(tmp_path, *lost, *kept, members=2)
    expected = {run.run_id: "failed" if run.parent else "diverged" for run in lost}
    assert outcome == expected | {run.run_id: "done" for run in kept}
    for run in lost[1:]:
        said = runs.load(tmp_path, run)
        assert said.num_attempts == 0 and said.status["state"] == "failed"
        assert said.status["reason"] == f"its trunk {run.parent} diverged"


def test_members_that_fail_are_labelled_and_the_others_go_on(pack, trained, tmp_path, monkeypatch):
    open_dataset = data.open_dataset

    def failing(cfg):
        dataset = open_dataset(cfg)
        match cfg.train.seed:
            case 0:
                raise data.DataError("a.bin: no such shard")
            case 3:
                return dataset._replace(batch_at=lambda step: 1 // int(step != 10) and dataset.batch_at(step))
        return dataset

    monkeypatch.setattr(data, "open_dataset", failing)
    (tmp_path / pack[5].run_id).write_text("not a folder")
    outcome = runs.train_here(tmp_path, *pack, members=2)
    failed = {pack[0].run_id: "no such shard", pack[3].run_id: "ZeroDivisionError", pack[5].run_id: ""}
    assert outcome == {run.run_id: "failed" if run.run_id in failed else "done" for run in pack}
    assert outcome.exit_code == 1
    for run in (pack[0], pack[3]):
        logged = runs.load(tmp_path, run)
        assert logged.end["status"] == logged.status["state"] == "failed" and logged.end["loss"] is None
        assert failed[run.run_id] in logged.end["reason"] and failed[run.run_id] in logged.status["reason"]
        assert not logged.done and not logged.evals and not (tmp_path / run.run_id / "DONE").exists()
        assert failed[run.run_id] in (tmp_path / run.run_id / "error.txt").read_text()
    for run in (pack[1], pack[2], pack[4]):
        runs.assert_same(trained, tmp_path, run)


def test_a_full_disk_fails_one_run(pack, trained, tmp_path, monkeypatch):
    write = records.RunWriter.write

    def full(self, kind, **values):
        if self.run_dir.name == pack[1].run_id and values["step"] >= 5:
            raise OSError(28, "No space left on device")
        write(self, kind, **values)

    monkeypatch.setattr(records.RunWriter, "write", full)
    outcome = runs.train_here(tmp_path, *pack[:3], members=2)
    assert outcome == {pack[0].run_id: "done", pack[1].run_id: "failed", pack[2].run_id: "done"}
    runs.assert_same(trained, tmp_path, pack[0])
    monkeypatch.undo()
    runs.train_here(tmp_path, pack[1], members=2)
    runs.assert_same(trained, tmp_path, pack[1])


def test_the_program_is_built_without_the_numbers_of_a_run():
    """Tests share programs by program_id: this is what allows it."""
    a, b = (make_run({"optim.lr": lr, "train.seed": seed, "train.steps": 9}) for lr, seed in ((0.1, 0), (0.2, 1)))
    assert a.program_id == b.program_id != make_run({"model.width": 32}).program_id
    assert isinstance(runs.program_of(a), program.Program) and runs.program_of(a) is runs.program_of(b)
