"""Counting predictions, and checkpoints of weights alone."""

import os
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import fails, grouped_net, images, inside, train_flags

import cifar100
import metrics
import objective
import restore
import resnet
import rundir
from experiments import publish


def test_every_image_counts_once(data_dir):
    net = resnet.ResNet(resnet.NetworkConfig(num_residual_units=1, k=1))
    pictures, labels = cifar100.load(data_dir, "test")
    predict = metrics.predictor(net)
    found = metrics.evaluate(predict, pictures, labels, 100)
    np.testing.assert_array_equal(found.confusion.sum(axis=1), np.bincount(labels, minlength=100))
    other = metrics.evaluate(predict, pictures, labels, 7)
    np.testing.assert_array_equal(found.confusion, other.confusion)
    assert found.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-4)


def test_seconds_are_of_whole_batches_after_the_first(data_dir):
    pictures, labels = cifar100.load(data_dir, "test")  # 230

    def slow_where_xla_compiles(batch, targets):
        first, slow_where_xla_compiles.last = slow_where_xla_compiles.last, len(batch)
        time.sleep(0.5 if first != len(batch) else 0)
        return tf.zeros(len(batch), tf.int64), tf.constant(0.0)

    slow_where_xla_compiles.last = 0
    found = metrics.evaluate(slow_where_xla_compiles, pictures, labels, 100)
    assert 0 < found.seconds_per_image < 0.5 / 100


@pytest.mark.parametrize("kind", ["dense", "tree"])
def test_weights_alone_predict_the_same(kind, tmp_path):
    net = grouped_net((2, 2, 2), num_residual_units=1)
    net = resnet.split(net) if kind == "tree" else net
    trainer = objective.Trainer(net, objective.Objective(), {"stage": "split", "seed": 3})
    trainer.steps_done.assign(7)
    whole = trainer.checkpoint.write(str(tmp_path / "model.ckpt-7"))
    alone = publish.export_weights(whole, str(tmp_path / "weights"))
    assert alone == str(tmp_path / "weights" / "model.ckpt-7")
    tensors = rundir.read_checkpoint(alone)
    assert tensors["step"] == 7 and not any(name.startswith("optimizer") for name in tensors)
    size = os.path.getsize(f"{alone}.data-00000-of-00001")
    assert size < 0.6 * os.path.getsize(f"{whole}.data-00000-of-00001")
    again, description = restore.load_network(alone, tensors)
    assert (description["stage"], description["seed"]) == ("split", 3)
    np.testing.assert_array_equal(again(tf.constant(images())), net(tf.constant(images())))


def test_weights_alone_cannot_go_on(data_dir, tmp_path):
    """They lack the optimizer's state, but a new run starts from them."""
    status, _, error = inside("train.py", *train_flags("baseline", tmp_path / "run", data_dir))
    assert status == 0, error
    publish.export_weights(rundir.find_checkpoint(str(tmp_path / "run")), str(tmp_path / "alone"))
    flags = train_flags("baseline", tmp_path / "on", data_dir)
    fails("train.py", *flags, "--checkpoint", tmp_path / "alone", says="--basemodel")
    status, out, error = inside("train.py", *flags, "--basemodel", tmp_path / "alone")
    assert status == 0 and "starting from the weights of" in out, error


# ---------------------------------------------------------------- groups and superclasses


def test_what_groups_mean_counted_by_hand():
    of = [0, 0, 0, 1, 1, 1]  # three pairs each
    groups = [[0, 1, 3], [2, 4, 5]]
    assert metrics.pairs_together(groups, of) == pytest.approx(2 / 6)
    assert metrics.purity(groups, of) == pytest.approx(2 / 3)
    assert metrics.chance_together(groups) == pytest.approx(6 / 15)
    for whole in ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]):
        assert metrics.pairs_together(whole, of) == metrics.purity(whole, of) == 1
    assert metrics.pairs_together([[c] for c in range(6)], of) == 0


def test_chance_is_that_of_random_groups_of_these_sizes():
    of = [c // 5 for c in range(100)]
    groups = [list(range(30)), list(range(30, 100))]
    expected = (30 * 29 + 70 * 69) / (100 * 99)
    assert metrics.chance_together(groups) == pytest.approx(expected)
    measure = metrics.pairs_together
    mean, deviation = metrics.by_chance(measure, groups, of)
    rng = np.random.default_rng(9)
    drawn = [measure([p[:30], p[30:]], of) for p in (rng.permutation(100) for _ in range(2000))]
    assert mean == pytest.approx(expected, abs=3 * deviation / 1000**0.5)
    assert deviation == pytest.approx(np.std(drawn), rel=0.1)
    assert measure(groups, of) > mean + 10 * deviation


def test_mistakes_within_and_between_groups():
    confusion = np.array([[9, 1, 0, 2], [3, 9, 4, 0], [0, 0, 9, 5], [6, 0, 7, 9]])
    assert metrics.mistakes(confusion, [[0, 1], [2, 3]]) == (1 + 3 + 5 + 7, 2 + 4 + 6)
    assert metrics.mistakes(confusion, [[0, 2], [3, 1]]) == (0, 28)
    assert metrics.mistakes(confusion, [[3, 0, 2, 1]]) == (28, 0)
