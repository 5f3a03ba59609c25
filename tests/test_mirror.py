"""A run that trains here and is kept in a store: whatever fails, whenever, the store's copy goes on to the same bits.

The store is in memory and has what object stores have and no more (`object_store`); processes die by leaving its
objects as they are, which are then all that the next process has.
"""

import shutil
from pathlib import Path

import pytest
import runs
from mirrored import FEATURES, LEASES, URL, Pushing, dead, mirror_of, put, train_mirrored, unpack
from object_store import bucket  # noqa: F401
from runs import make_run

from slmjax import cli, config, digests, environment, launchers, paths, records
from slmjax.mirror import pull, session
from slmjax.mirror.session import Mirror, MirrorError
from slmjax.progress import Progress


@pytest.fixture(scope="module")
def run():
    return make_run(FEATURES)


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """Undisturbed, without a mirror; and the folder as it was after each dispatch."""
    folder = tmp_path_factory.mktemp("straight")
    snapshots = []

    class Snapshot(Progress):
        def update(self, members, num_waiting):
            for member in members:
                member.checkpoints.wait()
            snapshots.append(shutil.copytree(folder / "s", folder / f"after-{len(snapshots)}"))

    runs.train_here(folder / "s", run, progress=Snapshot(quiet=True))
    return folder / "s", [*snapshots, folder / "s"]


def assert_whole(objects: dict[str, bytes], run, straight: Path, folder: Path) -> None:
    """Attempts are prefixes, steps complete or not counted, the status no newer than the records, DONE the last."""
    there, truth = unpack(dead(objects), folder) / run.run_id, straight / run.run_id
    lines = [record for path in records.attempt_files(there) for record in records.read_lines(path)]
    done = [record for path in records.attempt_files(truth) for record in records.read_lines(path)]
    assert [line["kind"] for line in lines] == [line["kind"] for line in done[: len(lines)]]
    for step in (there / "checkpoints").glob("step-*"):
        assert not (step / "digests.json").exists() or digests.damage(step) is None
    status = records.read_json(there / "status.json")
    if status is not None:
        assert status["step"] <= max([line["step"] for line in lines]), "the status is ahead of the records"
    if (there / "DONE").exists():
        assert lines[-1]["kind"] == "end" and len(lines) == len(done) and status["state"] == "done"
        assert (there / "checkpoints" / "step-00000024" / "digests.json").exists()


def test_every_moment_of_the_copy_is_whole_and_can_be_gone_on_from(run, straight, bucket, tmp_path):  # noqa: F811
    train_mirrored(tmp_path / "first" / "s", run)
    moments = list(bucket.history)
    assert len(moments) > 50 and sum(any("digests.json" in n for n in m) for m in moments) > 20
    for number, objects in enumerate(moments):
        assert_whole(objects, run, straight[0], tmp_path / f"at-{number}")
    put(bucket, dead(moments[-1]))
    runs.assert_same(straight[0], unpack(bucket.objects, tmp_path / "end"), run)

    begun = set()
    for number in sorted({*range(3, len(moments), 9), len(moments) - 2, len(moments) - 1}):
        put(bucket, dead(moments[number]))
        folder = tmp_path / f"on-{number}" / "s"
        assert train_mirrored(folder, run) == {run.run_id: "done"}
        attempts = records.attempt_files(folder / run.run_id)
        begun.add(records.read_lines(attempts[-1])[0]["step"])
        if number < len(moments) - 2:
            runs.assert_same(straight[0], folder, run)
        there = unpack(bucket.objects, tmp_path / f"there-{number}")
        assert (there / run.run_id / "DONE").exists() and runs.losses(there, run) == runs.losses(straight[0], run)
        assert runs.final_state(there, run) == runs.final_state(straight[0], run)
    assert len(begun) > 4, f"always begun from the same steps: {begun}"


def replay(folder: Path, snapshots: list[Path], mirror: Mirror) -> None:
    """The folder as it was after each dispatch, and a push there."""
    for snapshot in snapshots:
        shutil.rmtree(folder)
        shutil.copytree(snapshot, folder)  # keeps the times of the files
        mirror._push()


