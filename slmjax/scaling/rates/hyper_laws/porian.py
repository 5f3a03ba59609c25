"""Porian et al.: learning rate and batch tuned at each size, with Chinchilla's tokens."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="porian",
    outputs={
        "lr": PowerProduct("", 3.7, {"N": -0.36}),
        "batch": PowerProduct("sequences of 2048 tokens", 0.00037, {"N": 0.703}),
    },
    source="Porian et al. 2024 (arXiv 2406.19146)",
    setting="AdamW with beta2 .99 at batches of 128 sequences or fewer; constant rate",
)
