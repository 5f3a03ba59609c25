"""A study's results brought home: exactly the records, once, and the same points as where they came from."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from object_store import bucket  # noqa: F401
from planted_study import write_study

from slmjax import cli, paths, records
from slmjax.launchers import pull, rsync, status
from slmjax.scaling.points import load_points

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A planted study with what else a trainer leaves in its folders."""
    folder = write_study(tmp_path_factory.mktemp("out") / "ladder", widths=(64, 96), ratios=(10, 20, 40))
    for run_dir in (path for path in folder.iterdir() if path.is_dir()):
        run = records.load_run(run_dir)
        if run.done:
            (run_dir / "DONE").touch()
        if run.num_attempts:
            for name in ("checkpoints/step-00000008/state/0", "tb/events.out.tfevents.1", ".lease.lock"):
                (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (run_dir / name).write_text("x" * 100)
            gone = {"place": "elsewhere", "host": "gone", "pid": 1, "heartbeat": 0, "ttl_s": 1}
            (run_dir / "lease.json").write_text(json.dumps(gone))
    (folder / "running" / "status.json").write_text(json.dumps({"state": "running", "step": 3, "time": time.time()}))
    (folder / "diverged" / "error.txt").write_text("nan")
    (folder / "leases").mkdir()
    alive = {"token": "t", "run_ids": ["running"], "place": "elsewhere", "host": "vm", "pid": 1, "ttl_s": 3600}
    (folder / "leases" / "t.json").write_text(json.dumps(alive | {"heartbeat": time.time()}))
    (folder / "packs").mkdir()
    (folder / "packs" / "p.json").write_text("{}")
    return folder


@pytest.fixture
def store(bucket, study):  # noqa: F811
    """The same in an object store."""
    for path in study.rglob("*"):
        if path.is_file():
            name = f"b/root/ladder/{path.relative_to(study)}"
            bucket.objects[name], bucket.times[name] = path.read_bytes(), path.stat().st_mtime
    return paths.as_path("gs://b/root/ladder")


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """rsync's way to another host: the same command, here. Skips where there is no rsync."""
    if shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    script = tmp_path / "ssh"
    script.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("RSYNC_RSH", str(script))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name[0] != "." and p.parent.name != "leases"
    }


def records_of(study: Path, tensorboard: bool = False) -> dict[str, bytes]:
    """What is to come, by a rule of its own."""
    unwanted = ["checkpoints/", "leases/", "lease.json", ".lease.lock", "packs/"] + ["tb/"] * (not tensorboard)
    return {name: content for name, content in files(study).items() if not any(part in name for part in unwanted)}


def rows(folder: Path):
    found = load_points([folder])
    return [(p.run_id, p.N, p.D, p.C, p.loss) for p in found.points], [(e.run_id, e.reason) for e in found.excluded]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_exactly_the_records_come_and_give_the_same_points(study, store, tmp_path, tensorboard):
    pulled = pull.pull(store, tmp_path, tensorboard)
    assert files(tmp_path / "ladder") == records_of(study, tensorboard)
    assert pulled.files == len(records_of(study, tensorboard)) and pulled.missing == ["waiting"]
    assert pulled.bytes == sum(map(len, records_of(study, tensorboard).values()))
    assert rows(tmp_path / "ladder") == rows(study) and len(rows(study)[0]) >= 6


def test_again_only_what_is_new(study, store, bucket, tmp_path):  # noqa: F811
    pull.pull(store, tmp_path)
    before = files(tmp_path / "ladder")
    bucket.requests.clear()
    pulled = pull.pull(store, tmp_path)
    assert (pulled.files, pulled.bytes) == (0, 0) and files(tmp_path / "ladder") == before
    finished = {name.split("/")[0] for name in before if name.endswith("DONE")}
    assert pulled.finished == len(finished) > 6
    assert not [name for name in bucket.names() if finished & set(name.split("/"))], "a finished run was read again"
    assert not [name for name in bucket.names("read") if "attempt-" in name], "an attempt that had not grown was read"

    name = "b/root/ladder/running/attempt-000.jsonl"
    bucket.change(name, bucket.objects[name] + b'{"kind": "train", "step": 401, "loss": 2.5}\n')
    bucket.change("b/root/ladder/running/status.json", b'{"state": "running", "step": 401}')
    pulled = pull.pull(store, tmp_path)
    assert pulled.files == 2
    assert records.load_run(tmp_path / "ladder" / "running").train[-1]["step"] == 401


