"""utils.py: flags, the learning rate, atomic files, the run directory."""

import gc
import json
import os
import subprocess
import sys

import pytest
from conftest import needs_tensorflow

import rundir
import utils
from utils import tf


@needs_tensorflow
def test_learning_rate_drops_at_epochs():
    import objective

    rates = [objective.stepwise(step, 10, 0.1, 0.5, [2, 3]) for step in (0, 19, 20, 29, 30, 99)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert objective.stepwise(25, 10, 0.1, 0.5, [2.55]) == 0.1
    assert objective.stepwise(99, 10, 0.1, 0.5, []) == 0.1


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_goes_on_after_an_import(enabled, monkeypatch):
    """As it was; only a command, whose process is its own, has less to look through."""
    kept = gc.get_freeze_count()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), utils._without_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == kept
        monkeypatch.setattr(utils, "is_command", lambda: True)
        with utils._without_collection():
            pass
        assert gc.isenabled() == enabled and gc.get_freeze_count() > kept
    finally:
        gc.enable()


@pytest.mark.parametrize("text", ["True", "true", "1", "yes"])
def test_boolean_flags(text):
    assert utils.boolean(text) is True
    with pytest.raises(Exception, match="True or False"):
        utils.boolean("maybe")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1.5", "x", "1e3", ""])
def test_numbers_outside_their_bounds(text):
    with pytest.raises(Exception, match="a whole number >= 1"):
        utils.number(int, low=1)(text)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = str(tmp_path / "file.json")
    utils.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), utils.atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert utils.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.fixture(scope="module")
def ended():
    """The number of a process that is not there any more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def test_what_killed_processes_left_goes(ended, tmp_path):
    path = tmp_path / "file.json"
    running = f"file.json.{os.getppid()}.part"
    for name in (f"file.json.{ended}.part", f"other.json.{ended}.part", running):
        (tmp_path / name).touch()
    utils.write_json(path, {"a": 1})
    left = ["file.json", running, f"other.json.{ended}.part"]
    assert sorted(os.listdir(tmp_path)) == sorted(left)


def test_a_file_is_not_written_over_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(ValueError, match="folder cannot be written"):
        utils.write_json(tmp_path / "folder", {"a": 1})
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["mine"]


def replace_by_folder(path, content):
    with utils.replacing(str(path)) as part:
        os.mkdir(part)
        with open(os.path.join(part, content), "w"):
            pass


@pytest.mark.parametrize("at_once", [True, False])
def test_replacing_files_and_folders(at_once, tmp_path, monkeypatch):
    path = tmp_path / "made"
    if not at_once:  # a file system or a kernel that cannot
        monkeypatch.setattr(utils, "_exchange", lambda *_: False)
    for content in ("first", "second"):
        replace_by_folder(path, content)
        assert os.listdir(tmp_path) == ["made"] and os.listdir(path) == [content]
    with utils.replacing(str(path)) as part, open(part, "w") as file:
        file.write("third")
    assert os.listdir(tmp_path) == ["made"] and path.read_text() == "third"
    replace_by_folder(path, "fourth")
    with pytest.raises(RuntimeError), utils.replacing(str(path)) as part:
        os.mkdir(part)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["made"] and os.listdir(path) == ["fourth"]


def test_a_replaced_folder_is_there_at_any_moment(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    if not utils._exchange(str(tmp_path / "one"), str(tmp_path / "other")):
        pytest.skip("this file system cannot exchange names")
    monkeypatch.setattr(os, "replace", None)
    replace_by_folder(tmp_path / "one", "content")
    assert os.listdir(tmp_path / "one") == ["content"]


def test_the_last_whole_one_stays_where_two_names_changed_one_by_one(ended, tmp_path):
    """A process was killed between them."""
    path, old = tmp_path / "made", tmp_path / f"made.{ended}.part.old"
    old.mkdir()
    (tmp_path / f"made.{ended}.part").mkdir()
    with pytest.raises(RuntimeError), utils.replacing(str(path)):
        raise RuntimeError
    assert os.listdir(tmp_path) == [old.name]
    for content in ("first", "second"):
        replace_by_folder(path, content)
    assert os.listdir(tmp_path) == ["made"] and os.listdir(path) == ["second"]


def test_one_run_at_a_time(tmp_path):
    directory = str(tmp_path / "run")
    with rundir.Run(directory), pytest.raises(ValueError, match="another run is using"):
        rundir.Run(directory)
    rundir.Run(directory).close()


def test_metrics_after_a_stop_end_at_the_checkpoint(tmp_path):
    with rundir.Run(str(tmp_path)) as run:
        for step in (1, 2, 3):
            run.log(step, loss=1.0 / step)
        with open(run.path("metrics.jsonl"), "a") as file:
            file.write('{"step": 4, "lo')  # killed while it wrote
        run.resume_metrics(2)
        run.log(3, loss=0.5)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]  # noqa: SIM115
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.5)]


@needs_tensorflow
def test_newest_checkpoints_and_the_best_stay(tmp_path):
    with rundir.Run(str(tmp_path), keep=2) as run:
        checkpoint = tf.train.Checkpoint(x=tf.Variable(1.0))
        for step, accuracy in enumerate([0.1, 0.5, 0.3, 0.5, 0.2, 0.4]):
            run.log(step, val_accuracy=accuracy)
            run.save(checkpoint, step)
        assert run.best() == {"best_step": 1, "best_accuracy": 0.5}
        assert rundir.checkpoint_steps(str(tmp_path)) == [1, 4, 5]
        assert not [name for name in os.listdir(tmp_path) if "unfinished" in name]
        assert rundir.find_checkpoint(str(tmp_path)).endswith("model.ckpt-5")
        assert rundir.find_checkpoint(str(tmp_path / "model.ckpt-1.index")).endswith("ckpt-1")
        assert rundir.read_checkpoint(rundir.find_checkpoint(str(tmp_path)))["x"] == 1


@needs_tensorflow
def test_checkpoint_without_its_data_does_not_count(tmp_path):
    with rundir.Run(str(tmp_path)) as run:
        for step in (1, 2):
            run.save(tf.train.Checkpoint(x=tf.Variable(1.0)), step)
    os.remove(tmp_path / "model.ckpt-2.data-00000-of-00001")
    assert rundir.checkpoint_steps(str(tmp_path)) == [1]
    with pytest.raises(ValueError, match="no checkpoint"):
        rundir.find_checkpoint(str(tmp_path / "model.ckpt-2"))


def test_flag_mistakes_are_one_line(capsys):
    parser = utils.FlagParser("test", needed=("gamma1",))
    parser.add_argument("--gamma1", type=utils.number(float, low=0), help="weight")
    for words, says in [
        (["--gamma", "1"], "did you mean --gamma1?"),
        (["--gamma1", "1", "stray"], "stray word 'stray'"),
        (["--gamma1", "-1"], "expected a number >= 0, got '-1'"),
        ([], "--gamma1 is needed: weight"),
        (["--qqq=1"], "see"),
    ]:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(words)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and says in error and error.count("\n") == 1
