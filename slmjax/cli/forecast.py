"""slmjax forecast FIT.json --flops=1e21 ...  |  --params=1e9 --tokens=2e10  |  --loss=2.1
slmjax forecast FIT.json --flops=1e21 --suggest=6 --budget=1e20 [--sizes=1e8,3e8] [--schedule=wsd]

The compute-optimal parameters and tokens at a budget, the loss of a given model, or the budget that a loss takes, with
intervals and the back-test that stands behind them. Several budgets may be given: --flops=1e20,1e21. --trade adds what
smaller and larger models than the optimum cost. --suggest=K names the next K runs, for at most --budget FLOPs, that
shrink the interval of the loss most, and says when more runs stop paying.
"""

import json
import math
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import forecast, planner
from slmjax.scaling.fit import Fit


def define(flag_values: FlagValues) -> None:
    def number(name, text, default=None):
        absl_flags.DEFINE_float(name, default, text, flag_values=flag_values)

    absl_flags.DEFINE_list("flops", None, "training budgets to find the best model for", flag_values=flag_values)
    number("params", "N of a model")
    number("tokens", "D it is trained on")
    number("loss", "a loss to find the budget for")
    absl_flags.DEFINE_list("inputs", [], "what else the law reads, with --params: E=64,...", flag_values=flag_values)
    absl_flags.DEFINE_string("cost", "6ND", f"how N and D spend FLOPs: {', '.join(forecast.COSTS)}",
                             flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_boolean("trade", False, "what other sizes than the optimum cost", flag_values=flag_values)
    absl_flags.DEFINE_integer("suggest", None, "propose so many next runs", flag_values=flag_values)
    number("budget", "FLOPs for the proposed runs together")
    absl_flags.DEFINE_list("sizes", None, "N that the proposed runs may have", flag_values=flag_values)
    absl_flags.DEFINE_string("schedule", "single", f"of the proposed runs: {', '.join(planner.SCHEDULES)} (branches of "
                             "one size share a trunk)", flag_values=flag_values)  # fmt: skip
    number("decay_share", "of a branch's tokens, with --schedule=wsd", planner.DECAY_SHARE)
    options.define_json(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"forecast takes one fit (slmjax fit --json=FILE writes it), not {len(args)}")
    _require_one_question(flags)
    fitted = _read(Path(args[0]))
    if flags.suggest is not None:
        return _suggest(fitted, flags)
    if flags.params is not None:
        made = [forecast.loss(fitted, flags.params, flags.tokens, flags.cost, **_inputs(flags.inputs))]
    elif flags.loss is not None:
        made = [forecast.budget(fitted, flags.loss, flags.cost)]
    else:
        made = [forecast.optimum(fitted, _number("flops", budget), flags.cost) for budget in flags.flops]
    trades = [_trades(fitted, each, flags.cost) if flags.trade else None for each in made]
    if flags.json:
        body = [json.loads(each.to_json()) for each in made]
        extra = [{} if t is None else {"trades": [_finite(trade._asdict()) for trade in t]} for t in trades]
        options.print_json([one | more for one, more in zip(body, extra, strict=True)])
    else:
        tables = [
            each.table() + ("" if t is None else "\n" + forecast.trade_table(t))
            for each, t in zip(made, trades, strict=True)
        ]
        print("\n".join(tables), end="")
    return 0


def _require_one_question(flags):
    by_model = flags.params is not None or flags.tokens is not None
    asked = [by_model, flags.flops is not None, flags.loss is not None]
    if sum(asked) != 1 or (by_model and None in (flags.params, flags.tokens)):
        raise ConfigError("forecast needs one of --flops, --loss, or both --params and --tokens")
    if (flags.suggest is None) != (flags.budget is None):
        raise ConfigError("--suggest=K and --budget=FLOPs go together: how many runs, and for how much at most")
    if flags.suggest is not None and (flags.flops is None or len(flags.flops) != 1):
        raise ConfigError("--suggest needs one --flops: the budget whose forecast is to be sharpened")
    if flags.suggest is None and flags.sizes is not None:
        raise ConfigError("--sizes belongs to --suggest")
    if flags.trade and by_model:
        raise ConfigError("--trade starts from an optimum: give --flops or --loss")


def _suggest(fitted: Fit, flags: FlagValues) -> int:
    flops, candidates = _number("flops", flags.flops[0]), None
    if flags.sizes is not None:
        candidates = planner.grid(fitted, flops, flags.budget, flags.cost, [_number("sizes", N) for N in flags.sizes])
    plan = planner.suggest(
        fitted, flops, flags.suggest, flags.budget, candidates, flags.cost, flags.schedule, flags.decay_share
    )
    if flags.json:
        options.print_json(plan.to_dict())
    else:
        print(plan.table(), end="")
    return 0


def _trades(fitted, made, cost):
    flops = made.target["flops"] if "flops" in made.target else made["flops"].value
    return forecast.trades(fitted, flops, forecast.make_cost(fitted, cost))


def _inputs(entries: list[str]) -> dict[str, float]:
    bad = [entry for entry in entries if "=" not in entry]
    if bad:
        raise ConfigError(f"--inputs={bad[0]!r} must read name=value, e.g. --inputs=E=64")
    return {name: _number("inputs", value) for name, value in (entry.split("=", 1) for entry in entries)}


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--{flag}={text} must be a positive number, e.g. --{flag}=1e21")
    return value


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _read(path: Path) -> Fit:
    try:
        return Fit.from_json(path.read_text())
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a fit; slmjax fit SOURCE --json={path.stem}.json writes one") from None
