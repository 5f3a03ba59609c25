"""A run stopped anywhere, by anything, goes on to the same numbers to the bit; a branch is the run it stands for."""

import random
import shutil
import time

import pytest
import runs
from runs import make_run

from slmjax import config, data, lease, records
from slmjax.checkpoint import Checkpointer

EVERYTHING = {
    "optim.micro_batches": 2,
    "optim.ema_decay": 0.9,
    "optim.spike_factor": 1.05,  # so low that some updates are skipped
    "schedule.warmup_steps": 5,
    "log.eval_every": 8,
}
MIXTURE = {
    "optim.name": "muon",
    "data.sources": ("markov:16:3", "markov:16:4"),
    "data.weights": (0.75, 0.25),
    "data.decay_weights": (0.25, 0.75),
    "schedule.warmup_steps": 3,
    "schedule.decay_shape": "linear",
}


EXPERTS = {
    "model.moe.num_experts": 4,
    "model.moe.bias_rate": 0.01,
    "optim.ema_decay": 0.9,
    "schedule.warmup_steps": 3,
}


@pytest.mark.parametrize(
    "features", [EVERYTHING, MIXTURE, EXPERTS], ids=["accumulation-ema-skips", "muon-mixture", "experts-bias"]
)
def test_stopped_at_random_steps_and_at_boundaries(features, tmp_path, seed):
    run = make_run(features)
    steps, cfg = run.config.train.steps, run.config
    boundaries = {1, cfg.schedule.warmup_steps, config.decay_start(cfg), steps - 1}
    stops = sorted(boundaries | set(random.Random(seed).sample(range(1, steps), 3)))
    runs.train_here(tmp_path / "straight", run)
    for step in stops:
        assert runs.stop_at(tmp_path / "stopped", run, step) == {run.run_id: "preempted"}
        assert runs.load(tmp_path / "stopped", run).end["step"] == step
    assert runs.train_here(tmp_path / "stopped", run) == {run.run_id: "done"}
    runs.assert_same(tmp_path / "straight", tmp_path / "stopped", run)
    assert runs.load(tmp_path / "stopped", run).num_attempts == len(stops) + 1
    skips = runs.load(tmp_path / "straight", run).end["num_skipped"]
    assert (0 < skips < steps) == ("optim.spike_factor" in features), "the skips this test needs did not happen"


def test_a_finished_run_does_nothing(tmp_path, monkeypatch):
    run = make_run()
    runs.train_here(tmp_path, run)
    before = runs.snapshot(tmp_path)
    monkeypatch.setattr("slmjax.train.build_program", None)  # a program would be wasted work
    assert runs.train_here(tmp_path, run) == {run.run_id: "done"}
    assert runs.snapshot(tmp_path) == before


def test_killed_between_the_last_checkpoint_and_done(tmp_path):
    run = make_run(EVERYTHING)
    runs.train_here(tmp_path / "straight", run)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    (tmp_path / "killed" / run.run_id / "DONE").unlink()
    assert runs.train_here(tmp_path / "killed", run) == {run.run_id: "done"}
    assert (tmp_path / "killed" / run.run_id / "DONE").exists()
    assert runs.load(tmp_path / "killed", run).num_attempts == 2
    runs.assert_same(tmp_path / "straight", tmp_path / "killed", run)  # no step twice, no evaluation twice


def test_killed_before_the_first_step(tmp_path):
    run = make_run()
    runs.train_here(tmp_path / "straight", run)
    with pytest.raises(RuntimeError, match="planned"):
        runs.train_here(tmp_path / "killed", run, progress=runs.CrashAt(1))
    shutil.rmtree(tmp_path / "killed" / run.run_id / "checkpoints", ignore_errors=True)
    attempt = tmp_path / "killed" / run.run_id / "attempt-000.jsonl"
    attempt.write_text(attempt.read_text().splitlines()[0] + "\n" + '{"kind": "train", "st')  # a line cut short
    assert runs.train_here(tmp_path / "killed", run) == {run.run_id: "done"}
    runs.assert_same(tmp_path / "straight", tmp_path / "killed", run)


