# shellcheck shell=bash disable=SC2034
# Sourced by every script once it has found HERE, the checkout: what all scripts share, and what a
# preset changes of the paper's flags.

# What the caller's shell exports must not change what the scripts and their programs do.
IFS=$' \t\n'
for name in $(compgen -A function); do unset -f "$name"; done
unalias -a
unset BASH_ENV ENV CDPATH GLOBIGNORE GREP_OPTIONS POSIXLY_CORRECT
unset PYTHONHOME PYTHONSAFEPATH PIP_USER PIP_TARGET PIP_PREFIX
set +afC
shopt -u dotglob failglob nocaseglob nocasematch nullglob
HERE=$(cd -P "$HERE" && pwd)

fail() { # MESSAGE [STATUS]
    echo "${0##*/}: error: $1" >&2
    exit "${2:-2}"
}

find_python() { # -> PYTHON, the caller's or that of .venv
    local venv=$HERE/.venv/bin/python
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=python3
        [ ! -x "$venv" ] || PYTHON=$venv
    fi
}

# The data set, and its number of training images, that all steps and epochs are meant for.
DATASET=cifar100 TRAINING_IMAGES=45000

# The paper's flags stand in group.sh, split.sh and experiments/run.sh; of two flags the last one
# counts. A further preset is a block here.
#   GROUP_FLAGS, SPLIT_FLAGS  of group.sh and split.sh
#   ALL_FLAGS, FIRST_FLAGS    of a baseline of as many steps as both, and of group.sh's only, which
#                             is cut into given groups (experiments/run.sh)
#   WIDTH                     k of these flags
#   DROPOUT, DEEP_DROPOUT     shares kept in baseline_dropout; in deep splits and hierarchies
#   REST                      tenths of group.sh's time that quickstart.sh takes afterwards
use_preset() { # NAME
    case $1 in
    paper) # WRN-16-8, the published schedules: meant for GPUs, not measured
        GROUP_FLAGS=() SPLIT_FLAGS=() ALL_FLAGS=() FIRST_FLAGS=()
        WIDTH=8 DROPOUT=0.5 DEEP_DROPOUT=0.5 REST=4
        ;;
    cpu | cpu18) # WRN-16-4, 36 epochs or 18: one rate falls from 0.1 to 0 through both stages
        EPOCHS=36
        [ "$1" = cpu ] || EPOCHS=18 # so that groups take the same course twice as fast
        # cpu: 19 + 53 minutes on two cores of an Intel processor with AMX, --precision bfloat16: 28.96 %
        # test error, two seeds.
        COMMON=(--lr_schedule linear --lr_step_epoch '' --lr_warmup_epochs 0.5 --nesterov True
            --label_smoothing 0.1)
        ALL_FLAGS=("${COMMON[@]}" --k 4 --max_steps "$((500 * EPOCHS))")
        FIRST_FLAGS=("${COMMON[@]}" --k 4 --max_steps "$((125 * EPOCHS))"
            --lr_total_steps "$((500 * EPOCHS))")
        # So that the weights say more of what groups mean, these start to form when the network
        # knows the classes, and R_W counts 2.5 times as much beside R_D as in the paper. Once the
        # groups are sharp, gamma2 empties what the cut removes.
        GROUP_FLAGS=("${FIRST_FLAGS[@]}" --dropout_keep_prob 1 --l2_weight 5e-4
            --gamma1 0.8 --gamma2 2 --gamma3 16 --group_start_epoch "$((EPOCHS / 6))"
            --group_lr_scale "$((24 * 36 / EPOCHS))" --group_equal_growth True
            --gamma2_step_epoch "$((2 * EPOCHS / 9))" --group_summary_interval 100)
        SPLIT_FLAGS=("${COMMON[@]}" --max_steps "$((375 * EPOCHS))"
            --lr_first_step "$((125 * EPOCHS))")
        WIDTH=4 DROPOUT=0.9 DEEP_DROPOUT=1 REST=24
        ;;
    smoke) # WRN-16-1, 7 epochs
        # 7.3 minutes with all of quickstart.sh, two cores of an Intel processor with AMX: 66.22 %.
        COMMON=(--batch_size 60 --val_interval 500 --checkpoint_interval 500)
        ALL_FLAGS=("${COMMON[@]}" --k 1 --max_steps 5400 --lr_step_epoch 6.5)
        FIRST_FLAGS=("${COMMON[@]}" --k 1 --max_steps 3900 --lr_step_epoch 4.6)
        # The features' groups are sharp long before those of the classes, and gamma3 keeps these
        # balanced: to cut uneven groups cost 5 points of accuracy.
        GROUP_FLAGS=("${FIRST_FLAGS[@]}" --dropout_keep_prob 1 --gamma1 0.4 --gamma2 2
            --gamma2_step_epoch 3 --group_lr_scale 12 --group_summary_interval 500)
        SPLIT_FLAGS=("${COMMON[@]}" --max_steps 1500 --initial_lr 0.05 --lr_step_epoch 1.3)
        WIDTH=1 DROPOUT=0.9 DEEP_DROPOUT=1 REST=8
        ;;
    resnet18 | alexnet) # ResNet-18x2 and AlexNet on ILSVRC 2012, 60 + 30 epochs: not measured
        DATASET=imagenet TRAINING_IMAGES=1281167 DROPOUT=1 DEEP_DROPOUT=1 REST=4
        case $1 in
        resnet18) WIDTH=2 EPOCH=5000 COMMON=(--batch_size 256 --l2_weight 1e-4) ;;
        alexnet) WIDTH=1 EPOCH=10000 COMMON=(--batch_size 128 --l2_weight 5e-4 --initial_lr 0.01) ;;
        esac
        COMMON+=(--val_interval "$EPOCH" --checkpoint_interval "$EPOCH") # about an epoch's steps
        NEW=("${COMMON[@]}" --network "$1" --k "$WIDTH")
        ALL_FLAGS=("${NEW[@]}" --max_steps "$((90 * EPOCH))" --lr_step_epoch '75,85')
        FIRST_FLAGS=("${NEW[@]}" --max_steps "$((60 * EPOCH))" --lr_step_epoch '45,55')
        # Groups grow when the network knows the classes, at one speed in all layers, and ought to be
        # sharp before gamma2 rises (docs/imagenet.md).
        GROUP_FLAGS=("${FIRST_FLAGS[@]}" --dropout_keep_prob 1 --group_start_epoch 10
            --group_equal_growth True --gamma2_step_epoch 35)
        SPLIT_FLAGS=("${COMMON[@]}" --max_steps "$((30 * EPOCH))" --lr_step_epoch '15,25')
        ;;
    *) fail "PRESET is paper, cpu, cpu18, smoke, resnet18 or alexnet, not '$1'" ;;
    esac
}
