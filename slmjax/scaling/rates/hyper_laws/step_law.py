"""Step Law: learning rate against size and tokens, batch against tokens."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

# 95% intervals of the exponents over the source's 1,000 resamples.
EXPONENT_INTERVALS = {"lr_N": (-0.774, -0.655), "lr_D": (0.271, 0.345), "batch_D": (0.534, 0.606)}

law = HyperLaw(
    name="step_law",
    outputs={
        "lr": PowerProduct("", 1.79, {"N": -0.713, "D": 0.307}),
        "batch": PowerProduct("tokens", 0.58, {"D": 0.571}),
    },
    source="Li et al. 2025 (arXiv 2503.04715), Step Law; N without embeddings",
    setting="AdamW, 2,000 steps of warm-up, decay to a fixed rate of 1e-5",
    fitted_on={"N": (2.1e8, 1.1e9), "D": (4e9, 1e11)},
)
