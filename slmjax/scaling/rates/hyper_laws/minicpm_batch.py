"""MiniCPM: the batch that reaches a loss with the fewest tokens."""

from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct

law = HyperLaw(
    name="minicpm_batch",
    outputs={"batch": PowerProduct("tokens", 1.21e9, {"L": -6.24})},
    source="MiniCPM (arXiv 2404.06395), section 3.2",
    setting="learning rate .01 under the source's parameterisation; L is the loss on C4 with its tokenizer",
)
