"""The mathematics of SplitNet (Kim et al., ICML 2017): groups of classes and of features.

Equation numbers are the paper's. An *indicator* tells how much each of D features (or classes)
belongs to each of G groups: `[G, D]`, every column sums to 1. It is the softmax of a trainable
`alpha [G, D]`. `groups` runs from the input to the output and is of a network's last levels, which
can be split; a network tells in its config (`networks.Config`) what these are. Here they have the
numbers of the published code, counted from the output: 1 is the classifier.

Indicators of level s (whose groups are `groups[-s]`):

    ps            its inputs
    rs1 .. rsn    inside it, where it has residual blocks
    qs            its outputs; q1: the classes

The outputs of a level are the inputs of the next one: q2 is p1 with neighbouring groups added up,
q3 is p2 treated likewise, and so on. So they are not free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from networks import NetworkConfig, format_groups  # noqa: F401, their names for other files
from utils import tf


# ---------------------------------------------------------------- levels and their groups


def split_levels(config) -> Iterator[tuple[int, int, int]]:
    """Every level that is split: its number in the network, its number s, its groups."""
    last = len(config.levels)
    for s, num_groups in zip(range(len(config.groups), 0, -1), config.groups, strict=True):
        if num_groups > 1:
            yield last + 1 - s, s, num_groups


def merge_runs(num_groups: int, num_merged: int) -> list[range]:
    """Divide `num_groups` neighbours into `num_merged` runs, the longer ones first.

    3 -> 2 gives {0, 1}, {2}. Run m holds the sub-groups of super-group m.
    """
    if not 1 <= num_merged <= num_groups:
        raise ValueError(f"{num_groups} groups cannot be merged into {num_merged}")
    short, longer = divmod(num_groups, num_merged)
    bounds = np.cumsum([0] + [short + (m < longer) for m in range(num_merged)])
    return [range(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def groups_below(groups: Sequence[int]) -> list[list[int]]:
    """The groups of the last level of `groups` below each group of its first, level by level.

    2-3-4 gives {0, 1, 2}, {3}, where 4 merged into 2 at once would be {0, 1}, {2, 3}.
    """
    below = [[group] for group in range(groups[-1])]
    for num_merged in reversed(groups[:-1]):
        below = [sum(below[run.start : run.stop], []) for run in merge_runs(len(below), num_merged)]
    return below


# ---------------------------------------------------------------- soft assignments


def soft_assignment(alpha: tf.Tensor) -> tf.Tensor:
    """Indicator `[G, D]` of `alpha [G, D]`: a softmax over the groups, eq. (3)."""
    return tf.nn.softmax(alpha, axis=0)


def merge(q: tf.Tensor, num_merged: int) -> tf.Tensor:
    """Add up neighbouring groups: indicator `[G, D]` -> `[num_merged, D]`."""
    if q.shape[0] == num_merged:
        return q
    sizes = [len(run) for run in merge_runs(q.shape[0], num_merged)]
    return tf.stack([tf.reduce_sum(part, axis=0) for part in tf.split(q, sizes)])


def overlap(q: tf.Tensor) -> tf.Tensor:
    """R_D, eq. (5), of an indicator `[G, D]`: sum over i<j of <q_i, q_j>, 1 when uniform.

    The pairs' sum is half of |sum_g q_g|^2 - sum_g |q_g|^2.
    """
    num_groups, size = q.shape
    pairs = (tf.reduce_sum(tf.square(tf.reduce_sum(q, axis=0))) - tf.reduce_sum(tf.square(q))) / 2
    return pairs / (size * (num_groups - 1) / (2 * num_groups))


def uniform(q: tf.Tensor) -> tf.Tensor:
    """R_E, eq. (6), of an indicator `[G, D]`: squared group sizes, 1 when balanced, G at worst."""
    num_groups, size = q.shape
    return tf.reduce_sum(tf.square(tf.reduce_sum(q, axis=1))) / (size**2 / num_groups)


def _sqrt(x: tf.Tensor) -> tf.Tensor:
    """Square root whose gradient at 0 is 0: a saturated indicator empties rows and columns."""
    positive = x > 0
    return tf.where(positive, tf.sqrt(tf.where(positive, x, 1.0)), 0.0)


def weight_split(kernel: tf.Tensor, p: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
    """R_W, eq. (4), of one layer: the weights that join different groups, 1 when uniform.

    Args:
        kernel: `[f, f, D, K]` of a convolution or `[D, K]` of a fully connected layer.
        p: indicator `[G, D]` of its inputs.
        q: indicator `[G, K]` of its outputs.

    The norms of rows and columns are those of S = mean over f, f of squared weights: with Q_g
    diagonal, row d of (I - P_g) W Q_g has the norm (1 - p_gd) sqrt(sum_k S_dk q_gk^2), so that two
    small matrix products serve all groups at once.
    """
    kernel = tf.cast(kernel, tf.float32)
    fan = int(np.prod(kernel.shape[:-1]))  # f * f * D
    if len(kernel.shape) == 4:
        kernel2 = tf.reduce_mean(tf.square(kernel), axis=(0, 1))  # S: (D, K)
    else:
        kernel2 = tf.square(kernel)
    num_groups, (num_in, num_out) = p.shape[0], kernel2.shape
    rows = (1 - p) * _sqrt(tf.matmul(tf.square(q), kernel2, transpose_b=True))  # (G, D)
    columns = (1 - q) * _sqrt(tf.matmul(tf.square(p), kernel2))  # (G, K)
    value = tf.reduce_sum(rows) / (num_in * num_out**0.5)
    value += tf.reduce_sum(columns) / (num_out * num_in**0.5)
    # What a uniform indicator gives on weights as they are drawn, N(0, 1 / (f * f * D)).
    return value / (2 * (num_groups - 1) / num_groups * fan**-0.5)


# ---------------------------------------------------------------- the network's indicators


def indicator_shapes(config) -> dict[str, tuple[int, int]]:
    """(G, D) of every free indicator of a network's config, from the input to the output."""
    shapes = {}
    for level, s, num_groups in split_levels(config):
        shapes[f"p{s}"] = (num_groups, config.features(level - 1))
        for i, size in enumerate(config.inner(level), start=1):
            shapes[f"r{s}{i}"] = (num_groups, size)
        if s == 1:
            shapes["q1"] = (num_groups, config.num_classes)
    return shapes


