"""Training a pack of runs with one Program: fill the members, dispatch steps, log, evaluate, save, finish, refill.

A run on its own is a pack of one. The loop keeps one dispatch in flight: while the devices work on it, the host reads
the metrics of the one before and prepares the batches of the next. Between dispatches it looks at events (evaluation,
checkpoint, end) and at signals. Everything a member does to its folder goes through `slmjax.member`.

Several processes run this loop in step with each other, on one member's batch. Between dispatches what they do is done
together, and fails in all of them where it fails in one. With a dispatch each casts a vote (`processes.Ballot`).
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
from pathlib import Path

import jax
import numpy as np

from slmjax import config, ladder, optim, processes, program, records, schedules, sharding
from slmjax.lease import LeaseError
from slmjax.member import Member
from slmjax.processes import Ballot, DisagreementError, ElsewhereError, Vote
from slmjax.program import Metrics, Program
from slmjax.progress import Progress
from slmjax.provenance import code_version
from slmjax.signals import stop_on_signal
from slmjax.study import Run

SPLIT_AXES = ("fsdp", "tensor", "expert")  # what a single run may be split over besides its batch


def build_program(runs: list[Run], num_members: int | None = None) -> Program:
    """One Program for all of `runs`, spread over this process's devices.

    With num_members None, as many members as have work at once: on CPU one for each device, a core's worth, as long as
    there are chains of runs that do not wait for each other; else the devices share one member's batch.
    """
    cfg = ladder.resolved(runs[0].config)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu" and processes.alone()
    if not processes.alone() and num_members not in (None, 1):
        raise config.ConfigError(f"num_members={num_members}: several processes train one run at a time")
    split = cfg.mesh.data > 1 or any(getattr(cfg.mesh, axis) > 1 for axis in SPLIT_AXES)
    if num_members is None:
        here = {run.run_id for run in runs}  # what a dense run of another pack is upcycled to waits for nothing here
        chains = len({run.parent if run.parent in here else run.run_id for run in runs})
        num_members = min(len(devices), chains) if on_cpu and not split else 1
    if num_members > 1 and on_cpu:
        mesh = sharding.make_mesh(dataclasses.replace(cfg.mesh, data=1), num_members, devices[:num_members])
    elif num_members > 1:
        mesh = sharding.make_mesh(cfg.mesh, 1, devices[:1])
    else:
        mesh = sharding.make_mesh(cfg.mesh, 1, _host_devices(cfg, devices) if on_cpu else devices)
        _check_batch(cfg, mesh)
    return program.build(cfg, num_members, mesh)


def _host_devices(cfg: config.RunConfig, devices: list) -> list:
    """The host devices of one run: what its mesh asks for; with mesh.data=0, the most its micro-batch splits over."""
    mesh, micro = cfg.mesh, cfg.train.batch_size // cfg.optim.micro_batches
    fixed, rows = mesh.fsdp * mesh.tensor * mesh.expert, mesh.fsdp * mesh.expert
    fitting = (data for data in range(len(devices) // fixed, 0, -1) if micro % (data * rows) == 0)
    return devices[: (mesh.data or next(fitting, 1)) * fixed]


def _check_batch(cfg: config.RunConfig, mesh) -> None:
    micro = cfg.train.batch_size // cfg.optim.micro_batches
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    if micro % shards:
        raise config.ConfigError(
            f"a micro-batch of {micro} sequences does not split over {shards} devices; use a multiple of {shards} for "
            f"train.batch_size/optim.micro_batches, or fewer devices"
        )


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
    SIGUSR1, to any of the processes, save every member and return with "preempted"; a second signal ends the process at
    once.

    Raises:
      DisagreementError: the processes were started with other runs, code or data.
    """
    if not processes.alone():
        _require_same(runs)
    assert len({run.program_id for run in runs}) == 1, "a pack shares one program"
    done = processes.of_first(lambda: [run.run_id for run in runs if (folder / run.run_id / "DONE").exists()])
    outcome = Outcome(dict.fromkeys(done, "done"))
    waiting = [run for run in runs if run.run_id not in outcome]
    if not waiting:
        return outcome
    with stop_on_signal() as stop, progress or Progress(quiet=not processes.first()) as progress:
        # Of all runs, finished or not: a relaunch must get the members it had, or its last bits are others.
        pack = _Pack(build_program(runs, num_members), waiting, folder, outcome, progress, stop)
        try:
            while pack.fill():
                if pack.stopping:
                    pack.preempt()
                    break
                if not pack.due:  # as a run is that was killed between its last checkpoint and DONE
                    pack.dispatch()
                pack.handle_events()
        finally:
            pack.abandon()
    return outcome


