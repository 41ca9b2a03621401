"""A tree's branches on several devices: they exchange nothing, so that each can take some.

What is placed is called as the network is, images in and logits out, and tells in `device_flops`
what it gives each device to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import resnet
from parallel.devices import gpu_names
from utils import tf


class PlacedTree:
    """A tree on several devices.

    `branch`: each device computes the trunk and its own branches for the whole batch, and only
    logits travel (the paper's scheme). `hybrid`: each device computes the trunk for its share of
    the batch, the features are exchanged once, and each computes its own branches for the whole
    batch. Neighbouring leaves share a device where there are fewer devices.

    Raises:
        ValueError: the network has no branches.
    """

    def __init__(self, tree: resnet.Tree, devices: Sequence[str], hybrid: bool):
        if not tree.num_branches:
            raise ValueError(
                "only a tree has branches to place: run split.sh, or --placement single"
            )
        self.tree, self.devices, self.hybrid = tree, devices, hybrid
        leaves, owners = list(tree.leaves()), self._owners()
        self.leaves = [
            [leaf for leaf, owner in zip(leaves, owners, strict=True) if owner == number]
            for number in range(len(devices))
        ]

    def _owners(self) -> list[int]:
        """Number of the device of each leaf: runs of neighbours, the busiest device's FLOPs least.

        A branch whose leaves are of two devices is computed on both.
        """
        leaves = list(self.tree.leaves())
        # By the number of leaves that have an owner: FLOPs of the devices, descending, and owners.
        best: dict[int, tuple[list, list]] = {0: ([], [])}
        for number in range(len(self.devices)):
            ends = {}
            for end in range(len(leaves) + 1):
                ends[end] = min(
                    (
                        sorted([*flops, self._flops_behind_trunk(leaves[start:end])], reverse=True),
                        owners + [number] * (end - start),
                    )
                    for start, (flops, owners) in best.items()
                    if start <= end
                )
            best = ends
        return best[len(leaves)][1]

    def _flops_behind_trunk(self, leaves: list[resnet.Branch]) -> int:
        return sum(branch.own_flops() for branch in _ways(self.tree, leaves))

    @property
    def device_flops(self) -> list[float]:
        """FLOPs per image of each device."""
        trunk_share = 1 / len(self.devices) if self.hybrid else 1
        trunk = trunk_share * self.tree.own_flops()
        return [trunk + self._flops_behind_trunk(leaves) for leaves in self.leaves]

    @property
    def device_weights(self) -> list[int]:
        """Weights that each device holds."""
        trunk = self.tree.own_count()[0]
        return [
            trunk + sum(branch.own_count()[0] for branch in _ways(self.tree, leaves))
            for leaves in self.leaves
        ]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, H, W, 3]`."""
        logits = self._hybrid(images) if self.hybrid else self._branch(images)
        with tf.device(self.devices[0]):
            return self.tree.in_label_order(logits)[: tf.shape(images)[0]]

    def _branch(self, images) -> list[tf.Tensor]:
        logits = []
        for device, leaves in zip(self.devices, self.leaves, strict=True):
            if leaves:
                with tf.device(device):
                    logits += self.tree.leaf_logits(tf.identity(images), wanted=leaves)
        return logits

    def _hybrid(self, images) -> list[tf.Tensor]:
        shares = []  # of each device: what every branch reads, for a part of the batch
        parts = split_batch(images, len(self.devices))
        for device, part in zip(self.devices, parts, strict=True):
            with tf.device(device):
                shares.append(self.tree.fork(self.tree.features(tf.identity(part))))
        logits = []
        for device, leaves in zip(self.devices, self.leaves, strict=True):
            for place, branch in enumerate(self.tree.branches):
                if any(leaf in leaves for leaf in branch.leaves()):
                    with tf.device(device):
                        x = tf.concat([share[place] for share in shares], axis=0)
                        logits += branch.leaf_logits(x, wanted=leaves)
        return logits


def _ways(branch: resnet.Branch, leaves: list[resnet.Branch]) -> Iterator[resnet.Branch]:
    """The branches behind a fork that lead to some leaves, and these."""
    for child in branch.branches:
        if any(leaf in leaves for leaf in child.leaves()):
            yield child
            yield from _ways(child, leaves)


def split_batch(images: tf.Tensor, number: int) -> list[tf.Tensor]:
    """`number` equal parts of a batch, with empty images at the end if it is not a multiple.

    The logits of these are to be dropped. (TensorFlow's kernels fail on parts without images.)
    """
    missing = tf.math.floormod(-tf.shape(images)[0], number)
    return tf.split(tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]]), number)


def choose(
    net: resnet.Network, devices: Sequence[str], alone: bool = False
) -> tuple[str, list[str]]:
    """The placement and the devices that serve a network best where a person leaves it open.

    A tree's branches go over the given devices, or without any over the GPUs of this machine, if
    these are several; whatever else goes on one.

    Args:
        alone: it is to be on one device.

    Raises:
        ValueError: several devices are given to a dense network.
    """
    is_tree = isinstance(net, resnet.Tree)
    if not devices and is_tree and not alone:
        gpus = gpu_names()
        devices = gpus if len(gpus) > 1 else []
    if len(devices) > 1 and not is_tree:
        raise ValueError(
            f"only a tree has branches to share out over {len(devices)} devices: name one device "
            "or worker, or run split.sh first"
        )
    return "branch" if len(devices) > 1 else "single", list(devices)


def place(net: resnet.Network, devices: Sequence[str], placement: str):
    """Something that is called like `net` and computes the same on the given devices.

    Its weights are its own: what becomes of those of `net` does not reach it.
    """
    if placement != "single":
        copy = resnet.copy(net)
        resnet.freeze(copy)  # each device's constants land where they are used
        return PlacedTree(copy, devices, hybrid=placement == "hybrid")
    device = devices[0] if devices else None
    with tf.device(device):
        copy = resnet.copy(net)
    # Not constant: TensorFlow would hold about twenty copies, for 1 % of a batch of 100.
    resnet.fold(copy)

    def on_device(images):
        with tf.device(device):
            return copy(images)

    return on_device
