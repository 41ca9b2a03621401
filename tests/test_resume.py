"""Runs that are killed, interrupted or find damaged checkpoints, as real processes."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, fails, inside, python, train_flags

import rundir
import utils

STAGES = {
    "baseline": {},
    "group": {
        "dropout_keep_prob": 0.5, "group_lr_scale": 5, "bn_no_scale": True, "nesterov": True,
        "group_equal_growth": True, "label_smoothing": 0.1, "lr_schedule": "linear",
        "lr_warmup_epochs": 0.3, "lr_total_steps": 28, "group_start_epoch": 0.2,
    },
    "split": {
        "dropout_keep_prob": 0.7, "lr_schedule": "cosine", "lr_first_step": 14, "final_lr": 0.01
    },
}  # fmt: skip
STEPS = {"max_steps": 14, "display": 1, "val_interval": 4, "checkpoint_interval": 2}


def start(flags):
    command = [sys.executable, os.path.join(ROOT, "train.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def signal_at(flags, step, number):
    """Start a run and send it a signal once it has printed progress of `step`; its output."""
    process, lines = start(flags), []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
    return process.wait(), "".join(lines)


def complete(flags):
    done = python("train.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state(directory):
    """Everything that a finished run leaves: tensors of the last checkpoint, metrics but times."""
    tensors = rundir.read_checkpoint(rundir.find_checkpoint(directory))
    with open(os.path.join(directory, "metrics.jsonl")) as file:
        return tensors, file.read()


def assert_same(directory, expected):
    (tensors, metrics), (other, other_metrics) = state(directory), state(expected)
    assert tensors.keys() == other.keys()
    different = [name for name in tensors if not np.array_equal(tensors[name], other[name])]
    assert not different
    assert metrics == other_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """Each stage, never stopped; and the flags of a run like it in another directory."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def flags(stage, train_dir):
        base = {"basemodel": str(root / "group")} if stage == "split" else {}
        return train_flags(stage, train_dir, data_dir, **STAGES[stage], **STEPS, **base)

    def get(stage):
        if stage == "split":
            get("group")
        if stage not in made:
            complete(flags(stage, root / stage))
            made[stage] = str(root / stage)
        return made[stage]

    return get, flags


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_like_one_that_was_never_stopped(whole, stage, tmp_path):
    get, flags = whole
    expected, run = get(stage), flags(stage, tmp_path / "run")
    step = random.Random(stage).choice((1, 3, 6, 9, 12))
    status, out = signal_at(run, step, signal.SIGKILL)
    assert status == -signal.SIGKILL, out
    out = complete(run)
    assert step < 3 or "going on from" in out
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_runs_save_and_go_on(whole, number, expected, tmp_path):
    get, flags = whole
    run = flags("group", tmp_path / "run")
    status, out = signal_at(run, 6, number)
    assert status == expected, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("interrupted at step") and "best validation accuracy" in last
    step = int(last.split("step ")[1].split(":")[0])
    assert rundir.checkpoint_steps(str(tmp_path / "run"))[-1] == step
    assert f"step {step}\n" in complete(run)
    assert_same(tmp_path / "run", get("group"))


