"""Fits: planted laws come back, intervals cover, refusals help, equal inputs give equal bytes."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax.scaling import design, estimate, laws
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.minimise import minimise
from slmjax.scaling.points import Excluded, Point, PointSet

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
CHINCHILLA = Path(__file__).parents[2] / "shared" / "scaling_data" / "chinchilla_epoch.csv"


def surface(N, D):
    return TRUTH["E"] + TRUTH["A"] * N ** -TRUTH["alpha"] + TRUTH["B"] * D ** -TRUTH["beta"]


def planted(num_sizes=6, ratios=(5, 10, 20, 40, 80), noise=0.0, rng=None, outliers=0):
    """A ladder of sizes 1e7..1e9 by tokens per parameter; `noise`: sd of log loss; `outliers` runs 10% too high."""
    grid = [(N, N * ratio) for N in np.geomspace(1e7, 1e9, num_sizes) for ratio in ratios]
    jitter = rng.normal(0, noise, len(grid)) if noise else np.zeros(len(grid))
    if outliers:
        jitter[rng.choice(len(grid), outliers, replace=False)] += 0.1
    return [
        Point(f"r{i}", N, D, 6 * N * D, surface(N, D) * math.exp(e))
        for i, ((N, D), e) in enumerate(zip(grid, jitter, strict=True))
    ]


def test_noise_free_surface_gives_back_its_parameters():
    found = fit(planted(), num_bootstrap=100)
    for name, value in TRUTH.items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-8)
        low, high = found.intervals(0.95)[name]
        assert low == pytest.approx(value, rel=1e-6) and high == pytest.approx(value, rel=1e-6)
    assert found.starts["num_agreeing"] == found.starts["num"] == 8


def test_least_squares_and_absolute_deviations_find_it_too():
    for delta in (1e-5, 0.1):
        assert fit(planted(), delta=delta, num_bootstrap=100).parameters["alpha"] == pytest.approx(0.34, rel=1e-8)


def test_huber_holds_against_outliers_where_least_squares_does_not():
    points = planted(noise=0.001, rng=np.random.default_rng(3), outliers=3)
    robust, squares = (fit(points, delta=delta, num_bootstrap=100) for delta in (1e-3, 1.0))
    errors = [abs(f.predict(N=1e10, D=2e11) / surface(1e10, 2e11) - 1) for f in (robust, squares)]
    assert errors[0] < 0.01 < errors[1]


def test_objective_is_the_sum_of_huber_on_log_loss():
    found = fit(planted(noise=0.003, rng=np.random.default_rng(1)), num_bootstrap=100)
    r = np.abs([math.log(p["loss"]) - math.log(found.predict(N=p["N"], D=p["D"])) for p in found.points])
    huber = np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()
    assert found.objective == pytest.approx(huber, rel=1e-9)
    assert (r > 1e-3).any() and (r < 1e-3).any()


def test_power_law_of_compute():
    points = [p._replace(loss=2.0 + 30 * p.C**-0.1) for p in planted()]
    found = fit(points, law="power_law", num_bootstrap=100)
    assert found.parameters == pytest.approx({"E": 2.0, "A": 30.0, "alpha": 0.1}, rel=1e-8)


def test_intervals_cover_the_truth():
    """60 synthetic ladders of 30 runs: 95% intervals hold the truth in .87 or more, 80% intervals in .68 to .92.

    These are three binomial standard errors around .95 and .8; the parameters of one ladder are correlated.
    """
    rng, hits = np.random.default_rng(11), {0.8: [], 0.95: []}
    for _ in range(60):
        found = fit(planted(noise=0.003, rng=rng), num_bootstrap=200)
        for level, hit in hits.items():
            ends = found.intervals(level)
            hit.append([ends[name][0] <= TRUTH[name] <= ends[name][1] for name in TRUTH])
    covered = {level: np.mean(hit) for level, hit in hits.items()}
    assert 0.87 <= covered[0.95] < 1 and 0.68 <= covered[0.8] <= 0.92, covered


def test_bootstrap_draws_runs_not_points():
    """Every run logged five times over adds no information: intervals must not shrink."""
    points = planted(noise=0.003, rng=np.random.default_rng(5))
    single, repeated = fit(points), fit([p for p in points for _ in range(5)])
    assert repeated.bootstrap["num_runs"] == len(points)
    assert repeated.standard_errors()["alpha"] == pytest.approx(single.standard_errors()["alpha"], rel=0.1)


def test_two_starts_of_every_refit_agree():
    found = fit(planted(noise=0.003, rng=np.random.default_rng(2)))
    assert found.bootstrap["num_agreeing"] == found.bootstrap["num_converged"] == 1000


def test_same_input_same_bytes_and_json_round_trip():
    points = planted(noise=0.003, rng=np.random.default_rng(8))
    text = fit(points, num_bootstrap=200).to_json()
    assert fit(points, num_bootstrap=200).to_json() == text
    assert fit(points, num_bootstrap=200, seed=1).to_json() != text
    back = Fit.from_json(text)
    assert back.to_json() == text and back.table() == fit(points, num_bootstrap=200).table()
    with pytest.raises(ValueError, match="slmjax fit"):
        Fit.from_json('{"format": "other"}')


def test_weak_parameters_are_called_so():
    """Three sizes within a factor of two say nothing about alpha; D spans four decades and pins beta."""
    rng = np.random.default_rng(4)
    points = [
        Point(f"{N}-{D}", N, D, 6 * N * D, surface(N, D) * math.exp(rng.normal(0, 0.005)))
        for N in (1e8, 1.4e8, 2e8)
        for D in np.geomspace(1e8, 1e12, 9)
    ]
    found = fit(points)
    assert "alpha" in found.weakly_identified() and "beta" not in found.weakly_identified()
    assert "unbounded" in found.table() and "weakly identified: alpha" in found.table()
    assert found.intervals(0.95)["E"][0] == -math.inf and found.intervals(0.95)["beta"][0] > 0.2
    assert "Infinity" not in found.to_json()
    assert not fit(planted(noise=0.001, rng=rng)).weakly_identified()


def ladder_of_one_ratio():
    return [Point(f"r{i}", N, 20 * N, 120 * N * N, surface(N, 20 * N)) for i, N in enumerate(np.geomspace(1e7, 1e9, 9))]


REFUSED = {
    "too few": (planted()[:5], "5 points are too few.*at least 6"),
    "one N": ([p._replace(N=1e8) for p in planted()], "1 distinct N"),
    "two D": ([p._replace(D=1e9 * (1 + i % 2)) for i, p in enumerate(planted())], "2 distinct D"),
    "one ratio": (ladder_of_one_ratio(), "D follows N"),
    "nan loss": ([planted()[0]._replace(loss=math.nan), *planted()[1:]], "r0: loss=nan"),
    "negative loss": ([planted()[0]._replace(loss=-1.0), *planted()[1:]], "r0: loss=-1.0"),
    "zero D": ([planted()[0]._replace(D=0.0), *planted()[1:]], "r0: D=0.0"),
    "bound and exact": ([planted()[0]._replace(loss_kind="bound"), *planted()[1:]], "exact losses and bounds"),
    "two tokenizers": ([planted()[0]._replace(tokenizer="x"), *planted()[1:]], "tokenizers"),
    "two corpora": ([planted()[0]._replace(corpus="x"), *planted()[1:]], "corpora"),
    "two counts of N": ([planted()[0]._replace(n_convention="total"), *planted()[1:]], "ways of counting N"),
    "two counts of FLOPs": ([planted()[0]._replace(flops_convention="6ND"), *planted()[1:]], "ways of counting FLOPs"),
    "two families": ([planted()[0]._replace(family="moe"), *planted()[1:]], "model families"),
}


@pytest.mark.parametrize(("points", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_is_wrong(points, said):
    with pytest.raises(ValueError, match=said):
        fit(points)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delta": 0}, "delta=0"),
        ({"delta": math.nan}, "delta=nan"),
        ({"num_bootstrap": 5}, "at least 100"),
        ({"law": "kaplam"}, "did you mean 'kaplan'"),
        ({"residual": "log10"}, "log, raw"),
        ({"weights": "n"}, "neither 'equal' nor 'se'"),
        ({"weights": "se"}, "r0 has no standard error"),
        ({"resample": "family"}, "run, ladder"),
        ({"law": "clark_routing"}, "r0 has no E.*law of N, E"),
        ({"fixed": {"gamma": 1.0}}, "no 'gamma'; its parameters are E, A, B"),
        ({"fixed": {"E": -1.0}}, "no possible values"),
        ({"fixed": TRUTH}, "nothing is left to fit"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        fit(planted(), **options)


def test_degenerate_resamples_are_drawn_again():
    """Three sizes by three ratios: many resamples lose a size, and none of those may enter the intervals."""
    points = planted(num_sizes=3, ratios=(5, 20, 80), noise=0.003, rng=np.random.default_rng(6))
    found = fit(points)
    assert found.bootstrap["num_redrawn"] > 20 and "redrawn" in found.table()
    assert "9 runs for 5 parameters" in found.table()
    assert found.draws.shape == (1000, 5) and np.isfinite(found.draws).all()


def problem(points, law="chinchilla", delta=1e-3):
    """The problem that `fit` makes of points: nothing held, equal weights."""
    form = laws.load_law(law)
    log_x_Fn, loss_n = design.validated(PointSet(tuple(points)), form, "log", len(form.parameters))
    centre_F = form.centre(log_x_Fn)
    held = estimate.hold(form, {}, np.zeros(len(form.parameters)), centre_F)
    u_Fn = log_x_Fn - centre_F[:, None]
    return estimate.Problem(form, u_Fn, loss_n, np.ones(len(loss_n)), "log", delta, held)


def test_outside_the_box_a_fit_is_drawn_back():
    """A floor of e^-20 leaves the loss alone and yet costs: otherwise a term without data runs off to infinity."""
    made = problem([p._replace(loss=p.loss / surface(1e9, 8e10)) for p in planted()])
    objective = made.objective(np.ones((2, 30)))
    theta_KP = np.array([[-20.0, -0.5, -0.5, 0.3, 0.3], [-21.0, -0.5, -0.5, 0.3, 0.3]])
    (near, far), gradient_KP = objective(theta_KP, np.arange(2))
    low = math.log(1e-3)
    assert far - near == pytest.approx((21 + low) ** 2 - (20 + low) ** 2, rel=1e-6)
    assert gradient_KP[:, 0] == pytest.approx([2 * (-20 - low), 2 * (-21 - low)], rel=1e-4)


def test_a_bound_that_holds_a_parameter_is_named():
    """Losses that fall as fast as the box allows, and faster: the exponent ends on its bound, and the table says so."""
    steep = [p._replace(loss=1.5 + (1e7 / p.N) ** 5 + p.D**-0.1) for p in planted(num_sizes=8)]
    found = fit(steep, num_bootstrap=100)
    assert "alpha" in found.starts["active_bounds"] and "at a bound: " in found.table()
    assert "no bound active" in fit(planted(), num_bootstrap=100).table()


def test_every_resample_keeps_three_levels_of_each_input():
    law, points = laws.load_law("chinchilla"), planted(3, (5, 20, 80))
    u_Fn, run_n = np.log([[p.N for p in points], [p.D for p in points]]), np.arange(9)
    weight_Kn, num_redrawn = design.resamples(law, u_Fn, run_n, run_n, 5, 500, seed=0)
    assert weight_Kn.shape == (500, 9) and num_redrawn > 0 and (weight_Kn.sum(axis=1) == 9).all()
    for k in range(500):
        assert len(set(u_Fn[0][weight_Kn[k] > 0].round(6))) >= 3


def test_ladders_are_drawn_whole_and_widen_the_intervals(seed):
    """Runs of one size that share an error: drawing runs takes it for noise that averages out, ladders do not."""
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(6):
        points = planted(num_sizes=10)
        shared = {N: math.exp(rng.normal(0, 0.01)) for N in {p.N for p in points}}
        points = [p._replace(loss=p.loss * shared[p.N]) for p in points]
        of_run, of_ladder = (fit(points, resample=r, num_bootstrap=200) for r in ("run", "ladder"))
        ratios.append(of_ladder.standard_errors()["alpha"] / of_run.standard_errors()["alpha"])
    assert of_ladder.bootstrap["num_units"] == 10 and "whole ladders" in of_ladder.table()
    assert np.mean(ratios) > 1.3
    law, u_Fn = laws.load_law("chinchilla"), np.log([[p.N for p in points], [p.D for p in points]])
    ladder_n = design.resampling_units(points, "ladder")
    weight_Kn, _ = design.resamples(law, u_Fn, ladder_n, np.arange(50), 5, 50, seed=0)
    for k in range(50):
        assert all(len(set(weight_Kn[k][ladder_n == size])) == 1 for size in range(10))


def test_weights_by_standard_error_are_inverse_variances(seed):
    """Half of the runs are evaluated badly; weighing them so comes closer to the truth, and one run of se/2 weighs as
    much as four of se."""
    rng, errors = np.random.default_rng(seed), {"equal": [], "se": []}
    for _ in range(10):
        points = []
        for i, p in enumerate(planted()):
            se = 0.02 if i % 2 else 0.001
            points.append(p._replace(loss=p.loss + rng.normal(0, se), se=se))
        for weights, error in errors.items():
            found = fit(points, weights=weights, delta=1.0, num_bootstrap=100)
            error.append(abs(found.parameters["alpha"] - TRUTH["alpha"]))
    assert np.mean(errors["se"]) < 0.5 * np.mean(errors["equal"])
    found = fit(points, weights="se", num_bootstrap=100)
    assert "weighted by" in found.table()
    assert found.objective_at(found.parameters) == pytest.approx(found.objective, rel=1e-9)
    four = [p._replace(se=0.01 * p.loss / (2 if i == 0 else 1)) for i, p in enumerate(points)]
    weight_n = design.point_weights(four, "se", "log")
    assert weight_n[0] == pytest.approx(4 * weight_n[1]) and weight_n.mean() == pytest.approx(1)


@pytest.mark.parametrize("names", [("E",), ("A",), ("alpha",), ("A", "beta"), ("E", "A", "B", "alpha")])
def test_fixed_parameters_stay_and_the_others_find_the_best_beside_them(names, seed):
    """Held at the truth without noise, all others come back. Held elsewhere, no free step improves the fit."""
    held = {name: TRUTH[name] for name in names}
    found = fit(planted(), fixed=held, num_bootstrap=100)
    assert found.parameters == pytest.approx(TRUTH, rel=1e-8) and found.num_free == 5 - len(names)
    noisy = planted(noise=0.003, rng=np.random.default_rng(seed))
    away = {name: value * 1.02 for name, value in held.items()}
    found = fit(noisy, fixed=away, num_bootstrap=100)
    assert {name: found.parameters[name] for name in names} == away
    for name in set(TRUTH) - set(names):
        for factor in (0.9999, 1.0001):
            moved = found.parameters | {name: found.parameters[name] * factor}
            assert found.objective_at(moved) >= found.objective * (1 - 1e-9)
    for name in names:
        assert (found.parameter_draws[name] == away[name]).all() and name not in found.weakly_identified()
    assert found.table().count("fixed") == len(names)
    assert Fit.from_json(found.to_json()).table() == found.table()


def test_raw_residuals_are_of_the_loss_itself():
    """A loss relative to a unigram model is negative: a log would refuse it, raw residuals fit it."""
    points = planted(noise=0.003, rng=np.random.default_rng(1))
    found = fit(points, residual="raw", num_bootstrap=100)
    r = np.array([p["loss"] - found.predict(N=p["N"], D=p["D"]) for p in found.points])
    np.testing.assert_allclose(found.residuals(), r, atol=1e-12)
    huber = np.where(abs(r) <= 1e-3, r**2 / 2, 1e-3 * (abs(r) - 5e-4)).sum()
    assert found.objective == pytest.approx(huber, rel=1e-9) and "of loss residuals" in found.table()
    with pytest.raises(ValueError, match="loss=-"):
        fit([p._replace(loss=-p.loss) for p in points])


def test_published_values_stand_beside_ours_only_when_asked():
    points = planted(noise=0.003, rng=np.random.default_rng(1))
    found = fit(points, num_bootstrap=100)
    assert "published" not in found.table()
    text = found.table(published="besiroglu2024")
    assert "482.01" in text and "sum of absolute deviations" in text
    theirs = found.objective_at(found.form.published["hoffmann2022"])
    assert f"{theirs:.10g}" in found.table(published="hoffmann2022") and theirs >= found.objective
    with pytest.raises(ValueError, match="at hand are hoffmann2022"):
        found.table(published="hofmann")


def test_coefficients_are_correlated_with_their_exponents():
    found = fit(planted(noise=0.003, rng=np.random.default_rng(1)))
    assert found.correlations()["A", "alpha"] > 0.99 and found.correlations()["B", "beta"] > 0.99
    assert "A with alpha" in found.table()


def test_minimise_against_known_minima():
    """Sixty quadratics of random curvature and Rosenbrock's valley, each with its own minimum."""
    rng = np.random.default_rng(0)
    target_KP, scale_KP = rng.normal(size=(60, 4)), 10 ** rng.uniform(-2, 2, (60, 4))

    def bowls(theta_KP, lanes):
        away = theta_KP - target_KP[lanes]
        return (scale_KP[lanes] * away**2).sum(axis=1), 2 * scale_KP[lanes] * away

    found = minimise(bowls, np.zeros((60, 4)), np.eye(4))
    assert found.converged_K.all() and np.abs(found.theta_KP - target_KP).max() < 1e-6

    def valley(theta_KP, lanes):
        x, y = theta_KP.T
        value = 100 * (y - x**2) ** 2 + (1 - x) ** 2
        return value, np.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)], axis=1)

    found = minimise(valley, rng.uniform(-2, 2, (20, 2)), np.eye(2))
    assert found.converged_K.all() and np.abs(found.theta_KP - 1).max() < 1e-6


def test_importing_the_fitter_is_quick_and_needs_no_jax():
    code = (
        "import time, numpy; start = time.process_time(); import slmjax.scaling.fit, slmjax.scaling.report, sys; "
        "assert not {'jax', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules), 'heavy import'; "
        "print(time.process_time() - start)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert seconds < 0.5


def test_a_fit_keeps_the_runs_it_left_out_with_their_reasons():
    excluded = (Excluded("lost", "diverged", source="runs/lost"),)
    made = Fit.from_json(fit(PointSet(tuple(planted()), excluded, ()), num_bootstrap=100).to_json())
    assert made.left_out == [{"run_id": "lost", "reason": "diverged", "source": "runs/lost"}]


def test_repeated_data_are_noted_where_the_law_does_not_know_of_them():
    points = [p._replace(epochs=2.0) for p in planted(noise=0.001, rng=np.random.default_rng(0))]
    note = "the law takes a repeated token for a new one"
    assert note in fit(points, num_bootstrap=100).notes
    known = [p._replace(inputs={"U": p.D / (1 + i % 3)}) for i, p in enumerate(points)]
    assert note not in fit(known, "data_constrained", num_bootstrap=100).notes
