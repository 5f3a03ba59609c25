"""Why runs did not finish, in the few kinds that call for different action."""

import re

from slmjax.launchers.status import RunStatus

# The first whose words a reason has; what is to be done, for the line under a table.
CAUSES = (
    ("no machine", r"^no TPU: ", "see launch/README.md on quota and zones, then run it again"),
    (
        "out of memory",
        r"RESOURCE_EXHAUSTED|MemoryError|out of memory|OUT_OF_MEMORY",
        "fewer rows at a time: raise optim.micro_batches",
    ),
    ("disk", r"No space left|Disk quota|Errno (5|28|122)\b", "free space, then run it again"),
    (
        "data",
        r"DataError|data\.sources|FileNotFoundError|was trained on .* and the data are now",
        "mend the data, then run it again",
    ),
    ("config", r"ConfigError|planned by another version", "change the study's file"),
    ("checkpoints", r"CheckpointError", "see the folder of its checkpoints"),
    ("in use", r"LeaseError", "another process trains it"),
    ("its trunk", r"its trunk .* (failed|diverged)", "mend the trunk first"),
)
LOST = ("lost", "its process or machine went away without a word; running the study again goes on from its checkpoint")
DIVERGED = ("diverged", "a lower rate, or longer warmup")
OTHER = ("error", "see slmjax study logs, or error.txt in its folder")


def cause(row: RunStatus) -> tuple[str, str] | None:
    """The kind and what to do about it; None for a run that has not failed."""
    if row.state == "killed":
        return LOST
    if row.state == "diverged":
        return DIVERGED
    if row.state != "failed":
        return None
    reason = row.reason or ""
    return next(((name, advice) for name, words, advice in CAUSES if re.search(words, reason, re.IGNORECASE)), OTHER)


def summary(rows: list[RunStatus]) -> list[str]:
    """One line for each cause: how many runs, which, and what to do; most frequent first."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if (kind := cause(row)) is not None:
            found.setdefault(kind, []).append(row.run_id)
    return [
        f"{len(ids)} {name}: {' '.join(ids[:6])}{' ...' if len(ids) > 6 else ''}; {advice}"
        for (name, advice), ids in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
