"""A study folder as the trainer writes one, with a planted law: trunks, branches, and every way a run can end."""

import json
import math
from pathlib import Path

import numpy as np

LAW = {"E": 1.7, "A": 60.0, "B": 280.0, "alpha": 0.30, "beta": 0.34}
TOKENS_PER_STEP = 8192
VOCABULARY = 2048


def planted_loss(N, D):
    return LAW["E"] + LAW["A"] * N ** -LAW["alpha"] + LAW["B"] * D ** -LAW["beta"]


def shape(width):
    """(non-embedding parameters, FLOPs per token with head) of a made-up dense model."""
    N = 12 * width**2 * max(2, width // 32)
    return N, 6 * N + 6 * VOCABULARY * width


def write_study(
    folder,
    widths=(64, 96, 128, 192, 256),
    ratios=(10, 20, 40, 80),
    noise=0.002,
    seed=0,
    mishaps=True,
    mixture=None,
    leverage=2.0,
    masked=None,
    multiplier=8.0,
):
    """Per width: a trunk (constant schedule) and one branch per tokens-per-parameter ratio, all `done`.

    noise: standard deviation of log loss. mishaps: add a diverged, a preempted-for-good, a running and a never started
    run, one run with a second attempt that overlaps its first, and one that repeats its data. mixture: (widths, ratios)
    of a second family, "moe", of equal active parameters and FLOPs per token; see `write_run` for its leverage. masked:
    the same of a family "mdm", whose loss is a bound and which needs `multiplier` times the compute.
    """
    folder, rng, listing = Path(folder), np.random.default_rng(seed), []
    for width in widths:
        N = shape(width)[0]
        steps = {ratio: math.ceil(ratio * N / TOKENS_PER_STEP) for ratio in ratios}
        trunk_id = f"trunk{width:04d}"
        branch_at = {ratio: round(0.85 * s) for ratio, s in steps.items()}
        listing.append(
            {"run_id": trunk_id, "tags": {"role": "trunk", "width": width}, "parent": None, "branch_step": None}
        )
        write_run(folder / trunk_id, width, 0, max(branch_at.values()), rng, noise, schedule="constant", phase="stable")
        for ratio, total in steps.items():
            run_id = f"w{width:04d}r{ratio:03d}"
            listing.append(
                {
                    "run_id": run_id,
                    "tags": {"width": width, "tokens_per_param": ratio},
                    "parent": trunk_id,
                    "branch_step": branch_at[ratio],
                }
            )
            write_run(folder / run_id, width, branch_at[ratio], total, rng, noise, trunk_id)
    if mishaps:
        listing += write_mishaps(folder, rng, noise)
    further = [("moe", "m", mixture, leverage), ("mdm", "d", masked, 1 / multiplier)]
    for family, letter, grid, worth in further:
        for width, ratio in ((width, ratio) for width in grid[0] for ratio in grid[1]) if grid else ():
            run_id, total = f"{letter}{width:04d}r{ratio:03d}", math.ceil(ratio * shape(width)[0] / TOKENS_PER_STEP)
            tags = {"family": family, "width": width, "tokens_per_param": ratio}
            listing.append({"run_id": run_id, "tags": tags, "parent": None, "branch_step": None})
            write_run(folder / run_id, width, 0, total, rng, noise, family=family, leverage=worth)
    (folder / "study.json").write_text(json.dumps({"name": "planted-ladder", "runs": listing}))
    return folder


def write_mishaps(folder, rng, noise):
    for run_id, status in (("diverged", "diverged"), ("preempted", "preempted"), ("running", None)):
        write_run(folder / run_id, 96, 0, 400, rng, noise, status=status)
    (folder / "waiting").mkdir()
    write_run(folder / "repeated", 96, 0, 600, rng, noise, epochs=2.5)
    write_run(folder / "resumed", 128, 0, 900, rng, noise, status=None, stop=500)
    write_run(folder / "resumed", 128, 400, 900, rng, noise, attempt=1)
    return [
        {"run_id": run_id, "tags": {"seed": 1}, "parent": None, "branch_step": None}
        for run_id in ("diverged", "preempted", "running", "waiting", "repeated", "resumed")
    ]


def write_run(
    run_dir,
    width,
    first,
    total,
    rng,
    noise,
    parent=None,
    status="done",
    schedule="wsd",
    phase="decay",
    attempt=0,
    stop=None,
    epochs=0.4,
    family="dense",
    leverage=1.0,
):
    """One attempt: `first` is its first step, `status` None leaves it without an end, `stop` ends it early.

    leverage: a token is worth this many, so that at any cost per token the dense family needs as many times the compute
    at its own optimum: min over N of L(N, b C/c(N)) is the dense minimum at b C.
    """
    N, flops_per_token = shape(width)
    stop = stop or (total if status == "done" else total // 2)
    decay_from = first if parent else round(0.85 * total)

    def curve(step):
        """Stable phase lies above the annealed loss and comes down during the decay."""
        D = max(step, 1) * TOKENS_PER_STEP * leverage
        left = (
            1.0
            if phase == "stable" or step <= decay_from
            else 1 - math.sqrt((step - decay_from) / (total - decay_from))
        )
        return planted_loss(N, D) * (1 + 0.06 * left) + max(0.0, 3.0 - 0.1 * step)

    def line(kind, **fields):
        return json.dumps({"kind": kind, **fields})

    counts = dict(
        embedding=VOCABULARY * width,
        head=0,
        dense=N,
        experts=(3 * N if family == "moe" else 0),
        active=N + VOCABULARY * width,
        total=(4 if family == "moe" else 1) * N + VOCABULARY * width,
        non_embedding=(4 if family == "moe" else 1) * N,
        active_non_embedding=N,
    )
    lines = [
        line(
            "start",
            time=1.8e9 + first,
            run_id=run_dir.name,
            attempt=attempt,
            step=first,
            parent=parent,
            branch_step=first if parent else None,
            total_steps=total,
            tokens_per_step=TOKENS_PER_STEP,
            counts=counts,
            flops_per_token={"with_head": flops_per_token, "without_head": 6 * N},
            loss_kind="bound" if family == "mdm" else "exact",
            tokenizer="b7c1f0aa93d2",
            corpus="5e0d1c77ab10",
            bytes_per_token=3.6,
            family=family,
        )
    ]
    every = max(1, (stop - first) // 60)
    for step in range(first + every, stop + 1, every):
        now = phase if phase == "stable" or step > decay_from else "stable"
        common = dict(step=step, tokens=step * TOKENS_PER_STEP, phase=now)
        lines.append(
            line(
                "train",
                **common,
                loss=curve(step) * math.exp(rng.normal(0, 0.01)),
                grad_norm=0.4,
                lr=0.01,
                num_skipped=0,
                wall_s=0.05 * (step - first),
                tokens_per_s=TOKENS_PER_STEP / 0.05,
            )
        )
        if (step // every) % 4 == 0:
            lines.append(line("eval", **common, loss=curve(step), loss_se=0.004, bits_per_byte=None, num_tokens=65536))
    if status:
        loss = curve(total) * math.exp(rng.normal(0, noise)) if status == "done" else None
        lines.append(
            line(
                "end",
                status=status,
                step=stop,
                tokens=stop * TOKENS_PER_STEP,
                loss=loss,
                loss_se=0.004 if loss else None,
                bits_per_byte=loss / math.log(2) / 3.6 if loss else None,
                wall_s=0.05 * (stop - first),
                num_skipped=0,
                epochs=epochs,
                phase=phase,
                reason="loss is nan at step 200" if status == "diverged" else None,
            )
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / f"attempt-{attempt:03d}.jsonl").write_text("\n".join(lines) + "\n")
    (run_dir / "config.json").write_text(
        json.dumps(
            {
                "model": {"width": width, "num_layers": max(2, width // 32)},
                "schedule": {"name": schedule},
                "train": {"steps": total, "seed": 0},
                "optim": {"learning_rate": 0.01},
            }
        )
    )
    (run_dir / "provenance.json").write_text(
        json.dumps({"git": "3f2a9c1", "python": "3.11.2", "jax": "0.10.2", "host": "laptop", "device": "cpu"})
    )
