# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv with what requirements files name, and sets
# PYTHON. A second call does nothing while the files are unchanged.

make_environment() {
    local here=$1 requirements=("${@:2}") base stamp stamped
    base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; '$base' is missing or older: set PYTHON" >&2
        return 1
    fi
    stamp=$(cat "${requirements[@]}" | cksum)
    stamped=$here/.venv/stamp-${#requirements[@]}
    PYTHON=$here/.venv/bin/python
    if [ "$(cat "$stamped" 2>/dev/null)" = "$stamp" ] && "$PYTHON" -c 'import numpy' 2>/dev/null; then
        return 0
    fi
    echo "making .venv (TensorFlow is a download of about 600 MB)"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1 && ! "$base" -m venv --clear "$here/.venv"; then
        echo "'$base -m venv' failed: see above (Debian and Ubuntu need python3-venv)" >&2
        return 1
    fi
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        "${requirements[@]/#/--requirement=}"; then
        echo "pip could not install ${requirements[*]##*/}: see above, then run this again" >&2
        return 1
    fi
    echo "$stamp" >"$stamped"
}
