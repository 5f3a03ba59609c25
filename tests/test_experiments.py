"""Every experiment file: its config resolves, its study plans, and its tiny form trains."""

import importlib
import inspect
import pkgutil

import pytest
from runs import train_here

import experiments
from experiments import lr_transfer, mdm_ladder, minicpm, smdm, wsd_ladder, wsd_vs_cosine
from slmjax import config, ladder, study
from slmjax.config import ConfigError, RunConfig
from slmjax.launchers.plan import make_plan

NAMES = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
STUDIES = [name for name in NAMES if hasattr(importlib.import_module(f"experiments.{name}"), "get_study")]


def module(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_configs_resolve_and_say_what_they_are(name):
    mine = module(name)
    for argument in ((), ("tiny",)):
        assert isinstance(config.resolve(mine.get_config(*argument)), RunConfig)
    with pytest.raises(ConfigError, match="tiny"):
        mine.get_config("tinny")
    lines = inspect.getsource(mine).splitlines()
    assert len(lines) <= 80 and f"={name}" in mine.__doc__, "a docstring with the command, in at most 80 lines"


@pytest.mark.parametrize("name", STUDIES)
def test_studies_plan(name):
    full, tiny = (make_plan(module(name).get_study(*argument)) for argument in ((), ("tiny",)))
    assert full.name != tiny.name and tiny.own_flops < full.own_flops / 100 and tiny.own_flops < 1e12
    assert len({run.run_id for run in full.runs}) == len(full.runs)


@pytest.mark.parametrize("name", STUDIES)
def test_tiny_studies_train_three_steps(name, tmp_path):
    """The first run of a tiny study, cut to three steps: the shapes, the data and the objective fit together."""
    run = module(name).get_study("tiny").runs[0]
    short = {"train.steps": 3, "schedule.warmup_steps": 1, "schedule.decay_steps": 1, "train.eval_sequences": 8}
    short |= {"log.tensorboard": False, "log.eval_every": 0, "mesh.steps_per_dispatch": 1, "mesh.data": 1}
    cut = study.Run(config.override(run.config, short))
    config.validate(cut.config)
    assert train_here(tmp_path, cut, members=1) == {cut.run_id: "done"}


def test_the_ladder_spans_widths_and_budgets_with_one_rate():
    whole = wsd_ladder.get_study().runs
    plan = [run for run in whole if run.tags["family"] == "dense"]
    branches = [run for run in plan if run.parent]
    widths = {run.config.model.width for run in branches}
    assert len(widths) >= 4 and len({run.config.optim.lr for run in plan}) == 1
    budgets = {}
    for run in branches:
        budgets.setdefault(run.config.model.width, set()).add(ladder.num_tokens(run.config))
    assert len({frozenset(of_width) for of_width in budgets.values()}) == 1, "the same budgets at every width"
    assert len(budgets[min(widths)]) >= 4
    assert {run.parent for run in branches} == {run.run_id for run in plan if not run.parent}
    assert len(study.packs(plan)) == len(widths), "one program for each width"
    said = make_plan(wsd_ladder.get_study())
    told = f"all {len(said.runs)} runs, {said.programs} programs and {said.own_flops:.1e}".replace("e+", "e")
    assert told in wsd_ladder.__doc__


def test_the_ladder_sets_mixtures_of_equal_active_parameters_beside_dense_runs_of_the_same_tokens():
    by_family = {}
    for run in wsd_ladder.get_study().runs:
        by_family.setdefault(run.tags["family"], []).append(run)
    dense = {(r.config.model.width, r.config.train.steps): r for r in by_family["dense"] if r.parent}
    moe = [run for run in by_family["moe"] if run.parent]
    assert len({run.config.model.width for run in moe}) >= 3 and len({run.config.train.steps for run in moe}) >= 3
    for run in moe:
        twin = dense[run.config.model.width, run.config.train.steps]
        assert ladder.dense_twin(run.config.model) == twin.config.model
        assert (run.config.model.moe.num_experts, run.config.model.moe.experts_per_token) == (8, 2)
        active, plain = (ladder.count_params(r.config.model, 1).active_non_embedding for r in (run, twin))
        assert plain < active < 1.05 * plain, "more by the router alone"
        longer = [steps for width, steps in dense if width == run.config.model.width and steps > run.config.train.steps]
        assert longer, "the dense family goes on to where it reaches the mixture's loss"
    cost = {family: sum(map(study.run_flops, runs)) for family, runs in by_family.items()}
    assert cost["moe"] < 0.5 * cost["dense"]


@pytest.mark.parametrize("of", [wsd_ladder, mdm_ladder])
@pytest.mark.parametrize("argument", ["", "tiny"])
def test_masked_diffusion_differs_from_its_twin_by_the_objective_and_its_best_rate(of, argument):
    runs = of.get_study(argument).runs
    dense = {key_of(run): run for run in runs if run.tags["family"] == "dense"}
    masked = [run for run in runs if run.tags["family"] == "mdm"]
    assert masked and (of is wsd_ladder or len(masked) == len(dense))
    for run in masked:
        twin = dense[key_of(run)]
        flat, plain = config.flatten(run.config), config.flatten(twin.config)
        differing = {key for key in flat if flat[key] != plain[key] and not key.startswith(("objective.", "log."))}
        assert differing == {"optim.lr"} and run.config.objective.name == "masked_diffusion"
        assert ladder.train_flops(run.config) == ladder.train_flops(twin.config)
        assert ladder.run_counts(run.config).non_embedding == ladder.run_counts(twin.config).non_embedding


def key_of(run):
    return run.config.model.width, run.config.train.steps, run.config.schedule.name


def test_wsd_vs_cosine_compares_equal_budgets_at_less_than_half_the_cost():
    runs = wsd_vs_cosine.get_study().runs
    cosine = sorted(run.config.train.steps for run in runs if run.config.schedule.name == "cosine")
    wsd = sorted(run.config.train.steps for run in runs if run.config.schedule.name == "wsd")
    assert cosine == wsd and len(cosine) == 4
    assert all(run.parent is None for run in runs if run.config.schedule.name == "cosine")
    plan = make_plan(wsd_vs_cosine.get_study())
    assert plan.branched_flops < 0.5 * plan.separate_flops
    assert plan.separate_flops == sum(ladder.train_flops(r.config) for r in runs if r.config.schedule.name == "cosine")
    assert plan.programs == 1


@pytest.mark.parametrize("scheme", ["mup", "sp"])
def test_lr_transfer_differs_between_schemes_in_the_scheme_alone(scheme):
    runs = lr_transfer.get_study(scheme).runs
    assert {(r.config.model.width, r.config.optim.lr) for r in runs} == {
        (width, rate) for width in (64, 128, 256) for rate in lr_transfer.RATES
    }
    assert {r.config.model.parametrization.name for r in runs} == {scheme}
    assert all(a / b == 2 for a, b in zip(lr_transfer.RATES, lr_transfer.RATES[1:], strict=False))
    assert len(study.packs(runs)) == 3


def test_minicpm_is_the_papers():
    """2404.06395: multipliers at 2.4B (section 3.1), sizes (table 2), half-lives of the decay (section 4.2)."""
    cfg = config.resolve(minicpm.get_config("2.4b"))
    scheme = cfg.model.parametrization
    assert (scheme.embed_multiplier, cfg.optim.lr, scheme.init_std, cfg.model.width / scheme.base_width) == (
        12, 0.01, 0.1, 9)  # fmt: skip
    assert scheme.residual_multiplier / cfg.model.num_layers**0.5 == pytest.approx(0.221359, abs=1e-6)
    assert ladder.count_params(cfg.model, 1).non_embedding == 2_442_057_984
    for size in ladder.MINICPM:
        cfg = config.resolve(minicpm.get_config(size))
        assert cfg.schedule.decay_steps / cfg.schedule.half_life_steps == pytest.approx(5, rel=0.05)
        assert config.decay_steps(cfg) / cfg.train.steps == pytest.approx(0.1, rel=0.01)


def test_smdm_is_the_papers_grid():
    """2410.18514: each size is its name, by N = layers (16 width² + 2 width) + width; 75m has its own feed-forward.
    At 1e19 FLOPs of 6 N D, cosine from 2e-4 to a tenth of it, warmup of a hundredth and at least 100 steps."""
    assert len(ladder.SMDM) == 30
    for size, (width, num_layers, heads) in ladder.SMDM.items():
        cfg = config.resolve(smdm.get_config(size))
        counts = ladder.run_counts(cfg)
        ffn = 1600 if size == "75m" else 4 * width
        N = num_layers * (4 * width**2 + 3 * width * ffn + 2 * width) + width
        assert counts.non_embedding == N and f"{N / 1e6:.0f}m" == size
        assert size == "75m" or num_layers * (16 * width**2 + 2 * width) + width == N
        assert counts.head == 32000 * width and cfg.model.num_heads == heads == width // cfg.model.head_dim
        assert 6 * N * ladder.num_tokens(cfg) == pytest.approx(1e19, rel=1e-3)
        assert cfg.schedule.warmup_steps == max(100, cfg.train.steps // 100) and cfg.schedule.final_ratio == 0.1
    without = {"objective.name": "next_token", "objective.diffusion.random_length": 0.0}
    config.validate(config.override(config.resolve(smdm.get_config("6m")), without))  # its autoregressive twin
