#!/usr/bin/env bash
# Cut the grouped network of group.sh into its tree, and finetune the tree.
# Edit the flags here; flags on the command line override them:
#   PRESET=smoke TRAIN_DIR=runs/try_split ./split.sh --max_steps 20
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

PRESET=${PRESET:-paper} # of presets.sh, which says what it changes of the flags below
use_preset "$PRESET"
DATA_DIR=${DATA_DIR:-$HERE/data/$DATASET}
BASEMODEL=${BASEMODEL:-$HERE/runs/$PRESET/group}
TRAIN_DIR=${TRAIN_DIR:-$HERE/runs/$PRESET/split}
find_python

exec "$PYTHON" "$HERE/train.py" \
    --stage split \
    --preset "$PRESET" \
    --data_dir "$DATA_DIR" \
    --basemodel "$BASEMODEL" \
    --train_dir "$TRAIN_DIR" \
    --batch_size 90 \
    --max_steps 120000 \
    --initial_lr 0.1 \
    --lr_step_epoch 100,140 \
    --lr_decay 0.1 \
    --momentum 0.9 \
    --l2_weight 5e-4 \
    --display 100 \
    --val_interval 1000 \
    --checkpoint_interval 1000 \
    ${SPLIT_FLAGS[@]+"${SPLIT_FLAGS[@]}"} \
    --schedule_for "$TRAINING_IMAGES" "$@"
