"""Processes of their own for what the benchmark times: each loads nothing but what it runs.

multiprocessing.Process would import the main module in each, and so TensorFlow beside PyTorch,
whose peak memory would then be that of both.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence


class TimedProcess:
    """Something that is timed again and again, in a process of its own.

    Args:
        make: returns `step()`, which does the work and waits for its end, and a dictionary of what
            else there is to tell; a function of a module, with its arguments.
        threads: of one of TensorFlow's operations, and operations at once; None leaves both to it.

    Raises:
        ValueError: what the process said when it failed.
    """

    def __init__(self, make: Callable, *args, threads: tuple[int, int] | None = None):
        self._pipe, theirs = multiprocessing.Pipe()
        command = [sys.executable, os.path.abspath(__file__)]
        self._process = subprocess.Popen(command, stdin=theirs.fileno())
        theirs.close()
        try:
            self.about = self._ask((make.__module__, make.__name__, args, threads))
        except BaseException:
            self.__exit__()
            raise

    def _ask(self, words):
        try:
            self._pipe.send(words)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise ValueError(
                f"a measured process ended with status {self._process.wait()}: out of memory? "
                "Use a smaller --batch_size or --k"
            ) from None
        if isinstance(answer, Exception):
            raise ValueError(f"could not measure it: {answer}") from answer
        return answer

    def seconds(self) -> float:
        """Time of one step."""
        return self._ask("step")

    def stats(self) -> dict:
        """What there is to tell by now: `about`, and the peak memory in bytes."""
        return self._ask("tell")

    def __enter__(self) -> TimedProcess:
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # in the middle of a long step
            self._process.wait()


def compare(baseline: TimedProcess, other: TimedProcess, repeats: int) -> dict[str, float]:
    """Turns of both: medians of their seconds and of baseline / other, turn by turn."""
    turns = [(baseline.seconds(), other.seconds()) for _ in range(repeats)]
    return {
        "seconds": statistics.median(of_other for _, of_other in turns),
        "baseline_seconds": statistics.median(of_baseline for of_baseline, _ in turns),
        "speedup": statistics.median(of_baseline / of_other for of_baseline, of_other in turns),
    }


# ---------------------------------------------------------------- the other side


def main() -> None:
    """The timed process; it ends when the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's to answer
    pipe = multiprocessing.connection.Connection(sys.stdin.fileno())
    try:
        module, name, args, threads = pipe.recv()
        here = os.path.dirname(os.path.realpath(__file__))
        sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if path != here)]
        make = getattr(importlib.import_module(module), name)
        if threads:
            from utils import tf

            tf.config.threading.set_intra_op_parallelism_threads(threads[0])
            tf.config.threading.set_inter_op_parallelism_threads(threads[1])
        idle = _peak_memory()
        step, about = make(*args)
        step()  # compiles
        about["first_step_seconds"] = time.time() - _started_at()
        step()
        pipe.send(about)
        while True:
            if pipe.recv() == "tell":
                peak = _peak_on_gpus(about.get("devices")) or _peak_memory()
                pipe.send(about | {"peak_memory": peak, "idle_memory": idle})
            else:
                start = time.perf_counter()
                step()
                pipe.send(time.perf_counter() - start)
    except (EOFError, BrokenPipeError):
        pass  # the other side has seen enough
    except Exception as error:
        words = " ".join(str(error).split()) or repr(error)
        pipe.send(ValueError(textwrap.shorten(words, 400)))


def _peak_memory() -> int:
    """Bytes that this process had at most."""
    with open("/proc/self/status") as status:  # resource.getrusage counts the parent's in
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _peak_on_gpus(devices: Sequence[str] | None) -> int:
    """Bytes that the fullest GPU had at most, of these devices or of all; 0 without any."""
    if "torch" in sys.modules:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if "tensorflow" not in sys.modules:
        return 0
    from utils import tf

    if devices is None:
        devices = [f"/GPU:{n}" for n in range(len(tf.config.list_physical_devices("GPU")))]
    names = [name.removeprefix("/") for name in devices if "GPU" in name.upper()]
    peaks = [tf.config.experimental.get_memory_info(name)["peak"] for name in names]
    return max(peaks, default=0)


def _started_at() -> float:
    """When this process started, in seconds since the epoch; now, where that is not told."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return time.time() - float(uptime.read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time()


if __name__ == "__main__":
    main()
