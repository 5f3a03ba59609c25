"""A pack's time with the store: takes the lease, brings what is there, sends what is new, and ends with all of it sent.

The store may fail at any time, and training does not notice: what could not be sent stays in the scratch folder and is
sent later. Only the end waits for it, `final_s` at most.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from slmjax import paths
from slmjax.mirror import lease, pull
from slmjax.mirror.push import RunPush
from slmjax.study import Run

MAX_PAUSE_S = 120.0  # between tries while the store cannot be reached
FIRST_PAUSE_S = 1.0  # between tries at the end


class MirrorError(RuntimeError):
    """Something is only on this machine; the message says what, where, and why. One line for the user."""


class Mirror(contextlib.AbstractContextManager):
    """Mirrors the runs of one program between `folder` and `remote`, both the study's, for the length of the block.

    Args:
      name: of the pack's file, to be sent as well.
      every_s: between pushes. A store that bills requests bills two a push, and one for each file that changed.
      ttl_s: of the lease; entering waits as long for a process that was killed elsewhere.
      final_s: how long leaving tries to reach the store.
      stop: called from another thread when the lease is lost, until it is True: what is trained from then on would be
        sent nowhere.

    Entering raises ValueError when no checkpoint in the store is good, and MirrorError when the store does not answer:
    without a look at it, a run that is half done would begin anew.
    """

    def __init__(
        self,
        runs: list[Run],
        folder: Path,
        remote: paths.Path,
        name: str = "",
        every_s: float = 15.0,
        ttl_s: float = 120.0,
        final_s: float = 300.0,
        stop: Callable[[], bool] = lambda: True,
    ):
        self.runs, self.folder, self.remote, self.stop = runs, folder, remote, stop
        self.every_s, self.final_s = max(every_s, 0.01), final_s
        self.lease = lease.StoreLease(remote, [run.run_id for run in runs], ttl_s)
        self.shared = ("study.json", f"packs/{name}.json")
        self.pushes: list[RunPush] = []
        self.lost: lease.LeaseLost | None = None
        self.outage: Exception | None = None
        self._busy, self._ending = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._patiently(self.lease.take, "nothing was started")
        try:
            self._patiently(self._bring, "nothing was started")
        except BaseException:
            with contextlib.suppress(Exception):
                self.lease.give_back()
            raise
        self._thread.start()
        return self

    def _bring(self) -> None:
        steps = pull.pull_pack(self.runs, self.folder, self.remote)
        self.pushes = paths.each(self.remote, lambda i: RunPush(self.folder / i, self.remote / i, steps[i]), steps)
        for name in self.shared:  # so that the store's copy is a study; what a launcher has put there is newer
            if (self.folder / name).exists() and not (self.remote / name).exists():
                paths.copy(self.folder / name, self.remote / name)

    def _patiently(self, act: Callable[[], None], consequence: str) -> None:
        """act(), again and again while the store does not answer, for a fifth of `final_s`."""
        deadline, pause_s = time.monotonic() + self.final_s / 5, FIRST_PAUSE_S
        while True:
            try:
                return act()
            except ValueError:  # the store has answered, and what it holds will not do
                raise
            except Exception as error:
                if time.monotonic() + pause_s > deadline:
                    raise MirrorError(f"{self.remote} does not answer ({_short(error)}); {consequence}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    def __exit__(self, kind, error, trace) -> None:
        self._ending.set()
        self._thread.join()
        try:
            self._finish()
        except MirrorError as failure:
            if kind is None:
                raise
            print(f"mirror: {failure}", file=sys.stderr, flush=True)  # beside the error that ended the block

    def push_now(self) -> None:
        """Sends what only this machine has. Raises MirrorError when the store does not answer."""
        self._patiently(self._round, "what is only here is not sent")

    def _loop(self) -> None:
        pause_s = self.every_s
        while not self._ending.wait(pause_s):
            if self.lost is not None:
                if self.stop():
                    return
                pause_s = FIRST_PAUSE_S
                continue
            pause_s = self.every_s if self._push() else min(max(2 * pause_s, FIRST_PAUSE_S), MAX_PAUSE_S)

    def _round(self) -> None:
        with self._busy:
            self.lease.beat()
            for push in self.pushes:
                if not push.settled:
                    push.round(self.lease.beat_if_due)

    def _push(self) -> bool:
        """One round over all runs; whether the store took it."""
        try:
            self._round()
        except lease.LeaseLost as lost:
            self.lost = lost
            return False
        except Exception as error:  # whatever a store's library raises; training is not to end for it
            if self.outage is None:
                print(
                    f"mirror: {self.remote} does not answer ({_short(error)}); training goes on, and what is new stays "
                    f"in {self.folder} until it does",
                    file=sys.stderr,
                    flush=True,
                )
            self.outage = error
            return False
        if self.outage is not None:
            print(f"mirror: {self.remote} answers again, and has everything", file=sys.stderr, flush=True)
            self.outage = None
        return True

    def _finish(self) -> None:
        """The last push, tried until it succeeds or `final_s` are over."""
        deadline, pause_s = time.monotonic() + self.final_s, FIRST_PAUSE_S
        while self.lost is None and not self._push():
            if self.lost is None and time.monotonic() + pause_s > deadline:
                raise MirrorError(
                    f"{self.remote} did not answer for {self.final_s:.0f} s ({_short(self.outage)}). Only in "
                    f"{self.folder}: {self._only_here()}. Nothing is lost: the same command sends it"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)
        if self.lost is not None:
            raise MirrorError(f"{self.lost}. Not sent, and only in {self.folder}: {self._only_here() or 'nothing'}")
        with contextlib.suppress(Exception):  # then it expires
            self.lease.give_back()

    def _only_here(self) -> str:
        return "; ".join(filter(None, (push.pending() for push in self.pushes)))


def _short(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
