"""Points: what becomes one, what is left out and why, and what a table file must say."""

import json

import numpy as np
import pytest
from planted_study import planted_loss, shape, write_run, write_study

from slmjax import records
from slmjax.scaling.points import MIXABLE, Condition, Point, PointSet, load_points, load_runs

ROWS = [(1e8, 2e9, 3.1), (2e8, 2e9, 2.9), (4e8, 8e9, 2.6)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), widths=(64, 96), ratios=(10, 20), noise=0.0)


def test_only_finished_annealed_runs_become_points(study):
    loaded = load_points([study])
    assert {p.run_id for p in loaded.points} == {
        "w0064r010", "w0064r020", "w0096r010", "w0096r020", "repeated", "resumed",
    }  # fmt: skip
    reasons = {e.run_id: e.reason for e in loaded.excluded}
    assert reasons == {
        "trunk0064": "stable phase: a trunk, not annealed",
        "trunk0096": "stable phase: a trunk, not annealed",
        "diverged": "diverged: loss is nan at step 200",
        "preempted": "preempted",
        "running": f"unfinished: at step {load_runs(study)[8].train[-1]['step']} of 400",
        "waiting": "not started",
    }


def test_a_point_says_what_its_numbers_are(study):
    p = next(p for p in load_points([study]).points if p.run_id == "w0096r020")
    N, flops_per_token = shape(96)
    assert (N, flops_per_token * p.D) == (p.N, p.C) and p.D >= 20 * N
    assert p.loss == pytest.approx(planted_loss(N, p.D), rel=1e-12) and p.se == 0.004
    assert (p.n_convention, p.flops_convention, p.loss_kind, p.family) == (
        "non_embedding",
        "with_head",
        "exact",
        "dense",
    )
    assert p.tags == {"width": 96, "tokens_per_param": 20} and p.tokenizer and p.corpus
    other = next(p for p in load_points([study], n="total", flops="without_head").points if p.run_id == "w0096r020")
    assert other.N == N + 2048 * 96 and other.C == 6 * N * p.D
    assert (other.n_convention, other.flops_convention) == ("total", "without_head")


def test_a_trunk_is_known_by_its_branches_even_without_its_tag(study, tmp_path):
    rng = np.random.default_rng(0)
    write_run(tmp_path / "a", 64, 0, 100, rng, 0.0, schedule="constant", phase="stable")
    write_run(tmp_path / "b", 64, 80, 120, rng, 0.0, parent="a")
    write_run(tmp_path / "c", 64, 0, 100, rng, 0.0, schedule="constant", phase="stable")
    runs = [{"run_id": r, "tags": {}, "parent": "a" if r == "b" else None, "branch_step": None} for r in "abc"]
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "runs": runs}))
    loaded = load_points([tmp_path])
    assert [p.run_id for p in loaded.points] == ["b", "c"]  # c is a constant-rate run of its own
    assert [(e.run_id, e.reason) for e in loaded.excluded] == [("a", "stable phase: a trunk, not annealed")]


def test_later_attempt_replaces_what_it_trained_again(study):
    run = next(run for run in load_runs(study) if run.run_id == "resumed")
    steps = [line["step"] for line in run.train]
    assert run.num_attempts == 2 and run.status == "done"
    assert steps == sorted(set(steps)) and steps[0] < 400 < steps[-1]
    first_attempt = [json.loads(t) for t in (study / "resumed" / "attempt-000.jsonl").read_text().splitlines()]
    redone = {line["step"] for line in first_attempt if line["kind"] == "train" and line["step"] > 400}
    kept = {json.dumps(line) for line in run.train}
    assert redone and not any(json.dumps(line) in kept for line in first_attempt if line.get("step", 0) > 400)


def test_repeated_data_is_flagged_not_dropped(study):
    loaded = load_points([study])
    assert [p.epochs for p in loaded.points if p.run_id == "repeated"] == [2.5]
    assert any("1 of 6 runs repeat data (up to 2.5 epochs)" in note for note in loaded.notes)


def test_the_same_run_twice_counts_once(study):
    once, twice = load_points([study]), load_points([study, study])
    assert twice.points == once.points
    assert sum("already read" in e.reason for e in twice.excluded) == len(once)


