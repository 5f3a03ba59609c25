"""Tables of other people: column maps with units, curves, a tracker's wide and long exports, joins, statuses."""

import csv
import json
import math

import numpy as np
import pytest
from planted_study import planted_loss

from slmjax.scaling.points import load_points

PLAIN = {"N": "N", "D": "D", "loss": "loss"}


def write(path, rows):
    """Rows of dictionaries as CSV, TSV or JSONL, by the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="") as file:
        headers = list(dict.fromkeys(header for row in rows for header in row))
        writer = csv.DictWriter(file, headers, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def design(seed, num=8):
    """Runs of planted losses, no two alike."""
    rng = np.random.default_rng(seed)
    pairs = zip(rng.uniform(1e7, 1e9, num).tolist(), rng.uniform(1e9, 1e11, num).tolist(), strict=True)
    return [{"run": f"r{i}", "N": N, "D": D, "loss": planted_loss(N, D)} for i, (N, D) in enumerate(pairs)]


def numbers(point_set):
    return [(p.N, p.D, p.loss) for p in point_set.points]


def expected(runs):
    return [(run["N"], run["D"], run["loss"]) for run in runs]


def reasons(point_set):
    return {e.run_id: e.reason for e in point_set.excluded}


# ---- expressions and units ------------------------------------------------------------------------------------------


def test_products_of_columns_and_numbers(tmp_path):
    rows = [{"size_m": 10 + i, "it": 100 + i, "bs": 8, "D/N": 20.0, "a*b": 5.0, "loss": 3.0 + i} for i in range(3)]
    path = write(tmp_path / "a.csv", rows)
    steps = load_points([path], {"N": "size_m*1e6", "D": "it * bs * 2048", "C": "2*it", "loss": "loss"})
    assert [(p.N, p.D, p.C) for p in steps.points] == [
        ((10 + i) * 1e6, (100 + i) * 8 * 2048, 2 * (100 + i)) for i in range(3)
    ]
    # A header that is the whole text, or a whole factor, is that column, whatever signs it holds.
    ratio = load_points([path], {"N": "a*b", "D": "size_m*D/N", "loss": "loss"})
    assert [(p.N, p.D) for p in ratio.points] == [(5.0, 20.0 * (10 + i)) for i in range(3)]
    said = load_points(
        [write(tmp_path / "b.csv", [{"N": 1e8, "D": 1e9, "val:bits": 3.0}])], {**PLAIN, "loss": "val:bits"}
    )
    assert said.points[0].loss == 3.0  # a name is no unit


def test_a_loss_in_bits_is_the_same_loss(tmp_path, seed):
    runs = design(seed)
    bits = [{**run, "loss": run["loss"] / math.log(2), "err": 0.01 / math.log(2)} for run in runs]
    per_byte = [{**run, "bpb": run["loss"] / math.log(2) / 3.7} for run in runs]
    in_bits = load_points([write(tmp_path / "b.csv", bits)], {**PLAIN, "loss": "loss:bits", "se": "err:bits"})
    by_token = load_points([write(tmp_path / "c.csv", per_byte)], {**PLAIN, "loss": "bpb*3.7:bits"})
    by_byte = load_points([tmp_path / "c.csv"], {**PLAIN, "loss": "bpb:bits_per_byte"})
    for loaded in (in_bits, by_token):
        np.testing.assert_allclose(numbers(loaded), expected(runs), rtol=1e-14)
        assert loaded.conventions()["loss_unit"] == "nats per token"
    np.testing.assert_allclose([p.se for p in in_bits.points], 0.01, rtol=1e-14)
    gap = write(tmp_path / "d.csv", [{**row, "err": "" if row["run"] == "r1" else row["err"]} for row in bits])
    ses = {p.run_id: p.se for p in load_points([gap], {**PLAIN, "se": "err", "run_id": "run"}).points}
    assert [run_id for run_id, se in ses.items() if se is None] == ["r1"]
    assert [p.loss for p in by_byte.points] == [row["bpb"] for row in per_byte]
    assert by_byte.conventions()["loss_unit"] == "bits per byte"


def test_only_a_loss_relative_to_a_unigram_model_may_be_negative(tmp_path):
    path = write(tmp_path / "a.csv", [{"N": 1e8, "D": 1e9, "loss": -1.5}])
    with pytest.raises(ValueError, match=r"row 1: loss is '-1.5'.*unigram_normalized"):
        load_points([path], PLAIN)
    loaded = load_points([path], {**PLAIN, "loss": "loss:unigram_normalized"})
    assert [p.loss for p in loaded.points] == [-1.5] and "unigram" in loaded.conventions()["loss_unit"]


def test_inputs_of_a_law_and_what_it_does_not_read(tmp_path):
    rows = [{"dense": 1e8, "num_experts": 8, "unique_tokens": 2e9, "tok": 1e10, "flops": 6e18, "L": 3.0}]
    path = write(tmp_path / "a.csv", rows)
    (p,) = load_points([path], {"N": "dense", "D": "tok", "E": "num_experts", "U": "unique_tokens", "loss": "L"}).points
    assert (p.inputs, p.value("E"), p.epochs) == ({"E": 8.0, "U": 2e9}, 8.0, 5.0)
    (p,) = load_points([path], {"N": "dense", "E": "num_experts", "loss": "L"}, reads=("N", "E")).points
    assert (p.D, p.C, p.flops_convention) == (None, None, "not given")
    (p,) = load_points([path], {"C": "flops", "loss": "L"}, reads=("C",)).points
    assert (p.N, p.C) == (None, 6e18)
    (p,) = load_points([path], {"N": "dense", "D": "tok", "loss": "L"}, reads=("C",)).points
    assert p.C == 6 * 1e8 * 1e10
    with pytest.raises(ValueError, match="which column is E"):
        load_points([path], {"N": "dense", "D": "tok", "loss": "L"}, reads=("N", "E"))
    with pytest.raises(ValueError, match="which column is C"):
        load_points([path], {"N": "dense", "loss": "L"}, reads=("C",))


def test_repeated_data_is_flagged_by_epochs_or_unique_tokens(tmp_path):
    rows = [{"N": 1e8, "D": d, "loss": 3.0, "unique_tokens": 1e9, "passes": d / 1e9} for d in (1e9, 4e9, 2.5e9)]
    path = write(tmp_path / "a.csv", rows)
    for columns in (None, {**PLAIN, "U": "unique_tokens"}, {**PLAIN, "epochs": "passes"}):
        loaded = load_points([path], columns)
        assert [p.epochs for p in loaded.points] == [1.0, 4.0, 2.5]
        assert any("2 of 3 runs repeat data (up to 4 epochs)" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"N": "parms"}, "no column 'parms'; did you mean 'params'"),
        ({"N": "params*1e6x"}, "no column '1e6x'"),
        ({"N": "1e8"}, r"N=1e8: names no column; write N=column"),
        ({"N": "params*-1"}, "scaled by a number that is not positive"),
        ({"N": "params*nan"}, "scaled by a number that is not positive"),
        ({"N": "params:bits"}, "only loss and se have units"),
        ({"loss": "val:bit"}, "'bit' in 'val:bit' is no unit of loss; units are nats, bits"),
        ({"loss": "val:bits", "se": "err"}, "different units"),
        ({"Loss": "val"}, "'Loss' is not one of .*did you mean 'loss'"),
        ({"tokeniser": "val"}, "did you mean 'tokenizer'"),
        ({"two words": "val"}, "'two words' is not one of"),
        ({"status": "stat"}, "no column 'stat'"),
        ({"step": "tok"}, "no column says which run; map run_id=col, or run_id=file"),
    ],
)
def test_nonsense_in_a_map_is_refused_with_the_way_out(tmp_path, columns, said):
    path = write(tmp_path / "a.csv", [{"params": 1e8, "tok": 1e9, "val": 3.0, "err": 0.01}])
    with pytest.raises(ValueError, match=said):
        load_points([path], {"N": "params", "D": "tok", "loss": "val", **columns})


# ---- conventions ----------------------------------------------------------------------------------------------------


def test_a_table_says_nothing_of_its_conventions_unless_told(tmp_path, seed):
    path = write(tmp_path / "a.csv", [{**run, "flops": 1e18} for run in design(seed)])
    columns = {**PLAIN, "C": "flops"}
    unknown = load_points([path], columns).conventions()
    assert (unknown["n_convention"], unknown["flops_convention"]) == ("unknown (column N)", "unknown (column flops)")
    told = load_points([path], columns, n="total", flops="without_head").conventions()
    assert (told["n_convention"], told["flops_convention"]) == ("total", "without_head")
    with pytest.raises(ValueError, match="no column is C"):
        load_points([path], PLAIN, flops="with_head")


@pytest.mark.parametrize(("name", "values"), [("tokenizer", "ab"), ("corpus", "ab"), ("loss_kind", ("exact", "bound"))])
def test_columns_carry_what_must_not_be_mixed(tmp_path, seed, name, values):
    path = write(tmp_path / "a.csv", [{**run, "which": values[i % 2]} for i, run in enumerate(design(seed))])
    with pytest.raises(ValueError, match=f"{'bound, exact' if name == 'loss_kind' else 'a, b'}.*--mix={name}"):
        load_points([path], {**PLAIN, name: "which"}).require_comparable()
    one = load_points([path], {**PLAIN, name: "which"}, where=[f"which={values[1]}"])
    assert one.conventions()[name] == values[1] and len(one) == 4


def test_a_kind_of_loss_is_one_of_two(tmp_path):
    path = write(tmp_path / "a.csv", [{"N": 1e8, "D": 1e9, "loss": 3.0, "kind": "elbo"}])
    with pytest.raises(ValueError, match="'elbo', and a loss is exact or a bound"):
        load_points([path], {**PLAIN, "loss_kind": "kind"})


# ---- curves ---------------------------------------------------------------------------------------------------------


def curves(seed, num_steps=5):
    """Runs logged step by step, the loss noisy, so that the last is not the least."""
    rng = np.random.default_rng(seed)
    return [
        {"run": run["run"], "N": run["N"], "it": 10 * s, "loss": run["loss"] + rng.uniform(0.01, 1) / s}
        for run in design(seed)
        for s in range(1, num_steps + 1)
    ]


CURVE_MAP = {"N": "N", "D": "it*4096", "loss": "loss", "run_id": "run", "step": "it"}


def test_rows_of_curves(tmp_path, seed):
    rows = curves(seed)
    mixed_up = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    path = write(tmp_path / "a.csv", mixed_up)
    last, least, every = (load_points([path], CURVE_MAP, rows=r) for r in ("last", "min", "all"))
    by_run = {run: [row for row in rows if row["run"] == run] for run in {row["run"] for row in rows}}
    assert {p.run_id: p.loss for p in last.points} == {run: of[-1]["loss"] for run, of in by_run.items()}
    assert {p.run_id: p.loss for p in least.points} == {run: min(r["loss"] for r in of) for run, of in by_run.items()}
    assert {p.D for p in last.points} == {50 * 4096}
    assert sorted(p.loss for p in every.points) == sorted(row["loss"] for row in rows)
    for loaded, name in ((last, "last"), (least, "min"), (every, "all")):
        assert any("40 rows of 8 runs; " in note and f"--rows={name}" in note for note in loaded.notes)
    broken = [{**row, "loss": "nan"} if row["run"] == "r0" and row["it"] != 20 else row for row in rows]
    kept = {p.run_id: p.loss for p in load_points([write(tmp_path / "b.csv", broken)], CURVE_MAP, rows="min").points}
    assert kept["r0"] == by_run["r0"][1]["loss"]
    with pytest.raises(ValueError, match="loss is 'nan'"):
        load_points([tmp_path / "b.csv"], CURVE_MAP)
    by_tokens = load_points([path], {name: text for name, text in CURVE_MAP.items() if name != "step"})
    assert by_tokens.points == last.points
    with pytest.raises(ValueError, match="rows='first' is not one of last, all, min"):
        load_points([path], CURVE_MAP, rows="first")


def test_sparse_logs_are_brought_together(tmp_path, seed):
    """A config line first, then loss and tokens in lines of their own, one run a file."""
    runs, paths = design(seed), []
    for run in runs:
        rows = [{"config": {"n": run["N"], "lr": 0.1}, "status": "done"}]
        for step in (1, 2):
            rows += [{"it": step, "tok": run["D"] * step / 2}, {"it": step, "val": {"loss": run["loss"] * 3 - step}}]
            rows += [{"it": step, "val": {"loss": run["loss"] * (3 - step)}}]  # logged again: the later counts
        paths.append(write(tmp_path / f"{run['run']}.jsonl", rows))
    columns = {"N": "config.n", "D": "tok", "loss": "val.loss", "run_id": "file", "step": "it", "status": "status"}
    loaded = load_points(paths, columns, where=["config.lr=0.1"])
    assert numbers(loaded) == expected(runs) and not loaded.excluded
    assert [p.run_id for p in loaded.points] == [path.as_posix() for path in paths]
    # Tokens of one step are not those of another, however often they are given.
    gap = write(tmp_path / "gap.jsonl", [{"it": 1, "tok": 1e9}, {"it": 1, "l": 3.0, "N": 1e8}, {"it": 2, "l": 2.9}])
    with pytest.raises(ValueError, match="tok is '', not a positive finite number"):
        load_points([gap], {"N": "N", "D": "tok", "loss": "l", "run_id": "file", "step": "it"})
    with pytest.raises(ValueError, match="tok is missing beside a loss"):
        load_points([gap], {"N": "N", "D": "tok", "loss": "l", "run_id": "file"})


def test_a_run_of_many_rows_without_a_loss_is_listed(tmp_path, seed):
    rows = curves(seed) + [{"run": "silent", "N": 1e8, "it": s, "loss": ""} for s in (1, 2)]
    loaded = load_points([write(tmp_path / "a.csv", rows)], CURVE_MAP)
    assert len(loaded) == 8 and reasons(loaded) == {"silent": "no row of it holds a loss"}


def test_a_cut_and_a_copied_row_are_told(tmp_path, seed):
    runs = design(seed)
    path = write(tmp_path / "a.jsonl", runs)
    path.write_text(path.read_text() + '{"run": "r9", "N": 1e')
    loaded = load_points([path], PLAIN)
    assert numbers(loaded) == expected(runs) and any("cut while it was written" in note for note in loaded.notes)
    copied = load_points([write(tmp_path / "b.csv", [*runs, runs[3]])], PLAIN)
    assert numbers(copied) == expected(runs)
    assert reasons(copied) == {"b:9": f"a copy of {tmp_path / 'b.csv'} row 4, cell by cell"}
    # The same numbers under another name are a run of their own: a replicate.
    again = load_points([write(tmp_path / "c.csv", [*runs, {**runs[3], "run": "again"}])], PLAIN)
    assert len(again) == 9 and not again.excluded


# ---- which runs -----------------------------------------------------------------------------------------------------


def test_conditions_cut_rows_and_runs(tmp_path, seed):
    path = write(tmp_path / "a.csv", [{**row, "opt": "adam" if row["run"] < "r6" else "sgd"} for row in curves(seed)])
    loaded = load_points([path], CURVE_MAP, where=["opt=adam", "it<=30"])
    assert {p.run_id for p in loaded.points} == {f"r{i}" for i in range(6)} and {p.D for p in loaded.points} == {
        30 * 4096
    }
    assert reasons(loaded) == dict.fromkeys(("r6", "r7"), "not opt=adam (--where)")
    assert any("--where=opt=adam --where=it<=30 leaves out 2 runs and 12 rows" in note for note in loaded.notes)
    # Names of the map work too, on what they stand for; a bad cell in a row left out does not matter.
    small = load_points([path], CURVE_MAP, where=["D<1e5", "C>0"])
    assert not small.points and set(reasons(small).values()) == {"not D<1e5 (--where)"}
    bad = write(tmp_path / "bad.csv", [*design(seed), {"run": "bad", "N": "?", "D": 1, "loss": "nan"}])
    assert len(load_points([bad], PLAIN, where=["run!=bad"])) == 8
    with pytest.raises(ValueError, match="no column 'optt'; did you mean 'opt'"):
        load_points([path], CURVE_MAP, where=["optt=adam"])


@pytest.mark.parametrize("word", ["crashed", "FAILED", "running", "Killed"])
def test_a_status_column_makes_unfinished_runs_excluded(tmp_path, seed, word):
    runs = [{**run, "State": "finished"} for run in design(seed)]
    runs[2] |= {"State": word, "loss": ""}
    runs[5] |= {"loss": "nan"}
    path = write(tmp_path / "a.csv", runs)
    loaded = load_points([path], {**PLAIN, "run_id": "run", "status": "State"})
    assert numbers(loaded) == expected([run for i, run in enumerate(runs) if i not in (2, 5)])
    assert reasons(loaded) == {"r2": f"State is {word}", "r5": "diverged: loss is nan"}
    with pytest.raises(ValueError, match=r"a\.csv row 3: loss is ''.*status=col"):
        load_points([path], PLAIN)
    runs[0]["State"] = "perhaps"
    with pytest.raises(ValueError, match=r"row 1: State is 'perhaps'.*--where=State="):
        load_points([write(path, runs)], {**PLAIN, "status": "State"})


def test_runs_short_of_their_planned_tokens_are_unfinished(tmp_path, seed):
    runs = [{**run, "goal": run["D"] / 1e9 * (1.002 if i else 2)} for i, run in enumerate(design(seed))]
    loaded = load_points([write(tmp_path / "a.csv", runs)], {**PLAIN, "run_id": "run", "planned": "goal*1e9"})
    assert len(loaded) == 7 and list(reasons(loaded)) == ["r0"] and "unfinished: " in reasons(loaded)["r0"]


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_a_wide_export_and_a_joined_table(tmp_path, seed):
    """W&B's chart export: Step, then `RUN - METRIC` with __MIN and __MAX; the configs come from the table of runs."""
    runs = design(seed)
    rows = []
    for step in (100, 200):
        row = {"Step": step, "Relative Time (Process)": 1.5}
        for run in runs:
            if run["run"] == "r1" and step == 200:
                continue  # a shorter run leaves empty cells
            loss = run["loss"] + (200 - step) / 1000
            row |= {f"{run['run']} - val/loss": loss, f"{run['run']} - val/loss__MIN": 0.0}
            row |= {f"{run['run']} - val/loss__MAX": 9.0}
        rows.append(row)
    wide = write(tmp_path / "chart.csv", rows)
    table = [{"Name": run["run"], "config": str({"n": run["N"], "per_step": run["D"] / 200})} for run in runs]
    table = write(tmp_path / "runs.csv", [row for row in table if row["Name"] != "r7"])
    columns = {"N": "config.n", "D": "Step*config.per_step", "loss": "val/loss"}
    loaded = load_points([wide], columns, join=(table, "Name"))
    found = {p.run_id: (p.N, p.D, p.loss) for p in loaded.points}
    whole = {run["run"]: run for run in runs if run["run"] not in ("r1", "r7")}
    for run_id, run in whole.items():
        np.testing.assert_allclose(found[run_id], (run["N"], run["D"], run["loss"]), rtol=1e-14)
    assert found["r1"][2] == runs[1]["loss"] + 0.1
    assert reasons(loaded) == {"r7": f"not in {table}"}
    with pytest.raises(ValueError, match="no column 'Nam'; did you mean 'Name'"):
        load_points([wide], columns, join=(table, "Nam"))
    write(tmp_path / "twice.csv", [{"Name": "r1", "n": 1}, {"Name": "r1", "n": 2}])
    with pytest.raises(ValueError, match="a second row with Name 'r1'"):
        load_points([wide], columns, join=(tmp_path / "twice.csv", "Name"))


