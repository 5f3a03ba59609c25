"""What an error says about a name that does not exist, and what counts as a number in a cell."""

import difflib
from collections.abc import Collection
from typing import Any


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'params'?`, or nothing when no known name is near."""
    folded = {str(k).casefold(): str(k) for k in known}
    near = difflib.get_close_matches(name.casefold(), folded, 1, cutoff)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def listing(known: Collection[str], shown: int = 30) -> str:
    """The names one after another, cut when there are many: a tracker's export has hundreds of columns."""
    more = len(known) - shown
    return ", ".join(map(str, list(known)[:shown])) + (f" and {more} more" if more > 0 else "")


def number(cell: Any) -> float | None:
    """The cell as a number, NaN and infinities among them; None for text, truth values and empty cells."""
    if isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())
