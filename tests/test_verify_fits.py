"""Published fits computed again from the public tables, and the same claims on planted data where no table is."""

import math

import numpy as np
import pytest

from slmjax.scaling.fit import fit
from slmjax.scaling.points import Point
from slmjax.scaling.verify import chinchilla, data_constrained, routing, vocabulary


@pytest.mark.parametrize("source", [chinchilla, data_constrained, routing, vocabulary], ids=lambda m: m.SOURCE)
def test_published_fits_hold(source, scaling_data):
    found = list(source.checks(scaling_data))
    assert len(found) >= 8 and [check for check in found if not check.holds] == []


@pytest.mark.parametrize("source", [chinchilla, data_constrained, routing, vocabulary], ids=lambda m: m.SOURCE)
def test_without_tables_only_what_needs_none_is_computed(source):
    found = list(source.checks(None))
    assert all(check.holds for check in found)
    assert len(found) == (5 if source is chinchilla else 0)


def test_least_deviations_and_huber_are_two_answers(seed):
    """The Chinchilla story, planted: Huber at 1e-3 and absolute deviations have minima of their own."""
    rng = np.random.default_rng(seed)
    points = []
    for i, (N, ratio) in enumerate((N, r) for N in np.geomspace(1e7, 1e9, 6) for r in (5, 10, 20, 40, 80)):
        loss = 1.69 + 406.4 * N**-0.34 + 410.7 * (N * ratio) ** -0.28
        points.append(Point(f"r{i}", N, N * ratio, 6 * N * N * ratio, loss * math.exp(0.002 * rng.standard_t(3))))
    huber, deviations = (fit(points, delta=delta, num_bootstrap=100) for delta in (1e-3, 1e-7))
    assert huber.objective < huber.objective_at(deviations.parameters)
    assert deviations.objective < deviations.objective_at(huber.parameters)
    assert deviations.objective / 1e-7 == pytest.approx(np.abs(deviations.residuals()).sum(), rel=1e-3)


def test_constants_of_repetition_that_no_run_shows_are_called_so(seed):
    """Half an epoch of repetition among runs that scatter by 1% says nothing about R_D; forty epochs do."""
    rng, E, A, B, alpha, R = np.random.default_rng(seed), 1.87, 521.0, 1488.0, 0.35, 8.0

    def study(epochs, noise):
        for i in range(60):
            N, U = 10 ** rng.uniform(7, 8.5), 10 ** rng.uniform(9, 10.5)
            D = U * rng.uniform(1, epochs)
            effective = U + U * R * (1 - math.exp(-(D / U - 1) / R))
            loss = (E + A / N**alpha + B / effective**alpha) * math.exp(rng.normal(0, noise))
            yield Point(f"r{i}", N, D, 6 * N * D, loss, inputs={"U": U})

    held = {"E": E, "A": A, "B": B, "alpha": alpha}
    short, long = (
        fit(list(study(*made)), "data_constrained", fixed=held, num_bootstrap=300)
        for made in ((1.5, 0.01), (40, 0.003))
    )
    assert long.starts["num"] == 25  # every pair of the law's grid: with A, B and alpha held, their order says nothing
    assert "R_D" in short.weakly_identified() and "R_D" not in long.weakly_identified()
    assert long.parameters["R_D"] == pytest.approx(R, rel=0.2)
