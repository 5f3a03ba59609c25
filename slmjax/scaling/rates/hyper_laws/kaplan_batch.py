"""Kaplan et al.: the critical batch, where steps and tokens are traded evenly, against loss."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="kaplan_batch",
    outputs={"batch": PowerProduct("tokens", 2e8, {"L": -4.76})},
    source="Kaplan et al. 2020 (arXiv 2001.08361), equation 5.3: B* = 2e8 tokens, alpha_B = .21",
    setting="L on WebText2 with its tokenizer",
)
