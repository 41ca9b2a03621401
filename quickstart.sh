#!/usr/bin/env bash
# From nothing to a finetuned tree: environment, data, group.sh, split.sh, eval.sh, summary.
#   ./quickstart.sh                  downloads CIFAR-100; without a network, draws a synthetic set
#   ./quickstart.sh --archive FILE   reads the .tar.gz, .tar.xz, .tar or the unpacked folder
#                                    cifar-100-python; also CIFAR100_ARCHIVE=FILE
#   ./quickstart.sh --synthetic      draws the synthetic set
#   ./quickstart.sh --data PICTURES  your own: a folder of pictures for each class, and with
#                                    --image_size 64 other sizes than 32x32 (docs/data.md)
#   ./quickstart.sh --setup FILE ... makes .venv with what requirements files name, and ends
# Run again, it goes on from what exists. Other presets take hours: README.md.
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

# Of a second script that is started beside one: macOS has no command for a lock, Python has.
LOCK='
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1] == "at once" else 0))
except BlockingIOError:
    sys.exit(75)
'

# Waits until no other script has locked a file or folder, and locks it: descriptor 9 is the lock.
# What cannot be locked, as on some network file systems, is left so.
lock() { # PATH WHAT_FOR PYTHON ...: the first Python that runs
    [ -r "$1" ] || return 0
    exec 9<"$1"
    local python status
    for python in "${@:3}"; do
        status=0
        "$python" -c "$LOCK" 'at once' 2>/dev/null || status=$?
        case $status in
        0) return 0 ;;
        75)
            echo "waiting for another script that $2"
            "$python" -c "$LOCK" later 2>/dev/null || true
            return 0
            ;;
        esac
    done
}

make_environment() { # REQUIREMENTS ... -> PYTHON
    lock "$HERE/requirements.txt" "makes .venv" "${PYTHON:-python3}" "$HERE/.venv/bin/python"
    complete_environment "$@"
    exec 9<&-
}

# Makes .venv with what the files name, or completes one that is there: it may be a person's, so
# nothing in it is removed. A second call does nothing while the files are unchanged.
complete_environment() { # REQUIREMENTS ... -> PYTHON
    local base=${PYTHON:-python3} venv=$HERE/.venv
    local unfinished=$venv/.unfinished # is there while 'python -m venv' works, and if it failed
    local fits='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' # TensorFlow 2.21
    local again="move it away (mv '$venv' '$venv-old') and run this again"
    local stamp stamped=$venv/stamp-$#
    stamp=$(cat "$@" | cksum)
    PYTHON=$venv/bin/python
    local install=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
    install+=("${@/#/--requirement=}")
    if [ "$(cat "$stamped" 2>/dev/null)" = "$stamp" ] &&
        "$PYTHON" -c 'import numpy' 2>/dev/null; then
        return 0
    fi
    if [ -e "$unfinished" ] && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        rm -f "$unfinished" # somebody has finished it
    fi
    if [ -e "$unfinished" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ]; then
        "$base" -c "$fits" 2>/dev/null ||
            fail "Python 3.10 to 3.13 is needed, and '$base' is missing or another: set PYTHON" 1
        echo "making .venv"
        { mkdir -p "$venv" && : >"$unfinished" && rm -rf "${venv:?}"/*; } 2>/dev/null ||
            fail "$venv cannot be made: make $HERE writable" 1
        "$base" -m venv "$venv" ||
            fail "'$base -m venv' failed: see above (Debian and Ubuntu need python3-venv)" 1
        rm -f "$unfinished"
    fi
    "$PYTHON" -c "$fits" 2>/dev/null ||
        fail "$PYTHON does not run, or is not Python 3.10 to 3.13: $again" 1
    # Where everything is there, this needs neither a network nor a place to write to.
    if ! "${install[@]}" --no-index >/dev/null 2>&1; then
        [ -w "$venv" ] || fail "$venv is read-only and not complete: make it writable, or $again" 1
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
            fail "$venv has no pip, and 'python -m ensurepip' cannot add it: $again" 1
        echo "installing in .venv (TensorFlow is a download of about 600 MB)"
        "${install[@]}" || fail "pip could not install ${*##*/}: see above, then run this again" 1
    fi
    { echo "$stamp" >"$stamped"; } 2>/dev/null || true # read-only: looked at again next time
}

if [ "${1:-}" = --setup ]; then # what test.sh does first
    shift
    [ $# -gt 0 ] || fail "--setup needs files of requirements"
    make_environment "$@"
    exit 0
fi

export PRESET=${PRESET:-smoke}
PICTURES=''
NAME=''
SIZE=()
ARCHIVE=${CIFAR100_ARCHIVE:-}
SYNTHETIC=

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
    --data)
        [ -n "${2:-}" ] || fail "--data needs a folder of pictures"
        PICTURES=$2
        shift
        ;;
    --data=*)
        PICTURES=${1#*=}
        [ -n "$PICTURES" ] || fail "--data needs a folder of pictures"
        ;;
    --image_size)
        [ -n "${2:-}" ] || fail "--image_size needs a number"
        SIZE=(--image_size "$2")
        shift
        ;;
    --image_size=*) SIZE=("$1") ;;
    -h | --help)
        sed -n '2,10s/^# //p' "$HERE/quickstart.sh"
        exit 0
        ;;
    *) fail "unknown word '$1': use --archive FILE, --synthetic or --data PICTURES" ;;
    esac
    shift
