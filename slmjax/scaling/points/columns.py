"""Which column of a table is N, D, the loss, ...: the column map, its products and units.

A map takes names to expressions over the table's headers. An expression is a header, or a product of headers and
numbers: `params_m*1e6`, `step*batch_size*2048`. A header that is itself the whole text or a whole factor is always the
column of that name, whatever signs it holds. A loss and its error may name a unit: `loss=bpb*3.6:bits`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from slmjax.scaling.points.names import did_you_mean, listing, number

# Products of columns; planned: the tokens the run was to see.
NUMBERS = ("N", "D", "loss", "C", "se", "step", "planned", "epochs")
TEXTS = ("family", "run_id", "status", "tokenizer", "corpus", "loss_kind")  # cells taken as they are
LONG = ("metric", "value")  # they say that the table is long, one row per run, step and metric: `tables.reshape`
# Headers that say what they hold when no map is given; any other name needs one.
KNOWN_HEADERS = {"params": "N", "tokens": "D", "flops": "C", "loss_se": "se", "unique_tokens": "U"}
FILE = "file"  # a column every table has: where it was read, so that run_id=file makes each file one run
SYNTAX = "--columns=N=col,D=col,loss=col[,C=col,se=col,family=col,run_id=col]"


class Unit(NamedTuple):
    """What a loss column holds: a factor turns it into `name`."""

    factor: float
    name: str
    lowest: float = 0.0


UNITS = {
    "nats": Unit(1.0, "nats per token"),
    "bits": Unit(math.log(2), "nats per token"),
    "bits_per_byte": Unit(1.0, "bits per byte"),
    # Tao et al. 2407.13623, section 3: loss minus the loss of a unigram model of the same vocabulary, below zero.
    "unigram_normalized": Unit(1.0, "nats per token above a unigram model", -math.inf),
}


class Product(NamedTuple):
    """A product of columns and a number."""

    headers: tuple[str, ...]
    factor: float

    @property
    def text(self) -> str:
        return " * ".join(self.headers)


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """A map resolved against the headers of one table.

    inputs: the names in `products` that a law of its own reads, such as E or V. unit: of loss and se.
    """

    products: Mapping[str, Product]
    texts: Mapping[str, str]
    inputs: tuple[str, ...]
    unit: Unit

    def headers(self, *names: str) -> set[str]:
        """Every column that these names read."""
        found = {h for name in names if name in self.products for h in self.products[name].headers}
        return found | {self.texts[name] for name in names if name in self.texts}


def resolve(
    where: str,
    headers: Sequence[str],
    columns: Mapping[str, str] | None,
    by_layout: Mapping[str, str],
    reads: Sequence[str],
) -> ColumnMap:
    """The user's map, or, without one, the headers that say what they hold.

    Args:
      where: the table, for errors.
      by_layout: names that the table's layout gives, unless the map does.
      reads: what the law at hand reads, N and D for most: these and the loss must be there. C may follow from N and D.
    Raises:
      ValueError: a name, column or unit that does not exist, with the nearest that does; N, D or loss missing.
    """
    if columns is None:
        columns = _by_headers(where, headers, reads)
    columns = {**by_layout, **columns}
    require_names(columns)
    needed = [*reads, "loss"]
    if "C" in needed and "C" not in columns and {"N", "D"} <= set(columns):
        needed.remove("C")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{where}: which column is {' and '.join(missing)}? It has {listing(headers)}; say {SYNTAX}")
    texts, products, units = {}, {}, {}
    for name, text in columns.items():
        if name in TEXTS:
            texts[name] = _header(where, text, headers)
        elif name not in LONG:
            products[name], units[name] = _product(where, name, text, headers)
    if "planned" in products and "D" not in products:
        raise ValueError("--columns: planned tokens are compared with D, and no column is D; map D=col")
    if "se" in units and units["se"] != units["loss"]:
        raise ValueError(
            f"--columns: loss={columns['loss']} and se={columns['se']} have different units; give se the unit of loss"
        )
    inputs = tuple(name for name in products if name not in NUMBERS)
    return ColumnMap(products, texts, inputs, UNITS[units["loss"]])


def _by_headers(where, headers, reads):
    """The map of headers that say what they hold. A step without its run says nothing: each row is a run."""
    found: dict[str, str] = {}
    for header in headers:
        name = KNOWN_HEADERS.get(header, header)
        if name in found:
            raise ValueError(f"{where}: {found[name]!r} and {header!r} may both be {name}; say which: {SYNTAX}")
        if name in (*NUMBERS, *TEXTS, *reads, *KNOWN_HEADERS.values()) and (name != "step" or "run_id" in headers):
            found[name] = header
    return found


def require_names(columns: Collection[str]) -> None:
    """Raises ValueError for a name that is neither ours nor one a law could read."""
    known = (*NUMBERS, *TEXTS, *LONG)
    for name in columns:
        # A law's own input may be called anything but nearly what we call another thing: 'Loss', 'tokeniser'.
        slip = did_you_mean(name, known, 0.8) if len(name) > 1 else ""
        if name not in known and (slip or not name.isidentifier()):
            raise ValueError(
                f"columns: {name!r} is not one of {', '.join(known)}, nor an input that a law reads, such as E or V"
                f"{slip}; write {SYNTAX}"
            )


def factors(text: str) -> list[str]:
    """What a product multiplies, without its unit; for a reader that does not know the headers yet."""
    return [part.strip() for part in split_unit(text)[0].split("*")]


def split_unit(text: str) -> tuple[str, str | None]:
    head, _, unit = text.rpartition(":")
    return (head.strip(), unit) if unit in UNITS and head else (text, None)


def _product(where, name, text, headers):
    """The Product that an expression means, and its unit's name."""
    if text in headers:
        return Product((text,), 1.0), "nats"
    bare, unit = split_unit(text)
    if unit and name not in ("loss", "se"):
        raise ValueError(f"--columns={name}={text}: only loss and se have units; scale others as {name}={bare}*1e6")
    if bare in headers:
        return Product((bare,), 1.0), unit or "nats"
    parts = [part.strip() for part in bare.split("*")]
    numbers = [number(part) for part in parts if part not in headers]
    found = tuple(part for part in parts if part in headers)
    for part in parts:
        if part not in headers and number(part) is None:
            _header(where, part, headers)
    if not all(math.isfinite(x) and x > 0 for x in numbers):
        raise ValueError(f"--columns={name}={text}: {bare} is scaled by a number that is not positive and finite")
    if not found:
        raise ValueError(f"--columns={name}={text}: names no column; write {name}=column or {name}=column*number")
    return Product(found, math.prod(numbers)), unit or "nats"


def _header(where, text, headers):
    if text in headers or text == FILE:
        return text
    head, colon, unit = text.rpartition(":")
    if colon and head in headers:
        raise ValueError(f"{where}: {unit!r} in {text!r} is no unit of loss; units are {', '.join(UNITS)}")
    raise ValueError(f"{where}: no column {text!r}{did_you_mean(text, headers)}; it has {listing(headers)}")
