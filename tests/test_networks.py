"""resnet18.py and alexnet.py, as narrow networks: all that the Wide ResNet has; all counts."""

import dataclasses
import json
import os

import numpy as np
import pytest
from conftest import fails, inside, python, randomize, train_flags
from test_grouping import slow_weight_split, softmax

import cifar100
import grouping
import metrics
import networks
import objective
import resnet
import restore
import rundir
import utils
from experiments import counts
from parallel.tree import PlacedTree, place
from utils import tf

# Narrow networks on small images, and every split of the paper's tables.
NARROW = {
    "resnet18": {"k": 0.125, "image_size": 32, "num_classes": 12},
    "alexnet": {"k": 0.0625, "image_size": 65, "num_classes": 12, "fc_keep_prob": 1},
}
SPLITS = {
    "resnet18": [(1, 1, 3), (1, 2, 2), (2, 2, 2), (2, 3, 5)],
    "alexnet": [
        (1, 1, 1, 1, 3), (1, 1, 1, 2, 5), (1, 1, 2, 4, 8), (2, 2, 2, 2, 2), (1, 2, 2, 3, 4),
    ],
}  # fmt: skip
CASES = [(network, groups) for network, splits in SPLITS.items() for groups in splits]
ONE_EACH = [("resnet18", (2, 3, 5)), ("alexnet", (1, 1, 2, 4, 8))]


def narrow_net(network, groups, seed=0, **settings):
    """Random weights and groups."""
    config = networks.config_class(network)(groups=groups, **NARROW[network] | settings)
    return randomize(resnet.make(config), seed)


def images_of(net, count=4, seed=0):
    size = net.config.image_size
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def close(ours, expected, tolerance=1e-5):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def save(net, directory, stage="split"):
    about = {"stage": stage, "dataset": "synthetic", "seed": 0, "preset": "", "class_groups": ""}
    trainer = objective.Trainer(net, objective.Objective(), about)
    with rundir.Run(str(directory)) as run:
        return run.save(trainer.checkpoint, 0)


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "network, groups, weights, flops",
    [
        ("resnet18", (1, 1, 1), 45_672_832, 14.038e9),
        ("resnet18", (1, 1, 3), 44.990e6, 14.037e9),
        ("resnet18", (1, 2, 2), 28.384e6, 12.393e9),
        ("resnet18", (2, 2, 2), 24.189e6, 10.749e9),
        ("alexnet", (1, 1, 1, 1, 1), 62_367_776, 2.278e9),
        ("alexnet", (1, 1, 1, 1, 3), 59.637e6, 2.273e9),
        ("alexnet", (1, 1, 1, 2, 5), 50.702e6, 2.255e9),
        ("alexnet", (1, 1, 2, 4, 8), 27.326e6, 2.208e9),
        ("alexnet", (2, 2, 2, 2, 2), 31.951e6, 1.846e9),
    ],
)
def test_counts_are_to_the_last_digit(network, groups, weights, flops):
    counted = counts.count(network, groups)
    assert counted[0] == weights or round(counted[0] / 1e3) == round(weights / 1e3)
    assert round(counted[1] / 1e6) == round(flops / 1e6)


def test_tables_are_printed_beside_the_papers():
    lines = counts.table(*counts.TABLES["Table 4: ResNet-18x2 on ILSVRC 2012 (conv4-conv5-fc)"])
    whole, fc, shallow, deep = lines.splitlines()[2:]
    assert "45,672,832" in whole and "14,038,482,944" in whole
    assert "44.99 M" in fc and "1.49 %" in fc and "0.01 %" in fc
    assert "28.39 M, 12.39 G" in shallow and "37.85 %" in shallow and "11.72 %" in shallow
    assert "24.21 M, 10.75 G" in deep and "47.04 %" in deep and "23.43 %" in deep
    # The paper's random 2-2-2 has fewer weights than equal groups: that is named, as nothing else.
    assert [row.split("|")[-2].strip() for row in (whole, fc, shallow, deep)] == [
        "", "", "", "weights +0.20 %"
    ]  # fmt: skip


