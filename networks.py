"""What defines a network that can be split; the Wide ResNet's `NetworkConfig`. No TensorFlow.

A network is a row of levels, from 1, the first, to the classifier, and its last ones can be split.
A config tells `grouping` which these are and how many features each has; `classes` tells what is
built of it. `groups` runs from the input to the output, with a number for every level that can be
split; 1 means not split.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
from collections.abc import Sequence
from typing import ClassVar

from cifar100 import IMAGE_SIZE, NUM_CLASSES

# --network, and the file of its NetworkConfig. A further network is a file, and a line here.
NETWORKS = {"wrn": "networks", "resnet18": "resnet18", "alexnet": "alexnet"}


def config_class(network: str) -> type[Config]:
    """The `NetworkConfig` of a name in NETWORKS."""
    return importlib.import_module(NETWORKS[network]).NetworkConfig


class Config:
    """What the configs of all networks have in common, beside these fields of dataclasses: `k`,
    `num_classes`, `groups`, `dropout_keep_prob`, `bn_no_scale`, `dropout_unsplit`, `image_size`.

    Attributes:
        network: name in NETWORKS.
        classes: file, and names in it, of the dense network and of the tree.
        levels: names of the levels, the classifier's last. `groups` are of the last ones.
        stem: size and stride of `init_conv`, which comes before the first level, and whether a
            3x3/2 max pool follows; empty where a network has none.
        counts_biases: whether weights and FLOPs have the classifier's biases among them.
    """

    network: ClassVar[str]
    classes: ClassVar[tuple[str, str, str]]
    levels: ClassVar[tuple[str, ...]]
    stem: ClassVar[tuple[int, int, bool] | tuple[()]] = ()
    counts_biases: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The usual name, such as WRN-16-8."""
        raise NotImplementedError

    def features(self, level: int) -> int:
        """Number of output features of a level; of level 0, what level 1 reads."""
        raise NotImplementedError

    def inner(self, level: int) -> list[int]:
        """Numbers of features inside a level, where it has indicators of its own; none else."""
        return []

    def resolution(self, level: int) -> int:
        """Side in pixels of a level's output features; of level 0, of the first convolution's."""
        raise NotImplementedError

    def keep_prob(self, level: int) -> float:
        """Share of a level's inputs that training keeps."""
        split = level - 1 - len(self.levels) + len(self.groups)
        drops = split >= 0 and (self.dropout_unsplit or self.groups[split] > 1)
        return self.dropout_keep_prob if drops else 1.0

    def check(self, filters: int) -> None:
        """Raise ValueError unless the common fields are possible; makes `groups` a tuple of int.

        Args:
            filters: k times so many must be a whole number.
        """
        if not 0 < self.k < math.inf or filters * self.k != int(filters * self.k):
            raise ValueError(
                f"k must be positive and {filters} * k a whole number of filters, got {self.k}"
            )
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if not 0 < self.dropout_keep_prob <= 1:
            raise ValueError(
                f"dropout_keep_prob must be above 0 and at most 1, got {self.dropout_keep_prob}"
            )
        number = len(type(self).groups)  # of the default
        names = self.levels[-number:]
        inputs = [self.features(len(self.levels) - i) for i in range(number, 0, -1)]
        check_groups(self.groups, names, inputs, self.num_classes)
        object.__setattr__(self, "groups", tuple(map(int, self.groups)))


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Config):
    """What defines a network: WRN-(6n+4)-k for n residual units in each of three stages.

    Attributes:
        num_residual_units: n; 2 gives WRN-16.
        k: widening factor; 16k, 32k and 64k filters (a fraction is allowed if 16k is whole).
        num_classes: number of logits.
        image_size: side of the images, which the network halves twice.
        groups: groups of (unit_2, unit_3, logits); 1 means not split.
        dropout_keep_prob: for the inputs of split layers, in training.
        bn_no_scale: do not train the scale (gamma) of the blocks' batch normalization.
        dropout_unsplit: dropout where a deep split has it although nothing is split there, which
            is the paper's baseline with dropout.
    """

    network = "wrn"
    classes = ("resnet", "ResNet", "SplitResNet")
    levels = ("unit_1", "unit_2", "unit_3", "logits")
    stem = (3, 1, False)
    counts_biases = True

    num_residual_units: int = 2
    k: float = 8
    num_classes: int = NUM_CLASSES
    groups: tuple[int, int, int] = (1, 1, 1)
    dropout_keep_prob: float = 1.0
    bn_no_scale: bool = False
    dropout_unsplit: bool = False
    image_size: int = IMAGE_SIZE

    def __post_init__(self):
        if self.num_residual_units < 1 or self.num_residual_units != int(self.num_residual_units):
            raise ValueError(
                "num_residual_units must be a whole number from 1 up, got "
                f"{self.num_residual_units}"
            )
        object.__setattr__(self, "num_residual_units", int(self.num_residual_units))
        if self.image_size < 8 or self.image_size % 4:
            raise ValueError(
                f"a Wide ResNet halves its images twice, so image_size must be a multiple of 4 "
                f"from 8 up, got {self.image_size}"
            )
        self.check(filters=16)

    @property
    def name(self) -> str:
        return f"WRN-{6 * self.num_residual_units + 4}-{self.k:g}"

    def features(self, level: int) -> int:
        """Number of output features of level 0 (`init_conv`), 1, 2 or 3."""
        return 16 if level == 0 else int(16 * self.k) * 2 ** (level - 1)

    def inner(self, level: int) -> list[int]:
        """Between the two convolutions of each block of a stage."""
        return [self.features(level)] * self.num_residual_units if level < 4 else []

    def resolution(self, level: int) -> int:
        return self.image_size >> max(level - 1, 0)


# ---------------------------------------------------------------- which groups are possible


def format_groups(groups: Sequence[int]) -> str:
    """`(2, 4, 4)` -> `'2-4-4'`."""
    return "-".join(str(g) for g in groups)


def groups_flags(number: int) -> str:
    """The flags of so many levels' groups, in the order of `groups`: `--ngroups3-2-1`."""
    return f"--ngroups{format_groups(range(number, 0, -1))}"


def check_nesting(groups: Sequence[int], names: Sequence[str]) -> None:
    """Raise ValueError unless `groups` are numbers that nest, one for each level in `names`."""
    if len(groups) != len(names) or any(
        not isinstance(g, numbers.Integral) or g < 1 for g in groups
    ):
        raise ValueError(
            f"groups are {len(names)} whole numbers from 1 up ({', '.join(names)}), got "
            f"{tuple(groups)}"
        )
    if list(groups) != sorted(groups):
        later = len(names) - 1
        examples = [(1, *[2] * later), (2, *[2] * later), (2, *[4] * later)]
        raise ValueError(
            f"groups {format_groups(groups)} do not nest: a group divides into one or more groups "
            f"of the next level, so the numbers may not fall from {' to '.join(names)} "
            f"(allowed: {', '.join(map(format_groups, examples))})"
        )


def check_groups(
    groups: Sequence[int], names: Sequence[str], features: Sequence[int], num_classes: int
) -> None:
    """Raise ValueError unless `groups` can split levels with `features` inputs each."""
    check_nesting(groups, names)
    shown = format_groups(groups)
    if groups[-1] > num_classes:
        raise ValueError(
            f"groups {shown} split {num_classes} classes into {groups[-1]} groups: at most "
            f"{num_classes} are possible"
        )
    for name, count, width in zip(names, groups, features, strict=True):
        if count > width:
            raise ValueError(
                f"groups {shown} split the {width} input features of {name} into {count} groups: "
                f"at most {width} are possible; use fewer groups or a larger k"
            )
