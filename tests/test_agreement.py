"""Three methods side by side, what is said when they differ, and two families at equal loss."""

import math

import numpy as np
import pytest

from slmjax.scaling import allocation
from slmjax.scaling.agreement import compare
from slmjax.scaling.envelope import curves_of_points, envelope
from slmjax.scaling.fit import fit
from slmjax.scaling.isoflop import isoflop
from slmjax.scaling.lines import Line
from slmjax.scaling.multiplier import compute_multiplier, optimum_line, side_by_side
from slmjax.scaling.points import Point


def best_size(C, alpha, beta):
    return (alpha * 406.4 / (beta * 410.7)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))


def planted(seed, reach=0.45, num=9, noise=0.001, alpha=0.34, beta=0.28, shift=0.0, raised=0.0):
    """Seven budgets, sizes within +-`reach` decades of the best; `shift` decades too low at first, too high at last;
    `raised`: what every size above the best pays in addition, per square decade."""
    rng, points, budgets = np.random.default_rng(seed), [], np.geomspace(1e18, 1e21, 7)
    for g, C in enumerate(budgets):
        for x in np.linspace(-reach, reach, num) + shift * (g / 3 - 1):
            N = best_size(C, alpha, beta) * 10**x
            D = C / (6 * N)
            loss = 1.69 + 406.4 * N**-alpha + 410.7 * D**-beta + raised * max(x, 0) ** 2 + rng.normal(0, noise)
            points.append(Point(f"r{len(points)}", N, D, C, loss))
    return points


def methods(points, *names):
    return [fit(points, num_bootstrap=300), *(isoflop(points, name) for name in names)]


def test_methods_agree_on_a_planted_surface(seed):
    points = planted(seed)
    made = compare([*methods(points, "akima", "parabola"), envelope(curves_of_points(points), ends="keep")])
    assert [row.method for row in made.rows] == [
        "parametric, chinchilla",
        "IsoFLOP, Akima",
        "IsoFLOP, parabola near the best",
        "envelope, records",
    ]
    assert made.flops == pytest.approx(1e21)
    for row in made.rows[:3]:
        assert row.exponent_N.value == pytest.approx(0.28 / 0.62, abs=0.08)
        assert row.exponent_N.value + row.exponent_D.value == pytest.approx(1, abs=0.01)
        assert row.N_at_largest.value == pytest.approx(best_size(1e21, 0.34, 0.28), rel=0.5)
        ratio = row.N_at_ten_times.value / row.N_at_largest.value
        assert math.log10(ratio) == pytest.approx(row.exponent_N.value, abs=1e-6)
    text = made.table()
    assert text.count("\n") >= 6 and "envelope: what the smallest and largest size hold is kept" in text
    assert made.agree == ("the methods agree" in text)


def test_parametric_exponent_is_beta_over_alpha_plus_beta(seed):
    found = fit(planted(seed), num_bootstrap=100)
    row = compare([found, isoflop(planted(seed))]).rows[0]
    alpha, beta = found.parameters["alpha"], found.parameters["beta"]
    assert row.exponent_N.value == pytest.approx(beta / (alpha + beta), rel=1e-9)
    draws = found.parameter_draws
    expected = draws["beta"] / (draws["alpha"] + draws["beta"])
    assert row.exponent_N.draws == pytest.approx(expected, rel=1e-6)


def test_flops_are_those_of_the_runs_unless_told(seed):
    """Runs that logged a head's FLOPs: the parametric optimum counts them as the other methods do, and says so."""
    points = [p._replace(C=p.C * (1 + 2e4 * p.N**-0.6)) for p in planted(seed)]
    found = fit(points, num_bootstrap=100)
    other = envelope(curves_of_points(points), ends="keep")
    for cost, rule in ((None, "logged"), ("logged", "logged"), ("6ND", "6ND")):
        made = compare([found, other], 1e21, cost)
        expected = allocation.make_cost(found, rule)
        assert made.rows[0].N_at_largest.value == pytest.approx(allocation.best(found, 1e21, expected)[0], rel=1e-9)
        assert f"parametric: {expected}; the other methods: the FLOPs of the runs" in made.table()
    mixed = [p._replace(C=p.C * (1.1 if i % 2 else 0.9)) for i, p in enumerate(points)]
    assert "parametric: C = 6 N D;" in compare([fit(mixed, num_bootstrap=100), other], 1e21).table()


