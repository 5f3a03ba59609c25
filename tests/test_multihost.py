"""Two processes train a run as one does: the same numbers, one writer, one end; and what one cannot do, none does."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from test_signals import free_port

from slmjax import cli, data, environment, launchers, lease, member, processes, records, study, train
from slmjax.launchers.local import Local
from slmjax.study import Run, Study

DEVICES = 2  # of each process; as many together as this process has, which is the one they are compared with
FEATURES = {"mesh.data": 0, "train.steps": 48, "log.eval_every": 20}


def make_pack(out: Path, *changes: dict) -> launchers.Pack:
    """OUT/s/packs/<program>.json of runs that share a program."""
    cells = [study.Cell(change) for change in changes or ({},)]
    made = Study("s", runs.make_config(FEATURES), cells)
    folder = made.save(out)
    (pack,) = Local(folder).packs(made, folder, set())
    launchers.write_packs([pack])
    return pack


def _child(rank: int, size: int, port: int, argv: list[str], settings: dict) -> None:
    """`slmjax ARGV` as process `rank`: what `environment.prepare` does for a command is done by hand."""
    os.environ |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(size)}
    os.environ["JAX_PROCESS_ID"] = str(rank)
    with open(f"{settings['log']}.{rank}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    environment.prepare = lambda: None
    train.Progress = lambda quiet: runs.Paced(settings.get("pause_s", 0.0))
    # Of process 0's clock many checkpoints are due, of the other's none.
    member.CHECKPOINT_INTERVAL_S = 1e9 if rank else settings.get("interval_s", 60.0)
    os.chdir(settings.get("cwd", {}).get(rank, "."))
    if settings.get("fail_at") and rank == 1:
        _break_data(*settings["fail_at"])
    code = cli.main(argv)
    sys.stdout.flush()
    os._exit(code)


def _break_data(seed: int, at: int) -> None:
    open_dataset = data.open_dataset

    def failing(cfg):
        dataset = open_dataset(cfg)

        def batch_at(step):
            if cfg.train.seed == seed and step == at:
                raise data.DataError("tokens.bin: offset 77 is out of range")
            return dataset.batch_at(step)

        return dataset._replace(batch_at=batch_at)

    data.open_dataset = failing


@contextlib.contextmanager
def started(*argvs: list[str], **settings):
    """A process for each argv; what still lives at the end of the block is killed."""
    port = free_port()
    args = [(rank, len(argvs), port, argv, settings) for rank, argv in enumerate(argvs)]
    children = [runs._context.Process(target=_child, args=each) for each in args]
    for child in children:
        child.start()
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.join()


def launch(pack: launchers.Pack, log: Path, size: int = 2, **settings):
    argv = ["pack", str(pack.path("json")), "--distributed"]
    return started(*[argv] * size, log=log, **settings)


def codes(children) -> list[int]:
    return [runs.ended(child, 120.0) for child in children]


def assert_one_writer(folder: Path, run: Run, launches: int) -> None:
    attempts = [records.read_lines(path) for path in records.attempt_files(folder / run.run_id)]
    assert len(attempts) == launches
    for lines in attempts:
        steps = [(line["kind"], line["step"]) for line in lines]
        assert len(steps) == len(set(steps)), "a line was written twice"
        assert [line["kind"] for line in lines].count("start") == 1
    assert not (folder / run.run_id / "lease.json").exists()


def assert_close(a: dict, b: dict) -> None:
    """Two runs' losses and gradient norms by step, as `runs.losses` gives them."""
    assert list(a) == list(b)
    values = [[[float.fromhex(v) for v in line[:2]] for line in each.values()] for each in (a, b)]
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A pack that two processes trained undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    pack = make_pack(out)
    with launch(pack, out / "log") as children:
        assert codes(children) == [0, 0], (out / "log.0").read_text()
    return pack


def test_two_processes_are_one_with_their_devices(straight, tmp_path):
    (run,) = straight.runs
    assert len(jax.devices()) == 2 * DEVICES
    assert runs.train_here(tmp_path, run) == {run.run_id: "done"}
    one, two = runs.load(tmp_path, run), runs.load(straight.folder, run)
    assert one.start["mesh"] == two.start["mesh"] and two.start["mesh"]["data"] == 4
    assert_close(runs.losses(tmp_path, run), runs.losses(straight.folder, run))
    assert [line["step"] for line in two.evals] == [20, 40, 48]
    np.testing.assert_allclose(*([(line["loss"], line["loss_se"]) for line in r.evals] for r in (one, two)), rtol=1e-5)
    assert_one_writer(straight.folder, run, launches=1)


