"""A run's plumbing: flags, errors, the run directory, metrics, checkpoints, schedules.

Import this module before the others: it loads TensorFlow without the messages of its start, which
no setting of TensorFlow's own suppresses. Set TF_CPP_MIN_LOG_LEVEL=0 to see them.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fcntl
import glob
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

if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") != "0":
    _stderr = os.dup(2)
    with open(os.devnull, "w") as _null:
        os.dup2(_null.fileno(), 2)
    try:
        import tensorflow as tf
    finally:
        os.dup2(_stderr, 2)
        os.close(_stderr)

import numpy as np
import tensorflow as tf

CHECKPOINT = "model.ckpt"
UNFINISHED = "model.ckpt-unfinished"  # folder of a checkpoint that is being written


# ---------------------------------------------------------------- flags and errors


class FlagParser(argparse.ArgumentParser):
    """Flags only, spelled out; every mistake is one line that names the fix.

    Flags that are `needed` are asked for after the others were read, so that a misspelled one is
    not reported as missing.
    """

    def __init__(self, description: str | None, needed: Sequence[str] = ()):
        super().__init__(
            description=description,
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


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a script; what goes wrong in a foreseen way ends in one line and status 1.

    A signal ends it in one line too, with status 128 + its number. What cannot be printed ends
    nothing.
    """
    name = os.path.basename(sys.argv[0])
    _open_streams()
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


def _open_streams() -> None:
    """Make the standard streams such that printing, and opening files, cannot go wrong."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, as by `>&-`: a file that is opened later would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115, open to the end
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
def atomic_write(path: str, mode: str = "w") -> Iterator:
    """Open a file that appears whole under its name or not at all, whoever else writes it."""
    temporary = f"{path}.{os.getpid()}.part"
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def check_folder(folder: str, flag: str) -> None:
    """Raise ValueError, naming the flag that said it, unless files can be written to a folder."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} does not exist or is read-only: name another --{flag}")


def check_file(path: str, flag: str) -> None:
    """Raise ValueError, naming the flag that said it, unless a file can be written."""
    if os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a folder: name a file in it")
    check_folder(os.path.dirname(path) or ".", flag)


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
        open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as file,
    ):
        for line in file:
            # The last line of a killed run may be cut.
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
        "git": git_revision(),
    }


