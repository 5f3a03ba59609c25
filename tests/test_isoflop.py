"""IsoFLOP: exact where it must be, biased where it is known to be, honest at the edges, and the published lines."""

import math
import time

import numpy as np
import pytest

from slmjax.scaling.isoflop import estimate_noise, group_budgets, isoflop
from slmjax.scaling.minima import BENT, LARGEST, METHODS, SMALLEST, find_minima
from slmjax.scaling.points import Point

BUDGETS = np.geomspace(1e18, 1e20, 5)


def best_size(C, alpha, beta, A=406.4, B=410.7):
    return (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))


def planted(reach=0.6, num=15, alpha=0.34, beta=0.28, noise=0.0, rng=None, shift=0.0, budgets=BUDGETS):
    """Sizes evenly within +-`reach` decades of the best; `shift`: decades that the first budget's lie too low, the
    last's too high."""
    points = []
    for g, C in enumerate(budgets):
        place = shift * (2 * g / (len(budgets) - 1) - 1)
        for x in np.linspace(-reach, reach, num):
            N = best_size(C, alpha, beta) * 10 ** (x + place)
            loss = 1.69 + 406.4 * N**-alpha + 410.7 * (C / (6 * N)) ** -beta
            points.append(Point(f"r{len(points)}", N, C / (6 * N), C, loss + (rng.normal(0, noise) if noise else 0.0)))
    return points


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.465, 0.155), (0.3, 0.3)])
def test_centred_budgets_without_noise_give_the_exponents(method, alpha, beta):
    """Every centred budget is biased alike, so coefficients may be off and exponents may not."""
    found = isoflop(planted(alpha=alpha, beta=beta), method, noise=0.0)
    # Where alpha = beta two steps of the spline's grid tie, and rounding picks.
    exact = 2e-3 if method == "akima" else 1e-12
    assert found.lines["N"].slope == pytest.approx(beta / (alpha + beta), abs=exact)
    assert found.lines["D"].slope == pytest.approx(alpha / (alpha + beta), abs=exact)
    low, high = found.lines["N"].exponent.interval(0.95)
    assert low == pytest.approx(high, abs=1e-12)
    for optimum in found.optima:
        assert 0.7 < optimum.N / best_size(optimum.C, alpha, beta) < 1.3
        assert abs(6 * optimum.N * optimum.D / optimum.C - 1) < 1e-9


@pytest.mark.parametrize(
    ("alpha", "beta", "reach", "bias"),
    [
        *((0.34, 0.28, *pair) for pair in ((0.3, 0.003), (0.6, 0.013), (1.0, 0.037), (1.5, 0.085))),
        *((0.465, 0.155, *pair) for pair in ((0.3, 0.017), (0.6, 0.069), (1.0, 0.20), (1.5, 0.49))),
    ],
)
def test_known_bias_of_wide_parabolas(alpha, beta, reach, bias):
    """N* at 1e24 by a parabola through all of 15 sizes, five budgets: the table that others measured."""
    points = planted(reach, alpha=alpha, beta=beta)
    plain, spline = (isoflop(points, method, noise=0.0).at(1e24)["N"].value for method in ("all_points", "akima"))
    truth = best_size(1e24, alpha, beta)
    assert plain / truth - 1 == pytest.approx(bias, abs=0.006 if bias < 0.1 else 0.01)
    step = 10 ** (2 * reach / 14 / 25)
    assert 1 / step**2 < spline / truth < step**2


def test_drifting_budgets_bend_the_plain_parabola_only():
    points = planted(reach=1.0, num=21, alpha=0.465, beta=0.155, shift=0.3)
    error = {method: abs(isoflop(points, method, noise=0.0).lines["N"].slope - 0.25) for method in METHODS}
    assert error["all_points"] > 5e-3 and error["akima"] < 2e-3 and error["parabola"] < 2e-3


def test_only_the_plain_parabola_is_warned_about():
    points = planted()
    warned = {method: any("all points" in note for note in isoflop(points, method).notes) for method in METHODS}
    assert warned == {"parabola": False, "akima": False, "all_points": True}


