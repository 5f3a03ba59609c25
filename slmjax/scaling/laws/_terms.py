"""Laws that are sums of exponentials: derivatives by parameters and by inputs from one description of each term.

Letters: K candidates, n points, P parameters, F inputs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Named = Mapping[str, np.ndarray]


class Kind(NamedTuple):
    """How a parameter becomes a coordinate, and what the data must say about it.

    `scale`: "log", the coordinate is the logarithm of a positive value; "linear", the value itself. `box`: values the
    coordinate is drawn back to, in units of the smallest loss where `unit` is "loss". `known`: (low, high, span) as
    `Law.identified` returns, `low` in the same unit.
    """

    scale: str
    box: tuple[float, float]
    known: tuple[float, float, float]
    unit: str = "one"


FLOOR = Kind("log", (1e-3, math.inf), (1e-3, math.inf, 4.0), unit="loss")
# At the mean input a term counts from 1e-4 of the loss; read at one parameter or one token it may be wide.
COEFFICIENT = Kind("log", (1e-4, math.inf), (0.0, 1e15, 1e3), unit="loss")
EXPONENT = Kind("linear", (0.0, 3.0), (0.0, 3.0, 4.0))
SIGNED = Kind("linear", (-3.0, 3.0), (-3.0, 3.0, 4.0))


def positive(low: float, high: float) -> Kind:
    """A positive parameter that the data bound when its interval ends inside low to high."""
    return Kind("log", (low, high), (low * 1.001, high / 1.001, 4.0))


class Term(NamedTuple):
    """One term of a law, sign * exp(log), with the derivatives of `log` by coordinates and by log inputs, each of a
    shape that broadcasts to [K, n]; those not named are zero."""

    log: np.ndarray
    by_parameter: Mapping[str, np.ndarray | float]
    by_input: Mapping[str, np.ndarray | float] = {}
    sign: float = 1.0


def floor(log_K1: np.ndarray, name: str = "E") -> Term:
    return Term(log_K1, {name: 1.0})


@dataclasses.dataclass(frozen=True)
class TermLaw:
    """A law from its terms. A subclass writes `terms`, `shift` and `starts`; the other attributes are those of `Law`.

    `units`: of inputs that are not counted in ones.
    """

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    kinds: Mapping[str, Kind]
    levels: Mapping[str, int]
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    residual: str = "log"

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def terms(self, theta: Named, u: Named) -> list[Term]:
        """The terms at coordinates theta[parameter] [K, 1] and centred log inputs u[input] [1, n] or [K, 1]."""
        raise NotImplementedError

    def shift(self, theta: Named, by: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Coordinates [K] of the same law for log inputs counted from an origin that lies `by` further on."""
        raise NotImplementedError

    def starts(self, u_Fn: np.ndarray, loss_n: np.ndarray, num_starts: int) -> np.ndarray:
        raise NotImplementedError

    def centre(self, log_x_Fn):
        return log_x_Fn.mean(axis=1)

    def loss(self, theta_KP, u_Fn):
        u = {name: u_n[None] for name, u_n in zip(self.inputs, u_Fn, strict=True)}
        terms = self.terms(self._named(theta_KP[:, :, None]), u)
        amounts = [term.sign * np.exp(term.log) for term in terms]

        def pullback(g_Kn):
            grad_KP = np.zeros_like(theta_KP)
            for term, amount in zip(terms, amounts, strict=True):
                weighted_Kn = amount * g_Kn
                for name, derivative in term.by_parameter.items():
                    grad_KP[:, self.parameters.index(name)] += (weighted_Kn * derivative).sum(axis=1)
            return grad_KP

        return sum(amounts) + np.zeros((len(theta_KP), u_Fn.shape[1])), pullback

    def slopes(self, theta_KP, u_FK):
        u = {name: u_K[:, None] for name, u_K in zip(self.inputs, u_FK, strict=True)}
        slopes_FK = np.zeros(u_FK.shape)
        for term in self.terms(self._named(theta_KP[:, :, None]), u):
            amount_K1 = term.sign * np.exp(term.log)
            for name, derivative in term.by_input.items():
                slopes_FK[self.inputs.index(name)] += (amount_K1 * derivative)[:, 0]
        return slopes_FK

    def values(self, theta_KP, centre_F):
        found = self.shift(self._named(theta_KP), self._away(centre_F, -1))
        with np.errstate(over="ignore", under="ignore"):  # a refit that ran off has no finite coefficient: inf says so
            columns = [np.exp(found[p]) if kind.scale == "log" else found[p] for p, kind in self.kinds.items()]
        return np.stack(columns, axis=1)

    def coordinates(self, values_KP, centre_F):
        given = self._named(np.array(values_KP, float))
        logs = {p: np.log(given[p]) if kind.scale == "log" else given[p] for p, kind in self.kinds.items()}
        found = self.shift(logs, self._away(centre_F, +1))
        return np.stack([found[p] for p in self.parameters], axis=1)

    def box(self, smallest_loss):
        ends_P2 = np.array([kind.box for kind in self.kinds.values()])
        ends_P2 *= [[abs(smallest_loss) if kind.unit == "loss" else 1.0] for kind in self.kinds.values()]
        logs_P = np.array([kind.scale == "log" for kind in self.kinds.values()])
        ends_P2[logs_P] = np.log(ends_P2[logs_P])
        return ends_P2[:, 0], ends_P2[:, 1]

    def identified(self, smallest_loss):
        def limits(kind):
            low, high, span = kind.known
            return (low * (abs(smallest_loss) if kind.unit == "loss" else 1.0), high, span)

        return {name: limits(kind) for name, kind in self.kinds.items()}

    def _named(self, theta_KP):
        return {name: theta_KP[:, p] for p, name in enumerate(self.parameters)}

    def _away(self, centre_F, sign):
        """The way from the law's units to the centre (+1), or back (-1), in log inputs."""
        return {
            name: sign * (centre - np.log(self.units.get(name, 1.0)))
            for name, centre in zip(self.inputs, centre_F, strict=True)
        }
