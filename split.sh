#!/usr/bin/env bash
# Cut the grouped network of group.sh into its tree, and finetune the tree.
# Edit the flags here; flags on the command line override them:
#   PRESET=smoke TRAIN_DIR=runs/try_split ./split.sh --max_steps 20
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: use bash: bash $0" >&2; exit 2; }
set -euo pipefail
# The checkout: where this file is, or where its copy, which batch systems run, was submitted.
SCRIPT=$(command readlink -f "${BASH_SOURCE[0]-}" 2>/dev/null || echo "$0") # old macOS has no -f
for HERE in "$(command dirname "$SCRIPT")" "${SLURM_SUBMIT_DIR-}" "${PBS_O_WORKDIR-}" \
    "${SGE_O_WORKDIR-}" "${LSB_SUBCWD-}" "${LS_SUBCWD-}" "$PWD" ''; do
    if [ -f "$HERE/environment.sh" ] && [ -f "$HERE/split.sh" ]; then break; fi
done
[ -n "$HERE" ] || { echo "${0##*/}: error: no checkout: cd into it and submit there" >&2; exit 2; }
# shellcheck source=environment.sh
source "$HERE/environment.sh"

PRESET=${PRESET:-paper} # paper: published schedule; cpu: two cores, an hour; smoke: minutes
DATA_DIR=${DATA_DIR:-$HERE/data/cifar100}
BASEMODEL=${BASEMODEL:-$HERE/runs/$PRESET/group}
TRAIN_DIR=${TRAIN_DIR:-$HERE/runs/$PRESET/split}
find_python

case $PRESET in
paper) BATCH_SIZE=90 STEPS=120000 INITIAL_LR=0.1 LR_STEP_EPOCH=100,140 LR_DECAY=0.1 INTERVAL=1000 ;;
cpu) BATCH_SIZE=90 STEPS=13000 INITIAL_LR=0.1 LR_STEP_EPOCH=10,16,20,23,25 LR_DECAY=0.3 INTERVAL=500 ;;
smoke) BATCH_SIZE=60 STEPS=1500 INITIAL_LR=0.05 LR_STEP_EPOCH=1.3 LR_DECAY=0.1 INTERVAL=500 ;;
*) fail "PRESET is paper, cpu or smoke, not '$PRESET'" ;;
esac

exec "$PYTHON" "$HERE/train.py" \
    --stage split \
    --preset "$PRESET" \
    --data_dir "$DATA_DIR" \
    --basemodel "$BASEMODEL" \
    --train_dir "$TRAIN_DIR" \
    --batch_size "$BATCH_SIZE" \
    --max_steps "$STEPS" \
    --initial_lr "$INITIAL_LR" \
    --lr_step_epoch "$LR_STEP_EPOCH" \
    --lr_decay "$LR_DECAY" \
    --momentum 0.9 \
    --l2_weight 5e-4 \
    --display 100 \
    --val_interval "$INTERVAL" \
    --checkpoint_interval "$INTERVAL" \
    "$@"
