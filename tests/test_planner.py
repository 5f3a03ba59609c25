"""The planner: its linear algebra against brute force, its bill, its verdicts, and a replay."""

import math

import numpy as np
import pytest
from test_fit import planted, surface

from slmjax.scaling import forecast, planner, replay
from slmjax.scaling.backtest import BackTest, back_test
from slmjax.scaling.fit import fit
from slmjax.scaling.planner import Candidate, Interval, gradients, grid, scatter, signals, suggest
from slmjax.scaling.points import Point
from slmjax.scaling.prediction import NO_DISCREPANCY
from slmjax.scaling.replay import Sweep
from slmjax.scaling.verify import planner as public

TARGET = Candidate(1e10, 2e11, 1.2e22)


@pytest.fixture(scope="module")
def noisy():
    return fit(planted(noise=0.003, rng=np.random.default_rng(1)), num_bootstrap=200)


def test_gradients_are_those_of_log_loss(noisy):
    at = [Candidate(1e8, 2e9, 1.2e18), TARGET]
    found_cP = gradients(noisy, at)
    for p in range(5):
        step_P = np.zeros(5)
        step_P[p] = 1e-6
        for c, (N, D, _) in enumerate(at):
            u_F1 = (np.log([N, D]) - noisy.centre)[:, None]
            low, high = (noisy.form.loss((noisy.theta + s * step_P)[None], u_F1)[0][0, 0] for s in (-1, 1))
            assert found_cP[c, p] == pytest.approx(math.log(high / low) / 2e-6, rel=1e-4, abs=1e-9)


def test_widths_after_a_run_are_those_of_the_whole_design(noisy):
    """The rank-one update against the inverse of the information with the run in it."""
    model, extra = Interval.of(noisy, TARGET), Candidate(1e9, 1e10, 6e19)
    g_P, s_P = gradients(noisy, [extra])[0], signals(noisy, [extra])[0]
    information_PP = np.linalg.inv(model.covariance_PP) + np.outer(g_P, g_P) / (
        model.inflation * scatter(noisy, [extra])[0] ** 2
    )
    expected_PP = np.linalg.inv(information_PP)
    after = model.after(extra, s_P)
    assert model.target_P @ after.covariance_PP @ model.target_P == pytest.approx(
        model.target_P @ expected_PP @ model.target_P, rel=1e-5
    )
    assert model.widths_after([extra], s_P[None])[0] == pytest.approx(after.width(), rel=1e-9)
    assert after.floor() <= after.width() <= model.width()


def test_having_made_only_some_runs_and_then_the_others_is_having_made_all(noisy):
    """In the linearised law the runs of a design may come in any order."""
    model, few = Interval.of(noisy, TARGET), noisy.points[::2]
    others = [Candidate(p["N"], p["D"], p["C"]) for p in noisy.points[1::2]]
    grown = model.of_only(few)
    assert grown.width() > model.width()
    for run, s_P in zip(others, signals(noisy, others), strict=True):
        grown = grown.after(run, s_P)
    assert grown.width() == pytest.approx(model.width(), rel=1e-5) and grown.largest == model.largest


def test_scatter_is_that_of_runs_of_like_compute(seed):
    """Runs above a compute scatter a tenth as much as those below, as planted."""
    rng = np.random.default_rng(seed)
    points = planted(num_sizes=12, ratios=np.geomspace(3, 100, 10), noise=0.0, rng=rng)
    edge = float(np.median([p.C for p in points]))
    points = [p._replace(loss=p.loss * math.exp(rng.normal(0, 0.001 if edge < p.C else 0.01))) for p in points]
    made = fit(points, num_bootstrap=100)
    small, large = (Candidate(1e8, C / 6e8, C) for C in (min(p.C for p in points), max(p.C for p in points)))
    found_c = scatter(made, [small, large])
    assert found_c == pytest.approx([0.01, 0.001], rel=0.5)


def test_the_width_now_is_that_of_the_draws(noisy):
    model = Interval.of(noisy, TARGET)
    shift_K = np.log(noisy.predict_draws(N=TARGET.N, D=TARGET.D) / noisy.predict(N=TARGET.N, D=TARGET.D))
    low, high = np.quantile(shift_K, [0.1587, 0.8413])
    law = math.sqrt(model.target_P @ model.covariance_PP @ model.target_P)
    assert law == pytest.approx((high - low) / 2, rel=1e-6)


