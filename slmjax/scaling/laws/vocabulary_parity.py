"""The vocabulary law as its authors computed it, for comparison with their numbers only: their code divides V by 1,000
before it takes the logarithm in tokens per character. As the paper writes it (`vocabulary.py`) the fit is worse."""

import dataclasses

from slmjax.scaling.laws.vocabulary import law as as_written

law = dataclasses.replace(
    as_written,
    name="vocabulary_parity",
    formula=as_written.formula.replace("ln^2 V", "ln^2(V/1000)").replace("ln V", "ln(V/1000)"),
    source=as_written.source + "; with the unit slip of their code",
    V_unit=1e3,
    published={
        "tao2024": {"E": 5.53278, "A1": 1.83139, "A2": 0.19584, "B": 2.12411, "alpha2": 0.67074, "beta": 0.44661}
    },
)
