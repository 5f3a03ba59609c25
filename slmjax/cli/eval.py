"""slmjax eval RUN_DIR [--step=N] [--estimator=NAME] [--draws=128] [--sequences=N] [--batch=N] [--json]

The loss of a run on its held-out windows, from a checkpoint: the newest, also of a run that still trains, or that of
--step. Nothing is written. An autoregressive run's loss is exact. Of one that hides tokens it is an estimate, by name:

  l_uniform      masked or block diffusion: the bound that training reports, of --draws noise levels a window (default)
  bernoulli, antithetic         masked diffusion: the same bound by other draws
  left_to_right, confidence     the exact loss of a decoder with that order, T calls a window; block diffusion the first
  exact_bound, random_order     the bound, and the loss of filling in random order, by all 2^T masks of T <= 16 tokens

A bound says "at most": it compares with an exact loss only so.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment
from slmjax.cli import options
from slmjax.config import ConfigError


def define(flag_values: FlagValues) -> None:
    options.define_json(flag_values)
    absl_flags.DEFINE_string("estimator", None, "its name; the first that fits the run when not given",
                             flag_values=flag_values)  # fmt: skip
    for name, text in (
        ("step", "checkpoint; the newest when not given"),
        ("draws", "noise levels a window is scored at, of estimators that draw; 128 when not given"),
        ("sequences", "held-out windows; as many as in training when not given"),
        ("batch", "rows of a call; as in training when not given"),
    ):
        absl_flags.DEFINE_integer(name, None, text, flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1:
        raise ConfigError(f"eval takes one folder, of a run, not {len(args)}")
    environment.prepare(num_devices=1)
    from slmjax import evaluate, trained

    run = trained.load(args[0], flags.step)
    found = evaluate.held_out(run, flags.estimator, flags.draws, flags.sequences, flags.batch)
    if flags.json:
        options.print_json(found)
    else:
        print(_said(found))
    return 0


def _said(found: dict) -> str:
    if found["loss"] is None:
        raise ConfigError(f"{found['run']} at step {found['step']} has a loss that is no number; try another --step")
    se = f" ± {found['loss_se']:.4f}" if found["loss_se"] is not None else ""
    bits = f", {found['bits_per_byte']:.4f} bits per byte" if found["bits_per_byte"] is not None else ""
    how = found["estimator"]
    if found["kind"] == "bound":
        how += " (an upper bound" + (f", {found['num_draws']} draws a window)" if found["num_draws"] else ")")
    elif how != "exact":
        how += " (exact, of the decoder with that order)"
    floor = "" if found["entropy"] is None else f"; no model's is below {found['entropy']:.4f}, the source's entropy"
    return (
        f"{found['run']} at step {found['step']}, {found['objective']}: held-out loss, {how}\n"
        f"{found['loss']:.4f}{se} nats per token{bits}, over {found['num_tokens']:,} tokens of "
        f"{found['num_sequences']:,} windows{floor}"
    )
