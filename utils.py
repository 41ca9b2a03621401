"""What every program needs: its start, flags, errors, files and signals.

Needs no TensorFlow: `tf` loads it at its first use, in the right surroundings, so that a mistake in
the flags is told at once. What is imported as a library, in a notebook say, leaves the process as
it was: only a command of this project quiets TensorFlow's start and answers for its streams.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import gc
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NoReturn

FOLDERS = ("benchmark", "experiments", "report")  # that run by `python -m NAME`
# Of requirements.txt.
REQUIRED = ("numpy", "tensorflow", "six", "grpc", "matplotlib", "scipy", "sklearn")
NEEDED_BY = {  # by commands that need less or more
    "download_cifar100.py": ("numpy", "six"),
    "make_dataset.py": ("numpy", "PIL"),
    "predict.py": (*REQUIRED, "PIL"),
}


def is_x86() -> bool:
    """Whether the processor is one that oneDNN's kernels are of."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def is_command() -> bool:
    """Whether this process runs a script of this project, rather than imports a part of it."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    here = os.path.dirname(os.path.realpath(__file__))
    folders = [here, *(os.path.join(here, name) for name in FOLDERS)]
    return script is not None and os.path.dirname(os.path.realpath(script)) in folders


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
    missing = [name for name in NEEDED_BY.get(program(), REQUIRED) if not is_installed(name)]
    if missing:
        fail(f"{sys.executable} has no {', '.join(missing)}")


def fail(problem: str) -> None:
    """End a command with one line that says how to get what it needs."""
    sys.exit(
        f"{program()}: error: {problem}: `pip install -r requirements.txt` brings all that is "
        "needed, ./quickstart.sh makes a .venv with it, and the other .sh scripts use that"
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
      suppresses, unless TF_CPP_MIN_LOG_LEVEL is set to another value than 3.
    """
    if is_x86():
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    quiet = is_command() and os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3"
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


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """TensorFlow imports Keras where it can, which takes as long as the rest and is not needed.

    What asks for it later, as `tf.keras`, gets it.
    """
    if "keras" in sys.modules:
        yield
        return
    sys.modules["keras"] = None  # its import fails
    try:
        yield
    finally:
        del sys.modules["keras"]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Python does not look for garbage in an import, which takes a fifth of TensorFlow's.

    Nor later, in a command, in what the import made: it stays.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_command():
            gc.freeze()
        if enabled:
            gc.enable()


class _TensorFlow(types.ModuleType):
    """TensorFlow, imported at its first use."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # what tools look for in any module
            raise AttributeError(name)
        with surroundings(), _without_keras(), _without_collection():
            try:
                import tensorflow
            except ImportError as error:
                if not is_command():
                    raise
                fail(f"TensorFlow cannot be loaded ({error})")
        self.__dict__.update(vars(tensorflow))
        return getattr(tensorflow, name)


tf = _TensorFlow("tensorflow")
PRECISIONS = ("float32", "bfloat16")  # of convolutions


def _errors() -> tuple[type[Exception], ...]:
    """What the system and TensorFlow raise."""
    return (OSError, tf.errors.OpError) if "tensorflow" in sys.modules else (OSError,)


# ---------------------------------------------------------------- flags and errors


class FlagParser(argparse.ArgumentParser):
    """Flags only, spelled out; every mistake is one line that names the fix.

    Flags that are `needed` are asked for after the others were read, so that a misspelled one is
    not reported as missing.
    """

    def __init__(self, doc: str | None, needed: Sequence[str] = ()):
        super().__init__(
            description=(doc or "").partition("\n")[0],  # `python -OO` leaves docstrings out
            prog=program(),
            allow_abbrev=False,
            usage="%(prog)s --FLAG VALUE ...",
        )
        self.needed = needed

    def parse_args(self, args=None, namespace=None):
        flags, left = self.parse_known_args(args, namespace)
        for word in left:
            if not word.startswith("--"):
                self.error(f"stray word {word!r}: a value follows its flag (--flag value)")
            name = word.split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
            self.error(f"unknown flag {name}: {hint}")
        for action in self._actions:
            if action.dest in self.needed and getattr(flags, action.dest) is None:
                name = f"--{action.dest}" if action.option_strings else action.dest.upper()
                self.error(f"{name} is needed: {action.help}")
        return flags

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def boolean(text: str) -> bool:
    """`True`, `false`, `1`, `no` ... of a flag."""
    values = dict.fromkeys(("true", "1", "yes"), True) | dict.fromkeys(("false", "0", "no"), False)
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def number(kind: type, low=None, high=None, above=None, below=None) -> Callable[[str], float]:
    """A flag type: a finite `kind` (int or float) within the given bounds."""
    bounds = [(low, ">="), (high, "<="), (above, ">"), (below, "<")]
    text = " and ".join(f"{sign} {bound}" for bound, sign in bounds if bound is not None)
    expected = {int: "a whole number", float: "a number"}[kind] + (f" {text}" if text else "")

    def convert(value: str):
        try:
            result = kind(value)
        except ValueError:
            result = float("nan")
        holds = isinstance(result, int) or math.isfinite(result)
        holds &= (low is None or result >= low) and (high is None or result <= high)
        holds &= (above is None or result > above) and (below is None or result < below)
        if not holds:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
        return result

    return convert


def factor(text: str) -> float:
    """A flag type: a widening factor; a whole one is an int, as it is written."""
    value = number(float, above=0)(text)
    return int(value) if value == int(value) else value


def names(text: str) -> list[str]:
    """A flag type: `'/GPU:0,/GPU:1'` -> `['/GPU:0', '/GPU:1']`."""
    return [name for name in text.split(",") if name]


def path(text: str) -> str:
    """A flag type: a path of this machine. `~` and `~user` are home folders in `--flag=~/x`, too,
    which the shell leaves as it is."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise argparse.ArgumentTypeError(
            f"expected a path of this machine, got {text!r}: copy it here, or mount it"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"expected a path, got {text!r}, a home folder that there is not: write ./~ for a name "
            "that begins with ~"
        )
    try:
        expanded.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"expected a path in UTF-8, got {text!r}: rename it, or name a link to it"
        ) from None
    return expanded


