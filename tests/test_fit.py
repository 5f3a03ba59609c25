"""Fits: planted laws come back, intervals cover, refusals help, equal inputs give equal bytes."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax.scaling import laws
from slmjax.scaling.fit import Fit, _objective, _resample, fit
from slmjax.scaling.minimise import minimise
from slmjax.scaling.points import Point, PointSet, load_points

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


@pytest.mark.parametrize("options", [{"delta": 0}, {"delta": math.nan}, {"num_bootstrap": 5}, {"law": "kaplan"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        fit(planted(), **options)


def test_degenerate_resamples_are_drawn_again():
    """Three sizes by three ratios: many resamples lose a size, and none of those may enter the intervals."""
    points = planted(num_sizes=3, ratios=(5, 20, 80), noise=0.003, rng=np.random.default_rng(6))
    found = fit(points)
    assert found.bootstrap["num_redrawn"] > 20 and "redrawn" in found.table()
    assert "9 runs for 5 parameters" in found.table()
    assert found.draws.shape == (1000, 5) and np.isfinite(found.draws).all()


def test_outside_the_box_a_fit_is_drawn_back():
    """A floor of e^-20 leaves the loss alone and yet costs: otherwise a term without data runs off to infinity."""
    u_Fn, target_n = np.random.default_rng(0).normal(size=(2, 9)), np.zeros(9)
    objective = _objective(laws.CHINCHILLA, u_Fn, target_n, 1e-3, np.ones((2, 9)))
    theta_KP = np.array([[-20.0, -0.5, -0.5, 0.3, 0.3], [-21.0, -0.5, -0.5, 0.3, 0.3]])
    (near, far), gradient_KP = objective(theta_KP, np.arange(2))
    low = math.log(1e-3)
    assert far - near == pytest.approx((21 + low) ** 2 - (20 + low) ** 2, rel=1e-6)
    assert gradient_KP[:, 0] == pytest.approx([2 * (-20 - low), 2 * (-21 - low)], rel=1e-4)


def test_every_resample_keeps_three_levels_of_each_input():
    u_Fn = np.log([[p.N for p in planted(3, (5, 20, 80))], [p.D for p in planted(3, (5, 20, 80))]])
    weight_Kn, num_redrawn = _resample([f"r{i}" for i in range(9)], u_Fn, 5, 500, seed=0)
    assert weight_Kn.shape == (500, 9) and num_redrawn > 0 and (weight_Kn.sum(axis=1) == 9).all()
    for k in range(500):
        assert len(set(u_Fn[0][weight_Kn[k] > 0].round(6))) >= 3


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
        "import time, numpy; start = time.perf_counter(); import slmjax.scaling.fit, slmjax.scaling.report, sys; "
        "assert not {'jax', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules), 'heavy import'; "
        "print(time.perf_counter() - start)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert seconds < 0.5


@pytest.mark.skipif(not CHINCHILLA.exists(), reason="shared scaling data not here")
def test_chinchilla_minimum_and_standard_errors():
    """240 runs (the five highest losses dropped), Besiroglu et al. 2024 and the minimum measured in scaling_fits.md."""
    with open(CHINCHILLA) as file:
        num_rows = len(list(csv.DictReader(file)))
    point_set = load_points([CHINCHILLA])
    cut = sorted(p.loss for p in point_set.points)[-5]
    kept = PointSet(tuple(p for p in point_set.points if p.loss < cut))
    assert (num_rows, len(kept)) == (245, 240)
    found = fit(kept, num_bootstrap=4000)
    assert 0.00101827400 < found.objective <= 0.00101827402
    minimum = {"E": 1.817218, "A": 477.826, "B": 2143.417, "alpha": 0.347310, "beta": 0.367172}
    assert found.parameters == pytest.approx(minimum, rel=1e-5)
    assert found.starts["num_agreeing"] == 8 and found.bootstrap["num_agreeing"] == 4000
    errors = found.standard_errors()
    assert errors["alpha"] == pytest.approx(0.0154, rel=0.05) and errors["beta"] == pytest.approx(0.0206, rel=0.05)
    assert laws.load_law(found.law).formula in found.table()
    absolute = fit(kept, delta=1e-5, num_bootstrap=100).parameters
    published = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    assert absolute == pytest.approx(published, rel=2.5e-3)
