#!/usr/bin/env bash
# From nothing to a finetuned tree: environment, data, group.sh, split.sh, eval.sh, summary.
#   ./quickstart.sh                  downloads CIFAR-100; without a network, draws a synthetic set
#   ./quickstart.sh --archive FILE   reads the .tar.gz or .tar.xz; also CIFAR100_ARCHIVE=FILE
#   ./quickstart.sh --synthetic      draws the synthetic set
# Run again, it goes on from what exists. PRESET=cpu takes an hour and more instead of minutes.
set -euo pipefail
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

export PRESET=${PRESET:-smoke}
export DATA_DIR=${DATA_DIR:-$HERE/data/cifar100}
RUNS=${RUNS:-$HERE/runs/$PRESET}
ARCHIVE=${CIFAR100_ARCHIVE:-}
SYNTHETIC=

fail() {
    echo "quickstart.sh: error: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --archive)
        [ -n "${2:-}" ] || fail "--archive needs a file"
        ARCHIVE=$2
        shift
        ;;
    --archive=*)
        ARCHIVE=${1#*=}
        [ -n "$ARCHIVE" ] || fail "--archive needs a file"
        ;;
    --synthetic) SYNTHETIC=1 ;;
    -h | --help)
        sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) fail "unknown word '$1': use --archive FILE or --synthetic" ;;
    esac
    shift
done
[ -z "$ARCHIVE" ] || [ -z "$SYNTHETIC" ] || fail "--archive and --synthetic exclude each other"
[ -z "$ARCHIVE" ] || [ -f "$ARCHIVE" ] || fail "there is no archive '$ARCHIVE'"
case $PRESET in
paper | cpu | smoke) ;;
*) fail "PRESET is paper, cpu or smoke, not '$PRESET'" ;;
esac

# shellcheck source=environment.sh
source "$HERE/environment.sh"
make_environment "$HERE" "$HERE/requirements.txt"
export PYTHON

get_data() {
    "$PYTHON" "$HERE/download_cifar100.py" --dataset_path "$DATA_DIR" "$@"
}

notice_synthetic() {
    if grep -q '"dataset": "synthetic"' "$DATA_DIR/split.json" 2>/dev/null; then
        echo "NOTICE: $DATA_DIR holds the SYNTHETIC data set, not CIFAR-100. To change that:" >&2
        echo "NOTICE: rm -r '$DATA_DIR' '$RUNS/group' '$RUNS/split', then $0, with --archive FILE" >&2
        echo "NOTICE: if you have it" >&2
    fi
}

echo "== data: $DATA_DIR"
status=0
if [ -n "$ARCHIVE" ]; then
    get_data --archive "$ARCHIVE" || status=$?
elif [ -n "$SYNTHETIC" ]; then
    get_data --synthetic || status=$?
elif [ -e "$DATA_DIR/split.json" ]; then
    echo "using the data set that is there"
else
    get_data || status=$?
    if [ "$status" -eq 3 ]; then
        echo "NOTICE: no network, so a synthetic data set is drawn instead" >&2
        status=0
        get_data --synthetic || status=$?
    fi
fi
notice_synthetic
[ "$status" -eq 0 ] || exit "$status"

echo "== group.sh: learn the groups ($PRESET)"
TRAIN_DIR=$RUNS/group "$HERE/group.sh"
echo "== eval.sh: the grouped network, and the same right after the cut"
CHECKPOINT=$RUNS/group "$HERE/eval.sh"
CHECKPOINT=$RUNS/group "$HERE/eval.sh" --mask
echo "== split.sh: cut and finetune ($PRESET)"
BASEMODEL=$RUNS/group TRAIN_DIR=$RUNS/split "$HERE/split.sh"
echo "== eval.sh: the tree"
CHECKPOINT=$RUNS/split "$HERE/eval.sh"
echo "== summary"
"$PYTHON" "$HERE/report.py" "$RUNS" --data_dir "$DATA_DIR"