def soft_assignments(net) -> dict[str, tf.Tensor]:
    """Every indicator of a dense network by name, the merged outputs q2, q3 ... included."""
    soft = {name: soft_assignment(alpha) for name, alpha in net.alphas.items()}
    for _, s, num_groups in split_levels(net.config):
        if s > 1:
            soft[f"q{s}"] = merge(soft[f"p{s - 1}"], num_groups)
    return soft


def split_layers(net) -> Iterator[tuple[tf.Variable, str, str]]:
    """(kernel, input indicator, output indicator) of every split layer, in network order."""
    for level, s, _ in split_levels(net.config):
        for kernel, *names in net.kernels(level):  # such as p and r1, for p3 and r31
            inputs, outputs = (f"{name[0]}{s}{name[1:]}" for name in names)
            yield kernel, inputs, outputs


def regularizer_terms(net, equal_growth: bool = False) -> dict[str, list[tf.Tensor]]:
    """The values behind `regularizers`, in network order; empty lists if nothing is split."""

    def overlap_of_pairs(q: tf.Tensor) -> tf.Tensor:
        num_groups = q.shape[0]
        return num_groups * (num_groups - 1) / 2 * overlap(q)

    soft = soft_assignments(net)
    free = [name for name in net.alphas if name not in ("p1", "q1")]

    def per_indicator(term) -> list[tf.Tensor]:
        values = [term(soft[name]) for name in free]
        if "p1" in soft:  # the classifier's two share one value
            values.append((term(soft["p1"]) + term(soft["q1"])) / 2)
        return values

    return {
        "overlap": per_indicator(overlap_of_pairs if equal_growth else overlap),
        "weight_split": [weight_split(w, soft[p], soft[q]) for w, p, q in split_layers(net)],
        "uniform": per_indicator(uniform),
    }


