"""Waiting-line tasks of ParallelBench (2510.04767): a line of N distinct items and what becomes of it.

A row is [start, items, what else the task names, separator, response]; items are N of 2N, drawn without replacement.
Tasks that end in _random, and shuffle, have many valid responses, all equally likely, of which no token can be chosen
without regard to the others; all other tasks have one. What follows from that for decoding is in
`slmjax.decoding.parallel_bench`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slmjax.config import ConfigError
from slmjax.data.order import key, uniform

TASKS = (
    "copy", "reverse", "sort", "shuffle", "replace_index", "replace_random", "insert_index", "insert_random",
    "remove_index", "remove_random",
)  # fmt: skip
MAX_ITEMS = 256


class Line(NamedTuple):
    """A task on lines of N items; tokens are the items 0 to 2N - 1, the separator and the start token.

    A prompt is the N items, for replace and insert one more to bring in, and for _index tasks the place, written as the
    item of that number.
    """

    task: str
    num_items: int

    @property
    def edit(self) -> str:
        return self.task.partition("_")[0]

    @property
    def indexed(self) -> bool:
        return self.task.endswith("_index")

    @property
    def brings_item(self) -> bool:
        return self.edit in ("replace", "insert")

    @property
    def separator(self) -> int:
        return 2 * self.num_items

    @property
    def start(self) -> int:
        return 2 * self.num_items + 1

    @property
    def vocab_size(self) -> int:
        return 2 * self.num_items + 2

    @property
    def prompt_len(self) -> int:
        """Tokens before the response, the separator counted and the start token not."""
        return self.num_items + self.brings_item + self.indexed + 1

    @property
    def response_len(self) -> int:
        return self.num_items + {"insert": 1, "remove": -1}.get(self.edit, 0)

    @property
    def row_len(self) -> int:
        """Tokens of a row, the start token left out."""
        return self.prompt_len + self.response_len

    @property
    def num_responses(self) -> int:
        """Valid responses to one prompt."""
        if self.task == "shuffle":
            return math.factorial(self.num_items)
        return self.num_places if self.task.endswith("_random") else 1

    @property
    def num_places(self) -> int:
        """Where the task may act; 1 for a task that acts nowhere."""
        return {"replace": self.num_items, "insert": self.num_items + 1, "remove": self.num_items}.get(self.edit, 1)


def parse(spec: str) -> tuple[Line, int]:
    """(line, seed) of a `line:TASK:N:SEED` source.

    Raises:
      ConfigError: not of that form, an unknown task, or a number out of range.
    """
    parts = spec.split(":")
    if len(parts) != 4 or parts[0] != "line" or not all(p.isascii() and p.isdigit() for p in parts[2:]):
        raise ConfigError(f"data.sources={spec!r} is not of the form line:TASK:N:SEED, e.g. line:shuffle:4:0")
    if parts[1] not in TASKS:
        raise ConfigError(f"data.sources={spec!r}: there is no task {parts[1]!r}; use one of {', '.join(TASKS)}")
    line, seed = Line(parts[1], int(parts[2])), int(parts[3])
    if not 2 <= line.num_items <= MAX_ITEMS:
        raise ConfigError(f"data.sources={spec!r} has {line.num_items} items; use 2 to {MAX_ITEMS}")
    return line, seed


def vocab_size(spec: str) -> int:
    return parse(spec)[0].vocab_size


def entropy(spec: str, num_tokens: int, context: bool) -> float:
    """Nats per token of a row, its start token left out: those of the prompt and of the choice of a response.

    Rows are whole, whatever `num_tokens`, and the start token tells nothing: with it as `context` it is the same.
    """
    line, _ = parse(spec)
    N, drawn = line.num_items, line.num_items + line.brings_item
    prompt = math.lgamma(2 * N + 1) - math.lgamma(2 * N - drawn + 1) + line.indexed * math.log(line.num_places)
    return (prompt + math.log(line.num_responses)) / line.row_len


def sampler(spec: str, split: str, length: int) -> Callable[[np.ndarray], np.ndarray]:
    """read(windows int64 [N]) -> int32 [N, length]: one row a window, the same whenever it is asked for.

    `split` (train, held_out) names independent streams; short lines are few, so that a row of one may be in the other.
    """
    line, seed = parse(spec)
    if length != line.row_len + 1:
        raise ConfigError(
            f"data.seq_len={length - 1} does not fit the rows of data.sources={spec!r}; use {line.row_len}"
        )
    stream, width = key("waiting line windows", *line, seed, split), _uniforms_per_row(line)

    def read(windows_N):
        counters_NU = windows_N.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64)[None]
        rows_NT = draw(line, uniform(stream, counters_NU))
        return np.concatenate([np.full((len(rows_NT), 1), line.start, np.int32), rows_NT], axis=1)

    return read


def draw(line: Line, uniform_NU: np.ndarray) -> np.ndarray:
    """int32 [N, row_len], without start tokens: a prompt and one of its valid responses for each row of uniforms."""
    items = line.num_items
    source_NS = np.argsort(uniform_NU[:, : 2 * items], axis=1, kind="stable")[:, : items + 1]
    place_N = (uniform_NU[:, 2 * items] * line.num_places).astype(np.int64)
    if line.task == "sort":
        response_NR = np.sort(source_NS[:, :items], axis=1)
    elif line.task == "shuffle":
        shuffled_NR = np.argsort(uniform_NU[:, 2 * items + 1 :], axis=1, kind="stable")
        response_NR = np.take_along_axis(source_NS, shuffled_NR, axis=1)
    else:
        response_NR = np.take_along_axis(source_NS, places(line)[place_N], axis=1)
    parts = [source_NS[:, : items + line.brings_item]]
    if line.indexed:
        parts.append(place_N[:, None])
    parts += [np.full((len(source_NS), 1), line.separator), response_NR]
    return np.concatenate(parts, axis=1).astype(np.int32)


def is_valid(line: Line, rows_NT: np.ndarray) -> np.ndarray:
    """bool [N]: whether the response in each row, which has no start token, is one that its prompt allows."""
    source_NS, response_NR = source(line, rows_NT), rows_NT[:, line.prompt_len :]
    items_NS = source_NS[:, : line.num_items]
    if line.task == "sort":
        return (response_NR == np.sort(items_NS, axis=1)).all(1)
    if line.task == "shuffle":
        return (np.sort(response_NR, axis=1) == np.sort(items_NS, axis=1)).all(1)
    valid_NP = (response_NR[:, None] == source_NS[:, places(line)]).all(2)
    if line.indexed:
        return np.take_along_axis(valid_NP, rows_NT[:, line.prompt_len - 2, None], axis=1)[:, 0]
    return valid_NP.any(1)


def source(line: Line, rows_NT: np.ndarray) -> np.ndarray:
    """[N, S]: the items of each row's prompt, and after them the one to bring in."""
    return rows_NT[:, : line.num_items + line.brings_item]


def places(line: Line) -> np.ndarray:
    """int [P, R]: for each place where the task may act, which token of `source` each token of the response is.

    One place for a task that acts nowhere. Of sort and shuffle, whose order depends on more, it says nothing.
    """
    items = np.arange(line.num_items)
    if line.edit == "replace":
        return np.where(np.eye(len(items), dtype=bool), len(items), items[None])
    if line.edit == "insert":
        return np.stack([np.insert(items, place, len(items)) for place in range(len(items) + 1)])
    if line.edit == "remove":
        return np.stack([np.delete(items, place) for place in items])
    return (items[::-1] if line.task == "reverse" else items)[None]


def _uniforms_per_row(line: Line) -> int:
    return 3 * line.num_items + 1  # an order of all 2N items, a place, an order of the N
