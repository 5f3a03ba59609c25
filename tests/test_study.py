"""Studies combine axes, name every run by its config alone, and give branches the trunk they need."""

import itertools
import json
import random
import subprocess
import sys

import pytest
from tiny import tiny

from slmjax import config, ladder, records, study
from slmjax.config import ConfigError
from slmjax.launchers.plan import make_plan
from slmjax.study import Cell, Study, axis, branch, chain, product, upcycle, zipped

BASE = tiny({"train.steps": 100})
SIZES = axis("size", {"s": {"model.width": 16}, "m": {"model.width": 32, "model.num_layers": 4}})
RATES = axis("optim.lr", [1e-3, 1e-2])
SEEDS = axis("train.seed", [0, 1, 2])


def changes(cells):
    return [cell.changes for cell in cells]


def test_an_axis_has_a_cell_for_every_value():
    assert list(RATES) == [Cell({"optim.lr": 1e-3}, {"lr": 1e-3}), Cell({"optim.lr": 1e-2}, {"lr": 1e-2})]
    assert SIZES[1] == Cell({"model.width": 32, "model.num_layers": 4}, {"size": "m"})


def test_a_product_is_every_combination_the_last_varying_fastest():
    cells = product(SIZES, RATES, SEEDS)
    tags = [tuple(cell.tags.values()) for cell in cells]
    assert tags == list(itertools.product("sm", (1e-3, 1e-2), (0, 1, 2)))
    assert cells[-1].changes == {"model.width": 32, "model.num_layers": 4, "optim.lr": 1e-2, "train.seed": 2}
    assert product() == [Cell()]


def test_zipped_cells_go_together_and_chained_ones_after_each_other():
    assert changes(zipped(SIZES, RATES)) == [
        {"model.width": 16, "optim.lr": 1e-3},
        {"model.width": 32, "model.num_layers": 4, "optim.lr": 1e-2},
    ]
    assert chain(RATES, SEEDS) == [*RATES, *SEEDS]
    with pytest.raises(ConfigError, match=r"\[2, 3\] cells"):
        zipped(RATES, SEEDS)


LENGTHS = [100, 40, 60]


def branched(cells=RATES, **schedule):
    return Study("ladder", BASE, branch(cells, LENGTHS, **({"decay_fraction": 0.1} | schedule)))


def test_branches_share_one_trunk_that_is_saved_where_they_leave():
    runs = branched().runs
    assert len(runs) == 2 * (1 + 3)
    trunks = [run for run in runs if run.parent is None]
    for trunk, rate in zip(trunks, (1e-3, 1e-2), strict=True):
        branches = [run for run in runs if run.parent == trunk.run_id]
        assert [run.config.train.steps for run in branches] == [40, 60, 100]
        assert [run.branch_step for run in branches] == [36, 54, 90] == list(trunk.save_steps)
        assert trunk.config.train.steps == 90  # no longer than its last branch needs
        assert trunk.config.schedule.name == "constant" and trunk.config.optim.lr == rate
        assert trunk.tags == {"lr": rate, "role": "trunk"}
        for run in branches:
            assert runs.index(trunk) < runs.index(run)
            assert run.branch_step == run.first_step == config.decay_start(run.config)
            assert config.shared_steps(trunk.config, run.config) == run.branch_step
            assert run.tags == {"lr": rate, "steps": run.config.train.steps, "role": "branch"}
            assert run.program_id == trunk.program_id


def test_a_branch_is_the_uninterrupted_run_of_its_length():
    plain = Study("plain", BASE, [Cell({"schedule.name": "wsd", "schedule.decay_fraction": 0.1, "train.steps": 60})])
    assert plain.runs[0].run_id in {run.run_id for run in branched([Cell()]).runs}
    assert plain.runs[0].parent is None


def test_lengths_may_depend_on_the_cell():
    cells = branch(SIZES, lambda cell: [cell.changes["model.width"]], decay_steps=4)
    assert [cell.changes["train.steps"] for cell in cells] == [16, 32]


