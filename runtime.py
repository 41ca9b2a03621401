"""What every command needs of its surroundings before it loads TensorFlow.

Nothing here imports more than Python itself, so that a process can prepare for one framework
without loading another. What is imported as a library, in a notebook say, leaves the process as it
was: only a command of this project quiets its start and answers for its standard streams.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator

REQUIRED = ("numpy", "tensorflow", "six", "grpc", "matplotlib", "sklearn")  # requirements.txt


def is_x86() -> bool:
    """Whether the processor is one that oneDNN's kernels are of."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def is_command() -> bool:
    """Whether this process runs a script of this project, rather than imports a part of it."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    here = os.path.dirname(os.path.realpath(__file__))
    return script is not None and os.path.dirname(os.path.realpath(script)) == here


def prepare() -> None:
    """Check what a command needs, and give it the standard streams that its caller closed.

    Raises:
        SystemExit: a package is missing; the message is one line.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, as by `>&-`: a file that is opened later would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open to the end
    missing = [name for name in REQUIRED if not is_installed(name)]
    if missing:
        fail(f"{sys.executable} has no {', '.join(missing)}")


def fail(problem: str) -> None:
    """End a command with one line that says how to get what it needs."""
    script = os.path.basename(sys.argv[0])
    sys.exit(
        f"{script}: error: {problem}: `pip install -r requirements.txt` brings all that is needed, "
        "./quickstart.sh makes a .venv with it, and the other .sh scripts use that"
    )


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder that only has its name does not count."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """The environment in which TensorFlow and Keras are to be imported; the caller's comes back.

    - oneDNN is on, also where TensorFlow leaves it out, as with AVX2: a training step takes two
      thirds of the time. What TF_ENABLE_ONEDNN_OPTS says counts. This variable stays: some of
      TensorFlow reads it later.
    - Keras and matplotlib, which TensorFlow imports, do not read the backends that were set for
      other programs, some of which exist there only.
    - In a command TensorFlow says nothing at its start, not even what no setting of its own
      suppresses, unless TF_CPP_MIN_LOG_LEVEL is set.
    """
    if is_x86():
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    quiet = is_command() and "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    before = dict(os.environ)
    for name in before:
        if name.startswith("KERAS_") or name == "TF_USE_LEGACY_KERAS":
            del os.environ[name]
    # No folder, so that there is no keras.json in it.
    os.environ |= {"MPLBACKEND": "agg", "KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
    try:
        with warnings.catch_warnings(), _no_stderr() if quiet else contextlib.nullcontext():
            warnings.simplefilter("ignore")  # PYTHONWARNINGS=error would end TensorFlow's import
            yield
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]
        os.environ |= before


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """What is written to descriptor 2 goes nowhere; exceptions that leave are printed after."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
