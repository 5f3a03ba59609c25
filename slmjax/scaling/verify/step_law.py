"""Step Law (Li et al. 2025, arXiv 2503.04715) from its released sweep, `steplaw_dense.csv`."""

from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.rates import hyper_fit
from slmjax.scaling.rates.hyper_laws import step_law
from slmjax.scaling.verify import Check

TABLE = "steplaw_dense.csv"
# The best row of every cell by smoothed loss, then least squares, computed once independently of this code.
MEASURED = {"lr_N": -0.823, "lr_D": 0.288, "batch_D": 0.498}


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    sweep = hyper_fit.load_sweep(Path(folder) / TABLE, {"batch": "bs", "loss": "smooth loss"}, batch_unit=2048)
    fit = hyper_fit.fit_sweep(sweep)
    outputs = step_law.law.outputs
    published = {
        f"{output}_{x}": outputs[output].exponents[x] for output in fit.coefficients for x in outputs[output].exponents
    }
    for name, ours in fit.exponents.items():
        yield Check("step_law", f"exponent {name}", ours, published[name], MEASURED[name], 1e-3, "measured")
    for name, (low, high) in fit.intervals(0.95).items():
        what = f"published exponent {name} from the middle of our 95% interval"
        yield Check("step_law", what, (low + high) / 2, published[name], None, (high - low) / 2)
