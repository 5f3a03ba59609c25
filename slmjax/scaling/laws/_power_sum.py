"""The law most others grow from: a floor and one power of each input. Written for speed: a bootstrap is thousands of
fits, and nearly all of their time is spent in `PowerSum.loss`.

Letters: K candidates, n points, P parameters, F inputs, X distinct exponents, S starts.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from slmjax.scaling.laws import _projection

MAX_EXPONENT = 3.0  # beyond it, a term is seen at its smallest input only


@dataclasses.dataclass(frozen=True)
class PowerSum:
    """L = E + sum over inputs f of A_f (x_f / unit_f)^-alpha_f. Coordinates: log E, log A_1, .., alpha_1, ..

    Attributes:
      floor: name of E, or None for a law without it.
      exponents: one name for each input; inputs that share a name share the exponent.
      units: of inputs that are not counted in ones.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    exponents: tuple[str, ...]
    source: str
    floor: str | None = "E"
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    residual: str = "log"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self._floors, *self.coefficients, *dict.fromkeys(self.exponents))

    @property
    def levels(self) -> dict[str, int]:
        """E, A and alpha along one input are three unknowns."""
        return dict.fromkeys(self.inputs, 2 + len(self._floors))

    @property
    def _floors(self):
        return () if self.floor is None else (self.floor,)

    @property
    def _columns(self):
        """Of each input: the column of its coefficient, and that of its exponent."""
        first = len(self._floors)
        return [(first + f, self.parameters.index(name)) for f, name in enumerate(self.exponents)]

    def centre(self, log_x_Fn: np.ndarray) -> np.ndarray:
        return log_x_Fn.mean(axis=1)

    def loss(self, theta_KP, u_Fn):
        """Written by hand: automatic differentiation of the same expression costs about eight times as much per
        point."""
        columns = self._columns
        floor_K1 = np.exp(theta_KP[:, :1]) if self.floor else np.zeros((len(theta_KP), 1))
        terms = [np.exp(theta_KP[:, a, None] - theta_KP[:, x, None] * u_Fn[f]) for f, (a, x) in enumerate(columns)]

        def pullback(g_Kn):
            grad_KP = np.zeros_like(theta_KP)
            if self.floor:
                grad_KP[:, 0] = floor_K1[:, 0] * g_Kn.sum(axis=1)
            for f, (a, x) in enumerate(columns):
                weighted_Kn = terms[f] * g_Kn
                grad_KP[:, a] = weighted_Kn.sum(axis=1)
                grad_KP[:, x] -= weighted_Kn @ u_Fn[f]
            return grad_KP

        return sum(terms, floor_K1), pullback

    def slopes(self, theta_KP, u_FK):
        return np.stack(
            [
                -theta_KP[:, x] * np.exp(theta_KP[:, a] - theta_KP[:, x] * u_FK[f])
                for f, (a, x) in enumerate(self._columns)
            ]
        )

    def values(self, theta_KP, centre_F):
        values_KP = self._shifted(theta_KP, centre_F, +1)
        logs = slice(0, len(self._floors) + len(self.inputs))
        with np.errstate(over="ignore", under="ignore"):  # a refit that ran off has no finite coefficient: inf says so
            values_KP[:, logs] = np.exp(values_KP[:, logs])
        return values_KP

    def coordinates(self, values_KP, centre_F):
        theta_KP = np.array(values_KP, float)
        logs = slice(0, len(self._floors) + len(self.inputs))
        theta_KP[:, logs] = np.log(theta_KP[:, logs])
        return self._shifted(theta_KP, centre_F, -1)

    def _shifted(self, theta_KP, centre_F, sign):
        """A coefficient read at the law's unit instead of at the centre (+1), or the other way round (-1)."""
        shifted_KP = np.array(theta_KP, float)
        for (a, x), name, centre in zip(self._columns, self.inputs, centre_F, strict=True):
            shifted_KP[:, a] += sign * theta_KP[:, x] * (centre - np.log(self.units.get(name, 1.0)))
        return shifted_KP

    def box(self, smallest_loss):
        """A term at the mean input counts from 1e-4 of the loss, a floor from 1e-3."""
        F, floors, num_exponents = len(self.inputs), len(self._floors), len(set(self.exponents))
        low = [np.log(1e-3 * smallest_loss)] * floors + [np.log(1e-4 * smallest_loss)] * F + [0.0] * num_exponents
        return np.array(low), np.array([np.inf] * (floors + F) + [MAX_EXPONENT] * num_exponents)

    def identified(self, smallest_loss):
        """A floor below a thousandth of the smallest loss is no floor; A and B are read at one unit of N and D, often
        far outside any data, so they may be wide."""
        limits = dict.fromkeys(self._floors, (1e-3 * smallest_loss, np.inf, 4.0))
        limits |= dict.fromkeys(self.coefficients, (0.0, 1e15, 1e3))
        return limits | dict.fromkeys(self.exponents, (0.0, MAX_EXPONENT, 4.0))

    def starts(self, u_Fn, loss_n, num_starts, exponent_grid=_projection.EXPONENTS):
        distinct = list(dict.fromkeys(self.exponents))
        exponents_GX = _projection.grid(*[exponent_grid] * len(distinct))
        exponents_GF = exponents_GX[:, [distinct.index(name) for name in self.exponents]]
        powers = np.exp(-exponents_GF.T[:, :, None] * u_Fn[:, None, :])
        ones = [np.ones((len(exponents_GF), len(loss_n)))] * len(self._floors)
        best_S, log_coefficients_SJ = _projection.best_cells(np.stack([*ones, *powers], axis=-1), loss_n, num_starts)
        return np.concatenate([log_coefficients_SJ, exponents_GX[best_S]], axis=1)
