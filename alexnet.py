"""AlexNet of the paper's Table 3: one tower of eight layers, each of which is a level.

Every layer's outputs are the next one's inputs, so that the split layers are a chain. fc6 and fc7
are convolutions whose kernels are as large as what they see, 6x6 places and one, and so are grouped
by channels as the others are. Without local response normalization and without batch normalization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

import networks
import resnet
from utils import tf

# Of conv1 to fc7: output features at k = 1, size of the kernel (None: as large as its inputs),
# stride, and whether a 3x3/2 max pool follows.
LAYERS = [
    (96, 11, 4, True), (256, 5, 1, True), (384, 3, 1, False), (384, 3, 1, False), (256, 3, 1, True),
    (4096, None, 1, False), (4096, None, 1, False),
]  # fmt: skip
FC6, FC7 = 6, 7


@dataclasses.dataclass(frozen=True)
class NetworkConfig(networks.Config):
    """What defines an AlexNet.

    Attributes:
        k: widening factor, 1 in the paper; 96k, 256k ... features, whole numbers.
        num_classes: number of logits.
        groups: groups of (conv4, conv5, fc6, fc7, fc8); 1 means not split.
        dropout_keep_prob: for the inputs of split layers, in training.
        bn_no_scale: of no effect, as there is no batch normalization.
        dropout_unsplit: as that of the Wide ResNet.
        image_size: side of the images.
        fc_keep_prob: as dropout_keep_prob, for the inputs of fc6 and fc7, split or not.
    """

    network = "alexnet"
    classes = ("alexnet", "AlexNet", "SplitAlexNet")
    levels = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")

    k: float = 1
    num_classes: int = 1000
    groups: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)
    dropout_keep_prob: float = 1.0
    bn_no_scale: bool = False
    dropout_unsplit: bool = False
    image_size: int = 224
    fc_keep_prob: float = 0.5

    def __post_init__(self):
        if self.resolution(5) < 1:
            raise ValueError(
                "an AlexNet's convolutions and pools leave nothing of such small images: "
                f"image_size must be 57 or more, got {self.image_size}"
            )
        if not 0 < self.fc_keep_prob <= 1:
            raise ValueError(f"fc_keep_prob must be above 0 and at most 1, got {self.fc_keep_prob}")
        self.check(filters=32)

    @property
    def name(self) -> str:
        return "AlexNet" if self.k == 1 else f"AlexNet-x{self.k:g}"

    def features(self, level: int) -> int:
        return int(self.k * LAYERS[level - 1][0]) if level else 3

    def convolved(self, level: int) -> int:
        """Side in pixels of what a level's convolution computes, before its pool."""
        _, size, stride, _ = LAYERS[level - 1]
        return -(-self.resolution(level - 1) // stride) if size else 1

    def resolution(self, level: int) -> int:
        if level == 0:
            return self.image_size
        side, pools = self.convolved(level), LAYERS[level - 1][3]
        return (side - 1) // 2 if pools else side

    def keep_prob(self, level: int) -> float:
        keep_prob = super().keep_prob(level)
        return min(keep_prob, self.fc_keep_prob) if level in (FC6, FC7) else keep_prob


class Layer(resnet.Conv):
    """Dropout of the inputs, convolution with biases, ReLU, and a max pool where there is one.

    The biases are not counted.
    """

    def __init__(self, name, config, level, inputs, outputs, seed):
        _, size, stride, self.pools = LAYERS[level - 1]
        self.side = config.resolution(level - 1)  # of the inputs
        self.sees_all = size is None
        size, resolution = size or self.side, config.convolved(level)
        super().__init__(name, size, inputs, outputs, resolution, stride, seed)
        self.biases = tf.Variable(tf.zeros(len(self.outputs)), name=f"{name}/biases")
        self.dropout = resnet.DropoutReLU(f"{name}/dropout", config.keep_prob(level))

    def __call__(self, x, training=False, dropout_seed=None, wanted: slice | None = None):
        """All output channels `[B, H, W, K]`, or the wanted ones alone."""
        if self.dropout.keep_prob < 1:
            # Its ReLU leaves what the last layer's own has left.
            x = self.dropout(x, training, dropout_seed)
        wanted = wanted or slice(None)
        kernel = resnet.fill(tf.cast(self.kernel[..., wanted], x.dtype), x.shape[-1], axis=2)
        kernel = resnet.fill(kernel, self.whole(kernel.shape[-1]))
        if self.sees_all:
            # Not a VALID convolution: TensorFlow 2.21 with oneDNN takes the zeros behind its kernel
            # for padding of its inputs, and aborts.
            places = kernel.shape[:-1].num_elements()
            y = tf.matmul(tf.reshape(x, [-1, places]), tf.reshape(kernel, [places, -1]))
            y = y[:, None, None]  # (B, 1, 1, K)
        else:
            y = tf.nn.conv2d(x, kernel, strides=self.stride, padding="SAME")  # (B, H, W, K)
        y = tf.nn.relu(y + resnet.fill(tf.cast(self.biases[wanted], x.dtype), y.shape[-1]))
        return tf.nn.max_pool2d(y, 3, 2, "VALID") if self.pools else y

    def cut(self, dense: Layer) -> None:
        super().cut(dense)
        self.biases.assign(dense.biases.numpy()[self.outputs])

    def draw(self, graph, x: str, outputs: slice | None) -> str:
        """The same in a graph of ONNX, see `formats.onnx_graph`."""
        wanted = outputs or slice(None)
        pads = [0] * 4 if self.sees_all else None
        x = graph.conv(x, self, wanted, self.side, pads)
        biases = np.asarray(self.biases)[wanted]
        x = graph.relu(graph.add("Add", x, graph.constant(biases[:, None, None])))
        return graph.max_pool(x, pads=[0] * 4) if self.pools else x


class Branch(resnet.Branch):
    """A `resnet.Branch` of these layers: `conv1` ... `fc7`, and the classifier in `logits`."""

    @staticmethod
    def behind_fork(*arguments) -> Branch:
        return Branch(*arguments)

    def _add_stem(self, partition, prefix, seed):
        pass

    def stem(self, images):
        return images

    def _add_stage(self, partition, level, group, prefix, seed):
        name = self.config.levels[level - 1]
        inputs = partition.inputs(level, group)
        outputs = partition.outputs(level, group)
        setattr(self, name, Layer(prefix + name, self.config, level, inputs, outputs, seed))

    def _add_head(self, partition, group, prefix, seed):
        config, last = self.config, len(self.config.levels)
        inputs, self.classes = partition.inputs(last, group), partition.classes(group)
        self.relu = resnet.DropoutReLU(f"{prefix}logits/dropout", config.keep_prob(last))
        self.logits, name = tf.Module(), f"{prefix}logits/fc"
        self.logits.fc = resnet.Linear(name, inputs, self.classes, seed, config.counts_biases)

    def stage(self, level: int) -> list[Layer]:
        """The one layer of a level."""
        return [getattr(self, self.config.levels[level - 1])]

    def kernels(self, level: int) -> Iterator[tuple[tf.Variable, str, str]]:
        if level == len(self.config.levels):
            yield self.logits.fc.weights, "p", "q"
        else:
            yield self.stage(level)[0].kernel, "p", "q"

    def head(self, x, training=False, dropout_seed=None):
        x = tf.reshape(tf.cast(x, tf.float32), [-1, x.shape[-1]])  # (B, C), of one place
        return self.logits.fc(self.relu(x, training, dropout_seed))


class AlexNet(resnet.Dense, Branch):
    """The dense network."""


class SplitAlexNet(resnet.Tree, Branch):
    """Its tree."""
