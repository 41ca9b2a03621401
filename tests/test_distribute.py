"""Training on several devices and on several machines: the same losses as on one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, fails, free_port, inside, python, stand_in, train_flags, write_data

import cifar100
import rundir
import utils

STEPS = 6
COUNTS = {"train": 300, "val": 60}
FLAGS = {"max_steps": STEPS, "display": 1, "checkpoint_interval": 3, "val_interval": 3}
TWO = {"devices": "/CPU:0,/CPU:1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "set", COUNTS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """Metrics of the stages on one device, and the grouped run that stage split starts from."""
    root, found = tmp_path_factory.mktemp("alone"), {}
    for stage, flags in [("group", {}), ("split", {"basemodel": root / "group"})]:
        status, _, error = inside(
            "train.py", *train_flags(stage, root / stage, data, **FLAGS | flags)
        )
        assert status == 0, error
        found[stage] = metrics(root / stage)
    return found, root / "group"


def metrics(run):
    with open(os.path.join(run, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def assert_same(found, expected):
    """The same losses and validations at the same steps, to 1e-4."""
    for name in ("loss", "cross_entropy", "overlap", "val_cross_entropy"):
        mine, others = ({r["step"]: r[name] for r in rs if name in r} for rs in (found, expected))
        assert mine == pytest.approx(others, rel=1e-4), name
    assert [r["step"] for r in found if "loss" in r] == list(range(1, STEPS + 1))


def weights(run, step=STEPS):
    path = rundir.checkpoint_path(str(run), step)
    return {n: t for n, t in rundir.read_checkpoint(path).items() if n != "description"}


def test_shares_are_the_batch():
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8),
        np.arange(50),
    )
    whole = cifar100.training_batches(images, labels.astype(np.int32), 12, 3)
    for number, (batch, targets) in enumerate(whole.take(3)):
        parts = []
        for worker in range(2):
            shares = cifar100.share_out(whole, 4, worker, 2).skip(2 * number).take(2)
            parts += [(x.numpy(), y.numpy()) for x, y in shares]
        assert [len(y) for _, y in parts] == [3] * 4
        np.testing.assert_array_equal(np.concatenate([x for x, _ in parts]), batch)
        np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), targets)


@pytest.mark.parametrize("stage", ["group", "split"])
def test_two_devices_lose_what_one_does(stage, alone, data, tmp_path):
    """Also when stopped in between: the run that went on ends with the same bits."""
    expected, group = alone
    base = {"basemodel": group} if stage == "split" else {}
    for run, ends in [("whole", [STEPS]), ("stopped", [3, STEPS])]:
        for end in ends:
            flags = FLAGS | base | TWO | {"max_steps": end}
            done = python("train.py", *train_flags(stage, tmp_path / run, data, **flags))
            assert done.returncode == 0, done.stderr
    assert_same(metrics(tmp_path / "whole"), expected[stage])
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensor, stopped[name], err_msg=name)


LOSSES_OF_THE_SAME_IMAGES = """
import objective, resnet
from parallel import devices
from utils import tf

strategy = devices.strategy(["/CPU:0", "/CPU:1"])
images, labels = tf.random.stateless_normal([8, 32, 32, 3], [0, 0]), tf.zeros([8], tf.int32)

for keep_prob in (1.0, 0.5):
    config = resnet.NetworkConfig(1, k=1, groups=(2, 2, 2), dropout_keep_prob=keep_prob)
    trainer = objective.Trainer(resnet.ResNet(config), objective.Objective(), {}, strategy)

    @tf.function(autograph=False)
    def step():
        seed = tf.constant([0, 0], tf.int64)
        values = strategy.run(trainer._replica_step, (images, labels, 0.1, 1.0, seed))
        return [value[objective.METRICS.index("cross_entropy")] for value in values.values]

    print(*(float(loss) for loss in step()))
