"""DeepSeek LLM: learning rate and batch against compute, and how that source counts compute."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct


def non_embedding_flops_per_token(num_layers: int, width: int, seq_len: int) -> int:
    """M = 72 L d^2 + 12 L d l: training FLOPs per token, attention included, embedding and head left out; C = M D."""
    return 72 * num_layers * width**2 + 12 * num_layers * width * seq_len


law = HyperLaw(
    name="deepseek",
    outputs={
        "lr": PowerProduct("", 0.3118, {"C": -0.1250}),
        "batch": PowerProduct("tokens", 0.2920, {"C": 0.3271}),
        "flops_per_token": PowerProduct("FLOPs", 0.1715, {"C": 0.5243}),
        "tokens": PowerProduct("tokens", 5.8316, {"C": 0.4757}),
    },
    source="DeepSeek LLM (arXiv 2401.02954), equations 1 and 4",
    setting="multi-step schedule, 2,000 steps of warm-up; near-optimal means within .25% of the lowest loss",
    fitted_on={"C": (1e17, 2e19)},
)
