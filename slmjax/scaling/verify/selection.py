"""Choice of form on the Chinchilla runs: what is chosen from the cheaper part alone, judged on the hidden part."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling.choose import choose, hidden_errors
from slmjax.scaling.points import load_points
from slmjax.scaling.verify import Check

SOURCE = "choice of form"
TABLE = "chinchilla_epoch.csv"
SPLITS = (("C", 1e21), ("N", 2e9))
MOST_REGRET = 0.003
# Mean absolute log error of other hands' fits on the two splits
MEASURED = {
    "chinchilla": (0.0105, 0.0085),
    "chinchilla_tied": (0.0083, 0.0070),
    "chinchilla_no_floor": (0.0325, 0.0324),
    "kaplan": (0.0217, 0.0219),
    "kaplan_floor": (0.0097, 0.0104),
    "farseer": (0.0041, 0.0062),
}


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None or not (folder / TABLE).exists():
        return
    points = list(load_points([folder / TABLE]).drop_highest(5).points)
    for split, (name, value) in enumerate(SPLITS):
        hidden_1n = np.array([[p.value(name) >= value for p in points]])
        errors = {law: float(np.nanmean(np.abs(hidden_errors(points, hidden_1n, law)[0]))) for law in MEASURED}
        for law, error in errors.items():
            what = f"{law}: error on {name} >= {value:g}"
            # The flattest of the forms has several minima in reach of each other: more room.
            tolerance = 0.001 if law == "farseer" else 0.0002
            yield Check(SOURCE, what, error, measured=MEASURED[law][split], tolerance=tolerance, against="measured")
        made = choose([p for p, hidden in zip(points, hidden_1n[0], strict=True) if not hidden], list(MEASURED))
        regret = errors[made.winner] - min(errors.values())
        what = f"regret of {made.winner}, chosen below {name} = {value:g}"
        yield Check(SOURCE, what, regret, published=0.0, tolerance=MOST_REGRET, at_most=True)
