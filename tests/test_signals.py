"""SIGINT, SIGTERM and SIGUSR1 save and exit with 3, wherever they strike; the second one ends the process at once."""

import json
import random
import signal
import socket
import time

import pytest
import runs
from runs import make_run

from slmjax import records
from slmjax.signals import stop_on_signal

STEPS = {"train.steps": 120, "log.eval_every": 9}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    runs.train_here(folder, make_run(STEPS))
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "number, distributed",
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR1, False), (signal.SIGTERM, True)],
    ids=["SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM-distributed"],
)
def test_a_signal_saves_and_exits_with_3(number, distributed, straight, tmp_path, seed):
    run = make_run(STEPS)
    with runs.child(tmp_path, run, pause_s=0.03, port=distributed and free_port()) as process:
        runs.wait_for(lambda: runs.num_lines(tmp_path, run) > 3, process)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        runs.signal_to(process, number)
        assert runs.ended(process) == 3
    status = json.loads((tmp_path / run.run_id / "status.json").read_text())
    assert status["state"] == "preempted" and 0 < status["step"] < 120
    assert not (tmp_path / run.run_id / "DONE").exists() and not (tmp_path / run.run_id / "lease.json").exists()
    stopped = runs.load(tmp_path, run)
    assert stopped.end["status"] == "preempted"
    assert stopped.train[-1]["step"] == status["step"], "the metrics in flight were lost"
    assert runs.train_here(tmp_path, run) == {run.run_id: "done"}
    attempts = [records.read_lines(path) for path in records.attempt_files(tmp_path / run.run_id)]
    assert attempts[1][0]["step"] == status["step"], "steps were redone"
    runs.assert_same(straight, tmp_path, run)


def test_a_signal_saves_every_member_and_marks_those_waiting(tmp_path):
    pack = [make_run({"train.seed": seed}) for seed in range(3)]
    outcome = runs.train_here(tmp_path, *pack, members=2, progress=runs.StopAt(7, signal.SIGTERM))
    assert list(outcome.values()) == ["preempted"] * 3 and outcome.exit_code == 3
    assert {runs.load(tmp_path, run).end["step"] for run in pack[:2]} == {runs.load(tmp_path, pack[0]).end["step"]}
    assert not (tmp_path / pack[2].run_id).exists(), "a run that had not begun is left alone"
    assert runs.train_here(tmp_path, *pack, members=2).exit_code == 0
    for run in pack:
        runs.train_here(tmp_path / "straight", run, members=2)
        runs.assert_same(tmp_path / "straight", tmp_path, run)


def test_the_second_signal_ends_the_process_at_once(straight, tmp_path):
    run = make_run(STEPS | {"log.checkpoint_every": 4})
    with runs.child(tmp_path, run, pause_s=20) as process:  # as if a step hung
        runs.wait_for(lambda: runs.num_lines(tmp_path, run) > 2, process)
        runs.signal_to(process, signal.SIGTERM)
        time.sleep(0.3)
        assert process.is_alive(), "the first one waits for the step"
        runs.signal_to(process, signal.SIGTERM)
        assert runs.ended(process, limit_s=5) == -signal.SIGTERM
    runs.train_here(tmp_path, run)
    runs.assert_same(straight, tmp_path, run)


def test_signals_during_start_up_lose_nothing(straight, tmp_path, seed):
    """Before its handlers are there the process dies of the signal, later it saves; either way nothing is lost."""
    run, rng = make_run(STEPS), random.Random(seed)
    runs.stop_at(tmp_path, run, 33)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        with runs.child(tmp_path, run, pause_s=0.05) as process:
            time.sleep(rng.uniform(0, 1.6))
            runs.signal_to(process, number)
            assert runs.ended(process) in (3, -number)
    runs.train_here(tmp_path, run)
    runs.assert_same(straight, tmp_path, run)


def test_a_signal_during_compilation_exits_with_3(tmp_path):
    run = make_run(STEPS)
    with runs.child(tmp_path, run, settings={"jax_enable_compilation_cache": False}) as process:
        runs.wait_for((tmp_path / run.run_id / "attempt-000.jsonl").exists, process)  # init compiles next
        runs.signal_to(process, signal.SIGTERM)
        assert runs.ended(process) == 3
    assert runs.load(tmp_path, run).end["step"] == 0, "it stopped before its first step was compiled"
    assert not (tmp_path / run.run_id / "checkpoints").exists(), "there was nothing to save"
    assert runs.train_here(tmp_path, run) == {run.run_id: "done"}


def test_handlers_are_put_back():
    numbers = stop_on_signal.SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signal() as stop:
        assert [signal.getsignal(number) for number in numbers] == [stop._catch] * 3
        assert not stop.requested
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
        assert [signal.getsignal(number) for number in numbers] == before
    assert [signal.getsignal(number) for number in numbers] == before
