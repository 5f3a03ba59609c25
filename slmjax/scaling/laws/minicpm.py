"""MiniCPM's law for WSD runs: the Chinchilla surface in billions."""

from slmjax.scaling.laws._power_sum import PowerSum


def _fit(*values):
    return dict(zip(("C_N", "alpha", "C_D", "beta", "L0"), values, strict=True))


law = PowerSum(
    name="minicpm",
    formula="L = C_N N^-alpha + C_D D^-beta + L0 (N, D in 1e9)",
    inputs=("N", "D"),
    floor="L0",
    coefficients=("C_N", "C_D"),
    exponents=("alpha", "beta"),
    units={"N": 1e9, "D": 1e9},
    source="MiniCPM (arXiv 2404.06395), section 4.5; their loss is per byte",
    # The first three names are inferred from the order of the figure's panels.
    published={
        "code": _fit(3.32e-2, 0.37, 2.17e-1, 0.34, 0.17),
        "en_wikihow": _fit(8.08e-2, 0.26, 2.97e-1, 0.18, 0.27),
        "zh_wikihow": _fit(5.14e-2, 0.35, 3.90e-1, 0.18, 0.40),
        "ultratext": _fit(7.54e-2, 0.30, 2.92e-1, 0.30, 0.25),
        "zh_yayi": _fit(1.53e-1, 0.19, 3.76e-1, 0.17, 0.35),
        "average": _fit(7.15e-2, 0.29, 3.00e-1, 0.23, 0.31),
    },
)
