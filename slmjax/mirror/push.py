"""One run's way to the store: what is new in its folder, in an order that leaves the copy whole at every moment."""

import os
from collections.abc import Callable
from pathlib import Path

from slmjax import paths
from slmjax.mirror.steps import StoreSteps

NOT_SENT = ("lease.json", "status.json", "DONE")  # this machine's own; and those that have their turn later


class RunPush:
    """`round` sends what has changed since the last one. settled: it was done, and everything is there."""

    def __init__(self, here: Path, there: paths.Path, steps: StoreSteps):
        self.here, self.there, self.steps = here, there, steps
        self.settled = "DONE" in paths.names(there) and (here / "DONE").exists()
        self._sent: dict[str, tuple] = {}  # file → size and time of what was sent

    def round(self, alive: Callable[[], None]) -> None:
        """Records, then checkpoints, then the status that was current before them, then DONE.

        alive: called between files; it raises to stop.
        """
        done = (self.here / "DONE").exists()  # looked at first: all that is read below was final when it was written
        status_signature, status = self._read("status.json")
        for name in self.changed():
            alive()
            signature, content = self._read(name)
            if content:
                paths.write_bytes(self.there / name, content)
                self._sent[name] = signature
        self.steps.push(alive)
        if status is not None and status_signature != self._sent.get("status.json"):
            paths.write_bytes(self.there / "status.json", status)
            self._sent["status.json"] = status_signature
        if done:
            paths.write_bytes(self.there / "DONE", b"")
            self.settled = True

    def changed(self) -> list[str]:
        """Records and event files that are new or have grown, relative to the run's folder."""
        files = [name for name in paths.names(self.here) if name not in NOT_SENT and not name.startswith(".")]
        files = [name for name in files if (self.here / name).is_file()]
        files += [f"tb/{name}" for name in paths.names(self.here / "tb") if (self.here / "tb" / name).is_file()]
        return [name for name in files if _signature(self.here / name) != self._sent.get(name)]

    def pending(self) -> str:
        """What is only here, in a few words; empty when nothing is."""
        if self.settled or not self.here.exists():
            return ""
        names = [name for name in self.changed() if not name.startswith("tb/")]
        names += [f"step {step}" for step in self.steps.missing()]
        names += ["DONE"] if (self.here / "DONE").exists() else []
        return f"{self.here.name} ({', '.join(names)})" if names else ""

    def _read(self, name: str) -> tuple[tuple | None, bytes | None]:
        """(signature, content); of an attempt whole lines only."""
        path = self.here / name
        try:
            signature, content = _signature(path), path.read_bytes()
        except FileNotFoundError:
            return None, None
        return signature, content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content


def _signature(path: Path) -> tuple | None:
    try:
        said = os.stat(path)
    except FileNotFoundError:
        return None
    return said.st_size, said.st_mtime_ns
