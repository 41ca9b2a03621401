"""The Wide ResNet of SplitNet: dense while it learns its groups, a tree once it is cut.

Both networks are made of the same `Branch`: the layers that one group owns, from one level of the
network down to where the tree forks. The dense network is a single branch that owns every channel.
Levels: 1 is `init_conv` and `unit_1`, 2 and 3 are `unit_2` and `unit_3`, 4 is `unit_last` and
`logits`. Other networks are configs with other levels (`resnet18`), or branches of other layers
(`alexnet`).

Variable names are those of the published TensorFlow 1 code and, at the same time, the path of
attributes: `net.unit_2_0.conv_1.kernel` is `unit_2_0/conv_1/kernel`. The layers of branch B of a
tree are below `branch_B/`, the trunk's bear the names that they had in the dense network.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import zlib
from collections.abc import Iterator

import numpy as np
import grouping
import networks
from networks import NetworkConfig  # noqa: F401, its name for other files
from utils import tf

BN_DECAY = 0.9
BN_EPSILON = 1e-5
LANES = 16  # values of a vector register: layers compute on a multiple of so many channels
TREE = "tree-2"  # "tree": the trunk in the dense network's order, with a gather at the fork


# ---------------------------------------------------------------- layers


def _normal(name: str, shape: tuple[int, ...], stddev: float, seed: int) -> tf.Tensor:
    """Gaussian values that depend on the seed and the variable's name alone."""
    return stddev * tf.random.stateless_normal(shape, seed=[seed, zlib.crc32(name.encode())])


def fill(x: tf.Tensor, size: int, axis: int = -1) -> tf.Tensor:
    """`x` with zeros behind what it has along an axis, `size` in all."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    paddings = np.zeros((len(x.shape), 2), int)
    paddings[axis, 1] = missing
    return tf.pad(x, paddings)


class Layer(tf.Module):
    """A layer that computes on whole vectors of `lanes` channels, of which the last may be 0.

    A tree's learned groups have any number of channels, and oneDNN takes four (float32) to seven
    (bfloat16) times as long to normalize 65 of them as it takes for 80. So a convolution returns
    more channels than it has, batch normalization leaves these at 0, and no weight reads them.
    """

    lanes = LANES

    def whole(self, channels: int) -> int:
        """`channels`, rounded up to whole vectors."""
        return -(-channels // self.lanes) * self.lanes


class Conv(Layer):
    """Convolution without bias, SAME padding; owns the listed channels of the dense network's."""

    bias: np.ndarray | None = None  # only of batch normalization that became a part of it

    def __init__(self, name, size, inputs, outputs, resolution, stride=1, seed=0):
        super().__init__()
        self.inputs, self.outputs = np.asarray(inputs), np.asarray(outputs)
        self.stride, self.resolution = stride, resolution
        shape = (size, size, len(inputs), len(outputs))
        name = f"{name}/kernel"
        stddev = (size * size * len(inputs)) ** -0.5
        self.kernel = tf.Variable(_normal(name, shape, stddev, seed), name=name)

    def __call__(self, x, wanted: slice | None = None):
        """All outputs, or the wanted ones alone, and zeros up to whole vectors of them."""
        kernel, stride = self.kernel if wanted is None else self.kernel[..., wanted], self.stride
        kernel = fill(tf.cast(kernel, x.dtype), x.shape[-1], axis=2)
        kernel = fill(kernel, self.whole(kernel.shape[-1]))
        if stride > 1 and kernel.shape[0] == 1:
            # A pool of one pixel takes the pixels that the convolution would. oneDNN's gradient of
            # a strided 1x1 kernel writes beyond its memory where channels are no multiple of the
            # vectors': wrong numbers with AVX2, a crash with AVX-512 (TensorFlow 2.21).
            x, stride = tf.nn.avg_pool2d(x, 1, stride, "SAME"), 1
        y = tf.nn.conv2d(x, kernel, strides=stride, padding="SAME")  # (B, H, W, K)
        if self.bias is None:
            return y
        bias = self.bias if wanted is None else self.bias[wanted]
        return tf.nn.bias_add(y, fill(tf.cast(bias, y.dtype), y.shape[-1]))

    def fold(self, norm: BatchNorm) -> None:
        """Compute what batch normalization makes of the outputs; `norm` then leaves them alone."""
        scale, self.bias = norm.affine()
        self.kernel.assign(self.kernel * scale)
        norm.folded = True

    def cut(self, dense: Conv) -> None:
        """Take the weights that this layer has in the dense network."""
        self.kernel.assign(dense.kernel.numpy()[:, :, self.inputs[:, None], self.outputs])

    def count(self) -> tuple[int, int]:
        weights = int(np.prod(self.kernel.shape))
        return weights, 2 * weights * self.resolution**2


