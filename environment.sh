# shellcheck shell=bash
# Sourced by every script once it has found HERE, the checkout: what they share.

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

# Makes .venv with what the files name, or completes one that is there: it may be a person's, so
# nothing in it is removed. A second call does nothing while the files are unchanged.
make_environment() { # REQUIREMENTS ... -> PYTHON
    local base=${PYTHON:-python3} venv=$HERE/.venv
    local unfinished=$venv/.unfinished # is there while 'python -m venv' works, and if it failed
    local recent='import sys; sys.exit(sys.version_info < (3, 10))'
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
    if [ -e "$unfinished" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ]; then
        "$base" -c "$recent" 2>/dev/null ||
            fail "Python 3.10 or newer is needed; '$base' is missing or older: set PYTHON" 1
        echo "making .venv"
        { mkdir -p "$venv" && : >"$unfinished" && rm -rf "${venv:?}"/*; } 2>/dev/null ||
            fail "$venv cannot be made: make $HERE writable" 1
        "$base" -m venv "$venv" ||
            fail "'$base -m venv' failed: see above (Debian and Ubuntu need python3-venv)" 1
        rm -f "$unfinished"
    fi
    "$PYTHON" -c "$recent" 2>/dev/null ||
        fail "$PYTHON does not run, or is older than Python 3.10: $again" 1
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
