"""A run's plumbing: flags, errors, the run directory, metrics, checkpoints, schedules.

Import this module before the others: it loads TensorFlow in the right surroundings (`runtime`), for
which the others would be too late.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import fcntl
import functools
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import runtime

if runtime.is_command():
    runtime.prepare()
with runtime.surroundings():
    try:
        import numpy as np
        import tensorflow as tf
        from tensorflow.python.util import _pywrap_util_port
    except ImportError as error:
        if not runtime.is_command():
            raise
        runtime.fail(f"TensorFlow cannot be loaded ({error})")

CHECKPOINT = "model.ckpt"
UNFINISHED = "model.ckpt-unfinished"  # folder of a checkpoint that is being written or removed
NOTHING_SAVED = "no-checkpoint-yet"  # file of a run up to its first checkpoint


# ---------------------------------------------------------------- flags and errors


class FlagParser(argparse.ArgumentParser):
    """Flags only, spelled out; every mistake is one line that names the fix.

    Flags that are `needed` are asked for after the others were read, so that a misspelled one is
    not reported as missing.
    """

    def __init__(self, doc: str | None, needed: Sequence[str] = ()):
        super().__init__(
            description=(doc or "").partition("\n")[0],  # `python -OO` leaves docstrings out
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
        holds = np.isfinite(result)
        holds &= (low is None or result >= low) and (high is None or result <= high)
        holds &= (above is None or result > above) and (below is None or result < below)
        if not holds:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
        return result

    return convert


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


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a script; what goes wrong in a foreseen way ends in one line and status 1.

    A signal ends it in one line too, with status 128 + its number. What cannot be printed ends
    nothing.
    """
    name = os.path.basename(sys.argv[0])
    _guard_streams()
    try:
        with Ending():
            status = main(sys.argv[1:])
    except (ValueError, OSError, tf.errors.OpError) as error:
        message = " ".join(str(error).split())
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
            name = os.path.basename(sys.argv[0])
            reason = f"{name}: what it prints is lost from here on ({error.strerror})"
            print(f"{reason}; it goes on without", file=sys.stderr)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise ValueError that names what was to be written: a full disk's own error does not."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} cannot be written ({reason}): make room there, or make it writable, and run "
            "the same command again"
        ) from None


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator:
    """Open a file that appears whole under its name or not at all, whoever else writes it."""
    folder, name = os.path.split(path)  # a name may be as long as names can be
    temporary = os.path.join(folder, f"{name[:50]}.{os.getpid()}.part")
    encoding = None if "b" in mode else "utf-8"
    try:
        with writing(path):
            with open(temporary, mode, encoding=encoding) as file:
                yield file
                file.flush()
                _sync(file)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _sync(file) -> None:
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


def read_metrics(directory: str) -> list[dict]:
    """The records of a run's metrics.jsonl, each with its `step`; none where there is no file."""
    records = []
    with (
        contextlib.suppress(FileNotFoundError),
        open(os.path.join(directory, "metrics.jsonl"), "rb") as file,
    ):
        for line in file:
            # The last line of a killed run may be cut, or anything after a crash of the machine.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                if isinstance(record["step"], int):
                    records.append(record)
    return records


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = [lines[0], ["-" * max(width, 3) for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


# ---------------------------------------------------------------- what ran where


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "onednn": "on" if _pywrap_util_port.IsMklEnabled() else "off",
        "git": git_revision(),
    }


def git_revision() -> str:
    """Commit of this code, `-dirty` if it was changed since; empty outside a checkout of its own.

    That is also where git refuses to read it (safe.directory), and where the code was unpacked
    without its history inside another repository.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    # Not the repository that the caller is in, as in a hook. Configuration stays.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")
    }

    def git(*words: str) -> str:
        command = ["git", "-C", here, *words]
        done = subprocess.run(command, capture_output=True, timeout=10, env=environment)
        return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        own = top and os.path.realpath(top) == here
        return git("describe", "--always", "--dirty", "--abbrev=40") if own else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def num_cores() -> int:
    """Cores that this process may use; where the system does not tell, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Flags of /proc/cpuinfo that tell how fast convolutions are, the best first, with usual names.
INSTRUCTION_SETS = {
    "amx_tile": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512f": "avx512",
    "avx_vnni": "avx2_vnni",
    "avx2": "avx2",
    "avx": "avx",
    "sse4_2": "sse4_2",
    "sve": "sve",
    "asimd": "neon",
}


def instruction_set(cpuinfo: str) -> str:
    """The best of INSTRUCTION_SETS that /proc/cpuinfo's text tells of; empty without any."""
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return next((title for flag, title in INSTRUCTION_SETS.items() if flag in words), "")


def hardware() -> str:
    """The processor, its instruction set, its cores and the GPUs, for a table's caption."""
    cpuinfo = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpuinfo = file.read()
    name = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    name = name[1] if name else platform.processor() or platform.machine()
    sets = [instruction_set(cpuinfo)]
    # A limit that a person set leaves less of it; oneDNN reads both names.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default"
    if limit.lower() not in ("default", "all"):
        sets.append(f"oneDNN up to {limit.lower()}")
    known = ", ".join(filter(None, sets))
    cores = num_cores()
    parts = [f"{name} ({known})" if known else name, f"{cores} core{'s' if cores > 1 else ''}"]
    for gpu in tf.config.list_physical_devices("GPU"):
        parts.append(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))
    return ", ".join(parts)


