"""What surrounds a process: its output, its signals, proxies, TF_CONFIG; with the real scripts."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, free_port, inside, python, train_flags, write_data

from parallel import devices
import train
import rundir
import utils

SIGNALS = sorted(utils.Interruption.STATUS)
ENDLESS = {"max_steps": 100000, "display": 1, "checkpoint_interval": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    counts = {"train": 60, "val": 20, "train_val": 80, "test": 20}
    return write_data(tmp_path_factory.mktemp("data") / "set", counts)


def start(script, *flags, **settings):
    command = [sys.executable, os.path.join(ROOT, script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | settings)


@contextlib.contextmanager
def ended(*processes):
    """Leave none of them running."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def newest(run):
    return max(rundir.checkpoint_steps(str(run)), default=0)


# ---------------------------------------------------------------- output


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run whose log's disk was full; and what it said of that."""
    run = tmp_path_factory.mktemp("full") / "run"
    with open("/dev/full", "w") as full:
        process = start("train.py", *train_flags("baseline", run, data), stdout=full)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return run, error


def test_a_full_disk_under_the_log_costs_the_log_only(trained):
    run, error = trained
    assert error.startswith("train.py: what it prints is lost from here on (No space left")
    assert error.count("\n") == 1
    assert utils.read_json(run / "result.json")["step"] == 6 == newest(run)


def test_results_are_written_where_nothing_can_be_printed(trained, data):
    run, _ = trained
    flags = f"--checkpoint {run} --data_dir {data}"
    for streams, folder in [
        (">/dev/full 2>&1", run / "full"),
        (">&- 2>&- <&-", run / "closed"),
    ]:
        command = f"exec {sys.executable} {ROOT}/eval.py {flags} --eval_dir {folder} {streams}"
        done = subprocess.run(["sh", "-c", command], timeout=600)
        assert done.returncode == 0
        assert utils.read_json(folder / "result.json")["num_examples"] == 20


def test_every_command_prints_into_what_may_end(trained, data, tmp_path):
    with open("/dev/full", "w") as full:
        for script, flags, written in [
            ("report", [trained[0], "--data_dir", data], trained[0] / "report.html"),
            ("train.py", ["--help"], None),
        ]:
            process = start(script, *flags, stdout=full, stderr=full)
            assert process.wait(timeout=600) == 0
            assert written is None or written.exists()


