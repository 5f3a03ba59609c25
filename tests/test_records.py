"""Records survive any cut, say each step once, and never carry a number that was not measured."""

import json
import math

import pytest

from slmjax import records
from slmjax.records import RunWriter, load_run, load_study, read_lines


def attempt(run_dir, start: int, steps, evals=(), end: str | None = None, cut: int = 0):
    """One launch of a run: resumes at `start`, logs `steps`, and may end or be killed inside its last line."""
    writer = RunWriter(run_dir)
    writer.write("start", step=start, attempt=writer.attempt)
    for step in steps:
        writer.write("train", step=step, loss=1 / step, attempt=writer.attempt)
        if step in evals:
            writer.write("eval", step=step, loss=2 / step, attempt=writer.attempt)
    if end:
        writer.write("end", status=end, step=steps[-1])
    writer.close()
    if cut:
        path = records.attempt_files(run_dir)[-1]
        path.write_bytes(path.read_bytes()[:-cut])


def test_what_is_written_is_what_is_read(tmp_path):
    records.write_json(tmp_path / "config.json", {"a": [1, 2]})
    attempt(tmp_path, 0, [1, 2, 3], evals=[3], end="done")
    run = load_run(tmp_path)
    assert run.config == {"a": [1, 2]} and run.provenance is None and run.status is None
    assert [r["loss"] for r in run.train] == [1, 1 / 2, 1 / 3]
    assert [(r["step"], r["loss"]) for r in run.evals] == [(3, 2 / 3)]
    assert run.done and run.num_attempts == 1 and run.start["step"] == 0


def test_of_steps_logged_twice_the_later_attempt_wins(tmp_path):
    attempt(tmp_path, 0, range(1, 8), evals=[2, 4, 6])  # killed after 7; its last checkpoint was at 4
    attempt(tmp_path, 4, range(5, 7), evals=[6])  # killed again before another
    attempt(tmp_path, 4, range(5, 10), evals=[6, 8], end="done")
    run = load_run(tmp_path)
    assert [r["step"] for r in run.train] == list(range(1, 10))
    assert [r["attempt"] for r in run.train] == [0] * 4 + [2] * 5
    assert [(r["step"], r["attempt"]) for r in run.evals] == [(2, 0), (4, 0), (6, 2), (8, 2)]
    assert run.start["attempt"] == 0 and run.num_attempts == 3 and run.done


def test_a_cut_at_any_byte_loses_that_line_and_nothing_else(tmp_path):
    attempt(tmp_path, 0, [1, 2, 3])
    [path] = records.attempt_files(tmp_path)
    whole = path.read_bytes()
    last = len(whole) - whole[:-1].rindex(b"\n") - 1  # bytes of the last line, its newline included
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        steps = [r["step"] for r in read_lines(path) if r["kind"] == "train"]
        assert steps == ([1, 2, 3] if cut == 1 else [1, 2])


def test_a_run_killed_in_the_middle_of_a_line_goes_on_in_another_file(tmp_path):
    attempt(tmp_path, 0, [1, 2, 3], cut=5)
    attempt(tmp_path, 2, [3, 4], end="preempted")
    run = load_run(tmp_path)
    assert [r["step"] for r in run.train] == [1, 2, 3, 4]
    assert not run.done and run.end["status"] == "preempted"
    assert [p.name for p in records.attempt_files(tmp_path)] == ["attempt-000.jsonl", "attempt-001.jsonl"]


def test_a_run_that_an_attempt_left_without_end_is_not_done(tmp_path):
    attempt(tmp_path, 0, [1], end="done")
    attempt(tmp_path, 1, [2])
    assert load_run(tmp_path).end is None and not load_run(tmp_path).done


