"""Where machines elsewhere find a study's packs, and how what they write comes back.

Without a mirror they see the study's folder itself, under the same name: a disk or a mounted bucket that all share.
With one, an object store has a copy of the folder (gs://BUCKET/.../NAME): packs are sent there before they are handed
over, `slmjax pack` trains from there and back to there, and the records are brought home at every look.
"""

import os
from pathlib import Path

from slmjax import records
from slmjax.config import ConfigError
from slmjax.launchers import Pack
from slmjax.launchers.backend import BackendError

FILE = "mirror.json"  # in the study's folder: so that status and cancel, which are not told, know it too


def chosen(folder: Path, mirror: str | None) -> str | None:
    """The mirror that is asked for, or the one that the study has.

    Raises:
      ConfigError: it is not named like the study, or not the one it has.
    """
    before = (records.read_json(folder / FILE) or {}).get("mirror")
    if mirror is None:
        return before
    mirror = mirror.rstrip("/")
    if before not in (None, mirror):
        raise ConfigError(
            f"--mirror={mirror}: runs of {folder} have gone to {before}, and stay there; use another --out"
        )
    if mirror.rpartition("/")[2] != folder.name:
        raise ConfigError(f"--mirror={mirror} must end in the study's name: --mirror={mirror}/{folder.name}")
    return mirror


def address(folder: Path, mirror: str | None, pack: str) -> str:
    """The pack's file, as a machine elsewhere names it."""
    return f"{mirror or folder.absolute()}/packs/{pack}.json"


def send(folder: Path, mirror: str | None, packs: list[Pack]) -> None:
    """Copies to the mirror what the packs' machines will read.

    Raises:
      BackendError: the store did not take it.
    """
    if mirror is not None:
        records.write_json(folder / FILE, {"mirror": mirror})
        copy(folder, mirror, ["study.json", "budget.json", *(f"packs/{pack.name}.json" for pack in packs)])


def copy(folder: Path, mirror: str | None, names: list[str]) -> None:
    """Copies those of these files that exist from the study's folder to its mirror, if it has one.

    Raises:
      BackendError: the store did not take them.
    """
    if mirror is None:
        return
    from slmjax import paths

    try:
        there = paths.as_path(mirror)
        for name in names:
            if (folder / name).exists():
                paths.copy(folder / name, there / name)
    except Exception as error:  # whatever a store's library raises
        raise BackendError(f"{mirror} does not take {names[-1]}: {_short(error)}") from error


def bring(folder: Path, mirror: str | None) -> None:
    """Copies home what is new of the runs' records.

    Raises:
      BackendError: the store does not answer.
    """
    if mirror is None or not (folder / FILE).exists():  # nothing was sent yet
        return
    from slmjax import paths
    from slmjax.launchers import pull

    try:
        pull.pull(paths.as_path(mirror), folder.parent)
    except Exception as error:
        raise BackendError(f"{mirror} does not answer: {_short(error)}") from error


def _short(error: Exception) -> str:
    return os.fspath(" ".join(f"{type(error).__name__}: {error}".split())[:200])