# ---- trunks and branches --------------------------------------------------------------------------------------------


def test_a_branch_is_the_uninterrupted_run(tmp_path, monkeypatch):
    finish = Checkpointer._finish

    def slow(self, *args):  # a branch must not start before the checkpoint it leaves from is there
        time.sleep(0.2)
        finish(self, *args)

    monkeypatch.setattr(Checkpointer, "_finish", slow)
    features = {"optim.ema_decay": 0.9, "schedule.warmup_steps": 3}
    trunk, *branches = runs.branches([12, 20, 28], features)
    outcome = runs.train_here(tmp_path / "study", trunk, *branches, members=2)
    assert set(outcome.values()) == {"done"} and len(outcome) == 4
    monkeypatch.undo()
    for branch in branches:
        assert runs.load(tmp_path / "study", branch).start["step"] == branch.branch_step
        whole = make_run(config.flatten(branch.config))
        assert whole.run_id == branch.run_id
        runs.train_here(tmp_path / "whole", whole, members=2)
        runs.assert_same(tmp_path / "study", tmp_path / "whole", branch, first=branch.branch_step)
        before = [s for s in runs.losses(tmp_path / "whole", branch).items() if s[0] <= branch.branch_step]
        assert before == list(runs.losses(tmp_path / "study", trunk).items())[: branch.branch_step]
        shutil.rmtree(tmp_path / "whole")  # or the next one would start from it


def test_budgets_added_later_use_the_trunk_and_leave_it_alone(tmp_path):
    trunk, *branches = runs.branches([12, 24])
    runs.train_here(tmp_path, trunk, *branches)
    kept = {run.run_id: runs.snapshot(tmp_path / run.run_id) for run in (trunk, *branches)}
    # The trunk of a longer study is another, longer run, which goes on where the old one ended.
    longer, *later = runs.branches([16, 24, 32])
    assert longer.run_id != trunk.run_id and branches[1].run_id == later[1].run_id
    runs.train_here(tmp_path, longer, *later)
    assert {run_id: runs.snapshot(tmp_path / run_id) for run_id in kept} == kept
    assert runs.load(tmp_path, longer).start["step"] == trunk.config.train.steps
    assert 0 < runs.load(tmp_path, later[0]).start["step"] <= later[0].branch_step
    for run in (later[0], later[2], longer):
        first = runs.load(tmp_path, run).start["step"]
        runs.train_here(tmp_path / "whole" / run.run_id, run)  # its trunk is not there: from the beginning
        assert runs.load(tmp_path / "whole" / run.run_id, run).start["step"] == 0
        runs.assert_same(tmp_path, tmp_path / "whole" / run.run_id, run, first)


def test_a_shorter_trunk_later_has_its_own_checkpoint(tmp_path):
    stable = {"schedule.name": "constant"}
    trunk, shorter = make_run(stable, save_steps=(16,)), make_run(stable | {"train.steps": 16})
    runs.train_here(tmp_path, trunk)
    assert runs.train_here(tmp_path, shorter) == {shorter.run_id: "done"}
    assert runs.load(tmp_path, shorter).start["step"] == 16, "there was nothing left to train"
    runs.train_here(tmp_path / "alone", shorter)
    assert runs.final_state(tmp_path, shorter) == runs.final_state(tmp_path / "alone", shorter)
    assert runs.evals(tmp_path, shorter) == runs.evals(tmp_path / "alone", shorter)


# ---- kills ----------------------------------------------------------------------------------------------------------


def kill_often(folder, run, kills: int, kills_at_start: int, window_s: float, rng: random.Random) -> None:
    """Kills a training process `kills` times within window_s of a first new step, or anywhere in its start-up."""
    moments = ["start"] * kills_at_start + ["step"] * (kills - kills_at_start)
    rng.shuffle(moments)
    for moment in moments:
        with runs.child(folder, run, pause_s=0.004) as process:
            if moment == "step":
                known = len(records.attempt_files(folder / run.run_id))
                runs.wait_for(
                    lambda known=known: (
                        len(records.attempt_files(folder / run.run_id)) > known and runs.num_lines(folder, run) > 1
                    ),
                    process,
                )
                time.sleep(rng.uniform(0, window_s))
            else:
                time.sleep(rng.uniform(0, 1.2))
            assert process.is_alive(), f"finished before it could be killed, with {process.exitcode}"


