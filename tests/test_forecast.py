"""Forecasts: the optimum against its closed form and a brute-force search, intervals that mean what they say."""

import json
import math

import numpy as np
import pytest
from test_fit import CHINCHILLA, TRUTH, planted, surface

from slmjax.scaling import forecast
from slmjax.scaling.backtest import BackTest, back_test
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.points import Point, PointSet, load_points
from slmjax.scaling.prediction import Discrepancy


def closed_form(flops, E, A, B, alpha, beta):
    """Hoffmann et al. 2022, equation 4: N* = G (C/6)^(beta/(alpha+beta))."""
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return N, flops / 6 / N


@pytest.fixture(scope="module")
def noisy():
    return fit(planted(noise=0.003, rng=np.random.default_rng(1)))


@pytest.mark.parametrize("flops", [1e17, 1e20, 5.88e23])
def test_optimum_is_the_closed_form(noisy, flops):
    made = forecast.optimum(noisy, flops)
    N, D = closed_form(flops, **noisy.parameters)
    assert made["N"].value == pytest.approx(N, rel=1e-9) and made["D"].value == pytest.approx(D, rel=1e-9)
    assert made["tokens_per_param"].value == pytest.approx(D / N, rel=1e-9)
    assert made["loss"].value == pytest.approx(noisy.predict(N=N, D=D), rel=1e-12)
    draws = noisy.parameter_draws
    N_K, _ = closed_form(flops, **draws)
    assert made["N"].intervals[0.95] == pytest.approx(np.quantile(N_K, [0.025, 0.975]), rel=0.02)


def test_minicpm_published_optima():
    """Tokens per parameter at 1e21 recomputed from MiniCPM's printed coefficients (N, D in 1e9), arXiv 2404.06395."""
    table = {193.7: (3.32e-2, 0.37, 2.17e-1, 0.34, 0.17), 91.2: (7.54e-2, 0.30, 2.92e-1, 0.30, 0.25),
             183.9: (7.15e-2, 0.29, 3.00e-1, 0.23, 0.31)}  # fmt: skip
    for ratio, (c_n, alpha, c_d, beta, floor) in table.items():
        points = [
            Point(f"{N}/{k}", N, k * N, 6 * k * N * N, floor + c_n * (N / 1e9) ** -alpha + c_d * (k * N / 1e9) ** -beta)
            for N in (0.031e9, 0.11e9, 0.25e9, 0.49e9, 0.85e9, 2e9)
            for k in (10, 20, 30, 40, 50, 60)
        ]
        made = forecast.optimum(fit(points, num_bootstrap=100), 1e21)
        assert made["tokens_per_param"].value == pytest.approx(ratio, rel=0.005)


def head_flops(N, D):
    return 6 * N * D * (1 + 900 * N**-0.5)


def test_logged_cost_is_recovered_and_its_optimum_beats_every_other_size():
    points = [p._replace(C=head_flops(p.N, p.D)) for p in planted(noise=0.001, rng=np.random.default_rng(2))]
    found = fit(points)
    cost = forecast.make_cost(found, "logged")
    assert (cost.coefficient, cost.exponent) == pytest.approx((900, 0.5), rel=1e-6)
    flops = 1e18
    made = forecast.optimum(found, flops, "logged")
    assert head_flops(made["N"].value, made["D"].value) == pytest.approx(flops, rel=1e-6)
    sizes = made["N"].value * np.geomspace(0.05, 20, 4001)
    losses = [found.predict(N=N, D=flops / head_flops(N, 1)) for N in sizes]
    assert sizes[int(np.argmin(losses))] == pytest.approx(made["N"].value, rel=0.005)
    assert made["loss"].value <= min(losses) * (1 + 1e-12)
    # Under 6ND the same budget buys more, and the forecast says which rule it used.
    simple = forecast.optimum(found, flops)
    assert simple["loss"].value < made["loss"].value
    assert "C = 6 N D)" in simple.table() and "as the runs logged it" in made.table()


def test_logged_cost_on_both_sides_of_6nd_is_refused():
    points = [p._replace(C=p.C * (1.2 if i % 2 else 0.8)) for i, p in enumerate(planted())]
    with pytest.raises(ValueError, match="use cost=6ND"):
        forecast.make_cost(fit(points, num_bootstrap=100), "logged")


