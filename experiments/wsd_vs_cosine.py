"""WSD against cosine at four token budgets: one trunk and four decays against four runs, each with its own cosine.

    slmjax study run --study=wsd_vs_cosine --out=OUT
9 runs in one program, 1.7e13 FLOPs. `slmjax study status` shows the losses side by side: WSD is at
most 1% above cosine. `slmjax study plan` shows the costs: the trunk and its branches are 46% of the four cosine runs.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, study
from slmjax.study import Cell, Study, axis, branch, chain, product

STEPS = (500, 1000, 1500, 2000)


def get_config(arg: str = "") -> ConfigDict:
    """What every run shares."""
    base.check(arg, ("", "tiny"))
    c = base.get_config()
    base.resize(c, 64, 2)
    c.train.batch_size, c.train.eval_sequences, c.log.eval_every = 16, 512, 100
    c.schedule.warmup_steps = 50
    if arg == "tiny":
        base.resize(c, 32, 1)
        c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:64:0",), "none", 32
        c.train.eval_sequences, c.log.eval_every, c.schedule.warmup_steps = 64, 20, 10
    return c


def get_study(arg: str = "") -> Study:
    c = config.resolve(get_config(arg))
    budgets = STEPS if arg != "tiny" else (40, 80)
    # Each cosine ends with its run: any other horizon is worse (2203.15556, figure A1). Both schedules end at 0.
    cosine = axis("schedule", {"cosine": {"schedule.name": "cosine"}})
    wsd = branch([Cell({}, {"schedule": "wsd"})], budgets, decay_fraction=0.1, decay_shape="1-sqrt")
    return study.Study(
        base.study_name("wsd_vs_cosine", arg), c, chain(product(cosine, axis("train.steps", budgets)), wsd)
    )
