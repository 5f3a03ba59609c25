"""Leases: one live writer per run directory, a dead one replaced unaided, never two at once."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slmjax import lease
from slmjax.lease import LeaseError, RunLease, wait_for

ENV = os.environ | {"PYTHONPATH": str(Path(lease.__file__).parents[1])}


def start_holder(run_dir):
    """A process that takes the lease, says so, and sleeps."""
    code = f"""
        import time
        from slmjax.lease import RunLease
        with RunLease({str(run_dir)!r}):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=ENV, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def rewrite(run_dir, **changes):
    path = run_dir / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def age(run_dir, seconds):
    then = time.time() - seconds
    os.utime(run_dir / "lease.json", (then, then))


@pytest.fixture
def held(tmp_path):
    """A lease taken and abandoned without release; the test rewrites whose it is."""
    RunLease(tmp_path, ttl_s=100).__enter__()
    return tmp_path


def test_released_on_exit_and_on_error(tmp_path):
    run_dir = tmp_path / "study" / "run"
    with RunLease(run_dir):
        record = json.loads((run_dir / "lease.json").read_text())
        assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(KeyError), RunLease(run_dir):
        raise KeyError
    with RunLease(run_dir):
        pass
    assert os.listdir(run_dir) == [".lease.lock"]


def test_living_holder_is_named_and_a_killed_one_replaced(tmp_path, caplog):
    process = start_holder(tmp_path)
    try:
        began = time.monotonic()
        named = rf"in use by pid {process.pid} on host {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d"
        with pytest.raises(LeaseError, match=named), RunLease(tmp_path):
            pass
        assert time.monotonic() - began < 5
    finally:
        os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    with RunLease(tmp_path):
        assert f"dead writer (pid {process.pid} " in caplog.text
    process.communicate()


def test_same_process_is_no_exception(tmp_path):
    first = RunLease(tmp_path)
    with first:
        for second in (first, RunLease(tmp_path)):
            with pytest.raises(LeaseError), second:
                pass
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()  # a refusal releases nothing


def test_reused_pid_is_dead(held):
    rewrite(held, process_start="1")
    with RunLease(held):
        pass


def test_other_host_is_judged_by_the_ttl_it_announced(held):
    rewrite(held, host="node7", place="node7/boot/pid:[1]", pid=1)
    age(held, 90)
    with (
        pytest.raises(LeaseError, match=r"pid 1 on host node7 .*heartbeat 90 s ago.*try again in 10 s"),
        RunLease(held, ttl_s=1),
    ):
        pass
    age(held, 110)
    with RunLease(held, ttl_s=1e6) as ours:
        ours.beat()


def test_other_container_of_this_host_is_judged_by_its_heartbeat(held):
    rewrite(held, place=lease.place() + "0", pid=2**22 + 1)  # the pid means nothing here
    with pytest.raises(LeaseError, match="heartbeat"), RunLease(held):
        pass


