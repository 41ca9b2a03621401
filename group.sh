#!/usr/bin/env bash
# Learn the groups: train a Wide ResNet together with the matrices that assign its classes and
# features to groups. Edit the flags here; flags on the command line override them:
#   PRESET=smoke TRAIN_DIR=runs/try ./group.sh --max_steps 20 --k 1.5
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
TRAIN_DIR=${TRAIN_DIR:-$HERE/runs/$PRESET/group}
find_python

case $PRESET in
paper)
    K=8 BATCH_SIZE=90 STEPS=200000 LR_STEP_EPOCH=240,300 INTERVAL=1000
    DROPOUT_KEEP_PROB=0.5 GAMMA1=1.0 GAMMA2=1.0 GAMMA3=10.0 GAMMA2_STEP_EPOCH=''
    GROUP_LR_SCALE=1.0 EQUAL_GROWTH=False
    ;;
cpu)
    # Next to R_D and R_E, at 0.4 of their gammas, the weights have 2.5 times the say in what groups
    # mean; the alphas' rate makes up for the speed. Groups are sharp after 8 epochs (2-4-4: 10);
    # then gamma2 empties what the cut removes.
    K=2 BATCH_SIZE=90 STEPS=7000 LR_STEP_EPOCH=13 INTERVAL=500
    DROPOUT_KEEP_PROB=1.0 GAMMA1=0.4 GAMMA2=1.0 GAMMA3=4.0 GAMMA2_STEP_EPOCH=10
    GROUP_LR_SCALE=10.0 EQUAL_GROWTH=True
    ;;
smoke)
    # As at cpu, but the features' groups are sharp long before those of the classes, and gamma3
    # keeps these balanced: the cut of uneven groups cost 5 points.
    K=1 BATCH_SIZE=60 STEPS=2850 LR_STEP_EPOCH=3.1 INTERVAL=950
    DROPOUT_KEEP_PROB=1.0 GAMMA1=0.4 GAMMA2=2.0 GAMMA3=10.0 GAMMA2_STEP_EPOCH=2.4
    GROUP_LR_SCALE=15.0 EQUAL_GROWTH=False
    ;;
*) fail "PRESET is paper, cpu or smoke, not '$PRESET'" ;;
esac

exec "$PYTHON" "$HERE/train.py" \
    --stage group \
    --preset "$PRESET" \
    --data_dir "$DATA_DIR" \
    --train_dir "$TRAIN_DIR" \
    --num_residual_units 2 \
    --k "$K" \
    --ngroups1 2 \
    --ngroups2 2 \
    --ngroups3 2 \
    --batch_size "$BATCH_SIZE" \
    --max_steps "$STEPS" \
    --initial_lr 0.1 \
    --lr_step_epoch "$LR_STEP_EPOCH" \
    --lr_decay 0.1 \
    --momentum 0.9 \
    --l2_weight 1e-4 \
    --gamma1 "$GAMMA1" \
    --gamma2 "$GAMMA2" \
    --gamma2_step_epoch "$GAMMA2_STEP_EPOCH" \
    --gamma2_growth 10 \
    --gamma3 "$GAMMA3" \
    --weighted_group_loss True \
    --group_lr_scale "$GROUP_LR_SCALE" \
    --group_equal_growth "$EQUAL_GROWTH" \
    --dropout_keep_prob "$DROPOUT_KEEP_PROB" \
    --bn_no_scale True \
    --display 100 \
    --val_interval "$INTERVAL" \
    --checkpoint_interval "$INTERVAL" \
    --group_summary_interval "$INTERVAL" \
    "$@"
