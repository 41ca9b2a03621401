"""Folders with odd names, half copies, full disks, remote and home folders: what flags name."""

import contextlib
import errno
import os
import pwd
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, fails, inside, needs_tensorflow, run_script, train_flags, write_data

import rundir
import utils

ODD = "lr=[0.1,0.2] a\\b st*r wh?t 'q' \"ü\" 100%\nline"
STEPS = {"max_steps": 4, "display": 1, "val_interval": 2}


def succeeds(script, *flags):
    status, out, error = inside(script, *flags)
    assert status == 0, error
    return out


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with an odd name and a data set in it."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    write_data(folder / "data", {"train": 300, "val": 130, "train_val": 430, "test": 230})
    return folder


@pytest.fixture(scope="module")
def done(odd):
    """A complete run there, with checkpoints of steps 2 and 4."""
    succeeds("train.py", *train_flags("baseline", odd / "run", odd / "data", **STEPS))
    assert rundir.checkpoint_steps(str(odd / "run")) == [2, 4]
    return odd / "run"


def copy_of(run, path, *wanted):
    """A copy of a run that has only the `wanted` files of its checkpoints."""
    shutil.copytree(run, path)
    for file in path.glob("model.ckpt-*"):
        if not file.name.startswith(wanted):
            file.unlink()
    return path