def _require_same(runs: list[Run]) -> None:
    """Refuses processes that were started with other runs, or with another version of the code."""
    facts = [{**config.flatten(run.config), "save_steps": run.save_steps, "parent": run.parent} for run in runs]
    marks = processes.gather([hashlib.sha256(repr(fact).encode()).hexdigest() for fact in facts])
    for place, of_place in enumerate(itertools.zip_longest(*marks)):
        if len(set(of_place)) > 1:
            processes.require_same(facts[place] if place < len(facts) else {})
    processes.require_same(code_version())


class _Pack:
    """The members being trained now, and the runs that wait for a place."""

    def __init__(
        self,
        program: Program,
        waiting: list[Run],
        folder: Path,
        outcome: Outcome,
        progress: Progress,
        stop: stop_on_signal,
    ):
        self.stop, self.ballot, self.trouble, self.voted_to_stop = stop, Ballot(), None, False
        self.program, self.folder, self.outcome, self.progress = program, folder, outcome, progress
        P = program.num_members
        self.unfinished = {run.run_id for run in waiting}
        self.waiting = sorted(waiting, key=lambda run: run.parent in self.unfinished)  # trunks first: others wait
        self.members: list[Member | None] = [None] * P
        self.state = None
        self.in_flight: collections.deque = collections.deque()
        cfg = waiting[0].config  # what fixes shapes is the same for all
        self.batch_size, self.row_tokens = cfg.train.batch_size, cfg.data.seq_len + 1
        self.steps_per_dispatch = cfg.mesh.steps_per_dispatch
        self.idle_hyper = optim.hyper_at(cfg, 0.0)

    @property
    def stopping(self) -> bool:
        return self.stop.requested if processes.alone() else self.voted_to_stop

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
        for run in [run for run in self.waiting if self.outcome.get(run.parent) in ("failed", "diverged")]:
            self.waiting.remove(run)  # it would cost a whole run, and end as its trunk did
            self._failed_unopened(run, f"its trunk {run.parent} {self.outcome[run.parent]}")
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
        except LeaseError as error:  # nothing is written to a folder that is another's
            self._closed(run.run_id, "failed", f"{type(error).__name__}: {error}")
            return None
        except (OSError, ElsewhereError) as error:
            self._failed_unopened(run, f"{type(error).__name__}: {error}")
            return None
        self.members[place] = member
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
            self._fail(place, error)
            if isinstance(error, DisagreementError):
                raise
        return self.members[place]

    def _failed_unopened(self, run: Run, reason: str) -> None:
        if processes.first():
            with contextlib.suppress(OSError):  # what failed may be the disk
                records.write_failure(self.folder / run.run_id, run.config.train.steps, reason)
        self._closed(run.run_id, "failed", reason)

    def _fail(self, place: int, error: Exception) -> None:
        """Ends a member for an error of its own, the same in every process; the others go on."""
        if not processes.alone() and isinstance(error, jax.errors.JaxRuntimeError):
            raise error  # another process is gone, and with it all that is done together
        member, self.members[place] = self.members[place], None
        member.fail(error)
        self._closed(member.run.run_id, "failed", member.reason)

    def _fail_alone(self, place: int, error: Exception) -> None:
        """Ends a member for an error that other processes have not met; they must hear of it first."""
        if processes.alone():
            self._fail(place, error)
        else:
            self.trouble = self.trouble or error

    def _hear(self) -> None:
        """Ends the one member of several processes when any of them had trouble. All of them call this at once."""
        trouble, self.trouble = self.trouble, None
        error = processes.shared_error(trouble)
        if error is not None and self.members[0] is not None:
            self._fail(0, error)

    def _closed(self, run_id: str, state: str, reason: str | None = None) -> None:
        self.outcome[run_id] = state
        self.unfinished.discard(run_id)
        if reason and processes.first():
            self.progress.say(f"{run_id} {state}: {reason}")

    def dispatch(self) -> None:
        """Sends the next steps of every member to the devices, then reads the metrics of the dispatch before."""
        K = self.steps_per_dispatch
        num_steps = min([K, *(m.next_event - m.step for m in self.members if m)])
        batches = [self._batches(place, num_steps) for place in range(len(self.members))]
        spans = [(m, m.step, num_steps) if m else (None, 0, 0) for m in self.members]
        tokens, segments = (np.stack(arrays) for arrays in zip(*batches, strict=True))
        hyper = jax.tree.map(lambda *leaves: np.stack(leaves), *(self._hypers(*span, K) for span in spans))
        counts = np.array([count for _, _, count in spans], np.int32)
        self.state, metrics = self.program.train(self.state, tokens, segments, hyper, counts)
        for member, _, count in spans:
            if member:
                member.step += count
        overdue = processes.first() and any(m.overdue for m in self.members if m)
        vote = Vote(stop=self.stop.requested, save=overdue, failed=self.trouble is not None)
        self.in_flight.append((metrics, self.ballot.cast(vote), spans))
        while len(self.in_flight) > 1:
            self._read_metrics()

    def _batches(self, place: int, count: int):
        """(tokens_KBT1, segments_KBT1) of a member's next steps; a member whose data fail leaves its place."""
        member, K = self.members[place], self.steps_per_dispatch
        if member is not None:
            try:
                steps = [member.dataset.batch_at(step) for step in range(member.step, member.step + count)]
                padding = [steps[0]] * (K - count)
                return tuple(np.stack(arrays) for arrays in zip(*steps, *padding, strict=True))
            except Exception as error:
                self._fail_alone(place, error)
        return (np.zeros((K, self.batch_size, self.row_tokens), np.int32),) * 2

    def _hypers(self, member: Member | None, first: int, count: int, K: int):
        if member is None:
            each = [self.idle_hyper] * K
        else:
            cfg = member.run.config
            each = [optim.hyper_at(cfg, schedules.multiplier(cfg, step)) for step in range(first, first + count)]
            each += [self.idle_hyper] * (K - count)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def _read_metrics(self) -> None:
        metrics, cast, spans = self.in_flight.popleft()
        metrics, vote = jax.device_get(metrics), self.ballot.count(cast)
        self.voted_to_stop |= vote.stop
        if vote.failed:
            self._hear()
        for place, (member, first, count) in enumerate(spans):
            if member and member.state == "running":
                member.told_to_save |= vote.save
                try:
                    member.log(first, _rows(metrics, place, count))
                except Exception as error:
                    self._fail_alone(place, error)
        self.progress.update([m for m in self.members if m], len(self.waiting))

    def _read_all(self) -> None:
        while self.in_flight:
            self._read_metrics()
        if not processes.alone():
            self._hear()

    @property
    def due(self) -> bool:
        return any(m.due for m in self.members if m)

    def handle_events(self) -> None:
        """Evaluates, saves and ends the members whose step asks for it."""
        if not self.due:
            return
        self._read_all()
        if any(m.evaluation_due for m in self.members if m):
            self._evaluate()
        for place, member in enumerate(self.members):
            if member is not None and member.due:
                try:
                    self._settle(place, member)
                except Exception as error:
                    self._fail(place, error)

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

    def _evaluate(self) -> None:
        """Held-out losses of the members that are due; the others' devices would have had to wait anyway."""
        due = [m for m in self.members if m and m.evaluation_due]
        chunks = max(-(-len(m.dataset.held_out.tokens_BT1) // self.batch_size) for m in due)
        rows = collections.defaultdict(list)
        for chunk in range(chunks):
            parts = [self._held_out(m if m in due else None, chunk) for m in self.members]
            tokens, segments = (np.stack(arrays) for arrays in zip(*parts, strict=True))
            nll, weight = jax.device_get(self.program.evaluate(self.state, tokens, segments))
            for place, member in enumerate(self.members):
                if member in due:
                    rows[place].append(np.stack([nll[place], weight[place]]))
        for place, parts in rows.items():
            member = self.members[place]
            num_rows = len(member.dataset.held_out.tokens_BT1)
            try:
                member.evaluated(*np.concatenate(parts, axis=1)[:, :num_rows])
            except Exception as error:
                self._fail(place, error)

    def _held_out(self, member: Member | None, chunk: int):
        B = self.batch_size
        out = np.zeros((2, B, self.row_tokens), np.int32)
        if member is not None:
            for i, array in enumerate(member.dataset.held_out):
                rows = array[chunk * B : (chunk + 1) * B]
                out[i, : len(rows)] = rows
        return out[0], out[1]

    def preempt(self) -> None:
        """Saves every member at the step it has reached."""
        self._read_all()
        for place, member in enumerate(self.members):
            if member is None:
                continue
            try:
                if member.step not in (member.saved_step, member.first_step):
                    member.save(self.program.take(self.state, place))
                member.finish("preempted")
                self._closed(member.run.run_id, "preempted")
                self.members[place] = None
            except Exception as error:  # the others are still to be saved
                self._fail(place, error)
        for run in self.waiting:
            self.outcome[run.run_id] = "preempted"

    def abandon(self) -> None:
        """Closes what an exception left open, without pretending that it ended."""
        for member in self.members:
            if member is not None:
                with contextlib.suppress(Exception):  # it would hide the exception that led here
                    member.close() if processes.alone() else member.leave()


def _rows(metrics: Metrics, place: int, count: int) -> Metrics:
    """Of one member, its first steps."""
    return jax.tree.map(lambda leaf_PK: leaf_PK[place, :count], metrics)
