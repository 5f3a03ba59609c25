"""One run while it trains: its folder, lease, records, checkpoints and data. The devices' side of it is `train`'s.

Where several processes train it, each has a Member that comes to the same decisions at the same steps, and that of
process 0 alone takes the lease and writes. Whatever may fail in one of them is done `processes.together`.
"""

import contextlib
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from slmjax import config, data, evaluate, ladder, models, processes, records, schedules, upcycle
from slmjax.checkpoint import Checkpointer
from slmjax.lease import LeaseError, LeaseTrouble, RunLease
from slmjax.program import Metrics, Program
from slmjax.provenance import provenance
from slmjax.study import Run
from slmjax.tensorboard import TensorBoard

CHECKPOINT_INTERVAL_S = 60.0  # of log.checkpoint_every=0
STATUS_INTERVAL_S = 5.0


class Member:
    """Opened, restored, started; then `step` moves, `log`, `evaluated` and `save` record it, and `finish` ends it.

    state is "running" until `finish` or `fail`. saved_step is that of the newest checkpoint, -1 before the first.
    """

    def __init__(self, run: Run, folder: Path, program: Program):
        """Takes the run's lease; raises LeaseError when another process holds it."""
        self.run, self.folder, self.program = run, folder / run.run_id, program
        self.step, self.saved_step, self.state, self.reason = 0, -1, "running", None
        self.first_step = self.logged_step = 0
        self.loss = self.eval = self.writer = None
        self.tokens_per_s = 0.0
        self.num_skipped = self.most_consecutive = 0
        self.inherited = {}  # of an upcycled run: the tokens and FLOPs of the dense steps it began from
        self.began = self.read_at = self.saved_at = time.monotonic()
        self.status_at = 0.0
        self.told_to_save = False  # by process 0, whose clock says that a checkpoint is due
        self.writes = processes.first()
        self._open = contextlib.ExitStack()
        self.lease = RunLease(self.folder) if self.writes else None
        processes.together(lambda: self.lease and self._open.enter_context(self.lease))

    def open(self) -> None:
        """Opens data, checkpoints and records.

        Raises:
          ConfigError: the data or tokenizer is not what an earlier attempt trained on, or has another vocabulary.
          DisagreementError: other processes have other data.
        """
        processes.together(self._open_data)
        processes.require_same({f"data.{name}": value for name, value in self.dataset.fingerprint.items()})
        processes.together(self._open_records)

    def _open_data(self) -> None:
        cfg = self.run.config
        self.writer = records.RunWriter(self.folder) if self.writes else records.SilentWriter()
        self._open.callback(self.writer.close)
        self.dataset = data.open_dataset(cfg)
        if self.dataset.vocab_size > ladder.vocab_size(cfg):
            raise config.ConfigError(
                f"model.vocab_size={ladder.vocab_size(cfg)} is smaller than the data's "
                f"{self.dataset.vocab_size} tokens; use 0 to take the data's"
            )

    def _open_records(self) -> None:
        cfg = self.run.config
        before = records.read_json(self.folder / "provenance.json")
        if before and before["data"] != self.dataset.fingerprint:
            raise config.ConfigError(
                f"{self.folder} was trained on {before['data']} and the data are now {self.dataset.fingerprint}; "
                "restore the data, or use another --out"
            )
        self.checkpoints = self._open.enter_context(
            Checkpointer(self.folder / "checkpoints", keep=cfg.log.keep_checkpoints)
        )
        if self.writes:
            records.write_json(self.folder / "config.json", config.to_dict(cfg))
            records.write_json(self.folder / "provenance.json", {**provenance(), "data": self.dataset.fingerprint})
        self.tensorboard = TensorBoard(self.folder / "tb", enabled=cfg.log.tensorboard and self.writes)
        self._open.callback(self.tensorboard.close)

    def restore(self, source: Path | None = None):
        """What to go on from, in this order: this run's newest checkpoint; the newest that another run beside it shares
        with it; the upcycled checkpoint that `start` names, of the run beside it or in the folder `source`; None.
        """
        cfg = self.run.config
        found = self.checkpoints.restore(self.program.abstract_member)
        if found is not None:
            self.step, state, meta = found
            self.saved_step, self.inherited = self.step, _inherited(meta)
        else:
            donor, step = processes.of_first(lambda: shared_checkpoint(cfg, self.folder, self.dataset.fingerprint))
            if donor is not None:
                with Checkpointer(self.folder.parent / donor / "checkpoints") as other:
                    self.step, state, meta = other.restore(self.program.abstract_member, step)
                self.inherited = _inherited(meta)
            elif cfg.start.run:
                source = source or self.folder.parent / cfg.start.run
                state, tokens, flops = upcycle.begin(source, cfg, self.program, self.dataset.fingerprint)
                if not processes.alone():  # made in each of them, on its own devices
                    state = jax.tree.map(np.asarray, state)
                self.step, self.inherited = cfg.start.step, {"inherited_tokens": tokens, "inherited_flops": flops}
            else:
                return None
        self.num_skipped, self.most_consecutive = int(state.skips.total), int(state.skips.consecutive)
        return state

    def start(self) -> None:
        cfg = self.run.config
        counts = models.count_params(self.program.model.specs, cfg.model)
        self.first_step = self.logged_step = self.step
        processes.together(self._write_start, counts)

    def _write_start(self, counts) -> None:
        cfg = self.run.config
        self.writer.write(
            "start",
            time=time.time(),
            run_id=self.run.run_id,
            attempt=self.writer.attempt,
            step=self.step,
            parent=self.run.parent,
            branch_step=self.run.branch_step,
            total_steps=cfg.train.steps,
            tokens_per_step=self.tokens_per_step,
            counts=counts.to_dict(),
            flops_per_token=ladder.run_flops_per_token(cfg, counts.dense),
            loss_kind=self.program.objective.kind,
            tokenizer=self.dataset.fingerprint["tokenizer"],
            corpus=self.dataset.fingerprint["corpus"],
            bytes_per_token=self.dataset.bytes_per_token,
            entropy=self.dataset.entropy,
            family=family(cfg, self.program.objective.kind),
            mesh=dict(self.program.mesh.shape),
            **self.inherited,
        )
        self.tensorboard.start(self.step)
        self.writer.status("running", **self._progress())

    @property
    def tokens_per_step(self) -> int:
        return self.run.config.train.batch_size * self.run.config.data.seq_len

    @property
    def phase(self) -> str:
        return schedules.phase(self.run.config, max(0, self.step - 1))

    @property
    def next_event(self) -> int:
        """The next step at which the host has something to do; at the run's end, that step."""
        cfg = self.run.config
        steps = [cfg.train.steps, *(s for s in self.run.save_steps if s > self.step)]
        steps += [self.step - self.step % n + n for n in (cfg.log.eval_every, cfg.log.checkpoint_every) if n]
        return min(steps)

    @property
    def at_end(self) -> bool:
        return self.step == self.run.config.train.steps

    @property
    def diverging(self) -> bool:
        return self.most_consecutive >= self.run.config.optim.max_skips

    @property
    def due(self) -> bool:
        """Whether there is anything to do between two dispatches."""
        return self.at_end or self.diverging or self.checkpoint_due or self.evaluation_due

    @property
    def overdue(self) -> bool:
        """Whether this process's clock says that it is time for a checkpoint."""
        return time.monotonic() - self.saved_at > CHECKPOINT_INTERVAL_S

    @property
    def checkpoint_due(self) -> bool:
        cfg = self.run.config
        # What another run's checkpoint began is saved there, unless there is nothing to add to it.
        if self.step == self.saved_step or (self.step == self.first_step and not self.at_end):
            return False
        every = cfg.log.checkpoint_every
        by_clock = not every and (self.overdue if processes.alone() else self.told_to_save)
        by_step = every and self.step % every == 0
        return by_clock or by_step or self.step in (*self.run.save_steps, cfg.train.steps)

    @property
    def evaluation_due(self) -> bool:
        cfg = self.run.config
        periodic = cfg.log.eval_every and self.step % cfg.log.eval_every == 0 and self.step > self.first_step
        return bool((self.at_end or periodic) and (self.eval is None or self.eval["step"] != self.step))

    def log(self, first: int, metrics: Metrics) -> None:
        """Records the steps first..first+n-1 from metrics of shape [n]."""
        count, now = len(metrics.loss), time.monotonic()
        self.tokens_per_s = count * self.tokens_per_step / max(now - self.read_at, 1e-9)
        self.read_at = now
        # What is decided by comes before what is written: a write that fails here fails in this process alone.
        self.loss, self.logged_step = float(metrics.loss[-1]), first + count
        self.num_skipped = int(metrics.skipped[-1])
        # The longest row of skips, which need not be the last: what diverges must not hang on where dispatches end.
        self.most_consecutive = max(self.most_consecutive, int(np.max(metrics.consecutive)))
        if self.writes:
            self._write_steps(first, metrics)
            self.lease.beat()
        if now - self.status_at > STATUS_INTERVAL_S:
            self.status_at = now
            self.writer.status("running", **self._progress())

    def _write_steps(self, first: int, metrics: Metrics) -> None:
        cfg, now = self.run.config, self.read_at
        for i in range(len(metrics.loss)):
            step = first + i + 1
            if step % cfg.log.log_every and step != cfg.train.steps:
                continue
            line = {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": records.finite(metrics.loss[i]),
                "grad_norm": records.finite(metrics.grad_norm[i]),
                "lr": schedules.multiplier(cfg, step - 1) * cfg.optim.lr,
                "phase": schedules.phase(cfg, step - 1),
                "num_skipped": int(metrics.skipped[i]),
                "wall_s": round(now - self.began, 3),
                "tokens_per_s": round(self.tokens_per_s),
                **{name: _rounded(values[i]) for name, values in (metrics.objective | metrics.auxiliary).items()},
            }
            self.writer.write("train", **line)
            self.tensorboard.scalars(step, {k: line[k] for k in ("loss", "grad_norm", "lr", "tokens_per_s")}, "train")
            for name, values in metrics.objective.items():
                self.tensorboard.scalars(step, _by_level(name, values[i]), "train")
            for name, values in metrics.auxiliary.items():
                self.tensorboard.scalars(step, _by_layer(cfg.model, values[i]), f"router/{name}")

    def evaluated(self, nll_M: np.ndarray, weight_M: np.ndarray) -> None:
        """Records a held-out evaluation from each row's summed loss and weight."""
        self.eval = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            **evaluate.summary(nll_M, weight_M, self.dataset.bytes_per_token),
            "phase": self.phase,
        }
        processes.together(self._write_eval)
        self.read_at = time.monotonic()

    def _write_eval(self) -> None:
        self.writer.write("eval", **self.eval)
        scalars = {key: self.eval[key] for key in ("loss", "bits_per_byte") if self.eval[key] is not None}
        self.tensorboard.scalars(self.step, scalars, "eval")

    def save(self, state) -> None:
        cfg = self.run.config
        meta = {"run_id": self.run.run_id, "phase": self.phase, "tokens": self.step * self.tokens_per_step}
        pinned = self.step in self.run.save_steps or self.step == config.decay_start(cfg)
        meta |= {"data": self.dataset.fingerprint, **self.inherited}
        self.checkpoints.save(self.step, state, meta, pinned=pinned)
        if self.step in self.run.save_steps:
            self.checkpoints.wait()  # saved_step tells branches that they can start, and they read it at once
        self.saved_step, self.saved_at, self.told_to_save = self.step, time.monotonic(), False

    def finish(self, state: str, reason: str | None = None) -> None:
        """Ends the attempt; "done" only once its checkpoint is on disk."""
        self.checkpoints.wait()
        processes.together(self._finish, state, reason)
        self.close()

    def _finish(self, state: str, reason: str | None) -> None:
        final = self.eval if self.eval and self.eval["step"] == self.step else {}
        self._end(state, reason, final, self.dataset.epochs_at(self.step))
        if state == "done":  # last of all: nothing more is written to a folder that says DONE
            counts = models.count_params(self.program.model.specs, self.run.config.model).to_dict()
            self.tensorboard.hparams(self.run.config, counts, final)
            self.writer.done()

    def fail(self, error: Exception) -> None:
        """Ends the attempt with an error's reason; its traceback goes to error.txt in the run's folder."""
        self.state, self.reason = "failed", f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # what failed may be the disk; the caller has the reason in any case
            # Lost to another writer, it is that one's folder now.
            is_ours = not isinstance(error, LeaseError) or isinstance(error, LeaseTrouble)
            if self.writes and is_ours:
                (self.folder / "error.txt").write_text("".join(traceback.format_exception(error)))
                if self.writer is not None:
                    self._end("failed", self.reason, {}, None)
        with contextlib.suppress(Exception):  # a failed save has been reported above
            self.close()

    def _end(self, state: str, reason: str | None, final: dict, epochs: float | None) -> None:
        self.writer.write(
            "end",
            status=state,
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            **{key: final.get(key) for key in ("loss", "loss_se", "bits_per_byte")},
            wall_s=round(time.monotonic() - self.began, 3),
            num_skipped=self.num_skipped,
            epochs=epochs,
            phase=self.phase,
            reason=reason,
        )
        self.state, self.reason = state, reason
        self.writer.status(state, reason=reason, **self._progress())

    def close(self) -> None:
        self._open.close()

    def leave(self) -> None:
        """Hands the lease back, and waits for nothing: a save in flight may need processes that are gone. What is open
        stays so, for this process is about to end."""
        if self.lease is not None:
            self.lease.__exit__(None, None, None)

    def _progress(self) -> dict:
        loss = self.eval["loss"] if self.eval else self.loss
        return {
            "step": self.step,
            "total_steps": self.run.config.train.steps,
            "loss": records.finite(loss),
            "tokens_per_s": round(self.tokens_per_s),
        }


