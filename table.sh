#!/usr/bin/env bash
# One row of the paper's CIFAR-100 tables: train, cut, finetune, evaluate. Every row has the same
# number of epochs, and rows that share a stage share its run. ./table.sh alone lists the rows.
#   PRESET=cpu SEED=1 RUNS=runs/try/seed1 ./table.sh deep_2-2-2 --l2_weight 2e-4
# Flags after the row go to every training (train.py) that knows them; PRESET, SEED, DATA_DIR and
# RUNS are variables, as the evaluations need them as well. `python table.py` makes the table.
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

export PRESET=${PRESET:-paper}
export DATA_DIR=${DATA_DIR:-$HERE/data/cifar100}
SEED=${SEED:-0}
RUNS=${RUNS:-$HERE/runs/$PRESET/table/seed$SEED}
find_python
export PYTHON

# FIRST: the steps of group.sh, which a baseline that is cut into given groups trains as well. ALL:
# with those of split.sh. Rates drop where those of group.sh and split.sh do, from the end.
# K_NARROW: of the network that is not split and has about as many weights as 2-2-2 equal groups.
# KEEP_PROB: of baseline_dropout; DEEP_KEEP_PROB: of deep splits and hierarchies, which the paper
# trains with dropout, and of the baselines that are cut into such.
case $PRESET in
paper)
    K=8 K_NARROW=5.75 FIRST=200000 FIRST_DROPS=240,300 ALL=320000 ALL_DROPS=500,540 ALL_DECAY=0.1
    KEEP_PROB=0.5 DEEP_KEEP_PROB=0.5 INTERVAL=1000 BATCH_SIZE=90
    ;;
cpu)
    K=2 K_NARROW=1.4375 FIRST=7000 FIRST_DROPS=13 ALL=20000 ALL_DROPS=24,30,34,37,39 ALL_DECAY=0.3
    KEEP_PROB=0.9 DEEP_KEEP_PROB=1.0 INTERVAL=500 BATCH_SIZE=90
    ;;
smoke)
    K=1 K_NARROW=0.6875 FIRST=2850 FIRST_DROPS=3.1 ALL=4350 ALL_DROPS=5.1 ALL_DECAY=0.1
    KEEP_PROB=0.9 DEEP_KEEP_PROB=1.0 INTERVAL=500 BATCH_SIZE=60
    ;;
*) fail "PRESET is paper, cpu or smoke, not '$PRESET'" ;;
esac

SPLITS="fc_1-1-4 shallow_1-2-2 deep_2-2-2 hier_2-4-4 deep_3-3-3"

list_rows() {
    echo "baseline           WRN-16-$K"
    echo "baseline_dropout   the same, dropout on the inputs of unit_2, unit_3 and the classifier"
    echo "narrow             WRN-16-$K_NARROW: about as many weights as deep_2-2-2, not split"
    for split in $SPLITS; do
        echo "$split, $split-S, $split-C, $split-R"
    done
    echo "Without a suffix the groups are learned; -S: semantic, -C: clustering, -R: random."
}

train() { # DIRECTORY FLAG ...
    local directory=$1
    shift
    "$PYTHON" "$HERE/train.py" --train_dir "$directory" --data_dir "$DATA_DIR" \
        --preset "$PRESET" --seed "$SEED" --batch_size "$BATCH_SIZE" --display 100 \
        --val_interval "$INTERVAL" --checkpoint_interval "$INTERVAL" "$@"
}

baseline() { # DIRECTORY STEPS DROPS DECAY FLAG ...
    train "$1" --stage baseline --max_steps "$2" --lr_step_epoch "$3" --lr_decay "$4" \
        --l2_weight 5e-4 "${@:5}"
}

evaluate() { # RUN FLAG ...
    CHECKPOINT=$1 bash "$HERE/eval.sh" "${@:2}"
}

split_row() { # ROW FLAG ...
    local row=$1 kind=learned keep=$DEEP_KEEP_PROB shared=baseline
    shift
    case $row in
    *-S) kind=semantic ;;
    *-C) kind=clustering ;;
    *-R) kind=random ;;
    esac
    local split=${row%-[SCR]}
    local -a numbers
    IFS=- read -ra numbers <<<"${split#*_}"
    local -a groups=(--ngroups3 "${numbers[0]}" --ngroups2 "${numbers[1]}" --ngroups1 "${numbers[2]}")
    local base=$RUNS/$row/group
    case $split in
    fc_* | shallow_*) keep=1.0 ;;
    esac
    if [ $kind = learned ]; then
        TRAIN_DIR=$base bash "$HERE/group.sh" --seed "$SEED" "${groups[@]}" \
            --dropout_keep_prob "$keep" "$@"
        evaluate "$base" --split val # what the cut costs, before finetuning
        evaluate "$base" --split val --mask
        without_group_flags "$@"
        set -- ${REST[@]+"${REST[@]}"}
    else
        [ "$keep" = 1.0 ] || shared=baseline_dropout
        # Nothing happens to it where another row has trained it, with the same flags.
        base=$RUNS/shared/$shared$(tr -cs '[:alnum:].=_-' _ <<<"$*" | sed 's/_$//')
        baseline "$base" "$FIRST" "$FIRST_DROPS" 0.1 --k "$K" --dropout_keep_prob "$keep" "$@"
        groups+=(--groups "$kind")
    fi
    BASEMODEL=$base TRAIN_DIR=$RUNS/$row/split \
        bash "$HERE/split.sh" --seed "$SEED" "${groups[@]}" "$@"
    evaluate "$RUNS/$row/split"
}

without_group_flags() { # FLAG ... -> REST, without those that have a meaning in grouping only
    local word wanted=1
    REST=()
    for word in "$@"; do
        case $word in
        --gamma* | --group_* | --weighted_group_loss*) wanted=0 ;;
        --*) wanted=1 ;;
        esac
        [ $wanted = 0 ] || REST+=("$word")
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
    */--data_dir | */--seed | */--preset | */--train_dir)
        echo "table.sh: error: set DATA_DIR, SEED, PRESET or RUNS instead of ${word%%=*}" >&2
        exit 2
        ;;
    */--stage | */--basemodel | */--checkpoint | */--ngroups? | */--groups | narrow/--k)
        echo "table.sh: error: the row says what ${word%%=*} would: leave it out" >&2
        exit 2
        ;;
    esac
done
case " $SPLITS " in
*" ${ROW%-[SCR]} "*) split_row "$ROW" "$@" ;;
*)
    case $ROW in
    baseline) baseline "$RUNS/$ROW" "$ALL" "$ALL_DROPS" "$ALL_DECAY" --k "$K" "$@" ;;
    baseline_dropout)
        baseline "$RUNS/$ROW" "$ALL" "$ALL_DROPS" "$ALL_DECAY" --k "$K" \
            --dropout_keep_prob "$KEEP_PROB" "$@"
        ;;
    narrow) baseline "$RUNS/$ROW" "$ALL" "$ALL_DROPS" "$ALL_DECAY" --k "$K_NARROW" "$@" ;;
    *)
        echo "table.sh: error: there is no row '$ROW'; these are:" >&2
        list_rows >&2
        exit 2
        ;;
    esac
    evaluate "$RUNS/$ROW"
    ;;
esac
