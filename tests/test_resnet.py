"""resnet.py: the reference numbers, the counts, and that the cut is exact."""

import glob
import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, grouped_net, images, randomize

import grouping
import objective
import resnet
import restore

REFERENCE = sorted(glob.glob(os.path.join(ROOT, "tests", "reference", "*.npz")))
ALL_GROUPS = [(1, 1, 4), (1, 2, 2), (2, 2, 2), (3, 3, 3), (2, 4, 4), (2, 4, 8), (1, 2, 3)]


# ---------------------------------------------------------------- reference numbers


def close(ours, expected, tolerance):
    """Largest difference relative to the largest entry."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(params=REFERENCE, ids=[os.path.basename(path) for path in REFERENCE])
def reference(request):
    return np.load(request.param)


def names(arrays, prefix):
    return {
        name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)
    }


def reference_trainer(reference):
    words = dict(w.split("=") for w in str(reference["config"]).replace(", ", ",").split())
    gammas = [float(g) for g in words["gammas"].strip("()").split(",")]
    config = resnet.NetworkConfig(
        k=int(words["k"]),
        groups=tuple(int(g) for g in words["groups"].split("-")),
        bn_no_scale=words["bn_no_scale"] == "True",
    )
    net = resnet.ResNet(config)
    resnet.load_weights(net, names(reference, "init/"))
    target = objective.Objective(
        float(words["l2"]), *gammas, words["weighted"] == "True", float(words["momentum"])
    )
    return objective.Trainer(net, target, {}), float(words["lr"])


def test_reference_logits_and_terms(reference):
    trainer, _ = reference_trainer(reference)
    net, batch = trainer.net, reference["images"][0]
    close(net(batch), reference["logits_eval"], 1e-5)
    for name, values in grouping.regularizer_terms(net).items():
        close(values, reference[f"terms/{name}"], 1e-5)
    close(net(batch, training=True), reference["logits_train"], 1e-5)


def test_reference_loss_and_gradients(reference):
    trainer, _ = reference_trainer(reference)
    net = trainer.net
    with tf.GradientTape() as tape:
        logits = net(reference["images"][0], training=True)
        metrics = trainer.loss(logits, reference["labels"][0])
    close(metrics["cross_entropy"], reference["cross_entropy"], 1e-5)
    close(metrics["loss"], reference["total_loss"], 1e-5)
    grads = tape.gradient(metrics["loss"], net.trainable_variables)
    expected = names(reference, "grad/")
    assert {v.name.split(":")[0] for v in net.trainable_variables} == set(expected)
    for variable, grad in zip(net.trainable_variables, grads, strict=True):
        close(grad, expected[variable.name.split(":")[0]], 1e-4)


def test_reference_three_steps(reference):
    trainer, rate = reference_trainer(reference)
    batches = zip(reference["images"], reference["labels"], strict=True)
    losses = [trainer.step(x, y, tf.constant(rate))[0] for x, y in batches]
    close(losses, reference["total_loss_steps"], 1e-3)
    expected = names(reference, "after/")
    variables = {v.name.split(":")[0]: v for v in trainer.net.variables}
    assert set(variables) == set(expected)
    for name, variable in variables.items():
        close(variable, expected[name], 1e-3)


def test_reference_split(reference):
    net = reference_trainer(reference)[0].net
    assignment = grouping.hard_assignments(net)
    np.testing.assert_array_equal(assignment["p1"], reference["hard/p1"])
    np.testing.assert_array_equal(assignment["q1"], reference["hard/q1"])
    tree = resnet.split(net)
    close(tree(reference["images"][0]), reference["split_logits_eval"], 1e-5)
    assert resnet.count(tree)[0] == reference["split_weights"]
    weights, flops = resnet.count(net)  # the published count leaves init_conv out
    init_conv = net.init_conv.count()
    assert (weights - init_conv[0], flops - init_conv[1]) == (
        reference["weights"],
        reference["flops"],
    )


def test_tensorflow_1_checkpoint():
    path = os.path.join(ROOT, "tests", "reference", "tf1_k1_2-2-2", "model.ckpt-0")
    net, description = restore.load_network(path)
    expected = np.load(os.path.join(ROOT, "tests", "reference", "k1_2-2-2.npz"))
    assert description["config"]["groups"] == (2, 2, 2)
    close(net(expected["images"][0]), expected["logits_eval"], 1e-5)


# ---------------------------------------------------------------- the cut


def survivors(net):
    """Weights and biases left when every weight between different groups is gone."""
    groups = grouping.merged_assignments(net.config, grouping.hard_assignments(net))
    total = resnet.count(net)[0]
    for kernel, inputs, outputs in grouping.split_layers(net):
        different = groups[inputs][:, None] != groups[outputs]
        total -= int(different.sum()) * int(np.prod(kernel.shape[:-2]))
    return total


@pytest.mark.parametrize("groups", ALL_GROUPS, ids=grouping.format_groups)
@pytest.mark.parametrize("settings", [{}, {"num_residual_units": 3, "k": 2}], ids=["k1", "n3k2"])
def test_tree_is_the_masked_network(groups, settings):
    net = grouped_net(groups, seed=sum(groups), **settings)
    tree, batch = resnet.split(net), images()
    assert resnet.count(tree)[0] == survivors(net)
    resnet.mask(net)
    close(tree(batch), net(batch), 1e-5)
    close(tree(batch, training=True), net(batch, training=True), 1e-5)
    close(tree(batch), net(batch), 1e-5)  # the moving statistics moved alike


@pytest.mark.parametrize("groups", ALL_GROUPS, ids=grouping.format_groups)
def test_branches_share_nothing(groups):
    tree = resnet.split(grouped_net(groups))
    leaves = list(tree.leaves())
    assert len(leaves) == groups[2]
    assert sorted(np.concatenate([leaf.classes for leaf in leaves])) == list(range(100))
    with tf.GradientTape(persistent=True) as tape:
        logits = tree(images(2))
        outputs = [tf.reduce_sum(tf.gather(logits, leaf.classes, axis=1)) for leaf in leaves]
    below_root = [{v.ref() for v in branch.variables} for branch in tree.branches]
    for number, branch in enumerate(tree.branches):
        others = set().union(*(below_root[:number] + below_root[number + 1 :]))
        assert not below_root[number] & others
        own = {classes for leaf in branch.leaves() for classes in leaf.classes}
        for leaf, output in zip(leaves, outputs, strict=True):
            grads = tape.gradient(output, branch.trainable_variables)
            reached = any(g is not None and np.any(g) for g in grads)
            assert reached == (leaf.classes[0] in own)


@pytest.mark.parametrize("groups", [(2, 2, 2), (2, 4, 4)])
def test_whole_vectors_of_channels_change_nothing(groups):
    tree = resnet.split(grouped_net(groups, k=2))
    layers = list(resnet.layers(tree))
    statistics = [v for v in tree.variables if not v.trainable]
    widths, results = set(), []
    for lanes in (1, resnet.LANES):
        for variable in statistics:
            variable.assign(tf.ones_like(variable))
        for layer in layers:
            layer.lanes = lanes
        with tf.GradientTape() as tape:
            loss = tf.nn.l2_loss(tree(images(), training=True))
        gradients = tape.gradient(loss, tree.trainable_variables)
        results.append([loss, tree(images()), *gradients, *statistics, *tree.leaf_logits(images())])
        results[-1] = [tf.convert_to_tensor(part).numpy() for part in results[-1]]
        branch = tree.branches[0]
        features = branch.features(tree.fork(tree.features(images()))[0])
        widths.add(features.shape[-1])
        own = sum(branch.fork_sizes) if branch.branches else len(branch.logits.fc.inputs)
        assert not np.any(features[..., own:])
    for few, whole in zip(*results, strict=True):
        np.testing.assert_allclose(whole, few, rtol=1e-3, atol=1e-4 * np.abs(few).max())
    assert len(widths) == 2 and max(widths) % resnet.LANES == 0


def test_unsplit_tree_is_the_dense_network():
    net = randomize(resnet.ResNet(resnet.NetworkConfig(k=1)))
    np.testing.assert_array_equal(resnet.split(net)(images()), net(images()))


def test_mask_leaves_nothing_between_groups():
    net = grouped_net((2, 4, 8))
    resnet.mask(net)
    assert survivors(net) >= resnet.count(net)[0] - sum(
        int((kernel.numpy() == 0).sum()) for kernel, *_ in grouping.split_layers(net)
    )
    hard = {name: tf.one_hot(tf.argmax(a), a.shape[0], axis=0) for name, a in net.alphas.items()}
    value = grouping.weight_split(net.logits.fc.weights, hard["p1"], hard["q1"])
    assert float(value) == 0


# ---------------------------------------------------------------- for inference alone


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("k", [1, 1.5])
@pytest.mark.parametrize("groups", [(1, 1, 1), (1, 1, 4), (2, 2, 2), (2, 4, 4)])
def test_constant_weights_and_folded_normalization_change_nothing(groups, k, units):
    net = grouped_net(groups, k=k, num_residual_units=units)
    net = resnet.split(net) if max(groups) > 1 else net
    expected, kept = net(images()), [variable.numpy() for variable in net.variables]
    normalizations = sum(isinstance(layer, resnet.BatchNorm) for layer in resnet.layers(net))
    blocks = sum(isinstance(part, resnet.Block) for part in net.submodules)
    for change, left in [
        (resnet.fold, normalizations - blocks - 1),
        (resnet.freeze, 0),
        (lambda net: resnet.freeze(net, lanes=1), 0),
    ]:
        twin = resnet.copy(net)
        change(twin)
        close(twin(images()), expected, 1e-5)
        assert resnet.count(twin) == resnet.count(net)
        half = twin(tf.cast(images(), tf.bfloat16))
        assert half.dtype == tf.float32
        assert np.abs(half - expected).max() < 0.05 * np.abs(expected).max()
        call = tf.function(twin, autograph=False).get_concrete_function(images())
        kinds = [operation.type for operation in call.graph.get_operations()]
        assert kinds.count("FusedBatchNormV3") == left
        assert kinds.count("BiasAdd") == blocks + 1
    for variable, value in zip(net.variables, kept, strict=True):
        np.testing.assert_array_equal(variable, value)


# ---------------------------------------------------------------- counts


def equal_groups(config):
    """An assignment into groups as equal as possible."""
    return {
        name: np.arange(size) * num_groups // size
        for name, (num_groups, size) in grouping.indicator_shapes(config).items()
    }


@pytest.mark.parametrize(
    "name, k, groups, weights, flops",
    [
        ("WRN-16-8", 8, (1, 1, 1), 11_000_340, 3_096_383_688),
        ("deep", 8, (2, 2, 2), 5.73e6, 2.023e9),
        ("hierarchical", 8, (2, 4, 4), 3.62e6, 1.754e9),
        ("three ways", 8, (3, 3, 3), 3.98e6, 1.665e9),
        ("shallow", 8, (1, 2, 2), 6.78e6, 2.559e9),
        ("WRN-16-4", 4, (1, 1, 1), 2.77e6, 0.785e9),
        ("WRN-16-5", 5, (1, 1, 1), 4.31e6, 1.22e9),
    ],
)
def test_counts(name, k, groups, weights, flops):
    config = resnet.NetworkConfig(k=k, groups=groups)
    dense = max(groups) == 1
    net = resnet.ResNet(config) if dense else resnet.SplitResNet(config, equal_groups(config))
    tolerance = 0 if name == "WRN-16-8" else 0.0025
    np.testing.assert_allclose(resnet.count(net), (weights, flops), rtol=tolerance)


def test_count_2_4_8():
    config = resnet.NetworkConfig(groups=(2, 4, 8))
    weights, _ = resnet.count(resnet.SplitResNet(config, equal_groups(config)))
    assert round(weights / 1e6, 3) == 3.616


# ---------------------------------------------------------------- the network


def test_names_are_paths_of_attributes():
    dense = grouped_net((2, 4, 4))
    for net in (dense, resnet.split(dense)):
        for variable in net.variables:
            found = net
            for part in variable.name.split(":")[0].split("/"):
                found = getattr(found, part)
            assert found is variable


def test_trainable_and_decayed_variables():
    net = grouped_net((2, 2, 2), bn_no_scale=True)
    trained = {v.name.split(":")[0] for v in net.trainable_variables}
    assert "unit_last/bn/gamma" in trained and "unit_1_0/bn_1/gamma" not in trained
    assert not any(name.endswith(("mu", "sigma")) for name in trained)
    decayed = {v.name.split(":")[0] for v in net.decayed_variables}
    assert decayed == {n for n in trained if n.endswith(("/kernel", "/weights"))}


@pytest.mark.parametrize("k", [1, 2])
def test_first_block_has_a_shortcut_only_where_channels_change(k):
    net = resnet.ResNet(resnet.NetworkConfig(k=k))
    assert (net.unit_1_0.shortcut is None) == (k == 1)


def test_moving_statistics_are_biased():
    norm = resnet.BatchNorm("bn", range(4))
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 3, 4)).astype(np.float32)
    y = norm(x, training=True)[..., :4]
    flat = x.reshape(-1, 4)
    np.testing.assert_allclose(norm.mu, 0.1 * flat.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(norm.sigma, 0.9 + 0.1 * flat.var(axis=0), rtol=1e-5)
    expected = (x - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_dropout_is_keyed_by_seed_step_and_layer():
    net = grouped_net((1, 1, 4), dropout_keep_prob=0.5)
    batch = images()

    def logits(seed):
        return net(batch, training=True, dropout_seed=seed).numpy()

    np.testing.assert_array_equal(logits((0, 1)), logits((0, 1)))
    assert np.abs(logits((0, 1)) - logits((0, 2))).max() > 0
    assert np.abs(logits((0, 1)) - logits((1, 1))).max() > 0
    with pytest.raises(ValueError, match="dropout_seed"):
        net(batch, training=True)
    plain = resnet.ResNet(resnet.NetworkConfig(k=1, dropout_keep_prob=0.5))
    plain(batch, training=True, dropout_seed=(0, 0))  # nothing is split, so nothing is dropped
    other = resnet.DropoutReLU("other", 0.5)(tf.ones([1000]), True, (0, 1))
    this = resnet.DropoutReLU("this", 0.5)(tf.ones([1000]), True, (0, 1))
    assert np.any(other.numpy() != this.numpy()) and abs(np.mean(this) - 1) < 0.1


@pytest.mark.parametrize("keep_prob", [0.5, 0.3, 0.999, 1 / 256])
def test_dropout_keeps_its_share_the_mean_and_the_gradient(keep_prob):
    x = tf.constant(np.random.default_rng(0).normal(size=(101, 1001)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = resnet.DropoutReLU("a", keep_prob)(x, True, (0, 1))
        total = tf.reduce_sum(y * tf.range(1001, dtype=tf.float32))
    kept = (y.numpy() > 0)[x.numpy() > 0]
    assert kept.mean() == pytest.approx(keep_prob, abs=0.01)
    scale = y.numpy()[y.numpy() > 0] / x.numpy()[y.numpy() > 0]
    np.testing.assert_allclose(scale, 1 / keep_prob, rtol=1e-4)
    expected = np.where(y > 0, np.arange(1001) / keep_prob, 0)
    np.testing.assert_allclose(tape.gradient(total, x), expected, rtol=1e-4)


def test_same_seed_same_network_and_groups_do_not_change_the_rest():
    config = resnet.NetworkConfig(k=1)
    nets = [resnet.ResNet(c, seed) for c, seed in [
        (config, 3), (config, 3), (config, 4), (resnet.NetworkConfig(k=1, groups=(2, 2, 2)), 3)
    ]]  # fmt: skip
    kernels = [net.unit_3_1.conv_2.kernel.numpy() for net in nets]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[3])
    assert np.any(kernels[0] != kernels[2])


def test_bfloat16_leaves_logits_and_statistics_in_float32():
    net = grouped_net((2, 2, 2))
    logits = net(tf.cast(images(), tf.bfloat16), training=True)
    assert logits.dtype == tf.float32
    assert {v.dtype for v in net.variables} == {tf.float32}
    expected = grouped_net((2, 2, 2))(images(), training=True)
    assert np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()


def test_description_round_trip():
    dense = grouped_net((2, 4, 4), k=2)
    for net in (dense, resnet.split(dense)):
        again = resnet.build(resnet.to_dict(net))
        resnet.load_weights(again, {v.name.split(":")[0]: v.numpy() for v in net.variables})
        np.testing.assert_array_equal(again(images()), net(images()))
        assert resnet.count(again) == resnet.count(net)


def test_weights_of_another_network_are_refused():
    weights = {v.name.split(":")[0]: v.numpy() for v in grouped_net((2, 2, 2)).variables}
    with pytest.raises(ValueError, match="shape"):
        resnet.load_weights(grouped_net((2, 2, 4)), weights)
    with pytest.raises(ValueError, match="left over"):
        resnet.load_weights(grouped_net((1, 1, 2)), weights)


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 0},
        {"k": 0.3},
        {"k": np.inf},
        {"k": np.nan},
        {"num_residual_units": 0},
        {"dropout_keep_prob": 0},
        {"num_classes": 1},
    ],
)
def test_bad_configurations(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        resnet.NetworkConfig(**bad)


def test_fractional_width():
    net = resnet.ResNet(resnet.NetworkConfig(k=1.5))
    assert net.unit_1_0.conv_1.kernel.shape[-1] == 24 and net.config.name == "WRN-16-1.5"