# ---------------------------------------------------------------- schedules


def stepwise(
    step: int, steps_per_epoch: float, initial: float, factor: float, epochs: Sequence[float]
) -> float:
    """Learning rate or gamma2 of step `step` (from 0): `initial`, times `factor` for each epoch
    of `epochs` that has come."""
    return initial * factor ** sum(step >= epoch * steps_per_epoch for epoch in epochs)


# ---------------------------------------------------------------- checkpoints


def checkpoint_steps(directory: str) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending."""
    steps = _steps_of_any_file(directory)
    return [step for step in steps if not _missing(checkpoint_path(directory, step))]


def half_checkpoints(directory: str) -> list[str]:
    """What looks like a checkpoint in a directory and lacks a file: each in words, oldest first."""
    paths = [checkpoint_path(directory, step) for step in _steps_of_any_file(directory)]
    return [f"{path}: it lacks {_words(_missing(path))}" for path in paths if _missing(path)]


def _steps_of_any_file(directory: str) -> list[int]:
    pattern = re.compile(re.escape(CHECKPOINT) + r"-(0|[1-9][0-9]*)\.(index|data).*")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted({int(match.group(1)) for match in map(pattern.fullmatch, names) if match})


def _missing(path: str) -> list[str]:
    """Those of a checkpoint's two files that are not there."""
    return [file for file in (_data_file(path), _index_file(path)) if not os.path.exists(file)]


def _words(missing: Sequence[str]) -> str:
    return " and ".join(map(os.path.basename, missing))


def checkpoint_path(directory: str, step: int) -> str:
    """`directory/model.ckpt-STEP`, which is what flags name."""
    return os.path.join(directory, f"{CHECKPOINT}-{step}")


def _data_file(path: str) -> str:
    return f"{path}.data-00000-of-00001"


def _index_file(path: str) -> str:
    return f"{path}.index"


def find_checkpoint(path: str) -> str:
    """The checkpoint that a flag names: `.../model.ckpt-STEP`, or the newest of a run directory.

    Prints which ones it passes over there because a file of theirs is missing.

    Raises:
        ValueError: there is none.
    """
    if os.path.isdir(path):
        steps, halves = checkpoint_steps(path), half_checkpoints(path)
        if steps:
            for half in halves:
                say(f"ignoring {half}")
            return checkpoint_path(path, steps[-1])
        if halves:
            raise ValueError(f"no checkpoint {halves[-1]}: copy that as well, or name another run")
        path = os.path.join(path, f"{CHECKPOINT}-*")
    path = path.removesuffix(".index")
    missing = _missing(path)
    if len(missing) == 1:
        raise ValueError(
            f"no checkpoint {path}: it lacks {_words(missing)}: copy that as well, or name another "
            "checkpoint"
        )
    if missing:
        raise ValueError(
            f"no checkpoint {path}: name a run directory that holds model.ckpt-STEP files, or one "
            "of them without its .index or .data ending"
        )
    return path