def test_decays_of_one_stable_phase_share_its_trunk_whatever_their_shape_and_mixture():
    cells = chain(
        branch([Cell()], [60], decay_fraction=0.1),
        branch([Cell({}, {"shape": "linear"})], [60], decay_fraction=0.1, decay_shape="linear"),
        branch([Cell({"data.decay_weights": (2.0,)}, {"mix": 2})], [60, 80], decay_fraction=0.25),
    )
    runs = Study("shapes", BASE, cells).runs
    [trunk] = [run for run in runs if run.parent is None]
    assert len(runs) == 5 and {run.parent for run in runs[1:]} == {trunk.run_id}
    assert trunk.save_steps == (45, 54, 60) and trunk.config.data.decay_weights == ()


def test_decays_of_another_stable_phase_have_a_trunk_of_their_own():
    for other in ({"train.seed": 1}, {"optim.lr": 0.5}, {"schedule.warmup_steps": 3}, {"data.weights": (2.0,)}):
        runs = Study("two", BASE, branch([Cell(), Cell(other, {"other": 1})], [60])).runs
        assert sum(run.parent is None for run in runs) == 2, other


def test_a_runs_identity_is_its_config_alone(seed):
    cells = chain(product(SIZES, RATES, SEEDS), branch(RATES, LENGTHS))
    runs = {run.run_id: run for run in Study("a", BASE, cells).runs}
    shuffled = random.Random(seed).sample(cells, len(cells))
    more = chain(axis("optim.b1", [0.1]), shuffled)
    again = {run.run_id: run for run in Study("another_name", BASE, more).runs}
    assert set(runs) < set(again) and len(again) == len(runs) + 1
    for run_id, run in runs.items():
        assert again[run_id].config == run.config and again[run_id].parent == run.parent
    relabelled = [Cell(cell.changes, {**cell.tags, "note": "x"}) for cell in cells]
    assert {run.run_id for run in Study("a", BASE, relabelled).runs} == set(runs)


@pytest.mark.parametrize("name", ["", "two words", "a,b", "../up", "-flag", "x" * 101])
def test_a_name_that_no_folder_or_job_could_have_is_refused(name):
    with pytest.raises(ConfigError, match="a study's name has letters"):
        Study(name, BASE, [Cell()])


def test_runs_are_in_the_order_of_the_study():
    assert [run.config.train.seed for run in Study("a", BASE, SEEDS[::-1]).runs] == [2, 1, 0]


def test_two_cells_that_are_one_run_are_refused():
    with pytest.raises(ConfigError, match=r"two cells are the same run .*'lr': 0.001.*'again': 1"):
        Study("twice", BASE, chain(RATES, [Cell({"optim.lr": 1e-3}, {"again": 1})])).runs  # noqa: B018
    with pytest.raises(ConfigError, match="the same run"):
        Study("mesh", BASE, axis("log.log_every", [1, 2])).runs  # noqa: B018
    with pytest.raises(ConfigError, match="the same run"):
        Study("lengths", BASE, branch([Cell()], [60, 60])).runs  # noqa: B018


