"""Tokens from a trained run: which decoder settings name, what it may be told, and what it did.

    run                 decoder, by these settings                     told beside end_id
    autoregressive      left_to_right                                  temperature seed
    that hides tokens   ordered (the default; order=...)               order steps per_call block temperature seed
                        threshold (threshold=...)                      threshold block
                        ancestral, first_hitting (order=...)           steps seed; seed
                        free_dave, prophet (accelerate=...)            per_call block
                        local_leap (accelerate=...)                    threshold block

All but the first may be guided by their prompt, and those that work in blocks may have a cache. Block diffusion has the
blocks that it was trained with: any of these decoders fills one after another. What a decoder is, and against what it
is lossless, is in its module of `slmjax.decoding`, where each may be called with any denoiser.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slmjax.config import ConfigError
from slmjax.decoding import (
    Decoded,
    ancestral,
    blocks,
    end_of_text,
    first_hitting,
    free_dave,
    guidance,
    left_to_right,
    local_leap,
    loop,
    ordered,
    prophet,
    threshold,
)
from slmjax.decoding.cache import Cache
from slmjax.denoiser import PAD, Counted, Denoiser
from slmjax.models.attention import parse
from slmjax.tokenizer import Tokenizer
from slmjax.trained import Trained

LENGTH = 64


class Settings(NamedTuple):
    """None is "not given". What is given and the decoder does not read is refused."""

    length: int | None = None  # tokens after each prompt; None: LENGTH, or fewer where the trained length ends
    num: int = 1  # rows for each prompt
    temperature: float | None = None  # None: 1 left to right, which samples the model; else 0, the best guess
    seed: int | None = None  # None: 0
    order: str | None = None  # confidence | margin | entropy | random | ancestral | first_hitting
    steps: int | None = None  # calls for a row; of block diffusion, for a block
    per_call: int | None = None  # positions a call
    threshold: float | None = None
    block: int | None = None  # filled left to right; None: whole rows
    guidance: float | None = None
    cache: str | None = None  # dual | prefix | hidden | blocks
    accelerate: str | None = None  # free_dave | prophet | local_leap
    end_id: int | None = None  # the token that ends a row


class Decoder(NamedTuple):
    function: Callable[..., Decoded]
    reads: tuple[str, ...]  # fields of Settings; `order` and `accelerate` where they chose it
    cached: bool = False  # works in blocks of which no other is looked at
    lossless: str | None = None  # against what, at any settings


DECODERS = {
    "left_to_right": Decoder(left_to_right.decode, ("temperature", "seed")),
    "ordered": Decoder(ordered.decode, ("order", "steps", "per_call", "block", "temperature", "seed"), cached=True),
    "threshold": Decoder(threshold.decode, ("threshold", "block"), cached=True),
    "ancestral": Decoder(ancestral.sample, ("order", "steps", "seed")),
    "first_hitting": Decoder(first_hitting.sample, ("order", "seed"), lossless="the model"),
    "free_dave": Decoder(free_dave.decode, ("accelerate", "per_call", "block"), lossless="static decoding"),
    "prophet": Decoder(prophet.decode, ("accelerate", "per_call", "block")),
    "local_leap": Decoder(local_leap.decode, ("accelerate", "threshold", "block"), cached=True),
}
ORDERS = (*ordered.ORDERS, "ancestral", "first_hitting")
ACCELERATORS = ("free_dave", "prophet", "local_leap")
OF_ALL = ("length", "num", "end_id")
AROUND = ("guidance", "cache", "end_id")


class Generated(NamedTuple):
    """Rows of each prompt stand together, in the prompts' order."""

    decoded: Decoded
    prompts: list[np.ndarray]  # of each row
    completions: list[np.ndarray]  # of each row, as far as its end token
    decoder: str
    told: dict  # what the decoder and what is around it were told
    num_calls: int
    num_positions: int  # that the network computed, of all rows and calls
    deterministic: bool  # no seed changes it: a best guess, not a sample
    lossless: str | None  # against what; None: not lossless


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """As the run was trained on documents: the BOS, then the text's ids."""
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), *tokenizer.encode([text])])


