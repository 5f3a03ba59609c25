"""A ladder of widths, one WSD trunk each, and a decayed branch at every token budget: the demo's scaling laws.

    slmjax study run --study=wsd_ladder --out=OUT --jobs=2
Four widths times four budgets on the text of the Python standard library, one learning rate for all under mup; beside
them, at three widths and three budgets each, mixtures of 8 experts, 2 active, with the active parameters of the dense
model, and masked diffusion, whose loss is a bound. In all 44 runs, 10 programs and 4.0e13 FLOPs; the longest sees the
text about once. Losses of the dense models go from 4.2 to 3.1 nats per token, bounds of masked diffusion from 5.0 to
4.0: for the loss of 2.0e11 FLOPs of the former it needs at most 9.6 times the compute, 95% between 6.1 and 16.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder, study
from slmjax.study import Study, axis, branch, chain, product

WIDTHS = (32, 48, 64, 96)
STEPS = (220, 440, 880, 1760)  # of 2,048 tokens: 0.45 to 3.6 million
# Below the dense family's largest budget, so that what it needs for the mixture's loss lies among its own runs.
MOE_WIDTHS, MOE_STEPS = (32, 48, 64), (220, 440, 880)
# As far as the dense family went, so that what it needs for the dense family's loss at small budgets lies among its own
# runs; 220 steps are too few for it to learn more than how often each token is met.
MDM_WIDTHS, MDM_STEPS = (32, 64, 96), (440, 880, 1760)
HEAD_DIM = 16

# By family, what differs from the dense autoregressive model at each shape.
FAMILIES = {
    "dense": {},
    "mdm": {
        "objective.name": "masked_diffusion",
        # A hidden token is predicted from the position before it, as in autoregression. From its own, where the model
        # must first find its neighbours, loss stays at the tokens' frequencies, 5.7, beyond 440 steps: width 64, 880
        # steps, the best of four rates, 4.99 against 4.45.
        "objective.diffusion.alignment": "shifted",
        "objective.diffusion.eval_draws": 2,
        "log.eval_every": 440,
        # Width 64, 880 steps, rates .002 .004 .008 .016: 4.737 4.463 4.449 4.683, so the best is near .006, not .01.
        "optim.lr": 6e-3,
    },
}


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
    """One cell a width: in a mixture, experts in place of the feed-forward; in masked diffusion, another objective."""
    shapes = {width: ladder.shape(width, 2, HEAD_DIM) for width in widths}
    if family == "moe":
        shapes = {width: shape | ladder.mixture(shape["model.mlp_width"], 8, 2) for width, shape in shapes.items()}
    return product(axis("width", shapes), axis("family", {family: FAMILIES.get(family, {})}))


def get_study(arg: str = "") -> Study:
    c = config.resolve(get_config(arg))
    ladders = {"dense": (WIDTHS, STEPS), "moe": (MOE_WIDTHS, MOE_STEPS), "mdm": (MDM_WIDTHS, MDM_STEPS)}
    if arg == "tiny":
        ladders = {"dense": ((16, 32), (40, 80)), "moe": ((32,), (40, 80)), "mdm": ((32,), (40, 80))}
    cells = [branch(sizes(widths, family), steps, decay_fraction=0.2) for family, (widths, steps) in ladders.items()]
    return Study(base.study_name("wsd_ladder", arg), c, chain(*cells))
