"""What experts buy: 4, 8 and 16 of them, 2 active, beside the dense model of equal active parameters and tokens.

    slmjax study run --study=moe_ladder --out=OUT --jobs=2
    slmjax study compare --study=OUT/moe_ladder --rows=train.seed --columns=experts
16 runs, 4 programs, 4 seeds each; the comparison prints the mean difference to the dense model and its standard error.
"""

from ml_collections import ConfigDict

from experiments import base, wsd_ladder
from slmjax import config, ladder, study
from slmjax.study import Study, axis, product

ACTIVE = 2
EXPERTS, SEEDS = (4, 8, 16), (0, 1, 2, 3)
STEPS = 1760


def get_config(arg: str = "") -> ConfigDict:
    """The mixture of 8; `get_study` varies the number."""
    base.check(arg, ("", "tiny"))
    c = wsd_ladder.get_config(arg)
    c.train.steps = 80 if arg == "tiny" else STEPS
    c.schedule.decay_fraction = 0.2
    for key, value in experts(c.model.mlp_width, 8).items():
        c.model.moe[key.removeprefix("model.moe.")] = value
    return c


def experts(mlp_width: int, num_experts: int) -> dict:
    """Overrides for experts in place of a feed-forward, or none."""
    return ladder.mixture(mlp_width, num_experts, ACTIVE) if num_experts else {}


def get_study(arg: str = "") -> Study:
    c = config.override(config.resolve(get_config(arg)), {"model.moe": {}})
    numbers = (0, *(EXPERTS if arg != "tiny" else (4,)))  # 0: dense
    sizes = axis("experts", {number: experts(c.model.mlp_width, number) for number in numbers})
    seeds = axis("train.seed", SEEDS if arg != "tiny" else (0, 1))
    return study.Study(base.study_name("moe_ladder", arg), c, product(sizes, seeds))