def test_differences_beside_what_is_printed():
    assert counts.differences((45.672832, 14.0385), ("45.67", "14.04")) == ""
    assert counts.differences((11.4, 3.0964), ("11.0", "3.10")) == "weights +3.64 %"
    assert counts.differences((1.0, 2.0), ("", "1.99")) == "FLOPs +0.50 %"


# ---------------------------------------------------------------- the mathematics


def chain_of(network, blocks=2):
    """(layer, input indicator, output indicator) of all layers that can be split, by hand."""
    if network == "alexnet":
        names = ["conv4", "conv5", "fc6", "fc7", "logits/fc"]
        return [(name, f"p{5 - i}", f"q{5 - i}") for i, name in enumerate(names)]
    found = []
    for s, stage in [(3, "conv4"), (2, "conv5")]:
        found += [
            (f"{stage}_0/shortcut", f"p{s}", f"q{s}"),
            (f"{stage}_0/conv_1", f"p{s}", f"r{s}1"), (f"{stage}_0/conv_2", f"r{s}1", f"q{s}"),
            (f"{stage}_1/conv_1", f"q{s}", f"r{s}2"), (f"{stage}_1/conv_2", f"r{s}2", f"q{s}"),
        ]  # fmt: skip
    return [*found, ("logits/fc", "p1", "q1")]


@pytest.mark.parametrize("network, groups", CASES)
def test_regularizers_are_those_of_a_loop(network, groups):
    net = narrow_net(network, groups)
    soft = {name: softmax(alpha.numpy().astype(np.float64)) for name, alpha in net.alphas.items()}
    for s in range(2, len(groups) + 1):
        if groups[-s] > 1:
            runs = grouping.merge_runs(groups[-(s - 1)], groups[-s])
            soft[f"q{s}"] = np.array([soft[f"p{s - 1}"][run].sum(axis=0) for run in runs])
    kernels = {resnet.name_of(v).rpartition("/")[0]: v.numpy() for v in net.decayed_variables}
    expected = []
    for layer, inputs, outputs in chain_of(network):
        if inputs in soft:
            kernel = kernels[layer].astype(np.float64)
            kernel = kernel if kernel.ndim == 4 else kernel[None, None]
            expected.append(slow_weight_split(kernel, soft[inputs], soft[outputs]))
    terms = grouping.regularizer_terms(net)
    np.testing.assert_allclose(terms["weight_split"], expected, rtol=1e-5)

    def overlap(p):
        n, size = p.shape
        pairs = sum(p[i] @ p[j] for i in range(n) for j in range(i))
        return pairs / (size * (n - 1) / (2 * n))

    def uniform(p):
        return sum(row.sum() ** 2 for row in p) / (p.shape[1] ** 2 / len(p))

    for name, term in [("overlap", overlap), ("uniform", uniform)]:
        free = [term(soft[n]) for n in net.alphas if n not in ("p1", "q1")]
        free.append((term(soft["p1"]) + term(soft["q1"])) / 2)
        np.testing.assert_allclose(terms[name], free, rtol=1e-5)
    total = grouping.regularizers(net)
    np.testing.assert_allclose(
        total["weight_split"], np.square(expected).sum() / np.sum(expected), rtol=1e-5
    )
    np.testing.assert_allclose(total["overlap"], np.mean(terms["overlap"]), rtol=1e-5)


@pytest.mark.parametrize("network, groups", ONE_EACH)
def test_regularizers_of_new_networks_are_one(network, groups):
    config = networks.config_class(network)(**NARROW[network] | {"k": 0.5}, groups=groups)
    values = grouping.regularizers(resnet.make(config)).values()
    np.testing.assert_allclose(list(values), 1, atol=0.05)


@pytest.mark.parametrize("network, groups", CASES)
def test_tree_is_the_masked_network(network, groups):
    net = narrow_net(network, groups, seed=sum(groups))
    tree, batch = resnet.split(net), images_of(net)
    assert isinstance(tree, resnet.Tree) and len(list(tree.leaves())) == groups[-1]
    resnet.mask(net)
    left = sum(int(same.sum()) * w.shape.num_elements() // same.size
               for w, same in grouping.same_group(net))  # fmt: skip
    dense = sum(w.shape.num_elements() for w, _ in grouping.same_group(net))
    assert resnet.count(tree)[0] == resnet.count(net)[0] - dense + left
    close(tree(batch), net(batch))
    close(tree(batch, training=True), net(batch, training=True))
    close(tree(batch), net(batch))  # the moving statistics moved alike