class BatchNorm(Layer):
    """Batch normalization with the biased variance, in the batch and in the moving average."""

    folded = False  # whether the convolution before it computes it (`fold`)

    def __init__(self, name, channels, train_scale=True):
        super().__init__()
        self.channels = np.asarray(channels)
        zeros, ones = tf.zeros(len(channels)), tf.ones(len(channels))
        self.gamma = tf.Variable(ones, name=f"{name}/gamma", trainable=train_scale)
        self.beta = tf.Variable(zeros, name=f"{name}/beta")
        self.mu = tf.Variable(zeros, name=f"{name}/mu", trainable=False)
        self.sigma = tf.Variable(ones, name=f"{name}/sigma", trainable=False)  # a variance

    def __call__(self, x, training):
        if self.folded:
            return x
        x = fill(x, self.whole(x.shape[-1]))  # only what comes from a fork has not been
        if isinstance(self.mu, np.ndarray):  # a constant (`freeze`)
            scale, shift = (fill(value, x.shape[-1]) for value in self.affine())
            return tf.cast(tf.cast(x, tf.float32) * scale + shift, x.dtype)
        if not training:
            mean, variance = fill(self.mu, x.shape[-1]), fill(self.sigma, x.shape[-1])
            return self._fused(x, mean=mean, variance=variance, is_training=False)[0]
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            y, mean, variance = self._over_replicas(x, context)
        else:
            y, mean, variance = self._fused(x, is_training=True)
            # The kernel normalizes by the biased variance but hands back the unbiased one.
            count = tf.cast(tf.size(x) // tf.shape(x)[-1], tf.float32)
            variance *= (count - 1) / count
        for moving, value in ((self.mu, mean), (self.sigma, variance)):
            # All replicas assign the same to copies of their own, which assign_sub does not allow.
            change = (1 - BN_DECAY) * (moving - value[: len(self.channels)])
            tf.raw_ops.AssignSubVariableOp(resource=moving.handle, value=change)
        return y

    def _over_replicas(self, x, context):
        """By the statistics of all replicas' shares, which are those of the whole batch."""
        inputs = tf.cast(x, tf.float32)
        own_mean, own_variance = tf.nn.moments(inputs, axes=(0, 1, 2))
        mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, own_mean)
        # Not the mean square less the squared mean, which can come out negative.
        variance = own_variance + tf.square(own_mean - mean)
        variance = context.all_reduce(tf.distribute.ReduceOp.MEAN, variance)
        beta, gamma = fill(self.beta, x.shape[-1]), fill(self.gamma, x.shape[-1])
        y = tf.nn.batch_normalization(
            inputs, mean, variance, beta, gamma, variance_epsilon=BN_EPSILON
        )
        return tf.cast(y, x.dtype), mean, variance

    def _fused(self, x, **statistics):
        gamma, beta = fill(self.gamma, x.shape[-1]), fill(self.beta, x.shape[-1])
        return tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=BN_EPSILON, **statistics)

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand float32 `[C]` of each channel in inference."""
        values = (self.gamma, self.beta, self.mu, self.sigma)
        gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
        scale = gamma / np.sqrt(variance + BN_EPSILON)
        return scale.astype(np.float32), (beta - mean * scale).astype(np.float32)

    def cut(self, dense: BatchNorm) -> None:
        """Take the parameters and statistics that these channels have in the dense network."""
        for name in ("gamma", "beta", "mu", "sigma"):
            getattr(self, name).assign(getattr(dense, name).numpy()[self.channels])

    def count(self) -> tuple[int, int]:
        return 0, 0  # not counted, as in the paper


class Linear(Layer):
    """Fully connected layer with bias, in float32."""

    def __init__(self, name, inputs, outputs, seed=0, counts_biases=True):
        super().__init__()
        self.inputs, self.outputs = np.asarray(inputs), np.asarray(outputs)
        self.counts_biases = counts_biases
        shape = (len(inputs), len(outputs))
        weights = _normal(f"{name}/weights", shape, len(inputs) ** -0.5, seed)
        self.weights = tf.Variable(weights, name=f"{name}/weights")
        self.biases = tf.Variable(tf.zeros(len(outputs)), name=f"{name}/biases")

    def __call__(self, x):
        weights = fill(self.weights, x.shape[-1], axis=0)
        return tf.matmul(x, weights) + self.biases  # (B, K)

    def cut(self, dense: Linear) -> None:
        """Take the weights that this layer has in the dense network."""
        self.weights.assign(dense.weights.numpy()[self.inputs[:, None], self.outputs])
        self.biases.assign(dense.biases.numpy()[self.outputs])

    def count(self) -> tuple[int, int]:
        num_in, num_out = self.weights.shape
        weights = (num_in + self.counts_biases) * num_out
        return weights, 2 * weights


class DropoutReLU:
    """ReLU, in training with inverted dropout: a pure function of (seed, step) and the name.

    Both in one, so that what the next layer reads is all that the gradient needs: an output above
    0 tells that the input was, and that it was kept.
    """

    def __init__(self, name: str, keep_prob: float = 1.0):
        self.name, self.keep_prob = name, keep_prob

    def __call__(self, x, training=False, seed=None):
        if not training or self.keep_prob == 1:
            return tf.nn.relu(x)
        if seed is None:
            raise ValueError(
                f"training with dropout_keep_prob={self.keep_prob} needs dropout_seed=(seed, step)"
            )
        seed = tf.random.experimental.stateless_fold_in(seed, zlib.crc32(self.name.encode()))
        # 8 or 16 random bits a feature, where tf.nn.experimental.stateless_dropout draws 32.
        draw = tf.uint8 if self.keep_prob * 2**8 % 1 == 0 else tf.uint16
        threshold = min(max(round(self.keep_prob * (draw.max + 1)), 1), draw.max)
        scale = (draw.max + 1) / threshold

        @tf.custom_gradient
        def keep_some(x):
            size = tf.size(x)
            words = -(-size * draw.size // 4)
            bits = tf.random.stateless_uniform([words], seed, None, None, tf.uint32)
            draws = tf.reshape(tf.reshape(tf.bitcast(bits, draw), [-1])[:size], tf.shape(x))
            kept = tf.cast(draws < tf.constant(threshold, draw), x.dtype)
            y = tf.nn.relu(x) * kept * scale
            return y, lambda dy: tf.raw_ops.ReluGrad(gradients=dy * scale, features=y)

        return keep_some(x)


class Block(tf.Module):
    """Pre-activation residual block: BN, ReLU, 3x3 convolution, twice."""

    def __init__(
        self, name, config, inputs, inner, outputs, resolution, stride, first, keep_prob, seed
    ):
        super().__init__()
        train_scale = not config.bn_no_scale
        self.bn_1 = BatchNorm(f"{name}/bn_1", inputs, train_scale)
        self.relu_1 = DropoutReLU(f"{name}/dropout_1", keep_prob)
        self.conv_1 = Conv(f"{name}/conv_1", 3, inputs, inner, resolution, stride, seed)
        self.bn_2 = BatchNorm(f"{name}/bn_2", inner, train_scale)
        self.relu_2 = DropoutReLU(f"{name}/dropout_2", keep_prob)
        self.conv_2 = Conv(f"{name}/conv_2", 3, inner, outputs, resolution, 1, seed)
        self.first = first
        self.shortcut = None  # the identity
        if first and (stride > 1 or len(inputs) != len(outputs)):
            self.shortcut = Conv(f"{name}/shortcut", 1, inputs, outputs, resolution, stride, seed)

    @property
    def foldable(self) -> list[tuple[Conv, BatchNorm]]:
        """Convolutions that only batch normalization reads, and that."""
        return [(self.conv_1, self.bn_2)]

    def __call__(self, x, training=False, dropout_seed=None, wanted: slice | None = None):
        """All output channels, or the wanted ones alone."""
        h = self.relu_1(self.bn_1(x, training), training, dropout_seed)
        y = self.conv_1(h)
        y = self.conv_2(self.relu_2(self.bn_2(y, training), training, dropout_seed), wanted)
        if self.shortcut is not None:
            return y + self.shortcut(h, wanted)
        identity = h if self.first else x
        return y + (identity if wanted is None else fill(identity[..., wanted], y.shape[-1]))


# ---------------------------------------------------------------- networks


class Branch(tf.Module):
    """The layers of one group from `level` down to the next fork, and the branches behind it.

    A branch without a fork ends in `logits` for its own `classes`. The channels before a fork are
    kept in the order in which the branches behind it read them (`grouping.Partition`), so that a
    fork costs no gather: each branch takes a contiguous slice.
    """

    def __init__(self, config, partition: grouping.Partition, level=1, group=0, prefix="", seed=0):
        super().__init__()
        self.config = config
        # Its stages; none where only the classifier is split.
        self.first_level, self.last_level = level, level - 1
        self.num_branches = 0
        if level == 1:
            self._add_stem(partition, prefix, seed)
        for stage in range(level, len(config.levels)):
            self.last_level = stage
            self._add_stage(partition, stage, group, prefix, seed)
            children = partition.children(stage, group)
            if len(children) > 1:
                self._fork(partition, stage + 1, children, prefix, seed)
                return
            group = children[0]
        self._add_head(partition, group, prefix, seed)

    @staticmethod
    def behind_fork(*arguments) -> Branch:
        """A branch behind this one's fork."""
        return Branch(*arguments)

    def _add_stem(self, partition, prefix, seed):
        (size, stride, _), resolution = self.config.stem, self.config.resolution(0)
        filters, name = self._stem_features(partition), f"{prefix}init_conv"
        self.init_conv = Conv(name, size, range(3), filters, resolution, stride, seed)

    def _stem_features(self, partition) -> np.ndarray:
        """Channels of `init_conv`, in the order of unit_1's where its shortcut is the identity."""
        # The identity adds channel i to channel i, so both have to be in the order of unit_1's
        # outputs, which is the one that the branches read. Behind a convolution any order will do.
        outputs, num_filters = partition.outputs(1, 0), self.config.features(0)
        return outputs if len(outputs) == num_filters else np.arange(num_filters)

    def _add_stage(self, partition, level, group, prefix, seed):
        config = self.config
        inputs = partition.inputs(level, group) if level > 1 else self._stem_features(partition)
        outputs = partition.outputs(level, group)
        for unit, inner in enumerate(partition.inner(level, group)):
            name = f"{config.levels[level - 1]}_{unit}"
            block = Block(
                prefix + name, config, inputs, inner, outputs, config.resolution(level),
                2 if unit == 0 and level > 1 else 1, unit == 0, config.keep_prob(level), seed,
            )  # fmt: skip
            setattr(self, name, block)
            inputs = outputs

    def _fork(self, partition, level, children, prefix, seed):
        self.fork_sizes = [len(partition.inputs(level, group)) for group in children]
        self.num_branches = len(children)
        for number, group in enumerate(children):
            name = f"branch_{number}"
            branch = self.behind_fork(
                self.config, partition, level, group, f"{prefix}{name}/", seed
            )
            setattr(self, name, branch)

    def _add_head(self, partition, group, prefix, seed):
        config, last = self.config, len(self.config.levels)
        inputs, self.classes = partition.inputs(last, group), partition.classes(group)
        self.relu = DropoutReLU(f"{prefix}logits/dropout", config.keep_prob(last))
        self.unit_last, self.logits = tf.Module(), tf.Module()
        self.unit_last.bn = BatchNorm(f"{prefix}unit_last/bn", inputs)
        name = f"{prefix}logits/fc"
        self.logits.fc = Linear(name, inputs, self.classes, seed, config.counts_biases)

    @property
    def foldable(self) -> list[tuple[Conv, BatchNorm]]:
        """Besides those of the blocks: the first block passes on its normalized input alone."""
        if self.first_level > 1 or not self.config.stem or self.config.stem[-1]:
            return []  # behind a max pool, batch normalization is of other values
        return [(self.init_conv, self.stage(1)[0].bn_1)]

    def stage(self, level: int) -> list[Block]:
        """The blocks of unit_1, unit_2 or unit_3, in order."""
        name = self.config.levels[level - 1]
        return [getattr(self, f"{name}_{unit}") for unit in range(len(self.config.inner(level)))]

    def kernels(self, level: int) -> Iterator[tuple[tf.Variable, str, str]]:
        """A level's kernels in order, each with the indicators of what it reads and computes.

        They are p (the level's inputs), r1, r2 ... (inside its blocks) and q (its outputs), for
        `grouping.split_layers`.
        """
        if level == len(self.config.levels):
            yield self.logits.fc.weights, "p", "q"
            return
        for unit, block in enumerate(self.stage(level)):
            inputs, inner = "q" if unit else "p", f"r{unit + 1}"
            if block.shortcut is not None:
                yield block.shortcut.kernel, inputs, "q"
            yield block.conv_1.kernel, inputs, inner
            yield block.conv_2.kernel, inner, "q"

    @property
    def branches(self) -> list[Branch]:
        """The branches behind the fork, if there is one."""
        return [getattr(self, f"branch_{number}") for number in range(self.num_branches)]

    def leaves(self) -> Iterator[Branch]:
        """The branches that end in logits, from the first to the last group."""
        if not self.num_branches:
            yield self
        for branch in self.branches:
            yield from branch.leaves()

    @property
    def blocks(self) -> list[Block]:
        """This branch's own blocks, in order."""
        levels = range(self.first_level, self.last_level + 1)
        return [block for level in levels for block in self.stage(level)]

    def own_count(self) -> tuple[int, int]:
        """Weights, and FLOPs per image, of this branch's own layers, without what is behind its
        fork."""
        behind = [count(branch) for branch in self.branches]
        return tuple(whole - sum(of) for whole, *of in zip(count(self), *behind, strict=True))

    def own_flops(self) -> int:
        """FLOPs per image of the same."""
        return self.own_count()[1]

    def features(self, x, training=False, dropout_seed=None, wanted: slice | None = None):
        """This branch's own blocks: images or features in, features `[B, H, W, C]` out.

        `wanted` restricts the channels that come out, and what the last block computes, to those.
        """
        if self.first_level == 1:
            x = self.stem(x)
        blocks = self.blocks
        for block in blocks:
            x = block(x, training, dropout_seed, wanted if block is blocks[-1] else None)
        return x

    def stem(self, images):
        """What the first block reads."""
        x = self.init_conv(images)
        _, _, pools = self.config.stem
        return tf.nn.max_pool2d(x, 3, 2, "SAME") if pools else x

    def head(self, x, training=False, dropout_seed=None):
        """Features `[B, H, W, C]` to the logits `[B, K]` of a branch that does not fork."""
        x = tf.nn.relu(self.unit_last.bn(x, training))
        x = tf.reduce_mean(tf.cast(x, tf.float32), axis=(1, 2))  # (B, C)
        # A mean of ReLUs is its own ReLU: only the dropout matters here.
        return self.logits.fc(self.relu(x, training, dropout_seed))

    def fork(self, x) -> list[tf.Tensor]:
        """What each branch behind the fork reads of the features `[B, H, W, C]`."""
        zeros = x.shape[-1] - sum(self.fork_sizes)
        sizes = [*self.fork_sizes, zeros] if zeros else self.fork_sizes
        return tf.split(x, sizes, axis=-1)[: self.num_branches]

    def leaf_logits(self, x, training=False, dropout_seed=None, wanted=None) -> list[tf.Tensor]:
        """Logits `[B, classes of the leaf]` of every leaf, from the first to the last group.

        `wanted`, a collection of leaves, restricts them, and what is computed, to those.
        """
        x = self.features(x, training, dropout_seed)
        if not self.num_branches:
            return [self.head(x, training, dropout_seed)]
        logits = []
        for branch, part in zip(self.branches, self.fork(x), strict=True):
            if wanted is None or any(leaf in wanted for leaf in branch.leaves()):
                logits += branch.leaf_logits(part, training, dropout_seed, wanted)
        return logits


