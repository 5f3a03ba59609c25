"""One writer per run in the store, with nothing but reads and writes: a queue of tickets, one object for each process.

    REMOTE/NAME/leases/<token>.json     who, which runs, since when, last beat, and whether it trains or still asks

Who wants runs writes a ticket, then looks at the others. It trains when no ticket that is alive and names one of its
runs trains or is older; otherwise it takes its own back and waits. Each process writes its own object only, so nobody
can overwrite a claim, and of two that ask at once the later sees the earlier: stores show what was written to all who
look after it (GCS and S3 do). This is Lamport's bakery; it needs no compare-and-swap, which epath does not offer.

What it cannot promise: that a process which was silent past its ttl, and was therefore replaced, knows it at once. It
looks before its next push (`beat`), and then stops and says so; but a push that was under way when it was suspended is
finished when it wakes up. What protects the numbers then: a run's steps are the same to the bit whoever trains them, a
checkpoint is whole or absent, and the new process writes attempts of its own.
"""

import json
import os
import socket
import sys
import time
import uuid

from slmjax import lease, paths

FOLDER = "leases"


class LeaseLost(RuntimeError):
    """Another process trains the runs now, or the ticket was deleted; the message says which."""


class StoreLease:
    """`take` waits for it, `beat` keeps it, `give_back` ends it.

    study: in the store. ttl_s: after so many seconds without a beat another process takes over; beats must be far
    closer together.
    """

    def __init__(self, study: paths.Path, run_ids: list[str], ttl_s: float = 120.0):
        self.run_ids, self.ttl_s = run_ids, ttl_s
        self.token, self.since = uuid.uuid4().hex, 0.0
        self.folder = study / FOLDER
        self.path = self.folder / f"{self.token}.json"
        self._beat_at = (0.0, 0.0)
        self._moved: dict[str, tuple] = {}  # token → its last beat as written, and when that was seen first

    def take(self, pause_s: float = 5.0) -> None:
        """Returns as the holder; waits while another process is."""
        told = False
        while True:
            others = self._others()
            if not others:
                if self._claim():
                    return
                continue
            if not told:
                held = f"{self.folder.parent} is held by {describe(others[0])} (runs {', '.join(others[0]['run_ids'])})"
                until = f"it ends, or is silent for {others[0]['ttl_s']:.0f} s"
                print(f"mirror: {held}; waiting until {until}", file=sys.stderr, flush=True)
                told = True
            time.sleep(min(pause_s, others[0]["ttl_s"] / 4))

    def beat(self) -> None:
        """Says that the holder lives. Raises LeaseLost when it was replaced in a silence."""
        silent_s = self._silent_s()
        if read(self.path) is None:
            others = self._others()
            who = f"{describe(others[0])} has taken over" if others else "somebody has deleted it"
            raise LeaseLost(f"{self.path} is gone: {who}")
        if silent_s > self.ttl_s / 2 and not self._claim():
            raise LeaseLost(f"{self.folder.parent} was silent for {silent_s:.0f} s, and another process has taken over")
        self._write(trains=True)

    def beat_if_due(self) -> None:
        if self._silent_s() > self.ttl_s / 4:
            self.beat()

    def give_back(self) -> None:
        self.path.unlink(missing_ok=True)

    def _claim(self) -> bool:
        """Asks for the runs; whether they are ours now."""
        self.since = self.since or time.time()
        self._write(trains=False)
        while others := self._others():
            if any(other["trains"] or _ticket(other) < (self.since, self.token) for other in others):
                self.give_back()
                self.since = 0.0
                return False
            time.sleep(min(0.2, self.ttl_s / 10))  # younger ones, which take theirs back when they see ours
        for path, holder in self._tickets():
            if holder["token"] != self.token and set(holder["run_ids"]) & set(self.run_ids):
                path.unlink(missing_ok=True)  # dead; if it wakes up, it finds that it was replaced
        self._write(trains=True)
        return True

    def _tickets(self) -> list[tuple[paths.Path, dict]]:
        return [(path, holder) for path in _files(self.folder) if (holder := read(path)) is not None]

    def _others(self) -> list[dict]:
        """Tickets of other processes that live and want one of our runs."""
        found = [holder for _, holder in self._tickets() if holder["token"] != self.token]
        return [h for h in found if set(h["run_ids"]) & set(self.run_ids) and alive(h) and not self._stands_still(h)]

    def _stands_still(self, holder: dict) -> bool:
        """Whether it has not moved for its ttl while we looked: a clock ahead of ours makes the dead look alive."""
        now = time.monotonic()
        beat, since = self._moved.get(holder["token"], (None, now))
        if beat != holder["heartbeat"]:
            beat, since = holder["heartbeat"], now
        self._moved[holder["token"]] = (beat, since)
        return now - since > holder["ttl_s"]

    def _silent_s(self) -> float:
        """Since the last beat, by the clock that a suspended machine stops and by the one that it does not."""
        return max(time.monotonic() - self._beat_at[0], time.time() - self._beat_at[1])

    def _write(self, trains: bool) -> None:
        said = {
            "token": self.token,
            "trains": trains,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": lease.place(),
            "process_start": lease.process_start(os.getpid()),
            "since": self.since,
            "heartbeat": time.time(),
            "ttl_s": self.ttl_s,
            "run_ids": self.run_ids,
        }
        # Before the write: it is seen at some moment after this one.
        self._beat_at = (time.monotonic(), time.time())
        paths.write_bytes(self.path, json.dumps(said).encode())


def _ticket(holder: dict) -> tuple[float, str]:
    return holder["since"], holder["token"]


def _files(folder: paths.Path) -> list[paths.Path]:
    return [folder / name for name in paths.names(folder) if name.endswith(".json") and not name.startswith(".")]


def read(path: paths.Path) -> dict | None:
    try:
        return json.loads(paths.read_bytes(path))
    except FileNotFoundError:
        return None


def alive(holder: dict, now: float | None = None) -> bool:
    """By its process when it is on this machine, by its last beat elsewhere; the clocks must agree to a few seconds.

    now: when what is known of it was current.
    """
    if now is None and holder["place"] == lease.place():
        return lease.process_start(holder["pid"]) == holder["process_start"]
    return (time.time() if now is None else now) - holder["heartbeat"] <= holder["ttl_s"]


def describe(holder: dict) -> str:
    age = time.time() - holder["heartbeat"]
    return f"pid {holder['pid']} on {holder['host']}, last heard of {age:.0f} s ago"


def holders(study: paths.Path) -> dict[str, dict]:
    """run_id → the newest ticket that names it, its process alive or not; runs whose process ended well have none."""
    found = filter(None, paths.each(study, read, _files(study / FOLDER)))
    return {run_id: holder for holder in sorted(found, key=lambda h: h["heartbeat"]) for run_id in holder["run_ids"]}
