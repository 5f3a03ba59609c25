"""Huge pages: a command that trains on CPU starts itself again with them, once, and nothing else about it changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmjax import environment

LINUX = sys.platform == "linux" and environment._has_glibc()
pytestmark = pytest.mark.skipif(not LINUX, reason="only glibc takes GLIBC_TUNABLES")

# The command line's place taken by a few lines: what `prepare` does to a process does not depend on what it trains.
SCRIPT = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
from slmjax import environment
print("pid", os.getpid(), flush=True)
environment.prepare(1)
print("prepared", os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], os.environ["JAX_NUM_CPU_DEVICES"], flush=True)
{body}
"""


@pytest.fixture
def command(tmp_path):
    """command(body) → path of a console script named slmjax, as pip writes it."""

    def write(body: str = "", name: str = "slmjax") -> Path:
        path = tmp_path / name
        root = str(Path(environment.__file__).parents[1])
        path.write_text(SCRIPT.format(python=sys.executable, root=root, body=body))
        path.chmod(0o755)
        return path

    return write


def clean(**more) -> dict[str, str]:
    names = ("GLIBC_TUNABLES", environment.TUNE, environment.STARTED_AGAIN, "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {key: value for key, value in os.environ.items() if key not in names} | {"JAX_PLATFORMS": "cpu", **more}


def run(path, *args, **kwargs):
    kwargs = {"env": clean(), "timeout": 60, **kwargs}
    return subprocess.run([path, *args], capture_output=True, text=True, **kwargs)


def test_a_command_starts_itself_again_once_in_the_same_process(command):
    done = run(command("sys.stdout.write(sys.stdin.read()); sys.exit(4)"), "a b", "--c", input="from stdin\n")
    first, second, prepared, read = done.stdout.splitlines()
    assert first == second and first.startswith("pid ")
    tunables = ":".join(f"{name}={value}" for name, value in environment.MALLOC.items())
    assert prepared == f"prepared {tunables} a b --c 1" and read == "from stdin"
    assert done.returncode == 4 and done.stderr == ""


def test_the_allocator_takes_the_settings(command):
    """A buffer of 64 MB comes from the heap, in huge pages where the system gives them to who asks."""
    body = "import ctypes; b = bytearray(64 << 20); print(open('/proc/self/smaps').read())"
    for env, from_heap in ((clean(), True), (clean(SLMJAX_TUNE="0"), False)):
        maps = run(command(body), env=env).stdout.split("prepared", 1)[1]
        heap = next((m for m in maps.split("VmFlags:") if "[heap]" in m), "")
        size_kb = int(heap.split("Size:")[1].split()[0]) if heap else 0
        assert (size_kb > 64 << 10) == from_heap


def test_the_users_tunables_stay(command):
    mine = "glibc.malloc.hugetlb=0:glibc.malloc.check=0"
    told = run(command(), env=clean(GLIBC_TUNABLES=mine)).stdout.splitlines()[-1].split()[1]
    assert told.startswith(mine + ":") and told.count("hugetlb") == 1 and "trim_threshold" in told


@pytest.mark.parametrize("env", [{"SLMJAX_TUNE": "0"}, {"JAX_PLATFORMS": "cuda,cpu"}, {"JAX_PLATFORMS": "tpu"}])
def test_no_new_start_when_turned_off_or_on_an_accelerator(command, env):
    assert run(command(), env=clean(**env)).stdout.count("pid") == 1
    assert "GLIBC_TUNABLES" not in environment.variables(1, env)


def test_an_installed_plugin_counts_as_an_accelerator(monkeypatch):
    assert environment.huge_pages({"JAX_PLATFORMS": "cpu"})
    found = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name == "libtpu" or found(name))
    assert environment.huge_pages({}) == {}
    assert environment.huge_pages({"JAX_PLATFORMS": "cpu"})


def test_processes_that_are_not_slmjaxs_are_left_alone(command):
    assert run(command(name="notebook")).stdout.count("pid") == 1


def test_a_launcher_hands_the_settings_to_its_processes(command):
    env = clean() | environment.variables(2, clean())
    assert env["GLIBC_TUNABLES"] and run(command(), env=env).stdout.count("pid") == 1


def test_it_goes_on_where_the_settings_are_lost_on_the_way():
    """As behind a wrapper that cleans the environment: one new start and no more."""
    code = (
        "import os, sys; from slmjax import environment as e; sys.argv[0] = 'slmjax'\n"
        "os.environ[e.STARTED_AGAIN] = str(os.getpid()); os.environ.pop('GLIBC_TUNABLES', None)\n"
        "e.prepare(1); print('went on')"
    )
    assert run(sys.executable, "-c", code).stdout == "went on\n"


def test_signals_reach_the_process_after_its_new_start(command):
    body = "import time, signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('up', flush=True)\n"
    body += "time.sleep(60)"
    process = subprocess.Popen([command(body)], stdout=subprocess.PIPE, text=True, env=clean())
    pid = process.pid
    lines = [process.stdout.readline().split() for _ in range(4)]
    assert lines[0] == lines[1] == ["pid", str(pid)] and lines[3] == ["up"]
    time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(30) == 3


def test_the_real_command_starts_again_where_it_trains_and_only_there(tmp_path):
    """Every start of Python imports sitecustomize, which says so. A broken pack file ends `slmjax pack` early."""
    (tmp_path / "sitecustomize.py").write_text("import sys; print('start', file=sys.stderr)")
    (tmp_path / "broken.json").write_text("{")
    root = Path(environment.__file__).parents[1]
    env = clean(PYTHONPATH=f"{tmp_path}:{root}")
    for args, starts in ((["pack", str(tmp_path / "broken.json")], 2), (["fit"], 1)):
        done = run(sys.executable, "-m", "slmjax", *args, env=env)
        assert done.returncode != 0 and done.stderr.count("start\n") == starts, done.stderr
