"""Ludziejewski et al.: learning rate of mixture-of-experts models against active size and experts."""

import math

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="joint_moe_lr",
    outputs={"lr": PowerProduct("", math.exp(8.39), {"N": -0.81, "E": -0.25})},
    source="Ludziejewski et al. 2025 (arXiv 2502.05172); N active, without embeddings",
    setting="trapezoid with the last fifth decaying linearly",
)