def listing(folder):
    """Names and contents of a folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# ---------------------------------------------------------------- names


def test_runs_in_folders_with_odd_names_go_on(odd, done, tmp_path):
    copy = shutil.copytree(done, odd / "copy")
    flags = train_flags("baseline", copy, odd / "data", **STEPS | {"max_steps": 5})
    assert f"going on from {copy}/model.ckpt-4, step 4" in succeeds("train.py", *flags)
    for flag in ("basemodel", "checkpoint"):
        flags = {flag: copy / "model.ckpt-5.index"} | STEPS | {"max_steps": 6}
        flags = train_flags("baseline", tmp_path / flag, odd / "data", **flags)
        assert f"{copy}/model.ckpt-5" in succeeds("train.py", *flags)


def test_evaluation_and_report_in_folders_with_odd_names(odd, done, tmp_path, monkeypatch):
    data, results = ("--data_dir", odd / "data"), odd / "results"
    flags = ("--checkpoint", done, "--eval_dir", results, "--output_file", odd / "file.pkl")
    assert f"written: {results}/result.json {odd}/file.pkl" in succeeds("eval.py", *flags, *data)
    assert "step 4" in succeeds("eval.py", "--checkpoint", done, *data)
    assert f"written: {done}/report.html" in succeeds("report", done, *data)
    monkeypatch.chdir(done)
    assert "step 2" in succeeds("eval.py", "--checkpoint=model.ckpt-2", *data)


def test_checkpoint_files_with_odd_names_are_refused_as_such(done, tmp_path, odd):
    for ending in (".index", ".data-00000-of-00001"):
        shutil.copy(done / f"model.ckpt-4{ending}", tmp_path / f"best[1]{ending}")
    flags = ("--checkpoint", tmp_path / "best[1]", "--data_dir", odd / "data")
    error = fails("eval.py", *flags, says=["best[1] under a name with [", "rename it"])
    assert "damaged" not in error


def test_names_that_are_not_text_are_refused():
    for script, flags in [
        ("train.py", ["--stage=baseline", "--train_dir=runs/\udcff"]),
        ("eval.py", ["--checkpoint=runs/\udcff"]),
    ]:
        fails(script, *flags, status=2, says="expected a path in UTF-8, got 'runs/\\udcff'")


def test_names_are_as_long_as_they_can_be_or_refused_at_once(odd, done, tmp_path):
    flags = ("--checkpoint", done, "--data_dir", odd / "data", "--eval_dir", tmp_path)
    longest = tmp_path / ("x" * 255)
    assert f"{longest}\n" in succeeds("eval.py", *flags, "--output_file", longest)
    for file, says in [
        (f"{longest}x", "File name too long"),
        (longest / "file", "Not a directory"),
        ("/dev/null", "it is no file"),
    ]:
        fails("eval.py", *flags, "--output_file", file, says=["--output_file", says])
    deep = str(tmp_path) + 15 * ("/" + 250 * "d")
    deep += "/" + (3990 - len(deep)) * "d"
    says = "cannot be used as a run directory (File name too long)"
    fails("train.py", *train_flags("baseline", deep, odd / "data"), says=says)


# ---------------------------------------------------------------- remote and home folders


PATHS = [
    *[("train.py", flag) for flag in ("--train_dir", "--data_dir", "--basemodel", "--checkpoint")],
    *[("eval.py", flag) for flag in ("--checkpoint", "--data_dir", "--eval_dir", "--output_file")],
    *[("report", "run"), ("report", "--data_dir")],
    *[("experiments/tables.py", "folder"), ("experiments/tables.py", "--write")],
]


@pytest.mark.parametrize("script, flag", PATHS)
def test_remote_folders_are_refused(script, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("gs://bucket/run", "s3://b/r", "hdfs://h/r", "http://h/r", "file:///r"):
        words = [f"{flag}={place}"] if flag.startswith("--") else [place]
        says = [f"argument {flag}: expected a path of this machine, got '{place}'", "copy it here"]
        fails(script, *words, says=says, status=2)
    assert not os.listdir(tmp_path)


def test_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert utils.path("~/x") == "/home/me/x" and utils.path("~") == "/home/me"
    root = pwd.getpwuid(0)
    assert utils.path(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"
    assert utils.path("./~/x") == "./~/x" and utils.path("a/~b") == "a/~b" and utils.path("") == ""
    says = "got '~no-such-user/x', a home folder that there is not"
    fails("eval.py", "--checkpoint", "~no-such-user/x", status=2, says=says)


def test_scripts_take_home_folders(odd, done, tmp_path):
    """In variables in quotes, and behind --flag=, where the shell leaves ~ as it is."""
    home = {"HOME": str(odd), "DATA_DIR": "~/data", "CHECKPOINT": "~/run"}
    ran = run_script("eval.sh", "--eval_dir=~/of home", "--output_file", "~/of.pkl", **home)
    assert f"written: {odd}/of home/result.json {odd}/of.pkl" in ran.stdout


# ---------------------------------------------------------------- half copies


@pytest.mark.parametrize(
    "wanted, says",
    [
        ("model.ckpt-4.index", "model.ckpt-4: it lacks model.ckpt-4.data-00000-of-00001"),
        ("model.ckpt-4.data", "model.ckpt-4: it lacks model.ckpt-4.index"),
        ("none", "it has metrics.jsonl; it has result.json"),
    ],
)
def test_a_run_without_a_whole_checkpoint_is_left_alone(wanted, says, odd, done, tmp_path):
    copy = copy_of(done, tmp_path / "run", wanted)
    before = listing(copy)
    flags = train_flags("baseline", copy, odd / "data", **STEPS)
    also = ["to start anew, name another --train_dir", "copy what is missing"]
    for start in ([], [f"--basemodel={done}"], [f"--checkpoint={done}"]):
        fails("train.py", *flags, *start, says=[says, *also])
    says = "no checkpoint" if wanted == "none" else says
    fails("eval.py", "--checkpoint", copy, "--data_dir", odd / "data", says=says)
    assert listing(copy) == before | {"lock": b""}


def test_results_alone_are_left_alone(odd, done, tmp_path):
    for name in ("metrics.jsonl", "result.json"):
        (tmp_path / name).mkdir()
        shutil.copy(done / name, tmp_path / name)
        flags = train_flags("baseline", tmp_path / name, odd / "data", **STEPS)
        fails("train.py", *flags, says=f"holds no whole checkpoint (it has {name})")


@pytest.mark.parametrize("half", ["index", "data-00000-of-00001"])
def test_half_a_checkpoint_is_passed_over_by_name(half, odd, done, tmp_path):
    copy = copy_of(done, tmp_path / "run", "model.ckpt-2.", f"model.ckpt-4.{half}")
    ignored = f"ignoring {copy}/model.ckpt-4: it lacks model.ckpt-4."
    out = succeeds("eval.py", "--checkpoint", copy, "--data_dir", odd / "data")
    assert ignored in out and "step 2" in out
    out = succeeds("train.py", *train_flags("baseline", copy, odd / "data", **STEPS))
    assert ignored in out and f"going on from {copy}/model.ckpt-2, step 2" in out


KILLED = """
import os, runpy, signal, sys
import utils
name, file, *sys.argv = sys.argv[1:]
call = getattr(os, name)

