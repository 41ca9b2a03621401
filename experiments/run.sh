#!/usr/bin/env bash
# One row of the paper's tables: train, cut, finetune, evaluate. All rows of a network have the same
# number of epochs, and rows that share a stage share its run. experiments/run.sh alone lists them.
#   PRESET=cpu SEED=1 RUNS=runs/try/seed1 experiments/run.sh deep_2-2-2 --l2_weight 2e-4
# Flags after the row go to every training (train.py) that knows them. PRESET, SEED, DATA_DIR, RUNS
# and K, another width than the preset's, are variables. `python -m experiments.tables` makes tables.
[ -n "${BASH_VERSION:-}" ] || {
    echo "${0##*/}: error: use bash: bash $0" >&2
    # shellcheck disable=SC2317 # to exit would close the terminal of a zsh that was told to read it
    return 2 2>/dev/null || exit 2
}
set -euo pipefail
# The checkout: where this file is, or where its copy, which batch systems run, was submitted.
SCRIPT=$(command readlink -f "${BASH_SOURCE[0]-}" 2>/dev/null || echo "$0") # old macOS has no -f
for HERE in "$(command dirname "$SCRIPT")/.." "${SLURM_SUBMIT_DIR-}" "${PBS_O_WORKDIR-}" \
    "${SGE_O_WORKDIR-}" "${LSB_SUBCWD-}" "${LS_SUBCWD-}" "$PWD" ''; do
    if [ -f "$HERE/presets.sh" ] && [ -f "$HERE/split.sh" ]; then break; fi
done
[ -n "$HERE" ] || { echo "${0##*/}: error: no checkout: cd into it and submit there" >&2; exit 2; }
# shellcheck source=presets.sh
source "$HERE/presets.sh"

