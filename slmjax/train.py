"""Training a pack of runs with one Program: fill the members, dispatch steps, log, evaluate, save, finish, refill.

A run on its own is a pack of one. The loop keeps one dispatch in flight: while the devices work on it, the host reads the
metrics of the one before and prepares the batches of the next. Between dispatches it looks at events (evaluation,
checkpoint, end) and at signals. Everything a member does to its folder goes through `slmjax.member`.
"""

import collections
import contextlib
import dataclasses
import signal
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from slmjax import config, ladder, optim, program, schedules, sharding
from slmjax.lease import LeaseError
from slmjax.member import Member
from slmjax.program import Program
from slmjax.progress import Progress
from slmjax.study import Run

SPLIT_AXES = ("fsdp", "tensor", "expert")  # what a single run may be split over besides its batch


def resolved(cfg: config.RunConfig) -> config.RunConfig:
    """The config a Program is built from: vocabulary size filled in."""
    return config.override(cfg, {"model.vocab_size": ladder.vocab_size(cfg)})


def build_program(runs: list[Run], num_members: int | None = None) -> Program:
    """One Program for all of `runs`, spread over this process's devices.

    With num_members None, as many members as have work at once: on CPU one for each device, a core's worth, as long as
    there are chains of runs that do not wait for each other; else the devices share one member's batch.
    """
    cfg = resolved(runs[0].config)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu" and jax.process_count() == 1
    split = cfg.mesh.data > 1 or any(getattr(cfg.mesh, axis) > 1 for axis in SPLIT_AXES)
    if num_members is None:
        chains = len({run.parent or run.run_id for run in runs})
        num_members = min(len(devices), chains) if on_cpu and not split else 1
    if num_members > 1 and on_cpu:
        mesh = sharding.make_mesh(dataclasses.replace(cfg.mesh, data=1), num_members, devices[:num_members])
    else:
        mesh = sharding.make_mesh(_fitting(cfg, len(devices)), 1, devices if num_members == 1 else devices[:1])
    return program.build(cfg, num_members, mesh)


