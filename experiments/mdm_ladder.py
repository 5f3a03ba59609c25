"""Masked diffusion beside autoregression, as SMDM compares them (2410.18514): how much more compute for an equal loss?

    slmjax study run --study=mdm_ladder --out=OUT --jobs=2 && slmjax study report --study=OUT/mdm_ladder
Widths, token budgets, data, their order, seeds and FLOPs are the same; the two differ in the objective, and in their
learning rates, each the best found for it. The loss of masked diffusion is a bound, so the compute multiplier that the
report prints is one as well. 40 runs, 8 programs, 5.8e14 FLOPs: some hours on two cores, better on an accelerator.
`:tiny`, 24 runs of up to 0.2M tokens of a random chain, takes two minutes and shows that all of it works, not what it
costs: of an entropy of 2.504 nats autoregression reaches 2.565, while masked diffusion, at 3.447, has yet to learn to
look at neighbours.
"""

from ml_collections import ConfigDict

from experiments import base, wsd_ladder
from slmjax import config, ladder
from slmjax.study import Study, axis, branch, product

WIDTHS = (64, 96, 128, 192)
STEPS = (880, 1760, 3520, 7040)  # of 2,048 tokens: 1.8 to 14 million
HEAD_DIM = 16


def get_config(arg: str = "") -> ConfigDict:
    """The autoregressive model; `wsd_ladder.FAMILIES["mdm"]` turns it into its masked-diffusion twin."""
    base.check(arg, ("", "tiny"))
    c = wsd_ladder.get_config(arg)
    for key, value in shape(64).items():
        c.model[key.removeprefix("model.")] = value
    if arg != "tiny":
        c.data.sources = ("stdlib+deps",)  # 20 million tokens, so that the longest run repeats none
    return c


def shape(width: int) -> dict:
    """Two layers with SMDM's feed-forward of 4 x width and untied head."""
    return ladder.shape(width, 2, HEAD_DIM, mlp_ratio=4.0) | {"model.tied_embeddings": False}


def get_study(arg: str = "") -> Study:
    c = config.resolve(get_config(arg))
    widths, steps = (WIDTHS, STEPS) if arg != "tiny" else ((16, 32, 48), (100, 200, 400))
    families = axis("family", {name: wsd_ladder.FAMILIES[name] for name in ("dense", "mdm")})
    cells = product(families, axis("width", {width: shape(width) for width in widths}))
    return Study(base.study_name("mdm_ladder", arg), c, branch(cells, steps, decay_fraction=0.2))