def generate(trained: Trained, prompts: Sequence[np.ndarray], settings: Settings | None = None) -> Generated:
    """Continues each prompt, a row of token ids, by `settings.length` tokens, all in one batch.

    Raises:
      ConfigError, ValueError: settings that cannot be or have no effect, a prompt that does not fit.
    """
    given = settings or Settings()
    rule, model_block = parse(trained.objective.decoding or trained.objective.attention)
    name = decoder_of(rule, given)
    _check(trained, name, model_block, given)
    rows = [np.asarray(prompt, np.int32) for prompt in prompts for _ in range(given.num)]
    tokens_BT = _with_masks(trained, rows, given)
    told = _told(name, given, model_block or _length(trained, rows, given))
    if len(rows) > len(prompts) and not _draws(name, told):
        raise ConfigError(f"num={given.num} gives as many equal rows, for {name} draws nothing as set; see temperature")
    if given.seed is not None and not _draws(name, told):
        raise ConfigError(f"seed={given.seed} has no effect: {name} draws nothing as set")
    if name == "left_to_right":
        work = [trained.next_token()]
        decoded = left_to_right.decode(work[0], tokens_BT, mask_id=trained.mask_id, end_id=given.end_id, **told)
    else:
        decoded, work = _denoised(trained, name, model_block, tokens_BT, rows, given, told)
    ends = [(row_T != PAD).sum() for row_T in decoded.tokens_BT]
    completions = [row_T[len(p) : end] for row_T, p, end in zip(decoded.tokens_BT, rows, ends, strict=True)]
    return Generated(
        decoded,
        rows,
        [_until(row, given.end_id) for row in completions],
        name,
        told | {key: getattr(given, key) for key in AROUND if getattr(given, key) is not None},
        sum(each.num_calls for each in work),
        sum(each.num_positions for each in work),
        deterministic=not _draws(name, told),
        lossless=_lossless(name, model_block, given, told),
    )


def decoder_of(rule: str, given: Settings) -> str:
    """The decoder's name, by the attention of the run's model and the settings."""
    if rule == "causal":
        return "left_to_right"
    for key, value, choices in (("order", given.order, ORDERS), ("accelerate", given.accelerate, ACCELERATORS)):
        if value is not None and value not in choices:
            raise ConfigError(f"{key}={value!r} is none of {', '.join(choices)}")
    if given.accelerate is not None:
        return given.accelerate
    if given.order in ("ancestral", "first_hitting"):
        return given.order
    return "ordered" if given.threshold is None else "threshold"


def _check(trained: Trained, name: str, model_block: int, given: Settings) -> None:
    """Refuses what has no effect, and what does not go together."""
    decoder, objective = DECODERS[name], trained.cfg.objective.name
    reads = (*OF_ALL, *decoder.reads) + (() if name == "left_to_right" else ("guidance", "cache"))
    for key, value in given._asdict().items():
        if value is not None and key not in reads:
            raise ConfigError(
                f"{key}={value!r} has no effect on {name}, which decodes objective.name={objective!r} as set; it takes "
                f"{', '.join(reads)}"
            )
    for key, least in (("length", 1), ("num", 1), ("steps", 1), ("per_call", 1), ("block", 1), ("end_id", 0)):
        if getattr(given, key) is not None and getattr(given, key) < least:
            raise ConfigError(f"{key}={getattr(given, key)} must be >= {least}")
    if given.end_id is not None and given.end_id >= trained.mask_id:
        raise ConfigError(f"end_id={given.end_id} is not one of the model's {trained.mask_id} tokens")
    if model_block and given.block is not None:
        raise ConfigError(f"block={given.block} has no effect: the model was trained with blocks of {model_block}")
    moe = trained.cfg.model.moe
    if moe.num_experts and moe.dispatch != "dropless" and (name == "left_to_right" or given.cache):
        raise ConfigError(
            f"model.moe.dispatch={moe.dispatch!r} chooses among all tokens of a row, which a cache does not recompute; "
            + ("use a run with 'dropless'" if name == "left_to_right" else "decode with cache=none")
        )
    if given.cache is None:
        return
    if given.guidance:
        raise ConfigError(f"cache={given.cache!r} remembers one context, and guidance={given.guidance} asks about two")
    if not (decoder.cached or (model_block and name != "free_dave")):
        cached = ", ".join(key for key, each in DECODERS.items() if each.cached)
        raise ConfigError(f"cache={given.cache!r} does not go with {name}, which looks at more than a block of a row; "
                          f"these decoders take one: {cached}")  # fmt: skip
    if not (model_block or given.block):
        raise ConfigError(f"cache={given.cache!r} works in blocks, and block is not given; use e.g. block=16")


