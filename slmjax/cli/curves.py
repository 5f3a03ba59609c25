"""slmjax curves FILE.csv [--model=NAME] [--test=SCHEDULE,...] [--decay=SHAPE --steps=24000 --peak=3e-4] [--json=FILE]

Fits the Multi-Power Law to whole loss curves: what a run loses under any learning-rate schedule, WSD included. The
table has a row per logged step: schedule, step, lr, loss, and model when it holds several (--columns maps other names).
--test leaves schedules out of the fit and says how well it predicts them: a better fit is not a better forecast.
--decay asks which share of a run of --steps steps its decay should take, and how sure that is.
Few curves tell weakly how a change of the rate sets in: --response=shrunk draws it towards the published one, as far as
curves left out are predicted better, and --response=published takes that.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import show
from slmjax.scaling.curves import curve_tables, decay_share, schedule_curves


def define(flag_values: FlagValues) -> None:
    def string(name, default, text):
        absl_flags.DEFINE_string(name, default, text, flag_values=flag_values)

    def integer(name, default, text):
        absl_flags.DEFINE_integer(name, default, text, flag_values=flag_values)

    string("model", None, "which of the table's models")
    absl_flags.DEFINE_list("columns", None, "step=header,lr=header,...", flag_values=flag_values)
    absl_flags.DEFINE_list("test", [], "schedules to leave out of the fit and predict", flag_values=flag_values)
    integer("warmup", 0, "steps of linear warm-up before the first logged rate")
    string("between", "linear", f"the rate between logged steps: {', '.join(curve_tables.BETWEEN)}")
    string("response", "fitted", f"how a change of rate sets in: {', '.join(schedule_curves.RESPONSES)}")
    integer("early_steps", None, "end the optimisation after so many steps")
    integer("bootstrap", 100, "resamples for the intervals")
    integer("seed", 0, "of the resamples")
    string("decay", None, f"compare decay shares of this shape: {', '.join(decay_share.SHAPES)}")
    integer("steps", None, "of the run whose decay is asked for")
    absl_flags.DEFINE_float("peak", None, "its peak rate; that of the curves when not given", flag_values=flag_values)
    string("json", None, "file for the fit")


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"curves takes one CSV of loss curves, not {len(args)}")
    if (flags.decay is None) != (flags.steps is None):
        raise ConfigError("--decay and --steps go together: --decay=1-sqrt --steps=24000")
    used, held_out = _split(_curves(flags, args[0]), flags.test)
    fitted = schedule_curves.fit_curves(
        used,
        num_bootstrap=flags.bootstrap,
        seed=flags.seed,
        early_steps=flags.early_steps,
        response=flags.response,
    )
    print(fitted.table())
    alone = schedule_curves.leave_one_out(used, fitted)
    if alone:
        print(_scores("each predicted by the others", alone))
    if held_out:
        print(_scores("left out of the fit", fitted.scores(held_out)))
    if flags.decay:
        peak = flags.peak or max(float(curve.lr_T.max()) for curve in used)
        made = decay_share.best_decay(fitted, flags.steps, peak, flags.decay, warmup_steps=flags.warmup)
        print(made.table())
    if flags.json:
        options.write_text(flags.json, fitted.to_json())
        print(f"fit: {flags.json}")
    return 0


def _curves(flags: FlagValues, path: str) -> list[curve_tables.Curve]:
    """The curves of one model."""
    curves = curve_tables.load_curves(path, options.column_map(flags.columns), flags.warmup, flags.between)
    models = sorted({curve.model for curve in curves})
    if flags.model is None and len(models) > 1:
        raise ConfigError(f"{path} holds the models {', '.join(models)}; say --model={models[0]}")
    if flags.model is not None and flags.model not in models:
        raise ConfigError(f"--model={flags.model}: {path} holds {', '.join(models)}")
    return [curve for curve in curves if flags.model in (None, curve.model)]


def _split(curves, test: list[str]):
    names = [curve.name for curve in curves]
    for name in test:
        if name not in names:
            raise ConfigError(f"--test={name}: the schedules are {', '.join(names)}")
    return [c for c in curves if c.name not in test], [c for c in curves if c.name in test]


def _scores(what: str, scores: dict[str, schedule_curves.Score]) -> str:
    rows = [(what, "R2", "mean |error|", "rms error", "mean relative", "worst relative")]
    rows += [(name, f"{s[0]:.4f}", *(f"{value:.5f}" for value in s[1:])) for name, s in scores.items()]
    return "\n".join(show.columns(rows)) + "\n"