@pytest.mark.parametrize("method", METHODS)
def test_budgets_whose_minimum_is_at_an_edge_are_discarded_and_counted(method):
    points = planted(reach=0.5)
    first, others = points[:15], points[15:]
    smaller_cut = [*first[10:], *others]
    found = isoflop(smaller_cut, method, noise=1e-4)
    assert [d.C for d in found.discarded] == pytest.approx([BUDGETS[0]]) and "smallest size" in found.discarded[
        0
    ].reason
    larger_cut = [*first[:5], *others]
    found = isoflop(larger_cut, method, noise=1e-4)
    assert "largest size" in found.discarded[0].reason and len(found.optima) == 4
    assert "1 of 5 budgets discarded" in found.table()
    assert found.lines["N"].slope == pytest.approx(0.28 / 0.62, abs=1e-3)
    with pytest.raises(ValueError, match="1 of 2 budgets have a minimum"):
        isoflop(larger_cut[:20], method, noise=1e-4)


def test_a_budget_needs_interior_minima_in_half_its_noisy_copies():
    """Its lowest point is inside, but noise of the size of the whole curve carries it to the ends."""
    points = planted(reach=0.1, num=4)
    assert len(isoflop(points, "parabola", noise=1e-6).optima) == 5
    with pytest.raises(ValueError, match="of its resamples have a minimum"):
        isoflop(points, "parabola", noise=0.1)


def test_no_minimum_is_ever_extrapolated(seed):
    """Random losses: what counts as a minimum lies between the sizes, and its neighbours' parabola bends upwards."""
    rng = np.random.default_rng(seed)
    log_N_n, loss_Kn = np.sort(rng.uniform(15, 20, 7)), rng.uniform(2, 3, (400, 7))
    for method in METHODS:
        found = find_minima(log_N_n, loss_Kn, np.ones((400, 7)), method, 0.5)
        assert found.inside_K.any() and (~found.inside_K).any()
        inside = found.log_N_K[found.inside_K]
        assert (inside > log_N_n[0]).all() and (inside < log_N_n[-1]).all()
        assert np.isnan(found.log_N_K[~found.inside_K]).all()


def test_outcomes_by_name():
    x_n = np.linspace(0, 4, 5)
    loss_Kn = np.array([2 + x_n, 6 - x_n, 3 - 0.2 * (x_n - 2) ** 2 - 2.5 * (x_n == 2)])
    found = find_minima(x_n, loss_Kn, np.ones((3, 5)), "all_points", 0.5)
    assert found.outcome_K.tolist()[:2] == [SMALLEST, LARGEST] and found.reason(0).startswith("the smallest")
    bent = find_minima(x_n, np.array([[1.0, 2.9, 0.9, 3.0, 1.0]]), np.ones((1, 5)), "all_points", 0.5)
    assert bent.outcome_K.tolist() == [BENT]


@pytest.mark.parametrize("method", ["akima", "parabola"])
def test_noise_intervals_cover_the_exponent(method, seed):
    """40 studies: 95% intervals hold the truth in .85 or more, which is three binomial standard errors below."""
    rng, hits = np.random.default_rng(seed), []
    for k in range(40):
        found = isoflop(planted(reach=0.45, num=9, noise=0.003, rng=rng), method, noise=0.003, seed=k, num_copies=300)
        low, high = found.lines["N"].exponent.interval(0.95)
        hits.append(low <= 0.28 / 0.62 <= high)
    assert np.mean(hits) >= 0.85


def test_noise_is_estimated_from_neighbours(seed):
    rng, budgets = np.random.default_rng(seed), np.geomspace(1e18, 1e21, 60)
    points = planted(reach=0.7, num=15, noise=0.004, rng=rng, budgets=budgets)
    assert 0.75 < estimate_noise(group_budgets(points)[0]) / 0.004 < 1.3
    smooth = estimate_noise(group_budgets(planted(reach=0.7))[0])
    assert smooth < 1e-4
    assert "estimated" in isoflop(points).table()


@pytest.mark.parametrize("method", METHODS)
def test_case_resampling_is_guarded(method, seed):
    """Drawing runs with replacement leaves copies with two sizes or a best one at the edge; none enters."""
    points = planted(reach=0.6, num=7, noise=0.002, rng=np.random.default_rng(seed))
    found = isoflop(points, method, resampling="cases", num_copies=200)
    for optimum in found.optima:
        assert np.isfinite(optimum.log_N_draws).all() and 100 <= len(optimum.log_N_draws) <= 200
    low, high = found.lines["N"].exponent.interval(0.95)
    assert low < found.lines["N"].slope < high and high - low < 0.6