"""


def test_replicas_drop_different_features():
    command = [sys.executable, "-c", LOSSES_OF_THE_SAME_IMAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    kept, dropped = ([float(loss) for loss in line.split()] for line in done.stdout.splitlines())
    assert kept[0] == pytest.approx(kept[1], rel=1e-5)
    assert dropped[0] != pytest.approx(dropped[1], rel=1e-5)


def test_two_devices_train_with_dropout(data, tmp_path):
    flags = FLAGS | TWO | {"max_steps": 1, "dropout_keep_prob": 0.5}
    assert python("train.py", *train_flags("group", tmp_path, data, **flags)).returncode == 0


def test_compiled_steps_lose_the_same(alone, data, tmp_path):
    flags = train_flags("group", tmp_path, data, **FLAGS, jit_compile=True)
    status, _, error = inside("train.py", *flags)
    assert status == 0, error
    assert_same(metrics(tmp_path), alone[0]["group"])


def test_what_is_refused(data, tmp_path):
    run = tmp_path / "run"
    done = python("train.py", *train_flags("group", run, data, **TWO, batch_size=21))
    assert done.returncode == 1 and "multiple of 2" in done.stderr
    fails("train.py", *train_flags("group", run, data, **TWO, jit_compile=True), status=2,
          says="one device")  # fmt: skip
    fails("train.py", *train_flags("group", run, data, devices="/GPU:9"), says="not there")
    assert not run.exists()


# ---------------------------------------------------------------- several machines


def start_workers(run, data, fork=True, **flags):
    """Two processes of train.py that TF_CONFIG joins; `data` may be a folder for each.

    They are forks of one that has loaded TensorFlow, unless they are to get signals.
    """
    cluster = {"worker": [f"127.0.0.1:{free_port()}" for _ in range(2)]}
    command = [stand_in() if fork else sys.executable, os.path.join(ROOT, "train.py")]
    folders = data if isinstance(data, list) else [data, data]
    return [
        subprocess.Popen(
            command + train_flags("group", run, folders[i], **FLAGS | flags),
            env=os.environ
            | {
                "TF_CONFIG": json.dumps(
                    {"cluster": cluster, "task": {"type": "worker", "index": i}}
                )
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ends(workers, timeout=600):
    """(status, stdout, stderr) of each."""
    try:
        said = [worker.communicate(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(w.returncode, *texts) for w, texts in zip(workers, said, strict=True)]


def test_two_machines_lose_what_one_does(alone, data, tmp_path):
    for end in (3, STEPS):
        for status, _, error in ends(start_workers(tmp_path / "run", data, max_steps=end)):
            assert status == 0, error
    assert_same(metrics(tmp_path / "run"), alone[0]["group"])
    assert utils.read_json(tmp_path / "run" / "result.json")["step"] == STEPS


def test_workers_with_other_data_are_refused(data, tmp_path):
    other = write_data(tmp_path / "other", COUNTS)
    description = utils.read_json(os.path.join(other, "split.json"))
    utils.write_json(os.path.join(other, "split.json"), description | {"indices_sha256": "other"})
    for status, _, error in ends(start_workers(tmp_path / "run", [data, other])):
        assert status == 1 and "differ in their flags, their data set" in error, error


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGKILL, 1)])
def test_worker_that_ends_ends_the_run(number, status, data, tmp_path):
    """Interrupted, both save and stop, and go on together; killed, the other says so."""
    run = tmp_path / "run"
    workers = start_workers(run, data, fork=False, max_steps=100000, display=1)
    while not os.path.exists(run / "metrics.jsonl") or not metrics(run):
        assert workers[0].poll() is None, workers[0].communicate()
        time.sleep(0.5)
    workers[1].send_signal(number)
    chief, other = ends(workers, timeout=600)
    assert (chief[0], other[0]) == (status, 143 if number == signal.SIGTERM else -9)
    assert chief[2].count("\n") == (1 if status == 1 else 0), chief[2]
    if status == 1:
        assert "lost another worker" in chief[2]
    else:
        assert "interrupted at step" in chief[1] and rundir.checkpoint_steps(str(run))
        end = rundir.checkpoint_steps(str(run))[-1] + 2
        for status, out, error in ends(start_workers(run, data, max_steps=end)):
            assert status == 0, error
            assert "going on from" in out and f"step {end - 2}\n" in out


TWO_WORKERS = '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}'


@pytest.mark.parametrize(
    "config",
    ["{", "[]", TWO_WORKERS + "}", TWO_WORKERS + ', "task": {"type": "worker", "index": 2}}'],
)
def test_tf_config_that_cannot_be_used(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    fails("train.py", *train_flags("group", tmp_path / "r", data), says="TF_CONFIG cannot be used")
