"""A tree's branches on several devices: they exchange nothing, so that each can take some.

What is placed is called as the network is, images in and logits out, and tells in `device_flops`
what it gives each device to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import resnet
from utils import tf


def copy_to(device: str | None, net: resnet.ResNet | resnet.SplitResNet):
    """The same network on another device; None: on TensorFlow's first."""
    with tf.device(device):
        return resnet.copy(net)


class PlacedTree:
    """A tree on several devices.

    `branch`: each device computes the trunk and its own branches for the whole batch, and only
    logits travel (the paper's scheme). `hybrid`: each device computes the trunk for its share of
    the batch, the features are exchanged once, and each computes its own branches for the whole
    batch. Neighbouring leaves share a device where there are fewer devices.

    Raises:
        ValueError: the network has no branches.
    """

    def __init__(self, tree: resnet.SplitResNet, devices: Sequence[str], hybrid: bool):
        if not tree.num_branches:
            raise ValueError(
                "only a tree has branches to place: run split.sh, or --placement single"
            )
        self.devices, self.hybrid = devices, hybrid
        self.copies = [copy_to(device, tree) for device in devices]
        owners = self._owners(tree)
        self.leaves = [
            [leaf for leaf, owner in zip(copy.leaves(), owners, strict=True) if owner == number]
            for number, copy in enumerate(self.copies)
        ]

    def _owners(self, tree: resnet.SplitResNet) -> list[int]:
        """Number of the device of each leaf: runs of neighbours with about equal FLOPs."""
        flops = np.array([
            resnet.count(branch)[1] / len(list(branch.leaves()))
            for branch in tree.branches
            for _ in branch.leaves()
        ])  # fmt: skip
        middle = np.cumsum(flops) - flops / 2
        return (middle / flops.sum() * len(self.devices)).astype(int).tolist()

    @property
    def device_flops(self) -> list[float]:
        """FLOPs per image of each device."""
        trunk_share = 1 / len(self.devices) if self.hybrid else 1
        return [
            trunk_share * copy.own_flops() + sum(_flops(b, leaves) for b in copy.branches)
            for copy, leaves in zip(self.copies, self.leaves, strict=True)
        ]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, 32, 32, 3]`."""
        logits = self._hybrid(images) if self.hybrid else self._branch(images)
        with tf.device(self.devices[0]):
            return self.copies[0].in_label_order(logits)[: tf.shape(images)[0]]

    def _branch(self, images) -> list[tf.Tensor]:
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            if leaves:
                with tf.device(device):
                    logits += copy.leaf_logits(tf.identity(images), wanted=leaves)
        return logits

    def _hybrid(self, images) -> list[tf.Tensor]:
        shares = []  # of each device: what every branch reads, for a part of the batch
        parts = split_batch(images, len(self.devices))
        for device, copy, part in zip(self.devices, self.copies, parts, strict=True):
            with tf.device(device):
                shares.append(copy.fork(copy.features(tf.identity(part))))
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            for place, branch in enumerate(copy.branches):
                if any(leaf in leaves for leaf in branch.leaves()):
                    with tf.device(device):
                        x = tf.concat([share[place] for share in shares], axis=0)
                        logits += branch.leaf_logits(x, wanted=leaves)
        return logits


def _flops(branch: resnet.Branch, leaves: list[resnet.Branch]) -> int:
    """FLOPs per image of what leads from a branch's input to those of its leaves."""
    if not any(leaf in leaves for leaf in branch.leaves()):
        return 0
    return branch.own_flops() + sum(_flops(child, leaves) for child in branch.branches)


def split_batch(images: tf.Tensor, number: int) -> list[tf.Tensor]:
    """`number` equal parts of a batch, with empty images at the end if it is not a multiple.

    The logits of these are to be dropped. (TensorFlow's kernels fail on parts without images.)
    """
    missing = tf.math.floormod(-tf.shape(images)[0], number)
    return tf.split(tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]]), number)


def choose(
    net: resnet.ResNet | resnet.SplitResNet, devices: Sequence[str], alone: bool = False
) -> tuple[str, list[str]]:
    """The placement and the devices that serve a network best where a person leaves it open.

    A tree's branches go over the given devices, or without any over the GPUs of this machine, if
    these are several; whatever else goes on one.

    Args:
        alone: it is to be on one device.

    Raises:
        ValueError: several devices are given to a dense network.
    """
    is_tree = isinstance(net, resnet.SplitResNet)
    if not devices and is_tree and not alone:
        gpus = gpu_names()
        devices = gpus if len(gpus) > 1 else []
    if len(devices) > 1 and not is_tree:
        raise ValueError(
            f"only a tree has branches to share out over {len(devices)} devices: name one device, "
            "or run split.sh first"
        )
    return "branch" if len(devices) > 1 else "single", list(devices)


def gpu_names() -> list[str]:
    """The GPUs of this machine, such as /GPU:0."""
    return [f"/GPU:{number}" for number in range(len(tf.config.list_logical_devices("GPU")))]


def place(net: resnet.ResNet | resnet.SplitResNet, devices: Sequence[str], placement: str):
    """Something that is called like `net` and computes the same on the given devices.

    Its weights are constant (`resnet.freeze`): what becomes of those of `net` does not reach it.
    """
    if placement != "single":
        placed = PlacedTree(net, devices, hybrid=placement == "hybrid")
        for copy in placed.copies:
            resnet.freeze(copy)
        return placed
    copy = copy_to(devices[0] if devices else None, net)
    resnet.freeze(copy)
    if not devices:
        return copy

    def on_device(images):
        with tf.device(devices[0]):
            return copy(images)

    return on_device