def test_runs_a_few_per_cent_apart_share_a_budget(seed):
    rng = np.random.default_rng(seed)
    points = [p._replace(C=p.C * math.exp(rng.uniform(-0.01, 0.01))) for p in planted()]
    budgets, notes = group_budgets(points)
    assert [b.num_runs for b in budgets] == [15] * 5 and not notes
    assert [b.C for b in budgets] == pytest.approx(BUDGETS, rel=0.01)
    stray = Point("stray", 1e8, 1e9, 3e17, 3.0)
    budgets, notes = group_budgets([*points, stray, points[0]._replace(loss=points[0].loss + 0.2)])
    assert len(budgets) == 5 and "1 of 77 runs belong to no budget" in notes[0] and "averaged" in notes[1]
    assert budgets[0].loss[0] == pytest.approx(points[0].loss + 0.1)


def test_lines_weigh_each_optimum_by_its_inverse_variance(seed):
    points = planted(noise=0.001, rng=np.random.default_rng(seed))
    found = isoflop([*points[:15:3], *points[15:]], noise=0.001)
    sd_G = np.array([o.sd_log_N for o in found.optima])
    x_G, y_G = np.log([o.C for o in found.optima]), np.log([o.N for o in found.optima])
    assert sd_G[0] > 1.5 * sd_G[1] and found.lines["N"].slope == pytest.approx(np.polyfit(x_G, y_G, 1, w=1 / sd_G)[0])


def test_order_of_the_points_does_not_matter_and_neither_does_the_clock(seed):
    points = planted(noise=0.003, rng=np.random.default_rng(seed))
    shuffled = [points[i] for i in np.random.default_rng(seed + 1).permutation(len(points))]
    assert isoflop(points).table() == isoflop(shuffled).table() == isoflop(points).table()
    assert isoflop(points).table() != isoflop(points, seed=1).table()


LADDER = [Point(f"{i}", N, 20 * N, 120 * N**2, 3.0) for i, N in enumerate(np.geomspace(1e7, 1e9, 30))]
REFUSED = {
    "no points": ([], {}, "no points"),
    "a ladder": (LADDER, {}, "no compute budget"),
    "three sizes": (planted(num=3), {}, "no compute budget .* has 4 sizes"),
    "nan": ([planted()[0]._replace(loss=math.nan), *planted()[1:]], {}, "r0: loss=nan"),
    "negative": ([planted()[0]._replace(C=-1.0), *planted()[1:]], {}, "r0: C=-1.0"),
    "two counts of N": ([planted()[0]._replace(n_convention="total"), *planted()[1:]], {}, "ways of counting N"),
    "method": (planted(), {"method": "spline"}, "akima"),
    "resampling": (planted(), {"resampling": "runs"}, "noise, cases"),
    "window": (planted(), {"window": 0.0}, "window=0.0"),
    "noise": (planted(), {"noise": -1.0}, "noise=-1.0"),
    "drowned": (planted(), {"noise": 1.0}, "drowns"),
    "copies": (planted(), {"num_copies": 5}, "num_copies=5"),
    "one budget": (planted(budgets=BUDGETS[:2])[:15], {}, "needs two"),
}


@pytest.mark.parametrize(("points", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_is_wrong(points, options, said):
    with pytest.raises(ValueError, match=said):
        isoflop(points, **options)


def test_two_optima_are_said_to_test_nothing():
    assert any("two budgets" in note for note in isoflop(planted(budgets=BUDGETS[:2])).notes)


def test_prediction_at_a_budget_spends_it(seed):
    found = isoflop(planted(noise=0.003, rng=np.random.default_rng(seed)))
    at = found.at(1e21)
    assert 6 * at["N"].value * at["D"].value == pytest.approx(1e21, rel=0.02)
    low, high = at["N"].interval(0.95)
    near_low, near_high = found.at(1e19)["N"].interval(0.95)
    assert high / low > near_high / near_low
    assert at["tokens_per_param"].value == pytest.approx(at["D"].value / at["N"].value)
    with pytest.raises(ValueError, match="flops=-1"):
        found.at(-1)


def test_porian(scaling_data):
    """Ten published exponents and intervals, each within half a CPU second."""
    from slmjax.scaling.verify import porian

    checks = list(porian.checks(scaling_data))
    assert len(checks) == 31 and not [check for check in checks if not check.holds]
    for points, _ in porian.configurations(scaling_data).values():
        began = time.process_time()
        isoflop(points, noise=porian.NOISE)
        assert time.process_time() - began <= 0.5