def test_damage_elsewhere_is_an_error_with_its_line(tmp_path):
    attempt(tmp_path, 0, [1, 2, 3])
    [path] = records.attempt_files(tmp_path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(ValueError, match=r"attempt-000.jsonl:2: not a JSON record"):
        load_run(tmp_path)


def test_every_line_can_be_read_while_the_run_goes_on(tmp_path):
    writer = RunWriter(tmp_path)
    writer.write("start", step=0)
    for step in (1, 2):
        writer.write("train", step=step)
        assert load_run(tmp_path).train[-1] == {"kind": "train", "step": step}
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_becomes_null_and_never_a_number(tmp_path, value):
    assert records.finite(value) is None and records.finite(None) is None and records.finite(0.5) == 0.5
    writer = RunWriter(tmp_path)
    with pytest.raises(ValueError):
        writer.write("train", step=1, loss=value)
    writer.write("train", step=1, loss=records.finite(value))
    assert load_run(tmp_path).train == [{"kind": "train", "step": 1, "loss": None}]


def test_status_is_whole_at_every_moment_and_of_a_known_state(tmp_path):
    writer = RunWriter(tmp_path)
    for step in (1, 2):
        writer.status("running", step=step)
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"], status["attempt"]) == ("running", step, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt-000.jsonl", "status.json"]
    with pytest.raises(AssertionError, match="runing"):
        writer.status("runing")


def test_an_attempt_is_never_written_over(tmp_path):
    for name in ("attempt-002.jsonl", "attempt-010.jsonl"):  # the others were cleaned away
        (tmp_path / name).touch()
    assert RunWriter(tmp_path).attempt == 11
    assert (tmp_path / "attempt-011.jsonl").exists()


def test_more_attempts_than_three_digits_are_still_in_order(tmp_path):
    for number in (998, 999, 1000):
        (tmp_path / f"attempt-{number:03d}.jsonl").write_text(json.dumps({"kind": "train", "step": number}) + "\n")
    assert [r["step"] for r in load_run(tmp_path).train] == [998, 999, 1000]
    assert RunWriter(tmp_path).attempt == 1001


def test_a_study_is_read_in_its_order_and_only_what_it_lists(tmp_path):
    runs = [{"run_id": name} for name in ("b", "a", "c")]
    records.write_json(tmp_path / "study.json", {"name": "s", "runs": runs})
    for name in ("a", "b", "stray"):
        attempt(tmp_path / name, 0, [1])
    study, loaded = load_study(tmp_path)
    assert list(loaded) == ["b", "a"] and study["runs"] == runs
    assert loaded["a"].run_id == "a"
    with pytest.raises(ValueError, match=r"not a study folder.*study.json"):
        load_study(tmp_path / "a")


def test_landmarks_tell_all_but_the_training(tmp_path):
    attempt(tmp_path, 0, range(1, 50), evals=[10, 40])
    attempt(tmp_path, 20, range(21, 40), evals=[30], cut=5)
    attempt(tmp_path, 20, range(21, 60), evals=[50], end="done")
    whole, told = load_run(tmp_path), load_run(tmp_path, records.read_landmarks)
    assert len(whole.train) == 59 and len(told.train) < 5
    whole.train = told.train = []
    assert told == whole and [r["step"] for r in told.evals] == [10, 50] and told.done


def test_what_a_run_has_cost_is_read_where_a_kill_cut_its_last_line(tmp_path):
    writer = RunWriter(tmp_path)
    writer.write("start", step=0, mesh={"population": 3, "data": 2})
    for step in range(1, 6):
        writer.write("train", step=step, wall_s=3600.0 * step)
    writer.close()
    path = records.attempt_files(tmp_path)[0]
    assert [load_run(tmp_path, read).device_hours for read in (read_lines, records.read_landmarks)] == [10, 10]
    path.write_bytes(path.read_bytes()[:-5])
    assert [load_run(tmp_path, read).device_hours for read in (read_lines, records.read_landmarks)] == [8, 8]


def test_landmarks_are_read_again_only_of_a_file_that_changed(tmp_path, monkeypatch):
    attempt(tmp_path, 0, range(1, 50))
    (path,) = records.attempt_files(tmp_path)
    before, reads, read_text = records.read_landmarks(path), [], records.paths.read_text
    monkeypatch.setattr(records.paths, "read_text", lambda path: reads.append(path) or read_text(path))
    assert records.read_landmarks(path) == before and not reads
    with path.open("a") as file:
        file.write('{"kind": "end", "status": "done", "step": 49}\n')
    assert records.read_landmarks(path)[-1]["kind"] == "end" and reads == [path]


def test_only_so_many_landmarks_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_REMEMBERED", 3)
    for i in range(10):
        attempt(tmp_path / str(i), 0, [1])
        records.read_landmarks(*records.attempt_files(tmp_path / str(i)))
    assert len(records._landmarks) <= 3
