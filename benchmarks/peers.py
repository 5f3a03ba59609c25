"""Training speed of one model written several ways, measured in turn in one run.

    python benchmarks/peers.py --torch-python=/path/to/python [--shapes=a,s] [--seconds=120] [--json]

slmjax, plain JAX (slmjax/bench/plain_jax.py) and PyTorch (torch_peer.py, eager and torch.compile): float32, AdamW, a
gradient clip, the same shapes and batches; each in a process of its own, with huge pages and without. PyTorch has its
own Python, because the two need not agree on one. Ratios are medians over neighbouring slices of time.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from slmjax import bench, environment
from slmjax.bench import Worker, plain_jax

HERE = Path(__file__).parent
BASELINE = "plain JAX"


def workers(shape: plain_jax.Shape, chunk: int, torch_python: str | None, stack: contextlib.ExitStack) -> dict:
    """Name → Worker, every one started and warm."""
    plain = bench.plain_environment()
    pages = plain | environment.huge_pages(plain)
    ours = {**pages, "PYTHONPATH": str(HERE.parent)}
    jax_script, our_script, torch_script = plain_jax.__file__, HERE / "slmjax_peer.py", HERE / "torch_peer.py"
    python = sys.executable
    cores = len(environment.cores())
    wanted = {
        BASELINE: ([python, jax_script], plain, {}),
        "plain JAX, huge pages": ([python, jax_script], pages, {}),
        "slmjax": ([python, our_script], ours, {"loss_chunk": chunk, "devices": 1}),
        "slmjax, no huge pages": (
            [python, our_script],
            {**ours, "SLMJAX_TUNE": "0", "GLIBC_TUNABLES": ""},
            {"loss_chunk": chunk, "devices": 1},
        ),
    }
    if cores > 1:
        members = {"loss_chunk": chunk, "devices": cores}
        wanted[f"slmjax, {cores} members on a core each"] = ([python, our_script], ours, members)
    if torch_python:
        for name, compiled in (("PyTorch eager", False), ("PyTorch compile", True)):
            wanted[name] = ([torch_python, torch_script], plain, {"compile": compiled})
            wanted[f"{name}, huge pages"] = ([torch_python, torch_script], pages, {"compile": compiled})
    return {
        name: stack.enter_context(Worker(command, shape, env, **options))
        for name, (command, env, options) in wanted.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python that has torch; without it, only JAX is measured")
    parser.add_argument("--shapes", default="a,s")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training for each shape, all peers together")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    found = []
    for name in flags.shapes.split(","):
        cfg = bench.builtin(name)
        shape = bench.plain_shape(cfg)
        with contextlib.ExitStack() as stack:
            peers = workers(shape, cfg.objective.loss_chunk, flags.torch_python, stack)
            speeds = bench.interleaved({what: peer.rate for what, peer in peers.items()}, flags.seconds)
        rows = [
            {
                "shape": name,
                "what": what,
                "tokens_per_s": statistics.median(speeds[what]),
                "ratio": bench.median_ratio(speeds[what], speeds[BASELINE]),
                "low": min(a / b for a, b in zip(speeds[what], speeds[BASELINE], strict=True)),
                "high": max(a / b for a, b in zip(speeds[what], speeds[BASELINE], strict=True)),
                "first_step_s": peers[what].first_step_s,
            }
            for what in peers
        ]
        found += rows
        if not flags.json:
            print(f"| shape {name} | tok/s | x plain JAX | lowest - highest | first step s |\n|---|---|---|---|---|")
            for row in rows:
                print(
                    f"| {row['what']} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} "
                    f"| {row['low']:.2f} - {row['high']:.2f} | {row['first_step_s']:.1f} |"
                )
            print(flush=True)
    if flags.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
