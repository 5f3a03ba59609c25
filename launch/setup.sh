# Makes .venv in this checkout with slmjax in it, and activates it; the second time it only activates it.
#
#   source launch/setup.sh tpu          TPU
#   source launch/setup.sh cuda gcs     NVIDIA GPUs, and gs:// as the place of a study's copy
#   source launch/setup.sh              CPU
#
# Every machine of a study should have the same versions: launch/constraints.txt fixes them. To move to newer ones,
# change it and try it on one machine. uv is used where there is one (seconds, where pip takes minutes), and installed
# where there is no Python of 3.11 or newer, as on most TPU images. SLMJAX_PYTHON names another Python.

slmjax_extras="$(IFS=,; echo "$*")"
slmjax_stamp=".venv/.installed-$(cat pyproject.toml launch/constraints.txt | cksum | tr -d ' ')-${slmjax_extras:-cpu}"

slmjax_python() {
    for candidate in "${SLMJAX_PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" > /dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
}

slmjax_install() {
    local python what=".${slmjax_extras:+[$slmjax_extras]}"
    python="$(slmjax_python)"
    if [ -z "$python" ] && ! command -v uv > /dev/null; then
        python3 -m pip install --quiet --user uv && export PATH="$HOME/.local/bin:$PATH"
    fi
    if command -v uv > /dev/null; then
        uv venv --quiet --allow-existing --python "${python:-3.12}" .venv &&
            uv pip install --quiet --python .venv/bin/python --constraint launch/constraints.txt -e "$what" || return 1
    else
        "${python:-python3}" -m venv .venv &&
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt \
                -e "$what" || return 1
    fi
    touch "$slmjax_stamp"
}

if [ -e "$slmjax_stamp" ] || slmjax_install; then
    source .venv/bin/activate
else
    echo "launch/setup.sh: slmjax was not installed, see above" >&2
    false
fi
