"""slmjax sample RUN_DIR [--prompt=TEXT | --prompts=FILE | --tokens=1,2,3] [--length=64] [--num=1] [decoder's flags]

Continues prompts with a trained run, all in one batch: as text, or as token ids where the run has no tokenizer. Text
has the document mark (BOS) in front; without a prompt, that alone. Says by which decoder, with how many calls of the
network and positions computed, and whether another seed would change it.

An autoregressive run is sampled left to right: --temperature, --seed. A run that hides tokens fills its surest position
first, one a call; other decoders, and their flags:
  --order=confidence|margin|entropy|random   with --steps or --per_call, --block, --temperature, --seed
  --threshold=0.9                            all positions that are that sure; --block
  --order=ancestral (--steps) | first_hitting     draws in random order; --seed
  --accelerate=free_dave | prophet | local_leap   fewer calls; --per_call or --threshold, --block
With any of them --guidance, --end_id and, in blocks, --cache. Flags without effect are refused.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment
from slmjax.cli import options
from slmjax.config import ConfigError

TEXTS = {
    "prompt": "text to continue",
    "prompts": "file of prompts, one a line",
    "order": "of positions: confidence, margin, entropy, random, ancestral, first_hitting",
    "cache": "none, dual, prefix, hidden; of block diffusion: none, blocks",
    "accelerate": "none, free_dave, prophet, local_leap",
}
NUMBERS = {
    "step": "checkpoint; the newest when not given",
    "length": "tokens after a prompt; 64 when not given, or fewer where the trained length ends",
    "seed": "of draws; 0 when not given",
    "steps": "calls for a row; of block diffusion, for a block",
    "per_call": "positions a call",
    "block": "positions of a block, filled left to right; whole rows when not given",
    "end_id": "the token that ends a row",
}
FRACTIONS = {
    "temperature": "0: the best guess; 1: as the model says; 1 left to right and else 0 when not given",
    "threshold": "confidence from which a position is filled",
    "guidance": "how much more of what the prompt adds; 0: nothing",
}


def define(flag_values: FlagValues) -> None:
    options.define_json(flag_values)
    for name, text in TEXTS.items():
        absl_flags.DEFINE_string(name, None, text, flag_values=flag_values)
    for name, text in NUMBERS.items():
        absl_flags.DEFINE_integer(name, None, text, flag_values=flag_values)
    for name, text in FRACTIONS.items():
        absl_flags.DEFINE_float(name, None, text, flag_values=flag_values)
    absl_flags.DEFINE_integer("num", 1, "continuations of each prompt", flag_values=flag_values)
    absl_flags.DEFINE_list("tokens", None, "token ids to continue, as they are", flag_values=flag_values)
    absl_flags.DEFINE_boolean("trace", False, "print which token was filled in by which call, as JSON lines",
                              flag_values=flag_values)  # fmt: skip


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"sample takes one folder, of a run, not {len(args)}")
    texts, tokens = _texts(flags), _tokens(flags)
    environment.prepare(num_devices=1)
    from slmjax import sample, trained

    run = trained.load(args[0], flags.step)
    tokenizer = run.tokenizer()
    if texts and tokenizer is None:
        raise ConfigError(
            f"--prompt: {run.folder} was trained with data.tokenizer={run.cfg.data.tokenizer!r} and has no text; use "
            "--tokens=1,2,3"
        )
    if tokens is not None:
        prompts = [np.array(tokens, np.int32)]
    elif tokenizer is None:
        prompts = [np.zeros(0, np.int32)]
    else:
        prompts = [sample.encode(tokenizer, text) for text in texts or [""]]
    given = {name: getattr(flags, name) for name in sample.Settings._fields}
    settings = sample.Settings(**{name: None if value == "none" else value for name, value in given.items()})
    made = sample.generate(run, prompts, settings)
    trace = _trace(made) if flags.trace else None
    if flags.json:
        options.print_json(_json(run, made, tokenizer, trace))
        return 0
    print(_said(run, made))
    for prompt_T, completion_T in zip(made.prompts, made.completions, strict=True):
        ids = [*prompt_T, *completion_T]
        print(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
    for line in trace or ():
        print(line)
    return 0


def _texts(flags: FlagValues) -> list[str]:
    given = [name for name in ("prompt", "prompts", "tokens") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} both say what to continue; give one of them")
    if flags.prompts is not None:
        texts = Path(flags.prompts).read_text().splitlines()
        if not texts:
            raise ConfigError(f"--prompts={flags.prompts} is empty; give a prompt a line")
        return texts
    return [] if flags.prompt is None else [flags.prompt]


def _tokens(flags: FlagValues) -> list[int] | None:
    if flags.tokens is None:
        return None
    bad = [entry for entry in flags.tokens if not entry.isdigit()]
    if bad:
        raise ConfigError(f"--tokens={','.join(flags.tokens)} must be ids, e.g. --tokens=1,2,3")
    return [int(entry) for entry in flags.tokens]


def _said(run, made) -> str:
    told = ", ".join(f"{name}={value}" for name, value in made.told.items())
    told = f" ({told})" if told else ""
    fixed = "deterministic: a best guess, not a sample" if made.deterministic else "another seed gives another"
    lossless = f"lossless against {made.lossless}" if made.lossless else "not lossless"
    return (
        f"# {run.folder} at step {run.step}, {run.cfg.objective.name}, by {made.decoder}{told}: {made.num_calls} "
        f"calls, {made.num_positions:,} positions computed; {fixed}; {lossless}"
    )


def _json(run, made, tokenizer, trace: list[str] | None) -> dict:
    rows = zip(made.prompts, made.completions, strict=True)
    return {
        "run": str(run.folder),
        "step": run.step,
        "objective": run.cfg.objective.name,
        "decoder": made.decoder,
        "told": made.told,
        "num_calls": made.num_calls,
        "num_positions": made.num_positions,
        "deterministic": made.deterministic,
        "lossless": made.lossless,
        "samples": [
            {
                "prompt": prompt_T.tolist(),
                "tokens": completion_T.tolist(),
                "text": None if tokenizer is None else tokenizer.decode(completion_T),
            }
            for prompt_T, completion_T in rows
        ],
        **({} if trace is None else {"trace": [json.loads(line) for line in trace]}),
    }


def _trace(made) -> list[str]:
    """A line for every token that was filled in, in order."""
    lines = []
    for reveal in made.decoded.trace:
        confidence_N = np.exp(np.asarray(reveal.log_confidence_N, np.float64))
        for row, position, value, sure in zip(
            reveal.rows_N, reveal.positions_N, reveal.values_N, confidence_N, strict=True
        ):
            line = {"call": reveal.call, "row": int(row), "position": int(position), "value": int(value)}
            lines.append(json.dumps(line | {"confidence": round(float(sure), 6)}))
    return lines
