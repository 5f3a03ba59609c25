"""The same over ssh: a study's results from HOST:PATH, by rsync, which sends only what has changed.

Which runs are done is asked first, and their DONE written last: what rsync reads in between was final by then.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from slmjax import records
from slmjax.launchers.pull import Pulled, is_final, mark

RECORDS = ("config.json", "provenance.json", "status.json", "error.txt", "attempt-*.jsonl")


def is_ssh(source: str) -> bool:
    """Whether it reads [USER@]HOST:PATH, as against a URL, a folder, or an experiment FILE.py:ARG."""
    match = re.fullmatch(r"([^/:]+):(.+)", source)
    return bool(match) and not match[2].startswith("//") and not match[1].endswith(".py")


def pull(source: str, out: Path, tensorboard: bool = False) -> Pulled:
    """Copies what is new in the study at HOST:PATH/NAME to OUT/NAME.

    Raises:
      ValueError: there is no rsync here, it failed, or what is there is no study.
    """
    if shutil.which("rsync") is None:
        raise ValueError(
            f"{source} is read by rsync over ssh, and there is no rsync here; install it, or mount the folder"
        )
    source = source.rstrip("/")
    total = Pulled(out / re.split(r"[/:]", source)[-1])
    total.folder.mkdir(parents=True, exist_ok=True)
    final = [path.name for path in total.folder.iterdir() if path.is_dir() and is_final(path, tensorboard)]
    skipped = [f"--exclude=/{run_id}/" for run_id in final]
    with tempfile.TemporaryDirectory() as before:
        _rsync(source, Path(before), [*skipped, "--exclude=/.*", "--include=/*/", "--include=/*/DONE", "--exclude=*"])
        done = [path.parent.name for path in Path(before).glob("*/DONE")]
    chosen = [f"--include=/*/{name}" for name in RECORDS]
    if tensorboard:
        chosen += ["--include=/*/tb/", "--include=/*/tb/*"]
    rules = [*skipped, "--exclude=/.*", "--exclude=/packs/", "--include=/*/", *chosen]
    came = _rsync(source, total.folder, [*rules, "--include=/study.json", "--exclude=*"])
    plan = records.read_json(total.folder / "study.json")
    if plan is None:
        raise ValueError(f"{source} is not a study folder: it has no study.json")
    mark(total.folder, source)
    for run_id in done:
        (total.folder / run_id / "DONE").touch()
    run_ids = [run["run_id"] for run in plan["runs"]]
    total.missing = [run_id for run_id in run_ids if not (total.folder / run_id).exists()]
    total.finished = len(set(final) & set(run_ids))
    total.runs = len(run_ids) - len(total.missing)
    total.files, total.bytes = len(came) + len(done), sum(came)
    return total


def _rsync(source: str, target: Path, rules: list[str]) -> list[int]:
    """The sizes of the files that came; each is written beside its name and renamed, as rsync does."""
    command = ["rsync", "-rt", "--prune-empty-dirs", "--out-format=%l %n", *rules, f"{source}/", f"{target}/"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(f"rsync of {source} failed with {result.returncode}: {said[0]}")
    lines = [line.split(" ", 1) for line in result.stdout.splitlines() if " " in line]
    return [int(size) for size, name in lines if not name.endswith("/")]
