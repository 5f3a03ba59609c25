"""slmjax fit: one fit from every format, in under two seconds without JAX, and a sentence for what cannot be fitted."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from planted_study import planted_loss, write_study

from slmjax import cli
from slmjax.scaling import families
from slmjax.scaling.report import drawing

CONFIG = {"batch_size": 64, "seq_len": 256}  # tokens a step of the runs below
NO_JAX = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from slmjax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def runs(seed):
    """A grid of planted losses with noise, in float32 as trackers keep them."""
    rng = np.random.default_rng(seed)
    found = []
    for i, N in enumerate((1e6, 4e6, 16e6, 64e6)):
        for j, steps in enumerate((2000, 8000, 32000, 128000)):
            D = float(steps * CONFIG["batch_size"] * CONFIG["seq_len"])
            loss = float(np.float32(planted_loss(N, D) * np.exp(rng.normal(0, 0.002))))
            found.append({"id": f"n{i}d{j}", "N": N, "D": D, "loss": loss, "steps": steps})
    return found


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(header for row in rows for header in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def curve(run):
    """(step, loss) while it trains, the last its end."""
    return [(run["steps"] // 2, run["loss"] + 0.5), (run["steps"], run["loss"])]


def as_csv(folder, runs):
    return write(folder / "runs.csv", [{k: run[k] for k in ("N", "D", "loss")} for run in runs]), []


def as_events(folder, runs):
    """A folder a run: loss by step, size and batch as hyper-parameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for run in runs:
        writer = EventFileWriter(str(folder / "logs" / run["id"]))
        writer.add_event(Event(summary=hparams_pb({"params_m": run["N"] / 1e6, **CONFIG})))
        for step, loss in curve(run):
            value = Summary.Value(tag="val/loss", simple_value=loss)
            writer.add_event(Event(step=step, summary=Summary(value=[value])))
        writer.close()
    return folder / "logs", ["--columns=N=params_m*1e6,D=step*batch_size*seq_len,loss=val/loss"]


def as_tracker(folder, runs):
    """W&B's table of runs: a row a run, its config in one cell, runs that crashed among them."""
    rows = [
        {"Name": run["id"], "State": "finished", "config": str({"model": {"params": run["N"]}, **CONFIG}),
         "_step": run["steps"], "eval/loss": run["loss"]}
        for run in runs
    ]  # fmt: skip
    rows.insert(3, {**rows[0], "Name": "lost", "State": "crashed", "eval/loss": ""})
    columns = "N=config.model.params,D=_step*config.batch_size*config.seq_len,loss=eval/loss,status=State,run_id=Name"
    return write(folder / "wandb.csv", rows), [f"--columns={columns}"]


def as_chart(folder, runs):
    """W&B's export of a chart, wide, beside the table of runs that says what they were."""
    rows = {}
    for run in runs:
        for step, loss in curve(run):
            empty = {f"{other['id']} - val": "" for other in runs}
            rows.setdefault(step, {"Step": step} | empty)[f"{run['id']} - val"] = loss
    write(folder / "sizes.csv", [{"Name": run["id"], "params": run["N"]} for run in runs])
    tokens = CONFIG["batch_size"] * CONFIG["seq_len"]
    columns = [f"--columns=N=params,D=Step*{tokens},loss=val", f"--join={folder / 'sizes.csv'}:Name"]
    return write(folder / "chart.csv", list(rows.values())), columns


def as_long(folder, runs):
    """MLflow: a row per run, step and metric."""
    rows = []
    for run in runs:
        rows.append({"run_uuid": run["id"], "step": 0, "key": "params", "value": run["N"]})
        rows += [{"run_uuid": run["id"], "step": s, "key": "val", "value": loss} for s, loss in curve(run)]
    tokens = CONFIG["batch_size"] * CONFIG["seq_len"]
    columns = f"--columns=N=params,D=step*{tokens},loss=val,metric=key,value=value,run_id=run_uuid,step=step"
    return write(folder / "metrics.csv", rows), [columns]