def shared_checkpoint(cfg: config.RunConfig, folder: Path, fingerprint: dict) -> tuple[str | None, int]:
    """The sibling folder's name and the step of the longest saved beginning that this run shares (`shared_steps`).

    fingerprint: of the run's data; a sibling that trained on others under the same name shares nothing.
    """
    best = (None, 0)
    mine = _plain(config.to_dict(cfg))
    for path in folder.parent.glob("*/config.json"):
        theirs = records.read_json(path)
        # Cheap to see and true of most siblings: another model, seed or optimizer shares nothing.
        if path.parent == folder or any(theirs.get(k) != mine[k] for k in ("model", "objective", "optim")):
            continue
        if (records.read_json(path.with_name("provenance.json")) or {}).get("data") != fingerprint:
            continue
        try:
            shared = config.shared_steps(config.resolve(theirs), cfg)
        except config.ConfigError:  # written by another version
            continue
        steps = [s for s in Checkpointer(path.parent / "checkpoints").steps() if best[1] < s <= shared]
        if steps:
            best = (path.parent.name, max(steps))
    return best


def _inherited(meta: dict) -> dict:
    """What a checkpoint says of the dense steps behind it; {} where there are none."""
    return {key: meta[key] for key in ("inherited_tokens", "inherited_flops") if key in meta}