@pytest.fixture
def impatient(monkeypatch):
    """Tries again at once."""
    monkeypatch.setattr(session, "FIRST_PAUSE_S", 0.01)


def test_any_one_request_that_fails_costs_nothing(run, straight, bucket, tmp_path, capsys, impatient):  # noqa: F811
    folder, snapshots, told = tmp_path / "s", straight[1][::2], 0

    def trained(fails):
        put(bucket, {})
        bucket.fails = fails
        folder.mkdir()
        with mirror_of(folder, run, final_s=60.0, ttl_s=600.0) as mirror:
            replay(folder, snapshots, mirror)
        shutil.rmtree(folder)
        return len(bucket.requests), dict(bucket.objects)

    number, whole = trained(lambda *_: False)
    assert any(name.endswith("DONE") for name in whole) and not any(LEASES in name for name in whole)
    assert number > 50
    for failing in range(1, number):  # the last one deletes the lease: if that fails, it runs out
        _, found = trained(lambda n, *_, failing=failing: n == failing)
        assert found == whole, f"request {failing} of {number} failed, and it shows"
        heard = capsys.readouterr().err
        assert heard.count("does not answer") == heard.count("answers again") <= 1
        told += heard.count("answers again")
    assert told > number / 2


def test_an_outage_costs_nothing_and_is_told_once(run, straight, bucket, tmp_path, capsys, impatient):  # noqa: F811
    """From the second push to the last: by then the steps it would have sent are gone, and others are there."""
    folder, snapshots = tmp_path / "s", straight[1]
    folder.mkdir()
    with mirror_of(folder, run, final_s=60.0) as mirror:
        replay(folder, snapshots[:1], mirror)
        bucket.fails = lambda *_: True
        replay(folder, snapshots[1:], mirror)
        missed = len(bucket.requests)
        bucket.fails = lambda number, *_: number < missed + 20  # the end has to try
    heard = capsys.readouterr().err
    assert heard.count("does not answer (OSError: planned") == heard.count("answers again") == 1
    runs.assert_same(straight[0], unpack(bucket.objects, tmp_path / "there"), run)


def test_a_store_that_stays_away_leaves_everything_here(run, straight, bucket, tmp_path, capsys, impatient):  # noqa: F811
    folder = tmp_path / "s"
    with pytest.raises(MirrorError) as failure, mirror_of(folder, run, final_s=0.2) as mirror:
        runs.train_here(folder, run, progress=Pushing(mirror))
        bucket.fails = lambda *_: True
        mirror.pushes[0]._sent.clear()
    line = str(failure.value)
    assert "\n" not in line and f"Only in {folder}: {run.run_id} (" in line
    assert all(f"attempt-000.jsonl, {name}" in line or name in line for name in ("config.json", "step 24", "DONE"))
    runs.assert_same(straight[0], folder, run)
    assert not any(name.endswith("DONE") for name in bucket.objects)
    with pytest.raises(MirrorError, match="nothing was started"), mirror_of(tmp_path / "other", run, final_s=0.2):
        raise AssertionError("begun without a look at what the store has")

    bucket.fails = lambda *_: False
    assert train_mirrored(folder, run) == {run.run_id: "done"}
    runs.assert_same(straight[0], unpack(bucket.objects, tmp_path / "there"), run)
    assert records.load_run(tmp_path / "there" / "s" / run.run_id).num_attempts == 1, "the same command only sends"


def test_a_slow_store_gets_steps_whole_that_are_collected_meanwhile(run, straight, bucket, tmp_path):  # noqa: F811
    folder, snapshots = tmp_path / "s", straight[1]
    folder.mkdir()
    step = folder / run.run_id / "checkpoints" / "step-00000008"
    with mirror_of(folder, run) as mirror:
        shutil.rmtree(folder)
        shutil.copytree(snapshots[2], folder)
        assert step.exists() and step.name == max(p.name for p in step.parent.glob("step-*"))

        def collect(number, what, name):
            if what == "write" and "step-00000008" in name and step.exists():
                shutil.rmtree(step, ignore_errors=True)  # files are sent by several threads
            return False

        bucket.fails = collect
        assert mirror._push() and not step.exists()
    there = unpack(bucket.objects, tmp_path / "there") / run.run_id / "checkpoints" / "step-00000008"
    assert digests.damage(there) is None
    assert not list((folder / ".mirror").rglob("*.json"))