class Network:
    """What a dense network and its tree have in common; each is a branch too."""

    @property
    def alphas(self) -> dict[str, tf.Variable]:
        """alpha `[G, D]` of every free indicator by its name, from the input to the output."""
        return {}

    def __call__(self, images, training=False, dropout_seed=None):
        """Logits of a batch.

        Args:
            images: `[B, H, W, 3]`, standardized. Their dtype (float32 or bfloat16) is the
                precision of the convolutions; statistics, classifier and logits are float32.
            training: use the batch's statistics, update the moving ones, apply dropout.
            dropout_seed: `(seed, step)`, needed in training where dropout_keep_prob < 1; the same
                pair drops the same features.

        Returns:
            float32 `[B, num_classes]`, in the order of the labels.
        """
        logits = self.leaf_logits(images, training, dropout_seed)
        return self.in_label_order(logits)

    def in_label_order(self, leaf_logits: list[tf.Tensor]) -> tf.Tensor:
        """Join the leaves' logits and put them into the order of the labels."""
        if len(leaf_logits) == 1:
            return leaf_logits[0]
        classes = np.concatenate([leaf.classes for leaf in self.leaves()])
        return tf.gather(tf.concat(leaf_logits, axis=1), np.argsort(classes), axis=1)

    @property
    def decayed_variables(self) -> list[tf.Variable]:
        """Convolution kernels and fully connected weights, which weight decay applies to."""
        decayed = [layer for layer in layers(self) if not isinstance(layer, BatchNorm)]
        return [x.weights if isinstance(x, Linear) else x.kernel for x in decayed]