def test_loss_intervals_cover_a_new_run():
    """Eight ladders of 30 runs, each asked for one new noisy run at 30x the compute: three binomial standard errors
    around 80% and 95%. Many more, with outliers and gaps, are judged in test_backtest.py."""
    rng, noise, inside = np.random.default_rng(21), 0.003, {0.8: 0, 0.95: 0}
    for _ in range(8):
        made = forecast.loss(fit(planted(noise=noise, rng=rng), num_bootstrap=200), N=5e9, D=1.5e11)
        seen = surface(5e9, 1.5e11) * math.exp(rng.normal(0, noise))
        for level in inside:
            low, high = made["loss"].intervals[level]
            inside[level] += low <= seen <= high
    assert inside[0.95] >= 6 and inside[0.8] >= 3, inside


def test_intervals_widen_with_distance_and_nest(noisy):
    near, far = (forecast.optimum(noisy, C) for C in (1e19, 1e24))
    for name in ("N", "D", "tokens_per_param", "loss"):
        widths = []
        for made in (near, far):
            (a, b), (c, d) = made[name].intervals[0.8], made[name].intervals[0.95]
            assert c < a < made[name].value < b < d
            widths.append(math.log(d / c))
        assert widths[1] > widths[0]


def test_loss_interval_holds_the_scatter_of_single_runs(noisy):
    """Inside the design the law is known to .1%, but a run scatters by .3%: 95% is about 4 standard deviations wide."""
    low, high = forecast.loss(noisy, 1e8, 2e9)["loss"].intervals[0.95]
    law_low, law_high = np.quantile(noisy.predict_draws(N=1e8, D=2e9), [0.025, 0.975])
    assert math.log(high / low) > 3 * 0.003 > 1.5 * math.log(law_high / law_low)


def test_reach_and_extrapolation_are_said(noisy):
    inside, outside = forecast.loss(noisy, 1e8, 2e9), forecast.loss(noisy, 1e10, 2e11)
    assert "extrapolation" not in inside.table()
    assert outside.reach["N"] == pytest.approx(10) and "N is 10x the largest fitted" in outside.table()
    body = json.loads(outside.to_json())
    assert body["quantities"]["loss"]["value"] == outside["loss"].value and body["target"] == {"N": 1e10, "D": 2e11}


def test_unbounded_optimum_is_printed_as_unbounded():
    """N within a factor of two and noise: some resamples see no gain from size at all."""
    rng = np.random.default_rng(9)
    points = [
        Point(f"{N}-{D}", N, D, 6 * N * D, surface(N, D) * math.exp(rng.normal(0, 0.05)))
        for N in (1e8, 1.4e8, 2e8)
        for D in np.geomspace(1e8, 1e12, 9)
    ]
    made = forecast.optimum(fit(points, num_bootstrap=300), 1e22)
    assert "unbounded" in made.table() and "N is weakly identified" in made.table()
    assert None in json.loads(made.to_json())["quantities"]["N"]["intervals"]["0.95"]


def test_forecast_from_json_alone(noisy):
    back = Fit.from_json(noisy.to_json())
    assert forecast.optimum(back, 1e22).to_json() == forecast.optimum(noisy, 1e22).to_json()


def test_a_law_of_compute_takes_compute_as_logged():
    points = [p._replace(C=2 * p.C, loss=2 + 30 * (2 * p.C) ** -0.1) for p in planted()]
    found = fit(points, law="power_law", num_bootstrap=100)
    made = forecast.loss(found, 1e9, 1e11)
    assert made["flops"].value == pytest.approx(12e20) and made["loss"].value == pytest.approx(2 + 30 * 12e20**-0.1)
    with pytest.raises(ValueError, match="need a law of N and D"):
        forecast.optimum(found, 1e20)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_impossible_targets_are_refused(noisy, bad):
    with pytest.raises(ValueError, match="positive number"):
        forecast.optimum(noisy, bad)
    with pytest.raises(ValueError, match="positive number"):
        forecast.loss(noisy, 1e9, bad)
    with pytest.raises(ValueError, match="6ND, logged"):
        forecast.optimum(noisy, 1e20, cost="8ND")


def test_truth_is_within_the_interval_of_the_noisy_optimum(noisy):
    N, _ = closed_form(1e22, **TRUTH)
    low, high = forecast.optimum(noisy, 1e22)["N"].intervals[0.95]
    assert low < N < high and high / low < 20


def test_the_back_test_stands_beside_every_forecast(noisy):
    tested = back_test(noisy)
    for made in (forecast.optimum(noisy, 1e22), forecast.loss(noisy, 1e10, 2e11), forecast.budget(noisy, 2.2)):
        assert made.tested is tested and tested.sentence() in made.table()
        assert json.loads(made.to_json())["back_test"]["pooled"]["num_hidden"] == tested.num_hidden > 0