def killed(*paths):
    if paths[-1].endswith(file):
        os.kill(os.getpid(), signal.SIGKILL)
    call(*paths)

setattr(os, name, killed)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(call, file, flags):
    """What a run printed that is killed right before this call of `os` with this file at last."""
    command = [sys.executable, "-c", KILLED, call, file, os.path.join(ROOT, "train.py"), *flags]
    environment = os.environ | {"PYTHONPATH": ROOT}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    return ran.stdout


@needs_tensorflow
def test_killed_before_the_first_checkpoint(odd, tmp_path):
    flags = train_flags("baseline", tmp_path / "run", odd / "data", **STEPS)
    assert "step 2/4" in killed("replace", "model.ckpt-2.data-00000-of-00001", flags)
    assert len(rundir.read_metrics(tmp_path / "run")) == 3  # steps 1 and 2, and a validation
    out = succeeds("train.py", *flags)
    assert "starting from new weights" in out
    assert f"ignoring {tmp_path}/run/{rundir.UNFINISHED}: a killed run did not finish" in out
    assert not os.path.exists(tmp_path / "run" / rundir.NOTHING_SAVED)


@needs_tensorflow
@pytest.mark.parametrize(
    "call, file",
    [("replace", "model.ckpt-2.index"), ("remove", "model.ckpt-2.data-00000-of-00001")],
)
def test_killed_between_the_two_files_of_a_checkpoint(call, file, odd, tmp_path):
    """While it was written, or removed because a newer one was there."""
    run = tmp_path / "run"
    steps = STEPS | {"val_interval": 9, "keep": 1}
    flags = train_flags("baseline", run, odd / "data", **steps)
    killed(call, file, flags)
    assert not (run / "model.ckpt-2.index").exists()
    assert (run / "model.ckpt-2.data-00000-of-00001").exists()
    out = succeeds("train.py", *flags)
    assert f"going on from {run}/model.ckpt-" in out and "ignoring" not in out
    assert not (run / rundir.UNFINISHED).exists() and not rundir.half_checkpoints(str(run))


# ---------------------------------------------------------------- file systems


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(number, odd, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    flags = train_flags("baseline", tmp_path / "run", odd / "data", max_steps=1)
    out = succeeds("train.py", *flags)
    assert f"{tmp_path}/run cannot be locked ({os.strerror(number)})" in out


def test_file_systems_that_cannot_tell_what_is_on_the_disk(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    utils.write_json(tmp_path / "file.json", {"a": 1})
    assert utils.read_json(tmp_path / "file.json") == {"a": 1}


@contextlib.contextmanager
def full_disk(path):
    """A small file system; gives a function that fills it."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")

    def fill():
        with contextlib.suppress(OSError), open(path / "filling", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    try:
        yield fill
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_full_disks(odd, done, tmp_path, monkeypatch):
    """Each file that finds no room is named; what was there stays."""
    disk, data = tmp_path / "disk", ("--data_dir", odd / "data")
    with full_disk(disk) as fill:
        copy = copy_of(done, disk / "copy", "model.ckpt-4")
        fill()
        full = ["cannot be written (No space left on device)", "make room there"]
        flags = train_flags("baseline", disk / "run", odd / "data", **STEPS)
        fails("train.py", *flags, says=[f"{disk}/run/config.json", *full])
        flags = train_flags("baseline", copy, odd / "data", **STEPS | {"max_steps": 5})
        fails("train.py", *flags, says=[f"{copy}/metrics.jsonl", *full])
        assert rundir.checkpoint_steps(str(copy)) == [4]
        flags = ("--checkpoint", done, *data)
        says = [f"{disk}/eval/result.json", *full]
        fails("eval.py", *flags, "--eval_dir", disk / "eval", says=says)
        file = disk / "file.pkl"
        fails("eval.py", *flags, "--output_file", file, says=[str(file), *full])
        fails("report", copy, *data, says=[f"{copy}/report", *full])

    def begin(run):
        os.symlink("/dev/full", run.path("metrics.jsonl"))

    monkeypatch.setattr(rundir.Run, "begin", begin)
    flags = train_flags("baseline", tmp_path / "run", odd / "data", **STEPS)
    fails("train.py", *flags, says=[f"{tmp_path}/run/metrics.jsonl", *full])