@pytest.mark.parametrize("network, groups", CASES)
def test_names_are_paths_and_descriptions_make_the_network_again(network, groups):
    dense = narrow_net(network, groups)
    for net in (dense, resnet.split(dense)):
        for variable in net.variables:
            found = net
            for part in resnet.name_of(variable).split("/"):
                found = getattr(found, part)
            assert found is variable
        description = json.loads(json.dumps(resnet.to_dict(net)))
        assert description["architecture"] == network
        again = resnet.build(description)
        assert type(again) is type(net) and again.config == net.config
        np.testing.assert_array_equal(resnet.copy(net)(images_of(net)), net(images_of(net)))
    assert "architecture" not in resnet.to_dict(resnet.ResNet(resnet.NetworkConfig(k=1)))


@pytest.mark.parametrize("network, groups", ONE_EACH)
def test_branches_share_nothing_and_are_equal_or_given(network, groups):
    net = narrow_net(network, groups)
    tree = resnet.split(net, grouping.equal_assignments(net))
    assert [len(leaf.classes) for leaf in tree.leaves()] == [
        len(part) for part in np.array_split(range(12), groups[-1])
    ] or {len(leaf.classes) for leaf in tree.leaves()} <= {12 // groups[-1], 12 // groups[-1] + 1}
    with tf.GradientTape(persistent=True) as tape:
        logits = tree.leaf_logits(images_of(net))
    for number, branch in enumerate(tree.branches):
        for leaf, values in zip(tree.leaves(), logits, strict=True):
            own = any(leaf is other for other in branch.leaves())
            grads = tape.gradient(values, branch.trainable_variables)
            assert any(g is not None for g in grads) == own, number
    given = [np.array([number]) for number in range(groups[-1] - 1)]
    given.append(np.arange(groups[-1] - 1, 12))
    cut = resnet.split(net, grouping.given_assignment(net.config, given))
    assert [leaf.classes.tolist() for leaf in cut.leaves()] == [g.tolist() for g in given]


@pytest.mark.parametrize("network, groups", ONE_EACH)
def test_bfloat16_and_dropout(network, groups):
    net = narrow_net(network, groups, dropout_keep_prob=0.5)
    tree, batch = resnet.split(net), tf.cast(images_of(net), tf.bfloat16)
    for either in (net, tree):
        with tf.GradientTape() as tape:
            logits = either(batch, training=True, dropout_seed=(0, 1))
            loss = tf.nn.l2_loss(logits)
        assert logits.dtype == tf.float32
        grads = tape.gradient(loss, either.decayed_variables)
        assert all(np.isfinite(g).all() and np.any(g) for g in grads)
        other = either(batch, training=True, dropout_seed=(0, 2))
        assert np.any(logits.numpy() != other.numpy())
    few, whole = narrow_net(network, groups)(batch), narrow_net(network, groups)(images_of(net))
    close(few, whole, 0.2)


def test_alexnet_always_drops_the_inputs_of_fc6_and_fc7():
    config = dataclasses.replace(narrow_net("alexnet", (1,) * 5).config, fc_keep_prob=0.5)
    assert [config.keep_prob(level) for level in range(1, 9)] == [1, 1, 1, 1, 1, 0.5, 0.5, 1]
    config = dataclasses.replace(config, groups=(1, 1, 2, 2, 2), dropout_keep_prob=0.4)
    assert [config.keep_prob(level) for level in range(4, 9)] == [1, 1, 0.4, 0.4, 0.4]
    resnet18 = networks.config_class("resnet18")(groups=(1, 2, 2), dropout_keep_prob=0.4)
    assert [resnet18.keep_prob(level) for level in range(1, 6)] == [1, 1, 1, 0.4, 0.4]


@pytest.mark.parametrize("size", [57, 64, 66, 224, 227])
def test_alexnet_of_any_size(size):
    config = networks.config_class("alexnet")(k=0.03125, image_size=size, num_classes=5)
    net = resnet.make(config)
    x = images_of(net, 1)
    for level in range(1, 8):
        x = net.stage(level)[0](x)
        assert x.shape[1] == x.shape[2] == config.resolution(level)
    assert net(images_of(net, 2)).shape == (2, 5)


# ---------------------------------------------------------------- devices and formats


@pytest.mark.parametrize("network, groups", CASES)
def test_placements_compute_the_tree(network, groups):
    tree = resnet.split(narrow_net(network, groups))
    batch, number = images_of(tree, 5), min(len(tree.branches), 3)
    for hybrid in (False, True):
        placed = PlacedTree(tree, ["/CPU:0"] * number, hybrid)
        close(placed(batch), tree(batch))
        assert len(placed.device_flops) == number
    close(place(tree, ["/CPU:0"] * number, "hybrid")(batch), tree(batch))


@pytest.mark.parametrize("form", ["savedmodel", "onnx", "litert"])
@pytest.mark.parametrize("network, groups", ONE_EACH)
def test_exports_agree_in_their_engines(form, network, groups, tmp_path):
    """export.py compares each with the network, to 1e-4."""
    from formats import files

    if not all(map(utils.is_installed, files.ENGINES[form])):
        pytest.skip(f"{form}'s engine is not installed")
    net = narrow_net(network, groups)
    for name, either in [("dense", net), ("tree", resnet.split(net))]:
        save(either, tmp_path / name)
        kinds = [(), ("--parts", "True"), ("--branch", 1)] if name == "tree" else [()]
        for number, how in enumerate(kinds):
            status, out, error = inside(
                "export.py", "--checkpoint", tmp_path / name, "--format", form,
                "--output", tmp_path / f"{name}{number}", *how,
            )  # fmt: skip
            assert status == 0, error
            assert "largest difference" in out


# ---------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of 64x64 pixels and 8 classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    counts_of = {"train": 80, "val": 24, "train_val": 104, "test": 24}
    for split, count in counts_of.items():
        labels = np.arange(count, dtype=np.int32) % 8
        made = rng.integers(0, 64, (count, 64, 64, 3)) + 16 * labels[:, None, None, None]
        np.savez(folder / f"{split}.npz", images=made.astype(np.uint8), labels=labels)
    description = {
        "dataset": "squares", "source": "made up", "seed": 0, "counts": counts_of,
        "image_size": 64, "class_names": [f"class{c}" for c in range(8)],
        "superclass_names": [], "superclass_of_class": [],
    }  # fmt: skip
    (folder / "split.json").write_text(json.dumps(description))
    return str(folder)


WIDTHS = {"resnet18": 0.125, "alexnet": 0.0625}
FIVE = {f"ngroups{s}": 2 for s in range(1, 6)}


def run(network, stage, train_dir, data_dir, **flags):
    words = train_flags(
        stage, train_dir, data_dir, k=WIDTHS[network], batch_size=16, initial_lr=0.01, **flags
    )
    words.remove("--num_residual_units=1")
    if stage != "split":
        words += ["--network", network]
    status, out, error = inside("train.py", *words)
    assert status == 0, error
    return out


@pytest.mark.parametrize("network", NARROW)
def test_the_pipeline_from_a_baseline_to_the_page(network, pictures, tmp_path):
    groups = FIVE if network == "alexnet" else {}
    assert networks.config_class(network).__name__ == "NetworkConfig"
    out = run(network, "baseline", tmp_path / "baseline", pictures)
    assert networks.config_class(network)(k=WIDTHS[network]).name in out
    group = {"group_lr_scale": 20, "dropout_keep_prob": 0.5, **groups}
    run(network, "group", tmp_path / "group", pictures, basemodel=tmp_path / "baseline", **group)
    run(network, "split", tmp_path / "split", pictures, basemodel=tmp_path / "group")
    run(network, "split", tmp_path / "equal", pictures, basemodel=tmp_path / "group",
        equal_groups=True)  # fmt: skip
    given = tmp_path / "given.json"
    given.write_text(json.dumps([[0, 1, 2], [3, 4, 5, 6, 7]]))
    run(network, "split", tmp_path / "given", pictures, basemodel=tmp_path / "baseline",
        groups=given, ngroups1=2)  # fmt: skip
    for name, flags in [("split", ()), ("group", ("--mask",)), ("group", ()), ("given", ())]:
        status, _, error = inside(
            "eval.py", "--checkpoint", tmp_path / name, "--data_dir", pictures, *flags
        )
        assert status == 0, error
    tree = utils.read_json(tmp_path / "split" / "eval" / "result.json")
    number = 5 if network == "alexnet" else 3
    assert tree["groups"] == "-".join(["2"] * number) and tree["num_examples"] == 24
    assert utils.read_json(tmp_path / "split" / "config.json")["flags"]["network"] == network
    given = utils.read_json(tmp_path / "given" / "eval" / "result.json")
    assert given["group_classes"] == [[0, 1, 2], [3, 4, 5, 6, 7]]
    status, out, error = inside("report/__main__.py", tmp_path, "--data_dir", pictures)
    assert status == 0, error
    assert (tmp_path / "report" / "tree.png").exists() and "No summary" not in out
    done = run(network, "split", tmp_path / "split", pictures, basemodel=tmp_path / "group")
    assert "was complete before" in done


@pytest.mark.parametrize("network", NARROW)
def test_stopped_and_resumed_is_never_stopped(network, pictures, tmp_path):
    flags = {"dropout_keep_prob": 0.5} | (FIVE if network == "alexnet" else {})
    run(network, "group", tmp_path / "whole", pictures, max_steps=4, **flags)
    run(network, "group", tmp_path / "parts", pictures, max_steps=2, **flags)
    run(network, "group", tmp_path / "parts", pictures, max_steps=4, **flags)
    whole, parts = (
        rundir.read_checkpoint(rundir.find_checkpoint(str(tmp_path / name)))
        for name in ("whole", "parts")
    )
    for name in whole:
        if name.startswith(("net/", "optimizer/")):
            np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)