def git_revision() -> str:
    """Commit of this code, `-dirty` if it was changed since; empty outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def num_cores() -> int:
    """Cores that this process may use; where the system does not tell, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> str:
    """The processor, its cores and the GPUs, for a table's caption."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = re.search(r"model name\s*: (.*)", file.read() + "\nmodel name: " + name).group(1)
    cores = num_cores()
    parts = [f"{name}, {cores} core{'s' if cores > 1 else ''}"]
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
    pattern = re.compile(re.escape(CHECKPOINT) + r"-(\d+)\.index")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = [int(match.group(1)) for match in map(pattern.fullmatch, names) if match]
    return sorted(s for s in steps if os.path.exists(_data_file(checkpoint_path(directory, s))))


def checkpoint_path(directory: str, step: int) -> str:
    """`directory/model.ckpt-STEP`, which is what flags name."""
    return os.path.join(directory, f"{CHECKPOINT}-{step}")


def _data_file(path: str) -> str:
    return f"{path}.data-00000-of-00001"


def _index_file(path: str) -> str:
    return f"{path}.index"


def find_checkpoint(path: str) -> str:
    """The checkpoint that a flag names: `.../model.ckpt-STEP`, or the newest of a run directory.

    Raises:
        ValueError: there is none.
    """
    if os.path.isdir(path):
        steps = checkpoint_steps(path)
        if steps:
            return checkpoint_path(path, steps[-1])
        path = os.path.join(path, f"{CHECKPOINT}-*")
    path = path.removesuffix(".index")
    if not (os.path.exists(_index_file(path)) and os.path.exists(_data_file(path))):
        raise ValueError(
            f"no checkpoint {path}: name a run directory that holds model.ckpt-STEP files, or one "
            "of them without its .index or .data ending"
        )
    return path


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, ours or TensorFlow 1's, by its plain name.

    Ours have names such as `net/unit_1_0/conv_1/kernel`, TensorFlow 1's lack the `net/`.

    Raises:
        ValueError: it cannot be read; says what failed.
    """
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    try:
        reader = tf.train.load_checkpoint(path)
        return {
            name.removesuffix(suffix).replace(".S", "/"): reader.get_tensor(name)
            for name in reader.get_variable_to_shape_map()
            if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
        }
    except (tf.errors.OpError, RuntimeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
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
            self._lock = open(self.path("lock"), "w")  # noqa: SIM115, held as long as the run
        except OSError as error:
            raise ValueError(
                f"{directory} cannot be used as a run directory ({error.strerror}): name another "
                "--train_dir, or make it writable"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is using {directory}: wait for it, end it, or name another "
                "--train_dir"
            ) from None

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def write(self, name: str, value: dict) -> None:
        """A JSON file of the run, atomically."""
        write_json(self.path(name), value)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._new and os.listdir(self.directory) == ["lock"]:  # refused before it began
            os.remove(self.path("lock"))
            os.rmdir(self.directory)
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # metrics

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
        with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._log_events(step, values)

    def _log_events(self, step: int, values: dict[str, float]) -> None:
        writer = self._writer()
        if writer is None:
            return
        with writer.as_default(step):
            for name, value in values.items():
                if isinstance(value, int | float):
                    tf.summary.scalar(name, value)
        writer.flush()

    def log_pictures(self, step: int, draw: Callable[[], dict]) -> None:
        """The matplotlib figures that `draw` makes, by name, to TensorBoard; nothing without it."""
        writer = self._writer()
        if writer is None:
            return
        with writer.as_default(step):
            for name, figure in draw().items():
                file = io.BytesIO()
                figure.savefig(file, format="png")
                tf.summary.image(name, tf.io.decode_png(file.getvalue(), channels=3)[None])
        writer.flush()

    def _writer(self):
        """Of event files; None where TensorBoard is not installed, which summaries need."""
        if self._events is None:
            with contextlib.suppress(ImportError):
                import tensorboard  # noqa: F401

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
            written = checkpoint.write(os.path.join(part, CHECKPOINT))
            # The index comes last: without it a checkpoint does not count as one.
            for file_of in (_data_file, _index_file):
                with open(file_of(written), "rb") as file:
                    os.fsync(file.fileno())
                os.replace(file_of(written), file_of(path))
        except (OSError, tf.errors.OpError) as error:
            last = checkpoint_steps(self.directory)[-1:]
            raise ValueError(
                f"the checkpoint of step {step} cannot be written to {self.directory} ({error}); "
                f"the last good one is of step {last[0] if last else 'none'}: make room and run "
                "the same command again"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        best = self.best()
        # A damaged later one, passed over when this run began, is not what is to be kept.
        steps = [old for old in checkpoint_steps(self.directory) if old <= step]
        for old in steps[: -self.keep]:
            if best is None or old != best[0]:
                self._remove(old)
        return path

    def _remove(self, step: int) -> None:
        path = checkpoint_path(self.directory, step)
        os.remove(_index_file(path))
        os.remove(_data_file(path))

    def discard_torn(self) -> list[str]:
        """Remove what a killed run left of a checkpoint that it was writing; names it."""
        torn = [self.path(UNFINISHED)] if os.path.isdir(self.path(UNFINISHED)) else []
        shutil.rmtree(self.path(UNFINISHED), ignore_errors=True)
        pattern = os.path.join(glob.escape(self.directory), _data_file(f"{CHECKPOINT}-*"))
        for data in glob.glob(pattern):
            path = data.removesuffix(_data_file(""))
            if not os.path.exists(_index_file(path)):
                os.remove(data)
                torn.append(path)
        return torn


class Follower(Run):
    """A run as a worker sees it that is not its chief: it reads what the chief wrote."""

    def __init__(self, directory: str, keep: int = 3):
        self.directory, self.keep, self.metrics = directory, keep, []

    def write(self, name: str, value: dict) -> None:
        pass

    def close(self) -> None:
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