def _fitting(cfg: config.RunConfig, num_devices: int) -> config.MeshConfig:
    """The run's mesh; with mesh.data=0 on CPU, the most host devices that its micro-batch splits over."""
    mesh, micro = cfg.mesh, cfg.train.batch_size // cfg.optim.micro_batches
    shards = max(1, num_devices // (mesh.fsdp * mesh.tensor * mesh.expert)) * mesh.fsdp
    if mesh.data == 0 and micro % shards:
        raise config.ConfigError(
            f"a micro-batch of {micro} sequences does not split over {shards} devices; use a multiple of {shards} for "
            f"train.batch_size/optim.micro_batches, or fewer devices"
        )
    return mesh


class Outcome(dict):
    """run_id → "done" | "preempted" | "diverged" | "failed"."""

    @property
    def exit_code(self) -> int:
        states = set(self.values())
        return next((code for state, code in (("preempted", 3), ("failed", 1), ("diverged", 4)) if state in states), 0)


def train_pack(
    runs: list[Run], folder: Path, num_members: int | None = None, progress: Progress | None = None
) -> Outcome:
    """Trains runs that share a program to their ends, each in `folder`/<run_id>, resuming what was begun.

    Finished runs are left alone. A run that fails is recorded with its reason and the others go on. SIGINT, SIGTERM and
    SIGUSR1 save every member and return with "preempted"; a second signal ends the process at once.
    """
    assert len({run.program_id for run in runs}) == 1, "a pack shares one program"
    outcome = Outcome({run.run_id: "done" for run in runs if (folder / run.run_id / "DONE").exists()})
    waiting = [run for run in runs if run.run_id not in outcome]
    if not waiting:
        return outcome
    with stop_on_signal() as stop, progress or Progress() as progress:
        pack = _Pack(build_program(waiting, num_members), waiting, folder, outcome, progress)
        try:
            while pack.fill():
                pack.dispatch()
                pack.handle_events()
                if stop.requested(pack.dispatched):
                    pack.preempt()
                    break
        finally:
            pack.abandon()
    return outcome


class _Pack:
    """The members being trained now, and the runs that wait for a place."""

    def __init__(self, program: Program, waiting: list[Run], folder: Path, outcome: Outcome, progress: Progress):
        self.program, self.folder, self.outcome, self.progress = program, folder, outcome, progress
        P = program.num_members
        self.waiting = sorted(waiting, key=lambda run: run.parent is not None)  # trunks first: others wait for them
        self.unfinished = {run.run_id for run in waiting}
        self.members: list[Member | None] = [None] * P
        self.state = None
        self.in_flight: collections.deque = collections.deque()
        self.dispatched = 0
        self.idle_hyper = optim.hyper_at(waiting[0].config, 0.0)

    def fill(self) -> bool:
        """Gives every free place to a run that can start; False when nothing is left to train."""
        for place, member in enumerate(self.members):
            while member is None and (run := self._next_run()) is not None:
                member = self._open(run, place)
        if not any(self.members):
            assert not self.waiting, "every waiting run waits for another"
        return any(self.members)

    def _next_run(self) -> Run | None:
        """The next run whose trunk, if it is still training here, has reached the branch point."""
        training = {m.run.run_id: m for m in self.members if m}
        for run in self.waiting:
            trunk = training.get(run.parent)
            ready = run.parent not in self.unfinished or (trunk and trunk.saved_step >= run.branch_step)
            if ready:
                self.waiting.remove(run)
                return run
        return None

    def _open(self, run: Run, place: int) -> Member | None:
        try:
            member = Member(run, self.folder, self.program)
        except LeaseError as error:
            self._closed(run.run_id, "failed", str(error))
            return None
        try:
            member.open()
            if self.state is None:
                P = self.program.num_members
                self.state = self.program.init(np.zeros(P, np.uint32), np.ones(P, np.float32))
            restored = member.restore()
            if restored is None:
                seeds = np.full(self.program.num_members, run.config.train.seed, np.uint32)
                stds = np.full(seeds.shape, run.config.model.parametrization.init_std, np.float32)
                restored = self.program.take(self.program.init(seeds, stds), 0)
            self.state = self.program.put(self.state, restored, place)
            member.start()
        except Exception as error:
            member.fail(error)
            self._closed(run.run_id, "failed", f"{type(error).__name__}: {error}")
            return None
        self.members[place] = member
        if member.at_end:  # killed between the last checkpoint and DONE
            self.handle_events()
            return self.members[place]
        return member

    def _closed(self, run_id: str, state: str, reason: str | None = None) -> None:
        self.outcome[run_id] = state
        self.unfinished.discard(run_id)
        if reason:
            self.progress.say(f"{run_id} {state}: {reason}")

    def dispatch(self) -> None:
        """Sends the next steps of every member to the devices, then reads the metrics of the dispatch before."""
        K = self.program_steps
        num_steps = min([K, *(m.next_event - m.step for m in self.members if m)])
        spans = [(m, m.step, num_steps) if m else (None, 0, 0) for m in self.members]
        batches = [self._batches(m, first, count, K) for m, first, count in spans]
        tokens, segments = (np.stack(arrays) for arrays in zip(*batches, strict=True))
        hyper = jax.tree.map(lambda *leaves: np.stack(leaves), *(self._hypers(*span, K) for span in spans))
        counts = np.array([count for _, _, count in spans], np.int32)
        self.state, metrics = self.program.train(self.state, tokens, segments, hyper, counts)
        self.dispatched += num_steps
        for member, _, count in spans:
            if member:
                member.step += count
        self.in_flight.append((metrics, spans))
        while len(self.in_flight) > 1:
            self._read_metrics()

    @property
    def program_steps(self) -> int:
        return max(m.run.config.mesh.steps_per_dispatch for m in self.members if m)

    def _batches(self, member: Member | None, first: int, count: int, K: int):
        some = next(m for m in self.members if m)
        if member is None:
            return (np.zeros((K, *some.batch_shape), np.int32),) * 2
        steps = [member.dataset.batch_at(step) for step in range(first, first + count)]
        padding = [steps[0]] * (K - count)
        return tuple(np.stack(arrays) for arrays in zip(*steps, *padding, strict=True))

    def _hypers(self, member: Member | None, first: int, count: int, K: int):
        if member is None:
            each = [self.idle_hyper] * K
        else:
            cfg = member.run.config
            each = [optim.hyper_at(cfg, schedules.multiplier(cfg, step)) for step in range(first, first + count)]
            each += [self.idle_hyper] * (K - count)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def _read_metrics(self) -> None:
        metrics, spans = self.in_flight.popleft()
        metrics = jax.device_get(metrics)
        for place, (member, first, count) in enumerate(spans):
            if member:
                member.log(first, jax.tree.map(lambda leaf: leaf[place, :count], metrics))  # noqa: B023
        self.progress.update([m for m in self.members if m], len(self.waiting))

    def handle_events(self) -> None:
        """Evaluates, saves and ends the members whose step asks for it."""
        due = [m for m in self.members if m and (m.at_end or m.diverging or m.checkpoint_due or m.evaluation_due)]
        if not due:
            return
        while self.in_flight:
            self._read_metrics()
        if any(m.evaluation_due for m in due):
            self._evaluate([m for m in due if m.evaluation_due])
        for place, member in enumerate(self.members):
            if member not in due or member is None:
                continue
            try:
                self._settle(place, member)
            except Exception as error:
                member.fail(error)
                self._closed(member.run.run_id, "failed", f"{type(error).__name__}: {error}")
                self.members[place] = None

    def _settle(self, place: int, member: Member) -> None:
        if member.diverging:
            member.finish("diverged", "too many updates in a row were skipped")
        elif member.checkpoint_due:
            member.save(self.program.take(self.state, place))
        if member.at_end and not member.diverging:
            member.finish("done")
        if member.state != "running":
            self._closed(member.run.run_id, member.state, member.reason)
            self.members[place] = None

    def _evaluate(self, due: list[Member]) -> None:
        """Held-out losses of the members that are due; the others' devices would have had to wait anyway."""
        B = self.program_batch
        chunks = max(-(-len(m.dataset.held_out.tokens_BT1) // B) for m in due)
        seeds = np.array([m.run.config.train.seed if m else 0 for m in self.members], np.uint32)
        rows = collections.defaultdict(list)
        for chunk in range(chunks):
            parts = [self._held_out(m if m in due else None, chunk, B) for m in self.members]
            tokens, segments = (np.stack(arrays) for arrays in zip(*parts, strict=True))
            nll, weight = jax.device_get(self.program.evaluate(self.state, tokens, segments, seeds))
            for place, member in enumerate(self.members):
                if member in due:
                    rows[place].append(np.stack([nll[place], weight[place]]))
        for place, parts in rows.items():
            member = self.members[place]
            num_rows = len(member.dataset.held_out.tokens_BT1)
            member.evaluated(*np.concatenate(parts, axis=1)[:, :num_rows])

    @property
    def program_batch(self) -> int:
        return next(m for m in self.members if m).run.config.train.batch_size

    def _held_out(self, member: Member | None, chunk: int, B: int):
        some = next(m for m in self.members if m)
        out = np.zeros((2, *some.batch_shape), np.int32)
        if member is not None:
            for i, array in enumerate(member.dataset.held_out):
                rows = array[chunk * B : (chunk + 1) * B]
                out[i, : len(rows)] = rows
        return out[0], out[1]

    def preempt(self) -> None:
        """Saves every member at the step it has reached."""
        while self.in_flight:
            self._read_metrics()
        for place, member in enumerate(self.members):
            if member is not None:
                if member.saved_step < member.step:
                    member.save(self.program.take(self.state, place))
                member.finish("preempted")
                self._closed(member.run.run_id, "preempted")
                self.members[place] = None
        for run in self.waiting:
            self.outcome[run.run_id] = "preempted"

    def abandon(self) -> None:
        """Closes what an exception left open, without pretending that it ended."""
        for member in self.members:
            if member is not None:
                member.close()


class stop_on_signal(contextlib.AbstractContextManager):
    """Turns SIGINT, SIGTERM and SIGUSR1 into a question the loop can ask; the second signal does what it always did."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self):
        self.caught = None
        self.before = {}
        # Several processes must stop at one step: there, JAX's coordination service catches SIGTERM and agrees on it.
        if jax.process_count() == 1:
            self.before = {number: signal.signal(number, self._catch) for number in self.SIGNALS}
        return self

    def _catch(self, number, frame):
        self.caught = number
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.caught is not None

    def __exit__(self, *exc):
        for each, handler in self.before.items():
            signal.signal(each, handler)
