"""Power Lines: AdamW's memory as a share of the run, tau = B / (lr weight_decay D), against tokens per parameter."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct


def weight_decay(tau: float, batch: float, lr: float, tokens: float) -> float:
    """The weight decay that gives AdamW the time scale tau (a share of the run); batch in tokens."""
    return batch / (tau * lr * tokens)


law = HyperLaw(
    name="power_lines",
    outputs={"tau": PowerProduct("of the run", 1.08, {"tokens_per_parameter": -0.527})},
    # The paper prints the exponent .520 and no coefficient; this pair, which belongs together, is from a second source.
    source="Power Lines (arXiv 2505.13738), law of the AdamW time scale",
    setting="maximal-update parameterisation, linear decay to zero, 10% of warm-up",
    fitted_on={"tokens_per_parameter": (20.0, 1280.0)},
)
