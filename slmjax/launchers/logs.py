"""A run's records as lines to read: what `slmjax study logs` prints."""

import json
import time
from collections.abc import Iterator

from slmjax import paths, records
from slmjax.launchers.status import writer_alive

POLL_S = 0.5
STORE_POLL_S = 5.0  # a look is a few requests, and what it finds is seconds old


def lines(run_dir: paths.Path, as_json: bool = False, follow: bool = False) -> Iterator[str]:
    """Every record of every attempt, in order; with `follow`, also those to come until the run's process ends."""
    told: dict[paths.Path, int] = {}
    while True:
        alive = writer_alive(run_dir)  # before reading: what a process wrote before it ended is read below
        for path in records.attempt_files(run_dir):
            entries = records.read_lines(path)
            for entry in entries[told.get(path, 0) :]:
                yield json.dumps(entry) if as_json else _text(entry)
            told[path] = len(entries)
        if not (follow and alive):
            break
        time.sleep(STORE_POLL_S if paths.is_remote(run_dir) else POLL_S)
    if not as_json and (run_dir / "error.txt").exists() and not (run_dir / "DONE").exists():
        yield paths.read_text(run_dir / "error.txt").rstrip()


def _text(entry: dict) -> str:
    if entry["kind"] == "start":
        whence = f" from {entry['parent']}" if entry["parent"] and entry["step"] == entry["branch_step"] else ""
        return f"attempt {entry['attempt']}: starts at step {entry['step']} of {entry['total_steps']}{whence}"
    numbers = {
        "loss": "{:.4f}", "bits_per_byte": "{:.4f}", "loss_se": "{:.4f}", "lr": "{:.3g}", "grad_norm": "{:.3g}",
        "tokens_per_s": "{:,}", "num_skipped": "{}", "epochs": "{:.3g}", "wall_s": "{:.1f}",
    }  # fmt: skip
    said = [f"{key} {form.format(entry[key])}" for key, form in numbers.items() if entry.get(key) is not None]
    head = entry["status"] if entry["kind"] == "end" else entry["kind"]
    reason = f"  {entry['reason']}" if entry.get("reason") else ""
    return f"{head:8} step {entry['step']:>7}  {'  '.join(said)}{reason}"
