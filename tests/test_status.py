"""What is shown of a study while it is trained, from folders that are written here, not trained."""

import json
import time

import pytest
import rich.console
import runs
from absl import flags as absl_flags

from slmjax import launchers, lease, records
from slmjax.cli import options
from slmjax.cli import study as study_verb
from slmjax.config import ConfigError
from slmjax.launchers import Pack, backends, board, causes, status, table
from slmjax.launchers.backend import BackendError, Seen
from slmjax.launchers.status import RunStatus


def row_of(run_id: str, state: str, reason: str | None = None) -> RunStatus:
    return RunStatus(run_id, {}, state, 1, 9, 3.0, None, 100, 1.0, 1, None, 0.5, None, reason)


@pytest.fixture
def study(tmp_path):
    """A function that writes a study whose runs are in these states."""

    def write(*states: str):
        ids = [f"run{i:03d}" for i in range(len(states))]
        entries = [{"run_id": run_id, "tags": {}} for run_id in ids]
        records.write_json(tmp_path / "study.json", {"name": "s", "runs": entries})
        (tmp_path / "packs").mkdir(exist_ok=True)
        for i, (run_id, state) in enumerate(zip(ids, states, strict=True)):
            if state == "queued":
                continue
            run_dir = tmp_path / run_id
            run_dir.mkdir(exist_ok=True)
            reason = f"OSError: [Errno 28] {'no room ' * 20}" if state == "failed" else None
            said = {"state": state, "step": i, "total_steps": 999, "loss": 3.0, "tokens_per_s": 5, "reason": reason}
            records.write_json(run_dir / "status.json", said | {"time": time.time(), "pid": 1})
            if state == "done":
                (run_dir / "DONE").touch()
        return tmp_path

    return write


def make_table(rows):
    return options.make_table(rows, table.LEFT, table.STYLES)


def watched(folder, monkeypatch, looks=1) -> list[table.Look]:
    """What `watch` has shown without a terminal; more looks than it may take fail the test."""
    seen, sleeps = [], []
    monkeypatch.setattr(
        time, "sleep", lambda s: sleeps.append(s) if len(sleeps) < looks - 1 else pytest.fail("goes on")
    )
    table.watch(folder, make_table, seen.append)
    return seen


# ---- watching -------------------------------------------------------------------------------------------------------


def test_watching_ends_when_nothing_runs_and_nothing_is_in_hand(study, monkeypatch, capsys):
    folder = study("done", "queued", "running", "failed", "preempted")  # without a lease, one that runs was killed
    reads, study_status = [], status.study_status
    monkeypatch.setattr(status, "study_status", lambda folder: reads.append(1) or study_status(folder))
    (seen,) = watched(folder, monkeypatch)
    assert [row["state"] for row in seen.shown] == ["done", "queued", "killed", "failed", "preempted"]
    assert len(reads) == 1 and "nothing is running and nothing is in hand" in capsys.readouterr().out
    watched(study("done", "failed", "diverged"), monkeypatch)
    assert capsys.readouterr().out == ""


def test_watching_goes_on_while_there_is_something_to_wait_for(study, monkeypatch):
    folder = study("done", "queued", "queued")
    for lock in ("launcher", "pack"):
        with launchers.held(folder / "packs" / f"{lock}.lock"), pytest.raises(pytest.fail.Exception, match="goes on"):
            watched(folder, monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(backends, "in_hand", lambda folder: ({"run001": ("slurm", Seen("waiting", "job 7"))}, []))
        with pytest.raises(pytest.fail.Exception, match="goes on"):
            watched(folder, m)
        m.setattr(backends, "in_hand", lambda folder: ({}, [f"slurm: {BackendError('no answer')}"]))
        with pytest.raises(pytest.fail.Exception, match="goes on"):
            watched(folder, m)
    with lease.RunLease(folder / "run001"), monkeypatch.context() as m, pytest.raises(pytest.fail.Exception):
        study("done", "running", "queued")
        watched(folder, m)
    watched(folder, monkeypatch)


def test_what_asking_brings_home_is_shown_at_once(study, monkeypatch):
    folder = study("queued")
    monkeypatch.setattr(backends, "in_hand", lambda folder: (study("done"), ({}, []))[1])
    assert table.look(folder).shown[0]["state"] == "done"


@pytest.mark.parametrize("height", [12, 25, 40])
def test_what_matters_most_is_seen_on_a_small_terminal(study, height):
    states = ["done"] * 100 + ["failed"] * 3 + ["queued"] * 97
    console = rich.console.Console(width=120, height=height)
    seen = table.look(study(*states))
    with console.capture() as capture:
        console.print(table._fitted(seen, make_table, console))
    lines = capture.get().splitlines()
    assert len(lines) <= height and lines[0].startswith("100 done, 3 failed, 97 queued of 200 runs")
    assert any(line.startswith("3 disk: run100 run101 run102; free space") for line in lines)
    rows = [line.split()[0] for line in lines if line.startswith(" run") and not line.startswith(" run ")]
    assert rows[:4] == ["run100", "run101", "run102", "run103"], "a line each, what failed before what waits"
    assert any(line.startswith(f"{200 - len(rows)} others are not shown") for line in lines)
    assert len(lines) > height - 2, "no line of the terminal is left free"
    few = seen._replace(shown=seen.shown[:2])
    assert "not shown" not in str(console.render_lines(table._fitted(few, make_table, console)))


def test_json_is_not_watched(study):
    flags = absl_flags.FlagValues()
    study_verb.define(flags)
    folder = study("done")
    flags(["slmjax", f"--study={folder}", "--watch", "--json"])
    with pytest.raises(ConfigError, match="--json tells once"):
        study_verb.run(flags, ["status"])


# ---- causes and the launcher's board --------------------------------------------------------------------------------


def test_room_is_asked_for_only_where_a_disk_is_full_or_broken():
    for number, kind in ((28, "disk"), (122, "disk"), (5, "disk"), (116, "error"), (37, "error"), (13, "error")):
        assert causes.cause(row_of("a", "failed", f"OSError: [Errno {number}] said so"))[0] == kind, number


@pytest.mark.parametrize(("count", "lines"), [(10, 11), (40, 5)])
def test_a_log_is_not_flooded_by_what_runs(tmp_path, capsys, count, lines):
    many = [runs.make_run({"train.seed": seed}) for seed in range(count)]
    for i, run in enumerate(many):
        said = {"state": "running", "step": count - i, "total_steps": 99, "loss": 3.0, "tokens_per_s": 5}
        (tmp_path / run.run_id).mkdir()
        (tmp_path / run.run_id / "status.json").write_text(json.dumps(said))
    with board.Board(tmp_path, many) as shown:
        capsys.readouterr()
        shown.update([Pack(tmp_path, many, "p")], 0)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == lines and f"0/{count} runs" in told[0]
    if count > 10:
        assert [line.split()[0] for line in told[1:4]] == [run.run_id for run in many[:-4:-1]]
        assert "37 others" in told[4]
