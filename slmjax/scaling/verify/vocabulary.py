"""Vocabulary scaling, approach 3 of Tao et al. 2024 (arXiv 2407.13623): `vocab_tao2024.csv`, rows of 2.18e17 FLOPs on.

The published numbers need the unit slip of the authors' code, log(V/1000) in tokens per character; both are fitted.
"""

from collections.abc import Iterator
from pathlib import Path

from slmjax.scaling.fit import fit
from slmjax.scaling.points import load_points
from slmjax.scaling.verify import Check

SOURCE = "vocabulary"
COLUMNS = {
    "N": "Non_vocab_parameters",
    "D": "num_characters",
    "H": "num_characters",
    "V": "vocab_size",
    "d": "embed_dim",
    "C": "FLOPs",
    "loss": "Lossu:unigram_normalized",
}
MEASURED = {"A1": 1.8289, "A2": 0.1907, "B": 2.1220, "E": 5.5349, "alpha2": 0.6637, "beta": 0.4453}


def checks(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        return
    point_set = load_points([folder / "vocab_tao2024.csv"], COLUMNS, rows="all", where=["C>=2.18e17"])
    yield Check(SOURCE, "rows", len(point_set), published=1054)
    found = fit(point_set, "vocabulary_parity", num_bootstrap=100)
    published = found.form.published["tao2024"]
    yield Check(SOURCE, "approach 3: objective", found.objective, 0.0622917, 0.06230, against="measured", at_most=True)
    theirs = found.objective_at(published)
    yield Check(SOURCE, "approach 3: objective of the published parameters", theirs, 0.0622917, tolerance=5e-7)
    for name, value in MEASURED.items():
        # The measured minimum is printed to four decimals.
        what = f"approach 3: {name}"
        yield Check(SOURCE, what, found.parameters[name], published[name], value, 1e-4, against="measured")
    agreeing, num = found.starts["num_agreeing"], found.starts["num"]
    yield Check(SOURCE, "approach 3: starts that agree to 1e-8", agreeing, measured=num, against="measured")
    as_written = fit(point_set, "vocabulary", num_bootstrap=100).objective
    what = "approach 3: objective with ln V as the paper writes it"
    # One unit of its last digit: .0667 may be cut, not rounded.
    yield Check(SOURCE, what, as_written, measured=0.0667, tolerance=1e-4, against="measured")
