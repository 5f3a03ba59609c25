"""Leverage as measured: planted factors come back, by laws and by pairs; what cannot be compared is refused."""

import dataclasses
import math

import numpy as np
import pytest
from planted_study import write_study

from slmjax.scaling import allocation, families
from slmjax.scaling.fit import fit
from slmjax.scaling.leverage import inside_budgets, leverage_table, measured_leverage
from slmjax.scaling.leverage_pairs import paired_leverage
from slmjax.scaling.points import Point, PointSet

SIZES, RATIOS = np.geomspace(1e6, 1e8, 5), (5, 10, 20, 40, 80)


def points_of(family, loss, rng=None, noise=0.0, sizes=SIZES, ratios=RATIOS, excess=30.0, **more):
    """A grid of runs of loss(N, D); FLOPs as logged hold a head that small models feel, 6 N D (1 + excess N^-.4)."""
    made = []
    for N in sizes:
        for ratio in ratios:
            D = N * ratio
            C = 6 * N * D * (1 + excess * N**-0.4)
            seen = loss(N, D) * math.exp(rng.normal(0, noise) if noise else 0.0)
            of_run = {"family": family, "n_convention": "active_non_embedding", **more}
            made.append(Point(f"{family}-{N:.4g}-{ratio}", float(N), float(D), float(C), seen, **of_run))
    return made


def surface(rng):
    """A random Chinchilla law whose terms all count on the grid."""
    E, A, B = rng.uniform(1.2, 2.2), rng.uniform(100, 500), rng.uniform(300, 900)
    alpha, beta = rng.uniform(0.28, 0.38, 2)
    return lambda N, D: E + A * N**-alpha + B * D**-beta


def worth(loss, leverage):
    """The same law for a family to which each token is worth several: its optimum at C is the dense one's at
    leverage x C, whatever a token costs, as both pay the same."""
    return lambda N, D: loss(N, leverage * D)


def fitted(points, **options):
    return fit(PointSet(tuple(points)), **{"num_bootstrap": 100, **options})


def test_a_planted_leverage_comes_back_at_every_budget(seed):
    rng = np.random.default_rng(seed)
    loss, leverage = surface(rng), rng.uniform(0.5, 4)
    dense, moe = fitted(points_of("dense", loss)), fitted(points_of("moe", worth(loss, leverage)))
    for flops in inside_budgets(dense, moe):
        made = measured_leverage(dense, moe, flops)
        assert made.value == pytest.approx(leverage, rel=0.02), flops
        assert made.intervals[0.95][0] <= made.value <= made.intervals[0.95][1]
        assert made.given_reach <= 1 + 1e-9 and made.sought_reach == pytest.approx(
            made.value * flops / max(p["C"] for p in dense.points)
        )


def test_the_loss_compared_at_is_the_least_of_the_budget(seed):
    rng = np.random.default_rng(seed)
    loss = surface(rng)
    dense, moe = fitted(points_of("dense", loss)), fitted(points_of("moe", worth(loss, 2.0)))
    flops, cost = inside_budgets(dense, moe)[1], allocation.make_cost(moe, "logged")
    made = measured_leverage(dense, moe, flops)
    reached = [moe.predict(N=N, D=float(cost.tokens(N, flops))) for N in np.geomspace(1e5, 1e8, 3000)]
    assert made.loss == pytest.approx(min(reached), rel=1e-6)


@pytest.mark.parametrize("noisy", ["dense", "moe"])
def test_the_noise_of_either_family_is_in_the_interval(noisy):
    rng = np.random.default_rng(4)
    loss = surface(rng)
    dense, moe = (
        fitted(points_of(name, of, rng, 0.003 if name == noisy else 0.0))
        for name, of in (("dense", loss), ("moe", worth(loss, 2.0)))
    )
    made = measured_leverage(dense, moe, inside_budgets(dense, moe)[2])
    low, high = made.intervals[0.95]
    assert low < 0.99 * made.value and 1.01 * made.value < high < 2 * low


def test_the_leverage_back_is_the_inverse(seed):
    """Of any two laws, at the compute that the other was found to need."""
    rng = np.random.default_rng(seed)
    loss = surface(rng)
    dense = fitted(points_of("dense", loss, rng, 0.003))
    moe = fitted(points_of("moe", worth(loss, 2.0), rng, 0.003, sizes=SIZES[:4]))
    flops = inside_budgets(dense, moe)[1]
    there = measured_leverage(dense, moe, flops)
    back = measured_leverage(moe, dense, there.value * flops)
    assert there.value * back.value == pytest.approx(1, rel=1e-6) and there.loss == pytest.approx(back.loss, rel=1e-6)


