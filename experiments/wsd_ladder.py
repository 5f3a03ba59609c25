"""A ladder of widths, one WSD trunk each, and a decayed branch at every token budget: the demo's scaling law.

    slmjax study run --study=wsd_ladder --out=OUT --jobs=2
Four widths times four budgets on the text of the Python standard library, one learning rate for all under mup. In all
20 runs, 4 programs and 1.9e13 FLOPs; the longest sees the text about once. Losses go from 4.2 to 3.1 nats per token.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder, study
from slmjax.study import Study, axis, branch

WIDTHS = (32, 48, 64, 96)
STEPS = (220, 440, 880, 1760)  # of 2,048 tokens: 0.45 to 3.6 million
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


def get_study(arg: str = "") -> Study:
    c = config.resolve(get_config(arg))
    widths, steps = ((16, 32), (40, 80)) if arg == "tiny" else (WIDTHS, STEPS)
    sizes = axis("width", {width: ladder.shape(width, 2, HEAD_DIM) for width in widths})
    return study.Study(base.study_name("wsd_ladder", arg), c, branch(sizes, steps, decay_fraction=0.2))