class Dense(Network):
    """A dense network, with the alphas of its groups where `config.groups` has any."""

    def __init__(self, config: networks.Config, seed: int = 0):
        super().__init__(config, grouping.Partition(config), seed=seed)
        self.group = tf.Module()
        for name, shape in grouping.indicator_shapes(config).items():
            split = tf.Module()
            path = f"group/split_{name}/alpha"
            split.alpha = tf.Variable(_normal(path, shape, 0.01, seed), name=path)
            setattr(self.group, f"split_{name}", split)

    @property
    def alphas(self) -> dict[str, tf.Variable]:
        names = grouping.indicator_shapes(self.config)
        return {name: getattr(self.group, f"split_{name}").alpha for name in names}


class Tree(Network):
    """The tree: a trunk and branches that share no weights and exchange nothing.

    Args:
        config: the network that was cut.
        assignment: group of every feature and class (`grouping.hard_assignments`).
    """

    def __init__(self, config: networks.Config, assignment: dict[str, np.ndarray], seed: int = 0):
        partition = grouping.Partition(config, assignment)
        self.assignment = partition.assignment
        super().__init__(config, partition, seed=seed)


class ResNet(Dense, Branch):
    """The dense Wide ResNet, or another network of residual blocks."""


class SplitResNet(Tree, Branch):
    """Its tree."""


