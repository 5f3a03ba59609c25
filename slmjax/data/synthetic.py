"""The sources that are drawn rather than read, one module each, found by the name before a spec's first colon.

A module exports `sampler(spec, split, length)`, `vocab_size(spec)` and `entropy(spec, num_tokens, context)`; its tokens
are functions of (spec, split, window). `slmjax.config.synthetic` has the same names for planning.
"""

from types import ModuleType

from slmjax.config import MASKING, RunConfig
from slmjax.data import markov, pairs, waiting_line

MODULES = {"markov": markov, "line": waiting_line, "pairs": pairs}


def module_of(spec: str) -> ModuleType | None:
    """None: not a synthetic source."""
    name, colon, _ = spec.partition(":")
    return MODULES.get(name) if colon else None


def floor(cfg: RunConfig) -> float | None:
    """Nats per scored token of a held-out window that the best model of `cfg.objective` reaches; None: not known.

    Of the T + 1 tokens of a window, autoregression scores the last T given the first. Objectives that hide tokens are
    not shown that first one, so that they score their own first token given nothing; shifted, it is shown, not scored.
    """
    module, T = module_of(cfg.data.sources[0]), cfg.data.seq_len
    # Where prompts are not scored, what is left is not the mean of a row.
    if len(cfg.data.sources) > 1 or module is None or cfg.objective.prompt != "scored":
        return None
    shifted = cfg.objective.name in MASKING and cfg.objective.diffusion.alignment == "shifted"
    if shifted and module is not markov:  # a whole row less its last token: nobody has asked yet
        return None
    return module.entropy(cfg.data.sources[0], T, context=shifted or cfg.objective.name not in MASKING)
