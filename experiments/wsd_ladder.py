"""A ladder of widths, one WSD trunk each, and a decayed branch at every token budget: the demo's scaling laws.

    slmjax study run --study=wsd_ladder --out=OUT --jobs=2
Four widths times four budgets on the text of the Python standard library, one learning rate for all under mup; beside
them, at three widths and three budgets, mixtures of 8 experts, 2 active, with the active parameters of the dense model.
In all 32 runs, 7 programs and 2.7e13 FLOPs; the longest sees the text about once. Losses of the dense models go from
4.2 to 3.1 nats per token.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder, study
from slmjax.study import Study, axis, branch, chain, product

WIDTHS = (32, 48, 64, 96)
STEPS = (220, 440, 880, 1760)  # of 2,048 tokens: 0.45 to 3.6 million
# Below the dense family's largest budget, so that what it needs for the mixture's loss lies among its own runs.
MOE_WIDTHS, MOE_STEPS = (32, 64, 96), (220, 440, 880)
HEAD_DIM = 16


def get_config(arg: str = "") -> ConfigDict:
    """What every run of the ladder shares."""
    base.check(arg, ("", "tiny"))
    c = base.get_config()
    base.resize(c, 64, 2, HEAD_DIM)
    c.model.parametrization.name = "mup"
    c.optim.lr = 1e-2  # the best of 0.004, 0.008, 0.016 and 0.032 at width 64 lies between the middle two
    c.train.batch_size, c.train.eval_sequences = 16, 512
    c.schedule.warmup_steps, c.log.eval_every = 40, 220
    if arg == "tiny":
        c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:64:0",), "none", 32
        c.train.eval_sequences, c.schedule.warmup_steps, c.log.eval_every = 64, 10, 40
    return c


def sizes(widths: tuple[int, ...], family: str) -> list[study.Cell]:
    """One cell a width; in a mixture, experts in place of the feed-forward."""
    shapes = {width: ladder.shape(width, 2, HEAD_DIM) for width in widths}
    if family == "moe":
        shapes = {width: shape | ladder.mixture(shape["model.mlp_width"], 8, 2) for width, shape in shapes.items()}
    return product(axis("width", shapes), axis("family", {family: {}}))


def get_study(arg: str = "") -> Study:
    c = config.resolve(get_config(arg))
    widths, steps, moe_widths, moe_steps = WIDTHS, STEPS, MOE_WIDTHS, MOE_STEPS
    if arg == "tiny":
        widths, steps, moe_widths, moe_steps = (16, 32), (40, 80), (32,), (40, 80)
    dense = branch(sizes(widths, "dense"), steps, decay_fraction=0.2)
    moe = branch(sizes(moe_widths, "moe"), moe_steps, decay_fraction=0.2)
    return Study(base.study_name("wsd_ladder", arg), c, chain(dense, moe))
