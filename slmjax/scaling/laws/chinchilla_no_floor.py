"""The Chinchilla surface without a floor: what the floor is worth."""

from slmjax.scaling.laws._power_sum import PowerSum

law = PowerSum(
    name="chinchilla_no_floor",
    formula="L = A/N^alpha + B/D^beta",
    inputs=("N", "D"),
    coefficients=("A", "B"),
    exponents=("alpha", "beta"),
    floor=None,
    source="the form of Hoffmann et al. 2022 (arXiv 2203.15556) at E = 0, for comparison",
)
