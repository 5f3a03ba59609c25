"""`slmjax check reversal` and `parallel`: what they conclude, what they refuse, and, slowly, that they hold."""

import json

import pytest

from slmjax import cli
from slmjax.check import parallel, reversal
from slmjax.check.reversal import Recall
from slmjax.decoding.parallel_bench import Score


def recalls(forward=1.0, reverse=1.0, causal=0.0) -> list[Recall]:
    return [
        Recall("autoregression", 1.0, causal, 1 / 64),
        Recall("masked diffusion", forward, reverse, 1 / 64),
        Recall("masked diffusion, prompt shown", 1.0, 0.0, 1 / 64),
    ]


def test_the_reversal_holds_when_only_masked_diffusion_recalls_both_ways():
    assert reversal.holds(recalls()) and reversal.holds(recalls(causal=2 / 64))
    assert not reversal.holds(recalls(reverse=0.9))
    assert not reversal.holds(recalls(forward=0.9))
    assert not reversal.holds(recalls(causal=0.5))  # then it was no reversal


def test_a_task_is_held_to_perfect_marginals():
    def row(accuracy, ideal, task="line:shuffle:4:0", se=0.01):
        return parallel.Row(task, 4, Score(accuracy, se, 1, 1.0, 512), ideal).holds

    assert row(0.10, 0.09375) and not row(0.2, 0.09375) and not row(0.01, 0.09375)
    assert row(0.99, 1.0, "line:copy:4:0") and not row(0.94, 1.0, "line:copy:4:0")
    assert row(0.92, 1.0) and not row(0.89, 1.0)  # of shuffle, one at a time
    assert row(0.3, None)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["check", "reversed"], "checks: coord, reversal, parallel"),
        (["check", "coord", "--pairs=8"], "--pairs has no effect on check coord"),
        (["check", "reversal", "--widths=64,128"], "--widths has no effect on check reversal"),
        (["check", "parallel", "--tasks=shufle"], "shuffle"),
        (["check", "reversal", "--steps=0"], "--steps=0"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(argv, words, capsys):
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.slow
def test_masked_diffusion_recalls_in_reverse_where_autoregression_guesses(tmp_path, seed, capsys):
    argv = ["check", "reversal", f"--out={tmp_path}", f"--seed={seed % 1000}", "--json"]
    assert cli.main(argv) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["masked diffusion"]["reverse"] > 0.95
    assert rows["autoregression"]["reverse"] <= 0.08 and rows["autoregression"]["forward"] > 0.95


@pytest.mark.slow
def test_filling_all_at_once_costs_shuffle_what_independent_draws_cost(tmp_path, seed, capsys):
    argv = ["check", "parallel", f"--out={tmp_path}", f"--seed={seed % 1000}", "--json"]
    assert cli.main(argv) == 0
    rows = {(row["task"].split(":")[1], row["per_call"]): row for row in json.loads(capsys.readouterr().out)}
    shuffled = rows["shuffle", 4]
    assert abs(shuffled["accuracy"] - 24 / 4**4) < 4 * shuffled["accuracy_se"] and shuffled["calls"] == 1
    for task in ("copy", "reverse", "sort", "replace_index"):
        assert all(rows[task, k]["accuracy"] > 0.95 for k in (1, 2, 4))
