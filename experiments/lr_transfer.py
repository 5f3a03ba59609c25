"""Does the best learning rate stay where it is when the model widens? Widths 64, 128, 256 times a grid of rates.

    slmjax study run --study=lr_transfer:mup --out=OUT && slmjax study run --study=lr_transfer:sp --out=OUT
18 runs in 3 programs, 1.9e13 FLOPs a study. Under mup the best rate falls in the same factor-of-two cell at all
three widths; under sp (standard parametrization) it moves down as the model widens.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder, study
from slmjax.study import Study, axis, product

WIDTHS = (64, 128, 256)
RATES = tuple(2.0**-k for k in range(5, 11))  # a factor of two apart, from 1/32 down
HEAD_DIM = 32


def get_config(arg: str = "mup") -> ConfigDict:
    """What every run of the sweep shares."""
    base.check(arg, ("mup", "sp", "tiny"))
    c = base.get_config()
    c.model.parametrization.name = "mup" if arg == "tiny" else arg
    base.resize(c, WIDTHS[0], 2, HEAD_DIM)
    c.data.seq_len, c.train.batch_size, c.train.steps, c.train.eval_sequences = 64, 16, 200, 512
    c.schedule.warmup_steps, c.log.eval_every = 20, 0
    if arg == "tiny":
        c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:64:0",), "none", 32
        c.train.steps, c.train.eval_sequences = 40, 64
    return c


def get_study(arg: str = "mup") -> Study:
    c = config.resolve(get_config(arg))
    widths, rates = ((16, 32), RATES[1:4]) if arg == "tiny" else (WIDTHS, RATES)
    head_dim = 16 if arg == "tiny" else HEAD_DIM
    sizes = axis("width", {width: ladder.shape(width, 2, head_dim) for width in widths})
    return study.Study(base.study_name("lr_transfer", arg), c, product(sizes, axis("optim.lr", rates)))
