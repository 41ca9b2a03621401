#!/usr/bin/env bash
# Evaluate a checkpoint on the 10,000 test images: split.sh's tree, or another with --checkpoint.
# Edit the flags here; flags on the command line override them.
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

PRESET=${PRESET:-paper}
use_preset "$PRESET"
DATA_DIR=${DATA_DIR:-$HERE/data/$DATASET}
CHECKPOINT=${CHECKPOINT:-$HERE/runs/$PRESET/split}
find_python

exec "$PYTHON" "$HERE/eval.py" \
    --data_dir "$DATA_DIR" \
    --checkpoint "$CHECKPOINT" \
    --split test \
    --batch_size 100 \
    "$@"
