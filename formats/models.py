"""What is exported of a network: all of it, one branch, or the trunk and the branches apart."""

from __future__ import annotations

import numpy as np

import cifar100
from utils import tf


class Model:
    """What is exported: a function with its network's layers behind it.

    Attributes:
        inputs: name, dtype and shape (None: any number) of the one input.
        outputs: names of the outputs.
        function: tensor in, list of the outputs out, in TensorFlow.
        draw: the same in a graph of ONNX: `(graph, name of the input)` -> names of the outputs.
        metadata: what travels with it.
    """

    def __init__(self, inputs, outputs, function, draw, metadata):
        self.inputs, self.outputs = inputs, outputs
        self.function, self.draw, self.metadata = function, draw, metadata

    def concrete(self):
        """The model as a `tf.function` of one signature, its tensors named."""
        name, dtype, shape = self.inputs
        spec = tf.TensorSpec(shape, tf.as_dtype(dtype), name)

        @tf.function(input_signature=[spec], autograph=False)
        def call(x):
            values = self.function(x)
            return {n: tf.identity(v, n) for n, v in zip(self.outputs, values, strict=True)}

        return call

    def random_input(self, number: int, seed: int = 0) -> np.ndarray:
        """`number` random inputs."""
        rng = np.random.default_rng(seed)
        shape = (number, *self.inputs[2][1:])
        if self.inputs[1] == "uint8":
            return rng.integers(0, 256, shape, np.uint8)
        return rng.normal(size=shape).astype(np.float32)


def images_of(net) -> tuple:
    """The input of a network: name, dtype and shape."""
    return "images", "uint8", (None, net.config.image_size, net.config.image_size, 3)


def whole(net, metadata: dict) -> Model:
    """All logits, in the order of the labels."""
    order = np.argsort(np.concatenate([leaf.classes for leaf in net.leaves()]))

    def function(images):
        return [net(cifar100.standardize(images))]

    def draw(graph, images):
        return [
            graph.gather(
                graph.concat(
                    graph.leaf_logits(net, graph.standardize(images, net.config.image_size))
                ),
                order,
            )
        ]

    about = metadata | _classes(net.leaves(), metadata)
    return Model(images_of(net), ["logits"], function, draw, about)


def one_branch(net, number: int, metadata: dict) -> Model:
    """The trunk and one leaf: the logits of its classes, in the order of the labels."""
    leaves = list(net.leaves())
    if len(leaves) == 1:
        raise ValueError("the network has no branches: leave --branch out")
    if number >= len(leaves):
        raise ValueError(f"there is no branch {number}: the tree has 0 to {len(leaves) - 1}")
    leaf, order = leaves[number], np.argsort(leaves[number].classes)

    def function(images):
        logits = _logits_of(leaf, net, cifar100.standardize(images))
        return [tf.gather(logits, order, axis=1)]

    def draw(graph, images):
        [logits] = graph.leaf_logits(net, graph.standardize(images, net.config.image_size), leaf)
        return [graph.gather(logits, order)]

    about = metadata | _classes([leaf], metadata)
    return Model(images_of(net), ["logits"], function, draw, about)


def parts(net, metadata: dict) -> dict[str, Model]:
    """The trunk and what is behind its fork, by their names."""
    if not net.branches:
        raise ValueError("the network has no branches: leave --parts out")
    names = [f"features_{number}" for number in range(net.num_branches)]

    def split_trunk(images):
        return net.fork(net.features(cifar100.standardize(images)))

    def draw_trunk(graph, images):
        x = graph.features(net, graph.standardize(images, net.config.image_size))
        return [graph.nhwc(part) for part in graph.fork(net, x)]

    models = {"trunk": Model(images_of(net), names, split_trunk, draw_trunk, metadata)}
    side = net.config.resolution(net.last_level)
    for number, (branch, channels) in enumerate(zip(net.branches, net.fork_sizes, strict=True)):
        leaves = list(branch.leaves())
        order = np.argsort(np.concatenate([leaf.classes for leaf in leaves]))

        def function(x, branch=branch, order=order):
            return [tf.gather(tf.concat(branch.leaf_logits(x), axis=1), order, axis=1)]

        def draw(graph, x, branch=branch, order=order):
            return [graph.gather(graph.concat(graph.leaf_logits(branch, graph.nchw(x))), order)]

        inputs = (names[number], "float32", (None, side, side, channels))
        about = metadata | _classes(leaves, metadata)
        models[f"branch_{number}"] = Model(inputs, ["logits"], function, draw, about)
    return models


def _classes(leaves, metadata: dict) -> dict:
    """The classes of some leaves in the order of the labels, and the groups that they make."""
    names = metadata["class_names"]
    groups = [sorted(leaf.classes.tolist()) for leaf in leaves]
    numbers = sorted(sum(groups, []))
    return {
        "classes": numbers,
        "class_names": [names[number] for number in numbers],
        "group_classes": groups,
    }


def _logits_of(leaf, branch, x) -> tf.Tensor:
    """Logits of one leaf behind a branch, without what only others read."""
    if not branch.num_branches:
        return branch.head(branch.features(x))
    child, channels = way_to(branch, leaf)
    return _logits_of(leaf, child, branch.features(x, wanted=channels))


def way_to(branch, leaf) -> tuple:
    """The branch behind a fork that leads to a leaf, and the channels that it reads, a slice."""
    end = 0
    for child, size in zip(branch.branches, branch.fork_sizes, strict=True):
        start, end = end, end + size
        if any(other is leaf for other in child.leaves()):
            return child, slice(start, end)
    raise AssertionError("the leaf is not behind this branch")
