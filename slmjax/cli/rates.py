"""slmjax rates SWEEP.csv [--columns=N=..,D=..,lr=..,batch=..,loss=..] [--params=1e9 --tokens=1e11] [--json=FILE]
   slmjax rates --law=NAME --params=1e9 --tokens=1e11

Learning rate and batch size for a model: from a sweep of your own, or from a published law. A sweep has rows of
parameters, tokens, learning rate, batch and loss; each (N, D) is one cell, whose best rate and batch --reading finds.
Without --law and without a sweep, the published laws are listed.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import show
from slmjax.scaling.rates import hyper_fit, hyper_laws

INPUTS = {"params": "N", "tokens": "D", "flops": "C", "loss": "L", "experts": "E"}


def define(flag_values: FlagValues) -> None:
    def string(name, default, text):
        absl_flags.DEFINE_string(name, default, text, flag_values=flag_values)

    def number(name, text):
        absl_flags.DEFINE_float(name, None, text, flag_values=flag_values)

    string("law", None, f"a published law: {', '.join(hyper_laws.names())}, or a dotted module that defines `law`")
    absl_flags.DEFINE_list("columns", None, "of the sweep: N=header,...", flag_values=flag_values)
    absl_flags.DEFINE_float("batch_unit", 1.0, "tokens in one unit of the batch column", flag_values=flag_values)
    string("reading", "argmin", f"how a cell's best setting is read: {', '.join(hyper_fit.READINGS)}")
    absl_flags.DEFINE_integer("bootstrap", 1000, "resamples of cells for the intervals", flag_values=flag_values)
    absl_flags.DEFINE_integer("seed", 0, "of the resamples", flag_values=flag_values)
    for name, letter in INPUTS.items():
        number(name, f"{letter} of the model asked about")
    string("json", None, "file for the fit of a sweep")


def run(flags: FlagValues, args: list[str]) -> int:
    given = {letter: getattr(flags, name) for name, letter in INPUTS.items() if getattr(flags, name) is not None}
    if flags.law:
        if args:
            raise ConfigError(f"--law={flags.law} is a published law and reads no sweep; leave out one of the two")
        print(_recommendation(hyper_laws.load_hyper_law(flags.law), given), end="")
        return 0
    if not args:
        print(_published(), end="")
        return 0
    if len(args) > 1:
        raise ConfigError(f"rates takes one sweep, not {len(args)}")
    sweep = hyper_fit.load_sweep(args[0], options.column_map(flags.columns), flags.batch_unit)
    fitted = hyper_fit.fit_sweep(sweep, flags.reading, flags.bootstrap, flags.seed)
    print(fitted.table())
    if given:
        if set(given) != {"N", "D"}:
            raise ConfigError("a sweep's law asks for --params and --tokens")
        print(fitted.recommend(**given).table())
    if flags.json:
        options.write_text(flags.json, fitted.to_json())
        print(f"fit: {flags.json}")
    return 0


def _recommendation(law: hyper_laws.HyperLaw, given: dict[str, float]) -> str:
    if law.inputs == ("tokens_per_parameter",) and set(given) == {"N", "D"}:
        given = {"tokens_per_parameter": given["D"] / given["N"]}
    rows = [(f"{law.name}: {law.source}", "")]
    rows += [
        (f"{name} = {law.outputs[name].formula}", f"{value:.4g} {law.outputs[name].unit}".rstrip())
        for name, value in law.recommend(**given).items()
    ]
    far = [
        f"{name} lies {show.times(by)} outside the source's runs" for name, by in law.reach(**given).items() if by > 1
    ]
    return "\n".join([*show.columns(rows), f"holds for: {law.setting}", *far]) + "\n"


def _published() -> str:
    laws = [hyper_laws.load_hyper_law(name) for name in hyper_laws.names()]
    lines = [
        f"  {law.name:{max(len(law.name) for law in laws)}}  {name} = {power.formula}"
        for law in laws
        for name, power in law.outputs.items()
    ]
    return "\n".join(lines) + "\n"