def test_intervals_hold_a_planted_leverage(seed):
    """Of twenty studies; that 95% intervals hold it in fewer than 13 has odds of 1 in 1,000 even if they hold 90%, as
    those of fits to some twenty runs do."""
    rng = np.random.default_rng(seed)
    held = {"laws": 0, "pairs": 0}
    for _ in range(20):
        loss, leverage = surface(rng), rng.uniform(1.2, 3)
        first = points_of("dense", loss, rng, 0.003)
        second = points_of("moe", worth(loss, leverage), rng, 0.003, ratios=RATIOS[1:4])
        dense, moe = fitted(first), fitted(second)
        made = measured_leverage(dense, moe, inside_budgets(dense, moe)[2])
        (low, high), (paired_low, paired_high) = (
            made.intervals[0.95], paired_leverage(first, second).means[-1].intervals[0.95])  # fmt: skip
        held["laws"] += low <= leverage <= high
        held["pairs"] += paired_low <= leverage <= paired_high
    assert min(held.values()) >= 13, held


def test_a_loss_below_the_dense_floor_is_unbounded_and_said_so():
    rng = np.random.default_rng(0)
    loss = surface(rng)
    dense = fitted(points_of("dense", loss))
    moe = fitted(points_of("moe", lambda N, D: 0.3 * loss(N, D)))
    made = measured_leverage(dense, moe, inside_budgets(dense, moe)[-1])
    assert math.isinf(made.value) and math.isinf(made.intervals[0.95][1])
    assert "unbounded, extrapolation" in leverage_table([made]) and "nan" not in leverage_table([made])


def test_a_dense_law_used_beyond_its_runs_is_called_extrapolation():
    loss = surface(np.random.default_rng(1))
    dense = fitted(points_of("dense", loss))
    moe = fitted(points_of("moe", worth(loss, 3.0)))
    inside, outside = (measured_leverage(dense, moe, inside_budgets(dense, moe)[i]) for i in (1, -1))
    assert inside.sought_reach < 1 < outside.sought_reach == pytest.approx(3, rel=0.05)
    assert leverage_table([inside, outside]).count("extrapolation") == 1


def all_experts(points):
    return [p._replace(N=4 * p.N, n_convention="non_embedding") for p in points]


