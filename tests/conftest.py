"""Shared by the tests: small data sets, networks with random numbers, scripts as processes."""

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
REAL_ARCHIVE = os.environ.get(  # as in quickstart.sh
    "CIFAR100_ARCHIVE", os.path.join(ROOT, "../shared/data/cifar-100-python.tar.xz")
)

# One thread adds in another order than several. In the second reference step of a network a ReLU
# has an input of +-1e-6, whose sign such rounding decides: with several it is the reference's.
if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")

import forkserver  # noqa: E402
import utils  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# .ci/run gives some files to the system's Python as well, without TensorFlow.
NO_TENSORFLOW = "TensorFlow is not installed"
needs_tensorflow = pytest.mark.skipif(not utils.is_installed("tensorflow"), reason=NO_TENSORFLOW)

# As in the foreground: `nohup` and `&` have some ignored, which processes started here inherit.
for number in utils.Interruption.STATUS:
    if signal.getsignal(number) == signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


LONGEST = (
    "test_experiments", "test_distribute", "test_benchmark", "test_surroundings", "test_processes",
    "test_synthetic",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that all processes end at about the same time."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(LONGEST)))


def pytest_collection_finish():
    """What has been imported stays: no need to look through it for garbage again and again."""
    gc.freeze()


def randomize(net, seed=0, groups=None):
    """Random weights and statistics; alphas that put features into random, unequal groups."""
    rng = np.random.default_rng(seed)
    for variable in net.variables:
        values = rng.normal(size=variable.shape)
        name = variable.name
        if "sigma" in name or "gamma" in name:
            values = 0.5 + np.abs(values)
        elif "kernel" in name or "weights" in name:
            values /= np.sqrt(np.prod(variable.shape[:-1]))
        elif "alpha" in name:
            values = 4.0 * one_hot_groups(rng, *variable.shape) + 0.1 * values
        variable.assign(values)
    return net


def one_hot_groups(rng, num_groups, size):
    """[G, D] with unequal groups, none of them empty."""
    shares = rng.dirichlet(np.full(num_groups, 2.0))
    of = rng.choice(num_groups, size=size, p=shares)
    of[rng.permutation(size)[:num_groups]] = np.arange(num_groups)
    return np.eye(num_groups)[of].T


def grouped_net(groups, k=1, seed=0, **settings):
    import resnet  # which loads TensorFlow

    return randomize(resnet.ResNet(resnet.NetworkConfig(k=k, groups=groups, **settings)), seed)


def images(count=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 32, 32, 3)).astype(np.float32)


def write_data(path, counts, seed=0):
    """A data set of random images in the files of download_cifar100.py."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        pictures = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.savez(
            path / f"{split}.npz", images=pictures, labels=np.arange(count, dtype=np.int32) % 100
        )
    description = {
        "dataset": "synthetic",
        "seed": seed,
        "counts": counts,
        "class_names": [f"class{c}" for c in range(100)],
        "superclass_names": [f"super{c}" for c in range(20)],
        "superclass_of_class": [c // 5 for c in range(100)],
    }
    (path / "split.json").write_text(json.dumps(description))
    return str(path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    counts = {"train": 300, "val": 130, "train_val": 430, "test": 230}
    return write_data(tmp_path_factory.mktemp("data"), counts)


def stand_in():
    """The path of what runs programs in forks of a process with TensorFlow."""
    if not utils.is_installed("tensorflow"):
        pytest.skip(NO_TENSORFLOW)
    return forkserver.start()


def python(script, *flags, fork=None, **settings):
    """Run a script of the project as a user does; the finished process, with its output as text.

    In a fork of a process that has loaded TensorFlow, unless there are `settings`, which may be
    meant for its start.
    """
    interpreter = stand_in() if fork or (fork is None and not settings) else sys.executable
    command = [interpreter, os.path.join(ROOT, script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **settings)


def run_script(script, *words, check=True, **environment):
    """Run a shell script of the project with words and environment variables of its own."""
    if "PYTHON" not in environment:
        environment["PYTHON"] = stand_in()
    done = subprocess.run(
        [os.path.join(ROOT, script), *map(str, words)],
        capture_output=True, text=True, env=os.environ | environment, timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def inside(script, *flags):
    """The same within this process, which saves loading TensorFlow: (status, stdout, stderr)."""
    name = script.removesuffix(".py").replace("/", ".")
    handlers = {n: signal.getsignal(n) for n in utils.Interruption.STATUS}
    out, error, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        module = importlib.import_module(name if script.endswith(".py") else f"{name}.__main__")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            utils.run_main(module.main)
    except ModuleNotFoundError as missing:
        if missing.name == "tensorflow":
            pytest.skip(NO_TENSORFLOW)
        raise
    except SystemExit as stopped:
        return stopped.code, out.getvalue(), error.getvalue()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def fails(script, *flags, says, status=1):
    """Check that a command fails as it should: one line that says why, no traceback."""
    code, _, error = inside(script, *flags)
    assert code == status
    assert error.count("\n") == 1 and error.startswith(f"{os.path.basename(script)}: error: "), (
        error
    )
    for text in [says] if isinstance(says, str) else says:
        assert text in error
    return error


def free_port():
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_flags(stage, train_dir, data_dir, **flags):
    """Flags of a tiny run of train.py."""
    values = {
        "stage": stage, "train_dir": train_dir, "data_dir": data_dir, "k": 1,
        "num_residual_units": 1, "batch_size": 20, "max_steps": 6, "display": 2,
        "val_interval": 3, "checkpoint_interval": 2,
    } | flags  # fmt: skip
    if stage == "group":
        values = {"ngroups1": 2, "ngroups2": 2, "ngroups3": 2} | values
    return [f"--{name}={value}" for name, value in values.items()]