def test_disagreement_is_named_and_explained():
    """Sizes that drift and a loss that rises faster on one side: the plain parabola goes elsewhere, and why is said."""
    points = planted(0, reach=1.0, num=15, noise=1e-4, shift=0.4, raised=2.0)
    made = compare([isoflop(points, "akima"), isoflop(points, "all_points")])
    assert not made.agree and {pair[:2] for pair in made.disagreements} == {("IsoFLOP, Akima", "IsoFLOP, all points")}
    text = made.table()
    assert "disagree on" in text and "may explain it" in text
    assert "IsoFLOP, all points: a parabola through all points" in text
    assert "drifts towards the smaller" in text and "rises faster above" in text
    centred = compare([isoflop(planted(0), "akima"), isoflop(planted(0), "parabola")])
    assert not any("drift" in reason or "rises faster" in reason or "far from" in reason for reason in centred.reasons)


def test_discarded_budgets_are_counted():
    points = planted(0, num=15)
    cut = [*points[10:15], *points[15:]]
    assert any("1 of 7 budgets discarded" in reason for reason in compare(methods(cut, "akima")).reasons)


def test_bad_comparisons_are_refused():
    found = isoflop(planted(0))
    with pytest.raises(ValueError, match="at least two"):
        compare([found])
    with pytest.raises(ValueError, match="flops=-1"):
        compare([found, found], flops=-1)


# --- two families -----------------------------------------------------------------------------------------------------


def test_multiplier_of_families_one_factor_apart_is_that_factor():
    C = np.geomspace(1e18, 1e20, 5)
    one, other = optimum_line(C, 40 * C**-0.06), optimum_line(C, 40 * (C / 16) ** -0.06)
    for anchor in ("first", "second"):
        for flops in (1e17, 1e19, 1e22):
            assert compute_multiplier(one, other, flops, anchor).value == pytest.approx(16, rel=1e-9)
            low, high = compute_multiplier(one, other, flops, anchor).interval(0.95)
            assert low == pytest.approx(16, rel=1e-6) and high == pytest.approx(16, rel=1e-6)


def test_anchors_name_the_same_pair_of_budgets():
    C = np.geomspace(1e18, 1e20, 5)
    one, other = optimum_line(C, 45 * C**-0.064), optimum_line(C, 50 * C**-0.0625)
    first = compute_multiplier(one, other, 1e19, "first").value
    second = compute_multiplier(one, other, 1e19 * first, "second").value
    assert second == pytest.approx(first, rel=1e-9) and first != pytest.approx(
        compute_multiplier(one, other, 1e19, "second").value, rel=1e-3
    )


def test_intervals_of_few_printed_optima_cover(seed):
    """400 tables of five optima with 0.3% scatter: the 95% interval of the multiplier holds the truth as often."""
    rng, C, hits = np.random.default_rng(seed), np.geomspace(6e18, 1e20, 5), []
    for k in range(400):
        one, other = (
            optimum_line(C, c * C**-0.06 * np.exp(rng.normal(0, 0.003, 5)), num_draws=400, seed=2 * k + i)
            for i, c in enumerate((40, 40 * 16**0.06))
        )
        low, high = compute_multiplier(one, other, 1e19).interval(0.95)
        hits.append(low <= 16 <= high)
    assert np.mean(hits) > 0.90


def test_side_by_side_of_two_isoflop_fits(seed):
    """The second family is the first with sixteen times less from each unit of compute: N and D sixteenfold."""
    first = planted(seed)
    second = [p._replace(N=4 * p.N, D=4 * p.D, C=16 * p.C) for p in first]
    made = side_by_side(isoflop(first), isoflop(second))
    assert len(made.rows) == 7 and "MDM" in made.table() and "multiplier" in made.table()
    for row in made.rows:
        assert row["multiplier"].value == pytest.approx(16, rel=1e-6) and row["loss"][1] > row["loss"][0]


def test_bad_families_are_refused():
    C = np.geomspace(1e18, 1e20, 5)
    falling, rising = optimum_line(C, C**-0.06), Line(0.0, 0.1, 0.0, np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="does not fall"):
        compute_multiplier(falling, rising, 1e19)
    with pytest.raises(ValueError, match="first, second"):
        compute_multiplier(falling, falling, 1e19, "AR")
    with pytest.raises(ValueError, match="at least three"):
        optimum_line(C[:2], C[:2])
    with pytest.raises(ValueError, match="positive finite"):
        optimum_line(C, [1, 2, 3, 4, math.nan])


def test_smdm():
    """Exponents and multipliers of the printed table of masked diffusion beside autoregression."""
    from slmjax.scaling.verify import smdm

    checks = list(smdm.checks(None))
    assert len(checks) == 14 and not [check for check in checks if not check.holds]
