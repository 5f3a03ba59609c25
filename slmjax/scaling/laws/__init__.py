"""Scaling laws as objects, one file each: a form, its parameters, its exact gradient, starts for a fit, and its source.

A fork adds a law as one file: here, or anywhere on the path under a dotted name. The file defines `law`, an object that
answers to `Law` below; subclassing `_terms.TermLaw` leaves the terms, their derivatives and the starts to write. How to
fit is `fit.py`'s business. Files whose name begins with an underscore hold what several laws share.

Letters: K candidates, n points, P parameters, F inputs, S starts.
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

Pullback = Callable[[np.ndarray], np.ndarray]


class Law(Protocol):
    """What a fit asks of a law.

    A law works in two systems. *Coordinates* theta_KP are what the optimiser sees: logarithms of coefficients, and
    exponents, on logarithms of the inputs minus a centre; in raw coordinates log A and alpha are .999 correlated and
    most starts never converge. *Values* are the published parameters (A, alpha, ...), in the units the law states:
    users always give plain parameters, tokens and FLOPs.

    Attributes:
      name, formula, source: as shown in tables; the formula names its units, the source its paper and equation.
      inputs: names read from every point (`Point.value`): N, D, C, or a law's own, such as E experts.
      parameters: names of the values, in the order of the coordinates.
      published: parameter values by the label of who printed them; empty where none is at hand.
      remarks: what a reader who compares with those values must know, by the same labels.
      residual: "log" or "raw": what a fit compares unless told otherwise.
      levels: inputs that must vary, each with the least number of distinct values that determines the law.
    """

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    published: Mapping[str, Mapping[str, float]]
    remarks: Mapping[str, str]
    residual: str
    levels: Mapping[str, int]

    def centre(self, log_x_Fn: np.ndarray) -> np.ndarray:
        """What to take from the log inputs [F]: their means, except where the law needs an input as it is."""

    def loss(self, theta_KP: np.ndarray, u_Fn: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """Loss [K, n] at centred log inputs u, and its pullback: d/d(loss) [K, n] -> d/d(theta) [K, P]."""

    def slopes(self, theta_KP: np.ndarray, u_FK: np.ndarray) -> np.ndarray:
        """d(loss)/d(log input) [F, K] of candidate k at its own inputs u[:, k]."""

    def values(self, theta_KP: np.ndarray, centre_F: np.ndarray) -> np.ndarray:
        """Published parameters [K, P] of coordinates that refer to centre_F."""

    def coordinates(self, values_KP: np.ndarray, centre_F: np.ndarray) -> np.ndarray:
        """Inverse of `values`."""

    def starts(self, u_Fn: np.ndarray, loss_n: np.ndarray, num_starts: int) -> np.ndarray:
        """Coordinates [S, P] to begin at, best first, at most num_starts."""

    def box(self, smallest_loss: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [P] low and high outside which a fit is drawn back, so that a term the data do not determine
        comes to rest instead of running off to infinity."""

    def identified(self, smallest_loss: float) -> dict[str, tuple[float, float, float]]:
        """Per parameter (low, high, span): an interval that reaches low or high is unbounded there, and one whose ends
        differ by more than the factor span says little."""


def names() -> list[str]:
    """Every law here, by the name of its file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@functools.cache
def load_law(name: str) -> Law:
    """A law by its name here, or by the dotted path of a module that defines `law` (how a fork adds one)."""
    if "." not in name and name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no law {name!r}; {meant}there are {', '.join(names())}; "
            "or give the dotted path of a module that defines `law`"
        )
    try:
        return importlib.import_module(name if "." in name else f"{__name__}.{name}").law
    except (ImportError, AttributeError) as error:
        raise ValueError(f"law {name!r}: {error}; the module must be importable and define `law`") from None
