"""Loss against model size alone, where neither data nor training limit it."""

import dataclasses

import numpy as np

from slmjax.scaling.laws._power_sum import PowerSum


@dataclasses.dataclass(frozen=True)
class OfSize(PowerSum):
    """(N_c/N)^alpha_N is a power whose coefficient is N_c^alpha_N."""

    def values(self, theta_KP, centre_F):
        values_KP = super().values(theta_KP, centre_F)
        with np.errstate(over="ignore", divide="ignore"):
            values_KP[:, 0] **= 1 / values_KP[:, 1]
        return values_KP

    def coordinates(self, values_KP, centre_F):
        amount_K, exponent_K = np.array(values_KP, float).T
        return super().coordinates(np.stack([amount_K**exponent_K, exponent_K], axis=1), centre_F)

    def identified(self, smallest_loss):
        return super().identified(smallest_loss) | {"N_c": (1e3, 1e30, 1e3)}


law = OfSize(
    name="kaplan_size",
    formula="L = (N_c/N)^alpha_N",
    inputs=("N",),
    coefficients=("N_c",),
    exponents=("alpha_N",),
    floor=None,
    source="Kaplan et al. 2020 (arXiv 2001.08361), equation 1.1",
    published={
        "kaplan2020": {"N_c": 8.8e13, "alpha_N": 0.076},
        "clark2022_dense": {"N_c": 3.568e13, "alpha_N": 0.078},  # arXiv 2202.01169
    },
)
