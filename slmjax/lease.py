"""One writer per run directory: a lease on disk, taken, kept by the heartbeat of a thread, and handed back.

Two trainers on one directory delete each other's checkpoints and log steps twice. The lease is `lease.json` in the
run directory: who holds it, since when, and the last heartbeat. Never here: what the directory holds.

Who is dead? A holder on this host (same boot, same process namespace): when its pid is gone, a zombie, or belongs to
a process that started at another time. A holder elsewhere cannot be asked: when its last heartbeat is older than the
ttl it announced: two modification times are compared. Where a file server sets them, as NFS does, skewed host clocks
do not matter; on a file system that takes the writer's time the clocks must agree to a fraction of the ttl.

Why two takers cannot both win: reading, judging and replacing `lease.json` happen inside an flock on `.lease.lock`,
held for milliseconds and dropped by the kernel if its owner dies. Judging without it is the classic race: A and B
find the same dead lease, A replaces it, B replaces A. The flock is not itself the lease, because forked data workers
would inherit it and outlive the trainer. For the same reason nothing forks while the thread holds it.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import uuid

from slmjax import paths

LEASE = "lease.json"
GUARD = ".lease.lock"
GUARD_WAIT_S = 10.0  # the guard is held for milliseconds; longer means a frozen host or a file system without locks

# What a killed holder's run waits for on another host. The heartbeat comes four times as often, from a thread, so that
# compiling, restoring or tokenizing for an hour costs nothing; what is left is a file system that stands still.
TTL_S = 90.0
POLL_S = 1.0  # how often a lease that is waited for is looked at

log = logging.getLogger(__name__)
_guarding = threading.RLock()
os.register_at_fork(before=_guarding.acquire, after_in_parent=_guarding.release, after_in_child=_guarding.release)


class LeaseError(RuntimeError):
    """The run directory belongs to another writer: refused at entry, or lost to one since."""


class LeaseTrouble(LeaseError):
    """Whose the run directory is cannot be told: its lock or lease.json cannot be used."""


class RunLease:
    """Context manager: the sole writer of `run_dir` (created if missing) for the length of the block.

    ttl_s: after this many seconds without a heartbeat another *host* may take over. On one host a dead holder is
    noticed at once and the ttl plays no part. Entering raises LeaseError naming the holder when it is alive or cannot
    be judged (`wait_for` waits for those first). In a multi-process run process 0 takes it.
    """

    def __init__(self, run_dir, ttl_s=TTL_S):
        if not ttl_s > 0:
            raise ValueError(f"ttl_s={ttl_s} must be a positive number of seconds")
        self.run_dir, self.ttl_s = pathlib.Path(run_dir).absolute(), float(ttl_s)
        self._token = None
        self._since = self._last_beat = self._due = 0.0
        self._lost = None  # why it is ours no longer
        self._released = threading.Event()
        self._thread = None

    def __enter__(self):
        self.run_dir.mkdir(parents=True, exist_ok=True)
        token, self._since = uuid.uuid4().hex, time.time()
        with self._guard():
            holder = self._holder()
            if holder is not None:
                self._judge(holder)
                log.warning("taking over %s from a dead writer (%s)", self.run_dir, _describe(holder))
            self._write(token)
        self._token, self._lost = token, None
        self._released.clear()
        self._thread = threading.Thread(target=self._keep, name=f"lease {self.run_dir.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._released.set()
        self._thread.join()
        try:
            with self._guard():
                if self._is_ours():  # a forked child and a holder that lost its lease leave the file alone
                    os.unlink(self.run_dir / LEASE)
        except LeaseTrouble as error:  # what was trained is whole all the same
            log.warning("%s could not be handed back: %s", self.run_dir, error)
        self._token = None

    def beat(self):
        """Call at every step: raises LeaseError if another writer took over, or might soon, because the lease could not
        be renewed for half its ttl. Renews it too, where the thread is late."""
        self._renew_if_due()
        if self._lost is not None:
            raise self._lost

    def _keep(self):
        while self._lost is None and not self._released.wait(max(0.0, self._due - time.monotonic())):
            self._renew_if_due()

    def _renew_if_due(self):
        """What stands in the way, as the failover of a file server, may be gone soon: it is tried again."""
        if self._lost is not None or time.monotonic() < self._due:
            return
        try:
            self._renew()
        except LeaseTrouble as error:
            silent_s = time.monotonic() - self._last_beat
            self._put_off(error)
            if silent_s > self.ttl_s / 2:
                self._lost = LeaseTrouble(f"no heartbeat for {silent_s:.0f} s, of {self.ttl_s:.0f} s at most: {error}")
        except LeaseError as error:
            self._lost = error
        except OSError as error:  # a full disk may have room by the next time
            self._put_off(error)

    def _put_off(self, error):
        log.warning("no heartbeat in %s: %s", self.run_dir, error)
        self._due = time.monotonic() + self.ttl_s / 32

    def _renew(self):
        with self._guard():
            if not self._is_ours():
                holder = self._holder()
                if holder is None:
                    raise LeaseTrouble(f"{self.run_dir / LEASE} is gone")
                raise LeaseError(
                    f"{self.run_dir} was lost to another writer: it is held by {_describe(holder)}; stop writing there"
                )
            self._write(self._token)

    def left_s(self):
        """How long a lease that is held elsewhere lasts without another heartbeat; 0 where entering decides at once."""
        if not (self.run_dir / LEASE).exists():
            return 0.0
        with contextlib.suppress(LeaseError), self._guard():  # entering will say what is wrong with it
            holder = self._holder()
            if holder is not None and holder["place"] != place():
                return max(0.0, holder["ttl_s"] - self._age_s())
        return 0.0

    def _write(self, token):
        now = time.time()
        record = {
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": place(),
            "process_start": process_start(os.getpid()),
            "since": self._since,
            "heartbeat": now,
            "ttl_s": self.ttl_s,
        }
        temporary = self.run_dir / f".lease.{token}.tmp"
        with open(temporary, "w") as f:
            json.dump(record, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.run_dir / LEASE)
        self._last_beat = time.monotonic()
        self._due = self._last_beat + self.ttl_s / 4

    def _holder(self):
        """The record in lease.json, or None if there is none."""
        path = self.run_dir / LEASE
        try:
            holder = json.loads(paths.read_text(path))
            for key in ("token", "host", "pid", "place", "process_start", "since", "heartbeat", "ttl_s"):
                holder[key]
            return holder
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise LeaseTrouble(
                f"{path} is not readable ({error!r}), so its writer cannot be judged; delete it if none is running"
            ) from error

    def _is_ours(self):
        if self._token is None:
            return False
        holder = self._holder()
        return holder is not None and holder["token"] == self._token and holder["pid"] == os.getpid()

    def _judge(self, holder):
        """Return if the holder is dead, raise LeaseError if it is alive."""
        refused = f"{self.run_dir} is in use by {_describe(holder)}"
        if holder["place"] == place():
            if process_start(holder["pid"]) != holder["process_start"]:
                return
            raise LeaseError(f"{refused}; stop that process first")
        age_s = self._age_s()
        if age_s <= holder["ttl_s"]:
            raise LeaseError(
                f"{refused}; heartbeat {age_s:.0f} s ago. If it is dead, try again in {holder['ttl_s'] - age_s:.0f} s"
            )

    def _age_s(self):
        """Seconds since the last heartbeat, by the clock of the file system: a file touched now against lease.json."""
        probe = self.run_dir / GUARD
        os.utime(probe)
        return probe.stat().st_mtime - (self.run_dir / LEASE).stat().st_mtime

    @contextlib.contextmanager
    def _guard(self):
        with _guarding:
            yield from self._flock()

    def _flock(self):
        fd = os.open(self.run_dir / GUARD, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + GUARD_WAIT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LeaseTrouble(
                            f"{self.run_dir / GUARD} stayed locked for {GUARD_WAIT_S:.0f} s by another process"
                        ) from None
                    time.sleep(0.005)
                except OSError as error:
                    raise LeaseTrouble(
                        f"cannot lock {self.run_dir / GUARD} ({error}); run directories need a file system with flock"
                    ) from error
            yield
        finally:
            os.close(fd)  # drops the lock


def wait_for(run_dirs):
    """Waits for directories held on another host to be handed back, or for as long as the lease of a killed holder
    lasts, and says so once. A holder that lives is not waited for any longer: entering refuses it."""
    leases = [RunLease(run_dir) for run_dir in run_dirs]
    held = {lease: left_s for lease in leases if (left_s := lease.left_s()) > 0}
    if not held:
        return
    longest_s = max(held.values())
    print(
        f"{len(held)} of {len(leases)} runs held on another host, as {next(iter(held)).run_dir}: waiting up to "
        f"{longest_s:.0f} s for them to be handed back, or their holder to be given up",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + longest_s + POLL_S
    while time.monotonic() < deadline and any(lease.left_s() > 0 for lease in held):
        time.sleep(POLL_S)


def _describe(holder):
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"pid {holder['pid']} on host {holder['host']} since {since}"


def place():
    """Where a pid means the same process: host, boot and pid namespace (containers of one host do not share pids)."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:  # macOS: no namespaces, and a start time that includes the date
        return socket.gethostname()


def process_start(pid):
    """When process `pid` started, as text that only this process has; None if it is gone or a zombie."""
    if os.path.isdir("/proc/self"):
        try:
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
        # A zombie among whose threads some are still ending has its files open: it may write once more.
        gone = state in "ZX" and int(fields[16]) <= 1  # num_threads
        return None if gone else fields[18]  # starttime, in clock ticks since boot
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip() or None