def test_a_line_cut_by_a_kill_is_left_out_and_other_damage_refused(study, tmp_path):
    write_run(tmp_path / "a", 64, 0, 100, np.random.default_rng(0), 0.0)
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "runs": [{"run_id": "a"}]}))
    log = tmp_path / "a" / "attempt-000.jsonl"
    whole = log.read_text()
    log.write_text(whole.rsplit("\n", 2)[0] + '\n{"kind": "end", "sta')
    assert [e.reason.split(":")[0] for e in load_points([tmp_path]).excluded] == ["unfinished"]
    log.write_text(whole.replace('{"kind": "train"', "{kind", 1))
    with pytest.raises(ValueError, match=r"attempt-000\.jsonl:2"):
        load_points([tmp_path])


def test_a_run_that_failed_before_its_first_line_is_failed_not_unstarted(tmp_path):
    """A launcher that gave up leaves status.json; data that would not open leave an end without a start."""
    rng = np.random.default_rng(0)
    ids = ("refused", "bad_data", "relaunched", "queued", "redone")
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "runs": [{"run_id": r} for r in ids]}))
    failed = {"state": "failed", "reason": "ValueError: the mesh does not fit"}
    for run_id, said in (("refused", failed), ("queued", {"state": "queued"})):
        (tmp_path / run_id).mkdir()
        (tmp_path / run_id / "status.json").write_text(json.dumps(said))
    writer = records.RunWriter(tmp_path / "bad_data")
    writer.write("end", status="failed", step=0, reason="DataError: no such file")
    writer.status("failed", reason="DataError: no such file")
    write_run(tmp_path / "relaunched", 64, 0, 100, rng, 0.0, status="preempted")
    (tmp_path / "relaunched" / "status.json").write_text(json.dumps(failed))
    write_run(tmp_path / "redone", 64, 0, 100, rng, 0.0, status=None)
    write_run(tmp_path / "redone", 64, 0, 100, rng, 0.0, attempt=1)
    # Trained and evaluated, and killed before its DONE: a relaunch that failed takes nothing away.
    (tmp_path / "redone" / "status.json").write_text(json.dumps(failed))
    loaded = load_points([tmp_path])
    assert [p.run_id for p in loaded.points] == ["redone"]
    assert {e.run_id: e.reason for e in loaded.excluded} == {
        "refused": "failed: ValueError: the mesh does not fit",
        "bad_data": "failed: DataError: no such file",
        "relaunched": "failed: ValueError: the mesh does not fit",
        "queued": "not started",
    }
    assert [run.status for run in load_runs(tmp_path)] == ["failed", "failed", "failed", "not started", "done"]


