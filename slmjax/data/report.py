"""What `slmjax data` prints: how much of what a config trains on, and how often."""

from slmjax.config import RunConfig
from slmjax.data import order
from slmjax.data.sources import Source, epochs, open_sources

_HEADER = ("source", "documents", "train tokens", "held-out tokens", "bytes/token", "windows", "epochs", "corpus")


def inspect(cfg: RunConfig) -> str:
    """A table of the sources of `cfg`, opened and if need be tokenized: counts, bytes per token, epochs, hashes.

    Documents and bytes per token are of both splits together, epochs are those after `train.steps`; `-` is unknown.
    """
    mixture, sources = order.build_mixture(cfg), open_sources(cfg.data)
    passes = epochs(sources, mixture, cfg.train.steps)
    rows = [_HEADER, *(_row(source, n) for source, n in zip(sources, passes, strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    T, B = cfg.data.seq_len, cfg.train.batch_size
    lines.append(
        f"{cfg.train.steps:,} steps of {B} x {T} tokens = {cfg.train.steps * B * T:,} tokens; "
        f"tokenizer {sources[0].tokenizer} of {max(s.vocab_size for s in sources):,} tokens"
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(source: Source, passes: float) -> tuple[str, ...]:
    train, held_out = source.train, source.held_out
    if train.count is None:
        return (source.spec, "-", "endless", "endless", "-", "endless", "-", source.corpus)
    documents = (train.num_documents or 0) + (held_out.num_documents or 0)
    text_bytes = (train.text_bytes or 0) + (held_out.text_bytes or 0)
    per_token = f"{text_bytes / (train.num_tokens + held_out.num_tokens):.3f}" if text_bytes else "-"
    return (
        source.spec, f"{documents:,}" if documents else "-", f"{train.num_tokens:,}", f"{held_out.num_tokens:,}",
        per_token, f"{train.count:,}", f"{passes:.3g}", source.corpus,
    )  # fmt: skip