def test_a_wide_export_is_refused_where_it_is_ambiguous(tmp_path):
    (tmp_path / "a.csv").write_text("Step,a - loss,a - loss\n1,3,2\n")
    with pytest.raises(ValueError, match="twice: two runs have one name"):
        load_points([tmp_path / "a.csv"], {"N": "Step", "D": "Step", "loss": "loss"})
    (tmp_path / "b.csv").write_text("Step,a - x - loss\n1,3\n")
    with pytest.raises(ValueError, match="may be 'loss' or 'x - loss' of a run"):
        load_points([tmp_path / "b.csv"], {"N": "x - loss", "D": "Step", "loss": "loss"})


def test_a_long_table(tmp_path, seed):
    """One row per run, step and metric, as MLflow keeps them; parameters without a step of their own hold for all."""
    runs, rows = design(seed), []
    for run in runs:
        rows.append({"run_uuid": run["run"], "step": 0, "key": "n", "value": run["N"]})
        for step in (1, 2):
            rows.append({"run_uuid": run["run"], "step": step, "key": "tok", "value": run["D"] * step / 2})
            rows.append({"run_uuid": run["run"], "step": step, "key": "loss", "value": run["loss"] + (2 - step)})
    path = write(tmp_path / "a.csv", rows)
    columns = {"N": "n", "D": "tok", "loss": "loss", "metric": "key", "value": "value", "run_id": "run_uuid"}
    assert numbers(load_points([path], columns)) == expected(runs)
    unstepped = write(tmp_path / "b.csv", [{k: v for k, v in row.items() if k != "step"} for row in rows])
    with pytest.raises(ValueError, match=r"run r0 has several values of .*; map the step too"):
        load_points([unstepped], columns)
    with pytest.raises(ValueError, match="run_id is missing"):
        load_points([path], {name: text for name, text in columns.items() if name != "run_id"})