def _length(trained: Trained, rows: list[np.ndarray], given: Settings) -> int:
    """Tokens after each prompt: no row is longer than those the run was trained on."""
    most = trained.cfg.data.seq_len + (trained.objective.attention == "causal")
    room = most - max(map(len, rows))
    if room < (given.length or 1):
        raise ConfigError(
            f"length={given.length or 1} after a prompt of {max(map(len, rows))} tokens is more than the {most} that "
            f"the run was trained on at once; use a shorter {'prompt' if room < 1 else f'length, at most {room}'}"
        )
    return given.length or min(LENGTH, room)


def _with_masks(trained: Trained, rows: list[np.ndarray], given: Settings) -> np.ndarray:
    """int32 [B, T]: prompt and masks of each row, PAD behind shorter ones."""
    mask_id, length = trained.mask_id, _length(trained, rows, given)
    for row in rows:
        if ((row < 0) | (row >= mask_id)).any():
            wrong = row[(row < 0) | (row >= mask_id)][0]
            raise ConfigError(f"token {wrong} of a prompt is not one of the model's, 0 to {mask_id - 1}")
    if trained.objective.attention != "causal" and trained.objective.alignment == "shifted" and not min(map(len, rows)):
        raise ConfigError("objective.diffusion.alignment='shifted' predicts no first token; give a prompt")
    if given.guidance and not min(map(len, rows)):
        raise ConfigError(f"guidance={given.guidance} has no effect without a prompt")
    tokens_BT = np.full((len(rows), max(map(len, rows)) + length), PAD, np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)], tokens_T[len(row) : len(row) + length] = row, mask_id
    return tokens_BT


def _told(name: str, given: Settings, num_masks: int) -> dict:
    """Arguments of the decoder's function, defaults that are chosen here filled in. num_masks: of a row, or block."""
    reads = DECODERS[name].reads
    told = {key: getattr(given, key) for key in reads if key != "accelerate" and getattr(given, key) is not None}
    if name in ("ancestral", "first_hitting"):
        del told["order"]
    if "steps" in reads and (given.steps or name == "ancestral"):
        told["num_steps"] = told.pop("steps", num_masks)
    if name == "ordered" and "num_steps" not in told:
        told.setdefault("per_call", 1)
    if name == "left_to_right":
        told.setdefault("temperature", 1.0)
    if _draws(name, told):
        told.setdefault("seed", 0)
    return told


def _draws(name: str, told: dict) -> bool:
    """Whether a seed changes what comes out."""
    drawn = name in ("ancestral", "first_hitting") or told.get("order") == "random"
    return drawn or told.get("temperature", 0.0) > 0


def _lossless(name: str, model_block: int, given: Settings, told: dict) -> str | None:
    """Against what; None for no."""
    if given.guidance or (given.cache and not model_block):
        return None
    if given.end_id is not None and name != "left_to_right" and not model_block:
        return None  # only for some models: `slmjax.decoding.end_of_text`
    at_random = name == "ordered" and told.get("order") == "random" and told.get("per_call") == 1
    if told.get("temperature") == 1 and (name == "left_to_right" or at_random):
        return "the model"
    return DECODERS[name].lossless