def regularizers(net, weighted: bool = True, equal_growth: bool = False) -> dict[str, tf.Tensor]:
    """The three terms of eq. (2) for a dense network, each a float32 scalar without its gamma.

    Args:
        net: a dense network, such as a `resnet.ResNet`.
        weighted: combine the layers' R_W weighted by their own values (no gradient through the
            weights), so that the least separated layers are pushed most; else their mean.
        equal_growth: let R_D of an indicator of G groups count G (G - 1) / 2 times, once for each
            pair of groups; see `growth_rate`.

    Returns:
        `overlap` (R_D), `weight_split` (R_W) and `uniform` (R_E): each is 1 for uniform indicators
        on newly drawn weights (R_D the mean number of pairs with `equal_growth`), and all are 0
        where nothing is split.
    """
    terms = regularizer_terms(net, equal_growth)
    if not terms["overlap"]:
        return {name: tf.zeros([]) for name in terms}
    means = {name: tf.reduce_mean(tf.stack(values)) for name, values in terms.items()}
    if weighted:
        values = tf.stack(terms["weight_split"])
        weights = tf.stop_gradient(values)
        means["weight_split"] = tf.math.divide_no_nan(
            tf.reduce_sum(weights * values), tf.reduce_sum(weights)
        )
    return means


def growth_rate(name: str, shape: tuple[int, int]) -> float:
    """Factor of an indicator's learning rate that makes up for its size and its groups.

    R_D is a mean over D columns, so a deviation of alpha `[G, D]` grows by a share of itself that
    goes with 1 / D: the factor has D / 100, which is 1 for 100 classes. It is twice as high for p1
    and q1, which share one of the values that R_D is the mean of. Then the classes are decided with
    the features and not after them, by the classifier's weights (docs/grouping.md).

    Near uniform, R_D drives a deviation apart by 1 / (G (G - 1)) and R_W holds it back by 1 / G, up
    to factors that do not depend on G. So for many groups R_W wins and they do not form, unless R_D
    counts more. G - 1 times keeps the balance of two groups, but was not enough for four beside a
    strong R_W (docs/grouping.md). So R_D counts the pairs, G (G - 1) / 2 (`regularizers`): beside
    R_W it is G / 2 times as strong as for two groups. The rate has G / 2, which gives R_W the speed
    that it has for two groups.
    """
    num_groups, size = shape
    shared = 2 if name in ("p1", "q1") else 1
    return shared * num_groups / 2 * size / 100


def sharpness(net) -> dict[str, float]:
    """Mean largest share of each free indicator's columns: 1/G when uniform, 1 when decided."""
    return {
        name: float(tf.reduce_mean(tf.reduce_max(soft_assignment(alpha), axis=0)))
        for name, alpha in net.alphas.items()
    }


# ---------------------------------------------------------------- hard partitions


def hard_assignments(net) -> dict[str, np.ndarray]:
    """The group (argmax of the column) of every feature and class, `[D]` for each free indicator.

    Raises:
        ValueError: a group is empty, so that a branch would have no features or no classes.
    """
    assignment = {}
    for name, alpha in net.alphas.items():
        assignment[name] = np.argmax(alpha.numpy(), axis=0)
        sizes = np.bincount(assignment[name], minlength=alpha.shape[0])
        if not sizes.all():
            raise ValueError(
                f"indicator {name} leaves group {int(np.argmin(sizes))} empty (sizes "
                f"{'/'.join(map(str, sizes))}), so the network cannot be cut: group again with a "
                "larger gamma3 (the balance term), or for longer"
            )
    return assignment


def equal_assignments(net) -> dict[str, np.ndarray]:
    """As `hard_assignments`, but every group gets the same number of columns, one more or less.

    Of all such assignments the one with the largest sum of log shares. Parents stay the union of
    their children.
    """
    from scipy.optimize import linear_sum_assignment

    assignment = {}
    for name, alpha in net.alphas.items():
        log_shares = tf.nn.log_softmax(alpha, axis=0).numpy().astype(np.float64)  # (G, D)
        num_groups, size = log_shares.shape
        least = size // num_groups
        # A place in a group for each column: `least` that must be filled, then one that may be.
        groups = np.repeat(np.arange(num_groups), least + 1)
        optional = np.tile(np.arange(least + 1) == least, num_groups)
        cost = -log_shares[groups].T + optional * (1 + 2 * size * np.abs(log_shares).max())
        _, places = linear_sum_assignment(cost)
        assignment[name] = groups[places]
    return assignment


