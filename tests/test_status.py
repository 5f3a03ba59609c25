"""What is shown of a study while it is trained, from folders that are written here, not trained."""

from slmjax.launchers import causes
from slmjax.launchers.status import RunStatus


def row_of(run_id: str, state: str, reason: str | None = None) -> RunStatus:
    return RunStatus(run_id, {}, state, 1, 9, 3.0, None, 100, 1.0, 1, None, 0.5, None, reason)


def test_room_is_asked_for_only_where_a_disk_is_full_or_broken():
    for number, kind in ((28, "disk"), (122, "disk"), (5, "disk"), (116, "error"), (37, "error"), (13, "error")):
        assert causes.cause(row_of("a", "failed", f"OSError: [Errno {number}] said so"))[0] == kind, number