def test_beat_renews_four_times_per_ttl(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunLease(tmp_path, ttl_s=100) as ours:
        since = json.loads((tmp_path / "lease.json").read_text())["since"]
        age(tmp_path, 50)
        clock[0] += 24
        ours.beat()
        assert time.time() - (tmp_path / "lease.json").stat().st_mtime > 40
        clock[0] += 2
        ours.beat()
        assert time.time() - (tmp_path / "lease.json").stat().st_mtime < 10
        assert json.loads((tmp_path / "lease.json").read_text())["since"] == since


def test_lost_lease_is_noticed_and_left_alone(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunLease(tmp_path) as ours:
        rewrite(tmp_path, token="theirs", host="node7", pid=7)
        clock[0] += 1000
        with pytest.raises(LeaseError, match="lost to another writer: it is held by pid 7 on host node7"):
            ours.beat()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "theirs"


def test_the_heartbeat_goes_on_while_the_holder_is_busy(tmp_path):
    with RunLease(tmp_path, ttl_s=0.8) as ours:
        time.sleep(1.5)  # as in a compilation: nobody calls beat
        assert ours._age_s() < 0.6
        with ours._guard():  # as every writer does: a heartbeat in between would take it back
            rewrite(tmp_path, token="theirs", host="node7", pid=7)
        time.sleep(0.5)
        with pytest.raises(LeaseError, match="lost to another writer: it is held by pid 7 on host node7"):
            ours.beat()
    age(tmp_path, 50)
    time.sleep(0.5)
    assert RunLease(tmp_path)._age_s() > 49, "a released lease is not renewed"


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_passing_trouble_with_locks_ends_nothing(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunLease(tmp_path, ttl_s=100) as ours:
        said = (tmp_path / "lease.json").read_text()
        for _ in range(3):
            age(tmp_path, 50)
            with monkeypatch.context() as m:
                m.setattr(fcntl, "flock", no_locks)
                for seconds in (30, 10, 9):
                    clock[0] += seconds
                    ours.beat()
            (tmp_path / "lease.json").write_text("")  # names nobody
            ours.beat()
            (tmp_path / "lease.json").write_text(said)
            age(tmp_path, 50)
            clock[0] += 100 / 32
            ours.beat()
            assert ours._age_s() < 10, "it is renewed again"


def test_lasting_trouble_ends_the_run_before_another_may_take_it(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunLease(tmp_path, ttl_s=100) as ours:
        with monkeypatch.context() as m:
            m.setattr(fcntl, "flock", no_locks)
            for seconds in (30, 10, 9):
                clock[0] += seconds
                ours.beat()
            clock[0] += 4
            with pytest.raises(lease.LeaseTrouble, match=r"no heartbeat for 53 s, of 100 s .*No locks available"):
                ours.beat()
            # Ending does not hang on it either; the dead process's lease is taken over like any other.
            ours.__exit__(None, None, None)
        ours._token = json.loads((tmp_path / "lease.json").read_text())["token"]


def test_a_lease_held_elsewhere_is_waited_for(held, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    free = tmp_path_factory.mktemp("free")
    rewrite(held, host="node7", place="node7/boot/pid:[1]", pid=1)
    age(held, 98.5)
    began = time.monotonic()
    wait_for([free, held])
    assert 1 < time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"1 of 2 runs held on another host, as {held}" in said
    with RunLease(held):
        wait_for([free, held])  # held here: entering refuses it at once
    assert capsys.readouterr().err == "" and not os.listdir(free)


def test_a_living_holder_elsewhere_is_refused_after_the_wait(held, monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    rewrite(held, host="node7", place="node7/boot/pid:[1]", pid=1, ttl_s=1)
    began, sleep = time.monotonic(), time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (sleep(seconds), age(held, 0)))
    wait_for([held])
    assert time.monotonic() - began < 5
    with pytest.raises(LeaseError, match="in use by pid 1 on host node7"), RunLease(held):
        pass


def test_forked_child_releases_nothing(tmp_path, monkeypatch):
    with RunLease(tmp_path) as ours:
        with monkeypatch.context() as m:
            pid = os.getpid()
            m.setattr(os, "getpid", lambda: pid + 1)
            ours.__exit__(None, None, None)
        assert (tmp_path / "lease.json").exists()


def test_unreadable_lease_is_refused(tmp_path):
    for text in ("", "{}", "[]"):
        (tmp_path / "lease.json").write_text(text)
        with pytest.raises(LeaseError, match=r"not readable.*delete it"), RunLease(tmp_path):
            pass
    for ttl_s in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ttl_s"):
            RunLease(tmp_path, ttl_s=ttl_s)


# Four processes take the lease over and over; half of the holders die with it. A kernel lock taken inside the lease
# must never be taken.
RACE = """
    import fcntl, os, random, signal, sys, time
    from slmjax.lease import LeaseError, RunLease, wait_for
    run_dir, deadline = sys.argv[1], time.monotonic() + 5

    def work(seed):
        rng = random.Random(seed)
        fd = os.open(run_dir + ".inside", os.O_CREAT | os.O_RDWR)
        while time.monotonic() < deadline:
            try:
                with RunLease(run_dir):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with open(run_dir + ".log", "a") as f:
                        f.write("x")
                    time.sleep(rng.uniform(0, 0.002))
                    if rng.random() < 0.5:
                        os.kill(os.getpid(), signal.SIGKILL)
                    fcntl.flock(fd, fcntl.LOCK_UN)
            except LeaseError:
                pass
            except BlockingIOError:
                os._exit(1)
        os._exit(0)

    seed, deaths, alive = 0, 0, 0
    while time.monotonic() < deadline or alive:
        while time.monotonic() < deadline and alive < 4:
            seed, alive = seed + 1, alive + 1
            if os.fork() == 0:
                work(seed)
        status = os.wait()[1]
        alive -= 1
        deaths += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "two holders at once"
    print(os.path.getsize(run_dir + ".log"), deaths)
"""


def test_never_two_holders(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RACE), tmp_path / "run"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken, deaths = map(int, done.stdout.split())
    assert taken >= 50 and deaths >= 20, done.stdout
