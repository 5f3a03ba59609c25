"""Eight learning rates of one small model, 200 steps each: the sweep that `sweep.py` times end to end.

slmjax study run --study=benchmarks/sweep_study.py --out=OUT
"""

from slmjax import config, ladder
from slmjax.study import Study, axis

RATES = tuple(1e-3 * 2**i for i in range(8))
STEPS = 200


def get_study() -> Study:
    changes = {
        "data.sources": ("stdlib",),
        "data.vocab_size": 512,
        "data.seq_len": 128,
        "data.packing": "concat",
        "train.batch_size": 8,
        "train.steps": STEPS,
        "train.eval_sequences": 128,
        "schedule.name": "cosine",
    }
    base = config.override(config.RunConfig(), ladder.shape(64, 2, 16) | changes)
    return Study("sweep", base, axis("optim.lr", RATES))
