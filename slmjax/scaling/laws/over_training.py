"""Over-training: loss against compute and tokens per parameter: the tied surface in its authors' parameters."""

import dataclasses

import numpy as np

from slmjax.scaling.laws._power_sum import PowerSum


@dataclasses.dataclass(frozen=True)
class OverTraining(PowerSum):
    """With C = 6 N D and M = D/N, a M^eta C^-eta is a 6^-eta N^-2eta, and b M^-eta C^-eta is b 6^-eta D^-2eta."""

    def values(self, theta_KP, centre_F):
        values_KP = super().values(theta_KP, centre_F)
        values_KP[:, 3] /= 2
        values_KP[:, 1:3] *= 6 ** values_KP[:, 3:]
        return values_KP

    def coordinates(self, values_KP, centre_F):
        tied_KP = np.array(values_KP, float)
        tied_KP[:, 1:3] /= 6 ** tied_KP[:, 3:]
        tied_KP[:, 3] *= 2
        return super().coordinates(tied_KP, centre_F)

    def identified(self, smallest_loss):
        low, high, span = super().identified(smallest_loss)["eta"]
        return super().identified(smallest_loss) | {"eta": (low, high / 2, span)}


law = OverTraining(
    name="over_training",
    formula="L = E + (a M^eta + b M^-eta) C^-eta (M = D/N, C = 6 N D)",
    inputs=("N", "D"),
    coefficients=("a", "b"),
    exponents=("eta", "eta"),
    source="Gadre et al. 2024 (arXiv 2403.08540), equation 4",
)
