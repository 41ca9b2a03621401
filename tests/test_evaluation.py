"""Counting predictions, and checkpoints of weights alone."""

import os
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import fails, grouped_net, images, inside, train_flags

import cifar100
import evaluation
import resnet
import train
import utils


def test_every_image_counts_once(data_dir):
    net = resnet.ResNet(resnet.NetworkConfig(num_residual_units=1, k=1))
    pictures, labels = cifar100.load(data_dir, "test")
    predict = evaluation.predictor(net)
    found = evaluation.evaluate(predict, pictures, labels, 100)
    np.testing.assert_array_equal(found.confusion.sum(axis=1), np.bincount(labels, minlength=100))
    other = evaluation.evaluate(predict, pictures, labels, 7)
    np.testing.assert_array_equal(found.confusion, other.confusion)
    assert found.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-4)


def test_seconds_are_of_whole_batches_after_the_first(data_dir):
    pictures, labels = cifar100.load(data_dir, "test")  # 230

    def slow_where_xla_compiles(batch, targets):
        first, slow_where_xla_compiles.last = slow_where_xla_compiles.last, len(batch)
        time.sleep(0.5 if first != len(batch) else 0)
        return tf.zeros(len(batch), tf.int64), tf.constant(0.0)

    slow_where_xla_compiles.last = 0
    found = evaluation.evaluate(slow_where_xla_compiles, pictures, labels, 100)
    assert 0 < found.seconds_per_image < 0.5 / 100


@pytest.mark.parametrize("kind", ["dense", "tree"])
def test_weights_alone_predict_the_same(kind, tmp_path):
    net = grouped_net((2, 2, 2), num_residual_units=1)
    net = resnet.split(net) if kind == "tree" else net
    trainer = train.Trainer(net, train.Objective(), {"stage": "split", "seed": 3})
    trainer.steps_done.assign(7)
    whole = trainer.checkpoint.write(str(tmp_path / "model.ckpt-7"))
    alone = evaluation.export_weights(whole, str(tmp_path / "weights"))
    assert alone == str(tmp_path / "weights" / "model.ckpt-7")
    tensors = utils.read_checkpoint(alone)
    assert tensors["step"] == 7 and not any(name.startswith("optimizer") for name in tensors)
    size = os.path.getsize(f"{alone}.data-00000-of-00001")
    assert size < 0.6 * os.path.getsize(f"{whole}.data-00000-of-00001")
    again, description = evaluation.load_network(alone, tensors)
    assert (description["stage"], description["seed"]) == ("split", 3)
    np.testing.assert_array_equal(again(tf.constant(images())), net(tf.constant(images())))


def test_weights_alone_cannot_go_on(data_dir, tmp_path):
    """They lack the optimizer's state, but a new run starts from them."""
    status, _, error = inside("train.py", *train_flags("baseline", tmp_path / "run", data_dir))
    assert status == 0, error
    evaluation.export_weights(utils.find_checkpoint(str(tmp_path / "run")), str(tmp_path / "alone"))
    flags = train_flags("baseline", tmp_path / "on", data_dir)
    fails("train.py", *flags, "--checkpoint", tmp_path / "alone", says="--basemodel")
    status, out, error = inside("train.py", *flags, "--basemodel", tmp_path / "alone")
    assert status == 0 and "starting from the weights of" in out, error
