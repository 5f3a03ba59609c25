"""A whole sweep, end to end: 8 runs x 200 steps of a small model, start-up and compilation included, in wall seconds.

    python benchmarks/sweep.py [--torch-python=/path/to/python] [--repeats=1] [--ways=slmjax,plain,torch] [--json]

slmjax runs `benchmarks/sweep_study.py` through `slmjax study run` as a user does: records, TensorBoard, evaluation on
held-out text, checkpoints. The others start one process for each run and do less: they train, print losses and write
the final parameters. Text is tokenized beforehand for all. Cold: no compiled program on disk; warm: those of a sweep
before. Every way is run once a repeat, in turn; the table has medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from slmjax import bench, data, environment
from slmjax.bench import plain_jax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import sweep_study  # noqa: E402


class Sweep:
    """What all ways share: a folder, the text as rows of tokens, and an environment without slmjax's settings."""

    def __init__(self, folder: Path, torch_python: str | None):
        self.folder, self.torch_python = folder, torch_python
        self.runs = sweep_study.get_study().runs
        cfg = self.runs[0].config
        dataset = data.open_dataset(cfg)
        np.save(folder / "tokens.npy", np.concatenate([dataset.batch_at(i)[0] for i in range(cfg.train.steps)]))
        self.shape = bench.plain_shape(cfg)._replace(vocab_size=dataset.vocab_size)
        self.plain = bench.plain_environment()
        self.pages = self.plain | environment.huge_pages(self.plain)

    def slmjax(self, cache: Path, jobs: int = 1) -> None:
        out = Path(tempfile.mkdtemp(dir=self.folder))
        env = {**self.plain, "PYTHONPATH": str(HERE.parent), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        study = ["study", "run", f"--study={HERE / 'sweep_study.py'}", f"--out={out}", f"--jobs={jobs}"]
        _run([sys.executable, "-m", "slmjax", *study], env)
        finished = len(list(out.glob("sweep/*/DONE")))
        assert finished == len(self.runs), f"{finished} of {len(self.runs)} runs ended well; see {out}"

    def each_run(self, command: list, env: dict, **options) -> None:
        """One process after another, a run each."""
        for i, run in enumerate(self.runs):
            spec = {
                "shape": self.shape._asdict(),
                "steps": run.config.train.steps,
                "lr": run.config.optim.lr,
                "seed": i,
            }
            spec |= {"tokens": str(self.folder / "tokens.npy"), "out": str(self.folder / "final.npz"), **options}
            _run([*command, "train", json.dumps(spec)], env)

    def plain_jax(self, cache: Path | None = None) -> None:
        keep_all = {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        env = self.plain | ({"JAX_COMPILATION_CACHE_DIR": str(cache), **keep_all} if cache else {})
        self.each_run([sys.executable, plain_jax.__file__], env)

    def torch(self, compile: bool = False, pages: bool = False) -> None:
        env = self.pages if pages else self.plain
        self.each_run([self.torch_python, str(HERE / "torch_peer.py")], env, compile=compile)


def _run(command: list, env: dict) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def ways(sweep: Sweep, chosen: list[str]) -> dict:
    """Name → what to time. A warm way follows its cold one and finds what that has compiled."""
    ours, plain = sweep.folder / "cache_slmjax", sweep.folder / "cache_plain"

    def cold():
        shutil.rmtree(ours, ignore_errors=True)
        sweep.slmjax(ours)

    found = {}
    if "slmjax" in chosen:
        found |= {"slmjax study run, cold": cold, "slmjax study run, warm": lambda: sweep.slmjax(ours)}
    if "plain" in chosen:
        found["plain JAX, no compile cache"] = sweep.plain_jax
        found["plain JAX, warm compile cache"] = lambda: sweep.plain_jax(plain)
    if "torch" in chosen and sweep.torch_python:
        found["PyTorch eager"] = sweep.torch
        found["PyTorch eager, huge pages"] = lambda: sweep.torch(pages=True)
    if "compile" in chosen and sweep.torch_python:
        found["PyTorch compile"] = lambda: sweep.torch(compile=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python that has torch; without it, only JAX is measured")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", default="slmjax,plain,torch,compile")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder), flags.torch_python)
        timed = ways(sweep, flags.ways.split(","))
        if "plain" in flags.ways:
            sweep.plain_jax(sweep.folder / "cache_plain")  # fills the cache
        walls = {name: [] for name in timed}
        for _ in range(flags.repeats):
            for name, way in timed.items():
                began = time.perf_counter()
                way()
                walls[name].append(time.perf_counter() - began)
                print(f"{name}: {walls[name][-1]:.1f} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in walls.items()}
    if flags.json:
        print(json.dumps(walls, indent=1))
        return
    first = next(iter(medians.values()))
    print(f"| {len(sweep.runs)} runs x {sweep_study.STEPS} steps | wall s | x the first row |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.1f} | {seconds / first:.2f} |")


if __name__ == "__main__":
    main()
