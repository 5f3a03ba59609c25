"""SMDM (Nie et al. 2024, arXiv 2410.18514): masked diffusion at the paper's sizes, with its recipe.

    slmjax train --config=smdm:170m --config.data.sources="('corpus/*.jsonl',)" --out=OUT
Its autoregressive twin: --config.objective.name=next_token --config.objective.diffusion.random_length=0 as well.
Sizes 6m to 2121m, named by their parameters without embeddings (`ladder.SMDM`), each as long as 1e19 FLOPs of 6 N D
last, the second of the paper's five budgets; accelerators are wanted. `:tiny` keeps the recipe at width 64 on the
embedded corpus: 100 steps, under a minute.
"""

from ml_collections import ConfigDict

from experiments import base
from slmjax import config, ladder

FLOPS = 1e19


def get_config(arg: str = "170m") -> ConfigDict:
    base.check(arg, (*ladder.SMDM, "tiny"))
    c = base.get_config("tiny" if arg == "tiny" else "")
    c.objective.name = "masked_diffusion"
    # A hundredth of the rows are cut in two, so that short contexts are met.
    c.objective.diffusion.random_length = 0.01
    c.model.parametrization.name, c.model.parametrization.init_std = "sp", 0.02
    c.model.parametrization.embed_multiplier = 1.0
    c.optim.lr = 2e-4  # of the released script; the paper says 4e-4
    c.schedule.name, c.schedule.final_ratio = "cosine", 0.1
    if arg == "tiny":
        base.resize(c, 64, 2)
        c.model.tied_embeddings, c.optim.lr = False, 2e-3
        return c
    for key, value in ladder.smdm(arg).items():
        c.model[key.removeprefix("model.")] = value
    c.data.vocab_size, c.data.seq_len, c.train.batch_size = 32000, 2048, 256
    N = ladder.count_params(config.resolve(c).model, c.data.vocab_size).non_embedding
    c.train.steps = ladder.steps_for(FLOPS / (6 * N), c.train.batch_size, c.data.seq_len)
    c.schedule.warmup_steps, c.log.eval_every = max(100, c.train.steps // 100), 500
    return c
