"""Tiny runs as tests train them: in this process or in one that is killed, and what they leave in their folders."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from slmjax import config, program, records, study, train
from slmjax.checkpoint import Checkpointer
from slmjax.progress import Progress
from slmjax.study import Run

BASE = {
    "model.width": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "model.mlp_width": 32,
    "model.parametrization.base_width": 16,
    "data.sources": ("markov:16:3",),
    "data.tokenizer": "none",
    "data.packing": "concat",
    "data.seq_len": 16,
    "optim.lr": 0.02,
    "schedule.decay_fraction": 0.25,
    "train.steps": 24,
    "train.batch_size": 8,
    "train.eval_sequences": 20,  # not a multiple of the batch
    "mesh.data": 1,
    "mesh.steps_per_dispatch": 4,
    "log.log_every": 1,
    "log.tensorboard": False,
}


def make_config(changes: dict | None = None) -> config.RunConfig:
    cfg = config.override(config.RunConfig(), BASE | (changes or {}))
    config.validate(cfg)
    return cfg


def make_run(changes: dict | None = None, **fields) -> Run:
    return Run(make_config(changes), **fields)


def branches(steps, changes: dict | None = None) -> list[Run]:
    """A trunk and its WSD branches of these lengths."""
    return study.Study("s", make_config(changes), study.branch([study.Cell()], steps, decay_fraction=0.25)).runs


_programs: dict[tuple, program.Program] = {}
_build = program.build


def _build_once(cfg, num_members=1, mesh=None) -> program.Program:
    """A Program depends on nothing but these three, so tests share the compiled ones of a process."""
    key = (config.program_id(cfg), num_members, mesh)
    if key not in _programs:
        _programs[key] = _build(cfg, num_members, mesh)
    return _programs[key]


def train_here(folder: Path, *runs: Run, members: int | None = None, progress: Progress | None = None) -> train.Outcome:
    with mock.patch.object(program, "build", _build_once):
        return train.train_pack(list(runs), folder, members, progress or Progress(quiet=True))


def program_of(run: Run, members: int = 1) -> program.Program:
    with mock.patch.object(program, "build", _build_once):
        return train.build_program([run], members)


class StopAt(Progress):
    """Sends this process a signal when a run has reached `step`."""

    def __init__(self, step: int, number: int = signal.SIGUSR1):
        super().__init__(quiet=True)
        self.step, self.number = step, number

    def update(self, members, num_waiting):
        if self.step is not None and any(m.logged_step >= self.step for m in members):
            self.step = None
            os.kill(os.getpid(), self.number)


class CrashAt(StopAt):
    """Raises when a run has logged `step`, as a bug in the loop would: nothing is saved."""

    def update(self, members, num_waiting):
        if any(m.logged_step >= self.step for m in members):
            raise RuntimeError("planned")


def stop_at(folder: Path, run: Run, step: int, progress=StopAt) -> train.Outcome:
    """Trains up to `step` exactly and stops there on a signal. Where dispatches end depends on `step`, on purpose."""
    cut = Run(config.override(run.config, {"log.checkpoint_every": step}), run.tags, run.parent, run.branch_step)
    assert cut.run_id == run.run_id
    return train_here(folder, cut, progress=progress(step))


# ---- what a run left ------------------------------------------------------------------------------------------------


def load(folder: Path, run: Run) -> records.RunRecords:
    return records.load_run(folder / run.run_id)


def hexed(value: float | None) -> str | None:
    return None if value is None else float(np.float32(value)).hex()


def losses(folder: Path, run: Run) -> dict[int, tuple]:
    """Step → (loss, gradient norm, skips) as recorded, to the bit; every step once."""
    lines = load(folder, run).train
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps out of order or repeated: {steps}"
    return {line["step"]: (hexed(line["loss"]), hexed(line["grad_norm"]), line["num_skipped"]) for line in lines}


def evals(folder: Path, run: Run) -> list[tuple]:
    return [(line["step"], line["loss"], line["loss_se"], line["num_tokens"]) for line in load(folder, run).evals]


def final_state(folder: Path, run: Run, members: int = 1) -> dict[str, bytes]:
    """Name → bytes of every array in the run's newest checkpoint, the step included."""
    with Checkpointer(folder / run.run_id / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(program_of(run, members).abstract_member, checkpoints.latest())
    assert step == int(state.step)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same(folder_a: Path, folder_b: Path, run: Run, first: int = 0) -> None:
    """Both folders hold the same run to the bit: losses past step `first`, evaluations, the end and the final state."""
    a, b = ({step: line for step, line in losses(f, run).items() if step > first} for f in (folder_a, folder_b))
    assert a == b and len(a) == run.config.train.steps - first
    assert evals(folder_a, run) == evals(folder_b, run)
    ends = [{k: v for k, v in load(f, run).end.items() if k != "wall_s"} for f in (folder_a, folder_b)]
    assert ends[0] == ends[1] and ends[0]["status"] == "done"
    states = final_state(folder_a, run), final_state(folder_b, run)
    assert states[0] == states[1] and len(states[0]) > 10


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file below `folder` with its digest and modification time."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


# ---- other processes ------------------------------------------------------------------------------------------------


class Paced(Progress):
    """Makes every dispatch last at least `pause_s`."""

    def __init__(self, pause_s: float):
        super().__init__(quiet=True)
        self.pause_s = pause_s

    def update(self, members, num_waiting):
        time.sleep(self.pause_s)


def _child(folder, runs, members, devices, pause_s, settings, port):
    for key, value in settings.items():
        jax.config.update(key, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if port:
        jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)
    outcome = train.train_pack(runs, folder, members, Paced(pause_s))
    sys.stdout.flush()
    os._exit(outcome.exit_code)  # at once: how Python and JAX wind down is not what is tested


# Forked from a server that has imported everything and started nothing: 1 s instead of 4 for a process that trains.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["slmjax.train"])


@contextmanager
def child(folder: Path, *runs: Run, members=None, devices=1, pause_s=0.0, settings=None, port=None):
    """A process that trains `runs`; killed at the end of the block if it still lives. Exits with the outcome's code."""
    args = (folder, list(runs), members, devices, pause_s, settings or {}, port)
    process = _context.Process(target=_child, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition, process, limit_s: float = 60.0) -> None:
    """Returns as soon as condition() holds; fails when the process ended without it."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.is_alive() or condition(), f"the process ended early with {process.exitcode}"
        assert time.monotonic() < deadline, f"nothing after {limit_s} s"
        time.sleep(0.002)


def num_lines(folder: Path, run: Run) -> int:
    """Lines of the newest attempt, half ones left out."""
    files = records.attempt_files(folder / run.run_id)
    return files[-1].read_bytes().count(b"\n") if files else 0


def ended(process, limit_s: float = 30.0) -> int:
    process.join(limit_s)
    assert process.exitcode is not None, f"still running after {limit_s} s"
    return process.exitcode


def signal_to(process, number: int) -> None:
    os.kill(process.pid, number)