def test_steps_that_are_gone_here_go_there_and_pinned_ones_stay(bucket, tmp_path):  # noqa: F811
    trunk, branch, _ = runs.branches([16, 40], FEATURES)
    train_mirrored(tmp_path / "s", trunk)

    def steps(folder):
        return sorted(path.parent.name for path in (folder / trunk.run_id).glob("checkpoints/*/digests.json"))

    there, pinned = steps(unpack(bucket.objects, tmp_path / "there")), f"step-{branch.branch_step:08d}"
    assert pinned in there and set(there) <= set(steps(tmp_path / "s")) and steps(tmp_path / "s")[-1] in there
    deleted = [name for name in bucket.names("delete") if "checkpoints" in name]
    assert deleted and deleted[0].endswith("digests.json")


def test_a_branch_begins_from_its_trunk_on_another_machine(bucket, tmp_path):  # noqa: F811
    trunk, branch = runs.branches([16], {"optim.ema_decay": 0.9})
    train_mirrored(tmp_path / "a" / "s", trunk)
    bucket.requests.clear()
    train_mirrored(tmp_path / "b" / "s", branch)
    assert runs.load(tmp_path / "b" / "s", branch).start["step"] == branch.branch_step
    assert records.attempt_files(tmp_path / "b" / "s" / trunk.run_id) == [], "only the checkpoint was wanted"
    read = {name.split("/")[5] for name in bucket.names("read") if f"{trunk.run_id}/checkpoints/" in name}
    assert f"step-{branch.branch_step:08d}" in read
    runs.train_here(tmp_path / "whole", make_run(config.flatten(branch.config)))
    runs.assert_same(tmp_path / "b" / "s", tmp_path / "whole", branch, first=branch.branch_step)


# ---- what the store has may be bad ----------------------------------------------------------------------------------


def preempted_copy(bucket, tmp_path, run):  # noqa: F811
    """The store as a run has left it that was stopped at step 13, with steps 12 and 13."""
    folder = tmp_path / "stopped" / "s"
    for step in (12, 13):
        with mirror_of(folder, run):
            runs.stop_at(folder, run, step)
    shutil.rmtree(folder)
    found = sorted({name.split("/")[5] for name in bucket.objects if "digests.json" in name})
    assert len(found) == 2
    return found


def test_a_damaged_checkpoint_costs_steps_and_not_numbers(run, straight, bucket, tmp_path, capsys):  # noqa: F811
    older, newest = preempted_copy(bucket, tmp_path, run)
    name = f"b/root/s/{run.run_id}/checkpoints/{newest}/state/bytes/0"
    bucket.objects[name] = bucket.objects[name][:-9] + b"123456789"
    assert train_mirrored(tmp_path / "on" / "s", run) == {run.run_id: "done"}
    assert f"{newest}/state/bytes/0 does not match its digest" in capsys.readouterr().err
    assert records.read_lines(records.attempt_files(tmp_path / "on" / "s" / run.run_id)[-1])[0]["step"] == int(
        older[5:]
    )
    runs.assert_same(straight[0], tmp_path / "on" / "s", run)
    runs.assert_same(straight[0], unpack(bucket.objects, tmp_path / "there"), run)


def test_only_damaged_checkpoints_stop_the_run(run, bucket, tmp_path):  # noqa: F811
    for step in preempted_copy(bucket, tmp_path, run):
        bucket.objects[f"b/root/s/{run.run_id}/checkpoints/{step}/state/bytes/0"] = b""
    for _ in range(2):  # nor does an automatic relaunch begin at 0
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be trusted"), mirror_of(tmp_path / "on", run):
            raise AssertionError("begun")
        shutil.rmtree(tmp_path / "on", ignore_errors=True)


