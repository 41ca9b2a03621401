"""Runs that are killed, interrupted or find damaged checkpoints, as real processes."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, python, train_flags

import utils

STAGES = {
    "baseline": {},
    "group": {"dropout_keep_prob": 0.5, "group_lr_scale": 5, "bn_no_scale": True},
    "split": {"dropout_keep_prob": 0.7},
}
STEPS = {"max_steps": 14, "display": 3, "val_interval": 4, "checkpoint_interval": 2}


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
    tensors = utils.read_checkpoint(utils.find_checkpoint(directory))
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
    for step in sorted(random.Random(stage).sample((3, 6, 9, 12), 2)):
        status, _ = signal_at(run, step, signal.SIGKILL)
        assert status == -signal.SIGKILL
    out = complete(run)
    assert "going on from" in out
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
    assert utils.checkpoint_steps(str(tmp_path / "run"))[-1] == step
    assert f"step {step}\n" in complete(run)
    assert_same(tmp_path / "run", get("group"))


def test_same_seed_same_numbers_and_another_seed_others(whole, tmp_path):
    get, flags = whole
    complete(flags("baseline", tmp_path / "same"))
    assert_same(tmp_path / "same", get("baseline"))
    complete([*flags("baseline", tmp_path / "other"), "--seed=1", "--deterministic"])
    config = utils.read_json(tmp_path / "other" / "config.json")
    assert config["flags"]["seed"] == 1 and config["flags"]["deterministic"]
    assert state(tmp_path / "other")[1] != state(get("baseline"))[1]


@pytest.mark.parametrize("damage", ["truncated", "bit", "index", "torn"])
def test_damaged_newest_checkpoint_is_named_and_ignored(whole, damage, tmp_path):
    get, flags = whole
    run = flags("baseline", tmp_path / "run")
    complete([*run, "--max_steps=8"])
    newest = utils.find_checkpoint(str(tmp_path / "run"))
    path = newest + (".index" if damage == "index" else ".data-00000-of-00001")
    if damage == "torn":  # killed between the two renames
        os.remove(newest + ".index")
    else:
        with open(path, "r+b") as file:
            content = bytearray(file.read())
            if damage == "truncated":
                content = content[: len(content) // 2]
            else:
                content[len(content) // 2] ^= 0x10
            file.seek(0)
            file.truncate()
            file.write(content)
    out = complete(run)
    assert f"going on from {tmp_path}/run/model.ckpt-6" in out
    if damage != "torn":
        assert f"ignoring it: checkpoint {newest} is torn or damaged" in out
    (tensors, _), (expected, _) = state(tmp_path / "run"), state(get("baseline"))
    assert all(np.array_equal(tensors[n], expected[n]) for n in tensors if n.startswith("net/"))


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
    status, _ = signal_at(run, 6, signal.SIGTERM)  # a killed run leaves no lock behind
    assert status == 143


def test_kills_while_writing_checkpoints(whole, tmp_path):
    """SIGKILL at random moments of a run that writes a checkpoint after every step."""
    _, flags = whole
    run = [*flags("baseline", tmp_path / "run"), "--checkpoint_interval=1", "--max_steps=100000"]
    rng, before = random.Random(0), 0
    for _ in range(4):
        process = start(run)
        for line in process.stdout:
            if line.startswith(("step", "going on")):
                break
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        steps = utils.checkpoint_steps(str(tmp_path / "run"))
        assert steps and steps[-1] >= before
        before = steps[-1]
        utils.read_checkpoint(utils.checkpoint_path(str(tmp_path / "run"), before))