def test_the_discrepancy_widens_the_loss_alone():
    clean = fit(planted(noise=0.002, rng=np.random.default_rng(5)), num_bootstrap=100)
    near, far = forecast.optimum(clean, 1e21), forecast.optimum(clean, 1e24)
    widths = {}
    for rate in (0.0, 0.02):
        vars(clean)["_back_test"] = BackTest((), Discrepancy(rate, 8))
        widths[rate] = [forecast.optimum(clean, C)["loss"].intervals[0.95] for C in (1e21, 1e24)]
        assert forecast.optimum(clean, 1e24)["N"] == far["N"] and forecast.optimum(clean, 1e21)["N"] == near["N"]
    sizes = {rate: [math.log(high / low) for low, high in ends] for rate, ends in widths.items()}
    assert sizes[0.02][0] > sizes[0.0][0] and sizes[0.02][1] - sizes[0.0][1] > 2 * (sizes[0.02][0] - sizes[0.0][0])


def test_the_budget_of_a_loss_is_the_inverse_of_the_optimum(noisy):
    asked = forecast.optimum(noisy, 1e22)
    made = forecast.budget(noisy, asked["loss"].value)
    assert made["flops"].value == pytest.approx(1e22, rel=1e-3)
    assert made["N"].value == pytest.approx(asked["N"].value, rel=1e-3)
    low, high = made["flops"].intervals[0.95]
    assert low < 1e22 < high
    # The end of the interval is where the loss interval's end meets the target.
    assert forecast.optimum(noisy, low)["loss"].intervals[0.95][0] == pytest.approx(asked["loss"].value, rel=1e-4)
    with pytest.raises(ValueError, match="is not reached"):
        forecast.budget(noisy, 0.9 * noisy.parameters["E"])
    with pytest.raises(ValueError, match="positive number"):
        forecast.budget(noisy, math.nan)


def test_trades_against_the_law_itself(noisy):
    flops, cost = 1e21, forecast.Cost("6ND")
    best = forecast.optimum(noisy, flops)
    for made in forecast.trades(noisy, flops, cost):
        assert pytest.approx(made.factor * best["N"].value) == made.N
        assert noisy.predict(N=made.N, D=made.same_loss_D) == pytest.approx(best["loss"].value, rel=1e-9)
        assert made.same_loss_flops == pytest.approx(6 * made.N * made.same_loss_D) and made.same_loss_flops > flops
        assert made.same_flops_loss == pytest.approx(noisy.predict(N=made.N, D=flops / 6 / made.N), rel=1e-9)
        even = forecast.optimum(noisy, flops / made.waste)["loss"].value
        assert made.waste > 1 and even == pytest.approx(made.same_flops_loss, rel=1e-5)
    tiny = forecast.trades(noisy, flops, cost, [0.01])[0]
    assert math.isinf(tiny.same_loss_D) and "unbounded" in forecast.trade_table([tiny])


def test_a_law_of_more_inputs_asks_for_them():
    points = [
        Point(f"{N}-{E}", N, 1e10, 6e10 * N, 10 ** (1.1 - 0.08 * math.log10(N)) * E**-0.02, inputs={"E": E})
        for N in np.geomspace(1e7, 1e9, 5)
        for E in (1.0, 2.0, 8.0, 32.0, 128.0)
    ]
    found = fit(points, "clark_routing", num_bootstrap=100)
    assert forecast.loss(found, 1e8, 1e10, E=16.0)["loss"].value == pytest.approx(found.predict(N=1e8, E=16.0))
    with pytest.raises(ValueError, match="give E too"):
        forecast.loss(found, 1e8, 1e10)


@pytest.mark.skipif(not CHINCHILLA.exists(), reason="shared scaling data not here")
def test_chinchilla_budget():
    """At 5.88e23 FLOPs: N* 74B, D/N 17.9 with 95% interval 7.6 to 36.2 (scaling_fits.md, measured)."""
    point_set = load_points([CHINCHILLA])
    cut = sorted(p.loss for p in point_set.points)[-5]
    made = forecast.optimum(fit(PointSet(tuple(p for p in point_set.points if p.loss < cut))), 5.88e23)
    assert made["N"].value == pytest.approx(74e9, rel=0.01)
    assert made["tokens_per_param"].value == pytest.approx(17.9, rel=0.01)
    assert made["tokens_per_param"].intervals[0.95] == pytest.approx((7.6, 36.2), rel=0.07)
