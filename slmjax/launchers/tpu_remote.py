"""What is run on the workers of a TPU, as text: begin a pack, ask for it, stop it. Each may be sent again at any time.

On a worker, in ~/slmjax/NAME: `run.sh`, its `log`, a `lock` that it holds while it lives, the `pid` that a signal is
for, and the `code` that it ended with. It does not need the connection that began it.
"""

import re
import shlex

from slmjax.launchers.tpu_machine import PREEMPTED, SET_UP_FAILED

IDLE_S = 900  # after a pack's end the machine asks to be deleted itself, should no launcher have done it
END = "SLMJAX_END_OF_RUN_SH"
REPLY = re.compile(r"^slmjax (absent|running|ended (\d+))\s*$", re.MULTILINE)


def folder(name: str) -> str:
    return f'"$HOME/slmjax/{name}"'


def start(name: str, setup: str, pack: str, delete: list[str]) -> str:
    """Begins the pack on every worker that has not begun it.

    setup: lines that end with `slmjax` on the PATH. pack: the pack's file, for `slmjax pack`. delete: the command that
    deletes the resource.
    """
    return f"""mkdir -p {folder(name)} && cd {folder(name)} || exit 1
cat > run.part <<'{END}'
{_run(setup, pack, delete)}{END}
mv run.part run.sh
nohup setsid flock -n -o lock bash run.sh >> log 2>&1 < /dev/null &
echo slmjax started"""


def _run(setup: str, pack: str, delete: list[str]) -> str:
    return f"""rm -f code
code={SET_UP_FAILED}
finish() {{ echo "$code" > code.part; mv code.part code; }}
trap finish EXIT
echo $$ > pid
set -e
# --- set-up
{setup.strip()}
command -v slmjax
# --- the pack
set +e
code={PREEMPTED}
slmjax pack {shlex.quote(pack)} --distributed &
echo $! > pid
wait $!
code=$?
if [ "$code" -ne {PREEMPTED} ]; then
    (trap - EXIT; sleep {IDLE_S}; if [ -e code ]; then {shlex.join(delete)}; fi) &
fi
"""


def probe(name: str) -> str:
    """Prints one line for each worker, see `said`."""
    return f"""cd {folder(name)} 2>/dev/null || {{ echo slmjax absent; exit 0; }}
if [ -e code ]; then echo "slmjax ended $(cat code)"
elif flock -n lock true; then echo slmjax absent
else echo slmjax running; fi"""


def said(output: str) -> tuple[str, int]:
    """What all workers together are doing, and their exit code if they have ended; `no answer` without a line.

    A worker that has not begun comes first: beginning again is nothing to the others.
    """
    lines = [(found[1].split()[0], int(found[2] or 0)) for found in REPLY.finditer(output)]
    states, codes = {state for state, _ in lines}, {code for state, code in lines if state == "ended"}
    if not lines:
        return "no answer", 0
    for state in ("absent", "running"):
        if state in states:
            return state, 0
    if SET_UP_FAILED in codes:
        return "ended", SET_UP_FAILED
    return "ended", min(codes - {0}, default=0)


def stop(name: str) -> str:
    """Asks the pack to save and stop, once: a second signal would end it without saving."""
    return f"""cd {folder(name)} 2>/dev/null || exit 0
mkdir stopped 2>/dev/null && kill -TERM "$(cat pid)"
echo slmjax stopping"""


def show(name: str, follow: bool) -> str:
    return f"tail -n +1 {'-F ' * follow}{folder(name)}/log"