REFUSED = {
    "other N": (lambda d, m: (d, [p._replace(n_convention="total") for p in m]), "differ in n: active_non_embedding"),
    "other loss": (
        lambda d, m: (d, [p._replace(loss_kind="bound") for p in m]),
        "differ in loss kind: exact and bound",
    ),
    "other text": (lambda d, m: (d, [p._replace(corpus="b") for p in m]), "differ in corpus: None and b"),
    "all experts": (
        lambda d, m: ([p._replace(n_convention="non_embedding") for p in d], all_experts(m)),
        "family moe lie below 6 N D.*n=active_non_embedding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_different_things_is_not_compared(name):
    change, said = REFUSED[name]
    loss = surface(np.random.default_rng(2))
    dense, moe = map(fitted, change(points_of("dense", loss), points_of("moe", loss)))
    with pytest.raises(ValueError, match=said):
        measured_leverage(dense, moe, 1e16)


def test_families_without_a_shared_compute_or_an_optimum_are_refused():
    loss = surface(np.random.default_rng(3))
    dense = fitted(points_of("dense", loss))
    larger = fitted(points_of("moe", loss, sizes=1000 * SIZES))
    with pytest.raises(ValueError, match="no compute was spent by both"):
        inside_budgets(dense, larger)
    with pytest.raises(ValueError, match="power_law is a law of C"):
        measured_leverage(dense, fitted(points_of("moe", loss), law="power_law"), 1e16)


# --- pairs -----------------------------------------------------------------------------------------------------------


def straight(leverage=1.0):
    """Loss that falls along a straight line in log D at each size, so that reading between runs is exact."""
    return lambda N, D: 9 - 0.2 * math.log(N) - 0.15 * math.log(leverage * D)


def test_pairs_read_a_straight_curve_exactly_and_say_where_they_leave_it(seed):
    leverage = np.random.default_rng(seed).uniform(0.55, 1.8)
    dense, moe = points_of("dense", straight()), points_of("moe", straight(leverage))
    made = paired_leverage(dense, moe)
    assert len(made.pairs) == len(SIZES) * len(RATIOS)
    for pair in made.pairs:
        assert pair.sought_flops / pair.flops == pytest.approx(leverage)
        end = RATIOS[-1] if leverage > 1 else RATIOS[0]
        assert pair.beyond == math.isclose(pair.D, end * pair.N)
    assert made.means[-1].num_beyond == len(SIZES) and "(extrapolation)" in made.table()


def test_pairs_need_equal_active_size_and_tokens_and_average_what_was_repeated():
    dense = points_of("dense", straight(), sizes=SIZES[:2])
    near = [p._replace(N=1.03 * p.N) for p in points_of("moe", straight(1.5), sizes=SIZES[:2])]
    assert paired_leverage(dense, near).means[-1].value == pytest.approx(1.5)
    for change in ({"N": 1.1}, {"D": 1.1}):
        (name, factor), = change.items()  # fmt: skip
        far = [p._replace(**{name: factor * getattr(p, name)}) for p in near]
        with pytest.raises(ValueError, match=r"no run of moe has the tokens.*active_non_embedding"):
            paired_leverage(dense, far)
    repeated = [p._replace(loss=p.loss + shift) for p in near for shift in (-0.01, 0.01)]
    assert paired_leverage(dense, repeated).means == paired_leverage(dense, near).means
    with pytest.raises(ValueError, match="one dense run of this size shows no slope"):
        paired_leverage(points_of("dense", straight(), sizes=SIZES[:1], ratios=(20,)), near)


def test_one_size_tells_no_interval_and_several_tell_students():
    dense = points_of("dense", straight())
    one = paired_leverage(dense, points_of("moe", straight(1.5), sizes=SIZES[:1]))
    (mean,) = one.means
    assert mean.D is None and mean.num_sizes == 1 and mean.intervals[0.95] == (-math.inf, math.inf)
    assert "unbounded to unbounded" in one.table()
    moe = [p for N, b in zip(SIZES[:3], (1.4, 1.5, 1.6), strict=True) for p in points_of("moe", straight(b), sizes=[N])]
    mean = paired_leverage(dense, moe).means[-1]
    log_b = np.log([1.4, 1.5, 1.6])
    half = 4.302653 * log_b.std(ddof=1) / math.sqrt(3)  # Student's t of 2 degrees of freedom
    assert np.log(mean.intervals[0.95]) == pytest.approx([log_b.mean() - half, log_b.mean() + half], rel=1e-6)


# --- families of a study ---------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "two", mixture=((64, 96, 128, 192), (10, 20, 40)), mishaps=False)


def test_families_of_a_study_count_active_parameters_and_one_family_counts_as_ever(study, tmp_path):
    points = families.load([study])
    assert points.families() == ("dense", "moe")
    assert {p.n_convention for p in points.points} == {"active_non_embedding"}
    by_width = {(p.family, p.tags["width"]): p.N for p in points.points}
    assert all(by_width["moe", width] == by_width["dense", width] for width in (64, 96, 128, 192))
    every = families.load([study], n="non_embedding").points
    assert {p.N for p in every if p.family == "moe"} == {
        4 * N for (family, _), N in by_width.items() if family == "moe"
    }
    alone = families.load([write_study(tmp_path / "one", mishaps=False)])
    assert {p.n_convention for p in alone.points} == {"non_embedding"}
    with pytest.raises(ValueError, match="the points mix model families: dense, moe"):
        fit(points)
    with pytest.raises(ValueError, match="1 model families"):
        families.fit_families(alone, fit)


def test_a_family_without_a_law_is_said_and_its_pairs_still_speak(study):
    points = families.load([study])
    few = dataclasses.replace(points, points=tuple(p for p in points.points if p.family == "dense" or p.N < 2e5))
    made = families.fit_families(few, lambda of_family: fit(of_family, num_bootstrap=100))
    assert set(made.fits) == {"dense"} and "too few" in made.refusals["moe"]
    (comparison,) = made.comparisons
    assert comparison.leverages.startswith("moe has no law: ") and comparison.pairs.means[-1].num_sizes == 1
    assert "by the fitted laws: not here: moe has no law" in comparison.table()


def test_a_count_that_the_logs_do_not_have_is_refused_unless_there_are_no_experts(study):
    before = families.load([study]).points
    (log,) = (study / "w0064r010").glob("attempt-*.jsonl")
    log.write_text(log.read_text().replace('"active_non_embedding"', '"other"'))
    assert families.load([study]).points == before
    (log,) = (study / "m0064r010").glob("attempt-*.jsonl")
    log.write_text(log.read_text().replace('"active_non_embedding"', '"other"'))
    with pytest.raises(ValueError, match=r"m0064r010: its log counts .* and no active_non_embedding"):
        families.load([study])
