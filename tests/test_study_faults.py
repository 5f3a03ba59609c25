"""A study of 12 runs under faults, in minutes: its launcher killed 20 times; cells that fail in three ways."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from slmjax import launchers, records
from slmjax.launchers import causes, status

pytestmark = pytest.mark.slow

STUDY = """
from experiments import base
from slmjax import config
from slmjax.study import Cell, Study, axis, chain, product

def get_study(arg=""):
    c = base.get_config("tiny")
    c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:16:1",), "none", 16
    base.resize(c, 32, 1, 16)
    c.train.batch_size, c.train.eval_sequences, c.train.steps = 8, 64, 400
    c.schedule.warmup_steps = 5
    c.log.tensorboard, c.log.log_every, c.log.eval_every, c.log.checkpoint_every = False, 10, 0, 50
    sizes = axis("width", {str(w): {"model.mlp_width": w} for w in (32, 128, 512)})
    if arg == "failing":  # three sizes, three lengths, and three cells that cannot be
        cells = chain(
            product(sizes, axis("train.steps", [100, 300, 900])),
            [
                Cell({"data.sources": ("no/such.bin",), "model.vocab_size": 16}, {"bad": "data"}),
                Cell({"optim.lr": 1e30, "optim.max_skips": 5}, {"bad": "rate"}),
                Cell({"model.mlp_width": 2**36}, {"bad": "memory"}),
            ],
        )
    else:
        cells = product(axis("train.seed", [0, 1, 2, 3]), sizes)
    return Study("s", config.resolve(c), cells)
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "s.py"
    path.write_text(STUDY)
    return path


def command(study_file, out, *more):
    return [sys.executable, "-m", "slmjax", "study", "run", f"--study={study_file}", f"--out={out}", "--jobs=2", *more]


def table(folder):
    """What each run came to: state, step, and every recorded loss, each step once."""
    plan, logged = records.load_study(folder)
    assert len(plan["runs"]) == len(logged) == 12
    rows = {row.run_id: (row.state, row.step) for row in status.study_status(folder)}
    return {id: (*rows[id], run.end["loss"], [(r["step"], r["loss"]) for r in run.train]) for id, run in logged.items()}


def test_a_launcher_killed_20_times_changes_nothing(study_file, tmp_path):
    undisturbed = subprocess.run(command(study_file, tmp_path / "a"), capture_output=True, text=True, timeout=600)
    assert undisturbed.returncode == 0, undisturbed.stderr
    folder, draw, kills = tmp_path / "b" / "s", random.Random(), 0
    while kills < 20:
        process = subprocess.Popen(command(study_file, tmp_path / "b"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(draw.uniform(0.5, 8.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if kills % 3 == 0:  # now and then its packs' processes die with it, else they go on and are found again
            for path in folder.glob("packs/*.lock"):
                if path.stem != "launcher" and (pid := launchers.holder_of(path)):
                    os.kill(pid, signal.SIGKILL)
        if (folder / "study.json").exists():
            status.study_status(folder)  # can be read after every kill
    last = subprocess.run(command(study_file, tmp_path / "b"), capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr
    assert table(folder) == table(tmp_path / "a" / "s")
    for run_id in table(folder):
        lines = [line for path in records.attempt_files(folder / run_id) for line in records.read_lines(path)]
        assert [line["status"] for line in lines if line["kind"] == "end"] == ["done"], "ended more than once"


def test_three_cells_that_fail_are_told_by_cause_and_nine_are_fitted(study_file, tmp_path):
    line = command(f"{study_file}:failing", tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    rows = {row.tags.get("bad", row.run_id): row for row in status.study_status(tmp_path / "s")}
    kinds = {name: causes.cause(row)[0] for name, row in rows.items() if row.state != "done"}
    assert kinds == {"data": "data", "rate": "diverged", "memory": "out of memory"}, rows
    assert all(f"1 {kind}: {rows[name].run_id}" in done.stdout for name, kind in kinds.items())
    fit = subprocess.run([sys.executable, "-m", "slmjax", "fit", str(tmp_path / "s"), "--json=-"], capture_output=True,
                         text=True, timeout=600)  # fmt: skip
    assert fit.returncode == 0, fit.stderr
    said = fit.stdout + fit.stderr
    assert all(rows[name].run_id in said for name in kinds), "a run left out of a fit is named"
    assert len(json.loads(fit.stdout)["points"]) == 9
