"""Zhang et al.: the largest batch with at most a fifth more steps than linear scaling would need; it follows the
tokens, not the size."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="critical_batch",
    outputs={
        "batch_chinchilla": PowerProduct("sequences of 512 tokens", 93.20, {"N": 0.47}, {"N": 1e6}),
        "batch_fixed_tokens": PowerProduct("sequences of 512 tokens", 621.341, {"N": 0.087}, {"N": 1e6}),
    },
    source="Zhang et al. 2024 (arXiv 2410.21676)",
    setting="constant rate with averaged weights, beta1 .95; tokens in proportion to size, or the same for all sizes",
    fitted_on={"N": (8.5e7, 1.2e9)},  # as its abstract says: 85 million to 1.2 billion parameters
)