def test_what_went_another_way_is_set_aside(run, straight, bucket, tmp_path):  # noqa: F811
    """This machine lost the run and trained on; another one has gone on with the store's copy."""
    folder = tmp_path / "lost" / "s"
    train_mirrored(folder, run)
    before = runs.losses(folder, run)
    (folder / run.run_id / "DONE").unlink()
    attempt = f"b/root/s/{run.run_id}/attempt-000.jsonl"
    bucket.objects[attempt] = bucket.objects[attempt].replace(b'"tokens_per_s": ', b'"tokens_per_s": 1')
    pull.pull_pack([run], folder, paths.as_path(URL))
    assert (folder / run.run_id / "attempt-000.jsonl").read_bytes() == bucket.objects[attempt]
    aside = folder / ".aside" / f"{run.run_id}-0"
    assert {line["step"]: None for line in records.load_run(aside).train} == dict.fromkeys(before)
    assert train_mirrored(folder, run) == {run.run_id: "done"}


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def published(run, bucket, tmp_path, monkeypatch):  # noqa: F811
    """A study's plan and pack in the store, as a launcher puts them there; the pack's URL."""
    monkeypatch.setattr(environment, "prepare", lambda: None)  # JAX is here already
    pack = launchers.Pack(tmp_path / "laptop" / "s", [run], "a1")
    pack.folder.mkdir(parents=True)
    launchers.write_packs([pack])
    listing = {"run_id": run.run_id, "tags": {"seed": 0}, "parent": None, "branch_step": None}
    records.write_json(pack.folder / "study.json", {"name": "s", "runs": [listing]})
    for name in ("packs/a1.json", "study.json"):
        paths.copy(pack.folder / name, paths.as_path(URL) / name)
    return f"{URL}/packs/a1.json"


def test_a_pack_in_a_store_trains_here_and_is_kept_there(run, straight, published, bucket, tmp_path, capsys):  # noqa: F811
    assert cli.main(["pack", published, f"--out={tmp_path / 'scratch'}"]) == 0
    runs.assert_same(straight[0], tmp_path / "scratch" / "s", run)
    there = unpack(bucket.objects, tmp_path / "there")
    runs.assert_same(straight[0], there, run)
    assert (there / run.run_id / "DONE").exists()
    before = dict(bucket.objects)
    assert cli.main(["pack", published, f"--out={tmp_path / 'elsewhere'}"]) == 0
    assert {k: v for k, v in bucket.objects.items() if k not in before} == {}, "a finished run was trained again"
    assert cli.main(["study", "pull", f"--study={URL}", f"--out={tmp_path / 'home'}"]) == 0
    assert runs.losses(tmp_path / "home" / "s", run) == runs.losses(straight[0], run)


def test_a_mounted_folder_is_a_store_too(run, straight, published, tmp_path):
    pack = str(tmp_path / "laptop" / "s" / "packs" / "a1.json")
    assert cli.main(["pack", pack, f"--mirror={tmp_path / 'mounted' / 's'}", "--mirror_every=0.05"]) == 0
    runs.assert_same(straight[0], tmp_path / "mounted" / "s", run)
    assert {p.name for p in (tmp_path / "mounted" / "s").iterdir()} >= {"study.json", "packs", run.run_id}
    assert not list((tmp_path / "mounted").rglob(".*.part"))


def test_a_store_that_does_not_answer_is_one_line(run, published, bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(session.Mirror.__init__, "__defaults__", ("", 15.0, 120.0, 0.0, lambda: True))
    copied = str(tmp_path / "laptop" / "s" / "packs" / "a1.json")
    bucket.fails = lambda *_: True
    assert cli.main(["pack", copied, f"--mirror={URL}"]) == 1
    heard = capsys.readouterr().err
    assert f"slmjax pack: {URL} does not answer (OSError: planned" in heard and heard.count("\n") == 1
    assert cli.main(["pack", published, f"--mirror={URL}"]) == 2
    assert "leave out --mirror" in capsys.readouterr().err
