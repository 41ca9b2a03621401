# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv with what the given requirements files name, and sets PYTHON.
# A second call does nothing while the files are unchanged.

make_environment() {
    local here=$1 requirements=("${@:2}") base stamp
    base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed, '$base' is not: install it, or set PYTHON=/path/to/python3" >&2
        return 1
    fi
    stamp=$(cat "${requirements[@]}" | cksum)
    PYTHON=$here/.venv/bin/python
    if [ "$(cat "$here/.venv/stamp-${#requirements[@]}" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    echo "making .venv (TensorFlow is a download of about 600 MB)"
    [ -x "$PYTHON" ] || "$base" -m venv "$here/.venv"
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "${requirements[@]/#/--requirement=}"; then
        echo "pip could not install ${requirements[*]##*/}: see its message above; run this again once it is mended" >&2
        return 1
    fi
    echo "$stamp" >"$here/.venv/stamp-${#requirements[@]}"
}
