"""Progress for people: a live bar for each member on a terminal, a plain line now and then elsewhere."""

import sys
import time

import jax
import rich.console
import rich.progress

from slmjax import devices, ladder

LINE_INTERVAL_S = 15.0


class Progress:
    """Context manager; `update` is cheap and may be called after every dispatch."""

    def __init__(self, label: str = "", quiet: bool = False):
        self.label, self.quiet = label, quiet
        self.console = rich.console.Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.bars, self.printed_at, self.peak = {}, 0.0, None

    def __enter__(self):
        kinds = jax.devices()
        per_device = devices.peak_flops(kinds[0].device_kind)
        self.peak = per_device and per_device * len(kinds)
        if self.live:
            columns = (
                "{task.description}",
                rich.progress.BarColumn(None),
                "{task.completed}/{task.total}",
                "{task.fields[speed]}",
                rich.progress.TimeRemainingColumn(),
            )
            self.display = rich.progress.Progress(*columns, console=self.console, expand=True)
            self.display.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self.display.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def update(self, members: list, num_waiting: int) -> None:
        """Shows running members: step, loss, tokens/s, MFU where the device's peak is known, and time left."""
        now = time.monotonic()
        if self.quiet or (not self.live and now - self.printed_at < LINE_INTERVAL_S):
            return
        self.printed_at = now
        if self.live:
            self._draw(members)
            return
        for member in members:
            total = member.run.config.train.steps
            left_s = (total - member.step) * member.tokens_per_step / max(member.tokens_per_s, 1e-9)
            waiting = f", {num_waiting} more to come" if num_waiting else ""
            print(
                f"{self._name(member)} step {member.step}/{total} {self._numbers(member)} eta {left_s:.0f} s{waiting}",
                file=sys.stderr,
                flush=True,
            )

    def _draw(self, members: list) -> None:
        for run_id in set(self.bars) - {m.run.run_id for m in members}:
            self.display.remove_task(self.bars.pop(run_id))
        for member in members:
            run_id = member.run.run_id
            if run_id not in self.bars:
                self.bars[run_id] = self.display.add_task(
                    self._name(member), total=member.run.config.train.steps, speed=""
                )
            self.display.update(self.bars[run_id], completed=member.step, speed=self._numbers(member))

    def _name(self, member) -> str:
        tags = " ".join(f"{key}={value}" for key, value in member.run.tags.items())
        return f"{self.label} {member.run.run_id} {tags}".strip()

    def _numbers(self, member) -> str:
        loss = "-" if member.loss is None else f"{member.loss:.3f}"
        text = f"loss {loss} {member.tokens_per_s:,.0f} tok/s"
        if self.peak:
            cfg = member.run.config
            per_token = ladder.run_flops_per_token(cfg)["with_head"]
            text += f" MFU {per_token * member.tokens_per_s / self.peak:.1%}"
        return text