@pytest.mark.parametrize("network", NARROW)
def test_several_devices_train_and_evaluate(network, pictures, tmp_path):
    words = train_flags(
        "group", tmp_path / "group", pictures, k=WIDTHS[network], num_residual_units=2,
        batch_size=16, max_steps=2, network=network, devices="/CPU:0,/CPU:1", precision="bfloat16",
        **(FIVE if network == "alexnet" else {}),
    )  # fmt: skip
    done = python("train.py", *words)
    assert done.returncode == 0, done.stderr
    net, _ = restore.load_network(rundir.find_checkpoint(str(tmp_path / "group")))
    checkpoint = save(resnet.split(net, grouping.equal_assignments(net)), tmp_path / "split")
    results = []
    for how in ((), ("--placement", "hybrid", "--devices", "/CPU:0,/CPU:1")):
        where = tmp_path / f"eval{len(how)}"
        done = python(
            "eval.py", "--checkpoint", checkpoint, "--eval_dir", where, "--data_dir",
            _as_synthetic(pictures, tmp_path), *how,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(utils.read_json(where / "result.json"))
    assert results[0]["confusion_matrix"] == results[1]["confusion_matrix"]


def _as_synthetic(pictures, folder):
    """The same data set by the name that `save` gives."""
    copy = folder / "data"
    copy.mkdir(exist_ok=True)
    description = utils.read_json(os.path.join(pictures, "split.json"))
    for split in description["counts"]:
        if not (copy / f"{split}.npz").exists():
            os.link(os.path.join(pictures, f"{split}.npz"), copy / f"{split}.npz")
    utils.write_json(copy / "split.json", description | {"dataset": "synthetic"})
    return copy


def test_top_5_errors_are_of_more_than_100_classes():
    config = networks.config_class("resnet18")(k=0.0625, image_size=32, num_classes=150)
    net, rng = randomize(resnet.make(config)), np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 150, 30).astype(np.int32)
    ranks = np.argsort(-net(cifar100.standardize(pictures)).numpy(), axis=1)
    labels[:12] = ranks[:12, 4]  # the fifth likeliest is one of five, the sixth is not
    labels[12:20] = ranks[12:20, 5]
    expected = sum(label in row[:5] for label, row in zip(labels, ranks, strict=True))
    found = metrics.evaluate(metrics.predictor(net), pictures, labels, 7, 150)
    assert found.top5 == expected >= 12
    assert metrics.result(net, found)["top5_error"] == 1 - expected / 30
    few = metrics.Evaluation(np.eye(100, dtype=int), 0.0, 0.0)
    assert "top5_error" not in metrics.result(net, few)
    few = resnet.ResNet(resnet.NetworkConfig(k=1))
    assert metrics.evaluate(metrics.predictor(few), pictures, labels % 100, 7).top5 is None


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"network": "vgg"}, "--network must be one of wrn, resnet18, alexnet"),
        ({"network": "wrn", "ngroups4": 2}, "--ngroups4 is of a network"),
        ({"network": "resnet18", "ngroups5": 2}, "resnet18 can in 3: leave it out"),
        ({"network": "resnet18", "num_residual_units": 3}, "is for --network wrn"),
        ({"network": "resnet18", "ngroups3": 4}, "do not nest"),
        ({"network": "alexnet", **FIVE, "ngroups5": 4}, "do not nest"),
        ({"network": "alexnet", **FIVE, "ngroups1": 9}, "at most 8"),
        ({"network": "resnet18", "k": 0.0625, "ngroups1": 8, "ngroups2": 8, "ngroups3": 8,
          "ngroups": 9}, ""),
        ({"network": "alexnet", "k": 0.3}, "k must be positive and 32 * k"),
    ],
)  # fmt: skip
def test_flags_that_contradict(flags, says, pictures, tmp_path):
    if "ngroups" in flags:  # of a narrow network's features
        with pytest.raises(ValueError, match="of conv4 into 9 groups: at most 8 are possible"):
            networks.config_class("resnet18")(k=0.0625, groups=(9, 9, 9))
        return
    words = {"num_residual_units": 2} | flags
    fails("train.py", *train_flags("group", tmp_path / "r", pictures, **words), status=2, says=says)


