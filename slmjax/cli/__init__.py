"""The console command `slmjax VERB ...`: finds the verb, runs it, and turns what happens into an exit code.

Each verb is a module of this package with a docstring (its help), `define(flag_values)` and `run(flags, args)`. They
parse, call and print; what they call lives elsewhere. Nothing here imports JAX, and verbs import what they need when
they run, so that planning and fitting start in a fraction of a second.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from absl import flags as absl_flags

from slmjax.cli import options
from slmjax.config import ConfigError

DONE, CHECK_FAILED, USAGE, PREEMPTED, DIVERGED = range(5)

VERBS = {
    "train": "one run; relaunching resumes it, and a finished run is left alone",
    "upcycle": "a run with experts that begins from a dense run's checkpoint",
    "eval": "the held-out loss of a run, by a named estimator",
    "sample": "text or tokens from a run, by a named decoder",
    "study": "plan, run, watch and report a study of many runs",
    "fit": "a scaling law from study folders, tables, or TensorBoard event files",
    "forecast": "the best model and the loss at a budget, from a fit; which runs to add",
    "curves": "whole loss curves under any schedule, and the best decay, from a table of them",
    "rates": "learning rate and batch size, from a sweep or a published law",
    "bench": "how fast a config trains on this machine, against plain JAX",
    "check": "whether activations keep their size over width and depth",
    "tokenize": "train a tokenizer on files",
    "data": "what a config trains on; or text into token shards",
}
HIDDEN = ("pack",)  # what launchers start

HELP = """slmjax: scaling studies of small language models

usage: slmjax VERB [flags]

{verbs}

slmjax VERB --help says more. An experiment is a Python file, or the name of one that comes along: {experiments}.
Exit codes: 0 done, 1 a check or a run failed, 2 bad usage or config, 3 stopped with everything saved, 4 diverged."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `slmjax ARGV...` and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return DONE if argv else USAGE
    try:
        return run(_module(argv[0]), argv[1:])
    except BrokenPipeError:  # `slmjax study status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = _usage_error(error)
        if line is None:
            raise
        print(f"slmjax {argv[0]}: {line}", file=sys.stderr)
        return USAGE


def run(verb: ModuleType, argv: list[str]) -> int:
    """Parses a verb's flags and runs it; prints its help when asked to."""
    flag_values = absl_flags.FlagValues()
    flag_values.set_gnu_getopt(True)  # flags and other arguments in any order
    verb.define(flag_values)
    if any(arg in ("-h", "--help") for arg in argv):
        print(options.help_text(verb, flag_values))
        return DONE
    args = options.parse(flag_values, argv)
    return verb.run(flag_values, args)


def _module(verb: str) -> ModuleType:
    if verb not in VERBS and verb not in HIDDEN:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        raise ConfigError(f"there is no verb {verb!r}; {hint}")
    return importlib.import_module(f"slmjax.cli.{verb}")


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {summary}" for verb, summary in VERBS.items())
    return HELP.format(verbs=verbs, experiments=", ".join(options.known_experiments()))


def _usage_error(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for all others, whose traceback is wanted."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return f"{error.filename}: {error.strerror}" if error.filename else None
    deliberate = isinstance(error, ConfigError) or (isinstance(error, ValueError) and _raised_here(error))
    if isinstance(error, absl_flags.Error) or deliberate:
        return " ".join(str(error).split())
    return None


def _raised_here(error: Exception) -> bool:
    """Whether slmjax's own code refused a value, as against a library that was handed something it cannot take."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("slmjax.")
