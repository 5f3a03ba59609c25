"""Who may train a run that is kept in a store: one process, and what the others do."""

import json
import time

import pytest
import runs
from mirrored import FEATURES, LEASES, URL, mirror_of
from object_store import bucket  # noqa: F401
from runs import make_run

from slmjax import lease as local_lease
from slmjax import paths, records
from slmjax.mirror import lease
from slmjax.mirror.session import MirrorError


@pytest.fixture(scope="module")
def run():
    return make_run(FEATURES)


def hold(bucket, run, **changes) -> str:  # noqa: F811
    """Somebody else's lease; the name of its object."""
    said = {"token": "rival", "trains": True, "host": "other", "pid": 7, "place": "elsewhere", "process_start": "1"}
    said |= {"since": time.time(), "heartbeat": time.time(), "ttl_s": 0.5, "run_ids": [run.run_id]}
    bucket.change("b/root/s/leases/rival.json", json.dumps(said | changes).encode())
    return "b/root/s/leases/rival.json"


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0], ids=["clocks-agree", "its-clock-is-ahead"])
def test_a_pack_that_another_process_trains_is_waited_for(run, bucket, tmp_path, capsys, ahead_s):  # noqa: F811
    hold(bucket, run, heartbeat=time.time() + ahead_s)
    began = time.monotonic()
    with mirror_of(tmp_path / "s", run):
        waited = time.monotonic() - began
    assert 0.4 < waited < 5.0
    heard = capsys.readouterr().err
    assert heard.count("is held by pid") == 1 and "on other" in heard
    assert not any(LEASES in name for name in bucket.objects)


def test_a_process_that_was_killed_here_is_not_waited_for(run, bucket, tmp_path, capsys):  # noqa: F811
    hold(bucket, run, place=local_lease.place(), pid=2**22 + 1, heartbeat=time.time(), ttl_s=3600)
    with mirror_of(tmp_path / "s", run):
        assert "is held" not in capsys.readouterr().err


@pytest.mark.parametrize("older", [True, False], ids=["the-other-is-older", "ours-is-older"])
def test_of_two_that_ask_at_once_one_stands_back(run, bucket, tmp_path, capsys, older):  # noqa: F811
    """The other's ticket lands between our first look and our own ticket; it takes it back when it sees an older."""

    def asks_too(number, what, name):
        if what == "write" and LEASES in name and not rivals:
            rivals.append(hold(bucket, run, trains=False, since=time.time() + (-10 if older else 10)))
        elif not older and what == "list" and rivals == ["b/root/s/leases/rival.json"] and len(looks) > 3:
            rivals.append(bucket.change(rivals[0], None))
        looks.extend([name] * bool(rivals))
        return False

    rivals, looks = [], []
    bucket.fails = asks_too
    with mirror_of(tmp_path / "s", run, ttl_s=10.0):
        assert rivals and ("is held by pid 7 on other" in capsys.readouterr().err) == older
        assert [name for name in bucket.objects if LEASES in name] != []


def test_packs_without_a_run_in_common_do_not_wait(run, bucket, tmp_path, capsys):  # noqa: F811
    hold(bucket, make_run({"train.seed": 8}), ttl_s=3600)
    with mirror_of(tmp_path / "s", run):
        assert "is held" not in capsys.readouterr().err
    assert "b/root/s/leases/rival.json" in bucket.objects


def test_a_holder_that_was_silent_and_replaced_stops(run, bucket, tmp_path):  # noqa: F811
    """As a process that was suspended: the other has seen its lease run out, and taken the run."""
    held = lease.StoreLease(paths.as_path(URL), [run.run_id], ttl_s=0.2)
    held.take()
    held.beat()
    time.sleep(0.25)
    replaced = json.loads(bucket.objects[f"b/root/s/leases/{held.token}.json"]) | {"place": "elsewhere"}
    bucket.change(f"b/root/s/leases/{held.token}.json", json.dumps(replaced).encode())
    other = lease.StoreLease(paths.as_path(URL), [run.run_id], ttl_s=60.0)
    other.take()
    assert f"b/root/s/leases/{held.token}.json" not in bucket.objects
    with pytest.raises(lease.LeaseLost, match="has taken over"):
        held.beat()
    held._write(trains=True)  # had its write been under way
    time.sleep(0.25)
    with pytest.raises(lease.LeaseLost, match=r"was silent for .* has taken over"):
        held.beat()
    other.beat()


def test_a_lost_lease_ends_the_training_and_nothing_more_is_sent(run, bucket, tmp_path):  # noqa: F811
    """Its process was suspended past the ttl, say."""
    folder, asked = tmp_path / "s", []

    def loses(number, what, name):
        if not asked and what == "read" and LEASES in name and records.attempt_files(folder / run.run_id):
            asked.append(hold(bucket, run))
            bucket.change(name, None)
            asked.append(len(bucket.history))
        return False

    def stop():
        asked.append("stop")
        return True

    bucket.fails = loses
    said = r"is gone: pid 7 on other.* has taken over. Not sent, and only in .*s: "
    with pytest.raises(MirrorError, match=said) as failure, mirror_of(folder, run, every_s=0.01, stop=stop):
        runs.train_here(folder, run, progress=runs.Paced(0.2))
    assert "\n" not in str(failure.value) and asked[2:] == ["stop"]
    assert len(bucket.history) == asked[1], "something was sent after the lease was lost"
    assert "b/root/s/leases/rival.json" in bucket.objects, "the other's lease was deleted"
