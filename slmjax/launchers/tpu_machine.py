"""What is to be done next for a pack on TPU queued resources: a pure function of what was done and what is seen.

A pack has one resource at a time, `<resource>-<attempt>`. A resource that the cloud took back (SUSPENDED) or could not
give (FAILED) is deleted, and once it is gone another is asked for under the next number. Whatever ends a pack, its last
act is to see its resource gone. Never here: commands, files, clocks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

MAX_FAILURES = 5  # in a row, with no training in between
MAX_SILENT = 30  # looks in a row at which the workers of an active resource did not answer
FIRST_PAUSE_S, MAX_PAUSE_S = 30.0, 900.0  # before another resource is asked for; doubled for each failure
SAVE_S = 300.0  # that a stopped pack has to save
LOST = ("SUSPENDED", "FAILED")
PREEMPTED, SET_UP_FAILED = 3, 100  # codes a pack may be started again after
HOPELESS = re.compile(r"INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|Invalid value|unrecognized arguments", re.I)


@dataclass(frozen=True)
class Note:
    """What was last done for a pack. It is on disk before it is done.

    since: when the pack was handed over.
    asked: `create`, `start`, `stop`, `delete`, or `over`: nothing is left, and nothing more will be done.
    trained: whether the pack was seen running on the resource of this attempt.
    end: why no further resource is wanted: `done`, `cancelled` or `gave up`; empty while one is.
    """

    resource: str
    pack: str
    since: float = 0.0
    attempt: int = 0
    asked: str = "create"
    trained: bool = False
    failures: int = 0
    silent: int = 0
    missing: int = 0  # looks in a row at which a resource that was there was not listed
    retry_at: float = 0.0
    stop_by: float = 0.0
    end: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.resource}-{self.attempt}"


@dataclass(frozen=True)
class Look:
    """What the cloud lists of a pack's resources, by attempt; and, of the newest when it is ACTIVE, its processes.

    process: `absent`, `running`, `ended` (with `code`) or `no answer`. finished: whether all runs of the pack have
    ended by their own word, as their folders say.
    """

    resources: Mapping[int, str]
    process: str = "no answer"
    code: int = 0
    now: float = 0.0
    finished: bool = False
    detail: str = ""  # what the cloud says about the newest


@dataclass(frozen=True)
class Step:
    """do: `wait`, or what `note.asked` says: `create`, `start`, `stop`, `delete`, of `attempt`; or `over`."""

    do: str
    note: Note
    attempt: int
    say: str = ""  # to a person; empty where nothing has changed


def next_step(note: Note, look: Look) -> Step:
    """The one thing to do now."""
    if note.asked == "over":
        return Step("over", note, note.attempt)
    if look.finished and look.process != "running" and not note.end:
        note = replace(note, end="done")
    newest = max([note.attempt, *look.resources])
    if newest > note.attempt:  # asked for by a launcher whose note is lost
        note = replace(note, attempt=newest, asked="create", trained=False)
    older = sorted(attempt for attempt in look.resources if attempt < newest)
    if older:  # a deletion that did not come about
        gone = look.resources[older[0]] == "DELETING"
        return Step("wait" if gone else "delete", note, older[0])
    state = look.resources.get(newest)
    if state is None:
        return _absent(note, look.now)
    note = replace(note, missing=0)
    if state == "DELETING":
        return Step("wait", note, newest)
    if note.asked == "delete" or (note.end and state != "ACTIVE"):
        return _delete(note)
    if state in LOST:
        what = "was taken back" if note.trained else f"came to nothing ({state}{': ' * bool(look.detail)}{look.detail})"
        return _delete(_failed(note, f"{note.name} {what}", look.now), f"{note.name} {what}")
    return _active(note, look) if state == "ACTIVE" else Step("wait", note, newest)


def refused(note: Note, said: str, now: float) -> Note:
    """After a creation that the cloud has refused. Some refusals will not be otherwise the next time."""
    note = _failed(note, said, now)
    return replace(note, end="gave up") if HOPELESS.search(said) and not note.end else note


def cancelled(note: Note, now: float) -> Note:
    return replace(note, end=note.end or "cancelled", stop_by=note.stop_by or now + SAVE_S)


def _absent(note: Note, now: float) -> Step:
    """Nothing exists: either that is the end, or a resource is asked for, under a new number if it ever was one."""
    if (note.end or note.asked != "create") and note.missing == 0:  # one listing may be wrong, which would cost
        return Step("wait", replace(note, missing=1), note.attempt)
    if note.end:
        return Step("over", replace(note, asked="over"), note.attempt, _last_words(note))
    if note.asked != "create":
        lost = "" if note.asked == "delete" else f"{note.name} is gone; "
        note = replace(note, attempt=note.attempt + 1, asked="create", trained=False, silent=0, missing=0)
        if now >= note.retry_at:
            return Step("create", note, note.attempt, f"{lost}asking for {note.name}")
        return Step("wait", note, note.attempt, lost.rstrip("; "))
    return Step("create" if now >= note.retry_at else "wait", note, note.attempt)


def _active(note: Note, look: Look) -> Step:
    if note.end:
        return _ending(note, look)
    if look.process == "running":
        first = "" if note.trained else f"{note.name} trains"
        calm = replace(note, asked="start", trained=True, failures=0, silent=0, reason="")
        return Step("wait", calm, note.attempt, first)
    if look.process == "absent":
        return _begin(replace(note, silent=0), look.now)
    if look.process == "ended":
        return _ended(replace(note, silent=0), look)
    note = replace(note, silent=note.silent + 1)
    if note.silent < MAX_SILENT:
        return Step("wait", note, note.attempt)
    what = f"{note.name} does not answer"
    return _delete(_failed(note, what, look.now), what)


def _begin(note: Note, now: float) -> Step:
    if note.asked != "start":
        return _start(note, f"{note.name} is there: starting")
    note = _failed(note, f"{note.name} did not start", now)
    return _delete(note, note.reason) if note.end else _start(replace(note, trained=False))


def _ended(note: Note, look: Look) -> Step:
    if look.code not in (PREEMPTED, SET_UP_FAILED):
        return _delete(replace(note, end="done"), f"{note.name} ended with code {look.code}: deleting it")
    what = "stopped with everything saved" if look.code == PREEMPTED else "could not be set up"
    note = _failed(note, f"{note.name} {what}", look.now)
    if note.end:
        return _delete(note, note.reason)
    return _start(replace(note, trained=False), f"{note.name} {what}: starting again")


def _ending(note: Note, look: Look) -> Step:
    """An active resource that is not wanted any more: what runs on it may save first."""
    if note.end != "cancelled" or look.process in ("absent", "ended") or look.now >= note.stop_by:
        return _delete(note, f"{note.name} has ended: deleting it" if note.end == "done" else "")
    if note.asked == "stop":
        return Step("wait", note, note.attempt)
    return Step("stop", replace(note, asked="stop"), note.attempt, f"{note.name}: saving and stopping")


def _start(note: Note, say: str = "") -> Step:
    return Step("start", replace(note, asked="start"), note.attempt, say)


def _delete(note: Note, say: str = "") -> Step:
    return Step("delete", replace(note, asked="delete"), note.attempt, say)


def _failed(note: Note, reason: str, now: float) -> Note:
    """Counts a failure, unless something was trained since the last one; too many are the end."""
    failures = 0 if note.trained else note.failures + 1
    pause_s = min(FIRST_PAUSE_S * 2 ** (failures - 1), MAX_PAUSE_S) if failures else 0.0
    end = note.end or ("gave up" if failures >= MAX_FAILURES else "")
    return replace(note, failures=failures, reason=reason, retry_at=now + pause_s, end=end, silent=0)


def _last_words(note: Note) -> str:
    why = f": {note.reason}" if note.end == "gave up" else ""
    return f"{note.name}: {note.end}{why}; nothing of it is left"
