"""The envelope: what lies on it, power laws along a planted one, Huber lines, vocabularies, and the published lines."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from slmjax.scaling import vocabulary
from slmjax.scaling.envelope import Curve, curves_of_points, curves_of_runs, envelope, record_lows
from slmjax.scaling.lines import Line, huber_lines, weighted_line
from slmjax.scaling.points import Point

EXPONENT = 0.28 / 0.62


def loss_of(N, D):
    return 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28


def planted(num_sizes=16, num_points=80, noise=0.0, rng=None):
    """Constant-rate curves of sizes 1e7..1e10, all logged from 1e8 to 1e12 tokens."""
    curves = []
    for r, N in enumerate(np.geomspace(1e7, 1e10, num_sizes)):
        D = np.geomspace(1e8, 1e12, num_points)
        jitter = rng.normal(0, noise, num_points) if noise else 0.0
        curves.append(Curve(f"r{r}", N, 6 * N * D, D, loss_of(N, D) * np.exp(jitter)))
    return curves


def test_records_are_the_points_below_all_cheaper_ones(seed):
    rng = np.random.default_rng(seed)
    C_n = rng.permutation(60) + 1.0
    loss_n = 3 - 0.02 * C_n + rng.uniform(0, 0.1, 60)
    brute = {i for i in range(60) if all(loss_n[j] > loss_n[i] for j in range(60) if C_n[j] < C_n[i])}
    found = record_lows(C_n, loss_n)
    assert set(found.tolist()) == brute and (np.diff(C_n[found]) > 0).all() and (np.diff(loss_n[found]) < 0).all()
    curves = [Curve(f"r{i}", 10.0 ** (7 + i % 8), C_n[i : i + 1], C_n[i : i + 1], loss_n[i : i + 1]) for i in range(60)]
    assert [p["C"] for p in envelope(curves, ends="keep").frontier] == C_n[found].tolist()


@pytest.mark.parametrize("reading", ["records", "interpolated"])
def test_power_laws_along_a_planted_envelope(reading, seed):
    for rng, noise in ((None, 0.0), (np.random.default_rng(seed), 1e-3)):
        found = envelope(planted(noise=noise, rng=rng), reading, num_bootstrap=200)
        assert found.lines["N"].slope == pytest.approx(EXPONENT, abs=0.015)
        assert found.lines["D"].slope == pytest.approx(1 - EXPONENT, abs=0.015)
        low, high = found.lines["N"].exponent.interval(0.95)
        # Steps from size to size bias the line by up to .01; the bootstrap cannot know.
        assert low - 0.01 < EXPONENT < high + 0.01 and high - low < 0.15
        at = found.at(1e20)
        assert 6 * at["N"].value * at["D"].value == pytest.approx(1e20, rel=0.1)


def test_interpolated_finds_the_best_curve_at_each_budget():
    curves = planted(num_sizes=6, num_points=40)
    found = envelope(curves, "interpolated", num_budgets=50, num_bootstrap=100)
    for point in found.frontier[10:40]:
        reached = [
            math.exp(np.interp(math.log(point["C"]), np.log(c.C), np.log(c.loss)))
            for c in curves
            if c.C[0] <= point["C"] <= c.C[-1]
        ]
        assert point["loss"] == pytest.approx(min(reached), rel=1e-12)


def test_what_the_end_sizes_hold_is_left_out():
    """Twenty times the budgets that the largest size is best at: keeping them flattens the line, dropping does not."""
    curves = planted(num_sizes=8)
    for r in (0, 7):
        curves[r] = curves[r]._replace(
            C=(C := np.geomspace(curves[r].C[0] / 1e2, curves[r].C[-1] * 1e4, 200)),
            D=C / (6 * curves[r].N),
            loss=loss_of(curves[r].N, C / (6 * curves[r].N)),
        )
    kept, dropped = (envelope(curves, "interpolated", ends, num_bootstrap=100) for ends in ("keep", "drop"))
    assert abs(dropped.lines["N"].slope - EXPONENT) < 0.03 < EXPONENT - kept.lines["N"].slope
    assert any("held by the smallest or largest size" in note for note in dropped.notes)
    assert not any("held by" in note for note in kept.notes)


def test_imposed_exponents_and_outliers():
    curves = planted()
    assert envelope(curves, exponents={"N": 0.5}, num_bootstrap=100).lines["N"].slope == 0.5
    rng = np.random.default_rng(0)
    x_n = np.sort(rng.uniform(0, 10, 60))
    y_n = 1 + 0.5 * x_n + rng.normal(0, 1e-4, 60)
    y_n[:6] += 3
    one_1n = np.ones((1, 60))
    robust, squares = (huber_lines(x_n, y_n, one_1n, delta)[0][0] for delta in (1e-3, math.inf))
    assert abs(robust - 0.5) < 1e-4 < 0.05 < abs(squares - 0.5)


@pytest.mark.parametrize("exponent", [None, 0.4])
def test_huber_lines_are_minima(exponent, seed):
    """No line near a found one is better, for every resample; for a delta beyond all residuals it is least squares."""
    rng = np.random.default_rng(seed)
    x_n, y_n = np.sort(rng.uniform(30, 50, 40)), rng.normal(0, 0.3, 40)
    y_n = y_n + 0.45 * x_n
    weight_Kn = rng.multinomial(40, np.full(40, 1 / 40), 20).astype(float)
    for delta in (1e-2, 0.3, 1e3):
        slope_K, level_K, centre = huber_lines(x_n, y_n, weight_Kn, delta, exponent)

        def total(slope, level, weight_n, delta=delta, centre=centre):
            r = np.abs(level + slope * (x_n - centre) - y_n)
            return float(weight_n @ np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)))

        for slope, level, weight_n in zip(slope_K, level_K, weight_Kn, strict=True):
            least = total(slope, level, weight_n)
            moves = [(0, 0.01), (0, -0.01)] + ([] if exponent else [(0.003, 0), (-0.003, 0), (0.003, 0.01)])
            assert all(total(slope + a, level + b, weight_n) >= least * (1 - 1e-7) for a, b in moves)
    plain = huber_lines(x_n, y_n, weight_Kn, math.inf, exponent)
    assert plain[0] == pytest.approx(slope_K, rel=1e-6) and plain[1] == pytest.approx(level_K, rel=1e-6)


def test_weighted_line_goes_through_exact_points_and_leans_on_heavy_ones():
    x_n, weight_n = np.array([40.0, 41, 43, 46]), np.array([1.0, 2, 3, 4])
    line = weighted_line(x_n, 2 + 0.5 * x_n, np.tile(2 + 0.5 * x_n, (3, 1)), weight_n)
    assert line.slope == pytest.approx(0.5) and line.coefficient.value == pytest.approx(math.exp(2))
    assert line.exponent.interval(0.95) == pytest.approx((0.5, 0.5))
    bent_n = np.array([0.0, 1, 2, 9])
    heavy = weighted_line(x_n, bent_n, np.empty((0, 4)), np.array([1e9, 1, 1e9, 1]))
    assert heavy.slope == pytest.approx(2 / 3, rel=1e-6)
    with pytest.raises(ValueError, match="two budgets"):
        weighted_line(x_n[:1], bent_n[:1], np.empty((0, 1)), weight_n[:1])


def test_curves_of_points_and_runs():
    rows = [Point("a", 1e7, D, 6e7 * D, loss_of(1e7, D)) for D in (4e8, 1e8, 2e8)] + [Point("b", 1e8, 1e9, 6e17, 3.0)]
    a, b = curves_of_points(rows)
    assert a.run_id == "a" and a.D.tolist() == [1e8, 2e8, 4e8] and len(b.loss) == 1
    with pytest.raises(ValueError, match="run a has points of several N"):
        curves_of_points([*rows, Point("a", 2e7, 1e9, 1e17, 3.0)])
    with pytest.raises(ValueError, match="no points"):
        curves_of_points([])
    evals = [{"tokens": 0, "loss": 9.0}, {"tokens": 100, "loss": 5.0}, {"tokens": 200, "loss": None}]
    start = {"counts": {"total": 30, "non_embedding": 20}, "flops_per_token": {"with_head": 180, "without_head": 120}}
    runs = [SimpleNamespace(run_id="x", start=start, evals=evals), SimpleNamespace(run_id="y", start={}, evals=[])]
    (curve,) = curves_of_runs(runs, n="total", flops="without_head")
    assert (curve.N, curve.C.tolist(), curve.D.tolist()) == (30.0, [12000.0], [100.0])


REFUSED = {
    "reading": (planted(), {"reading": "best"}, "records, interpolated"),
    "ends": (planted(), {"ends": "cut"}, "drop, keep"),
    "delta": (planted(), {"delta": 0.0}, "delta=0.0"),
    "exponents": (planted(), {"exponents": {"H": 0.5}}, "'H'"),
    "bootstrap": (planted(), {"num_bootstrap": 3}, "num_bootstrap=3"),
    "two sizes": (planted(num_sizes=2), {"ends": "keep"}, "passes through 2 sizes"),
    "four sizes, ends dropped": (planted(num_sizes=4), {}, "2 sizes between"),
    "end points": (
        [Curve(f"{N}", N, np.array([6e9 * N]), np.array([1e9]), np.array([3.0])) for N in (1e7, 1e8, 1e9)],
        {"reading": "interpolated"},
        "needs training curves",
    ),
}


@pytest.mark.parametrize(("curves", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_is_wrong(curves, options, said):
    with pytest.raises(ValueError, match=said):
        envelope(curves, **options)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="run a: nan"):
        curves_of_points([Point("a", 1e7, 1e8, 6e15, math.nan)])


def test_same_input_same_text(seed):
    curves = planted(noise=1e-3, rng=np.random.default_rng(seed))
    assert envelope(curves, num_bootstrap=100).table() == envelope(curves, num_bootstrap=100).table()
    assert "unless the schedule was constant" in envelope(curves, num_bootstrap=100).table()


# --- vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "d"), [(33e6, 512), (302e6, 1024), (7e9, 4096)])
def test_cheapest_vocabulary_reads_a_text_with_the_fewest_flops(N, d):
    V = vocabulary.cheapest_vocabulary(N, d)
    cost = [vocabulary.flops(N, V * factor, d, 1e9) for factor in (0.9, 0.99, 1.0, 1.01, 1.1)]
    assert min(cost) == cost[2] and 1e3 < V < 2e5


def test_derivative_exponent_of_models_on_a_power_law():
    """With widths chosen so that N_v = N^gamma exactly at the optimum, gamma comes back."""
    N_n = np.geomspace(1e8, 1e9, 5)

    def width(N):
        """The width at which the cheapest embedding has 2 N^.8 parameters, by bisection."""
        low, high = 10.0, 1e5
        for _ in range(80):
            middle = math.sqrt(low * high)
            below = vocabulary.cheapest_vocabulary(N, middle) * middle < 2 * N**0.8
            low, high = (middle, high) if below else (low, middle)
        return low

    d_n = np.array([width(N) for N in N_n])
    assert vocabulary.derivative_exponent(N_n, d_n) == pytest.approx(0.8, abs=1e-6)
    grown = vocabulary.scaled_vocabulary(N_n[-1], d_n[-1], N_n[0], 2 * N_n[0] ** 0.8, 0.8)
    assert grown == pytest.approx(vocabulary.cheapest_vocabulary(N_n[-1], d_n[-1]), rel=1e-6)


def test_vocabulary_lines_along_planted_records(seed):
    rng = np.random.default_rng(seed)
    C_n = np.geomspace(1e16, 1e20, 50)
    good = {"C": C_n, "loss": -np.log(C_n), "N": 0.1 * C_n**0.5, "N_v": 0.2 * C_n**0.42}
    order = rng.permutation(100)
    bad = {"C": C_n, "loss": 5 - np.log(C_n), "N": 3.0 * C_n**0.5, "N_v": 2.0 * C_n**0.42}
    both = {name: np.concatenate([good[name], bad[name]])[order] for name in good}
    found = vocabulary.allocate(
        both["C"], both["loss"], {name: both[name] for name in ("N", "N_v")}, exponents={"N": 0.5}
    )
    assert found.frontier["C"] == pytest.approx(C_n)
    assert found.lines["N"].coefficient.value == pytest.approx(0.1) and found.lines["N"].slope == 0.5
    assert found.lines["N_v"].slope == pytest.approx(0.42) and found.lines["N_v"].at(1e21).value == pytest.approx(
        0.2 * 1e21**0.42
    )
    with pytest.raises(ValueError, match="N holds values"):
        vocabulary.allocate(C_n, -np.log(C_n), {"N": -C_n})
    with pytest.raises(ValueError, match="needs three"):
        vocabulary.allocate(C_n, np.log(C_n), {"N": C_n})
    with pytest.raises(ValueError, match="beyond what was measured"):
        vocabulary.cheapest_vocabulary(1e13, 1024)


def test_a_line_refuses_no_budget():
    with pytest.raises(ValueError, match="flops=0"):
        Line(0.0, 1.0, 0.0, np.empty(0), np.empty(0)).at(0)


def test_tao(scaling_data):
    """Approach 1 to every printed digit, approach 2's exponent and vocabularies; `slmjax fit --verify` prints them."""
    from slmjax.scaling.verify import tao

    checks = list(tao.checks(scaling_data))
    assert len(checks) == 16 and not [check for check in checks if not check.holds]