def program() -> str:
    """This command's name in its messages: `train.py`, or `report` of `python -m report`."""
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))
    return os.path.basename(folder) if name == "__main__.py" else name


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a script; what goes wrong in a foreseen way ends in one line and status 1.

    A signal ends it in one line too, with status 128 + its number. What cannot be printed ends
    nothing.
    """
    name = program()
    _guard_streams()
    try:
        with Ending():
            status = main(sys.argv[1:])
    except (ValueError, *_errors()) as error:
        message = raised_inside(error) or " ".join(str(error).split())
        if os.environ.get("SPLITNET_TRACEBACK"):
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(ended_by(number), file=sys.stderr)
        status = 128 + number
    finally:
        sys.stdout.flush()
    sys.exit(status or 0)


def raised_inside(error: Exception) -> str:
    """What a Python function said that failed within TensorFlow; empty if none did."""
    found = re.search(r"\bValueError: (.*)\n\s*Traceback", str(error))
    return found[1] if found else ""


def first_line(error: Exception) -> str:
    """What an error says, without TensorFlow's details."""
    return str(error).strip().partition("\n")[0]


def say(text: str) -> None:
    """Print at once, also into a pipe or a file."""
    print(text, flush=True)


def _guard_streams() -> None:
    """Make printing such that it cannot end a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if getattr(stream, "errors", None) == "strict":  # a path may have letters it lacks
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Output(stream))


class _Output:
    """A standard stream that may end before the run: its terminal is closed, its disk is full.

    From then on what is printed goes nowhere. Standard error says so once, but not of a reader
    that has ended, as `| head` does.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable, *args) -> None:
        try:
            action(*args)
        except BlockingIOError:  # another program has made the terminal that it shares so
            os.set_blocking(self._stream.fileno(), True)
            self.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        with open(os.devnull, "w") as null:  # takes what is still buffered as well
            os.dup2(null.fileno(), self._stream.fileno())
        if self is not sys.stderr and not isinstance(error, BrokenPipeError):
            name = program()
            reason = f"{name}: what it prints is lost from here on ({error.strerror})"
            print(f"{reason}; it goes on without", file=sys.stderr)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise ValueError that names what was to be written: a full disk's own error does not."""
    try:
        yield
    except _errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} cannot be written ({reason}): make room there, or make it writable, and run "
            "the same command again"
        ) from None


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator:
    """Open a file that appears whole under its name or not at all, whoever else writes it."""
    encoding = None if "b" in mode else "utf-8"
    with _beside(path) as part, writing(path):
        with open(part, mode, encoding=encoding) as file:
            yield file
            file.flush()
            sync(file)
        os.replace(part, path)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name to write a file or a folder under, which then replaces what `path` is, at once."""
    with _beside(path) as part:
        yield part
        with writing(path):
            _put_in_place(part, path)


@contextlib.contextmanager
def _beside(path: str) -> Iterator[str]:
    """A name for what is not complete. It goes in the end, and what killed processes left, now."""
    folder, name = os.path.split(path)
    name = name[:50]  # it may be as long as names can be
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.part(\.old)?")
    with contextlib.suppress(OSError):
        for left in filter(None, map(pattern.fullmatch, os.listdir(folder or "."))):
            # `.old` stays as long as it is the only one that is whole: see _put_in_place.
            if not _is_writing(int(left[1])) and not (left[2] and not os.path.lexists(path)):
                remove(os.path.join(folder, left[0]))
    part = os.path.join(folder, f"{name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def _is_writing(pid: int) -> bool:
    """Whether another process of this number is there, for all that can be known."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return pid != os.getpid()


