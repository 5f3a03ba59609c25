"""Back-tests: intervals judged on runs they never saw, a discrepancy that is found where it is and absent where not."""

import dataclasses
import json
import math

import numpy as np
import pytest
from test_fit import TRUTH, planted, surface

from slmjax.scaling import backtest, prediction
from slmjax.scaling.backtest import back_test, compute_cuts, hide, learn
from slmjax.scaling.fit import fit
from slmjax.scaling.points import Point
from slmjax.scaling.verify import backtest as public

DESIGNS = ("isoflop", "ladder")
BANDS = {0.8: (0.75, 0.85), 0.95: (0.90, 0.98)}


def study(rng, design, noise):
    """A planted study as real ones are: noise, 3% outliers, a tenth of the cells missing, a few runs done twice; and
    new runs at 3 to 100 times the compute, as noisy and as prone to go wrong."""
    if design == "isoflop":
        budgets = np.geomspace(1e18, 1e20, 5)
        cells = [(N, C / 6 / N) for C in budgets for N in math.sqrt(C / 120) * np.geomspace(0.25, 4, 9)]
    else:
        cells = [(N, N * ratio) for N in np.geomspace(2e7, 1e9, 8) for ratio in (5, 10, 20, 40, 80)]
    cells = [cell for cell in cells if rng.random() > 0.1]
    cells += [cells[i] for i in rng.choice(len(cells), 2, replace=False)]

    def run(name, N, D):
        error = rng.normal(0, noise) + (abs(rng.normal(0, 0.03)) if rng.random() < 0.03 else 0.0)
        return Point(name, N, D, 6 * N * D, surface(N, D) * math.exp(error))

    points = [run(str(i), N, D) for i, (N, D) in enumerate(cells)]
    largest = max(p.C for p in points)
    sizes = {C: math.sqrt(C / 120) * math.exp(rng.normal(0, 0.5)) for C in largest * np.array([3, 10, 30, 100])}
    return points, [run("new", N, C / 6 / N) for C, N in sizes.items()]


