"""Context-free grammars over tokens: masks are filled with strings of the grammar only; counting and drawing those.

`parse` makes a Grammar, `decode` is the decoder, `allowed` says which tokens each mask may still become, `count` and
`sample_uniform` treat all strings of one length alike. Grammars are of tokens: nothing here knows of text.
"""

from slmjax.decoding.grammar.constrained import allowed, decode
from slmjax.decoding.grammar.counts import count, nearest_lengths, sample_uniform
from slmjax.decoding.grammar.rules import Grammar, padded, parse

__all__ = ["Grammar", "allowed", "count", "decode", "nearest_lengths", "padded", "parse", "sample_uniform"]
