"""A mirror of a run's records for TensorBoard, written without TensorFlow."""

import time
from pathlib import Path

from slmjax.config import RunConfig, flatten


class TensorBoard:
    """Writes scalars and hyper-parameters below `folder`; disabled, it does nothing."""

    def __init__(self, folder: Path, enabled: bool = True):
        self._writer = None
        if enabled:
            # Imported here: it takes most of a second, and a run may be told to do without.
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(folder))

    def start(self, step: int) -> None:
        """Marks an attempt that goes on after `step` steps: what an earlier one logged past them is not shown."""
        if self._writer is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict, prefix: str) -> None:
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        tags = [Summary.Value(tag=f"{prefix}/{k}", simple_value=v) for k, v in values.items() if v is not None]
        self._add(step, summary=Summary(value=tags))

    def hparams(self, cfg: RunConfig, counts: dict[str, int], result: dict) -> None:
        """The config's numbers and names and the model's parameter counts beside the final held-out loss, for the
        HParams tab, and for a fit from event files alone."""
        if self._writer is None:
            return
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        flat = {k: v for k, v in flatten(cfg).items() if isinstance(v, bool | int | float | str)}
        self._add(0, summary=hparams_pb(flat | {f"counts.{name}": count for name, count in counts.items()}))
        if result:
            self.scalars(result["step"], {"loss": result["loss"]}, "hparams")

    def _add(self, step: int, **what) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