def as_jsonl(folder, runs):
    """Another trainer's log: nested names, a line a step, the config in a line of its own."""
    lines = []
    for run in runs:
        lines.append({"run": run["id"], "model": {"size": run["N"]}})
        lines += [
            {"run": run["id"], "it": s, "seen": s * CONFIG["batch_size"] * CONFIG["seq_len"], "m": {"nll": loss}}
            for s, loss in curve(run)
        ]
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, ["--columns=N=model.size,D=seen,loss=m.nll,run_id=run,step=it"]


def fitted(source, flags, *more):
    """The fit that the command keeps."""
    target = source.parent / "fit.json"
    assert cli.main(["fit", str(source), *flags, "--bootstrap=100", f"--json={target}", *more]) == 0
    return json.loads(target.read_text())


@pytest.mark.parametrize("form", [as_events, as_tracker, as_chart, as_long, as_jsonl])
def test_every_format_gives_the_fit_of_the_plain_table(tmp_path, runs, form, capsys):
    source, flags = as_csv(tmp_path, runs)
    plain = fitted(source, flags)
    source, flags = form(tmp_path, runs)
    other = fitted(source, flags)
    for name in ("theta", "centre", "draws", "objective", "parameters", "intervals"):
        assert other[name] == plain[name], name
    assert ("left out: lost: State is crashed" in capsys.readouterr().out) == (form is as_tracker)


def test_same_input_same_bytes_and_the_command_that_makes_them(tmp_path, runs, capsys):
    """The printed command, run again, gives the same bytes; the fit says what was left out, and why."""
    source, _ = as_csv(tmp_path, [*runs, {"N": 1e6, "D": 1e9, "loss": 9.5, "id": "", "steps": 1}])
    line = ["fit", str(source), "--bootstrap=100", "--n=total", "--drop_highest=1", "--exclude=runs:1=a typo in it",
            "--where=D<1e10", "--where=N>5e5", "--columns=N=N,D=D,loss=loss", f"--json={tmp_path}/a.json"]  # fmt: skip
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "left out: runs:1: a typo in it" in said
    assert "left out: runs:17: one of the 1 highest losses (--drop_highest=1)" in said
    assert "n: total" in said and "flops: 6ND" in said
    first = (tmp_path / "a.json").read_bytes()
    (command,) = [text.removeprefix("command: ") for text in said.splitlines() if text.startswith("command: ")]
    (tmp_path / "a.json").unlink()
    program, *again = shlex.split(command)
    assert program == "slmjax" and cli.main(again) == 0
    assert capsys.readouterr().out == said and (tmp_path / "a.json").read_bytes() == first
    notes = json.loads(first)["notes"]
    assert any("--drop_highest=1" in note for note in notes) and any("runs:1: a typo" in note for note in notes)


def test_auto_fits_the_form_that_forecasts_best_and_keeps_winner_and_margin(tmp_path, capsys, seed):
    rng = np.random.default_rng(seed)
    cells = [(N, N * ratio) for N in np.geomspace(1e6, 1e9, 9) for ratio in (5, 10, 20, 40, 80)]
    rows = [{"N": N, "D": D, "loss": planted_loss(N, D) * np.exp(rng.normal(0, 0.0005))} for N, D in cells]
    source = write(tmp_path / "runs.csv", rows)
    assert cli.main(["fit", str(source), "--form=auto", "--bootstrap=100", f"--json={tmp_path}/a.json"]) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    (sentence,) = [note for note in kept["notes"] if note.startswith("chosen by held-out error: ")]
    assert sentence.startswith(f"chosen by held-out error: {kept['law']}, ") and "less than" in sentence
    assert sentence in said and "--form=auto" in said
    assert cli.main(["fit", str(source), "--form=auto", "--fixed=E=1.5"]) == 2
    assert "name a form" in capsys.readouterr().err


