"""slmjax forecast FIT.json --flops=1e21 ...  |  --params=1e9 --tokens=2e10

The compute-optimal parameters and tokens at a budget, or the loss of a given model, with intervals. Several budgets may
be given: --flops=1e20,1e21.
"""

import json
import math
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import forecast
from slmjax.scaling.fit import Fit


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_list("flops", None, "training budgets to find the best model for", flag_values=flag_values)
    absl_flags.DEFINE_float("params", None, "N of a model", flag_values=flag_values)
    absl_flags.DEFINE_float("tokens", None, "D it is trained on", flag_values=flag_values)
    absl_flags.DEFINE_string("cost", "6ND", f"how N and D spend FLOPs: {', '.join(forecast.COSTS)}",
                             flag_values=flag_values)  # fmt: skip
    options.define_json(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"forecast takes one fit (slmjax fit --json=FILE writes it), not {len(args)}")
    by_model = flags.params is not None or flags.tokens is not None
    if (flags.flops is not None) == by_model or (by_model and None in (flags.params, flags.tokens)):
        raise ConfigError("forecast needs either --flops, or both --params and --tokens")
    fitted = _read(Path(args[0]))
    if by_model:
        made = [forecast.loss(fitted, flags.params, flags.tokens, flags.cost)]
    else:
        made = [forecast.optimum(fitted, _number(budget), flags.cost) for budget in flags.flops]
    if flags.json:
        options.print_json([json.loads(each.to_json()) for each in made])
    else:
        print("\n".join(each.table() for each in made), end="")
    return 0


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--flops={text} must be a positive number, e.g. --flops=1e21")
    return value


def _read(path: Path) -> Fit:
    try:
        return Fit.from_json(path.read_text())
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a fit; slmjax fit SOURCE --json={path.stem}.json writes one") from None
