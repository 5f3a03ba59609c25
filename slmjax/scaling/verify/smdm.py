"""Masked diffusion beside autoregression: the optima that SMDM prints (2410.18514), and Quokka's planner (2510.03280)
from its printed lines. No table is read: the printed numbers stand here."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling.lines import Line
from slmjax.scaling.multiplier import compute_multiplier, optimum_line
from slmjax.scaling.verify import Check

SOURCE = "SMDM 2410.18514"
FLOPS = (6e18, 1e19, 3e19, 6e19, 1e20)
LOSS = {"AR": (2.846, 2.749, 2.555, 2.447, 2.379), "MDM": (3.374, 3.261, 3.041, 2.916, 2.830)}
SIZE = {"AR": (152e6, 225e6, 446e6, 627e6, 1005e6), "MDM": (84e6, 111e6, 229e6, 362e6, 478e6)}
EXPONENTS = {"AR": {"loss": -0.0642, "N": 0.643}, "MDM": {"loss": -0.0625, "N": 0.630}}
COEFFICIENTS = {"AR": 45.6, "MDM": 50.3}

# Quokka's N* and D*: coefficient and exponent
LINES = {"N": (0.0216, 0.514), "D": (7.7, 0.486)}
# Quokka's planner: N, its optimal compute and tokens
PLANNER = ((400e6, 9.46e19, 39.3e9), (1e9, 5.62e20, 93.5e9), (10e9, 4.96e22, 825e9))


def checks(folder: Path | None) -> Iterator[Check]:
    lines = {name: optimum_line(FLOPS, loss) for name, loss in LOSS.items()}
    for name, line in lines.items():
        published = EXPONENTS[name]
        yield Check(SOURCE, f"{name} loss exponent", line.slope, published=published["loss"], tolerance=1e-3)
        yield Check(
            SOURCE, f"{name} loss coefficient", line.coefficient.value, published=COEFFICIENTS[name], tolerance=0.1
        )
        size = optimum_line(FLOPS, SIZE[name])
        yield Check(SOURCE, f"{name} exponent of N*", size.slope, published=published["N"], tolerance=1e-3)
    for anchor, value in (("first", 15.5), ("second", 14.4)):
        ours = compute_multiplier(lines["AR"], lines["MDM"], 1e19, anchor).value
        what = f"compute multiplier at {'AR' if anchor == 'first' else 'MDM'} compute 1e19"
        yield Check(SOURCE, what, ours, published=value, tolerance=0.5)
    nothing = np.empty(0)
    at = {name: Line(0.0, a, math.log(c), nothing, nothing).at for name, (c, a) in LINES.items()}
    for N, C, D in PLANNER:
        for name, published in (("N", N), ("D", D)):
            what = f"planner: {name} / 1e9 at {C:.3g} FLOPs"
            ours = at[name](C).value / 1e9
            yield Check("Quokka 2510.03280", what, ours, published=published / 1e9, tolerance=2e-3 * published / 1e9)