def test_only_a_larger_run_brings_the_discrepancy_closer(noisy):
    model = Interval.of(noisy, TARGET)
    if not back_test(noisy).discrepancy.rate:
        vars(noisy)["_back_test"] = back_test(noisy).__class__((), back_test(noisy).discrepancy._replace(rate=0.01))
    try:
        largest = max(p["C"] for p in noisy.points)
        small, large = (Candidate(N, 20 * N, 120 * N * N) for N in (1e8, 3e9))
        assert large.flops > largest > small.flops
        assert model.after(small, signals(noisy, [small])[0]).floor() == pytest.approx(model.floor())
        assert model.after(large, signals(noisy, [large])[0]).floor() < model.floor()
    finally:
        vars(noisy).pop("_back_test")


def test_suggestions_shrink_the_real_interval():
    """Suggested runs, made on the true surface and fitted, against the six cheapest candidates, over six studies: the
    bootstrap interval of the law shrinks by a tenth or more, and by more than with those."""
    planned, cheap = [], []
    for study in range(6):
        rng = np.random.default_rng(study)
        points = planted(num_sizes=5, noise=0.002, rng=rng)
        made = fit(points, num_bootstrap=200)
        vars(made)["_back_test"] = BackTest((), NO_DISCREPANCY)  # so that the law is what there is to learn
        plan = suggest(made, 1e23, 6, 1e21)
        assert plan.steps and plan.flops <= 1e21 and plan.steps[-1].width < plan.width

        def log_width(cells, points=points, rng=rng, plan=plan):
            more = [
                Point(f"new{i}", N, D, 6 * N * D, surface(N, D) * math.exp(rng.normal(0, 0.002)))
                for i, (N, D) in enumerate(cells)
            ]
            found = fit([*points, *more], num_bootstrap=200)
            low, high = np.quantile(found.predict_draws(N=plan.target["N"], D=plan.target["D"]), [0.16, 0.84])
            return math.log(math.log(high / low))

        now = log_width([])
        planned.append(log_width([(step.N, step.D) for step in plan.steps]) - now)
        least = sorted(grid(made, 1e23, 1e21), key=lambda c: c.flops)[:6]
        cheap.append(log_width([(c.N, c.D) for c in least]) - now)
    assert np.mean(planned) < math.log(0.9) and np.mean(planned) < np.mean(cheap), (planned, cheap)


def test_branches_of_one_trunk_are_billed_for_their_decay_and_what_they_add():
    N, share = 1e8, 0.1
    runs = [Candidate(N, D, 6 * N * D) for D in (1e9, 4e9, 2e9)]
    steps, bills = [], []
    for run in runs:
        bills.append(planner._extra_flops(steps, run, "wsd", share))
        steps.append(planner.Step(run.N, run.D, bills[-1], 0.0))
    decays = sum(share * run.D for run in runs)
    assert sum(bills) == pytest.approx(6 * N * ((1 - share) * 4e9 + decays))
    assert bills[2] == pytest.approx(6 * N * share * 2e9)
    assert planner._extra_flops(steps, Candidate(2e8, 1e9, 1.2e18), "wsd", share) == pytest.approx(1.2e18)
    assert planner._extra_flops(steps, runs[0], "single", share) == runs[0].flops


def test_it_says_when_more_runs_stop_paying(noisy):
    """At a target inside the runs the scatter of the run itself is nearly all of the interval."""
    points = planted(num_sizes=10, ratios=np.geomspace(3, 100, 12), noise=0.003, rng=np.random.default_rng(2))
    plan = suggest(fit(points, num_bootstrap=200), 1e18, 5, 1e17)
    assert "stop paying" in plan.verdict and len(plan.steps) < 5
    assert plan.floor > 0.9 * plan.width and plan.verdict in plan.table()


def test_user_sizes_and_the_budget_are_kept(noisy):
    candidates = grid(noisy, 1e22, 1e20, sizes=[3e8, 2e9])
    assert {c.N for c in candidates} <= {3e8, 2e9} and all(c.flops <= 1e20 for c in candidates)
    plan = suggest(noisy, 1e22, 3, 1e20, candidates)
    assert {step.N for step in plan.steps} <= {3e8, 2e9} and plan.flops <= 1e20 and len(plan.steps) <= 3


