"""What a launcher asks of a place that can train packs, and how packs are made for one.

A backend is the hint, the run folders are the truth: whether a run is done, failed or alive is read from its folder.
A backend is asked only whether it still has a pack, so that nothing is handed over twice.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from slmjax import study
from slmjax.launchers import Pack
from slmjax.study import Run, Study


class BackendError(RuntimeError):
    """The backend could not be asked or refused: one line with what it said."""


@dataclass(frozen=True)
class Seen:
    """A pack that a backend has: `waiting` for a place or `running`, where, and what it says of that."""

    state: str
    where: str = ""
    note: str = ""


class Backend(Protocol):
    """A place that trains packs: local processes, Slurm, SkyPilot managed jobs, TPU queued resources.

    attached: whether its processes are the launcher's own, which waits for them and passes signals on.
    queues_after: whether it can be given a pack that has to start after others have ended.
    places: how many packs it can have at a time; None where it queues them itself.
    poll_s: seconds between two looks.
    """

    name: str
    attached: bool
    queues_after: bool
    places: int | None
    poll_s: float

    def packs(self, plan: Study, folder: Path, busy: set[str]) -> list[Pack]:
        """What is to be handed over: the unfinished runs of the study that are not in `busy`, in packs."""

    def submit(self, packs: list[Pack], after: Mapping[str, set[str]]) -> None:
        """Hands packs over. What it will need to find them again is on disk before it tries.

        after: by pack, the names of packs in hand that must end before it starts; empty without `queues_after`.

        Raises:
          BackendError: it could not, or it is not known whether it could.
        """

    def preview(self, packs: list[Pack], after: Mapping[str, set[str]]) -> list[str]:
        """The commands that `submit` would run, to be read by a person."""

    def poll(self) -> dict[str, Seen]:
        """Name → what is seen of each pack of the study that was handed over and has not ended.

        Raises:
          BackendError: it cannot be asked now; nothing may be concluded about any pack.
        """

    def logs(self, name: str, follow: bool) -> list[str] | None:
        """A command that shows what the pack's processes have printed; None for a pack that it never had."""

    def cancel(self, names: Iterable[str]) -> list[str]:
        """Asks these packs to save and stop; what was asked, in words a user knows it by."""


@runtime_checkable
class Tended(Backend, Protocol):
    """A backend whose packs need a launcher that stays: it is watched until they have ended."""

    def tend(self) -> list[str]:
        """Does what the packs in hand need now, before each look at them; what it did, for a person to read.

        Raises:
          BackendError: it cannot be asked now.
        """


def chains(runs: list[Run]) -> list[list[Run]]:
    """The runs by what must be trained in one place to be trained at once: a trunk and its branches, or one run.

    Runs of different programs are never together: an upcycled run is a chain of its own.
    """
    by_id = {run.run_id: run for run in runs}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_root(run, by_id), []).append(run)
    return list(groups.values())


def _root(run: Run, by_id: dict[str, Run]) -> str:
    parent = by_id.get(run.parent)
    if parent is None or parent.program_id != run.program_id:
        return run.run_id
    return _root(parent, by_id)


def chain_packs(plan: Study, folder: Path, busy: set[str], chains_per_pack: int = 1) -> list[Pack]:
    """Packs of chains with what is left of them, largest work first, each named by a hash of its runs.

    A pack's runs never change under its name, so a job that reads its file at a restart finds what it was given.
    """
    left = [r for r in plan.runs if r.run_id not in busy and not (folder / r.run_id / "DONE").exists()]
    packs = []
    for of_program in study.packs(left):
        of_chains = chains(of_program)
        for first in range(0, len(of_chains), chains_per_pack):
            runs = [run for chain in of_chains[first : first + chains_per_pack] for run in chain]
            packs.append(Pack(folder, runs, name_of(runs)))
    return sorted(packs, key=lambda pack: (-pack.flops, pack.name))


def name_of(runs: list[Run]) -> str:
    return hashlib.sha256(" ".join(sorted(run.run_id for run in runs)).encode()).hexdigest()[:12]


def waits_for(pack: Pack) -> set[str]:
    """The run_ids outside the pack that its runs begin from and that have not saved that checkpoint yet."""
    inside = {run.run_id for run in pack.runs}
    outside = [run for run in pack.unfinished if run.parent and run.parent not in inside]
    return {run.parent for run in outside if not has_start(pack.folder, run)}


def has_start(folder: Path, run: Run) -> bool:
    """Whether the checkpoint is there, and complete, that this run begins from."""
    return (folder / run.parent / "checkpoints" / f"step-{run.branch_step:08d}" / "digests.json").exists()


def show_file(path: Path, follow: bool) -> list[str]:
    """The command that shows a log file, and with `follow` what comes to it; -F waits for a file that is to come."""
    return ["tail", "-n", "+1", *(["-F"] if follow else []), str(path)]


def require_script(script: Path | None, needed: str) -> None:
    """Raises ValueError: no script was named, or it is not there; `needed` says what is."""
    if script is None:
        raise ValueError(needed)
    if not script.exists():
        raise ValueError(f"there is no {script}; {needed}")
