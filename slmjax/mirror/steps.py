"""The checkpoints of one run in the store: which are whole, sending one, bringing one, dropping those that are over.

A step counts when its digests.json is there, which is written after its other files and deleted before them. Whatever
else has a step's name is what a kill left, and is removed after what is new was sent, unless that completes it.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmjax import digests, paths

STAGED = ".mirror"  # beside the runs: links to the steps that are being sent


class StoreSteps:
    """`here` and `there` are the checkpoints folders of a run, on this machine and in the store.

    whole: step → pinned, of the steps in the store. Read once, and kept up by what is sent and dropped: nobody else
    writes there.
    """

    def __init__(self, here: Path, there: paths.Path):
        self.here, self.there = here, there
        self.whole: dict[int, bool] = {}
        self.rubbish: set[str] = set()  # names of steps that are not, or no longer, whole
        for name in paths.names(there):
            if (step := _step_of(name)) is not None:
                said = self._digests(there / name)
                if said is None:
                    self.rubbish.add(name)
                else:
                    self.whole[step] = said["pinned"]

    def local(self) -> dict[int, Path]:
        """Step → its folder, of the whole ones on this machine."""
        folders = {_step_of(name): self.here / name for name in paths.names(self.here)}
        return {step: path for step, path in folders.items() if step is not None and (path / "digests.json").is_file()}

    # ---- to the store ------------------------------------------------------------------------------------------------

    def push(self, alive: Callable[[], None]) -> None:
        """Makes the store hold what this machine holds: sends new steps, then drops those that are gone here.

        Of steps that will be dropped again, only the newest is sent; and the newest of the store stays, so that there
        is always one. alive: called between files; it raises to stop.
        """
        for step in self.missing():
            self._send(step, alive)
        local = self.local()
        for step in [s for s, pinned in self.whole.items() if not pinned and s not in local]:
            if step != max(self.whole):
                del self.whole[step]
                self.rubbish.add(_name(step))
        self._clear()

    def missing(self) -> list[int]:
        """The steps that are to be sent."""
        wanted = []
        local = self.local()
        for step in sorted(set(local) - set(self.whole)):
            said = self._digests(local[step])
            if said is not None and (said["pinned"] or step == max(local)):
                wanted.append(step)
        return wanted

    def _send(self, step: int, alive: Callable[[], None]) -> None:
        target = self.there / _name(step)
        with contextlib.ExitStack() as stack:
            try:
                source = stack.enter_context(_held(self.here / _name(step), self.here.parent))
            except FileNotFoundError:
                return  # collected since; a newer one is there
            said = self._digests(source)
            self.rubbish.add(target.name)  # until all of it is there

            def send(name: str) -> None:
                alive()
                paths.copy(source / name, target / name)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(send, said["files"]))
            send("digests.json")
        self.rubbish.discard(target.name)
        self.whole[step] = said["pinned"]

    def _clear(self) -> None:
        for name in sorted(self.rubbish):
            (self.there / name / "digests.json").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if paths.is_remote(self.there):
                    (self.there / name).rmtree()
                else:
                    shutil.rmtree(self.there / name)
            self.rubbish.discard(name)

    # ---- from the store ----------------------------------------------------------------------------------------------

    def pull_newest(self) -> None:
        """Brings the store's newest step that is as it was written, when it is newer than any here.

        Raises:
          ValueError: there are steps in the store, none of them is good, and there is none here.
        """
        newest_here = max(self.local(), default=-1)
        newer = sorted((step for step in self.whole if step > newest_here), reverse=True)
        for step in newer:
            if self.pull(step):
                return
        if newer and newest_here < 0:
            raise ValueError(
                f"no checkpoint in {self.there} can be trusted, so the run stops here; restore one of {newer}, or "
                "delete that folder to train again from step 0"
            )

    def pull(self, step: int) -> bool:
        """Brings a step that the store has, unless it is here; whether it is here now, and good."""

        if step in self.local():
            return True
        if step not in self.whole:
            return False
        # The name that saves remove when they meet it: what a kill leaves of it is not mistaken for a step.
        part = self.here / f".tmp-pull-{os.getpid()}-{_name(step)}"
        for _ in range(2):  # the second time for a fault on the way
            shutil.rmtree(part, ignore_errors=True)
            said = self._digests(self.there / _name(step))
            if said is None:
                break
            self._bring(step, [*said["files"], "digests.json"], part)
            wrong = digests.damage(part)
            if wrong is None:
                os.rename(part, self.here / _name(step))
                return True
            print(f"mirror: {wrong}; it came from {self.there / _name(step)}", file=sys.stderr, flush=True)
        shutil.rmtree(part, ignore_errors=True)
        self.whole.pop(step, None)
        self.rubbish.add(_name(step))
        return False

    def _bring(self, step: int, names: list[str], target: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: paths.copy(self.there / _name(step) / name, target / name), names))

    @staticmethod
    def _digests(folder: paths.Path) -> dict | None:
        """What a step's digests.json says; None where there is none that can be read."""

        try:
            return digests.read_digests(paths.read_bytes(folder / "digests.json"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() and name == _name(int(number)) else None


@contextlib.contextmanager
def _held(source: Path, run_dir: Path):
    """A copy of a step by hard links, which stays whole when the trainer collects the step while it is being sent."""
    staged = run_dir.parent / STAGED / run_dir.name / source.name
    shutil.rmtree(staged, ignore_errors=True)
    try:
        try:
            shutil.copytree(source, staged, copy_function=os.link)
        except (OSError, shutil.Error):
            if not source.is_dir():
                raise FileNotFoundError(source) from None
            yield source  # no hard links here: then it must be sent before it goes
            return
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