def test_impossible_requests_are_refused(noisy):
    for bad, words in (
        ({"num_runs": 0}, "at least one"),
        ({"budget": -1.0}, "positive number"),
        ({"budget": 1e3}, "none of the candidates"),
        ({"schedule": "cosine"}, "single, wsd"),
        ({"decay_share": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            suggest(noisy, **{"flops": 1e22, "num_runs": 3, "budget": 1e20} | bad)
    power = fit(planted(noise=0.003, rng=np.random.default_rng(1)), law="power_law", num_bootstrap=100)
    with pytest.raises(ValueError, match="N and D"):
        suggest(power, 1e22, 3, 1e20)


def test_same_input_same_plan(noisy):
    one, other = (suggest(noisy, 1e22, 4, 1e20).to_dict() for _ in range(2))
    assert one == other


@pytest.fixture(scope="module")
def sweep():
    return Sweep.of(planted(num_sizes=6, noise=0.003, rng=np.random.default_rng(3)), reach=10.0)


@pytest.fixture
def few_rounds(monkeypatch):
    """Back-tests of every fit are what a replay takes time for; here the law is what there is to learn."""
    for name, value in (("ROUNDS", 4), ("NUM_PLANNING", 100), ("NUM_JUDGING", 100)):
        monkeypatch.setattr(replay, name, value)
    for module in (planner, forecast):
        monkeypatch.setattr(module, "back_test", lambda made: BackTest((), NO_DISCREPANCY))


def test_a_replay_spends_its_share_and_no_more(sweep, few_rounds):
    for order in replay.ORDERS:
        bought = replay.buy(sweep, order, share=0.5, seed=1)
        left = 0.5 * sweep.flops - sum(sweep.points[i].C for i in bought)
        dearer = [p.C for i, p in enumerate(sweep.points) if i not in bought]
        assert 0 <= left < min(dearer), order
        assert bought == replay.buy(sweep, order, share=0.5, seed=1)
    assert len({frozenset(replay.buy(sweep, "random", 0.1, seed)) for seed in range(8)}) > 1


def test_a_whole_sweep_is_as_good_as_itself(sweep, monkeypatch):
    n = len(sweep.points)
    monkeypatch.setattr(replay, "buy", lambda *options: set(range(n)))
    assert replay.replay(sweep) == pytest.approx((n, 1.0, 1.0, 1.0))


def test_hindsight_is_never_narrower_than_the_whole(sweep):
    """Information adds: a part of the runs knows less, the more so the smaller it is."""
    little, much = (replay.hindsight(sweep, share) for share in (0.05, 0.9))
    assert 1 - 1e-9 <= much < little


def test_planned_runs_tell_more_of_the_law_than_as_many_flops_at_random(few_rounds, seed):
    """On grids with planted truth: variance of the law at the target, as the whole grid's linearised law has it."""
    gains = []
    for study in range(4):
        rng = np.random.default_rng([seed, study])
        grown = Sweep.of(planted(num_sizes=10, ratios=np.geomspace(3, 40, 8), noise=0.003, rng=rng), reach=10.0)
        law = Interval.of(grown.whole, grown.target)
        variance = {}
        for order in ("planned", "random"):
            bought = replay.buy(grown, order, seed=study)
            only = law.of_only([grown.whole.points[i] for i in sorted(bought)])
            variance[order] = float(only.target_P @ only.covariance_PP @ only.target_P)
        gains.append(math.log(variance["planned"] / variance["random"]))
    assert np.mean(gains) < 0, gains


def test_impossible_replays_are_refused(sweep):
    for options, words in (
        ({"order": "dearest"}, "planned, cheapest, random"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"share": 1e-6}, "wider sweep or a larger share"),
    ):
        with pytest.raises(ValueError, match=words):
            replay.buy(sweep, **options)


@pytest.mark.slow
def test_three_public_sweeps_need_half_their_flops(scaling_data):
    (third,) = [check for check in public.checks(scaling_data) if check.judged and "as printed" in check.what]
    assert third.holds, third