def _put_in_place(part: str, path: str) -> None:
    """Let a file or a folder take the name `path`; what had it is gone, or called `part`."""
    folders = os.path.isdir(part) or os.path.isdir(path)
    if not folders or not os.path.lexists(path):
        os.replace(part, path)
    elif not _exchange(part, path):
        old = f"{part}.old"
        os.replace(path, old)  # killed after this, both are there, whole, under these names
        os.replace(part, path)
        remove(old)


def _exchange(one: str, other: str) -> bool:
    """Let files or folders exchange their names at once; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Linux has it; of file systems, NFS cannot
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove(path: str) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        os.remove(path)


def sync(file) -> None:
    """Wait until a file is on the disk, where the file system can tell."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def check_folder(folder: str, flag: str) -> None:
    """Raise ValueError, naming the flag that said it, unless files can be written to a folder."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} does not exist or is read-only: name another --{flag}")


def check_file(path: str, flag: str) -> None:
    """Raise ValueError, naming the flag that said it, unless a file can be written."""
    if os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a folder: name a file in it")
    check_folder(os.path.dirname(path) or ".", flag)
    try:
        os.stat(path)
        reason = "" if os.path.isfile(path) else "it is no file"
    except FileNotFoundError:
        reason = ""
    except OSError as error:  # the name is too long, or a part of it is a file
        reason = error.strerror
    if reason:
        raise ValueError(f"--{flag} {path} cannot be written ({reason}): name another")


def lock_folder(folder: str) -> IO:
    """Make a folder, for no other process to work in until the file returned is closed."""
    path = os.path.join(folder, ".lock")
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115, the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is making {folder}: wait for it, or name another --dataset_path"
        ) from None
    except OSError as error:  # some network file systems have no locks
        say(f"{folder} cannot be locked ({error.strerror}): let no other process make it")
    return lock


def write_json(path: str, value) -> None:
    """Write JSON, atomically; one key a line."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value[key])}" for key in value)
    with atomic_write(path) as file:
        file.write("{\n" + lines + "\n}\n")


def read_json(path: str) -> dict:
    """Read a JSON file of one object; ValueError names the file if it holds anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: an object was expected, not {type(value).__name__}")
    return value


def read_users_json(path: str):
    """Read a JSON file that a person wrote, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read; names it.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except RecursionError:
        reason = "too many brackets within brackets"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise ValueError(f"{path} cannot be read as JSON: {reason}")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = [lines[0], ["-" * max(width, 3) for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


# ---------------------------------------------------------------- interruptions


class Interruption:
    """Turns signals into a flag, `status`, that a training loop reads between two steps.

    A context manager: the handlers of before come back after it. What was ignored before stays so,
    as SIGHUP under nohup. In a thread other than Python's main one it takes no signals.
    """

    STATUS = {
        number: 128 + number
        for number in (
            signal.SIGINT, signal.SIGTERM,
            signal.SIGHUP,  # the terminal was closed
            signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,  # schedulers, before a job's time ends
        )
    }  # fmt: skip

    def __init__(self):
        self.status = 0
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self.STATUS}
            self._wakeup = signal.set_wakeup_fd(self._wakeup_descriptor())
        for number, before in self._before.items():
            # Said again of what is ignored: TensorFlow may have taken it in between.
            signal.signal(number, before if before == signal.SIG_IGN else self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)

    def _wakeup_descriptor(self) -> int:
        return -1

    def _note(self, number, _frame) -> None:
        if self.status and number == signal.SIGINT:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        # Others come twice of themselves: from a shell and its terminal, from `timeout`, ...
        self.status = self.status or self.STATUS[number]


class Ending(Interruption):
    """Turns the first of these signals into KeyboardInterrupt, with the signal's number.

    TensorFlow lets no exception in while it computes or waits for another machine: where that
    takes longer than `GRACE` seconds, the process ends without.
    """

    GRACE = 5

    def __init__(self):
        super().__init__()
        self._over = False

    def __exit__(self, *_) -> None:
        self._over = True
        super().__exit__()
        if self._before:
            os.close(self._writer)

    def _wakeup_descriptor(self) -> int:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._wait, args=(reader,), daemon=True).start()
        return self._writer

    def _wait(self, reader: int) -> None:
        """End the process some time after a signal, whose number comes through a pipe."""
        with open(reader, "rb", buffering=0) as pipe:
            number = pipe.read(1)
        if number:
            time.sleep(self.GRACE)
        if number and not self._over:
            print(ended_by(number[0]), file=sys.stderr)
            os._exit(self.STATUS[number[0]])

    def _note(self, number, _frame) -> None:
        if not self.status:
            self.status = self.STATUS[number]
            raise KeyboardInterrupt(number)


def ended_by(number: int) -> str:
    """The line that a program ends with after a signal."""
    words = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"{program()}: interrupted{words}"


if is_command():
    prepare()
