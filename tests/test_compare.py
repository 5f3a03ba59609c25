"""`study compare`: the right loss in each cell, each column's own cost, and refusals that help."""

import pytest

from slmjax import cli, records
from slmjax.config import ConfigError
from slmjax.launchers.compare import compare


def planted(folder, runs):
    """A study folder of (tags, branch_step, end step, loss, status) with 10 tokens a step and 3 FLOPs a token."""
    entries = []
    for i, (tags, branch_step, step, loss, status) in enumerate(runs):
        entries.append({"run_id": f"r{i}", "tags": tags, "parent": None, "branch_step": branch_step})
        writer = records.RunWriter(folder / f"r{i}")
        start = {"step": branch_step or 0, "branch_step": branch_step, "tokens_per_step": 10}
        kind = {"loss_kind": "bound"} if tags.get("family") == "mdm" else {}
        writer.write("start", **start, **kind, flops_per_token={"with_head": 3})
        writer.write("end", status=status, step=step, tokens=10 * step, loss=loss, loss_se=0.01)
        writer.close()
    records.write_json(folder / "study.json", {"name": folder.name, "runs": entries})
    return folder


def test_cells_costs_and_best(tmp_path):
    wsd = {"schedule": "wsd"}
    folder = planted(
        tmp_path,
        [
            ({"schedule": "cosine", "steps": 100}, None, 100, 2.0, "done"),
            ({"schedule": "cosine", "steps": 200}, None, 200, 1.5, "done"),
            ({**wsd, "role": "trunk"}, None, 180, 1.9, "done"),
            ({**wsd, "role": "branch", "steps": 100}, 90, 100, 1.9, "done"),
            ({**wsd, "role": "branch", "steps": 200}, 180, 200, 1.6, "done"),
            ({**wsd, "role": "branch", "steps": 400}, 360, 370, 0.0, "diverged"),
        ],
    )
    table = compare(folder, "steps", "schedule")
    assert table.row_values == [100, 200] and table.column_values == ["cosine", "wsd"]
    assert table.losses[200, "wsd"] == (1.6, 0.01) and (400, "wsd") not in table.losses
    assert table.best() == {100: "wsd", 200: "cosine"}
    assert table.flops == {"cosine": 300 * 30, "wsd": (180 + 10 + 20) * 30}  # a branch costs its decay alone
    mean, se = table.differences()["wsd"]  # of -0.1 and +0.1
    assert (mean, se) == (pytest.approx(0, abs=1e-12), pytest.approx(0.1))
    assert table.to_json()["differences"] == [{"schedule": "wsd", "mean": mean, "se": se}]


def test_a_bound_beside_losses_is_called_one(tmp_path, capsys):
    runs = [({"family": family, "seed": 0}, None, 9, loss, "done") for family, loss in (("dense", 2.0), ("mdm", 2.5))]
    folder = planted(tmp_path, runs)
    table = compare(folder, "seed", "family")
    assert table.loss_kinds == {"dense": "exact", "mdm": "bound"}
    assert [of["loss_kind"] for of in table.to_json()["flops"]] == ["exact", "bound"]
    assert cli.main(["study", "compare", f"--study={folder}", "--rows=seed", "--columns=family"]) == 0
    said = capsys.readouterr().out
    head = next(line for line in said.splitlines() if "family=" in line)
    assert head.split() == ["seed", "family=dense", "family=mdm", "(bound)"]
    assert "(bound): an upper bound on the loss" in said


def test_one_row_has_no_standard_error(tmp_path):
    folder = planted(tmp_path, [({"lr": lr, "width": 8}, None, 9, 1.0, "done") for lr in (1, 2)])
    assert compare(folder, "width", "lr").differences() == {}


def test_what_cannot_be_compared_is_refused(tmp_path):
    folder = planted(
        tmp_path, [({"lr": 1, "width": 8}, None, 9, 1.0, "done"), ({"lr": 1, "width": 8}, None, 9, 1.1, "done")]
    )
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        compare(folder, "widht", "lr")
    with pytest.raises(ConfigError, match="two runs have width=8 and lr=1"):
        compare(folder, "width", "lr")