def test_a_look_at_a_store_downloads_an_attempt_once_and_again_when_it_has_grown(store, bucket):  # noqa: F811
    bucket.requests.clear()
    before = status.study_status(store)
    read = [name for name in bucket.names("read") if "attempt-" in name]
    assert len(read) == len(set(read)) == sum(row.attempts for row in before) > 6
    bucket.requests.clear()
    name = "b/root/ladder/running/attempt-000.jsonl"
    bucket.change(name, bucket.objects[name] + b'{"kind": "eval", "step": 401, "loss": 2.5, "bits_per_byte": 0.5}\n')
    (row,) = (row for row in status.study_status(store) if row.run_id == "running")
    assert row.bits_per_byte == 0.5 and [n for n in bucket.names("read") if "attempt-" in n] == [name]


def test_stopped_anywhere_a_copy_that_says_done_is_complete(study, store, bucket, tmp_path):  # noqa: F811
    pull.pull(store, tmp_path / "whole")
    total, whole = len(bucket.requests), files(tmp_path / "whole" / "ladder")
    bucket.requests.clear()
    for number in range(1, total, 7):
        bucket.fails = lambda n, what, name, number=number: n == number
        bucket.requests.clear()
        try:
            pull.pull(store, tmp_path / "cut")
        except OSError as error:
            assert "planned" in str(error)
        cut = files(tmp_path / "cut" / "ladder") if (tmp_path / "cut" / "ladder").exists() else {}
        assert all(whole[name] == content for name, content in cut.items()), "a file that is not as it was there"
        for name in (name for name in cut if name.endswith("DONE")):
            run_id = name.split("/")[0]
            assert {n for n in cut if n.startswith(run_id + "/")} == {n for n in whole if n.startswith(run_id + "/")}
        if number % 3 == 0:
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
    bucket.fails = lambda *_: False
    pull.pull(store, tmp_path / "cut")
    assert files(tmp_path / "cut" / "ladder") == whole


def test_a_done_that_appears_while_its_run_is_read_does_not_come(store, bucket, tmp_path):  # noqa: F811
    """The records were read before the run ended."""
    reading = "b/root/ladder/running/attempt-000.jsonl"

    def ends_meanwhile(number, what, name):
        if (what, name) == ("read", reading):
            bucket.objects["b/root/ladder/running/DONE"] = b""
            bucket.times["b/root/ladder/running/DONE"] = time.time()
        return False

    bucket.fails = ends_meanwhile
    pull.pull(store, tmp_path)
    assert not (tmp_path / "ladder" / "running" / "DONE").exists()
    pull.pull(store, tmp_path)
    assert (tmp_path / "ladder" / "running" / "DONE").exists()


def test_from_a_mounted_folder(study, tmp_path):
    pulled = pull.pull(study, tmp_path)
    assert files(tmp_path / "ladder") == records_of(study) and pulled.files == len(records_of(study))
    assert pull.pull(study, tmp_path).files == 0


@pytest.mark.parametrize("tensorboard", [False, True])
def test_from_another_host(study, ssh, tmp_path, tensorboard):
    pulled = rsync.pull(f"host:{study}", tmp_path / "out", tensorboard)
    assert files(tmp_path / "out" / "ladder") == records_of(study, tensorboard)
    assert pulled.files == len(records_of(study, tensorboard)) and "waiting" in pulled.missing
    again = rsync.pull(f"host:{study}", tmp_path / "out", tensorboard)
    assert (again.files, again.bytes) == (0, 0) and again.finished == sum("DONE" in name for name in records_of(study))
    assert rows(tmp_path / "out" / "ladder") == rows(study)


def test_the_rules_that_rsync_gets(study, tmp_path, monkeypatch):
    """Where there is no rsync: one that copies by those rules that name files, and tells what it was asked."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "rsync"
    fake.write_text(f"#!{sys.executable}\n" + FAKE_RSYNC)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    pulled = rsync.pull(f"me@host:{study}/", tmp_path / "out")
    assert files(tmp_path / "out" / "ladder") == records_of(study) and pulled.finished == 0
    asked = [json.loads(line) for line in (tmp_path / "bin" / "asked").read_text().splitlines()]
    assert [words[-2] for words in asked] == [f"me@host:{study}/"] * 2
    assert "--include=/*/DONE" in asked[0] and "--include=/*/DONE" not in asked[1], "DONE is asked for first"
    assert rsync.pull(f"me@host:{study}/", tmp_path / "out").finished > 6
    asked = [json.loads(line) for line in (tmp_path / "bin" / "asked").read_text().splitlines()]
    assert "--exclude=/w0064r010/" in asked[-1], "a finished run was read again"


FAKE_RSYNC = """
import fnmatch, json, os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
open(here / "asked", "a").write(json.dumps(sys.argv[1:]) + "\\n")
source, target = pathlib.Path(sys.argv[-2].split(":", 1)[1]), pathlib.Path(sys.argv[-1])
rules = [arg[2:].split("=", 1) for arg in sys.argv[1:] if arg.startswith(("--include", "--exclude"))]
def wanted(name):  # the first rule that matches decides, for each folder on the way
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        path, folder = "/" + "/".join(parts[:depth]), depth < len(parts)
        for kind, rule in rules:
            same_depth = rule.strip("/").count("/") == depth - 1 or rule == "*"
            if same_depth and rule.endswith("/") <= folder and fnmatch.fnmatch(path, rule.rstrip("/")):
                if kind == "exclude":
                    return False
                break
    return True