def make(config: networks.Config, assignment: dict | None = None, seed: int = 0) -> Network:
    """The network of a config with newly drawn weights: dense, or the tree of an assignment."""
    file, dense, tree = config.classes
    module = importlib.import_module(file)
    if assignment is None:
        return getattr(module, dense)(config, seed)
    return getattr(module, tree)(config, assignment, seed)


def split(net: Dense, assignment: dict[str, np.ndarray] | None = None) -> Tree:
    """Cut a dense network into the tree of its hard groups, or of an assignment's.

    The tree computes what the dense network does once every weight between different groups is
    zero: the same pre-activation blocks, batch normalization parameters and moving statistics.

    Raises:
        ValueError: a group is empty; names the indicator.
    """
    tree = make(net.config, assignment or grouping.hard_assignments(net))
    dense = {path_of(layer): layer for layer in layers(net)}
    for layer in layers(tree):
        layer.cut(dense[re.sub(r"branch_\d+/", "", path_of(layer))])
    return tree


def equal_tree(config: networks.Config) -> Tree:
    """A new tree of equal groups: what a split saves by its numbers alone."""
    shapes = grouping.indicator_shapes(config).items()
    assignment = {name: np.arange(size) * number // size for name, (number, size) in shapes}
    return make(config, assignment)


def mask(net: Dense) -> None:
    """Set every weight of the dense network between different groups to zero, in place.

    Raises:
        ValueError: a group is empty; names the indicator.
    """
    for kernel, same in grouping.same_group(net):
        kernel.assign(kernel * same.astype(np.float32))


def name_of(variable: tf.Variable) -> str:
    """Name of a variable as the published code has it, such as `unit_1_0/conv_1/kernel`."""
    return variable.name.removesuffix(":0")


def path_of(layer: Conv | BatchNorm | Linear) -> str:
    """Name of a layer, which its variables bear, such as `unit_1_0/conv_1`."""
    return layer.variables[0].name.rpartition("/")[0]


def layers(module: tf.Module) -> Iterator[Conv | BatchNorm | Linear]:
    """Every layer with weights in a network, a branch and what is behind it, a block, a layer."""
    for part in (module, *module.submodules):
        if isinstance(part, Conv | BatchNorm | Linear):
            yield part


def count(module: tf.Module) -> tuple[int, int]:
    """Weights and FLOPs per image of a network, or of any part of it (see `layers`).

    Convolution kernels, fully connected weights and biases; 2 FLOPs per multiply-add, (in + 1) *
    out * 2 for the fully connected layer. WRN-16-8: (11000340, 3096383688).
    """
    weights, flops = zip(*(layer.count() for layer in layers(module)), strict=True)
    return sum(weights), sum(flops)


# ---------------------------------------------------------------- a network's description


def to_dict(net: Network) -> dict:
    """What a checkpoint says about its network, in JSON's types: `build` makes it again."""
    config = dataclasses.asdict(net.config)
    if config["image_size"] == type(net.config).image_size:  # the default
        del config["image_size"]  # as in checkpoints that are older than other sizes
    description = {"network": "dense", "config": config}
    if net.config.network != "wrn":  # as in those that are older than other networks
        description["architecture"] = net.config.network
    if isinstance(net, Tree):
        description["network"] = TREE
        description["assignment"] = {name: of.tolist() for name, of in net.assignment.items()}
    return description


def build(description: dict, seed: int = 0) -> Network:
    """The network of a description, with newly drawn weights."""
    config_class = networks.config_class(description.get("architecture", "wrn"))
    config = config_class(**description["config"])
    if description["network"] == TREE:
        return make(config, description["assignment"], seed)
    if description["network"] != "dense":
        raise ValueError(
            f"its network is of the kind {description['network']!r}, which this version does not "
            "read: run split.sh again in another TRAIN_DIR, or remove this run"
        )
    return make(config, seed=seed)


def copy(net: Network) -> Network:
    """The same network with variables of its own, on the device or in the strategy's scope."""
    twin = build(to_dict(net))
    load_weights(twin, {name_of(variable): variable.numpy() for variable in net.variables})
    return twin


def fold(module: tf.Module) -> None:
    """Make batch normalization a part of the convolution before it, in place: for inference alone.

    What it normalizes otherwise, sums of two layers, stays as it is.
    """
    for part in (module, *module.submodules):
        for conv, norm in getattr(part, "foldable", []):
            conv.fold(norm)


def freeze(module: tf.Module, lanes: int = LANES) -> None:
    """`fold`, and make the weights of every layer (see `layers`) constant, in place.

    `lanes` is that of the layers: with 1 they compute on no more channels than they have.

    oneDNN arranges a constant once, a variable anew in every call: this is for single images. What
    is left of batch normalization is a multiplication and an addition then, which start faster than
    TensorFlow's operation for it and take a little longer on batches. TensorFlow holds about
    twenty copies of a graph's constants, of one of its variables.
    """
    fold(module)
    for layer in layers(module):
        layer.lanes = lanes
        for name, value in vars(layer).copy().items():
            if isinstance(value, tf.Variable):
                setattr(layer, name, value.numpy())  # constant in each graph that it comes into


def load_weights(net: Network, tensors: dict[str, np.ndarray]) -> None:
    """Assign every variable of `net` from tensors by name; names and shapes must agree exactly.

    Raises:
        ValueError: tells which variables are missing, left over or of another shape.
    """
    variables = {name_of(variable): variable for variable in net.variables}
    missing, extra = sorted(variables.keys() - tensors), sorted(tensors.keys() - variables)
    if missing or extra:
        raise ValueError(
            f"another network's weights: {len(missing)} variables are missing {missing[:3]}, "
            f"{len(extra)} are left over {extra[:3]}"
        )
    for name, variable in variables.items():
        if tensors[name].shape != variable.shape:
            raise ValueError(
                f"another network's weights: {name} has the shape {list(tensors[name].shape)}, "
                f"expected {variable.shape.as_list()}"
            )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def class_groups(net: Network) -> list[np.ndarray]:
    """Classes of each group: of a tree's leaves, or as a grouped dense network stands now."""
    if "q1" in net.alphas:
        group_of = np.argmax(net.alphas["q1"].numpy(), axis=0)
        return [np.flatnonzero(group_of == g) for g in range(net.config.groups[-1])]
    return [leaf.classes for leaf in net.leaves()]