done
# The shell opens a ~ only at the start of a word: --archive=~/FILE comes as it is.
for name in ARCHIVE PICTURES DATA_DIR RUNS; do
    case ${!name-} in
    \~/*) printf -v "$name" '%s' "${HOME-}/${!name#??}" ;;
    esac
done
if [ -n "$PICTURES" ]; then
    [ -d "$PICTURES" ] || fail "there is no folder '$PICTURES'"
    [ -z "$SYNTHETIC" ] || fail "--data and --synthetic exclude each other"
    NAME=$(cd "$PICTURES" && basename "$PWD")
elif [ -n "${SIZE[*]-}" ]; then
    fail "--image_size is of --data PICTURES"
fi
use_preset "$PRESET"
export DATA_DIR=${DATA_DIR:-$HERE/data/${NAME:-$DATASET}}
RUNS=${RUNS:-$HERE/runs/$PRESET${NAME:+-$NAME}}
[ -z "$ARCHIVE" ] || [ -z "$SYNTHETIC" ] || fail "--archive and --synthetic exclude each other"
[ -z "$ARCHIVE" ] || [ -e "$ARCHIVE" ] || fail "there is no archive '$ARCHIVE'"
case $DATA_DIR in
*://*) fail "DATA_DIR is a folder on this machine, not '$DATA_DIR'" ;;
esac
[ "$DATASET" = cifar100 ] || [ -n "$PICTURES" ] || [ -e "$DATA_DIR/split.json" ] ||
    fail "PRESET=$PRESET is not for CIFAR-100: give --data PICTURES (docs/imagenet.md)"

make_environment "$HERE/requirements.txt"
export PYTHON

get_data() {
    "$PYTHON" "$HERE/download_cifar100.py" --dataset_path "$DATA_DIR" "$@"
}

notice_synthetic() {
    if grep -q '"dataset": "synthetic"' "$DATA_DIR/split.json" 2>/dev/null; then
        echo "NOTICE: $DATA_DIR holds the SYNTHETIC data set, not CIFAR-100. To change that:" >&2
        echo "NOTICE: rm -r '$DATA_DIR' '$RUNS/group' '$RUNS/split'" >&2
        echo "NOTICE: then quickstart.sh again, with --archive FILE if you have it" >&2
    fi
}

echo "== data: $DATA_DIR"
mkdir -p "$DATA_DIR" 2>/dev/null && lock "$DATA_DIR" "gets the data" "$PYTHON"
status=0
if [ -n "$PICTURES" ]; then
    "$PYTHON" "$HERE/make_dataset.py" "$PICTURES" --dataset_path "$DATA_DIR" \
        ${SIZE[@]+"${SIZE[@]}"} || status=$?
elif [ -n "$ARCHIVE" ]; then
    get_data --archive "$ARCHIVE" || status=$?
elif [ -n "$SYNTHETIC" ]; then
    get_data --synthetic || status=$?
elif [ -e "$DATA_DIR/split.json" ]; then
    echo "using the data set that is there"
else
    get_data || status=$?
    # What is there of a download that was interrupted is not to be lost among made-up images.
    if [ "$status" -eq 3 ] && [ ! -s "$DATA_DIR/cifar-100-python.tar.gz.part" ]; then
        echo "NOTICE: no network, so a synthetic data set is drawn instead" >&2
        status=0
        get_data --synthetic || status=$?
    fi
fi
notice_synthetic
[ "$status" -eq 0 ] || exit "$status"

tell_time() { # copies group.sh's output; after its first steps says how long everything will take
    local line step steps seconds told=
    trap '' INT # the last lines come after a Ctrl-C
    while IFS= read -r line; do
        printf '%s\n' "$line"
        if [ -z "$told" ] &&
            [[ $line =~ step\ ([0-9]+)/([0-9]+)\ .*\ ([0-9]+):([0-9]+):([0-9]+)\ left ]]; then
            told=1 step=${BASH_REMATCH[1]} steps=${BASH_REMATCH[2]}
            seconds=$((10#${BASH_REMATCH[3]} * 3600 + 10#${BASH_REMATCH[4]} * 60 + 10#${BASH_REMATCH[5]}))
            # A run that goes on has only a part of its steps left.
            [ "$step" = "$steps" ] || seconds=$((seconds + seconds * steps * REST / (steps - step) / 10))
            echo "== about $((seconds / 60 + 1)) minutes to the end, at the speed so far"
        fi
    done
}

# A second quickstart.sh comes to the end as well: it finds what the first has made.
mkdir -p "$RUNS" 2>/dev/null && lock "$RUNS" "works in $RUNS" "$PYTHON"
echo "== group.sh: learn the groups ($PRESET)"
TRAIN_DIR=$RUNS/group bash "$HERE/group.sh" | tell_time
echo "== eval.sh: the grouped network, and the same right after the cut"
CHECKPOINT=$RUNS/group bash "$HERE/eval.sh"
CHECKPOINT=$RUNS/group bash "$HERE/eval.sh" --mask
echo "== split.sh: cut and finetune ($PRESET)"
BASEMODEL=$RUNS/group TRAIN_DIR=$RUNS/split bash "$HERE/split.sh"
echo "== eval.sh: the tree"
CHECKPOINT=$RUNS/split bash "$HERE/eval.sh"
echo "== summary"
"$PYTHON" "$HERE/report" "$RUNS" --data_dir "$DATA_DIR"
