#!/usr/bin/env bash
# Makes .venv, then runs the linters and the tests. Words go to pytest: ./test.sh -k resnet
[ -n "${BASH_VERSION:-}" ] || {
    echo "${0##*/}: error: use bash: bash $0" >&2
    # shellcheck disable=SC2317 # to exit would close the terminal of a zsh that was told to read it
    return 2 2>/dev/null || exit 2
}
set -euo pipefail
# The checkout: where this file is, or where its copy, which batch systems run, was submitted.
SCRIPT=$(command readlink -f "${BASH_SOURCE[0]-}" 2>/dev/null || echo "$0") # old macOS has no -f
for HERE in "$(command dirname "$SCRIPT")" "${SLURM_SUBMIT_DIR-}" "${PBS_O_WORKDIR-}" \
    "${SGE_O_WORKDIR-}" "${LSB_SUBCWD-}" "${LS_SUBCWD-}" "$PWD" ''; do
    if [ -f "$HERE/presets.sh" ] && [ -f "$HERE/split.sh" ]; then break; fi
done
[ -n "$HERE" ] || { echo "${0##*/}: error: no checkout: cd into it and submit there" >&2; exit 2; }
# shellcheck source=presets.sh
source "$HERE/presets.sh"

bash "$HERE/quickstart.sh" --setup "$HERE/requirements.txt" "$HERE/tests/requirements.txt"
PYTHON=$HERE/.venv/bin/python

cd "$HERE"
"$PYTHON" -m ruff check --config .ci/ruff.toml .
"$PYTHON" -m ruff format --config .ci/ruff.toml --check .
.venv/bin/shellcheck -x ./*.sh experiments/run.sh .ci/run

# Three processes keep two cores busy: some tests wait for workers that are lost. Four are no faster.
status=0
"$PYTHON" -m pytest -q --durations=10 -n 3 --dist loadfile --no-loadscope-reorder "$@" || status=$?
[ "$status" -ne 5 ] || fail "no test was chosen by: $*" 5
exit "$status"