@pytest.mark.parametrize(
    "cell, message",
    [
        ({"optim.lrr": 1.0}, "did you mean 'optim.lr'"),
        ({"optim.lr": float("nan")}, "optim.lr=nan"),
        ({"schedule.name": "wsd", "schedule.decay_steps": 101}, "schedule.decay_steps=101"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_when_the_study_is_planned(cell, message):
    with pytest.raises(ConfigError, match=message):
        Study("bad", BASE, [Cell(), Cell(cell)]).runs  # noqa: B018


def test_packs_are_the_runs_of_one_program():
    runs = Study("packs", BASE, chain(product(SIZES, RATES, SEEDS), branch(RATES, LENGTHS))).runs
    packs = study.packs(runs)
    assert sorted(run.run_id for pack in packs for run in pack) == sorted(run.run_id for run in runs)
    assert len(packs) == 2  # two shapes; rates, seeds, schedules and horizons are inputs
    for pack in packs:
        assert len({run.program_id for run in pack}) == 1
        assert [runs.index(run) for run in pack] == sorted(runs.index(run) for run in pack)


def test_a_trunk_and_its_branches_cost_the_sum_of_what_each_trains():
    runs = branched([Cell()]).runs
    trained = {run.config.train.steps: study.trained_tokens(run) for run in runs}
    assert trained == {90: 90 * 64, 40: 4 * 64, 60: 6 * 64, 100: 10 * 64}
    per_token = ladder.flops_per_token(BASE.model, 32, 16)["with_head"]
    assert sum(study.run_flops(run) for run in runs) == (90 + 4 + 6 + 10) * 64 * per_token
    whole = sum(ladder.train_flops(run.config) for run in runs if run.parent)
    assert sum(study.run_flops(run) for run in runs) < 0.6 * whole


def test_a_trunk_and_four_branches_cost_less_than_half_of_four_runs():
    runs = Study("four", BASE, branch([Cell()], [250, 500, 750, 1000], decay_fraction=0.1)).runs
    separate = sum(ladder.train_flops(run.config) for run in runs if run.parent)
    assert len(runs) == 5 and sum(study.run_flops(run) for run in runs) < 0.5 * separate


def test_study_json_says_what_a_report_needs(tmp_path):
    made = branched()
    folder = made.save(tmp_path)
    assert folder == tmp_path / "ladder"
    saved = records.read_json(folder / "study.json")
    assert saved == json.loads(json.dumps(made.to_json())) and saved["name"] == "ladder"
    assert [run["run_id"] for run in saved["runs"]] == [run.run_id for run in made.runs]
    assert saved["runs"][1] == {
        "run_id": made.runs[1].run_id, "tags": made.runs[1].tags, "parent": made.runs[0].run_id, "branch_step": 36
    }  # fmt: skip


# ---- dense trunk → experts ------------------------------------------------------------------------------------------

EXPERTS = Cell({"model.moe.num_experts": 4}, {"experts": 4})
MORE = Cell({"model.moe.num_experts": 8}, {"experts": 8})


def test_upcycled_cells_begin_from_the_stable_phase_of_their_own_config_without_experts():
    cells = product(SIZES, upcycle([EXPERTS, MORE], at=30, noise=0.1))
    runs = Study("up", BASE, cells).runs
    sources = [run for run in runs if run.parent is None]
    assert len(runs) == 2 + 4 and len(sources) == 2, "a dense run for each size, and experts share it"
    for source, (size, width) in zip(sources, (("s", 16), ("m", 32)), strict=True):
        cfg = source.config
        assert cfg.model.moe == config.MoeConfig() and cfg.start == config.StartConfig()
        assert (cfg.model.width, cfg.train.steps, cfg.schedule.name) == (width, 30, "constant")
        assert source.save_steps == (30,) and source.tags == {"size": size, "role": "trunk"}
        begun = [run for run in runs if run.parent == source.run_id]
        assert [run.tags for run in begun] == [{"size": size, "experts": 4}, {"size": size, "experts": 8}]
        for run in begun:
            assert run.config.start == config.StartConfig(source.run_id, 30, 0.1)
            assert run.branch_step == run.first_step == 30 and run.config.train.steps == 100
            assert runs.index(source) < runs.index(run)


def test_upcycled_cells_compose_with_branches_in_any_order_and_with_overrides_of_the_dense_run():
    one = branch(upcycle([EXPERTS], at=30, dense={"optim.lr": 0.5}), LENGTHS, decay_fraction=0.1)
    other = upcycle(branch([EXPERTS], LENGTHS, decay_fraction=0.1), at=lambda cell: 30, dense={"optim.lr": 0.5})
    runs = Study("up", BASE, one).runs
    assert runs == Study("up", BASE, other).runs
    source, trunk, *branches = runs
    assert source.config.optim.lr == 0.5 != trunk.config.optim.lr
    assert (trunk.parent, trunk.branch_step, trunk.save_steps) == (source.run_id, 30, (36, 54, 90))
    assert [(run.parent, run.branch_step) for run in branches] == [(trunk.run_id, step) for step in (36, 54, 90)]
    assert {run.config.start.run for run in (trunk, *branches)} == {source.run_id}
    assert len(study.packs(runs)) == 2  # one program dense, one with experts


def test_where_there_is_a_dense_trunk_its_beginning_costs_nothing():
    dense = branch([Cell({}, {"experts": 0})], LENGTHS, decay_fraction=0.1)
    sparse = chain(
        upcycle([EXPERTS], at=30), upcycle([MORE], at=90), upcycle([EXPERTS.merged(Cell({}, {"at": 20}))], at=20)
    )
    for cells in (chain(dense, sparse), chain(sparse, dense)):
        runs = Study("up", BASE, cells).runs
        by_id = {run.run_id: run for run in runs}
        [trunk] = [run for run in runs if run.parent is None]
        assert trunk.save_steps == (20, 30, 36, 54, 90) and trunk.tags == {"experts": 0, "role": "trunk"}
        begun = {run.config.start.step: run for run in runs if run.config.start.run}
        for step in (20, 30):
            source = by_id[begun[step].parent]
            assert (source.parent, source.branch_step, source.config.train.steps) == (trunk.run_id, step, step)
            assert study.run_flops(source) == 0
        assert begun[90].parent == trunk.run_id


def test_an_upcycled_runs_identity_does_not_change_with_what_else_is_in_the_study():
    alone = {run.run_id for run in Study("up", BASE, upcycle([EXPERTS], at=30)).runs}
    later = chain(branch([Cell()], [60, 100]), upcycle([EXPERTS], at=30), upcycle([MORE], at=50))
    assert alone < {run.run_id for run in Study("up", BASE, later).runs}


def test_an_upcycled_model_costs_its_dense_steps_and_its_own():
    runs = Study("up", BASE, branch(upcycle([EXPERTS], at=30), [60], decay_fraction=0.1)).runs
    source, _, leaf = runs
    dense, sparse = (ladder.flops_per_token(run.config.model, 32, 16)["with_head"] * 64 for run in (source, leaf))
    assert sparse > dense
    assert [study.run_flops(run) for run in runs] == [30 * dense, 24 * sparse, 6 * sparse]
    by_id = {run.run_id: run for run in runs}
    assert [study.total_flops(run, by_id) for run in runs] == [
        30 * dense, 30 * dense + 24 * sparse, 30 * dense + 30 * sparse
    ]  # fmt: skip
    plan = make_plan(Study("up", BASE, branch(upcycle([EXPERTS], at=30), [60], decay_fraction=0.1)))
    most = max(ladder.state_bytes(run.config)["total"] for run in Study("up", BASE, [EXPERTS]).runs)
    assert plan.most_state_bytes == most > ladder.state_bytes(BASE)["total"]
    assert plan.separate_flops == 30 * dense + 30 * sparse == plan.own_flops


@pytest.mark.parametrize(
    "cells, message",
    [
        (upcycle([Cell()], at=30), "model.moe.num_experts=0"),
        (upcycle([EXPERTS], at=100), "start.step=100 .*train.steps=100"),
        (upcycle([EXPERTS], at=30, dense={"schedule.warmup_steps": 40}), "schedule.warmup_steps=40 .*train.steps=30"),
        (branch(upcycle([EXPERTS], at=50), [40, 100]), "start.step=50 must .*train.steps=40"),
        ([EXPERTS.merged(Cell({"start.run": "0123456789", "start.step": 5}))], "'0123456789' is no run of this study"),
    ],
)
def test_upcycled_cells_that_cannot_run_are_refused(cells, message):
    with pytest.raises(ConfigError, match=message):
        Study("bad", BASE, cells).runs  # noqa: B018


def test_planning_a_thousand_runs_is_instant_and_loads_no_jax():
    code = (
        "import sys, time; from slmjax import config, study; start = time.time();"
        "cells = study.product(study.axis('optim.lr', [i / 1e3 for i in range(1, 201)]),"
        " study.axis('train.seed', range(5)));"
        "assert len(study.Study('big', config.RunConfig(), cells).runs) == 1000;"
        "assert time.time() - start < 10 and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