def _denoised(trained: Trained, name: str, model_block: int, tokens_BT, rows, given: Settings, told: dict):
    """(Decoded, what counted the work)."""
    decode, mask_id = DECODERS[name].function, trained.mask_id
    denoiser = counted = Counted(trained.denoiser())
    work, cache = [counted], None
    if given.cache is not None:
        cache = Cache(
            trained.model, trained.params, trained.objective, mask_id=mask_id, kind=given.cache,
            block=model_block or given.block,
        )  # fmt: skip
        work.append(cache)
    if given.guidance:
        prompt_BT = np.arange(tokens_BT.shape[1])[None] < np.array([len(row) for row in rows])[:, None]
        if name == "free_dave" and len(rows) > 1:
            raise ConfigError(f"guidance={given.guidance} with accelerate='free_dave' takes one row, not {len(rows)}")
        denoiser = guidance.guided(counted, prompt_BT, given.guidance, mask_id)
    if model_block:
        decode = blockwise(decode, model_block, given.end_id, cache)
    else:
        denoiser = denoiser if cache is None else cache
        decode = decode if given.end_id is None else end_of_text.stopping(decode, given.end_id)
    return decode(denoiser, tokens_BT, mask_id=mask_id, **told), work


def blockwise(
    decode: Callable[..., Decoded], block: int, end_id: int | None = None, later: Denoiser | None = None
) -> Callable[..., Decoded]:
    """A decoder of block diffusion: `decode` on each row's blocks of the model, one after another; what lies behind is
    PAD, for no block sees a later one.

    A block that a prompt ends in is finished first. `later` is the denoiser from then on, a cache. Rows with an end_id
    in a finished block are filled up with it, without a call.
    """

    def decode_blocks(denoiser: Denoiser, tokens_BT, *, mask_id: int, **settings) -> Decoded:
        tokens_BT, trace, deterministic = loop.checked(tokens_BT, mask_id), [], True
        answer_BT, place_1T = tokens_BT == mask_id, np.arange(tokens_BT.shape[1])[None]
        for stage in itertools.count():
            masked_BT = tokens_BT == mask_id
            if not masked_BT.any():
                return Decoded(tokens_BT, tuple(trace), deterministic)
            starts_B = blocks.starts(masked_BT)
            within_B = masked_BT.any(1) & (starts_B % block > 0)  # a block that a prompt ends in
            opening = within_B.any()
            edge_B = np.where(within_B if opening else True, (starts_B // block + 1) * block, starts_B)
            here_BT = place_1T < edge_B[:, None]
            if "seed" in settings:  # a stream for each stage: else all blocks would have one noise
                stage_seed = np.random.SeedSequence((settings["seed"], stage)).generate_state(1)[0]
                settings_here = settings | {"seed": int(stage_seed)}
            else:
                settings_here = settings
            asked = denoiser if opening or later is None else later
            decoded = decode(asked, np.where(here_BT, tokens_BT, PAD), mask_id=mask_id, **settings_here)
            calls = trace[-1].call + 1 if trace else 0
            trace += [reveal._replace(call=reveal.call + calls) for reveal in decoded.trace]
            tokens_BT = np.where(masked_BT & here_BT, decoded.tokens_BT, tokens_BT)
            deterministic = deterministic and decoded.deterministic
            if end_id is not None:
                ended_B1 = (answer_BT & (tokens_BT == end_id)).any(1, keepdims=True)
                tokens_BT = np.where(ended_B1 & (tokens_BT == mask_id), np.int32(end_id), tokens_BT)

    return decode_blocks


def _until(completion_T: np.ndarray, end_id: int | None) -> np.ndarray:
    """As far as the first end token, it included."""
    ends = np.flatnonzero(completion_T == end_id) if end_id is not None else ()
    return completion_T[: ends[0] + 1] if len(ends) else completion_T
