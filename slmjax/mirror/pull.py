"""One run's way from the store to a machine that is to go on with it: its records, and the checkpoint to go on from."""

import os
import re
from pathlib import Path

from slmjax import paths
from slmjax.mirror.steps import StoreSteps
from slmjax.study import Run

ASIDE = ".aside"  # beside the runs: folders that had gone another way than the store's copy


def pull_pack(runs: list[Run], here: Path, there: paths.Path) -> dict[str, StoreSteps]:
    """Brings what these runs need to go on or to begin, of themselves and of the runs that they begin from.

    here, there: the study's folder on this machine and in the store. Returns run_id → the store's checkpoints.

    Raises:
      ValueError: a run has checkpoints in the store, and none of them is good.
    """
    run_ids = [run.run_id for run in runs]
    pulled = paths.each(there, lambda run_id: pull_run(here / run_id, there / run_id), run_ids)
    for run in runs:
        begun = any((here / run.run_id / "checkpoints").glob("step-*")) or (here / run.run_id / "DONE").exists()
        if run.parent and not begun:
            _pull_beginning(here / run.parent, there / run.parent, run.first_step)
    return dict(zip(run_ids, pulled, strict=True))


def pull_run(here: Path, there: paths.Path) -> StoreSteps:
    """Brings a run's records, and its newest checkpoint unless it is done, where the store has more than this machine.

    What is here and was never sent stays: it is sent with the next push. DONE comes last.
    """
    steps = StoreSteps(here / "checkpoints", there / "checkpoints")
    if (here / "DONE").exists():
        return steps
    found = paths.names(there)
    attempts = {name: paths.read_bytes(there / name) for name in found if re.fullmatch(r"attempt-\d+\.jsonl", name)}
    if _diverged(here, attempts):
        _set_aside(here)
    behind = False
    for name, content in attempts.items():
        if len(content) > _size(here / name):
            paths.write_bytes(here / name, content)
            behind = True
    for name in found:
        plain = name.endswith((".json", ".txt")) and not name.startswith(".") and name != "lease.json"
        if plain and (behind or not (here / name).exists()):
            paths.copy(there / name, here / name)
    if "DONE" not in found:
        steps.pull_newest()
    else:
        paths.copy(there / "DONE", here / "DONE")
    return steps


def _pull_beginning(here: Path, there: paths.Path, step: int) -> None:
    """Brings the checkpoint that another run begins from, and what tells whose it is."""
    steps = StoreSteps(here / "checkpoints", there / "checkpoints")
    if steps.pull(step):
        for name in ("config.json", "provenance.json"):
            if not (here / name).exists():
                paths.copy(there / name, here / name)


def _diverged(here: Path, attempts: dict[str, bytes]) -> bool:
    """Whether an attempt here and the store's of the same number are two: neither begins with the other."""
    for name, theirs in attempts.items():
        ours = (here / name).read_bytes() if (here / name).exists() else b""
        ours = ours[: ours.rfind(b"\n") + 1]  # a line that was cut says nothing
        if not (ours.startswith(theirs) or theirs.startswith(ours)):
            return True
    return False


def _set_aside(here: Path) -> None:
    """Another process has gone on with the store's copy since this one lost it; what was trained here is kept apart."""
    aside = here.parent / ASIDE
    aside.mkdir(exist_ok=True)
    taken = sum(name.startswith(here.name) for name in os.listdir(aside))
    os.rename(here, aside / f"{here.name}-{taken}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