def test_spreadsheets_of_other_countries(tmp_path, seed):
    runs = design(seed)
    plain = expected(runs)
    text = write(tmp_path / "a.csv", runs).read_text()
    (tmp_path / "b.csv").write_text("\ufeff" + text.replace(",", ";"), encoding="utf-8")
    for path in (write(tmp_path / "a.tsv", runs), tmp_path / "b.csv"):
        columns = {"run_id": "run", "N": "N", "D": "D", "loss": "loss"}
        assert numbers(load_points([path], columns)) == plain
    (tmp_path / "c.csv").write_text(text + "r9,1,234,567,8\n")
    with pytest.raises(ValueError, match="row 9: 5 cells under a header of 4"):
        load_points([tmp_path / "c.csv"])
    (tmp_path / "d.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"row 1 is .1, 2., not an object"):
        load_points([tmp_path / "d.jsonl"])
    (tmp_path / "e.csv").write_text("N,N,D,loss\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"'N' stands in the header of .* twice"):
        load_points([tmp_path / "e.csv"])


# ---- several sources ------------------------------------------------------------------------------------------------


def test_runs_of_two_files_with_one_name_stay_apart(tmp_path, seed):
    """A bootstrap knows runs by their ids: unrelated runs must not share one, and a file given twice counts once."""
    runs = design(seed)
    paths = []
    for name, part in (("a", runs[:4]), ("b", runs[4:])):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "runs.csv", part))
    loaded = load_points(paths, PLAIN)
    assert numbers(loaded) == expected(runs) and len({p.run_id for p in loaded.points}) == 8
    twice = load_points([paths[0], paths[0]], PLAIN)
    assert numbers(twice) == expected(runs[:4]) and all("already read from" in r for r in reasons(twice).values())
    write(paths[1], [{**run, "run": f"r{i}"} for i, run in enumerate(runs[4:])])
    shared = load_points(paths, {**PLAIN, "run_id": "run"})
    assert len(shared) == 8 and any("for one run because sources give them one id: r0, r1" in n for n in shared.notes)


