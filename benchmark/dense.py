"""A dense network on several devices, the two ways that the paper compares with (Table 5).

It has no cut, so that devices must exchange features: `Horizontal` and `Vertical` are called as the
network is, and tell in `device_flops` what each device computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import resnet
from parallel.tree import split_batch
from utils import tf


class Vertical:
    """A dense network whose layers are shared out: each device computes a run of them.

    The batch flows through in parts, so that a device works on one while the next device works on
    the part before; a device takes one part at a time.
    """

    PARTS_PER_DEVICE = 2

    def __init__(self, net: resnet.ResNet, devices: Sequence[str]):
        self.devices = devices
        flops = [resnet.count(module)[1] for module in (net.init_conv, *net.blocks, net.logits.fc)]
        middle = np.cumsum(flops) - np.array(flops) / 2
        owners = (middle / sum(flops) * len(devices)).astype(int)
        self.device_flops = np.bincount(owners, flops, len(devices)).tolist()
        net = resnet.copy(net)
        resnet.freeze(net)  # each device's constants land where they are used
        steps = (net.init_conv, *net.blocks, net.head)
        self.runs = [  # of each device: what it applies, one after the other
            [step for step, owner in zip(steps, owners, strict=True) if owner == number]
            for number in range(len(devices))
        ]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, H, W, 3]`."""
        logits, done = [], [[] for _ in self.devices]  # done: each device's last part
        for x in split_batch(images, self.PARTS_PER_DEVICE * len(self.devices)):
            for number, (device, run) in enumerate(zip(self.devices, self.runs, strict=True)):
                with tf.device(device), tf.control_dependencies(done[number]):
                    x = tf.identity(x)
                    for step in run:
                        x = step(x)
                done[number] = [x]
            logits.append(x)
        return tf.concat(logits, axis=0)[: tf.shape(images)[0]]


class Horizontal:
    """A dense network whose every layer's outputs are shared out over the devices.

    Each device computes its share of a layer's filters from all of the layer's inputs, so that the
    features are exchanged before every convolution.
    """

    def __init__(self, net: resnet.ResNet, devices: Sequence[str]):
        self.net, self.devices = net, devices
        self.shares = []  # of each device: its part of every layer, by the layer's name
        for number, device in enumerate(devices):
            with tf.device(device):
                share = {
                    resnet.path_of(layer): self._part(layer, number) for layer in resnet.layers(net)
                }
            self.shares.append(share)
        self.device_flops = [
            sum(part.count()[1] for part in share.values()) for share in self.shares
        ]

    def _part(self, layer, number):
        """What device `number` computes of a layer: that much of its output channels."""

        def mine(channels):
            return np.array_split(channels, len(self.devices))[number]

        name = resnet.path_of(layer)
        if isinstance(layer, resnet.Conv):
            size, outputs = layer.kernel.shape[0], mine(layer.outputs)
            part = resnet.Conv(name, size, layer.inputs, outputs, layer.resolution, layer.stride)
        elif isinstance(layer, resnet.BatchNorm):
            part = resnet.BatchNorm(name, mine(layer.channels))
        else:
            part = resnet.Linear(name, layer.inputs, mine(layer.outputs))
        part.cut(layer)
        resnet.freeze(part, lanes=1)  # as the other placements; all that it returns is exchanged
        return part

    def _on_each(self, function, *values) -> list[tf.Tensor]:
        """`function(share, value ...)` on every device."""
        results = []
        for device, share, *own in zip(self.devices, self.shares, *values, strict=True):
            with tf.device(device):
                results.append(function(share, *own))
        return results

    def _apply(self, layer, inputs) -> list[tf.Tensor]:
        """Each device's outputs of a layer from all of its inputs."""
        path = resnet.path_of(layer)
        return self._on_each(lambda share, x: share[path](x), inputs)

    def _normalize(self, layer, parts) -> list[tf.Tensor]:
        """ReLU of batch normalization: it needs no other device's channels."""
        path = resnet.path_of(layer)
        return self._on_each(lambda share, x: tf.nn.relu(share[path](x, False)), parts)

    def _exchange(self, parts) -> list[tf.Tensor]:
        """All devices' channels on every device."""
        return self._on_each(lambda _: tf.concat(parts, axis=-1))

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, H, W, 3]`."""
        net = self.net
        x = self._apply(net.init_conv, self._exchange([images]))
        for block in net.blocks:
            h = self._normalize(block.bn_1, x)
            whole = self._exchange(h)
            y = self._normalize(block.bn_2, self._apply(block.conv_1, whole))
            y = self._apply(block.conv_2, self._exchange(y))
            shortcut = h if block.first else x
            if block.shortcut is not None:
                shortcut = self._apply(block.shortcut, whole)
            x = self._on_each(lambda _, a, b: a + b, y, shortcut)
        x = self._normalize(net.unit_last.bn, x)
        x = self._on_each(lambda _, a: tf.reduce_mean(tf.cast(a, tf.float32), axis=(1, 2)), x)
        return self._exchange(self._apply(net.logits.fc, self._exchange(x)))[0]
