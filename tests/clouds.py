"""Clouds made of files: programs that stand in for `sky` and `gcloud`, first on the PATH, and a trainer for them.

What they are asked is in `calls`, what they have in `queue`, and a test gives orders by files in `orders`. Their
machines are folders; processes on them are real, and are killed when a machine goes.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from experiments import base
from slmjax import config
from slmjax.study import Study, axis

ROOT = Path(__file__).parents[1]

TRAINER = """
import json, os, pathlib, signal, sys, time
from slmjax import launchers, records

cloud = pathlib.Path(os.environ["CLOUD"])
def log(event, run_id):
    with open(cloud / "trained", "a") as file:
        file.write(json.dumps({"event": event, "run": run_id, "worker": os.environ.get("WORKER", "0")}) + "\\n")

stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
assert sys.argv[1] == "pack", sys.argv
pack = launchers.read_pack(pathlib.Path(sys.argv[2]))
for run in pack.unfinished if os.environ.get("WORKER", "0") == "0" else pack.runs:
    log("begins", run.run_id)
    writer = records.RunWriter(pack.folder / run.run_id) if os.environ.get("WORKER", "0") == "0" else None
    def say(state, step):
        if writer:
            writer.status(state, step=step, total_steps=run.config.train.steps, loss=3.0, tokens_per_s=1)
    if writer:
        writer.write("start", step=0, mesh={"data": 1}, tokens_per_step=1)
    say("running", 1)
    while (cloud / "orders" / "hold").exists() and not stopping:
        time.sleep(0.02)
    if stopping:
        say("preempted", 1)
        log("saved", run.run_id)
        sys.exit(3)
    if (cloud / "orders" / "crash").exists():
        (cloud / "orders" / "crash").unlink()
        os._exit(9)
    say("done", run.config.train.steps)
    if writer:
        writer.write("end", status="done", wall_s=3.6)
        writer.done()
    log("ends", run.run_id)
sys.exit(0)
"""

HEAD = """
import fcntl, json, os, pathlib, signal, subprocess, sys, time

cloud = pathlib.Path(os.environ["CLOUD"])
queue, orders, machines = cloud / "queue", cloud / "orders", cloud / "machines"
args = sys.argv[1:]
lock = open(cloud / "lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(cloud / "calls", "a") as file:
    file.write(json.dumps(args) + "\\n")

def value(flag, default=None):
    for i, arg in enumerate(args):
        if arg == flag:
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return default

def ordered(name):
    # An order is taken once for each line of its file; "always" stands.
    path = orders / name
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    if lines[0] != "always":
        rest = lines[1:]
        path.write_text("\\n".join(rest)) if rest else path.unlink()
    return lines[0]

def refuse(message):
    print(message, file=sys.stderr)
    sys.exit(1)

def alive(pid):
    try:
        os.kill(pid, 0)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False

def kill_machine(name):
    for pid in (machines / name).glob("**/pid"):
        group = int(pid.read_text())
        try:
            os.killpg(os.getpgid(group), signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


class Cloud:
    """A folder with one of the programs in it, put first on the PATH."""

    def __init__(self, folder: Path, program: str, source: str, monkeypatch):
        self.folder, self.bin = folder, folder / "bin"
        for name in ("bin", "queue", "orders", "machines"):
            (folder / name).mkdir(parents=True)
        self.install(program, HEAD + source)
        self.install("slmjax", TRAINER)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("CLOUD", str(folder))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        assert shutil.which(program) == str(self.bin / program), f"the {program} found is not the fake one"

    def install(self, name: str, source: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{source}")
        path.chmod(0o755)

    def order(self, name: str, *lines: str) -> None:
        (self.folder / "orders" / name).write_text("\n".join(lines or ("once",)))

    def settle(self, name: str) -> None:
        (self.folder / "orders" / name).unlink(missing_ok=True)

    def calls(self, *words: str) -> list[list[str]]:
        """What was asked, in order, with all of these words in it."""
        path = self.folder / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in lines if all(word in call for word in words)]

    def queue(self) -> dict[str, dict]:
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "queue").glob("*.json"))}

    def trained(self, event: str, worker: str = "0") -> list[str]:
        path = self.folder / "trained"
        said = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["run"] for line in said if line["event"] == event and line["worker"] == worker]

    def end(self) -> None:
        """Kills what still runs on the machines: later, with the folder gone, it would find the real program."""
        mine = f"CLOUD={self.folder}".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pid = int(environ.parent.name)
                if pid != os.getpid() and mine in environ.read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)


def study(num_packs: int = 2, name: str = "tiny_study") -> Study:
    """As many runs of one program: each is a chain, and so a pack, of its own."""
    c = base.get_config("tiny")
    c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:16:1",), "none", 16
    base.resize(c, 32, 1, 16)
    c.train.batch_size, c.train.eval_sequences, c.train.steps = 8, 16, 20
    c.schedule.warmup_steps = 5
    c.log.tensorboard, c.log.log_every, c.log.eval_every = False, 10, 0
    return Study(name, config.resolve(c), axis("optim.lr", [0.01 / 2**i for i in range(num_packs)]))


def wait_until(condition, process=None, limit_s: float = 60.0) -> None:
    """Returns when `condition()` is so; fails when the process ends before, or after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process is None or process.poll() is None, "the launcher has ended"
        assert time.monotonic() < deadline, f"nothing after {limit_s} s"
        time.sleep(0.02)


def later(condition, act) -> None:
    """act() once `condition()` is so, while the test goes on."""
    threading.Thread(target=lambda: (wait_until(condition), act()), daemon=True).start()
