#!/usr/bin/env bash
# Evaluate a checkpoint on the 10,000 test images: the tree of split.sh, or another with --checkpoint.
# Edit the flags here, or add some to the command, which win.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

PRESET=${PRESET:-paper}
DATA_DIR=${DATA_DIR:-$HERE/data/cifar100}
CHECKPOINT=${CHECKPOINT:-$HERE/runs/$PRESET/split}
PYTHON=${PYTHON:-$([ -x "$HERE/.venv/bin/python" ] && echo "$HERE/.venv/bin/python" || echo python3)}

exec "$PYTHON" "$HERE/eval.py" \
    --data_dir "$DATA_DIR" \
    --checkpoint "$CHECKPOINT" \
    --split test \
    --batch_size 100 \
    "$@"
