"""The report: its page, and the pictures of trees of every shape."""

import io
import itertools
import os
import re
import warnings

import numpy as np
import pytest
from conftest import fails, grouped_net, inside, one_hot_groups, train_flags
from matplotlib.patches import Rectangle

from experiments import variants
from report import __main__ as page, figures
import grouping
import resnet
import utils

SHAPES = [(1, 1, 1), (1, 1, 4), (1, 2, 2), (2, 2, 2), (2, 3, 3), (2, 4, 4), (3, 3, 3), (2, 4, 8)]
NAMES = [name.replace("_", " ") for name in variants.SEMANTIC_ORDER]  # CIFAR-100's
DATA = {
    "class_names": [f"class_{c}" for c in range(100)],
    "superclass_names": variants.SEMANTIC_ORDER,
    "superclass_of_class": [c * 7 % 100 // 5 for c in range(100)],
}


def test_reports_of_what_is_not_there(tmp_path, data_dir):
    data = ("--data_dir", data_dir)
    fails("report", tmp_path, *data, says="holds no run")
    fails("report", tmp_path / "no", *data, says="there is no run")
    fails("report", *data, says="RUN is needed", status=2)
    assert os.listdir(tmp_path) == []


def test_report_of_a_run_without_results(tmp_path, data_dir):
    flags = train_flags("group", tmp_path / "runs" / "group", data_dir, group_summary_interval=3)
    assert inside("train.py", *flags)[0] == 0
    status, out, error = inside("report", tmp_path / "runs", "--data_dir", data_dir)
    assert status == 0, error
    assert "No summary: " in out and "eval.py with --checkpoint" in out
    assert set(os.listdir(tmp_path / "runs" / "report")) == {
        "group_curves.png", "sharpness.png", "weights.png"
    }  # fmt: skip
    evaluation = tmp_path / "runs" / "group" / "eval"
    evaluation.mkdir()
    utils.write_json(evaluation / "result.json", {"step": 6, "group_classes": []})
    fails("report", tmp_path / "runs", "--data_dir", data_dir, says="lacks confusion_matrix: run")


def test_what_is_said_of_the_cut_is_not_rounded_up():
    common = {"dataset": "cifar100", "num_examples": 9, "network": "WRN-16-1", "groups": "1-1-2",
              "split": "test", "step": 1, "accuracy": 0.5, "weights": 2, "flops": 2,
              "masked": False, "group_classes": [[0], [1]]}  # fmt: skip
    grouped = common | {"sharpness": {"q1": 0.9996}, "squares_inside": {"logits": 0.999996}}
    pairs = {"superclass_pairs": 0.5, "superclass_pairs_chance": 0.5}
    cut, tree = common | {"masked": True}, common | pairs | {"equal_groups": False}
    words = page.summary(dict(zip(page.NAMES, (grouped, cut, tree), strict=True)), DATA)
    assert "largest share 0.999 or more" in words and "99.999% or more of" in words


@pytest.mark.parametrize("of", [0, 25])
def test_a_thousand_classes_can_be_read(of):
    """By superclass where there are any; else some of the classes are named."""
    data = {
        "class_names": [f"class number {c}" for c in range(1000)],
        "superclass_names": [f"kind {s}" for s in range(of)],
        "superclass_of_class": [c % of for c in range(1000)] if of else [],
    }
    groups = [list(range(0, 1000, 2)), list(range(1, 1000, 2))]
    common = {"dataset": "mine", "num_examples": 9, "network": "AlexNet", "groups": "1-1-1-1-2",
              "split": "test", "step": 1, "accuracy": 0.5, "weights": 2, "flops": 2,
              "masked": False, "group_classes": groups}  # fmt: skip
    results = (common, common | {"masked": True}, common | {"equal_groups": False})
    words = page.summary(dict(zip(page.NAMES, results, strict=True)), data)
    assert max(map(len, words.splitlines())) <= 100 and len(words.splitlines()) < 60
    for text in ["kind 3 (20/40)", "part of: "] if of else ["class number 998", "and 440 others"]:
        assert text in " ".join(words.split()).replace(figures.HARD, " ")
    if of:
        texts = [text.get_text() for text in figures.superclasses(groups, data).axes[0].texts]
        assert texts == ["20"] * 50


def test_samples_are_marked_with_their_own_group():
    images, labels = np.zeros((40, 4, 4, 3), np.uint8), np.arange(40) % 4
    data = {"class_names": ["a", "b", "a_class_of_a_long_name", "d"]}
    axes = figures.samples([[0, 3], [1, 2]], images, labels, data, per_group=2).axes
    assert [axis.get_ylabel() for axis in axes] == ["group 0", "", "group 1", ""]
    colours = [axis.spines["left"].get_edgecolor()[:3] for axis in axes]
    assert colours == [figures.group_colour(number)[:3] for number in (0, 0, 1, 1)]
    assert axes[3].get_title() == "a class of a\nlong name"


def test_pictures_of_few_layers_and_many_groups():
    assert len(figures.weights(grouped_net((1, 1, 4))).axes) == 3  # of one layer
    assert len(figures.weights(grouped_net((1, 2, 2))).axes) == 12
    assert figures.superclasses([[c] for c in range(100)], DATA)


def test_lines_where_the_learning_rate_drops():
    def lines(rates):
        metrics = [{"step": n, "accuracy": 0.1, "learning_rate": r, "loss": 1, "cross_entropy": 1,
                    "l2": 1, "overlap": 0, "weight_split": 0, "uniform": 0}
                   for n, r in enumerate(rates)]  # fmt: skip
        left = figures.learning_curves(metrics).axes[0]
        return [line.get_xdata()[0] for line in left.lines if len(set(line.get_xdata())) == 1]

    assert lines([0.1, 0.1, 0.01, 0.01, 0.01, 0.001]) == [2, 5]
    assert lines([0.1, 0.08, 0.06, 0.04]) == lines([0.02, 0.1, 0.1]) == []


# ---------------------------------------------------------------- the tree


def tree_of(groups, sizes, seed=0):
    """A tree of equal groups; of random, unequal ones; or with all but a few in the first."""
    config = resnet.NetworkConfig(k=1, num_residual_units=1, groups=groups)
    if sizes == "equal":
        return resnet.equal_tree(config)
    rng = np.random.default_rng(seed)
    assignment = {}
    for name, (number, size) in grouping.indicator_shapes(config).items():
        if sizes == "unequal":
            assignment[name] = np.argmax(one_hot_groups(rng, number, size), axis=0)
        else:
            assignment[name] = rng.permutation(np.maximum(np.arange(size) - size + number, 0))
    return resnet.SplitResNet(config, assignment)


def preorder(branch):
    return [branch, *(b for child in branch.branches for b in preorder(child))]


def draw(net, data=DATA, *pictures):
    """Figure, axes, boxes and the extents of all texts; nothing may be clipped or overlap."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.tree(net, data, *pictures)
        figure.savefig(io.BytesIO())
    (axes,) = figure.axes
    width, height = figure.get_size_inches()
    assert axes.get_xlim() == (0, width) and axes.get_ylim() == (height, 0)
    extents = [t.get_window_extent().transformed(axes.transData.inverted()) for t in axes.texts]
    for i, a in enumerate(extents):
        assert 0 <= a.x0 <= a.x1 <= width and 0 <= a.y1 <= a.y0 <= height
        for b in extents[:i]:
            assert a.x0 >= b.x1 or b.x0 >= a.x1 or a.y1 >= b.y0 or b.y1 >= a.y0
    return axes, [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def titles_and_words(axes):
    texts = [" ".join(text.get_text().split()) for text in axes.texts]
    return [(a, b) for a, b in zip(texts, texts[1:], strict=False) if a.startswith("group ")]


@pytest.mark.parametrize("sizes", ["equal", "unequal", "extreme"])
@pytest.mark.parametrize("groups", SHAPES, ids=str)
def test_tree(groups, sizes):
    net = tree_of(groups, sizes)
    axes, boxes = draw(net, DATA, np.zeros((100, 32, 32, 3), np.uint8), np.arange(100))
    branches, leaves = preorder(net), list(net.leaves())
    widths = np.array([box.get_width() for box in boxes])
    flops = np.array([branch.own_flops() for branch in branches])
    np.testing.assert_allclose(widths / widths[0], flops / flops[0])

    corners = {branch: box.get_corners() for branch, box in zip(branches, boxes, strict=True)}
    for branch in branches:
        for child in branch.branches:
            assert corners[child][0, 1] > corners[branch][2, 1]  # y goes down
        for one, other in itertools.pairwise(branch.branches):
            rightmost = max(corners[below][1, 0] for below in preorder(one))
            assert rightmost < min(corners[below][0, 0] for below in preorder(other))

    found = dict.fromkeys(NAMES, 0)
    for number, (title, words) in enumerate(titles_and_words(axes)):
        size = len(leaves[number].classes)
        assert title == f"group {number}: {size} class{'' if size == 1 else 'es'}"
        whole, _, parts = words.partition("part of: ")
        for name in filter(None, whole.strip().split(", ")):
            found[name] += 5
        parts = [re.fullmatch(r"(.*) \(([1-4])/5\)", part) for part in parts.split(", ") if part]
        counts = [int(part[2]) for part in parts]
        assert counts == sorted(counts, reverse=True)
        for part, count in zip(parts, counts, strict=True):
            found[part[1]] += count
    assert number + 1 == len(leaves) and set(found.values()) == {5}
    assert len(leaves) <= len(axes.images) <= 12 * len(leaves)


def test_tree_without_images():
    axes, _ = draw(tree_of((1, 2, 2), "equal"))
    assert len(titles_and_words(axes)) == 2 and not axes.images
