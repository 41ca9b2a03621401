"""utils.py: flags, the learning rate, atomic files, the run directory."""

import json
import os

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
