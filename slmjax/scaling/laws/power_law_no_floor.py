"""Loss against compute, without a floor."""

from slmjax.scaling.laws._power_sum import PowerSum

law = PowerSum(
    name="power_law_no_floor",
    formula="L = A/C^alpha (C in PFLOP/s-days)",
    inputs=("C",),
    coefficients=("A",),
    exponents=("alpha",),
    floor=None,
    units={"C": 86400e15},
    source="Kaplan et al. 2020 (arXiv 2001.08361), L(C)",
    published={
        "moonlight2025_muon": {"A": 2.506, "alpha": 0.052},  # arXiv 2502.16982
        "moonlight2025_adamw": {"A": 2.608, "alpha": 0.054},
    },
)