def test_headers_that_say_what_they_hold_and_those_that_say_it_twice(tmp_path):
    row = {"params": 1e8, "tokens": 1e9, "loss": 3.0, "step": 7, "E": 8}
    path = write(tmp_path / "a.csv", [row])
    assert load_points([path]).points[0].inputs == {}
    assert load_points([path], reads=("N", "E")).points[0].inputs == {"E": 8.0}
    with pytest.raises(ValueError, match="'params' and 'N' may both be N; say which"):
        load_points([write(path, [{**row, "N": 2e8}])])


def test_the_summary_of_a_diverged_run_as_python_prints_it(tmp_path, seed):
    runs = design(seed)
    rows = [{"Name": r["run"], "State": "finished", "summary": str({"loss": r["loss"], "n": r["N"]}), "D": r["D"]}
            for r in runs]  # fmt: skip
    rows[2]["summary"] = str({"loss": math.nan, "n": runs[2]["N"], "low": -math.inf})
    columns = {"N": "summary.n", "D": "D", "loss": "summary.loss", "status": "State", "run_id": "Name"}
    loaded = load_points([write(tmp_path / "a.csv", rows)], columns)
    assert numbers(loaded) == expected(runs[:2] + runs[3:])
    assert reasons(loaded) == {"r2": "diverged: summary.loss is nan"}