def test_json_on_standard_output_is_json_alone(tmp_path, runs, capsys):
    source, flags = as_tracker(tmp_path, runs)
    assert cli.main(["fit", str(source), *flags, "--bootstrap=100", "--json=-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["law"] == "chinchilla" and err == "left out: lost: State is crashed\n"


@pytest.mark.parametrize("form", [as_csv, as_events])
def test_fit_starts_at_once_and_needs_no_jax(tmp_path, runs, form):
    """CPU seconds, so that other work on the machine does not count."""
    source, flags = form(tmp_path, runs)
    before = os.times()
    line = [sys.executable, "-c", NO_JAX, "fit", str(source), *flags, "--bootstrap=100"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "chinchilla: " in done.stdout
    assert (after.children_user - before.children_user) + (after.children_system - before.children_system) < 2.0


# ---- what cannot be fitted ------------------------------------------------------------------------------------------


def break_few(rows):
    return rows[:5], [], ("5 points", "at least")


def break_one_size(rows):
    return [{**row, "N": 1e6} for row in rows], [], ("degenerate design", "1 distinct N", "add runs")


def break_line(rows):
    return [{**row, "D": 20 * row["N"]} for row in rows[::3]], [], ("degenerate design",)


def break_nan(rows):
    rows[4]["loss"] = "nan"
    return rows, [], ("row 5", "loss is 'nan'", "--where", "status=col")


def break_negative(rows):
    rows[4]["loss"] = -2.0
    return rows, [], ("row 5", "loss is '-2.0'", "not a positive")


def break_column(rows):
    return rows, ["--columns=N=N,D=D,loss=los"], ("no column 'los'", "did you mean 'loss'", "it has N, D, loss")


def break_name(rows):
    return rows, ["--columns=N=N,D=D,Loss=loss"], ("'Loss'", "did you mean 'loss'")


def break_missing(rows):
    return [{"N": r["N"], "T": r["D"], "loss": r["loss"]} for r in rows], [], ("which column is D", "--columns=")


def break_conventions(rows):
    rows = [{**row, "tokenizer": "gpt2" if i % 2 else "bpe"} for i, row in enumerate(rows)]
    return rows, [], ("tokenizers", "bpe, gpt2", "--mix=tokenizer")


def break_where(rows):
    return rows, ["--where=n<3"], ("no column 'n'", "did you mean 'N'")


def break_mix(rows):
    return rows, ["--mix=tokenizers"], ("'tokenizers'", "did you mean 'tokenizer'")


def break_rows(rows):
    return rows, ["--rows=best"], ("'best'", "last, all, min")


def break_input(rows):
    return rows, ["--form=data_constrained"], ("which column is U",)


BROKEN = [break_few, break_one_size, break_line, break_nan, break_negative, break_column, break_name, break_missing,
          break_conventions, break_where, break_mix, break_rows, break_input]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_be_fitted_is_one_line_that_helps(tmp_path, runs, broken, capsys):
    rows, flags, said = broken([{k: run[k] for k in ("N", "D", "loss")} for run in runs])
    assert cli.main(["fit", str(write(tmp_path / "runs.csv", rows)), "--bootstrap=100", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    for part in said:
        assert part in err, err


def test_a_mixture_that_is_told_is_fitted_and_written_down(tmp_path, runs):
    rows = [{k: run[k] for k in ("N", "D", "loss")} | {"tokenizer": run["id"][:2]} for run in runs]
    made = fitted(write(tmp_path / "runs.csv", rows), ["--mix=tokenizer"])
    assert made["conventions"]["tokenizer"] == "mixed: n0, n1, n2, n3"
    assert any("--mix=tokenizer" in note for note in made["notes"])


def test_columns_of_a_study_and_a_study_beside_a_table(tmp_path, runs, capsys):
    study = write_study(tmp_path / "study")
    for line, said in (
        ([str(study), "--columns=N=N,D=D,loss=loss"], "every source is a study folder"),
        ([str(study), str(as_csv(tmp_path, runs)[0])], "ways of counting N: non_embedding, unknown (column N)"),
        ([str(study), "--join=runs.csv"], "must read FILE:COLUMN"),
        ([str(study), "--where=widht=64"], "did you mean 'width'"),
    ):
        assert cli.main(["fit", *line]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["fit", str(study), "--bootstrap=100", "--where=width>=96"]) == 0
    assert "not width>=96 (--where)" in capsys.readouterr().out


# ---- several families -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "study"
    return write_study(folder, mixture=((64, 96, 128, 192), (10, 20, 40)), leverage=2.0, mishaps=False)


def test_families_are_fitted_each_alone_and_compared(two_families, tmp_path, capsys):
    line = ["fit", str(two_families), "--bootstrap=100"]
    assert cli.main([*line, f"--json={tmp_path}/fit.json"]) == 0
    said = capsys.readouterr().out
    dense, moe = (json.loads((tmp_path / name).read_text()) for name in ("fit.json", "fit-moe.json"))
    assert (dense["conventions"]["family"], moe["conventions"]["family"]) == ("dense", "moe")
    assert dense["conventions"]["n_convention"] == moe["conventions"]["n_convention"] == "active_non_embedding"
    assert {p["N"] for p in moe["points"]} < {p["N"] for p in dense["points"]}
    for part in (
        "family dense\nchinchilla",
        "family moe\nchinchilla",
        "leverage of moe over dense",
        "by pairs of runs",
    ):
        assert part in said, part
    rows = said[said.index("by the fitted laws") :].splitlines()[2:6]
    assert all(1.7 < float(row.split()[2].rstrip("×")) < 2.4 for row in rows), rows
    # The dense family alone is the same fit; of the mixture alone N counts what the user says.
    assert cli.main([*line, "--family=dense", "--json=-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["conventions"]["n_convention"] == "non_embedding"
    assert all(alone[name] == dense[name] for name in ("theta", "draws", "points", "parameters"))
    assert cli.main([*line, "--family=moe", "--n=active_non_embedding", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["theta"] == moe["theta"]


def test_a_family_in_a_folder_of_its_own_is_compared_the_same(two_families, tmp_path, capsys):
    """Two sources, one family each; and the same runs as a table with a family column."""
    listing = json.loads((two_families / "study.json").read_text())
    folders = {}
    for family in ("dense", "moe"):
        folders[family] = tmp_path / family
        shutil.copytree(two_families, folders[family])
        mine = [run for run in listing["runs"] if (run["tags"].get("family") == "moe") == (family == "moe")]
        (folders[family] / "study.json").write_text(json.dumps({**listing, "runs": mine}))
    outputs = []
    for sources in ([two_families], [folders["moe"], folders["dense"]]):
        assert cli.main(["fit", *map(str, sources), "--bootstrap=100"]) == 0
        said = capsys.readouterr().out
        outputs.append(said[said.index("leverage of moe") : said.index("command:")])
    assert outputs[0] == outputs[1]
    rows = [p._asdict() for p in families.load([two_families]).points]
    kept = ("run_id", "family", "N", "D", "C", "loss", "tokenizer", "corpus")
    table = write(tmp_path / "runs.csv", [{name: row[name] for name in kept} for row in rows])
    assert cli.main(["fit", str(table), "--bootstrap=100"]) == 0
    said = capsys.readouterr().out
    assert "leverage of moe over dense" in said and "n: unknown (column N)" in said


def test_what_several_families_cannot_be_asked_is_one_line(two_families, tmp_path, capsys):
    few = ["fit", str(two_families), "--bootstrap=100", "--where=width=64", "--where=tokens_per_param<=10"]
    assert cli.main(few) == 2
    out, err = capsys.readouterr()
    assert out == "" and "dense: 1 points" in err and "moe: 1 points" in err


def test_few_runs_without_laws_still_show_their_pairs(two_families, capsys):
    assert cli.main(["fit", str(two_families), "--bootstrap=100", "--where=width=64"]) == 0
    said = capsys.readouterr().out
    assert "family dense: no fit: " in said and "by the fitted laws: not here: dense has no law" in said
    assert "by pairs of runs, no law\n" in said


def test_the_report_of_tables_with_families_sets_them_beside_each_other(two_families, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda figure, path: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    line = ["fit", str(two_families), str(two_families), "--bootstrap=100", f"--report={tmp_path}/page.html"]
    assert cli.main(line) == 0
    assert "Families on one compute axis" in (tmp_path / "page.html").read_text()
