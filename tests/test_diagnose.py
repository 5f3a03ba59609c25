"""Profile likelihood against closed forms and against fits with a parameter held; deletions against fits without."""

import math

import numpy as np
import pytest

from slmjax.scaling import allocation
from slmjax.scaling.diagnose import OUTLIER, diagnose, robust_z
from slmjax.scaling.fit import fit
from slmjax.scaling.points import Point, load_points
from slmjax.scaling.profile import chi_square_scale, problem_of, profile

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def planted(rng, num_sizes=6, ratios=(5, 10, 20, 40, 80), noise=0.003):
    """A ladder of sizes 1e7..1e9 by tokens per parameter; `noise`: sd of log loss."""
    points = []
    for N in np.geomspace(1e7, 1e9, num_sizes):
        for ratio in ratios:
            D = N * ratio
            loss = (1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28) * math.exp(rng.normal(0, noise))
            points.append(Point(f"r{len(points)}", N, D, 6 * N * D, loss))
    return points


def test_profile_of_a_linear_parameter_is_students_interval_with_normal_ends(seed):
    """Least squares of raw loss with only B free is linear: B +- z sigma / sqrt(sum x^2), exactly."""
    points = planted(np.random.default_rng(seed))
    held = {name: value for name, value in TRUTH.items() if name != "B"}
    found = fit(points, delta=100.0, residual="raw", fixed=held, num_bootstrap=100)
    x_n = np.array([p.D**-0.28 for p in points])
    y_n = np.array([p.loss - 1.69 - 406.4 * p.N**-0.34 for p in points])
    B = x_n @ y_n / (x_n @ x_n)
    sigma = math.sqrt(np.sum((y_n - B * x_n) ** 2) / (len(points) - 1))
    made = profile(found)
    assert list(made.curves) == ["B"]
    for level, z in ((0.8, 1.2815515655), (0.95, 1.9599639845)):
        reach = z * sigma / math.sqrt(x_n @ x_n)
        low, high = made.intervals(level)["B"]
        assert (low, high) == pytest.approx((B - reach, B + reach), abs=0.01 * reach)


@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_every_point_of_a_profile_is_a_fit_with_that_value_held(delta, seed):
    points = planted(np.random.default_rng(seed))
    found = fit(points, delta=delta, num_bootstrap=200)
    made, problem = profile(found), problem_of(found)
    per_objective = chi_square_scale(problem, found.theta) / (len(points) * delta**2)
    for name in ("E", "alpha", "beta"):
        curve = made.curves[name]
        near = np.flatnonzero((curve.statistic > 0.5) & (curve.statistic < 8))
        for k in (near[0], near[-1]):
            held = fit(points, delta=delta, num_bootstrap=100, fixed={name: curve.value[k]})
            rise = per_objective * (held.objective - found.objective)
            assert curve.statistic[k] == pytest.approx(rise, rel=1e-3, abs=1e-4)


def test_profiles_do_not_depend_on_how_a_law_is_written(seed):
    """MiniCPM's law is Chinchilla's in other units: exponents and floor have the same intervals."""
    points = planted(np.random.default_rng(seed))
    one, other = (profile(fit(points, law=law, num_bootstrap=100)).intervals(0.95) for law in ("chinchilla", "minicpm"))
    for name, twin in (("alpha", "alpha"), ("beta", "beta"), ("E", "L0")):
        for end, twin_end in zip(one[name], other[twin], strict=True):
            assert end == pytest.approx(twin_end, rel=5e-3)


def test_intervals_nest_and_hold_the_estimate(seed):
    found = fit(planted(np.random.default_rng(seed)), num_bootstrap=200)
    made = profile(found)
    i80, i95 = made.intervals(0.8), made.intervals(0.95)
    for name, value in found.parameters.items():
        assert i95[name][0] < i80[name][0] < value < i80[name][1] < i95[name][1]
    assert "bootstrap 95%" in made.table() and not made.notes
    assert made.table() == profile(found).table()


def test_unbounded_ends_are_said():
    """Three sizes within a factor of two say nothing about alpha; D spans four decades and pins beta."""
    rng = np.random.default_rng(4)
    points = [
        Point(
            f"{N}-{D}", N, D, 6 * N * D, (1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28) * math.exp(rng.normal(0, 0.005))
        )
        for N in (1e8, 1.4e8, 2e8)
        for D in np.geomspace(1e8, 1e12, 9)
    ]
    made = profile(fit(points, num_bootstrap=200))
    ends = made.intervals(0.95)
    assert ends["E"][0] == -math.inf and "unbounded to" in made.table()
    assert ends["alpha"][1] / ends["alpha"][0] > 4 and ends["beta"][1] / ends["beta"][0] < 1.2


def test_repeated_points_of_a_run_are_remarked():
    points = planted(np.random.default_rng(0))
    made = profile(fit(points + [p._replace(loss=p.loss * 1.001) for p in points], num_bootstrap=100))
    assert any("independent" in note for note in made.notes)


@pytest.mark.slow
def test_profile_intervals_cover_the_truth(seed):
    """100 ladders of 30 runs with Gaussian noise, Huber and least squares."""
    rng = np.random.default_rng(seed)
    for delta in (1e-3, 0.1):
        hits = {0.8: [], 0.95: []}
        for _ in range(100):
            made = profile(fit(planted(rng), delta=delta, num_bootstrap=100))
            for level, hit in hits.items():
                ends = made.intervals(level)
                hit.append([ends[name][0] <= TRUTH[name] <= ends[name][1] for name in TRUTH])
        assert 0.88 <= np.mean(hits[0.95]) <= 0.99 and 0.7 <= np.mean(hits[0.8]) <= 0.9, hits