def test_a_reader_that_ends_costs_nothing(whole, tmp_path):
    """`| tee log` dies of the same Ctrl-C, `| head` sooner."""
    directory = tmp_path / "run"
    command = [sys.executable, os.path.join(ROOT, "train.py")]
    command += [*whole[1]("baseline", directory), "--max_steps=100000", "--display=1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None, process.stderr.read()
    process.stdout.close()
    reached = max(rundir.checkpoint_steps(str(directory)), default=0)
    while max(rundir.checkpoint_steps(str(directory)), default=0) <= reached:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == 130 and process.stderr.read() == ""


def test_same_seed_same_numbers_and_another_seed_others(whole, tmp_path):
    get, flags = whole
    complete(flags("baseline", tmp_path / "same"))
    assert_same(tmp_path / "same", get("baseline"))
    complete([*flags("baseline", tmp_path / "other"), "--seed=1", "--deterministic"])
    config = utils.read_json(tmp_path / "other" / "config.json")
    assert config["flags"]["seed"] == 1 and config["flags"]["deterministic"]
    assert state(tmp_path / "other")[1] != state(get("baseline"))[1]


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """A run that was stopped at step 8."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    complete([*whole[1]("baseline", directory), "--max_steps=8"])
    return directory


def spoil(newest, damage):
    """Damage a checkpoint's files in one of several ways."""
    path = newest + (".index" if damage == "index" else ".data-00000-of-00001")
    if damage == "torn":  # killed between the two renames
        os.remove(newest + ".index")
        return
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        if damage == "truncated":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 0x10
        file.seek(0)
        file.truncate()
        file.write(content)


@pytest.mark.parametrize("damage", ["truncated", "bit", "index", "torn"])
def test_damaged_newest_checkpoint_is_named_and_ignored(whole, stopped, damage, tmp_path):
    get, flags = whole
    directory = str(tmp_path / "run")
    shutil.copytree(stopped, directory)
    newest = rundir.find_checkpoint(directory)
    spoil(newest, damage)
    status, out, error = inside("train.py", *flags("baseline", directory))
    assert status == 0, error
    assert f"going on from {directory}/model.ckpt-6" in out
    said = f"ignoring {newest}: " if damage == "torn" else f"checkpoint {newest} is torn or damaged"
    assert said in out
    (tensors, _), (expected, _) = state(directory), state(get("baseline"))
    assert all(np.array_equal(tensors[n], expected[n]) for n in tensors if n.startswith("net/"))


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(whole, stopped, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(stopped, directory)
    for step in rundir.checkpoint_steps(str(directory)):
        spoil(rundir.checkpoint_path(str(directory), step), "bit")
    metrics = (directory / "metrics.jsonl").read_text()
    status, _, error = inside("train.py", *whole[1]("baseline", directory))
    assert status == 1 and "can be read: to start anew, name another" in error
    assert (directory / "metrics.jsonl").read_text() == metrics


def test_second_run_in_a_directory_refuses(whole, tmp_path):
    _, flags = whole
    run = [*flags("baseline", tmp_path / "run"), "--max_steps=100000"]
    first = start(run)
    try:
        for line in first.stdout:
            if line.startswith("step 3/"):
                break
        second = python("train.py", *run)
        assert second.returncode == 1 and "another run is using" in second.stderr
        assert second.stderr.count("\n") == 1 and first.poll() is None
    finally:
        first.kill()
        first.communicate()


WRITER = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import rundir
from utils import tf
tf.Module  # loaded once; each round forks from here

def write():
    with rundir.Run({directory!r}, keep=2) as run:
        run.discard_torn()
        values = tf.Variable(tf.ones([2_000_000]))
        step = (rundir.checkpoint_steps({directory!r}) or [0])[-1]
        while True:
            step += 1
            values.assign(tf.fill([2_000_000], float(step)))
            run.save(tf.train.Checkpoint(values=values), step)

def check():
    torn = os.path.isdir(os.path.join({directory!r}, rundir.UNFINISHED))
    steps = rundir.checkpoint_steps({directory!r})
    for step in steps:
        path = rundir.checkpoint_path({directory!r}, step)
        assert (rundir.read_checkpoint(path)["values"] == step).all()
    print("checked", steps[-1] if steps else 0, int(torn), flush=True)

def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)

random.seed(0)
for _ in range(20):
    seen, begun = rundir.checkpoint_steps({directory!r}), time.monotonic()
    pid = child(write)
    while rundir.checkpoint_steps({directory!r}) == seen:
        time.sleep(0.001)
    # It is at its second checkpoint or a later one, however fast this machine is.
    time.sleep(random.uniform(0, time.monotonic() - begun))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pid = child(check)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_kills_while_writing_checkpoints(tmp_path):
    """SIGKILL at 20 random moments of a process that does nothing but write checkpoints."""
    program = WRITER.format(root=ROOT, directory=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("checked")]
    newest = [int(step) for step, _ in rounds]
    assert len(rounds) == 20 and newest == sorted(newest) and newest[-1] > 20
    assert sum(int(torn) for _, torn in rounds) > 2  # some of the kills did fall into a write


@contextlib.contextmanager
def small_disk(path):
    """A file system of 2 MB, as root can make one; gives a function that remounts it read-only."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_disk_full(whole, tmp_path):
    """Room for two checkpoints: one line, and the last good checkpoint is intact."""
    run = str(tmp_path / "disk" / "run")
    with small_disk(tmp_path / "disk"):
        error = fails(
            "train.py",
            *whole[1]("baseline", run),
            "--keep=9",
            says=["cannot be written", "make room"],
        )
        last = int(error.split("last good one is of step ")[1].split(":")[0])
        tensors = rundir.read_checkpoint(rundir.checkpoint_path(run, last))
        assert tensors["step"] == last == rundir.checkpoint_steps(run)[-1]


def test_read_only_directory(whole, tmp_path):
    with small_disk(tmp_path / "disk") as make_read_only:
        make_read_only()
        flags = whole[1]("baseline", tmp_path / "disk" / "run")
        fails("train.py", *flags, says="cannot be used as a run directory (Read-only file system)")


def test_directories_that_cannot_be_used(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        flags = train_flags("baseline", place, data_dir)
        fails("train.py", *flags, says="cannot be used as a run directory")
