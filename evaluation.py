"""Networks out of checkpoints, their predictions, and what is counted and written of them."""

from __future__ import annotations

import dataclasses
import os
import time

import utils  # isort: skip, it quiets TensorFlow's start
import numpy as np
import tensorflow as tf

import cifar100
import grouping
import resnet

DTYPES = {"float32": tf.float32, "bfloat16": tf.bfloat16}


def load_network(path: str, tensors: dict[str, np.ndarray], **changes):
    """`resnet.from_checkpoint`, with the checkpoint's path in what it raises."""
    try:
        return resnet.from_checkpoint(tensors, **changes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_dataset(path: str, description: dict, data: dict, folder: str, split="train") -> None:
    """Raise ValueError where a checkpoint comes from another data set than the one in `folder`.

    Args:
        description: the checkpoint's. What it does not say, as a TensorFlow 1 checkpoint, may be.
        data: the data set's (`cifar100.describe`).
        split: the images that are to be used; only training and validation images depend on how
            the data set was divided into them (`indices_sha256`).
    """
    for key in ["dataset", *(["indices_sha256"] if split in ("train", "val") else [])]:
        trained_on, here = description.get(key), data.get(key, "")
        if trained_on not in (None, here):
            raise ValueError(
                f"{path} was trained on {description['dataset']} ({key} {trained_on}), but "
                f"{folder} holds {data['dataset']} ({key} {here}): name the data that it was "
                "trained on with --data_dir"
            )


def export_weights(checkpoint: str, folder: str) -> str:
    """Copy a checkpoint into a folder without the optimizer's state; returns the copy's path.

    The copy is half as large: enough to evaluate, to cut and to start a run from (--basemodel).
    """
    tensors = utils.read_checkpoint(checkpoint)
    net, _ = load_network(checkpoint, tensors)
    copy = tf.train.Checkpoint(
        net=net,
        step=tf.Variable(tensors["step"]),
        description=tf.Variable(tensors["description"], trainable=False),
    )
    os.makedirs(folder, exist_ok=True)
    return copy.write(os.path.join(folder, os.path.basename(checkpoint)))


@dataclasses.dataclass
class Evaluation:
    """Counts over a data set: `confusion[label, prediction]` int64; mean cross entropy; seconds."""

    confusion: np.ndarray
    cross_entropy: float
    seconds_per_image: float

    @property
    def num_examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.num_examples


def predictor(net, precision: str = "float32", jit_compile: bool = False):
    """`predict(images, labels)` -> predicted classes int64 `[B]` and the sum of cross entropies."""
    pictures = tf.TensorSpec([None, cifar100.IMAGE_SIZE, cifar100.IMAGE_SIZE, 3])
    signature = [pictures, tf.TensorSpec([None], tf.int32)]

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def predict(images, labels):
        logits = net(tf.cast(images, DTYPES[precision]))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return tf.argmax(logits, axis=1), tf.reduce_sum(losses)

    return predict


def evaluate(predict, images, labels, batch_size: int) -> Evaluation:
    """Predict every image once.

    Seconds an image leave the first batch out, which compiles, and a smaller last one, for which
    XLA does again.
    """
    confusion = np.zeros([cifar100.NUM_CLASSES] * 2, np.int64)
    cross_entropy, times, sizes = 0.0, [], []
    for batch, targets in cifar100.evaluation_batches(images, labels, batch_size):
        start = time.perf_counter()
        predictions, losses = (x.numpy() for x in predict(batch, targets))
        times.append(time.perf_counter() - start)
        sizes.append(len(predictions))
        np.add.at(confusion, (targets.numpy(), predictions), 1)
        cross_entropy += float(losses)
    if confusion.sum() != len(labels):
        raise ValueError(f"evaluated {confusion.sum()} images of {len(labels)}")
    whole = [i for i, size in enumerate(sizes) if i and size == sizes[0]] or [0]
    seconds = sum(times[i] for i in whole) / (len(whole) * sizes[0])
    return Evaluation(confusion, cross_entropy / len(labels), seconds)


def result(net, evaluation: Evaluation, **about) -> dict:
    """What result.json says of a network and its evaluation (`about`: dataset, split, step ...)."""
    weights, flops = resnet.count(net)
    values = {
        "num_examples": evaluation.num_examples,
        "correct": evaluation.correct,
        "accuracy": evaluation.accuracy,
        "error": 1 - evaluation.accuracy,
        "cross_entropy": evaluation.cross_entropy,
        "weights": weights,
        "flops": flops,
        "network": net.config.name,
        "groups": grouping.format_groups(net.config.groups),
        "group_classes": [classes.tolist() for classes in resnet.class_groups(net)],
        "seconds_per_image": evaluation.seconds_per_image,
        "hardware": utils.hardware(),
        "versions": utils.versions(),
    }
    return about | values
