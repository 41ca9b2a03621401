"""ResNet-18xk of the paper's Table 4 (k = 2): a residual network for ILSVRC 2012's images.

Its blocks are the Wide ResNet's, pre-activation, with another stem and four stages. The paper names
a split by the groups of conv4, conv5 and the classifier.
"""

from __future__ import annotations

import dataclasses

import networks


@dataclasses.dataclass(frozen=True)
class NetworkConfig(networks.Config):
    """What defines a ResNet-18xk: two residual blocks in each of four stages.

    Attributes:
        k: widening factor; 64k, 128k, 256k and 512k filters.
        num_classes: number of logits.
        groups: groups of (conv4, conv5, fc); 1 means not split.
        dropout_keep_prob, bn_no_scale, dropout_unsplit: as those of the Wide ResNet.
        image_size: side of the images, which the network halves five times.
    """

    network = "resnet18"
    classes = ("resnet", "ResNet", "SplitResNet")
    levels = ("conv2", "conv3", "conv4", "conv5", "fc")
    stem = (7, 2, True)

    k: float = 2
    num_classes: int = 1000
    groups: tuple[int, int, int] = (1, 1, 1)
    dropout_keep_prob: float = 1.0
    bn_no_scale: bool = False
    dropout_unsplit: bool = False
    image_size: int = 224

    def __post_init__(self):
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(
                "a ResNet-18 halves its images five times, so image_size must be a multiple of 32, "
                f"got {self.image_size}"
            )
        self.check(filters=64)

    @property
    def name(self) -> str:
        return f"ResNet-18x{self.k:g}"

    def features(self, level: int) -> int:
        return int(64 * self.k) * 2 ** max(level - 1, 0)

    def inner(self, level: int) -> list[int]:
        """Between the two convolutions of each block of a stage."""
        return [self.features(level)] * 2 if level < 5 else []

    def resolution(self, level: int) -> int:
        return self.image_size >> (level + 1)
