"""Predictions over a data set and exact counts of them; how far groups agree with superclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

import cifar100
import grouping
import resnet
import rundir
from utils import tf


MANY = 101  # classes from which on the error among the five likeliest counts as well


@dataclasses.dataclass
class Evaluation:
    """Counts over a data set: `confusion[label, prediction]` int64; mean cross entropy; seconds.

    `top5` is how many labels are among the five likeliest, where there are many classes.
    """

    confusion: np.ndarray
    cross_entropy: float
    seconds_per_image: float
    top5: int | None = None

    @property
    def num_examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.num_examples


def predictor(
    net,
    precision: str = "float32",
    jit_compile: bool = False,
    image_size: int = cifar100.IMAGE_SIZE,
):
    """`predict(images, labels)` -> predicted classes int64 `[B]` and the sum of cross entropies.

    Of MANY classes also the number of labels among the five likeliest.
    """
    images_spec = tf.TensorSpec([None, image_size, image_size, 3])
    signature = [images_spec, tf.TensorSpec([None], tf.int32)]

    @tf.function(input_signature=signature, autograph=False, jit_compile=jit_compile)
    def predict(images, labels):
        logits = net(tf.cast(images, tf.as_dtype(precision)))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        values = tf.argmax(logits, axis=1), tf.reduce_sum(losses)
        if logits.shape[1] < MANY:
            return values
        return *values, tf.math.count_nonzero(tf.math.in_top_k(labels, logits, 5))

    return predict


def evaluate(
    predict, images, labels, batch_size: int, num_classes: int = cifar100.NUM_CLASSES
) -> Evaluation:
    """Predict every image once.

    Seconds an image leave the first batch out, which compiles, and a smaller last one, for which
    XLA does again.
    """
    confusion = np.zeros([num_classes] * 2, np.int64)
    cross_entropy, times, sizes, top5 = 0.0, [], [], []
    for batch, targets in cifar100.evaluation_batches(images, labels, batch_size):
        start = time.perf_counter()
        predictions, losses, *hits = (x.numpy() for x in predict(batch, targets))
        times.append(time.perf_counter() - start)
        sizes.append(len(predictions))
        np.add.at(confusion, (targets.numpy(), predictions), 1)
        cross_entropy += float(losses)
        top5 += map(int, hits)
    if confusion.sum() != len(labels):
        raise ValueError(f"evaluated {confusion.sum()} images of {len(labels)}")
    whole = [i for i, size in enumerate(sizes) if i and size == sizes[0]] or [0]
    seconds = sum(times[i] for i in whole) / (len(whole) * sizes[0])
    hits = sum(top5) if top5 else None
    return Evaluation(confusion, cross_entropy / len(labels), seconds, hits)


def result(net, evaluation: Evaluation, **extra) -> dict:
    """What result.json says of a network and its evaluation (`extra`: dataset, split, step ...)."""
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
        "num_classes": net.config.num_classes,
        "image_size": net.config.image_size,
        "groups": grouping.format_groups(net.config.groups),
        "group_classes": [classes.tolist() for classes in resnet.class_groups(net)],
        "seconds_per_image": evaluation.seconds_per_image,
        "hardware": rundir.hardware(),
        "versions": rundir.versions(),
    }
    if evaluation.top5 is not None:
        values["top5_error"] = 1 - evaluation.top5 / evaluation.num_examples
    return extra | values


# ---------------------------------------------------------------- groups and superclasses


def of_groups(net, confusion: np.ndarray, superclass_of: Sequence[int], masked: bool) -> dict:
    """What result.json says of a network's groups, where it has some.

    Args:
        net: a `resnet.Dense` or `Tree`.
        confusion: of its predictions, `[label, prediction]`.
        superclass_of: the superclass of every class; empty where there are none.
        masked: the weights between its groups were set to zero.
    """
    groups = resnet.class_groups(net)
    values: dict = {"group_accuracy": group_accuracies(confusion, groups)}
    if len(groups) > 1 and has_pairs(superclass_of):
        values["superclass_pairs"] = pairs_together(groups, superclass_of)
        values["superclass_pairs_chance"] = chance_together(groups)
    if net.alphas and not masked:
        values["sharpness"] = grouping.sharpness(net)
        with contextlib.suppress(ValueError):  # of an empty group: this network cannot be cut
            values["squares_inside"] = grouping.squares_inside(net)
    return values


def group_accuracies(confusion: np.ndarray, groups: Sequence[np.ndarray]) -> list[float]:
    """Accuracy over the images of each group's classes, all classes competing; 0 if none."""
    hits, images = np.diag(confusion), confusion.sum(axis=1)
    return [float(hits[g].sum() / max(images[g].sum(), 1)) for g in groups]


def _class_counts(groups: Sequence[Sequence[int]], superclass_of: np.ndarray) -> np.ndarray:
    """How many classes of every superclass each group has, `[G, superclasses]`."""
    number = superclass_of.max() + 1
    members = [superclass_of[np.asarray(group, int)] for group in groups]
    return np.array([np.bincount(superclasses, minlength=number) for superclasses in members])


def has_pairs(superclass_of_class: Sequence[int]) -> bool:
    """Whether any superclass has two classes, which may be together or not."""
    return len(set(superclass_of_class)) < len(superclass_of_class)


def pairs_together(groups: Sequence[Sequence[int]], superclass_of_class: Sequence[int]) -> float:
    """Share of the pairs of classes of one superclass that are in one group."""
    counts = _class_counts(groups, np.asarray(superclass_of_class))
    sizes = counts.sum(axis=0)
    return float((counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum())


def purity(groups: Sequence[Sequence[int]], superclass_of_class: Sequence[int]) -> float:
    """Largest share of a superclass that is in one group, averaged over the superclasses."""
    counts = _class_counts(groups, np.asarray(superclass_of_class))
    return float(np.mean(counts.max(axis=0) / counts.sum(axis=0)))


def by_chance(measure, groups, superclass_of_class, draws: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation of a measure for random groups of these sizes."""
    rng, bounds = np.random.default_rng(0), np.cumsum([len(g) for g in groups])[:-1]
    num_classes = len(superclass_of_class)
    values = [
        measure(np.split(rng.permutation(num_classes), bounds), superclass_of_class)
        for _ in range(draws)
    ]
    return float(np.mean(values)), float(np.std(values))


def chance_together(groups: Sequence[Sequence[int]]) -> float:
    """`pairs_together` of random groups of these sizes: the share of all pairs in one group."""
    sizes = [len(classes) for classes in groups]
    total = sum(sizes)
    return sum(n * (n - 1) for n in sizes) / (total * (total - 1))


def mistakes(confusion: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Mistakes of a confusion matrix [label, prediction] within the groups and between them."""
    inside = sum(confusion[np.ix_(classes, classes)].sum() for classes in groups)
    return int(inside - np.trace(confusion)), int(confusion.sum() - inside)
