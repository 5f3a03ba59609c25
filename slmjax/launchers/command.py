"""Asks a command-line program of a scheduler or a cloud, in one way for all: what it prints, or one line of trouble."""

import re
import shutil
import subprocess
from collections.abc import Mapping

from slmjax.launchers.backend import BackendError


class Refused(BackendError):
    """The program answered, and said no. `said` is what it wrote on its error channel, in one line."""

    def __init__(self, message: str, said: str):
        super().__init__(message)
        self.said = said


class NoAnswer(BackendError):
    """The program was ended before it answered: what was asked may have been done."""


def require(program: str, missing: str) -> None:
    """Raises ValueError: there is no such program."""
    if shutil.which(program) is None:
        raise ValueError(f"there is no {program} on this machine; {missing}")


def ask(command: list[str], timeout_s: float, missing: str, env: Mapping[str, str] | None = None) -> str:
    """What the command prints.

    missing: what to do where there is no such program. env: its variables, this process's when not given.

    Raises:
      Refused: it failed.
      NoAnswer: it did not answer in time.
      BackendError: it is not there.
    """
    name = " ".join(word for word in command[:5] if re.fullmatch(r"[a-z][a-z-]*", word))
    try:
        # In a session of its own: Ctrl-C is for us, and must not cut off a hand-over in the middle.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )
    except FileNotFoundError:
        raise BackendError(f"there is no {command[0]} on this machine; {missing}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{name} did not answer within {timeout_s:.0f} s") from None
    if done.returncode < 0:
        raise NoAnswer(f"{name} was ended by signal {-done.returncode}")
    if done.returncode:
        said = " ".join(done.stderr.split() or done.stdout.split()) or f"exit code {done.returncode}"
        raise Refused(f"{name} failed: {said}", said)
    return done.stdout