def family(cfg: config.RunConfig, kind: str) -> str:
    """What a run's points are told apart by: a fork's own build, dense or moe, and an objective that gives a bound."""
    model = cfg.model
    name = model.build if model.build != "transformer" else "moe" if "moe" in model.feed_forwards else "dense"
    if kind == "exact":
        return name
    objective = {"masked_diffusion": "mdm", "block_diffusion": "block"}.get(cfg.objective.name, cfg.objective.name)
    return objective if name == "dense" else f"{objective}-{name}"


def _by_layer(model: config.ModelConfig, values) -> dict[str, float]:
    """Numbers of the layers with experts, or of each of their experts, by the layer's place in the model."""
    layers = [layer for layer, kind in enumerate(model.feed_forwards) if kind == "moe"]
    named = zip(layers if len(layers) == len(values) else range(len(values)), values, strict=True)
    flat = {}
    for layer, value in named:
        if np.ndim(value):
            flat |= {f"layer_{layer}/expert_{expert}": float(v) for expert, v in enumerate(value)}
        else:
            flat[f"layer_{layer}"] = float(value)
    return flat


def _by_level(name: str, value) -> dict[str, float]:
    """A number, or those of each noise level from low to high; levels that a batch did not meet are left out."""
    if np.ndim(value) == 0:
        return {name: float(value)}
    return {f"{name}/{level}": float(v) for level, v in enumerate(value) if np.isfinite(v)}


def _rounded(array) -> list:
    """Nested lists with six digits after the point, and null for what is not finite."""
    if np.ndim(array):
        return [_rounded(a) for a in array]
    return round(float(array), 6) if np.isfinite(array) else None


def _plain(value):
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
