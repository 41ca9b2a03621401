#!/usr/bin/env bash
# Evaluate a checkpoint on the 10,000 test images: split.sh's tree, or another with --checkpoint.
# Edit the flags here; flags on the command line override them.
set -euo pipefail
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

PRESET=${PRESET:-paper}
DATA_DIR=${DATA_DIR:-$HERE/data/cifar100}
CHECKPOINT=${CHECKPOINT:-$HERE/runs/$PRESET/split}
VENV=$HERE/.venv/bin/python
PYTHON=${PYTHON:-$([ -x "$VENV" ] && echo "$VENV" || echo python3)}

case $PRESET in
paper | cpu | smoke) ;;
*) echo "eval.sh: PRESET is paper, cpu or smoke, not '$PRESET'" >&2 && exit 2 ;;
esac

exec "$PYTHON" "$HERE/eval.py" \
    --data_dir "$DATA_DIR" \
    --checkpoint "$CHECKPOINT" \
    --split test \
    --batch_size 100 \
    "$@"
