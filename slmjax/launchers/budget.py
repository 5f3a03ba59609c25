"""What a study has cost in device-hours, from its records, and the most that it may cost.

    OUT/<study>/budget.json     {"device_hours": 12.0}

The bound is in the study's folder, so that every process of it holds to it wherever it runs: launchers hand nothing
over and stop what runs once it is reached, and a pack that starts, or starts again, then ends at once.
"""

import math
from pathlib import Path

from slmjax import records


def set_bound(folder: Path, device_hours: float) -> None:
    """Raises ValueError: not a positive number."""
    if not (device_hours > 0 and math.isfinite(device_hours)):
        raise ValueError(f"device_hours={device_hours} must be a positive number")
    records.write_json(folder / "budget.json", {"device_hours": device_hours})


def exceeded(folder: Path) -> str | None:
    """The bound and what was spent, in one sentence, when it is reached; None before, or without a bound."""
    bound = (records.read_json(folder / "budget.json") or {}).get("device_hours")
    if bound is None:
        return None
    spent = device_hours(folder)
    if spent < bound:
        return None
    return f"{spent:.3g} device-hours are spent, of a budget of {bound:.3g}; raise it with --device_hours"


def device_hours(folder: Path) -> float:
    """What all attempts of all runs in a study folder took, what was lost to kills included, up to their last line."""
    files = (path for said in folder.glob("*/status.json") for path in records.attempt_files(said.parent))
    return sum(records.device_hours(records.read_landmarks(path)) for path in files)
