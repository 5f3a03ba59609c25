"""Routed models: Clark et al. 2022 (arXiv 2202.01169) from `routing_clark2022_dense_sbase_rlr.csv`.

The printed values are rounded and their subset of runs is not stated; here k = 1 and every other layer routed, final
evaluation, least squares in log10 loss. E_start and E_max are weakly identified, so they are not compared.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling.fit import fit
from slmjax.scaling.points import load_points
from slmjax.scaling.verify import Check

SOURCE = "routing"
LEAST_SQUARES = 10.0  # no residual of a log loss comes near it
COLUMNS = {"N": "dense_parameter_count", "D": "step", "E": "num_experts", "loss": "loss_validation"}
MEASURED = {"S-Base": ("s_base", -0.0835, 1.1160), "RL-R": ("rl_r", -0.0829, 1.1060)}


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    table = folder / "routing_clark2022_dense_sbase_rlr.csv"
    for router, (label, a, d) in MEASURED.items():
        where = [f"router_type={router}", "k=1", "routing_frequency=0.5"]
        found = fit(load_points([table], COLUMNS, where=where), "clark_routing", delta=LEAST_SQUARES, num_bootstrap=100)
        published = found.form.published[label]
        yield Check(SOURCE, f"{router}: a", found.parameters["a"], published["a"], a, tolerance=0.003)
        yield Check(SOURCE, f"{router}: d", found.parameters["d"], published["d"], d, tolerance=0.02)
        rms = float(np.sqrt(np.mean(found.residuals() ** 2)) / np.log(10))
        yield Check(SOURCE, f"{router}: rmse of log10 loss", rms, measured=0.0034, against="measured", at_most=True)
    dense = load_points([table], COLUMNS, where=["router_type=Dense", "k=1", "routing_frequency=0.5"])
    found = fit(dense, "kaplan_size", delta=LEAST_SQUARES, num_bootstrap=100)
    for name, measured, tolerance in (("alpha_N", 0.0788, 5e-5), ("N_c", 3.42e13, 5e10)):
        theirs = found.form.published["clark2022_dense"][name]
        yield Check(SOURCE, f"dense: {name}", found.parameters[name], theirs, measured, tolerance, against="measured")