def coverage(seed, num_studies, designs=DESIGNS):
    """Shares held of parameters, of new runs and of hidden runs by level, over studies of alternating designs.

    "new runs" are held by an interval without the form's error, for these studies have none; "forecast" is the interval
    as it is printed, which cannot know that.
    """
    held = {what: {level: [] for level in BANDS} for what in ("parameters", "new runs", "forecast", "back-test")}
    for i in range(num_studies):
        rng = np.random.default_rng([seed, i])
        points, new = study(rng, designs[i % len(designs)], (0.001, 0.003)[i // 2 % 2])
        made = fit(points, num_bootstrap=200)
        tested = back_test(made)
        predicted = prediction.predict(made, {name: np.array([p.value(name) for p in new]) for name in "NDC"})
        error_m = np.log([p.loss for p in new]) - predicted.value_m
        for what, discrepancy in (("new runs", prediction.NO_DISCREPANCY), ("forecast", tested.discrepancy)):
            for level, (low_m, high_m) in predicted.widened(discrepancy).items():
                held[what][level].append((low_m <= error_m) & (error_m <= high_m))
        for level in BANDS:
            intervals = made.intervals(level)
            held["parameters"][level].append([intervals[k][0] <= v <= intervals[k][1] for k, v in TRUTH.items()])
            if tested.outcomes:
                held["back-test"][level].append(tested.covered(level))
    return {what: {level: float(np.mean(got)) for level, got in by.items()} for what, by in held.items()}


def test_coverage_on_planted_studies(seed):
    """Twelve studies: what is within one study goes wrong together, so the share held has the standard error of at
    best twelve independent draws; three of them either side of the band."""
    got = coverage(seed, 12)
    for what, by_level in got.items():
        for level, (low, high) in BANDS.items():
            room = 3 * math.sqrt(level * (1 - level) / 12)
            assert low - room <= by_level[level] <= high + room, (what, level, got)


@pytest.mark.slow
def test_coverage_on_two_hundred_planted_studies():
    """What is printed may hold more than its level here: one failed hidden run reads as an error of the form, which
    these studies do not have. Estimators that bound its influence bring public sweeps, where forms do go wrong, below
    their band (`slmjax fit --verify` prints it)."""
    got = coverage(0, 200)
    print(got)
    for what, by_level in got.items():
        for level, (low, high) in BANDS.items():
            highest = high if what in ("parameters", "new runs") else 1.0
            assert low <= by_level[level] <= highest, (what, level, got)


def test_each_cut_sees_only_what_lies_below_it():
    rng = np.random.default_rng(3)
    points = planted(noise=0.003, rng=rng)
    made = fit(points, num_bootstrap=100)
    cut = hide(made)[2]
    alone = fit([p for p in points if cut.flops > p.C], num_bootstrap=100)
    hidden = [p for p in points if cut.flops <= p.C]
    assert cut.num_fitted == len(alone.points) and len(hidden) == len(cut.error_m)
    expected = [math.log(p.loss / alone.predict(N=p.N, D=p.D)) for p in hidden]
    assert cut.error_m == pytest.approx(expected, abs=1e-9)
    # Doubling the hidden losses changes the errors of this cut, and nothing that its intervals were made of.
    spoiled = [p._replace(loss=2 * p.loss) if cut.flops <= p.C else p for p in points]
    cuts, others = hide(made), hide(fit(spoiled, num_bootstrap=100))
    assert learn(cuts, cut.flops) == learn(others, cut.flops)
    for level in BANDS:
        for one, other in zip(cut.forecast.ends[level], others[2].forecast.ends[level], strict=True):
            assert np.array_equal(one, other)


def test_a_form_that_goes_wrong_is_found_and_a_true_one_is_not(seed):
    """The loss bends away from the law by 1% per factor e beyond 1e19 FLOPs."""
    rng = np.random.default_rng(seed)
    points = planted(num_sizes=8, noise=0.0005, rng=rng)
    bent = [p._replace(loss=p.loss * math.exp(0.02 * max(0.0, math.log(p.C / 1e18)))) for p in points]
    true, wrong = (back_test(fit(each, num_bootstrap=100)) for each in (points, bent))
    assert true.discrepancy.rate < 0.002 < 0.005 < wrong.discrepancy.rate


def test_the_rate_is_that_of_planted_errors():
    """Errors of exactly rate * distance, with nothing else, give the rate back; errors below the scatter give 0."""
    zeros, distance_m = np.zeros(50), np.linspace(0.1, 3, 50)

    def cut(flops, rate, deviation):
        forecast = prediction.Prediction(zeros, {}, zeros + deviation, distance_m)
        return backtest.Cut(flops, 20, flops / 2, zeros + 1e20, zeros + 1, rate * distance_m, forecast)

    assert learn([cut(1e18, 0.02, 1e-9), cut(1e19, 0.02, 1e-9)]).rate == pytest.approx(0.02, rel=1e-6)
    assert learn([cut(1e18, 0.02, 0.1), cut(1e19, 0.02, 0.1)]).rate == 0
    assert learn([cut(1e18, 0.02, 1e-9)]) is None
    assert learn([cut(1e18, 0.02, 1e-9), cut(1e19, 0.02, 1e-9)], below=1e19) is None


def test_intervals_widen_with_distance_and_with_fewer_lessons():
    made = back_test(fit(planted(noise=0.003, rng=np.random.default_rng(4)), num_bootstrap=100)).discrepancy
    steady = made._replace(rate=0.01, num_cuts=8)
    near, far = steady.half_width(0.95, np.array([1.0, 3.0]))
    assert far == pytest.approx(3 * near) and near == pytest.approx(2.306 * 0.01, rel=1e-3)
    assert steady._replace(num_cuts=2).half_width(0.95, np.array([1.0]))[0] > near


def test_scatter_is_that_of_the_runs_nearest_in_compute(seed):
    """Small runs scatter ten times as much as large ones, and so do forecasts among them."""
    rng = np.random.default_rng(seed)
    points = [
        p._replace(loss=p.loss * math.exp(rng.normal(0, 0.02 if p.C < 1e18 else 0.002))) for p in planted(num_sizes=24)
    ]
    made = fit(points, num_bootstrap=100)
    widths = {}
    for N in (2e7, 9e8):
        x = {"N": np.array([N]), "D": np.array([20 * N]), "C": np.array([120 * N * N])}
        low, high = prediction.predict(made, x).ends[0.95]
        widths[N] = float(high[0] - low[0])
    assert widths[2e7] > 3 * widths[9e8]


def test_checkpoints_of_one_run_count_once():
    points = planted(noise=0.003, rng=np.random.default_rng(5))
    twice = [p for p in points for _ in range(3)]
    once, thrice = (back_test(fit(each, num_bootstrap=100)) for each in (points, twice))
    assert thrice.num_hidden == pytest.approx(once.num_hidden, abs=6)
    # A run's copies all above one cut share one vote.
    assert {round(float(s), 6) for cut in hide(fit(twice, num_bootstrap=100)) for s in cut.share_m} == {round(1 / 3, 6)}


def test_cuts_lie_between_budgets():
    C_n = np.repeat([1e17, 1e18, 1e19, 1e20], 9) * (1 + 1e-4 * np.arange(36))
    cuts = compute_cuts(C_n, 10, 8)
    assert len(cuts) == 2 and 1e18 < cuts[0] < 1e19 < cuts[1] < 1e20
    assert compute_cuts(np.full(40, 1e18), 10, 8) == []


def test_too_few_runs_are_said_to_be_untested():
    made = fit(planted(num_sizes=3, ratios=(5, 20, 80), noise=0.003, rng=np.random.default_rng(6)), num_bootstrap=100)
    tested = back_test(made)
    assert not tested.outcomes and "not back-tested" in tested.sentence() and "compute cuts" in tested.refusal
    assert json.loads(json.dumps(tested.to_dict(), allow_nan=False))["pooled"] is None
    unlogged = dataclasses.replace(made, points=[p | {"C": None} for p in made.points])
    assert "no FLOPs" in back_test(unlogged).refusal


def test_it_is_done_once_and_repeats_itself():
    points = planted(noise=0.003, rng=np.random.default_rng(7))
    one, other = fit(points, num_bootstrap=100), fit(points, num_bootstrap=100)
    assert back_test(one) is back_test(one)
    assert back_test(one).to_dict() == back_test(other).to_dict()
    assert "back_test" not in one.to_json()


@pytest.mark.slow
def test_public_sweeps(scaling_data):
    """Pooled over all forecasts of hidden runs in six published sources, inside the bands."""
    failing = [check for check in public.checks(scaling_data) if not check.holds]
    assert not failing, failing
