"""The Chinchilla surface with one exponent: compute-optimal N and D then grow alike."""

from slmjax.scaling.laws._power_sum import PowerSum

law = PowerSum(
    name="chinchilla_tied",
    formula="L = E + A/N^alpha + B/D^alpha",
    inputs=("N", "D"),
    coefficients=("A", "B"),
    exponents=("alpha", "alpha"),
    source="Muennighoff et al. 2023 (arXiv 2305.16264), section 3: alpha = beta",
    # Their C4 law: log A 6.255414, log B 7.3049974, log E 0.6254804 in utils/parametric_fit.ipynb.
    published={"muennighoff2023_c4": {"E": 1.8691437, "A": 520.82495, "B": 1487.7161, "alpha": 0.3526596}},
)
