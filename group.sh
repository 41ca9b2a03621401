#!/usr/bin/env bash
# Learn the groups: train a Wide ResNet together with the matrices that assign its classes and
# features to groups. Edit the flags here; flags on the command line override them:
#   PRESET=smoke TRAIN_DIR=runs/try ./group.sh --max_steps 20 --k 1.5
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
TRAIN_DIR=${TRAIN_DIR:-$HERE/runs/$PRESET/group}
find_python

exec "$PYTHON" "$HERE/train.py" \
    --stage group \
    --preset "$PRESET" \
    --data_dir "$DATA_DIR" \
    --train_dir "$TRAIN_DIR" \
    --num_residual_units 2 \
    --k 8 \
    --ngroups1 2 \
    --ngroups2 2 \
    --ngroups3 2 \
    --batch_size 90 \
    --max_steps 200000 \
    --initial_lr 0.1 \
    --lr_step_epoch 240,300 \
    --lr_decay 0.1 \
    --momentum 0.9 \
    --l2_weight 1e-4 \
    --gamma1 1.0 \
    --gamma2 1.0 \
    --gamma2_step_epoch '' \
    --gamma2_growth 10 \
    --gamma3 10.0 \
    --weighted_group_loss True \
    --group_lr_scale 1.0 \
    --group_start_epoch 0 \
    --group_equal_growth False \
    --dropout_keep_prob 0.5 \
    --bn_no_scale True \
    --display 100 \
    --val_interval 1000 \
    --checkpoint_interval 1000 \
    --group_summary_interval 1000 \
    ${GROUP_FLAGS[@]+"${GROUP_FLAGS[@]}"} \
    --schedule_for "$TRAINING_IMAGES" "$@"
