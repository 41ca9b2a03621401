"""grouping.py against slow NumPy loops written from the paper's equations, and closed forms."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import grouped_net, one_hot_groups

import grouping
import resnet

RNG = np.random.default_rng(0)


def softmax(alpha):
    e = np.exp(alpha - alpha.max(axis=0))
    return e / e.sum(axis=0)


def slow_weight_split(kernel, p, q):
    """Eq. (4) group by group and row by row, with the normalization of the published code."""
    size, _, num_in, num_out = kernel.shape
    num_groups = len(p)
    total = 0.0
    for g in range(num_groups):
        for d in range(num_in):
            row = (1 - p[g, d]) * kernel[:, :, d, :] * q[g]
            total += np.sqrt(np.mean(row**2, axis=(0, 1)).sum()) / (num_in * np.sqrt(num_out))
        for k in range(num_out):
            column = p[g] * kernel[:, :, :, k] * (1 - q[g, k])
            total += np.sqrt(np.mean(column**2, axis=(0, 1)).sum()) / (num_out * np.sqrt(num_in))
    return total / (2 * (num_groups - 1) / num_groups * np.sqrt(1 / (size * size * num_in)))


@pytest.mark.parametrize(
    "num_groups, num_in, num_out, size", [(2, 8, 6, 3), (3, 7, 12, 1), (5, 9, 9, 3)]
)
def test_terms_agree_with_loops(num_groups, num_in, num_out, size):
    p, q = (softmax(RNG.normal(size=(num_groups, n))) for n in (num_in, num_out))
    kernel = RNG.normal(size=(size, size, num_in, num_out))
    ours = grouping.weight_split(*(tf.constant(x, tf.float32) for x in (kernel, p, q)))
    np.testing.assert_allclose(ours, slow_weight_split(kernel, p, q), rtol=1e-5)
    pairs = sum(p[i] @ p[j] for i in range(num_groups) for j in range(i + 1, num_groups))
    expected = pairs / (num_in * (num_groups - 1) / (2 * num_groups))
    np.testing.assert_allclose(grouping.overlap(tf.constant(p, tf.float32)), expected, rtol=1e-5)
    expected = sum(p[g].sum() ** 2 for g in range(num_groups)) / (num_in**2 / num_groups)
    np.testing.assert_allclose(grouping.uniform(tf.constant(p, tf.float32)), expected, rtol=1e-5)


def test_fully_connected_weights_are_a_1x1_kernel():
    p, q = (tf.constant(softmax(RNG.normal(size=(3, n))), tf.float32) for n in (6, 9))
    weights = tf.constant(RNG.normal(size=(6, 9)), tf.float32)
    expected = grouping.weight_split(weights[None, None], p, q)
    np.testing.assert_allclose(grouping.weight_split(weights, p, q), expected, rtol=1e-6)


@pytest.mark.parametrize("num_groups", [2, 4, 5])
def test_closed_forms(num_groups):
    size = 4 * num_groups
    even = tf.fill([num_groups, size], 1 / num_groups)
    sharp = tf.constant(np.repeat(np.eye(num_groups), 4, axis=1), tf.float32)
    collapsed = tf.constant(np.eye(num_groups)[np.zeros(size, int)].T, tf.float32)
    values = [
        (grouping.overlap(q).numpy(), grouping.uniform(q).numpy()) for q in (even, sharp, collapsed)
    ]
    np.testing.assert_allclose(values, [(1, 1), (0, 1), (0, num_groups)], atol=1e-6)


def test_weight_split_is_one_for_new_weights_and_zero_for_a_block_diagonal():
    kernel = tf.random.stateless_normal([3, 3, 64, 128], [0, 1], stddev=(9 * 64) ** -0.5)
    even = [tf.fill([2, n], 0.5) for n in (64, 128)]
    np.testing.assert_allclose(grouping.weight_split(kernel, *even), 1, atol=0.02)
    p, q = (np.repeat(np.eye(2), n // 2, axis=1).astype(np.float32) for n in (64, 128))
    block = kernel * (p.T @ q)
    assert grouping.weight_split(block, tf.constant(p), tf.constant(q)).numpy() == 0


def test_saturated_indicators_have_finite_gradients():
    net = grouped_net((2, 2, 2))
    for alpha in net.alphas.values():
        alpha.assign(200 * one_hot_groups(RNG, *alpha.shape))  # softmax is exactly 0 and 1 there
    resnet.mask(net)
    with tf.GradientTape() as tape:
        total = tf.add_n(list(grouping.regularizers(net).values()))
    grads = tape.gradient(total, net.trainable_variables, unconnected_gradients="zero")
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    "num_groups, merged, runs",
    [
        (3, 2, [[0, 1], [2]]),
        (4, 2, [[0, 1], [2, 3]]),
        (8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (2, 2, [[0], [1]]),
    ],
)
def test_merge_runs(num_groups, merged, runs):
    assert [list(run) for run in grouping.merge_runs(num_groups, merged)] == runs
    q = RNG.random((num_groups, 5))
    expected = [q[run].sum(axis=0) for run in runs]
    np.testing.assert_allclose(grouping.merge(tf.constant(q), merged), expected)


@pytest.mark.parametrize(
    "groups", [(2, 1, 2), (4, 2, 2), (0, 1, 2), (1, 1, 101), (2, 2), (17, 17, 17), (1, 2.0, 2)]
)
def test_impossible_groups_are_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        resnet.NetworkConfig(k=1, groups=groups)


@pytest.mark.parametrize("groups", [(1, 1, 1), (1, 1, 100), (1, 2, 3), (2, 3, 5), (16, 16, 64)])
def test_possible_groups(groups):
    k = 1 if groups[2] < 100 else 2
    assert resnet.NetworkConfig(k=k, groups=groups).groups == groups
    config = resnet.NetworkConfig(k=k, groups=np.array(groups))
    assert config.groups == groups and all(type(g) is int for g in config.groups)


def test_nothing_split_gives_zeros():
    net = resnet.ResNet(resnet.NetworkConfig(k=1))
    assert {name: float(v) for name, v in grouping.regularizers(net).items()} == {
        "overlap": 0, "weight_split": 0, "uniform": 0,
    }  # fmt: skip


def test_new_network_starts_at_one():
    net = resnet.ResNet(resnet.NetworkConfig(k=4, groups=(2, 4, 4)))
    for weighted in (True, False):
        values = [float(v) for v in grouping.regularizers(net, weighted).values()]
        np.testing.assert_allclose(values, 1, atol=0.02)


def test_empty_group_is_named():
    net = grouped_net((1, 2, 2))
    alpha = np.zeros(net.alphas["r21"].shape)
    alpha[1] = 1
    net.alphas["r21"].assign(alpha)
    with pytest.raises(ValueError, match="r21 leaves group 0 empty.*gamma3"):
        resnet.split(net)


@pytest.mark.parametrize("groups", [(2, 2, 2), (2, 4, 4), (1, 2, 3), (3, 3, 3)])
def test_equal_groups_are_equal_and_the_likeliest(groups):
    net = grouped_net(groups, k=1)
    equal = grouping.equal_assignments(net)
    hard = grouping.hard_assignments(net)
    for name, group_of in equal.items():
        num_groups, size = net.alphas[name].shape
        sizes = np.bincount(group_of, minlength=num_groups)
        assert sizes.sum() == size and sizes.max() - sizes.min() <= 1
        shares = tf.nn.log_softmax(net.alphas[name], axis=0).numpy()
        best = shares[group_of, np.arange(size)].sum()
        assert best <= shares[hard[name], np.arange(size)].sum() + 1e-4
        # No two columns would do better in each other's place.
        swapped = shares[group_of][:, np.arange(size)]  # share of column j in the group of i
        own = np.diag(swapped)
        assert (swapped + swapped.T <= own[:, None] + own + 1e-4).all()
    tree = resnet.split(net, equal)
    if len(set(groups)) == 1 or groups == (2, 4, 4):
        expected = resnet.count(resnet.equal_tree(net.config))
        np.testing.assert_allclose(resnet.count(tree), expected, rtol=0.02)


def test_equal_groups_that_are_so_already_stay():
    net = resnet.ResNet(resnet.NetworkConfig(k=1, groups=(2, 2, 2)))
    for alpha in net.alphas.values():
        group_of = np.random.default_rng(0).permutation(np.arange(alpha.shape[1]) % 2)
        alpha.assign(5.0 * np.eye(2)[group_of].T)
    equal, hard = grouping.equal_assignments(net), grouping.hard_assignments(net)
    assert all(np.array_equal(equal[name], hard[name]) for name in hard)
    assert resnet.count(resnet.split(net, equal)) == resnet.count(resnet.equal_tree(net.config))


def test_weight_split_holds_groups_back_by_their_number():
    """Near uniform a deviation of one indicator raises R_W by its square over G."""
    rng = np.random.default_rng(0)
    kernel = tf.constant(rng.normal(size=(3, 3, 64, 64)), tf.float32)
    raised = {}
    for num_groups in (2, 3, 4):
        alpha = 0.3 * rng.normal(size=(num_groups, 64)).astype(np.float32)
        alpha -= alpha.mean(axis=0)
        even = grouping.soft_assignment(tf.zeros_like(alpha))
        term = [grouping.weight_split(kernel, p, even)
                for p in (grouping.soft_assignment(tf.constant(alpha)), even)]  # fmt: skip
        raised[num_groups] = float(term[0] - term[1]) / np.sum(alpha**2)
    for num_groups in (3, 4):
        assert raised[num_groups] * num_groups == pytest.approx(2 * raised[2], rel=0.15)


@pytest.mark.parametrize("groups", [(1, 1, 4), (2, 3, 5)])
def test_squares_inside_are_those_that_the_cut_keeps(groups):
    net = grouped_net(groups)
    shares = grouping.squares_inside(net)
    kernels = [kernel for kernel, *_ in grouping.split_layers(net)]
    before = [np.square(kernel.numpy()).sum() for kernel in kernels]
    resnet.mask(net)
    after = [np.square(kernel.numpy()).sum() for kernel in kernels]
    np.testing.assert_allclose(list(shares.values()), np.divide(after, before), rtol=1e-5)
    assert max(shares.values()) < 0.8 and set(grouping.squares_inside(net).values()) == {1.0}


@pytest.mark.parametrize("damage", ["missing", "short", "empty group"])
def test_partition_checks_its_index_lists(damage):
    net = grouped_net((1, 1, 4))
    assignment = grouping.hard_assignments(net)
    if damage == "missing":
        del assignment["q1"]
    elif damage == "short":
        assignment["p1"] = assignment["p1"][1:]
    else:
        assignment["p1"] = np.minimum(assignment["p1"], 2)
    with pytest.raises(ValueError, match="indicator"):
        grouping.Partition(net.config, assignment)