def given_assignment(config, class_groups: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What `hard_assignments` gives, from given classes of each group of the classifier.

    Features are shared out in proportion to the classes, in runs, every group at least one.
    """
    classes = np.array([len(group) for group in class_groups])
    assignment = {}
    for name, (_, size) in indicator_shapes(config).items():
        if name == "q1":
            assignment[name] = np.zeros(size, np.int64)
            for number, group in enumerate(class_groups):
                assignment[name][group] = number
            continue
        s = int(name[1])
        shares = [classes[below].sum() for below in groups_below(config.groups[-s:])]
        bounds = np.cumsum(shares) / classes.sum() * (size - len(shares))
        sizes = np.diff(np.round(bounds).astype(int), prepend=0) + 1
        assignment[name] = np.repeat(np.arange(len(shares)), sizes)
    return assignment


def merged_assignments(config, assignment: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`assignment` with q2, q3 ... added: the super-group of each feature's sub-group."""
    merged = dict(assignment)
    for _, s, num_groups in split_levels(config):
        if s > 1:
            runs = merge_runs(config.groups[-(s - 1)], num_groups)
            parent = np.repeat(np.arange(num_groups), [len(run) for run in runs])
            merged[f"q{s}"] = parent[assignment[f"p{s - 1}"]]
    return merged


def same_group(net) -> Iterator[tuple[tf.Variable, np.ndarray]]:
    """Every split layer's weights `[..., D, K]`, and which join features of one group: bool
    `[D, K]`.

    Raises:
        ValueError: a group is empty; names the indicator.
    """
    groups = merged_assignments(net.config, hard_assignments(net))
    for kernel, inputs, outputs in split_layers(net):
        yield kernel, groups[inputs][:, None] == groups[outputs]


def squares_inside(net) -> dict[str, float]:
    """Share of each split layer's squared weights that joins features of one group.

    The cut removes the others, so it costs nothing where this is 1.

    Raises:
        ValueError: a group is empty.
    """
    shares = {}
    for kernel, same in same_group(net):
        squares = np.square(kernel.numpy())
        shares[kernel.name.rpartition("/")[0]] = float((squares * same).sum() / squares.sum())
    return shares


class Partition:
    """Which of the dense network's channels and classes each group owns, level by level.

    `assignment` holds the group of every feature (`hard_assignments`). Without it nothing is
    split, and the one group of each level owns everything. A group's output features are those of
    its sub-groups one after the other, so that groups nest and each sub-group reads a contiguous
    slice.
    """

    def __init__(self, config, assignment: dict[str, np.ndarray] | None = None):
        self.config = config
        self.assignment = {
            name: np.asarray(of, np.int64) for name, of in (assignment or {}).items()
        }
        self.last = len(config.levels)
        self.groups = dict.fromkeys(range(1, self.last + 1), 1)
        if assignment:
            self.groups |= {level: number for level, _, number in split_levels(config)}
            self._check()

    def _check(self) -> None:
        shapes = indicator_shapes(self.config)
        if list(shapes) != list(self.assignment):
            raise ValueError(
                f"groups {format_groups(self.config.groups)} need the indicators {list(shapes)}, "
                f"got {list(self.assignment)}"
            )
        for name, (num_groups, size) in shapes.items():
            group_of = self.assignment[name]
            if group_of.shape != (size,) or set(group_of.tolist()) != set(range(num_groups)):
                raise ValueError(
                    f"indicator {name} must put {size} features into the groups 0 to "
                    f"{num_groups - 1}, none of them empty; got {group_of.shape[0]} features in "
                    f"groups {sorted(set(group_of.tolist()))}"
                )

    def _members(self, name: str, group: int, size: int) -> np.ndarray:
        if name not in self.assignment:
            return np.arange(size)
        return np.flatnonzero(self.assignment[name] == group)

    def children(self, level: int, group: int) -> range:
        """The groups of the next level that `group` divides into."""
        return merge_runs(self.groups[level + 1], self.groups[level])[group]

    def inputs(self, level: int, group: int) -> np.ndarray:
        """Channels that the group reads from the level below it."""
        name = f"p{self.last + 1 - level}"
        return self._members(name, group, self.config.features(level - 1))

    def inner(self, level: int, group: int) -> list[np.ndarray]:
        """Channels inside the level, such as those between the two convolutions of each block."""
        sizes = enumerate(self.config.inner(level), start=1)
        s = self.last + 1 - level
        return [self._members(f"r{s}{i}", group, size) for i, size in sizes]

    def outputs(self, level: int, group: int) -> np.ndarray:
        """Channels that the group computes, its sub-groups' one after the other."""
        return np.concatenate([self.inputs(level + 1, g) for g in self.children(level, group)])

    def classes(self, group: int) -> np.ndarray:
        """Classes of a group of the classifier."""
        return self._members("q1", group, self.config.num_classes)
