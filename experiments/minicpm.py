"""MiniCPM's wind tunnel (Hu et al. 2024, arXiv 2404.06395): its sizes, its multipliers and its WSD schedule.

    slmjax train --config=minicpm:9m --config.data.sources="('corpus/*.jsonl',)" --out=OUT
Sizes 9m 30m 70m 0.1b 0.17b 0.2b 0.5b 1.2b 2.4b, 20 tokens per parameter; an accelerator is wanted from 30m on. `:tiny`
keeps the recipe at width 64 on the embedded corpus: 100 steps, under a minute.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder

TOKENS_PER_PARAM = 20


def get_config(arg: str = "9m") -> ConfigDict:
    base.check(arg, (*ladder.MINICPM, "tiny"))
    c = base.get_config("tiny" if arg == "tiny" else "")
    scheme = c.model.parametrization
    # The paper's tensor program (table 7): lr 0.01 and init 0.1 tuned at width 256, embeddings times 12, every
    # residual branch times 1.4 / sqrt(layers), logits divided by width / 256.
    scheme.name, scheme.base_width, scheme.init_std = "minicpm", 256, 0.1
    scheme.embed_multiplier, scheme.residual_multiplier = 12.0, 1.4
    c.optim.lr = 0.01
    if arg == "tiny":
        base.resize(c, 64, 2)
        steps = c.train.steps
    else:
        for key, value in ladder.minicpm(arg).items():
            c.model[key.removeprefix("model.")] = value
        c.data.vocab_size, c.data.seq_len, c.train.batch_size = 16384, 512, 256
        c.schedule.warmup_steps, c.log.eval_every = 100, 500
        N = ladder.count_params(config.resolve(c).model, c.data.vocab_size).non_embedding
        steps = ladder.steps_for(TOKENS_PER_PARAM * N, c.train.batch_size, c.data.seq_len)
    # The last tenth decays by half-lives, a fifth of the decay each: 2^-5 of the peak at the end (section 4.2).
    decay = max(1, steps // 10)
    c.train.steps = steps
    c.schedule.decay_shape, c.schedule.decay_steps, c.schedule.half_life_steps = "half_life", decay, max(1, decay // 5)
    return c