def assert_nothing_lost(folder, straight, run) -> None:
    truth = {line["step"]: runs.hexed(line["loss"]) for line in runs.load(straight, run).train}
    logged = 0
    for path in records.attempt_files(folder / run.run_id):
        lines = [line for line in records.read_lines(path) if line["kind"] in ("start", "train")]
        for line in lines:
            if line["kind"] == "start":
                assert logged - line["step"] <= 2, f"{logged - line['step']} steps redone after one kill"
            else:
                assert runs.hexed(line["loss"]) == truth[line["step"]], f"{path.name}: step {line['step']} differs"
        logged = max([logged, *(line["step"] for line in lines)])
    runs.assert_same(straight, folder, run)
    attempts = [records.read_lines(path) for path in records.attempt_files(folder / run.run_id)]
    assert sum(line["kind"] == "end" for lines in attempts for line in lines) == 1
    leftovers = list((folder / run.run_id / "checkpoints").glob(".tmp-*"))
    assert not leftovers and not (folder / run.run_id / "lease.json").exists()


def test_ten_kills_lose_nothing(tmp_path, seed):
    run = make_run({"train.steps": 300, "log.checkpoint_every": 1, "optim.spike_factor": 1.5})
    runs.train_here(tmp_path / "straight", make_run(config.flatten(run.config) | {"log.checkpoint_every": 0}))
    kill_often(tmp_path / "killed", run, kills=10, kills_at_start=3, window_s=0.25, rng=random.Random(seed))
    assert runs.train_here(tmp_path / "killed", run) == {run.run_id: "done"}
    assert_nothing_lost(tmp_path / "killed", tmp_path / "straight", run)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path, seed):
    run = make_run({"train.steps": 4000, "log.checkpoint_every": 1, "log.eval_every": 7, "log.tensorboard": True})
    runs.train_here(tmp_path / "straight", make_run(config.flatten(run.config) | {"log.checkpoint_every": 0}))
    kill_often(tmp_path / "killed", run, kills=200, kills_at_start=40, window_s=0.5, rng=random.Random(seed))
    assert runs.train_here(tmp_path / "killed", run) == {run.run_id: "done"}
    assert_nothing_lost(tmp_path / "killed", tmp_path / "straight", run)


# ---- what must not go on --------------------------------------------------------------------------------------------


def damage(step_dir) -> None:
    for path in step_dir.rglob("*"):
        if path.is_file() and path.stat().st_size:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)


def test_a_damaged_checkpoint_costs_steps_and_not_numbers(tmp_path):
    run = make_run()
    runs.train_here(tmp_path / "straight", run)
    runs.stop_at(tmp_path / "damaged", run, 6)
    runs.stop_at(tmp_path / "damaged", run, 13)
    damage(tmp_path / "damaged" / run.run_id / "checkpoints" / "step-00000013")
    runs.train_here(tmp_path / "damaged", run)
    assert records.read_lines(records.attempt_files(tmp_path / "damaged" / run.run_id)[-1])[0]["step"] == 6
    runs.assert_same(tmp_path / "straight", tmp_path / "damaged", run)


def test_all_checkpoints_damaged_stops_the_run_for_good(tmp_path):
    run, other = make_run(), make_run({"train.seed": 1})
    runs.stop_at(tmp_path, run, 6)
    runs.stop_at(tmp_path, run, 13)
    logged = runs.losses(tmp_path, run)
    for step_dir in (tmp_path / run.run_id / "checkpoints").glob("step-*"):
        damage(step_dir)
    for _ in range(2):  # an automatic relaunch must not begin at 0 either
        outcome = runs.train_here(tmp_path, run, other)
        assert outcome == {run.run_id: "failed", other.run_id: "done"} and outcome.exit_code == 1
        assert not (tmp_path / run.run_id / "DONE").exists()
        status = records.read_json(tmp_path / run.run_id / "status.json")
        assert status["state"] == "failed" and "no checkpoint" in status["reason"]
        assert runs.losses(tmp_path, run) == logged
        newest = records.read_lines(records.attempt_files(tmp_path / run.run_id)[-1])
        assert [line["kind"] for line in newest] == ["end"] and newest[0]["loss"] is None