def test_leaving_a_scale_out_is_the_fit_without_it(seed):
    points = planted(np.random.default_rng(seed))
    found = fit(points, num_bootstrap=100)
    made = diagnose(found, at={"N": 1e10, "D": 2e11})
    assert [refit.num_left_out for refit in made.scales] == [5] * 6
    assert made.target == pytest.approx(found.predict(N=1e10, D=2e11))
    for size, refit in zip(np.geomspace(1e7, 1e9, 6), made.scales, strict=True):
        without = fit([p for p in points if abs(p.N / size - 1) > 0.01], num_bootstrap=100)
        assert refit.parameters == pytest.approx(without.parameters, rel=1e-4)
        assert refit.target == pytest.approx(without.predict(N=1e10, D=2e11), rel=1e-6)
        assert refit.determined
    by_ratio = diagnose(found, by="D")
    assert sum(refit.num_left_out for refit in by_ratio.scales) == 30


def test_influence_is_the_fit_without_a_run(seed):
    points = planted(np.random.default_rng(seed))
    found = fit(points, num_bootstrap=100)
    made = diagnose(found, flops=1e21)
    assert made.said == "N* at 1e+21" and len(made.influences) == 30
    assert [abs(one.target) for one in made.influences] == sorted(
        (abs(o.target) for o in made.influences), reverse=True
    )
    worst = made.influences[0]
    without = fit([p for p in points if p.run_id != worst.run_id], num_bootstrap=100)
    errors = found.standard_errors()
    for name, shift in worst.shift.items():
        assert shift * errors[name] == pytest.approx(
            without.parameters[name] - found.parameters[name], rel=1e-3, abs=1e-9
        )


def test_the_optimum_watched_is_that_of_the_cost(seed):
    """Runs that logged a head's FLOPs: N* moves as the rule in N says, and which rule is told."""
    points = [p._replace(C=6 * p.N * p.D * (1 + 900 * p.N**-0.5)) for p in planted(np.random.default_rng(seed))]
    found = fit(points, num_bootstrap=100)
    for cost in ("6ND", "logged"):
        made = diagnose(found, flops=1e20, cost=cost)
        rule = allocation.make_cost(found, cost)
        assert made.target == pytest.approx(allocation.best(found, 1e20, rule)[0], rel=1e-9)
        assert f"N* is for {rule}" in made.table()
    assert diagnose(found, flops=1e20).target != pytest.approx(made.target, rel=0.01)


def test_more_levels_than_twelve_are_joined(seed):
    rng = np.random.default_rng(seed)
    points = [p._replace(N=p.N * math.exp(rng.uniform(-0.2, 0.2))) for p in planted(rng)]
    made = diagnose(fit(points, num_bootstrap=100))
    assert 6 <= len(made.scales) <= 12 and sum(refit.num_left_out for refit in made.scales) == 30
    assert any(" to " in refit.without for refit in made.scales)


def test_a_law_that_needs_every_scale_is_said_to_be_undetermined():
    points = planted(np.random.default_rng(0), num_sizes=3)
    made = diagnose(fit(points, num_bootstrap=100))
    assert not any(refit.determined for refit in made.scales) and "not determined" in made.table()


def test_planted_outliers_are_found(seed):
    rng = np.random.default_rng(seed)
    points = planted(rng, num_sizes=8)
    wrong = rng.choice(len(points), 3, replace=False).tolist()
    for i in wrong:
        points[i] = points[i]._replace(loss=points[i].loss * 1.08)
    made = diagnose(fit(points, num_bootstrap=100))
    assert {one.run_id for one in made.outliers[:3]} == {f"r{i}" for i in wrong}
    assert made.table().count("\noutlier: ") == len(made.outliers)
    z_n = robust_z(np.array([0.0, 1.0, -1.0, 2.0, -2.0, 40.0]))
    assert abs(z_n[5]) > OUTLIER > abs(z_n[:5]).max()
    assert robust_z(np.full(5, 1e-16)).tolist() == [0.0] * 5


def test_bad_requests_are_refused():
    found = fit(planted(np.random.default_rng(0)), num_bootstrap=100)
    for options, said in (
        ({"by": "V"}, "by='V'"),
        ({"flops": -1.0}, "flops=-1"),
        ({"flops": 1e20, "at": {"N": 1e9, "D": 1e9}}, "not both"),
        ({"at": {"N": 1e9}}, "D missing"),
    ):
        with pytest.raises(ValueError, match=said):
            diagnose(found, **options)


def test_chinchilla_outliers(scaling_data):
    """The five runs that Besiroglu et al. drop, those of the highest loss, are flagged when all 245 are fitted."""
    points = load_points([scaling_data / "chinchilla_epoch.csv"])
    made = diagnose(fit(points, num_bootstrap=100), flops=5.88e23)
    dropped = {p.run_id for p in sorted(points.points, key=lambda p: -p.loss)[:5]}
    assert dropped <= {one.run_id for one in made.outliers} and len(made.outliers) <= 10
    assert len(made.scales) == 12 and sum(refit.num_left_out for refit in made.scales) == 245
