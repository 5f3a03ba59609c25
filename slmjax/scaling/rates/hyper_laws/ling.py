"""Ling: learning rate, batch and split of compute for mixture-of-experts models under WSD."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="ling",
    outputs={
        "lr": PowerProduct("", 1.1576, {"C": -0.1529}),
        "batch": PowerProduct("tokens", 0.0694, {"C": 0.3644}),
        "flops_per_token": PowerProduct("FLOPs", 0.1915, {"C": 0.5095}),
        "tokens": PowerProduct("tokens", 5.2232, {"C": 0.4905}),
    },
    source="Ling (arXiv 2507.17702), its laws for lr, batch and the optimal split; 7.8% of the experts active, G = 2",
    setting="WSD",
    fitted_on={"C": (3e17, 3e20)},
)
