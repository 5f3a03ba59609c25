"""One writer per pack in the store: an object that says who trains it, rewritten at every push, deleted at the end.

The object is `packs/<program_id>.lease.json`: one for all runs of a pack, because every push rewrites it. A run's
program is part of its config, so every process that would train the run looks at the same object.

What this cannot promise. A store without compare-and-swap, which is all that epath shows of one, has no atomic "take it
if it is free". Two processes that find it free at one moment both write it; each then waits `settle_s` and reads it
again, and the one whose name was overwritten stands back. That fails for a process that stalls between its look and its
write for longer than the other's wait; it is found at the next push, when one of the two sees the other's name, stops
and says so. And a process that is suspended past its ttl in the middle of a push finishes that push when it wakes up.
What protects the numbers then: a run's steps are the same to the bit whoever trains them, checkpoints are whole or
absent, and every attempt has a file of its own unless both began from the same copy at once.
"""

import json
import os
import socket
import sys
import time
import uuid

from slmjax import lease, paths

SUFFIX = ".lease.json"


class LeaseLost(RuntimeError):
    """Another process trains the pack now; the message names both."""


class StoreLease:
    """`take` waits for it, `beat` keeps it, `give_back` ends it.

    ttl_s: after so many seconds without a beat another process takes over; beats must be far closer together.
    """

    def __init__(self, path: paths.Path, run_ids: list[str], ttl_s: float = 120.0, settle_s: float = 2.0):
        self.path, self.run_ids, self.ttl_s, self.settle_s = path, run_ids, ttl_s, settle_s
        self.token, self.since, self.beat_at = uuid.uuid4().hex, time.time(), 0.0

    def take(self, pause_s: float = 5.0) -> None:
        """Returns as the holder; waits while another process is."""
        told, seen, seen_at = False, None, 0.0
        while True:
            holder = read(self.path)
            if holder != seen:
                seen, seen_at = holder, time.monotonic()
            # A dead holder whose clock was ahead of ours looks fresh: what has not moved for a ttl is dead as well.
            if holder is None or not alive(holder) or time.monotonic() - seen_at > holder["ttl_s"]:
                self._write()
                time.sleep(self.settle_s)
                if self._is_ours(read(self.path)):
                    return
                continue
            if not told:
                print(
                    f"mirror: {self.path} is held by {describe(holder)}; waiting until it ends, or says nothing for "
                    f"{holder['ttl_s']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(min(pause_s, holder["ttl_s"] / 4))

    def beat(self) -> None:
        """Says that the holder lives. Raises LeaseLost when another one is written there."""
        holder = read(self.path)
        if not self._is_ours(holder):
            now = f"is held by {describe(holder)}" if holder else "is gone"
            raise LeaseLost(f"{self.path} {now}: another process has taken over, or somebody has deleted it")
        self._write()

    def beat_if_due(self) -> None:
        if time.monotonic() - self.beat_at > self.ttl_s / 4:
            self.beat()

    def give_back(self) -> None:
        if self._is_ours(read(self.path)):
            self.path.unlink(missing_ok=True)

    def _is_ours(self, holder: dict | None) -> bool:
        return holder is not None and holder["token"] == self.token

    def _write(self) -> None:
        said = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": lease._place(),
            "process_start": lease._process_start(os.getpid()),
            "since": self.since,
            "heartbeat": time.time(),
            "ttl_s": self.ttl_s,
            "run_ids": self.run_ids,
        }
        paths.write_bytes(self.path, json.dumps(said).encode())
        self.beat_at = time.monotonic()


def read(path: paths.Path) -> dict | None:
    try:
        return json.loads(paths.read_bytes(path))
    except FileNotFoundError:
        return None


def alive(holder: dict) -> bool:
    """By its process when it is on this machine, by its last beat elsewhere; the clocks must agree to a few seconds."""
    if holder["place"] == lease._place():
        return lease._process_start(holder["pid"]) == holder["process_start"]
    return time.time() - holder["heartbeat"] <= holder["ttl_s"]


def describe(holder: dict) -> str:
    age = time.time() - holder["heartbeat"]
    return f"pid {holder['pid']} on {holder['host']}, last heard of {age:.0f} s ago"


def holders(study: paths.Path) -> dict[str, dict]:
    """run_id → the lease of the process that trains it, alive or not; runs whose processes ended well have none."""
    packs = study / "packs"
    files = [packs / name for name in paths.names(packs) if name.endswith(SUFFIX)]
    return {run_id: holder for holder in paths.each(packs, read, files) if holder for run_id in holder["run_ids"]}
