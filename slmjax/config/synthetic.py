"""Synthetic data sources as far as planning goes: which specs name one, and how many tokens it has."""

import re

# Name before the first colon → (form of the spec, vocabulary from the number in it). The sources themselves are modules
# of slmjax.data (`slmjax.data.synthetic` has the table), above this floor; a test holds both to the same numbers.
_FORMS = {
    "markov": (r"markov:(\d+):\d+", lambda states: states),
    "line": (r"line:\w+:(\d+):\d+", lambda items: 2 * items + 2),
    "pairs": (r"pairs:(\d+):\d+:\d+(?::\w+)?", lambda pairs: 34),
}


def is_synthetic(spec: str) -> bool:
    return spec.partition(":")[0] in _FORMS and ":" in spec


def vocab_size(spec: str) -> int | None:
    """Tokens of a synthetic source; None: it is not one, or not of its form."""
    form, size = _FORMS.get(spec.partition(":")[0], ("", None))
    match = re.fullmatch(form, spec)
    return size(int(match[1])) if match and size else None
