"""slmjax data --config=FILE[:ARG] [--config.a.b=value ...]
   slmjax data FILE --tokenizer=byte|FILE.model --out=DIR

The first shows what a config trains on: documents, tokens, bytes per token, epochs. The second turns a file, folder or
glob of text into a folder of token shards, for --config.data.sources; where it was killed, it goes on.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import data, tokenizer
from slmjax.cli import options
from slmjax.config import ConfigError


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    absl_flags.DEFINE_string("out", None, "folder for the shards", flag_values=flag_values)
    absl_flags.DEFINE_string("tokenizer", None, "byte, or a .model file", flag_values=flag_values)
    absl_flags.DEFINE_float("held_out", 0.05, "share of documents kept for evaluation", flag_values=flag_values)
    absl_flags.DEFINE_string("text_key", "text", "field of .jsonl, column of .parquet", flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if not args:
        print(data.inspect(options.config_of(flags)))
        return 0
    if len(args) != 1 or not flags.out or not flags.tokenizer:
        raise ConfigError("data takes one file, folder or glob, with --tokenizer=byte|FILE.model and --out=DIR")
    chosen = tokenizer.byte_tokenizer() if flags.tokenizer == "byte" else tokenizer.load(flags.tokenizer)
    manifest = data.build_shards(args[0], chosen, flags.out, flags.held_out, flags.text_key)
    for split, shards in manifest.splits.items():
        print(f"{split}: {sum(shard.tokens for shard in shards):,} tokens in {len(shards)} shards")
    print(f"shards: {flags.out}")
    return 0
