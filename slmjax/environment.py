"""Process settings that must be in place before JAX starts: compile cache, host devices, huge pages.

Everything here is an environment variable, so `variables` serves this process (`prepare`) and the processes a launcher
starts. What the user has set is never overridden, and SLMJAX_TUNE=0 leaves all but the number of devices alone. JAX is
not imported here.
"""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from slmjax.data import cache

TUNE = "SLMJAX_TUNE"  # 0: no compile cache and no huge pages from here
STARTED_AGAIN = "SLMJAX_STARTED_AGAIN"  # the process that huge pages were set for

# XLA's CPU client takes buffers from malloc and gives them back at every step. By default glibc returns large ones to
# the kernel, which then clears their pages anew, 4 kB at a time; with these they stay, in pages of 2 MB. Measured in
# benchmarks/README.md. The C library reads them once, when a process starts. No XLA flags beside them: oneDNN's matrix
# products are a little faster with jaxlib 0.10, many times slower with 0.12, and not kept by the compile cache.
MALLOC = {
    "glibc.malloc.hugetlb": 1,  # ask for transparent huge pages
    "glibc.malloc.mmap_threshold": 32 << 30,  # larger buffers than these are mapped one by one
    "glibc.malloc.trim_threshold": 32 << 30,  # more free memory than this at the top goes back to the kernel
    "glibc.malloc.top_pad": 256 << 20,  # taken from the kernel at a time
}


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS has no affinity


def gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The NVIDIA GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; [] where JAX is to train on CPU."""
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu" or not _on_accelerator(environ):
        return []
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in nodes if match), key=int)


def pin(chosen: list[int]) -> None:
    """Keeps this process, and the threads it will start, on these cores; nothing where the system cannot."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def variables(num_devices: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to add to `environ` for a process that trains on `num_devices` host devices."""
    added = {}
    if "xla_force_host_platform_device_count" not in environ.get("XLA_FLAGS", ""):
        added["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    if environ.get(TUNE) != "0":
        # Every program is kept, however quick to compile: a sweep of tiny models is mostly compilation.
        added["JAX_COMPILATION_CACHE_DIR"] = str(cache.folder() / "jax")
        added["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        added["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    added = {name: value for name, value in added.items() if name not in environ}
    return added | huge_pages(environ)


def huge_pages(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """GLIBC_TUNABLES for a process that trains on CPU: the user's and those of `MALLOC`; {} when nothing is missing."""
    given = environ.get("GLIBC_TUNABLES", "")
    missing = [f"{name}={value}" for name, value in MALLOC.items() if f"{name}=" not in given]
    if environ.get(TUNE) == "0" or not missing or not _has_glibc() or _on_accelerator(environ):
        return {}
    return {"GLIBC_TUNABLES": ":".join([given, *missing] if given else missing)}


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _on_accelerator(environ: Mapping[str, str]) -> bool:
    """Whether JAX will train on a GPU or TPU: it is told to, or could be, for a plugin is installed."""
    if chosen := environ.get("JAX_PLATFORMS"):
        return chosen.split(",")[0] != "cpu"
    plugins = importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_plugins")
    return bool(plugins or metadata.entry_points(group="jax_plugins"))


def prepare(num_devices: int | None = None) -> None:
    """Sets this process up to train; `num_devices` None: one host device for each core it may use.

    A `slmjax` command that huge pages would help, and that was started without, starts itself again with them: the same
    process (pid, standard streams, open files for children, cores), from the top. So call this before anything happens.
    """
    assert "jax" not in sys.modules, "too late: JAX reads its environment when it is imported"
    if _is_command() and os.environ.get(STARTED_AGAIN) != str(os.getpid()) and (added := huge_pages()):
        if sys.stderr.isatty():
            print(f"slmjax: starting again with huge pages, {TUNE}=0 does not", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        again = {**os.environ, **added, STARTED_AGAIN: str(os.getpid())}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], again)
    os.environ.update(variables(num_devices or len(cores())))


def _is_command() -> bool:
    """Whether this process is `slmjax ...` or `python -m slmjax ...`; pytest and notebooks are not ours to restart."""
    script = Path(sys.argv[0])
    return script.name == "slmjax" or script == Path(__file__).with_name("__main__.py")
