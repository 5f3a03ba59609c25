"""The folder of things that can be made again: `$SLMJAX_CACHE`, or ~/.cache/slmjax. Delete it at any time.

Every entry appears whole or not at all, so a process killed while writing costs time and nothing else.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def folder() -> Path:
    return Path(os.environ.get("SLMJAX_CACHE") or Path.home() / ".cache" / "slmjax")


def name_of(*parts) -> str:
    """A file name that stands for `parts` (their reprs)."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that any reader, at any moment and after any kill, sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def remember(kind: str, value: dict, *parts) -> None:
    write_atomic(folder() / kind / f"{name_of(*parts)}.json", json.dumps(value).encode())


def recall(kind: str, *parts) -> dict | None:
    """What `remember(kind, value, *parts)` stored last; None if nothing."""
    try:
        return json.loads((folder() / kind / f"{name_of(*parts)}.json").read_bytes())
    except FileNotFoundError:
        return None


def forget(kind: str, *parts) -> None:
    (folder() / kind / f"{name_of(*parts)}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the right to build `target`; waits while another process has it. A killed holder lets go by dying."""
    path = folder() / "locks" / f"{name_of(str(Path(target).absolute()))}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process to build %s", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