def write_table(path, header, rows=ROWS):
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")
    else:
        path.write_text("\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_tables_with_and_without_a_column_map(tmp_path, suffix):
    plain = load_points([write_table(tmp_path / f"a.{suffix}", ("params", "tokens", "loss"))])
    mapped = load_points(
        [write_table(tmp_path / f"b.{suffix}", ("size", "seen", "final"))], {"N": "size", "D": "seen", "loss": "final"}
    )
    for loaded in (plain, mapped):
        assert [(p.N, p.D, p.loss) for p in loaded.points] == ROWS
        assert [p.C for p in loaded.points] == [6 * N * D for N, D, _ in ROWS]
        assert any("C = 6 N D" in note for note in loaded.notes)
    assert {p.flops_convention for p in plain.points} == {"6ND"}
    with_flops = write_table(
        tmp_path / f"c.{suffix}", ("N", "D", "loss", "flops", "who"), [(*r, 1e18, "x") for r in ROWS]
    )
    loaded = load_points([with_flops])
    assert [p.C for p in loaded.points] == [1e18] * 3 and not loaded.notes
    columns = {"N": "N", "D": "D", "loss": "loss", "run_id": "who"}
    assert {p.run_id for p in load_points([with_flops], columns).points} == {"x"}


@pytest.mark.parametrize(
    ("header", "columns", "said"),
    [
        (("params", "tokens", "perplexity"), None, r"which column is loss\? It has params, tokens, perplexity"),
        (("a", "b", "c"), {"N": "a", "D": "b", "loss": "d"}, "no column 'd'; it has a, b, c"),
        (("a", "b", "c"), {"N": "a", "D": "b", "Loss": "c"}, "'Loss' is not one of N, D, loss"),
    ],
)
def test_unknown_columns_are_refused(tmp_path, header, columns, said):
    with pytest.raises(ValueError, match=said):
        load_points([write_table(tmp_path / "runs.csv", header)], columns)


@pytest.mark.parametrize("bad", ["nan", "-1", "0", "inf", "", "n/a"])
def test_impossible_values_are_refused_with_their_row(tmp_path, bad):
    rows = [*ROWS, (1e8, 1e9, bad)]
    with pytest.raises(ValueError, match=r"runs.csv row 4: loss is '.*', not a positive finite number"):
        load_points([write_table(tmp_path / "runs.csv", ("N", "D", "loss"), rows)])


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty.csv").write_text("N,D,loss\n")
    (tmp_path / "runs.xlsx").write_text("")
    for source, said in (
        (tmp_path, "study.json"),
        (tmp_path / "missing.csv", "does not exist"),
        (tmp_path / "runs.xlsx", "not a study folder"),
        (tmp_path / "empty.csv", "no rows"),
    ):
        with pytest.raises(ValueError, match=said):
            load_points([source])
    with pytest.raises(ValueError, match="non_embedding"):
        load_points([], n="params")


def test_study_and_table_do_not_mix(study, tmp_path):
    table = write_table(tmp_path / "runs.csv", ("N", "D", "loss"))
    with pytest.raises(ValueError, match=r"ways of counting N: non_embedding, unknown \(column N\)"):
        load_points([study, table]).require_comparable()


def test_only_one_family(study):
    loaded = load_points([study])
    assert loaded.only("dense").points == loaded.points
    none = loaded.only("moe")
    assert not none.points and len(none.excluded) == len(loaded.excluded) + len(loaded)


# ---- which points ---------------------------------------------------------------------------------------------------


def made(num=6, **changes):
    points = (Point(f"r{i}", 1e8 * (i + 1), 1e9, 6e17, 3.0 - i / 10, tags={"lr": i % 2}) for i in range(num))
    return PointSet(tuple(p._replace(**{k: v[i % len(v)] for k, v in changes.items()}) for i, p in enumerate(points)))


def ids(point_set):
    return [p.run_id for p in point_set.points]


def test_whatever_leaves_the_points_stays_listed():
    """Filters one after another: kept and left out are always all of them, with the reason of the first."""
    everything = made()
    now = everything.where(Condition.parse("lr=0")).drop_highest(1).exclude({"r4": "typo in its log"})
    assert ids(now) == ["r2"]
    assert {e.run_id: e.reason for e in now.excluded} == {
        **dict.fromkeys(("r1", "r3", "r5"), "not lr=0 (--where)"),
        "r0": "one of the 1 highest losses (--drop_highest=1)",
        "r4": "typo in its log",
    }
    assert len(now.notes) == 3 and "r4: typo in its log" in now.notes[-1]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("N<3e8", [0, 1]),
        ("N<=300000000", [0, 1, 2]),
        ("N>3e8", [3, 4, 5]),
        ("N>=3e8", [2, 3, 4, 5]),
        ("lr != 1.0", [0, 2, 4]),
        ("run_id=r3", [3]),
        ("family=", [0, 1, 2, 3, 4, 5]),
        ("family=x", []),
        ("family<3", []),  # an empty cell is below nothing
    ],
)
def test_conditions_compare_numbers_as_numbers_and_the_rest_as_text(text, kept):
    assert ids(made().where(Condition.parse(text))) == [f"r{i}" for i in kept]


def test_filters_refuse_what_they_cannot_mean():
    for text, said in (("lr", "must read column=value"), ("N<many", "'many' is none"), ("=3", "must read")):
        with pytest.raises(ValueError, match=said):
            Condition.parse(text)
    with pytest.raises(ValueError, match="did you mean 'family'"):
        made().where(Condition.parse("famly=x"))
    with pytest.raises(ValueError, match="from 0 to the others"):
        made().drop_highest(6)
    with pytest.raises(ValueError, match="--exclude=r10"):
        made().exclude({"r10": "x"})
    with pytest.raises(ValueError, match="did you mean 'tokenizer'"):
        made().mix(["tokeniser"])


@pytest.mark.parametrize("name", MIXABLE)
def test_what_differs_is_mixed_only_when_told_and_then_recorded(name):
    differing = made(**{MIXABLE[name]: ("a", "b")})
    with pytest.raises(ValueError, match=f"mix .*: a, b; .*--mix={name}$"):
        differing.require_comparable()
    others = [other for other in MIXABLE if other != name]
    with pytest.raises(ValueError, match=f"--mix={name}"):
        differing.mix(others).require_comparable()
    told = differing.mix([name])
    assert told.conventions()[MIXABLE[name]] == "mixed: a, b"
    assert told.notes == (f"fitted together although they differ in {name}: a, b (--mix={name})",)
    assert not made().mix(list(MIXABLE)).notes  # nothing differs, nothing to say


def test_two_units_of_loss_never_mix():
    with pytest.raises(ValueError, match="units of loss: bits per byte, nats per token"):
        made(loss_unit=("nats per token", "bits per byte")).mix(list(MIXABLE)).require_comparable()
