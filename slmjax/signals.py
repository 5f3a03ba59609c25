"""Signals that ask a training process to save and end."""

import contextlib
import signal


class stop_on_signal(contextlib.AbstractContextManager):
    """Turns SIGINT, SIGTERM and SIGUSR1 into a question the loop can ask; the second signal does what it always did."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self):
        self.caught = None
        self.before = {number: signal.signal(number, self._catch) for number in self.SIGNALS}
        return self

    def _catch(self, number, frame):
        self.caught = number
        for each, handler in self.before.items():
            signal.signal(each, handler)

    @property
    def requested(self) -> bool:
        return self.caught is not None

    def __exit__(self, *exc):
        for each, handler in self.before.items():
            signal.signal(each, handler)
