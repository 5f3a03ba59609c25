"""Loss against compute, with a floor."""

from slmjax.scaling.laws._power_sum import PowerSum

law = PowerSum(
    name="power_law",
    formula="L = E + A/C^alpha",
    inputs=("C",),
    coefficients=("A",),
    exponents=("alpha",),
    source="Henighan et al. 2020 (arXiv 2010.14701), loss against compute with a floor",
)
