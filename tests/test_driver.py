"""The driver over a backend made of lists: what is handed over when, what again, and what no more."""

import json
import os
import socket

import pytest
import runs

from slmjax import launchers, records
from slmjax.launchers import backends, budget, driver, table
from slmjax.launchers.backend import BackendError, Seen, chain_packs
from slmjax.launchers.local import Local, Place
from slmjax.study import Cell, Study, axis


class Listed:
    """A backend that has a pack for one look; `ends` says what becomes of its runs: run, number of launch → status."""

    name, attached, queues_after, places, poll_s = "listed", False, False, None, 0.0

    def __init__(self, folder, ends):
        self.folder, self.ends, self.given, self.now, self.cancelled, self.clock = folder, ends, [], {}, [], 1000.0

    def packs(self, plan, folder, busy):
        return chain_packs(plan, folder, busy)

    def submit(self, packs, after):
        self.given += [pack.name for pack in packs]
        self.now |= {pack.name: pack for pack in packs}

    def poll(self):
        for name, pack in self.now.items():
            for run in pack.unfinished:
                self.end(run, self.ends(run, self.given.count(name)))
        seen, self.now = dict.fromkeys(self.now, Seen("running")), {}
        return seen

    def end(self, run, said):
        run_dir = self.folder / run.run_id
        run_dir.mkdir(exist_ok=True)
        self.clock += 1  # another machine's, far behind ours
        if said.get("state") == "done":
            (run_dir / "DONE").touch()
        records.write_json(run_dir / "status.json", {"time": self.clock, "step": 0, "loss": 1.0, "reason": "", **said})

    def cancel(self, names):
        self.cancelled.append(list(names))
        return []


def drive(tmp_path, ends, watch=True, num_runs=2, **attributes):
    plan = Study("s", runs.make_config(), axis("train.seed", list(range(num_runs))))
    folder = plan.save(tmp_path)
    place = Listed(folder, ends)
    for name, value in attributes.items():
        setattr(place, name, value)
    return place, driver.run(plan, folder, place, watch)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(driver, "BACKOFF_S", 0.0)


def test_what_ends_without_a_word_is_tried_four_times(tmp_path):
    place, code = drive(tmp_path, lambda run, launch: {"state": "running"})
    assert code == 1 and len(place.given) == 2 * driver.MAX_LAUNCHES


def test_what_gets_further_each_time_is_never_given_up(tmp_path):
    def ends(run, launch):
        return {"state": "running", "step": launch} if launch < 12 else {"state": "done", "step": 12}

    place, code = drive(tmp_path, ends)
    assert code == 0 and len(place.given) == 24


@pytest.mark.parametrize(("state", "code"), [("failed", 1), ("diverged", 4)])
def test_a_runs_own_word_is_final_whatever_its_clock_says(tmp_path, state, code):
    place, got = drive(tmp_path, lambda run, launch: {"state": state})
    assert got == code and len(place.given) == 2


def test_stopped_and_saved_is_a_word_of_our_own_processes_alone(tmp_path):
    def ends(run, launch):
        return {"state": "preempted" if launch == 1 else "done"}

    place, code = drive(tmp_path / "elsewhere", ends)
    assert code == 0 and len(place.given) == 4
    place, code = drive(tmp_path / "here", ends, attached=True)
    assert code == 3 and len(place.given) == 2


def test_an_old_failure_is_tried_again_by_a_new_launch(tmp_path):
    drive(tmp_path, lambda run, launch: {"state": "failed"})
    place, code = drive(tmp_path, lambda run, launch: {"state": "done"}, clock=5000.0)
    assert code == 0 and len(place.given) == 2


def test_no_more_than_there_are_places_and_the_rest_is_told(tmp_path, capsys):
    place, code = drive(tmp_path, lambda run, launch: {"state": "done"}, watch=False, num_runs=5, places=2)
    assert code == 0 and len(place.given) == 2
    assert "3 packs wait" in capsys.readouterr().err


