"""A run's directory: config, metrics, checkpoints, lock; and what ran where."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from utils import atomic_write, is_x86, say, sync, tf, write_json, writing

CHECKPOINT = "model.ckpt"
UNFINISHED = "model.ckpt-unfinished"  # folder of a checkpoint that is being written or removed
NOTHING_SAVED = "no-checkpoint-yet"  # file of a run up to its first checkpoint


# ---------------------------------------------------------------- what ran where


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    version = tf.version.VERSION  # loads TensorFlow
    from tensorflow.python.util import _pywrap_util_port

    return {
        "python": platform.python_version(),
        "tensorflow": version,
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
        return git("describe", "--always", "--exclude=*", "--dirty", "--abbrev=40") if own else ""
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


def _cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return file.read()
    return ""


def _onednn_limit() -> str:
    """The instruction set that a person limited oneDNN to, in lower case; empty without a limit."""
    # oneDNN reads both names.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default"
    return "" if limit.lower() in ("default", "all") else limit.lower()


def _instruction_sets(cpuinfo: str) -> str:
    """The processor's instruction set, and the limit that leaves less of it, in words."""
    limit = _onednn_limit()
    return ", ".join(filter(None, [instruction_set(cpuinfo), limit and f"oneDNN up to {limit}"]))


def slow_precision(precision: str, device: str) -> str:
    """A line that says that a precision may be slower than float32 on a device; empty if not.

    bfloat16 may be where an x86 has no AMX, or oneDNN is kept from it (docs/speed.md).
    """
    cpuinfo, limit = _cpuinfo(), _onednn_limit()
    best = instruction_set(cpuinfo)
    with_amx = best == "amx" and (not limit or "amx" in limit)
    if precision != "bfloat16" or "GPU" in device.upper() or not is_x86() or with_amx or not best:
        return ""
    return (
        "--precision bfloat16 may be slower than float32 on a processor without AMX (this one: "
        f"{_instruction_sets(cpuinfo)}): docs/speed.md"
    )


def hardware() -> str:
    """The processor, its instruction set, its cores and the GPUs, for a table's caption."""
    cpuinfo = _cpuinfo()
    name = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    name = name[1] if name else platform.processor() or platform.machine()
    known = _instruction_sets(cpuinfo)
    cores = num_cores()
    parts = [f"{name} ({known})" if known else name, f"{cores} core{'s' if cores > 1 else ''}"]
    for gpu in tf.config.list_physical_devices("GPU"):
        parts.append(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))
    return ", ".join(parts)


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


# ---------------------------------------------------------------- metrics


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

    def best(self) -> dict[str, float]:
        """`best_step` and `best_accuracy` of validation, the earliest of equals; {} before any."""
        records = [record for record in self.metrics if "val_accuracy" in record]
        if not records:
            return {}
        best = max(records, key=lambda record: (record["val_accuracy"], -record["step"]))
        return {"best_step": best["step"], "best_accuracy": best["val_accuracy"]}

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
                    sync(file)
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
            if old != best.get("best_step"):
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