@contextlib.contextmanager
def plain_name(path: str) -> Iterator[str]:
    """Another name of a checkpoint, under which TensorFlow finds it whatever its folder is called.

    TensorFlow reads a checkpoint only if its name, taken for a pattern, matches itself, which one
    with brackets or a backslash does not; and it knows no way to escape them.

    Raises:
        ValueError: there is no such name.
        OSError: a file of the checkpoint cannot be opened.
    """
    for file in (_index_file(path), _data_file(path)):
        try:
            open(file, "rb").close()
        except OSError as error:  # TensorFlow would report damage
            raise OSError(f"{file} cannot be read ({error.strerror}): make it readable") from None
    folder, name = os.path.split(path)
    opened = os.open(folder or ".", os.O_RDONLY)
    try:
        link = f"/proc/self/fd/{opened}"  # Linux has it
        plain = os.path.join(link if os.path.isdir(link) else folder, name)
        if re.search(r"[\[\\]", plain):
            raise ValueError(
                f"TensorFlow cannot read {path} under a name with [ or \\: rename it, or name a "
                "link to it"
            )
        yield plain
    finally:
        os.close(opened)


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, ours or TensorFlow 1's, by its plain name.

    Ours have names such as `net/unit_1_0/conv_1/kernel`, TensorFlow 1's lack the `net/`.

    Raises:
        ValueError: it cannot be read; says what failed.
    """
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    with plain_name(path) as plain:
        try:
            reader = tf.train.load_checkpoint(plain)
            return {
                name.removesuffix(suffix).replace(".S", "/"): reader.get_tensor(name)
                for name in reader.get_variable_to_shape_map()
                if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
            }
        except (tf.errors.OpError, RuntimeError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split()).replace(plain, path)
            raise ValueError(f"checkpoint {path} is torn or damaged ({reason})") from None


# ---------------------------------------------------------------- the run directory


class Run:
    """A run's directory: config.json, metrics.jsonl, model.ckpt-STEP, result.json, event files.

    One process at a time: the lock is the operating system's, so that a killed run leaves none
    behind.

    Args:
        directory: made if it is missing.
        keep: how many of the newest checkpoints stay, besides the best by validation.
    """

    def __init__(self, directory: str, keep: int = 3):
        self.directory, self.keep = directory, keep
        self.metrics: list[dict] = []
        self._events = None
        self._new = not os.path.exists(directory)
        try:
            os.makedirs(directory, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.stat(self.path(f"{UNFINISHED}/{'x' * 120}"))  # is there room for long names?
            self._lock = open(self.path("lock"), "w")  # noqa: SIM115, held as long as the run
        except OSError as error:
            raise ValueError(
                f"{directory} cannot be used as a run directory ({error.strerror}): name another "
                "--train_dir, or make room there or make it writable"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is using {directory}: wait for it, end it, or name another "
                "--train_dir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            say(f"{directory} cannot be locked ({error.strerror}): let no other run use it")

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def write(self, name: str, value: dict) -> None:
        """A JSON file of the run, atomically."""
        write_json(self.path(name), value)

    def close(self) -> None:
        if self._events is not None:
            with writing(self.directory):
                self._events.close()
        if self._new and os.listdir(self.directory) == ["lock"]:  # refused before it began
            os.remove(self.path("lock"))
            os.rmdir(self.directory)
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def check_nothing_lost(self) -> None:
        """Raise ValueError where a run left results, but no checkpoint that it could go on from.

        One that was stopped before its first checkpoint says so by NOTHING_SAVED.
        """
        left = half_checkpoints(self.directory)
        if not left and not os.path.exists(self.path(NOTHING_SAVED)):
            left = ["it has metrics.jsonl"] if read_metrics(self.directory) else []
            left += ["it has result.json"] if os.path.exists(self.path("result.json")) else []
        if left:
            raise ValueError(
                f"{self.directory} is of a run, but holds no whole checkpoint ({'; '.join(left)}): "
                "copy what is missing (model.ckpt-STEP.index and .data-00000-of-00001) to go on; "
                "to start anew, name another --train_dir or move this folder away"
            )

    # metrics

    def begin(self) -> None:
        """No metrics yet, nor a checkpoint."""
        with writing(self.path(NOTHING_SAVED)), open(self.path(NOTHING_SAVED), "w"):
            pass
        self.resume_metrics(-1)

    def resume_metrics(self, step: int) -> None:
        """Keep the metrics up to `step`; drop what was logged beyond that checkpoint."""
        self.read_metrics(step)
        with atomic_write(self.path("metrics.jsonl")) as file:
            file.writelines(json.dumps(record) + "\n" for record in self.metrics)

    def read_metrics(self, step: int) -> None:
        """The metrics up to `step`."""
        self.metrics = [record for record in read_metrics(self.directory) if record["step"] <= step]

    def log(self, step: int, **values) -> None:
        """Append a line to metrics.jsonl; its numbers to event files if TensorBoard is there."""
        record = {"step": step} | values
        self.metrics.append(record)
        path = self.path("metrics.jsonl")
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._log_events(step, values)

    def _log_events(self, step: int, values: dict[str, float]) -> None:
        writer = self._writer()
        if writer is None:
            return
        with writing(self.directory), writer.as_default(step):
            for name, value in values.items():
                if isinstance(value, int | float):
                    tf.summary.scalar(name, value)
            writer.flush()

    def log_pictures(self, step: int, draw: Callable[[], dict]) -> None:
        """The matplotlib figures that `draw` makes, by name, to TensorBoard; nothing without it."""
        writer = self._writer()
        if writer is None:
            return
        with writing(self.directory), writer.as_default(step):
            for name, figure in draw().items():
                file = io.BytesIO()
                figure.savefig(file, format="png")
                tf.summary.image(name, tf.io.decode_png(file.getvalue(), channels=3)[None])
            writer.flush()

    def _writer(self):
        """Of event files; None where TensorBoard is not installed, which summaries need."""
        if self._events is None and has_summaries():
            with writing(self.directory):
                self._events = tf.summary.create_file_writer(self.directory)
        return self._events

    def best(self, key: str = "val_accuracy") -> tuple[int, float] | None:
        """(step, value) of the largest logged value, the earliest of equals."""
        records = [record for record in self.metrics if key in record]
        if not records:
            return None
        record = max(records, key=lambda r: (r[key], -r["step"]))
        return record["step"], record[key]

    # checkpoints

    def save(self, checkpoint: tf.train.Checkpoint, step: int) -> str:
        """Write `model.ckpt-STEP`, whole or not at all, and remove the ones that are not kept."""
        path, part = checkpoint_path(self.directory, step), self.path(UNFINISHED)
        try:
            shutil.rmtree(part, ignore_errors=True)
            os.mkdir(part)
            written = checkpoint.write(checkpoint_path(part, step))
            for file_of in (_data_file, _index_file):
                with open(file_of(written), "rb") as file:
                    _sync(file)
            # The index comes last: `discard_torn` can tell from it what was moved.
            for file_of in (_data_file, _index_file):
                os.replace(file_of(written), file_of(path))
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(NOTHING_SAVED))
            self._remove_old(step)
        except (OSError, tf.errors.OpError) as error:
            last = checkpoint_steps(self.directory)[-1:]
            raise ValueError(
                f"the checkpoint of step {step} cannot be written to {self.directory} ({error}); "
                f"the last good one is of step {last[0] if last else 'none'}: make room and run "
                "the same command again"
            ) from None
        finally:
            self.discard_torn()
        return path

    def _remove_old(self, step: int) -> None:
        """Remove the checkpoints before `step` that are not kept."""
        best, unfinished = self.best(), self.path(UNFINISHED)
        # A damaged later one, passed over when this run began, is not what is to be kept.
        steps = [old for old in checkpoint_steps(self.directory) if old <= step]
        for old in steps[: -self.keep]:
            if best is None or old != best[0]:
                path = checkpoint_path(self.directory, old)
                os.replace(_index_file(path), _index_file(checkpoint_path(unfinished, old)))
                os.remove(_data_file(path))

    def discard_torn(self) -> list[str]:
        """Remove what a killed run left of a checkpoint that it was writing; names it.

        Where only the index had still to be moved, or was moved to remove the checkpoint, it joins
        its data again: half a checkpoint is never this program's doing.
        """
        folder = self.path(UNFINISHED)
        if not os.path.isdir(folder):
            return []
        torn = [folder]
        for step in _steps_of_any_file(folder):
            part, path = (checkpoint_path(d, step) for d in (folder, self.directory))
            if _missing(part) == [_data_file(part)] and os.path.exists(_data_file(path)):
                os.replace(_index_file(part), _index_file(path))
                torn = []
        shutil.rmtree(folder, ignore_errors=True)
        return torn


@functools.cache
def has_summaries() -> bool:
    """Whether TensorBoard is there with what tf.summary uses of it, not a folder of its name."""
    try:
        from tensorboard.summary.v2 import image, scalar  # noqa: F401
    except Exception:  # one that does not fit TensorFlow may raise anything
        return False
    return True


class Follower(Run):
    """A run as a worker sees it that is not its chief: it reads what the chief wrote."""

    def __init__(self, directory: str, keep: int = 3):
        self.directory, self.keep, self.metrics = directory, keep, []

    def write(self, name: str, value: dict) -> None:
        pass

    def close(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def resume_metrics(self, step: int) -> None:
        self.read_metrics(step)

    def log(self, step: int, **values) -> None:
        self.metrics.append({"step": step} | values)

    def log_pictures(self, step: int, draw: Callable[[], dict]) -> None:
        pass

    def save(self, checkpoint: tf.train.Checkpoint, step: int) -> str:
        return checkpoint_path(self.directory, step)

    def discard_torn(self) -> list[str]:
        return []


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
    return f"{os.path.basename(sys.argv[0])}: interrupted{words}"