def test_data_changed_under_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"{i} is followed by {i + 1}, and then by {i + 2}. " * 20)
    changes = {"data.sources": (str(text / "*.txt"),), "data.tokenizer": "byte", "data.held_out": 0.25}
    run = make_run(changes)
    trunk, branch = runs.branches([20], changes)
    runs.train_here(tmp_path / "straight", run)
    runs.stop_at(tmp_path / "changed", run, 6)
    runs.train_here(tmp_path / "changed", trunk)
    before = (text / "7.txt").read_text()
    (text / "7.txt").write_text(before + "!")
    assert runs.train_here(tmp_path / "changed", run) == {run.run_id: "failed"}
    assert "the data are now" in runs.load(tmp_path / "changed", run).end["reason"]
    # Nor does a branch take weights that were trained on what is no longer there.
    assert runs.train_here(tmp_path / "changed", branch) == {branch.run_id: "done"}
    assert runs.load(tmp_path / "changed", branch).start["step"] == 0
    (text / "7.txt").write_text(before)
    assert runs.train_here(tmp_path / "changed", run) == {run.run_id: "done"}
    runs.assert_same(tmp_path / "straight", tmp_path / "changed", run)


def test_a_second_writer_is_refused_and_a_dead_one_replaced(tmp_path):
    run = make_run({"train.steps": 400, "log.checkpoint_every": 4})
    folder = tmp_path / "two"
    with runs.child(folder, run, pause_s=0.02) as process:
        runs.wait_for(lambda: runs.num_lines(folder, run) > 2, process)
        began = time.monotonic()
        assert runs.train_here(folder, run, make_run({"train.seed": 9})) == {
            run.run_id: "failed",
            make_run({"train.seed": 9}).run_id: "done",
        }
        assert time.monotonic() - began < 10
        assert len(records.attempt_files(folder / run.run_id)) == 1, "the second writer left something"
        assert not (folder / run.run_id / "error.txt").exists()
        assert process.is_alive()
    assert runs.train_here(folder, run) == {run.run_id: "done"}
    runs.train_here(tmp_path / "straight", run)
    runs.assert_same(tmp_path / "straight", folder, run)


def test_a_lease_that_cannot_be_kept_is_the_runs_reason(tmp_path, monkeypatch):
    """One that is lost to another writer is not written into that one's folder."""
    run = make_run()
    for error, said in (
        (lease.LeaseTrouble("no heartbeat"), ("failed", "LeaseTrouble: no heartbeat")),
        (lease.LeaseError("lost to another"), ("running", None)),
    ):
        monkeypatch.setattr(lease.RunLease, "beat", lambda self, error=error: exec("raise error", {"error": error}))
        assert runs.train_here(tmp_path, run) == {run.run_id: "failed"}
        status = records.read_json(tmp_path / run.run_id / "status.json")
        assert (status["state"], status.get("reason")) == said


def test_a_run_whose_data_fail_keeps_what_it_had(tmp_path, monkeypatch):
    run = make_run({"log.checkpoint_every": 4})
    runs.train_here(tmp_path / "straight", run, members=2)
    open_dataset = data.open_dataset

    def failing(cfg):
        dataset = open_dataset(cfg)

        def batch_at(step):
            if step == 10:
                raise data.DataError("tokens.bin: offset 77 is out of range")
            return dataset.batch_at(step)

        return dataset._replace(batch_at=batch_at)

    with monkeypatch.context() as patch:
        patch.setattr(data, "open_dataset", failing)
        outcome = runs.train_here(tmp_path / "failed", run, make_run({"train.seed": 5}), members=2)
    assert set(outcome.values()) == {"failed"}
    assert "offset 77" in runs.load(tmp_path / "failed", run).end["reason"]
    runs.train_here(tmp_path / "failed", run, members=2)
    runs.assert_same(tmp_path / "straight", tmp_path / "failed", run)
