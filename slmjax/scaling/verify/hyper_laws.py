"""Published examples of learning-rate and batch laws, computed from their formulas; no table is read."""

from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.rates.hyper_laws import load_hyper_law
from slmjax.scaling.verify import Check

# law, inputs, output, printed value, relative tolerance
EXAMPLES = (
    ("step_law", {"N": 7e9, "D": 1.4e12}, "lr", 9.17e-4, 0.01),
    ("step_law", {"N": 7e9, "D": 1.4e12}, "batch", 5.0e6, 0.01),
    ("minicpm_batch", {"L": 4.0}, "batch", 0.212e6, 0.005),
    ("minicpm_batch", {"L": 3.5}, "batch", 0.487e6, 0.005),
    ("minicpm_batch", {"L": 2.8}, "batch", 1.96e6, 0.005),
    ("minicpm_batch", {"L": 2.7}, "batch", 2.46e6, 0.005),
    ("minicpm_batch", {"L": 2.0}, "batch", 16.0e6, 0.005),
)


def checks(folder: Path | None) -> Iterator[Check]:
    for name, inputs, output, printed, tolerance in EXAMPLES:
        ours = load_hyper_law(name).recommend(**inputs)[output]
        said = ", ".join(f"{x}={value:g}" for x, value in inputs.items())
        yield Check("hyper_laws", f"{name} {output} at {said}", ours, printed, None, tolerance * printed)
