"""What the TPU launcher does next, a pure function: as a table, and on random walks through a cloud at its worst."""

import random

import pytest

from slmjax.launchers import tpu_machine
from slmjax.launchers.tpu_machine import Look, Note, next_step

STATES = (
    *("STATE_UNSPECIFIED", "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
    *("ACTIVE", "SUSPENDING", "SUSPENDED", "FAILED", "DELETING"),
)
COMING, LEAVING = STATES[:5], ("SUSPENDING", "DELETING")
ASKED = ("create", "start", "stop", "delete", "over")
PROCESSES = ("absent", "running", "ended", "no answer")


def do(asked, state, process="no answer", code=0, **changes):
    """(what is done, to which attempt) at attempt 2; None: it is not listed."""
    note = Note("r", "p", attempt=2, asked=asked, **{"missing": 1} | changes)
    step = next_step(note, Look({} if state is None else {2: state}, process, code, now=1000.0))
    return step.do, step.attempt


def test_every_state_after_every_deed():
    for asked in ("create", "start"):
        for state in (*COMING, *LEAVING):
            assert do(asked, state) == ("wait", 2), (asked, state)
        for state in ("SUSPENDED", "FAILED"):
            assert do(asked, state) == ("delete", 2), (asked, state)
        assert do(asked, "ACTIVE", "absent") == do(asked, "ACTIVE", "absent", trained=True) == ("start", 2)
        assert do(asked, "ACTIVE", "running") == do(asked, "ACTIVE", "no answer") == ("wait", 2)
        for code in (0, 1, 2, 4, 137):
            assert do(asked, "ACTIVE", "ended", code) == ("delete", 2), code
        for code in (tpu_machine.PREEMPTED, tpu_machine.SET_UP_FAILED):
            assert do(asked, "ACTIVE", "ended", code) == ("start", 2), code
    assert do("create", None) == ("create", 2), "the request was lost: the same name again"
    assert do("start", None) == do("delete", None) == ("create", 3), "it was there: another"
    assert do("start", None, missing=0) == ("wait", 2), "one listing may be wrong"
    for state in STATES:
        for process in PROCESSES:
            assert do("delete", state, process)[0] == ("wait" if state == "DELETING" else "delete"), state
    for state in (None, *STATES):
        assert do("over", state) == ("over", 2)


def test_every_state_when_no_more_is_wanted():
    for end in ("done", "gave up", "cancelled"):
        for asked in ("create", "start", "stop", "delete"):
            assert do(asked, None, end=end)[0] == "over"
            for state in STATES:
                if state not in ("ACTIVE", "DELETING"):
                    assert do(asked, state, end=end)[0] == "delete", (end, asked, state)
    assert do("start", "ACTIVE", "running", end="cancelled", stop_by=2000.0) == ("stop", 2)
    assert do("stop", "ACTIVE", "running", end="cancelled", stop_by=2000.0) == ("wait", 2)
    assert do("stop", "ACTIVE", "running", end="cancelled", stop_by=999.0) == ("delete", 2)
    assert do("stop", "ACTIVE", "ended", 3, end="cancelled", stop_by=2000.0) == ("delete", 2)
    assert do("start", "ACTIVE", "running", end="done") == ("delete", 2)


def test_strays_go_before_anything_else():
    note = Note("r", "p", attempt=2, asked="start", trained=True)
    step = next_step(note, Look({1: "ACTIVE", 2: "ACTIVE"}, "running"))
    assert (step.do, step.attempt) == ("delete", 1)
    step = next_step(note, Look({2: "DELETING", 5: "PROVISIONING"}))
    assert (step.do, step.attempt, step.note.attempt) == ("wait", 2, 5)


def test_failures_pause_and_end():
    note, now, pauses = Note("r", "p"), 0.0, []
    for _ in range(tpu_machine.MAX_FAILURES):
        assert not note.end
        note = tpu_machine.refused(note, "RESOURCE_EXHAUSTED: no quota", now)
        pauses.append(note.retry_at - now)
        seen_twice = next_step(next_step(note, Look({}, now=now)).note, Look({}, now=now))
        assert seen_twice.do == ("over" if note.end else "wait")
        now = note.retry_at
    assert pauses == sorted(pauses) and pauses[0] == tpu_machine.FIRST_PAUSE_S and note.end == "gave up"
    assert "no quota" in seen_twice.say
    assert tpu_machine.refused(Note("r", "p"), "PERMISSION_DENIED", 0.0).end == "gave up"
    assert tpu_machine.refused(Note("r", "p", end="cancelled"), "PERMISSION_DENIED", 0.0).end == "cancelled"


def test_a_start_that_comes_to_nothing_ends():
    note = Note("r", "p", asked="create")
    for _ in range(tpu_machine.MAX_FAILURES):
        step = next_step(note, Look({0: "ACTIVE"}, "absent"))
        assert step.do == "start"
        note = step.note
    assert next_step(note, Look({0: "ACTIVE"}, "absent")).note.end == "gave up"


def test_silence_is_taken_for_a_loss():
    note = Note("r", "p", asked="start", trained=True)
    for i in range(tpu_machine.MAX_SILENT):
        step = next_step(note, Look({0: "ACTIVE"}, "no answer"))
        assert step.do == ("delete" if i == tpu_machine.MAX_SILENT - 1 else "wait")
        note = step.note
    assert not note.end, "it has trained: another is asked for"


# --- random walks ----------------------------------------------------------------------------------------------------


class Cloud:
    """Does what it is told or not, and changes by itself; `hostile` says how often."""

    def __init__(self, dice: random.Random, hostile: float):
        self.dice, self.hostile = dice, hostile
        self.resources: dict[int, str] = {}
        self.process, self.code, self.most_live = "absent", 0, 0
        self.work = dice.randrange(1, 6)  # looks at a running process until it ends

    def bad(self) -> bool:
        return self.dice.random() < self.hostile

    def live(self) -> list[int]:
        return [i for i, state in self.resources.items() if state not in ("SUSPENDED", "FAILED", "DELETING")]

    def age(self) -> None:
        for i, state in list(self.resources.items()):
            if state == "DELETING" and not self.bad():
                del self.resources[i]
            elif state in COMING:
                self.resources[i] = "FAILED" if self.bad() else self.dice.choice(STATES[STATES.index(state) : 6])
            elif state == "SUSPENDING":
                self.resources[i] = "SUSPENDED"
            elif state == "ACTIVE" and self.bad():
                self.resources[i], self.process = self.dice.choice(("SUSPENDING", "SUSPENDED", "FAILED")), "absent"
        if self.process == "running":
            self.work -= 1
            if self.bad():
                self.process, self.code = "ended", self.dice.choice((1, 3, 100, 137))
            elif self.work <= 0:
                self.process, self.code = "ended", 0

    def look(self, now: float, blind: bool) -> Look:
        listed = {} if blind else dict(self.resources)
        answers = not self.bad()
        return Look(listed, self.process if answers else "no answer", self.code, now)

    def obey(self, step, now: float) -> Note:
        note = step.note
        if step.do == "create":
            if self.bad():
                return note if self.bad() else tpu_machine.refused(note, "no capacity", now)
            self.resources.setdefault(step.attempt, "CREATING")
            self.process = "absent"
        elif step.do == "start" and not self.bad():
            self.process = "running"
        elif step.do == "stop" and not self.bad() and self.process == "running":
            self.process, self.code = "ended", 3
        elif step.do == "delete" and not self.bad():
            self.resources[step.attempt] = "DELETING"
        self.most_live = max(self.most_live, len(self.live()))
        return note


@pytest.mark.parametrize("hostile", [0.0, 0.1, 0.3, 0.6])
def test_no_walk_has_two_resources_or_leaves_one(seed, hostile):
    ends = set()
    for i in range(300):
        dice = random.Random(f"{seed} {hostile} {i}")
        cloud, note, now = Cloud(dice, hostile), Note("r", "p"), 0.0
        cancel_at, blind = dice.choice((None, dice.randrange(40))), False
        for tick in range(2000):
            now += 20.0
            if tick > 400:
                cloud.hostile = 0.0  # peace comes in the end
            cloud.age()
            blind = not blind and cloud.bad()  # never twice in a row
            if tick == cancel_at and note.asked != "over":
                note = tpu_machine.cancelled(note, now)
            step = next_step(note, cloud.look(now, blind))
            if step.do == "over":
                break
            # A launcher may die between the note and the deed, and the next one has only the note.
            note = step.note if cloud.bad() else cloud.obey(step, now)
            assert cloud.most_live <= 1, (i, tick, cloud.resources)
        assert step.do == "over" and step.note.end, (i, note, cloud.resources)
        assert not cloud.resources, (i, step.note, cloud.resources)
        ends.add(step.note.end)
    assert "cancelled" in ends and ("done" in ends or hostile > 0.5) and ("gave up" in ends) >= (hostile > 0.2)
    assert hostile or "gave up" not in ends