# The other networks have presets of their own names.
case ${1:-} in
resnet18*) NETWORK=resnet18 PRESET=${PRESET:-resnet18} ;;
alexnet*) NETWORK=alexnet PRESET=${PRESET:-alexnet} ;;
*) NETWORK=wrn PRESET=${PRESET:-paper} ;;
esac
export PRESET
SEED=${SEED:-0}
FOLDER=$PRESET
case $NETWORK in
wrn | "$PRESET") ;;
*) FOLDER=$NETWORK-$PRESET ;;
esac
RUNS=${RUNS:-$HERE/runs/$FOLDER${K:+-k$K}/table/seed$SEED}
case $RUNS in
\~/*) RUNS=$HOME/${RUNS#??} ;; # in quotes, where the shell leaves it; the programs do the same
esac
use_preset "$PRESET"
export DATA_DIR=${DATA_DIR:-$HERE/data/$DATASET}
find_python
export PYTHON

# Another width: K_NARROW is that of the network with about as many weights as a tree of equal 2-2-2.
# ALIKE lets the groups of the preset `cpu` take about the same course. R_W, a mean over a layer's
# rows, pulls on one weight with 1 / k, so gamma1 and gamma2 go with k. With a rate that goes with
# 1 / k, late groups of k = 1 were not decided when gamma2 rose, and fell into one. So it is higher
# there, and gamma2 grows more. 8 was tried with half the epochs: its groups form somewhat late
# (docs/grouping.md).
of_width() {
    local faster=$((36 / ${EPOCHS:-36}))
    case $1 in
    8) K_NARROW=5.75 ALIKE=(--gamma1 1.6 --gamma2 4 --group_lr_scale "$((7 * faster))") ;;
    4) K_NARROW=2.875 ALIKE=() ;;
    2) K_NARROW=1.4375 ALIKE=(--gamma1 0.4 --gamma2 1 --gamma2_growth 15 --group_lr_scale "$((80 * faster))") ;;
    1) K_NARROW=0.6875 ALIKE=(--gamma1 0.2 --gamma2 0.5 --gamma2_growth 20 --group_lr_scale "$((288 * faster))") ;;
    *) fail "K is 1, 2, 4 or 8, not '$K': give a row another width by --k" ;;
    esac
    case ${K:+$PRESET} in
    cpu*) ;;
    *) ALIKE=() ;;
    esac
}

# NET is for the stages that make a network, RATE for all.
NET=(${K:+--k "$K"}) RATE=() ALIKE=()
case $NETWORK/$PRESET in
wrn/resnet18 | wrn/alexnet) fail "PRESET=$PRESET is for the rows ${PRESET}_..., not '$1'" ;;
wrn/*) of_width "${K:-$WIDTH}" ;;
resnet18/cpu) NET=(--network resnet18 --k "${K:-0.5}") ;; # layers as wide as WRN-16-4's
alexnet/cpu)
    NET=(--network alexnet --k "${K:-0.25}")
    RATE=(--initial_lr 0.05) # less than with batch normalization
    ALIKE=(--group_lr_scale 48)
    ;;
"$NETWORK/$NETWORK") ;;
*) fail "the rows of $NETWORK are of the presets $NETWORK and cpu, not '$PRESET'" ;;
esac

SPLITS="fc_1-1-4 shallow_1-2-2 deep_2-2-2 hier_2-4-4 deep_3-3-3"
OTHERS="resnet18_1-1-3 resnet18_1-2-2 resnet18_2-2-2 alexnet_1-1-3 alexnet_1-2-5 alexnet_2-4-8 alexnet_2x5"

list_rows() {
    echo "baseline           the Wide ResNet, not split"
    echo "baseline_dropout   the same, dropout on the inputs of unit_2, unit_3 and the classifier"
    echo "narrow             WRN-16-${K_NARROW:-5.75}: about as many weights as deep_2-2-2, not split"
    for split in $SPLITS; do
        echo "$split, $split-S, $split-C, $split-R"
    done
    echo "Without a suffix the groups are learned; -S: semantic, -C: clustering, -R: random."
    echo "The paper's other networks, on ILSVRC 2012 (PRESET=cpu: smaller, on smaller pictures):"
    echo "resnet18, alexnet  not split"
    for split in $OTHERS; do
        echo "$split, $split-R"
    done
}

# The paper's flags. The rate drops as long before the end as that of split.sh.
baseline() { # DIRECTORY FLAG ...
    "$PYTHON" "$HERE/train.py" \
        --stage baseline \
        --preset "$PRESET" \
        --seed "$SEED" \
        --data_dir "$DATA_DIR" \
        --train_dir "$1" \
        --num_residual_units 2 \
        --k 8 \
        --batch_size 90 \
        --max_steps 320000 \
        --initial_lr 0.1 \
        --lr_step_epoch 500,540 \
        --lr_decay 0.1 \
        --momentum 0.9 \
        --l2_weight 5e-4 \
        --display 100 \
        --val_interval 1000 \
        --checkpoint_interval 1000 \
        "${@:2}"
}

whole() { # DIRECTORY FLAG ...: a baseline of as many steps as group.sh and split.sh have together
    baseline "$1" ${ALL_FLAGS[@]+"${ALL_FLAGS[@]}"} \
        --schedule_for "$TRAINING_IMAGES" \
        ${NET[@]+"${NET[@]}"} ${RATE[@]+"${RATE[@]}"} "${@:2}"
}

first() { # DIRECTORY FLAG ...: a baseline of group.sh's steps, to be cut into given groups
    baseline "$1" --max_steps 200000 --lr_step_epoch 240,300 \
        ${FIRST_FLAGS[@]+"${FIRST_FLAGS[@]}"} \
        --schedule_for "$TRAINING_IMAGES" \
        ${NET[@]+"${NET[@]}"} ${RATE[@]+"${RATE[@]}"} "${@:2}"
}

evaluate() { # RUN FLAG ...
    CHECKPOINT=$1 bash "$HERE/eval.sh" "${@:2}"
}

split_row() { # ROW FLAG ...
    local row=$1 kind=learned keep=$DEEP_DROPOUT shared=baseline
    shift
    case $row in
    *-S) kind=semantic ;;
    *-C) kind=clustering ;;
    *-R) kind=random ;;
    esac
    local split=${row%-[SCR]} level
    local levels=${split#*_} # numbers of groups, from the input on
    case $split in
    alexnet_2x5) levels=2-2-2-2-2 ;;
    alexnet_*) levels=1-1-$levels ;;
    esac
    local -a numbers groups=()
    IFS=- read -ra numbers <<<"$levels"
    for level in "${!numbers[@]}"; do
        groups+=("--ngroups$((${#numbers[@]} - level))" "${numbers[level]}")
    done
    local base=$RUNS/$row/group
    case $split in
    fc_* | shallow_*) keep=1 ;;
    esac
    if [ $kind = learned ]; then
        flags_of group "$@"
        TRAIN_DIR=$base bash "$HERE/group.sh" --seed "$SEED" "${groups[@]}" \
            --dropout_keep_prob "$keep" ${NET[@]+"${NET[@]}"} ${RATE[@]+"${RATE[@]}"} \
            ${ALIKE[@]+"${ALIKE[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}
        evaluate "$base" --split val # what the cut costs, before finetuning
        evaluate "$base" --split val --mask
        flags_of split "$@"
        set -- ${FLAGS[@]+"${FLAGS[@]}"}
    else
        [ "$keep" = 1 ] || shared=baseline_dropout
        base=$RUNS/shared/$shared$(tr -cs '[:alnum:].=_-' _ <<<"$*" | sed 's/_$//')
        local -a make=("$kind" --groups "$levels" --data_dir "$DATA_DIR" --seed "$SEED")
        local file=$RUNS/$row/$kind.json
        mkdir -p "$RUNS/$row"
        # Groups that need no baseline come first: they may be impossible.
        [ $kind = clustering ] ||
            "$PYTHON" "$HERE/experiments/variants.py" "${make[@]}" --output_file "$file" ||
            { status=$?; rmdir "$RUNS/$row" 2>/dev/null || true; exit "$status"; }
        # Nothing happens to it where another row has trained it, with the same flags.
        first "$base" --dropout_keep_prob "$keep" "$@"
        [ $kind != clustering ] || "$PYTHON" "$HERE/experiments/variants.py" "${make[@]}" \
            --basemodel "$base" --output_file "$file"
        groups+=(--groups "$file")
    fi
    BASEMODEL=$base TRAIN_DIR=$RUNS/$row/split \
        bash "$HERE/split.sh" --seed "$SEED" "${groups[@]}" ${RATE[@]+"${RATE[@]}"} "$@"
    evaluate "$RUNS/$row/split"
}

# Without those that only the row's other stage knows: what none of its stages knows is an error.
flags_of() { # STAGE FLAG ... -> FLAGS
    local stage=$1 word wanted=1
    shift
    FLAGS=()
    for word in "$@"; do
        case $stage:$word in
        split:--gamma* | split:--group_* | split:--weighted_group_loss*) wanted=0 ;;
        group:--equal_groups*) wanted=0 ;;
        *:--*) wanted=1 ;;
        esac
        [ $wanted = 0 ] || FLAGS+=("$word")
    done
}

case ${1:---help} in
-h | --help)
    list_rows
    exit 0
    ;;
esac
ROW=$1
shift
for word in "$@"; do
    case $ROW/${word%%=*} in
    */-h | */--help)
        list_rows
        exit 0
        ;;
    */--data_dir | */--seed | */--preset | */--train_dir)
        fail "set DATA_DIR, SEED, PRESET or RUNS instead of ${word%%=*}"
        ;;
    */--stage | */--basemodel | */--checkpoint | */--ngroups? | */--groups | narrow/--k)
        fail "the row says what ${word%%=*} would: leave it out"
        ;;
    esac
done
case " $SPLITS $OTHERS " in
*" ${ROW%-[SCR]} "*) split_row "$ROW" "$@" ;;
*)
    case $ROW in
    baseline | resnet18 | alexnet) whole "$RUNS/$ROW" "$@" ;;
    baseline_dropout) whole "$RUNS/$ROW" --dropout_keep_prob "$DROPOUT" "$@" ;;
    narrow) whole "$RUNS/$ROW" --k "$K_NARROW" "$@" ;;
    *)
        echo "run.sh: error: there is no row '$ROW'; these are:" >&2
        list_rows >&2
        exit 2
        ;;
    esac
    evaluate "$RUNS/$ROW"
    ;;
esac
