"""The sources that are drawn rather than read, one module each, found by the name before a spec's first colon.

A module exports `sampler(spec, split, length)`, `vocab_size(spec)` and `entropy(spec)`; its tokens are functions of
(spec, split, window). `slmjax.config.synthetic` has the same names for planning.
"""

from types import ModuleType

from slmjax.data import markov, pairs, waiting_line

MODULES = {"markov": markov, "line": waiting_line, "pairs": pairs}


def module_of(spec: str) -> ModuleType | None:
    """None: not a synthetic source."""
    name, colon, _ = spec.partition(":")
    return MODULES.get(name) if colon else None
