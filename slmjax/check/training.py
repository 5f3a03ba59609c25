"""The small model that checks train on a synthetic source."""

from pathlib import Path

from slmjax import config, ladder, train, trained
from slmjax.config import RunConfig
from slmjax.study import Run
from slmjax.trained import Trained


def run_config(spec: str, seq_len: int, steps: int, changes: dict) -> RunConfig:
    """A two-layer model on one synthetic source of rows of seq_len tokens."""
    cfg = config.override(
        RunConfig(),
        ladder.shape(64, 2, head_dim=16)
        | {
            "data.sources": (spec,),
            "data.tokenizer": "none",
            "data.packing": "concat",
            "data.seq_len": seq_len,
            "optim.lr": 5e-3,
            "optim.weight_decay": 0.0,
            "schedule.warmup_steps": min(50, steps // 10),
            "schedule.decay_fraction": 0.5,
            "schedule.decay_shape": "linear",
            "train.batch_size": 64,
            "train.steps": steps,
            "log.log_every": 100,
        }
        | changes,
    )
    config.validate(cfg)
    return cfg


def train_and_load(run: Run, folder: Path) -> Trained:
    """The run's model, trained in `folder` unless it is there already.

    Raises:
      RuntimeError: it did not end well; its folder says why.
    """
    outcome = train.train_pack([run], folder)
    if outcome[run.run_id] != "done":
        raise RuntimeError(f"{folder / run.run_id} ended as {outcome[run.run_id]}; its status.json says why")
    return trained.load(folder / run.run_id)