def test_a_spent_budget_cancels_until_that_is_heard(tmp_path, monkeypatch):
    """A scheduler that cannot be asked just then is asked again: what runs goes on costing."""
    monkeypatch.setattr(driver, "COUNT_INTERVAL_S", 0.0)
    plan = Study("s", runs.make_config(), [Cell()])
    folder = plan.save(tmp_path)
    place, refused = Listed(folder, lambda run, launch: {"state": "running"}), []

    def cancel(names):
        refused.append(list(names))
        if len(refused) < 3:
            raise BackendError("not now")
        return []

    def submit(packs, after):
        Listed.submit(place, packs, after)
        monkeypatch.setattr(budget, "exceeded", lambda folder: "it is spent")

    monkeypatch.setattr(place, "poll", lambda: dict.fromkeys(place.now, Seen("running")))
    monkeypatch.setattr(place, "submit", submit)
    monkeypatch.setattr(place, "cancel", cancel)
    assert driver.run(plan, folder, place, watch=True) == 3
    assert len(refused) == 3 and all(refused)


# ---- this machine ---------------------------------------------------------------------------------------------------


def test_a_process_that_ends_during_a_look_keeps_its_place_until_the_next(tmp_path, monkeypatch):
    (tmp_path / "packs").mkdir()
    place = Local(tmp_path, jobs=1)

    class Process:
        pid, code = 7, None

        def poll(self):
            return self.code

    process = Process()
    place.children["p"] = place.free.pop(), process
    assert set(place.poll()) == {"p"}, "a child that lives counts, also before its lock is seen"
    process.code = 0
    monkeypatch.setattr(place, "_held_locks", lambda: [tmp_path / "packs" / "p.lock"])
    assert set(place.poll()) == {"p"} and place.free == []
    monkeypatch.setattr(place, "_held_locks", lambda: [])
    assert place.poll() == {} and len(place.free) == 1


def test_gpus_of_an_earlier_launchs_process_are_left_to_it(tmp_path):
    (tmp_path / "packs").mkdir()
    place = Local(tmp_path, jobs=1)
    place.free = [Place([0], ["0"]), Place([1], ["1"])]
    fd = launchers.take_lock(tmp_path / "packs" / "old.lock")
    launchers.name_holder(fd, os.getpid(), cores=[0], gpus=["0"])
    assert place._take_place() == Place([1], ["1"])
    with pytest.raises(BackendError, match="GPUs are in use"):
        place._take_place()
    os.close(fd)
    assert place._take_place() == Place([0], ["0"])


def test_a_launcher_on_another_machine_is_named_before_anything_is_cancelled(tmp_path):
    plan = Study("s", runs.make_config(), [Cell()])
    folder = plan.save(tmp_path)
    lock = folder / "packs" / "launcher.lock"
    lock.parent.mkdir()
    fd = launchers.take_lock(lock)
    lock.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 5}))
    with pytest.raises(BackendError, match=f"pid 5 on not-{socket.gethostname()}"):
        backends.cancel(folder)
    os.close(fd)
    assert backends.cancel(folder) == []


def test_a_pack_of_another_version_says_so_in_its_runs(tmp_path):
    plan = Study("s", runs.make_config(), [Cell()])
    folder = plan.save(tmp_path)
    (pack,) = Local(folder).packs(plan, folder, set())
    launchers.write_packs([pack])
    path = pack.path("json")
    path.write_text(path.read_text().replace('"lr": 0.02', '"lr": 0.03'))
    with pytest.raises(ValueError, match="another version") as error:
        launchers.read_pack(path)
    launchers.refuse_pack(path, error.value)
    status = records.load_run(folder / pack.runs[0].run_id).status
    assert status["state"] == "failed" and "planned by another version" in status["reason"]


def test_a_process_that_ended_before_it_began_is_told(tmp_path):
    plan = Study("s", runs.make_config(), axis("train.seed", [0, 1]))
    folder = plan.save(tmp_path)
    first, second = chain_packs(plan, folder, set())
    launchers.write_packs([first, second])
    assert [row["reason"] for row in table.look(folder).shown] == ["", ""]
    first.path("log").write_text("slmjax: command not found\n")
    reasons = {row["run"]: row["reason"] for row in table.look(folder).shown}
    assert reasons[second.runs[0].run_id] == "" and f"logs {first.runs[0].run_id}" in reasons[first.runs[0].run_id]
    fd = launchers.take_lock(first.path("lock"))
    assert [row["reason"] for row in table.look(folder).shown] == ["", ""], "it is about to begin"
    os.close(fd)
