"""What a law needs of the points: a design that cannot tell effects apart is named by the inputs that are bound."""

import numpy as np
import pytest

from slmjax.scaling import design, laws
from slmjax.scaling.points import Point, PointSet


def runs(columns, rng):
    """Points of N, D and further inputs by name, with losses that do not matter."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return PointSet(
        tuple(
            Point(f"r{i}", row["N"], row["D"], None, 3 + rng.random(), inputs={"U": row["U"]})
            for i, row in enumerate(rows)
        )
    )


@pytest.mark.parametrize("bound", [("N", "D"), ("N", "U"), ("D", "U"), ("N", "D", "U")])
def test_only_inputs_that_are_bound_are_named(bound, seed):
    rng = np.random.default_rng(seed)
    # What is not bound varies most: the inputs of the largest spread are not those to be named.
    columns = {name: np.exp(rng.normal(18, 1 if name in bound else 6, 40)) for name in ("N", "D", "U")}
    *others, last = bound
    columns[last] = 3 * np.prod([columns[name] for name in others], axis=0) ** 0.7
    with pytest.raises(ValueError, match="degenerate design") as raised:
        design.validated(runs(columns, rng), laws.load_law("data_constrained"), "log", 6)
    text = str(raised.value)
    if len(bound) == 2:
        assert f"{bound[1]} follows {bound[0]} in all runs" in text
    else:
        assert "N, D and U hang together" in text


def test_an_input_that_hardly_varies_is_named_alone(seed):
    rng = np.random.default_rng(seed)
    columns = {"N": np.exp(rng.normal(18, 3, 40)), "U": np.exp(rng.normal(18, 3, 40))}
    columns["D"] = 1e9 * np.array([1, 1.03, 1.06])[np.arange(40) % 3]
    with pytest.raises(ValueError, match=r"degenerate design: D differs by no more than a factor 1\.06"):
        design.validated(runs(columns, rng), laws.load_law("data_constrained"), "log", 6)


def test_inputs_that_vary_on_their_own_are_a_design(seed):
    rng = np.random.default_rng(seed)
    columns = {name: np.exp(rng.normal(18, 2, 40)) for name in ("N", "D", "U")}
    log_x_Fn, loss_n = design.validated(runs(columns, rng), laws.load_law("data_constrained"), "log", 6)
    assert log_x_Fn.shape == (3, 40) and loss_n.shape == (40,)
