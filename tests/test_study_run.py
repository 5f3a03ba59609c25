"""The local launcher on a real study: kills lose nothing, a failure is labelled, and what is done stays done."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slmjax import cli, environment, launchers, lease, records
from slmjax.launchers import budget, local, status

STUDY = """
from experiments import base
from slmjax import config
from slmjax.study import Cell, Study, branch, chain

def get_study(arg=""):
    c = base.get_config("tiny")
    c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:16:1",), "none", 16
    base.resize(c, 32, 1, 16)
    c.train.batch_size, c.train.eval_sequences, c.train.steps = 8, 16, 300
    c.schedule.warmup_steps = 5
    c.log.tensorboard, c.log.log_every, c.log.eval_every, c.log.checkpoint_every = False, 10, 0, 50
    lengths = (300, 100_000) if arg == "long" else (300, 600)
    cells = branch([Cell({}, {"data": "good"})], lengths, decay_fraction=0.2)
    if arg == "broken":
        cells = chain([Cell({"data.sources": ("no/such.bin",), "model.vocab_size": 16}, {"data": "bad"})], cells)
    return Study("s", config.resolve(c), cells)
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "s.py"
    path.write_text(STUDY)
    return path


def command(action, study_file, out, *more):
    return [sys.executable, "-m", "slmjax", "study", action, f"--study={study_file}", f"--out={out}", *more]


