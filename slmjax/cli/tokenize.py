"""slmjax tokenize FILE ... --vocab_size=V --model=OUT.model

Trains a lossless SentencePiece BPE tokenizer on files, folders or globs (.txt, .jsonl, .jsonl.gz, .parquet). Use it
with --config.data.tokenizer=OUT.model.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import tokenizer
from slmjax.cli import options
from slmjax.config import ConfigError


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_integer("vocab_size", 4096, "tokens", flag_values=flag_values)
    absl_flags.DEFINE_string("model", None, "file to write", flag_values=flag_values)
    absl_flags.DEFINE_string("text_key", "text", "field of .jsonl, column of .parquet", flag_values=flag_values)
    options.define_json(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if not args or not flags.model:
        raise ConfigError("tokenize needs FILE ... and --model=OUT.model")
    made = tokenizer.train_from_files(args, flags.vocab_size, flags.model, flags.text_key)
    if flags.json:
        options.print_json({"model": flags.model, "vocab_size": made.vocab_size, "hash": made.hash})
    else:
        print(f"{flags.model}: {made.vocab_size:,} tokens, hash {made.hash}")
    return 0