def test_a_file_that_is_no_text_is_refused(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes("N,D,loss\n1,2,3\n".encode("utf-16"))
        with pytest.raises(ValueError, match=f"{name}: not a table in UTF-8"):
            load_points([tmp_path / name])


def test_public_tables_through_maps(scaling_data):
    """The row counts their papers fit: 240 of Chinchilla, 1,054 of Tao et al., 53 S-BASE runs of Clark et al."""
    chinchilla = load_points([scaling_data / "chinchilla_epoch.csv"]).drop_highest(5)
    assert len(chinchilla) == 240 and len(chinchilla.excluded) == 5
    columns = {"N": "Non_vocab_parameters", "V": "vocab_size", "d": "embed_dim", "H": "num_characters", "C": "FLOPs"}
    columns["loss"] = "Lossu:unigram_normalized"
    tao = load_points(
        [scaling_data / "vocab_tao2024.csv"], columns, reads=("N", "V", "d", "H"), where=["FLOPs>=2.18e17"]
    )
    assert len(tao) == 1054 and len(tao.excluded) == 146
    columns = {"N": "dense_parameter_count", "E": "num_experts", "loss": "loss_validation"}
    where = ["router_type=S-Base", "k=1", "routing_frequency=0.5"]
    clark = [scaling_data / "routing_clark2022_dense_sbase_rlr.csv"]
    assert len(load_points(clark, columns, reads=("N", "E"), where=where)) == 53
    columns = {"N": "N", "D": "bs*ti*2048", "loss": "smooth loss"}
    steps = load_points([scaling_data / "steplaw_dense.csv"], columns)
    tokens = load_points([scaling_data / "steplaw_dense.csv"], columns | {"D": "D"})
    assert all(abs(p.D / q.D - 1) < 0.01 for p, q in zip(steps.points, tokens.points, strict=True))