def test_a_signal_to_one_stops_all_at_one_step(straight, tmp_path):
    pack = make_pack(tmp_path)
    (run,) = pack.runs
    with launch(pack, tmp_path / "log", pause_s=0.05, interval_s=0.1) as children:
        runs.wait_for(lambda: runs.num_lines(pack.folder, run) > 12, children[0])
        runs.signal_to(children[1], signal.SIGTERM)
        assert codes(children) == [3, 3], (tmp_path / "log.0").read_text()
    stopped = runs.load(pack.folder, run)
    assert stopped.end["status"] == "preempted" and 8 < stopped.end["step"] < 48
    assert stopped.train[-1]["step"] == stopped.end["step"]
    steps = sorted(path.name for path in (pack.folder / run.run_id / "checkpoints").glob("step-*"))
    assert len(steps) == 2, "process 0's clock asked for a checkpoint before the last"
    assert steps[-1] == f"step-{stopped.end['step']:08d}"

    shutil.copytree(tmp_path, tmp_path / "copy")
    with launch(pack, tmp_path / "log") as children:
        assert codes(children) == [0, 0], (tmp_path / "log.0").read_text()
    assert runs.load(pack.folder, run).num_attempts == 2
    runs.assert_same(straight.folder, pack.folder, run)
    assert_one_writer(pack.folder, run, launches=2)

    # On one process with half of the devices, and on two again: the same data in the same order.
    there = launchers.read_pack(tmp_path / "copy" / "s" / "packs" / pack.path("json").name)
    halfway = (stopped.end["step"] + 48) // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:DEVICES])
        assert runs.stop_at(there.folder, run, halfway) == {run.run_id: "preempted"}
    assert runs.load(there.folder, run).end["step"] == halfway
    with launch(there, tmp_path / "log") as children:
        assert codes(children) == [0, 0], (tmp_path / "log.0").read_text()
    assert_close(runs.losses(there.folder, run), runs.losses(straight.folder, run))
    assert_one_writer(there.folder, run, launches=3)


def test_processes_with_other_configs_are_refused(tmp_path):
    pack, other = make_pack(tmp_path), make_pack(tmp_path / "other", {"optim.lr": 0.03})
    argvs = [["pack", str(p.path("json")), "--distributed"] for p in (pack, other)]
    with started(*argvs, log=tmp_path / "log") as children:
        assert codes(children) == [2, 2]
    for rank in range(2):
        said = (tmp_path / f"log.{rank}").read_text()
        assert "process 1 has optim.lr=0.03, and process 0 has optim.lr=0.02" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("attempt-*"))


def test_processes_with_other_data_are_refused(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for i in range(40):
            (tmp_path / str(rank) / f"{i}.txt").write_text(f"{i} is followed by {i + 1 + rank}. " * 40)
    changes = {"data.sources": ("*.txt",), "data.tokenizer": "byte", "data.held_out": 0.25}
    pack = make_pack(tmp_path, changes)
    with launch(pack, tmp_path / "log", cwd={rank: str(tmp_path / str(rank)) for rank in range(2)}) as children:
        assert codes(children) == [2, 2]
    for rank in range(2):
        assert "process 1 has data.corpus=" in (tmp_path / f"log.{rank}").read_text()
    told = runs.load(pack.folder, pack.runs[0])
    assert told.end["status"] == "failed" and "data.corpus" in told.end["reason"] and not told.train


def test_what_fails_in_one_process_fails_in_both_and_the_rest_goes_on(tmp_path):
    pack = make_pack(tmp_path, {}, {"train.seed": 1}, {"train.seed": 2})
    held, broken, sound = pack.runs
    with lease.RunLease(pack.folder / held.run_id), launch(pack, tmp_path / "log", fail_at=(1, 22)) as children:
        assert codes(children) == [1, 1], (tmp_path / "log.0").read_text()
    assert "in use by pid" in (tmp_path / "log.0").read_text()
    assert not records.attempt_files(pack.folder / held.run_id)
    told = runs.load(pack.folder, broken)
    assert told.end["status"] == "failed" and "process 1: DataError: tokens.bin: offset 77" in told.end["reason"]
    assert told.train[-1]["step"] <= 22, "a step on a batch that was not there was logged"
    assert runs.load(pack.folder, sound).done and (pack.folder / sound.run_id / "DONE").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_other(straight, tmp_path):
    pack = make_pack(tmp_path)
    (run,) = pack.runs
    with launch(pack, tmp_path / "log", pause_s=0.1, interval_s=0.1) as children:
        runs.wait_for(lambda: runs.num_lines(pack.folder, run) > 16, children[0])
        began = time.monotonic()
        children[1].kill()
        code = runs.ended(children[0], 2 * processes.HEARTBEAT_TIMEOUT_S)
        print(f"the other ended after {time.monotonic() - began:.1f} s with code {code}")
    assert code == 3 or code < 0, "it is to be started again, or JAX has ended it"
    assert runs.load(pack.folder, run).status["state"] == "running", "nothing is wrong with the run"
    assert runs.train_here(pack.folder, run) == {run.run_id: "done"}
    assert records.read_lines(records.attempt_files(pack.folder / run.run_id)[1])[0]["step"] > 0
    assert_close(runs.losses(pack.folder, run), runs.losses(straight.folder, run))


def test_nothing_to_find_rank_and_size_from(tmp_path, monkeypatch, capsys):
    pack = make_pack(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda: None)
    for name in ("SLURM_JOB_ID", processes.ADDRESS, processes.SIZE, processes.RANK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    assert cli.main(["pack", str(pack.path("json")), "--distributed"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "srun" in said and "JAX_NUM_PROCESSES=N" in said
    assert json.loads(pack.path("json").read_text())["runs"]


def test_a_process_takes_the_whole_node_where_it_is_alone_on_it():
    devices = processes._local_device_ids
    assert devices({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}) == []
    assert devices({}) is devices({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) is None
    assert devices({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}) is None
    assert devices({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}) is None