def test_image_sizes_and_groups_that_networks_do_not_allow(data_dir, tmp_path):
    words = train_flags(
        "baseline", tmp_path / "r", data_dir, network="alexnet", num_residual_units=2
    )
    fails("train.py", *words, status=2, says="image_size must be 57 or more, got 32")
    for network, size, says in [
        ("resnet18", 48, "multiple of 32"),
        ("resnet18", 0, "multiple of 32"),
        ("alexnet", 56, "57"),
    ]:
        with pytest.raises(ValueError, match=f"image_size must be .*{says}.*got {size}"):
            networks.config_class(network)(image_size=size)
    for network, groups in [("resnet18", (2, 2, 2, 2)), ("alexnet", (2, 2, 2))]:
        with pytest.raises(ValueError, match="groups are"):
            networks.config_class(network)(groups=groups)


def test_a_checkpoint_of_another_network_is_named(pictures, tmp_path):
    base = tmp_path / "base"
    run("resnet18", "baseline", base, pictures, max_steps=1)
    given = tmp_path / "given.json"
    given.write_text(json.dumps([[0, 1, 2], [3, 4, 5, 6, 7]]))
    says = "holds another network (network is resnet18, not alexnet)"
    k = {"num_residual_units": 2, "k": 0.0625}
    for stage, flags in [
        ("baseline", {"basemodel": base}),
        ("group", {"basemodel": base, **FIVE}),
        ("split", {"basemodel": base, "groups": given, "ngroups1": 2}),
    ]:
        words = train_flags(stage, tmp_path / "r", pictures, network="alexnet", **k, **flags)
        fails("train.py", *words, says=says)
    words = train_flags(
        "baseline", base, pictures, batch_size=16, max_steps=2, num_residual_units=2
    )
    fails("train.py", *words, says="holds another network (network is resnet18, not wrn)")
    four = {f"ngroups{s}": 2 for s in range(1, 5)} | {"basemodel": base, "groups": given}
    words = train_flags("split", tmp_path / "r", pictures, k=0.125, **four)
    words.remove("--num_residual_units=1")
    fails("train.py", *words, says="groups are 3 whole numbers from 1 up (conv4, conv5, fc)")