for path in sorted(source.rglob("*")):
    name = str(path.relative_to(source))
    new = target / name
    if path.is_file() and wanted(name) and not (new.exists() and new.read_bytes() == path.read_bytes()):
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new)
        print(path.stat().st_size, name)
"""


@pytest.mark.parametrize(
    "source, ssh_source",
    [("host:/a/b", True), ("me@host:b", True), ("gs://b/n", False), ("OUT/n", False), ("x.py:tiny", False)],
)
def test_what_reads_as_another_host(source, ssh_source):
    assert rsync.is_ssh(source) == ssh_source


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_verbs_read_a_study_in_a_store(study, store, tmp_path, capsys):
    def said(*argv):
        assert cli.main(argv) == 0
        return capsys.readouterr().out

    where = "--study=gs://b/root/ladder"
    shown = {row["run_id"]: row for row in json.loads(said("study", "status", where, "--json"))}
    here = {row["run_id"]: row for row in json.loads(said("study", "status", f"--study={study}", "--json"))}
    assert {k: v["state"] for k, v in shown.items()} == {k: v["state"] for k, v in here.items()}
    assert {"done", "killed", "queued"} <= {row["state"] for row in shown.values()}
    logs = said("study", "logs", "w0064r010", where, "--json")
    assert logs == said("study", "logs", "w0064r010", f"--study={study}", "--json") and logs.count("\n") > 10
    tags = ("--rows=width", "--columns=tokens_per_param", "--json")
    assert said("study", "compare", where, *tags) == said("study", "compare", f"--study={study}", *tags)
    assert "next: slmjax fit" in said("study", "pull", where, f"--out={tmp_path}")
    assert "0 files came" in said("study", "pull", where, f"--out={tmp_path}")
    copy = {row.run_id: row.state for row in status.study_status(tmp_path / "ladder")}
    assert copy["running"] == "running", "whether it still lives cannot be told from a copy"
    assert cli.main(["fit", str(tmp_path / "ladder"), f"--json={tmp_path / 'fit.json'}"]) == 0


@pytest.mark.parametrize(
    "argv, line",
    [
        (["study", "report", "--study=gs://b/root/ladder"], "slmjax study pull --study=gs://b/root/ladder"),
        (["study", "cancel", "--study=gs://b/root/ladder"], "slmjax study pull"),
        (["study", "run", "--study=gs://b/root/ladder"], "is a folder; planning and running need the study's file"),
        (["study", "status", "--study=gs://b/root/none"], "gs://b/root/none is not a study folder"),
        (["study", "pull", "--study=gs://b/root/none"], "gs://b/root/none is not a study folder"),
        (["study", "run", "--study=base", "--out=gs://b/root"], "--mirror=URL/NAME"),
        (["fit", "gs://b/root/ladder"], "slmjax study pull --study=gs://b/root/ladder"),
        (["study", "status", "--study=ftp://b/x"], "no store has ftp://; use gs://, s3://"),
    ],
)
def test_what_cannot_be_done_on_a_store_says_what_can(store, capsys, argv, line):
    assert cli.main(argv) == 2
    heard = capsys.readouterr().err
    assert line in heard and heard.count("\n") == 1


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["study", "pull", "--study=host:/a/b", f"--out={tmp_path}"]) == 2
    assert "there is no rsync here" in capsys.readouterr().err
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda name: (_ for _ in ()).throw(ImportError("Install s3fs")))
    with pytest.raises(ValueError, match=r"needs s3fs, which is not installed .*pip install 'slmjax\[s3\]'"):
        paths.as_path("s3://b/n")


def test_looking_at_a_folder_loads_no_library_for_stores():
    code = "import sys; from slmjax import cli, records, paths; from slmjax.launchers import status; " \
           "paths.as_path('OUT/x'); print([m for m in ('etils', 'fsspec', 'jax') if m in sys.modules])"  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
