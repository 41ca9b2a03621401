#!/usr/bin/env bash
# Makes .venv, then runs the linters and the tests. Words go to pytest: ./test.sh -k resnet
set -euo pipefail
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

# shellcheck source=environment.sh
source "$HERE/environment.sh"
make_environment "$HERE" "$HERE/requirements.txt" "$HERE/requirements-dev.txt"

cd "$HERE"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
.venv/bin/shellcheck ./*.sh .ci/run
"$PYTHON" -m pytest -q --durations=10 "$@"