def launch(study_file, out, *more):
    return subprocess.Popen(
        command("run", study_file, out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(study_file, out, *more):
    process = launch(study_file, out, *more)
    try:
        return process, *process.communicate(timeout=180)
    finally:
        process.kill()


def table(folder):
    """What a run came to, without what depends on when and where."""
    return {
        row.run_id: (row.state, row.step, row.total_steps, row.loss, row.bits_per_byte)
        for row in status.study_status(folder)
    }


@pytest.fixture(scope="module")
def undisturbed(study_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    process, said, heard = finish(study_file, out, "--json")
    assert process.returncode == 0, heard
    assert [row["state"] for row in json.loads(said)] == ["done"] * 3
    return out / "s"


def pack_pids(folder):
    return [pid for path in folder.glob("packs/*.lock") if path.name != "launcher.lock"
            and (pid := launchers.holder_of(path))]  # fmt: skip


def wait_until(condition, process, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, f"the launcher ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, f"nothing after {limit_s} s"
        time.sleep(0.02)


def saved(folder):
    """Steps of all checkpoints on disk."""
    return sorted(path.parent.parent.name + path.name for path in folder.glob("*/checkpoints/*"))


def test_kills_lose_nothing_and_nothing_runs_twice(study_file, undisturbed, tmp_path):
    """The launcher killed with its process living on; then both killed, again and again, until the study is done."""
    folder = tmp_path / "s"
    first = launch(study_file, tmp_path)
    wait_until(lambda: pack_pids(folder), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (orphan,) = pack_pids(folder)
    second = launch(study_file, tmp_path)
    wait_until(lambda: saved(folder), second)
    assert pack_pids(folder) == [orphan], "the process of the killed launcher is taken on, not doubled"
    for process in (second, launch(study_file, tmp_path)):
        seen = saved(folder)
        wait_until(lambda seen=seen: saved(folder) != seen and pack_pids(folder), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pid in pack_pids(folder):
            os.kill(pid, signal.SIGKILL)
    killed = [row for row in status.study_status(folder) if row.state == "killed"]
    assert all("is gone" in row.reason for row in killed)

    last, _, heard = finish(study_file, tmp_path)
    assert last.returncode == 0, heard
    assert table(folder) == table(undisturbed)
    for run_id in table(folder):
        ends = [line for path in records.attempt_files(folder / run_id) for line in records.read_lines(path)
                if line["kind"] == "end"]  # fmt: skip
        assert [end["status"] for end in ends] == ["done"], f"{run_id} ended more than once"


def test_a_finished_study_does_nothing(study_file, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/*")}
    began = os.times()
    process, said, _ = finish(study_file, undisturbed.parent)
    ended = os.times()
    assert process.returncode == 0 and "3 done of 3" in said
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert "status.json" not in changed and not any(name.endswith((".jsonl", ".log")) for name in changed), changed
    assert ended.children_user - began.children_user < 1.5, "no process of JAX's was needed"


def test_a_failed_cell_is_labelled_and_the_others_finish(study_file, undisturbed, tmp_path):
    process, said, heard = finish(f"{study_file}:broken", tmp_path, "--jobs=2")
    assert process.returncode == 1, heard
    rows = {row.run_id: row for row in status.study_status(tmp_path / "s")}
    bad = [row for row in rows.values() if row.state != "done"]
    assert [(row.state, row.tags["data"]) for row in bad] == [("failed", "bad")]
    assert "no/such.bin" in bad[0].reason and "no/such.bin" in said and "no/such.bin" in heard
    assert "Traceback" in (tmp_path / "s" / bad[0].run_id / "error.txt").read_text()
    for run_id, (state, step, _, loss, _) in table(undisturbed).items():
        assert (rows[run_id].state, rows[run_id].step) == (state, step)
        # Another number of cores rounds otherwise, which 600 noisy steps amplify to a few hundredths.
        assert rows[run_id].loss == pytest.approx(loss, abs=0.15)


def test_cancel_saves_and_stops_everything(study_file, tmp_path, capsys):
    study_file = f"{study_file}:long"  # it cannot end before it is cancelled
    folder, process = tmp_path / "s", launch(study_file, tmp_path)
    wait_until(lambda: saved(folder), process)
    twice = subprocess.run(command("run", study_file, tmp_path), capture_output=True, text=True, timeout=60)
    assert twice.returncode == 2 and f"pid {process.pid}" in twice.stderr
    assert cli.main(["study", "cancel", f"--study={folder}"]) == 0
    # Only the launcher: its processes get the signal from it, and a second one would end them without saving.
    assert capsys.readouterr().out == f"asked to save and stop: pid {process.pid}\n"
    heard = process.communicate(timeout=60)[1]
    assert process.returncode == 3, heard
    states = [row.state for row in status.study_status(folder)]
    assert "preempted" in states and "killed" not in states and "running" not in states
    assert pack_pids(folder) == []
    assert cli.main(["study", "cancel", f"--study={folder}"]) == 0
    assert "nothing is running" in capsys.readouterr().out


def test_logs_tell_a_run_from_start_to_end(undisturbed, capsys):
    branch = next(run for run in records.load_study(undisturbed)[0]["runs"] if run["parent"])
    assert cli.main(["study", "logs", branch["run_id"][:6], f"--study={undisturbed}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"starts at step {branch['branch_step']} of {branch['tags']['steps']} from {branch['parent']}" in lines[0]
    assert lines[-1].startswith("done") and "loss" in lines[-1]


def test_what_a_process_printed_is_found(undisturbed, capfd):
    run_id = records.load_study(undisturbed)[0]["runs"][0]["run_id"]
    assert cli.main(["study", "logs", run_id, f"--study={undisturbed}", "--output"]) == 0
    assert f"{run_id}" in capfd.readouterr().out


def test_a_spent_budget_stops_the_study(study_file, tmp_path):
    """Once it is spent, what runs is saved and stopped and nothing more begins, by whatever way it is started."""
    study_file = f"{study_file}:long"
    process, _, heard = finish(study_file, tmp_path, "--device_hours=1e-6")
    assert process.returncode == 3 and "device-hours are spent, of a budget of 1e-06" in heard, heard
    states = [row.state for row in status.study_status(tmp_path / "s")]
    assert "preempted" in states and "done" not in states
    before = snapshot_of(tmp_path / "s")
    again, _, heard = finish(study_file, tmp_path)
    assert again.returncode == 3 and "device-hours are spent" in heard
    (pack,) = (tmp_path / "s" / "packs").glob("*.json")
    line = [sys.executable, "-m", "slmjax", "pack", str(pack)]
    alone = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 1 and "device-hours are spent" in alone.stderr
    assert snapshot_of(tmp_path / "s") == before


def snapshot_of(folder):
    return {path: path.read_bytes() for path in folder.glob("*/attempt-*.jsonl")}


def test_device_hours_count_every_attempt(tmp_path):
    """Those of a run's own devices, as far as the attempt's last line, however it ended."""
    for attempt, (mesh, wall_s, last) in enumerate(
        [
            ({"population": 4, "data": 2, "fsdp": 3}, 600, "train"),
            ({"population": 1, "data": 1, "fsdp": 1}, 3600, "end"),
        ]
    ):
        lines = [
            {"kind": "start", "mesh": mesh},
            {"kind": last, "wall_s": wall_s / 2},
            {"kind": last, "wall_s": wall_s},
        ]
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / f"attempt-{attempt:03d}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "r" / "status.json").write_text("{}")
    assert budget.device_hours(tmp_path) == pytest.approx(6 * 600 / 3600 + 1)
    assert budget.exceeded(tmp_path) is None
    budget.set_bound(tmp_path, 2.5)
    assert budget.exceeded(tmp_path) is None
    budget.set_bound(tmp_path, 2.0)
    assert "2 device-hours are spent, of a budget of 2" in budget.exceeded(tmp_path)
    with pytest.MonkeyPatch.context() as m:  # asked every few seconds, of all that a study has logged
        loads = json.loads
        m.setattr(records.json, "loads", lambda text: loads(text) if "kind" not in text else pytest.fail(text))
        assert budget.exceeded(tmp_path)


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_shares_cover_the_cores():
    cores = list(range(7))
    for jobs in range(1, 8):
        places = local.shares(cores, jobs)
        assert len(places) == jobs and [core for place in places for core in place] == cores and all(places)
    assert local.shares([3, 5], 4) == [[3], [5], [3], [5]]
    with pytest.raises(ValueError, match="jobs=0"):
        local.shares(cores, 0)


def packs_of(study_file, out):
    from slmjax.cli import options

    study = options.load_study(str(study_file))
    packs = local.Local(out).packs(study, study.save(out), set())
    launchers.write_packs(packs)
    return packs


def test_packs_survive_being_written_down(study_file, tmp_path):
    packs = packs_of(study_file, tmp_path)
    assert [pack.flops for pack in packs] == sorted((pack.flops for pack in packs), reverse=True)
    for pack in packs:
        assert launchers.read_pack(pack.path("json")) == pack
    path = packs[0].path("json")
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    with pytest.raises(ValueError, match="another version"):
        launchers.read_pack(path)


def test_a_pack_that_cannot_begin_is_every_runs_reason(study_file, tmp_path, monkeypatch):
    from slmjax import train

    pack = packs_of(study_file, tmp_path)[0]
    monkeypatch.setattr(train, "build_program", lambda *args: exec("raise MemoryError('no room')"))
    with pytest.raises(MemoryError):
        launchers.train_pack(pack)
    rows = {row.run_id: row for row in status.study_status(pack.folder)}
    assert all((rows[run.run_id].state, rows[run.run_id].reason) == ("failed", "MemoryError: no room")
               for run in pack.runs)  # fmt: skip


def test_a_running_status_of_a_dead_process_is_called_killed(study_file, tmp_path):
    pack = packs_of(study_file, tmp_path)[0]
    run_dir = pack.folder / pack.runs[0].run_id
    writer = None
    with lease.RunLease(run_dir):
        writer = records.RunWriter(run_dir)
        writer.status("running", step=1, total_steps=9, loss=2.0, tokens_per_s=5)
        assert status.find_run(pack.folder, run_dir.name).state == "running"
        holder = json.loads((run_dir / "lease.json").read_text())
        for change, state in (
            ({"process_start": "another"}, "killed"),  # its pid belongs to another process now
            ({"place": "another machine"}, "running"),  # which cannot be asked: its heartbeat is fresh
            ({"place": "another machine", "heartbeat": time.time() - 9999}, "killed"),
        ):
            (run_dir / "lease.json").write_text(json.dumps(holder | change))
            assert status.find_run(pack.folder, run_dir.name).state == state, change
        (run_dir / "lease.json").write_text(json.dumps(holder))
    writer.close()


def test_a_lock_is_free_when_its_holder_is_gone(tmp_path):
    path = tmp_path / "x.lock"
    with launchers.held(path) as mine:
        assert mine and launchers.holder_of(path) == os.getpid()
        with launchers.held(path) as again:
            assert not again
    assert launchers.holder_of(path) is None and Path(path).exists()


def test_who_looks_whether_a_lock_is_held_keeps_nobody_from_it(tmp_path):
    fd = launchers.take_lock(tmp_path / "x.lock")  # as `is_held` does
    threading.Timer(0.02, os.close, [fd]).start()
    with launchers.held(tmp_path / "x.lock") as mine:
        assert mine


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    refusal = OSError(errno.ENOSYS, "not implemented")
    monkeypatch.setattr(fcntl, "flock", lambda *_: exec("raise refusal", {"refusal": refusal}))
    with pytest.raises(ValueError, match=r"x\.lock cannot be locked \(.*not implemented\); .* file system with flock"):
        launchers.take_lock(tmp_path / "x.lock")


def test_a_process_pinned_to_a_core_sees_one():
    code = "from slmjax import environment as e; e.pin(e.cores()[:1]); print(len(e.cores()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "1"
    assert environment.cores()