def test_output_that_cannot_be_encoded_or_waits(monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # is put back after it
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        utils._guard_streams()
        read = []
        thread = threading.Thread(target=lambda: read.append(open(reader).read()))  # noqa: SIM115
        timer = threading.Timer(0.5, thread.start)
        timer.start()
        for _ in range(10000):  # more than a pipe holds
            utils.say("runs/\N{GREEK SMALL LETTER ALPHA}")
    timer.join()
    thread.join()
    assert read[0] == "runs/\\u03b1\n" * 10000


def test_a_closed_terminal_under_nohup_and_a_schedulers_warning(data, tmp_path):
    """Progress has nowhere to go, SIGHUP was ignored, and SIGXCPU comes twice: it saves once."""
    run, (terminal, other) = tmp_path / "run", pty.openpty()
    process = start(
        "train.py", *train_flags("baseline", run, data, **ENDLESS), stdout=other, stderr=other,
        stdin=other, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    with ended(process):
        os.close(other)
        wait_for(lambda: newest(run) > 1, process)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        reached = newest(run)
        wait_for(lambda: newest(run) > reached + 1, process)
        process.send_signal(signal.SIGXCPU)
        process.send_signal(signal.SIGXCPU)
        assert process.wait(timeout=600) == 128 + signal.SIGXCPU


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_and_their_handlers_come_back(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with utils.Interruption() as interruption:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.status == 128 + number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped, utils.Ending():
        os.kill(os.getpid(), number)
    assert stopped.value.args == (number,)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_ignored_signals_stay_ignored_and_threads_take_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with utils.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.status == 0
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def use():
        with utils.Interruption(), utils.Ending():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [before]


MEET = """
import utils
utils.is_command = lambda: True  # quiet, as a script of ours is
from parallel import cluster, devices
cluster.PATIENCE = 2
devices.strategy([])
"""
STUCK = """
import ctypes
import utils
utils.is_command = lambda: True  # quiet, as a script of ours is
utils.Ending.GRACE = 1
utils.run_main(lambda _: print("here", flush=True) or ctypes.CDLL(None).select(0, *[None] * 4))
"""
IMPORT = """
import os, signal
def state():
    files = [(n, os.readlink(f"/proc/self/fd/{n}")) for n in (0, 1, 2)]
    return files, [signal.getsignal(n) for n in range(1, signal.NSIG)]
before = state()
import train, training.loop, eval, report.__main__, experiments.tables
assert state() == before
"""


def test_a_signal_ends_what_tensorflow_does_not_give_back():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with ended(process):
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGUSR2)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGUSR2
    assert error == "-c: interrupted by SIGUSR2\n"


def test_importing_takes_no_signals_and_no_files():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- other machines


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that takes every connection and never answers, as a company's may."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            for spelled in (name, name.upper()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


def test_a_cluster_behind_a_proxy(proxy, trained, data):
    port = free_port()
    worker = start("eval.py", "--worker", port)
    with ended(worker):
        assert worker.stdout.readline().startswith("serving")
        flags = ["--checkpoint", trained[0], "--data_dir", data, "--eval_dir", trained[0] / "far"]
        done = python("eval.py", *flags, "--cluster", f"127.0.0.1:{port}")
        assert done.returncode == 0, done.stderr
        worker.send_signal(signal.SIGTERM)
        _, error = worker.communicate(timeout=600)
    assert (worker.returncode, error) == (143, "eval.py: interrupted by SIGTERM\n")


def workers(cluster, tasks, *flags):
    return [
        start("train.py", *flags, env=os.environ | {"TF_CONFIG": json.dumps(
            {"cluster": cluster, "task": {"type": kind, "index": index}})})
        for kind, index in tasks
    ]  # fmt: skip


def test_a_chief_and_its_worker_behind_a_proxy(proxy, data, tmp_path):
    """The chief, not worker 0, writes; both stop at one's SIGUSR1."""
    cluster = {job: [f"127.0.0.1:{free_port()}"] for job in ("worker", "master", "evaluator")}
    flags = train_flags("baseline", tmp_path / "run", data, **ENDLESS)
    worker, chief = workers(cluster, [("worker", 0), ("master", 0)], *flags)
    with ended(worker, chief):
        waiting = f"waiting for the workers {cluster['master'][0]}, at most 10 minutes\n"
        assert worker.stdout.readline() == waiting
        wait_for(lambda: newest(tmp_path / "run") > 0, chief)
        chief.send_signal(signal.SIGUSR1)
        for process, status in [(chief, 128 + signal.SIGUSR1), (worker, 143)]:
            out, error = process.communicate(timeout=600)
            assert (process.returncode, error) == (status, "") and "interrupted at" in out


def test_waiting_for_a_worker_can_be_ended(data, tmp_path):
    """As long as it is not there; where it is there but does not join, it ends of itself."""
    cluster = {"worker": [f"127.0.0.1:{free_port()}" for _ in range(2)]}
    flags = train_flags("baseline", tmp_path / "run", data)
    (process,) = workers(cluster, [("worker", 0)], *flags)
    with ended(process):
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=600)
    assert (process.returncode, error) == (143, "train.py: interrupted by SIGTERM\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cluster["worker"][1] = f"127.0.0.1:{silent.getsockname()[1]}"
        task = {"type": "worker", "index": 0}
        done = subprocess.run(
            [sys.executable, "-c", MEET],
            env=os.environ | {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})},
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("error:") == 1
    assert "do not come together within 2 seconds" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- TF_CONFIG

ONE = ["a:1"]


@pytest.mark.parametrize("cluster, task, expected", [
    (None, None, None),
    ({}, {}, None),
    (None, {"type": "worker", "index": 0}, None),
    ({"worker": ONE}, None, None),
    ({"worker": ONE}, {"type": "worker", "index": 0}, None),
    ({"chief": ONE, "worker": []}, {"type": "chief", "index": 0}, None),
    ({"master": ONE}, {"type": "master", "index": "0"}, None),
    ({"worker": ONE, "evaluator": ["e:1"]}, {"type": "worker", "index": 0}, None),
    ({"worker": ["a:1", "b:1"]}, {"type": "worker", "index": "1"}, ("worker", 1)),
    ({"chief": ONE, "worker": ["b:1"]}, {"type": "worker", "index": 0}, ("worker", 0)),
    ({"master": ONE, "worker": ["b:1"]}, {"type": "master", "index": 0}, ("chief", 0)),
    ({"worker": ["a:1", "b:1"]}, None, "lacks a type"),
    ({"worker": ["a:1", "b:1"]}, {"type": "worker", "index": -1}, "is not in its cluster"),
    ({"worker": ["a:1", "a:1"]}, {"type": "worker", "index": 0}, "twice"),
    ({"worker": ["a:1", "b"]}, {"type": "worker", "index": 0}, "host:port is expected, got 'b'"),
    ({"worker": "a:1"}, {"type": "worker", "index": 0}, "not a list"),
    ({"worker": ONE, "ps": ["b:1"]}, {"type": "worker", "index": 0}, "no ps jobs here"),
    ({"worker": ONE, "evaluator": ["e:1"]}, {"type": "evaluator", "index": 0}, "run eval.py"),
    ({"chief": ["a:1", "b:1"]}, {"type": "chief", "index": 0}, "more than one chief"),
])  # fmt: skip
def test_clusters_of_tf_config(cluster, task, expected, monkeypatch):
    config = {"cluster": cluster, "task": task, "environment": "cloud"}
    monkeypatch.setenv("TF_CONFIG", json.dumps({k: v for k, v in config.items() if v is not None}))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match="TF_CONFIG cannot be used") as error:
            devices.read_tf_config()
        assert expected in str(error.value)
        return
    found = devices.read_tf_config()
    assert (found and found[1:]) == expected
    flags = train_flags("baseline", "run", "data", jit_compile=True)
    if expected is None:
        assert train.parse_flags(flags).jit_compile
    else:
        with pytest.raises(SystemExit):
            train.parse_flags(flags)


@pytest.mark.parametrize("text", ["", " ", "{}"])
def test_tf_config_without_a_cluster(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert devices.read_tf_config() is None


def test_a_managed_services_tf_config_trains_on_one_machine(data, tmp_path, monkeypatch):
    config = {"cluster": {"chief": ["c:2222"]}, "task": {"type": "chief", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    flags = train_flags("baseline", tmp_path / "run", data, max_steps=1)
    status, out, error = inside("train.py", *flags)
    assert status == 0, error
    assert "training on this machine alone" in out
    assert utils.read_json(tmp_path / "run" / "result.json")["step"] == 1


def test_waiting_for_a_worker_has_an_end(monkeypatch):
    mine, missing = (f"127.0.0.1:{free_port()}" for _ in range(2))
    config = {"cluster": {"worker": [mine, missing]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    monkeypatch.setattr(devices, "START_PATIENCE", 1)
    with pytest.raises(ValueError, match=f"no worker of TF_CONFIG answered at {missing}"):
        devices.strategy([])
