"""A small dense model on the text that every Python installation carries: where the experiments here start.

    slmjax train --config=base:tiny --out=OUT
A minute at most; `:tiny` is a model of 0.03M parameters on 0.1M tokens.
"""

from ml_collections import ConfigDict

from slmjax import config, ladder
from slmjax.config import ConfigError

ARGUMENTS = ("", "tiny")


def get_config(arg: str = "") -> ConfigDict:
    check(arg, ARGUMENTS)
    c = config.config_dict()
    c.data.sources, c.data.vocab_size, c.data.seq_len = ("stdlib",), 1024, 128
    c.objective.loss_chunk = 1024
    c.model.parametrization.name = "completep"
    # Embeddings of unit scale, ten times the matrices': the residual stream then keeps its size over width and depth.
    c.model.parametrization.init_std, c.model.parametrization.embed_multiplier = 0.1, 10.0
    c.schedule.warmup_steps = 20
    c.log.eval_every = 100
    c.train.batch_size, c.train.steps = 16, 1000
    resize(c, 128, 4)
    if arg == "tiny":
        resize(c, 32, 2)
        c.data.vocab_size, c.data.seq_len = 512, 64
        c.train.steps, c.train.eval_sequences, c.log.eval_every = 100, 64, 50
    return c


def resize(c: ConfigDict, width: int, num_layers: int, head_dim: int = 32) -> None:
    """Gives the model of `c` another width and depth, and the shapes that follow from them."""
    for key, value in ladder.shape(width, num_layers, head_dim).items():
        c.model[key.removeprefix("model.")] = value


def study_name(name: str, arg: str) -> str:
    """The folder of a study: one for each argument, so that a tiny trial does not mix with the real thing."""
    return f"{name}_{arg}" if arg else name


def check(arg: str, known: tuple[str, ...]) -> None:
    """Refuses an argument that the experiment does not take."""
    if arg not in known:
        raise ConfigError(f"argument {arg!r} is not known; {config.nearest(arg, [k for k in known if k])}")
