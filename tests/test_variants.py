"""Given class groups: semantic, clustering, random; features in proportion; trees of baselines."""

import json
import shutil

import numpy as np
import pytest
from conftest import fails, inside, train_flags

from experiments import variants
import grouping
import resnet
import restore
import rundir
import utils

DATA = {
    "superclass_names": sorted(variants.SEMANTIC_ORDER),
    "superclass_of_class": np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5)),
}


def check(groups, number, num_classes=100):
    assert len(groups) == number and min(len(g) for g in groups) >= 1
    assert sorted(np.concatenate(groups)) == list(range(num_classes))


@pytest.mark.parametrize("number, sizes", [(2, [50, 50]), (3, [35, 35, 30]), (4, [25] * 4)])
def test_semantic_groups_hold_whole_superclasses(number, sizes):
    groups = variants.semantic(number, DATA)
    check(groups, number)
    assert [len(group) for group in groups] == sizes
    supers = [set(DATA["superclass_of_class"][group]) for group in groups]
    assert not set.intersection(*supers[:2])
    first = {DATA["superclass_names"][i] for i in supers[0]}
    assert {"people", "small_mammals"} <= first and "vehicles_1" not in first


def test_semantic_groups_of_another_data_set():
    data = DATA | {"superclass_names": [f"super{i}" for i in range(20)]}
    groups = variants.semantic(2, data)
    assert set(DATA["superclass_of_class"][groups[0]]) == set(range(10))
    with pytest.raises(ValueError, match="20 superclasses"):
        variants.semantic(21, data)


def test_random_groups_are_equal_and_drawn_from_the_seed():
    groups = variants.random(3, 100, seed=1)
    check(groups, 3)
    assert [len(group) for group in groups] == [34, 33, 33]
    again, other = variants.random(3, 100, seed=1), variants.random(3, 100, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(groups, again, strict=True))
    assert not np.array_equal(groups[0], other[0])


def test_clustering_finds_the_groups_of_a_classifier():
    """Four directions in two pairs, found as a hierarchy: the pairs are neighbours."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    basis = np.eye(64)[:4]
    basis[1] += 0.8 * basis[0]
    basis[3] += 0.8 * basis[2]
    kind = rng.integers(0, 4, 100)
    classifier = (basis[kind] + 0.05 * rng.normal(size=(100, 64))).T
    groups = variants.clustering((2, 4, 4), classifier, seed=0)
    check(groups, 4)
    found = [set(kind[group]) for group in groups]
    assert all(len(kinds) == 1 for kinds in found)
    assert {frozenset(found[0] | found[1]), frozenset(found[2] | found[3])} == {
        frozenset({0, 1}), frozenset({2, 3})
    }  # fmt: skip
    # In 2-3-4 the first three groups are of one branch: two of them are divided a second time.
    groups = variants.clustering((2, 3, 4), classifier, seed=0)
    halves = set(kind[np.concatenate(groups[:3])]), set(kind[groups[3]])
    assert set(map(frozenset, halves)) == {frozenset({0, 1}), frozenset({2, 3})}
    for shape in [(1, 1, 4), (2, 2, 2), (3, 3, 3), (1, 2, 4), (2, 3, 4), (2, 3, 5)]:
        check(variants.clustering(shape, classifier, seed=0), shape[2])


@pytest.mark.parametrize(
    "groups, k", [((2, 4, 4), 1), ((3, 3, 3), 2), ((1, 1, 4), 1), ((2, 3, 4), 1), ((2, 3, 5), 1)]
)
def test_features_are_shared_out_in_proportion_to_classes(groups, k):
    config = resnet.NetworkConfig(k=k, groups=groups)
    bounds = np.cumsum(np.random.default_rng(0).dirichlet(np.ones(groups[2])) * 96)[:-1]
    given = np.split(np.arange(100), bounds.astype(int) + np.arange(1, groups[2]))
    assignment = grouping.given_assignment(config, given)
    for number, group in enumerate(given):
        assert (assignment["q1"][group] == number).all()
    partition = grouping.Partition(config, assignment)

    def classes_below(level, group):
        if level == 4:
            return len(given[group])
        return sum(classes_below(level + 1, child) for child in partition.children(level, group))

    for name, (number, size) in grouping.indicator_shapes(config).items():
        shares = [classes_below(5 - int(name[1]), group) / 100 for group in range(number)]
        found = np.bincount(assignment[name], minlength=number)
        assert found.sum() == size and found.min() >= 1
        if name != "q1":
            np.testing.assert_allclose(found, np.array(shares) * size, atol=number + 1)
    resnet.SplitResNet(config, assignment)  # which accepts it


NGROUPS = {"ngroups1": 4, "ngroups2": 4, "ngroups3": 2}


def write_variant(kind, folder, data_dir, *flags):
    """A file of groups, by the command."""
    file = folder / f"{kind}.json"
    words = [kind, "--data_dir", data_dir, "--output_file", file, *flags]
    status, _, error = inside("experiments/variants.py", *words)
    assert status == 0, error
    return file


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, data_dir):
    run = tmp_path_factory.mktemp("runs") / "baseline"
    status, _, error = inside("train.py", *train_flags("baseline", run, data_dir, max_steps=2))
    assert status == 0, error
    return run


def cut(base, run, data_dir, **flags):
    """Stage split of a baseline by given groups, or on from such a run; result.json."""
    status, _, error = inside(
        "train.py", *train_flags("split", run, data_dir, basemodel=base, **flags)
    )
    assert status == 0, error
    return utils.read_json(run / "result.json")


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_baseline_is_cut_into_given_groups(kind, baseline, data_dir, tmp_path):
    if kind == "clustering":
        pytest.importorskip("sklearn")
    flags = ["--groups", "2-4-4", "--seed", 3]
    flags += ["--basemodel", baseline] if kind == "clustering" else []
    file = write_variant(kind, tmp_path, data_dir, *flags)
    run = tmp_path / "tree"
    result = cut(baseline, run, data_dir, groups=file, max_steps=1, **NGROUPS)
    assert result["groups"] == "2-4-4" and result["class_groups"] == kind
    check([np.array(group) for group in result["group_classes"]], 4)
    if kind == "random":
        expected = variants.random(4, 100, seed=3)
        assert result["group_classes"] == [group.tolist() for group in expected]


@pytest.mark.parametrize("start", ["new", "baseline"])
def test_weights_are_trained_into_given_groups(start, baseline, data_dir, tmp_path):
    """Their indicators are 0 and 1 from the first step to the last; the cut makes their tree."""
    file = write_variant("random", tmp_path, data_dir, "--groups", "2-4-4")
    run, flags = tmp_path / "group", NGROUPS | {"groups": file, "display": 1, "gamma2": 50}
    if start == "baseline":
        flags["basemodel"] = baseline
    for steps in (4, 8):  # and goes on
        more = {"max_steps": steps, "l2_weight": 0, "group_lr_scale": 100}
        status, _, error = inside("train.py", *train_flags("group", run, data_dir, **flags, **more))
        assert status == 0, error
    result = utils.read_json(run / "result.json")
    assert result["class_groups"] == "random"
    expected = grouping.given_assignment(
        resnet.NetworkConfig(1, k=1, groups=(2, 4, 4)), variants.random(4, 100, seed=0)
    )
    net, _ = restore.load_network(rundir.find_checkpoint(str(run)))
    assert net.alphas.keys() == expected.keys()
    for name, alpha in net.alphas.items():
        soft = grouping.soft_assignment(alpha).numpy()
        np.testing.assert_array_equal(soft, np.eye(len(soft))[expected[name]].T)
    with open(run / "metrics.jsonl") as lines:
        terms = [record for record in map(json.loads, lines) if "loss" in record]
    assert all(np.isfinite(record["loss"]) and record["overlap"] == 0 for record in terms)
    assert terms[-1]["weight_split"] < terms[0]["weight_split"]
    tree = cut(run, tmp_path / "tree", data_dir, max_steps=1)
    assert tree["group_classes"] == result["group_classes"] and tree["class_groups"] == "random"
    others = NGROUPS | {
        "groups": write_variant("semantic", tmp_path, data_dir, "--groups", "2-4-4")
    }
    others = train_flags("group", run, data_dir, max_steps=9, **others)
    fails("train.py", *others, says="is of other groups than those in")


def test_a_tree_of_given_groups_goes_on(baseline, data_dir, tmp_path):
    """Whose groups they are does not change with the flags of a later start."""
    file = write_variant("semantic", tmp_path, data_dir, "--groups", "2-4-4")
    run, flags = tmp_path / "tree", NGROUPS | {"groups": file}
    for steps in (2, 4, 4):  # and goes on, and is complete
        assert cut(baseline, run, data_dir, max_steps=steps, **flags)["step"] == steps
    numbers = [[*range(c, 100, 4)] for c in range(4)]
    (tmp_path / "other.json").write_text(json.dumps(numbers))
    for steps in (4, 6):
        others = flags | {"basemodel": baseline, "groups": tmp_path / "other.json"}
        other = train_flags("split", run, data_dir, max_steps=steps, **others)
        fails("train.py", *other, says="is of other groups than those in")
    for base, to in ((baseline, run), (run, tmp_path / "on")):
        assert cut(base, to, data_dir, max_steps=6)["class_groups"] == "semantic"


NAMES = ["apple", "bear", "cup", "dog"]


def test_groups_of_names_and_numbers(tmp_path):
    file = tmp_path / "groups.json"
    file.write_text('[["dog", 0], [2, "bear"]]')
    groups = restore.read_groups(str(file), 2, NAMES)
    assert [group.tolist() for group in groups] == [[0, 3], [1, 2]]


@pytest.mark.parametrize("text, says", [
    ('[["apple", "dog"], ["cup"]]', "lacks the class bear"),
    ('[["apple"], ["cup"]]', "lacks the class bear and 1 others"),
    ('[["apple", "dog"], ["cup", "bear", 3]]', "the class dog twice, in group 0 and in group 1"),
    ('[["apple", "dog", "cat"], ["cup", "bear"]]', "group 0 names the class 'cat'"),
    ('[["apple", "dog"], ["cup", "bear", 4]]', "group 1 names the class 4"),
    ('[["apple", "dog"], ["cup", "bear", -1]]', "group 1 names the class -1"),
    ('[["apple", "dog"], ["cup", true]]', "group 1 names the class True"),
    ('[["apple", "dog"], ["cup", 1.0]]', "group 1 names the class 1.0"),
    ('[["apple", "dog"], ["cup", ["bear"]]]', r"group 1 names the class \['bear'\]"),
    ('[["apple", "dog", "cup", "bear"], []]', "group 1 .* is empty"),
    ('[["apple", "dog", "cup", "bear"]]', "holds 1 groups, but --ngroups1 is 2"),
    ('["apple", "dog"]', "a list of groups"),
    ('{"a": ["apple"]}', "a list of groups"),
    ('[["apple"', "cannot be read as JSON"),
    (None, "cannot be read as JSON: No such file"),
])  # fmt: skip
def test_files_of_groups_that_are_refused(text, says, tmp_path):
    file = tmp_path / "groups.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        restore.read_groups(str(file), 2, NAMES)
    assert str(file) in str(error.value)


def test_what_is_refused(data_dir, tmp_path):
    file = write_variant("random", tmp_path, data_dir, "--groups", "1-1-2")
    split = {"basemodel": tmp_path, "groups": file}
    fails("train.py", *train_flags("split", tmp_path / "r", data_dir, **split), status=2,
          says="set --ngroups1 to 2")  # fmt: skip
    grouped = tmp_path / "group"
    assert inside("train.py", *train_flags("group", grouped, data_dir, max_steps=1))[0] == 0
    split |= {"basemodel": grouped, "ngroups1": 2}
    fails("train.py", *train_flags("split", tmp_path / "r", data_dir, **split),
          says="has groups of its own")  # fmt: skip
    for words, says in [
        (["rondom", "--groups", "2-2-2"], "KIND is one of semantic"),
        (["random"], "--groups is needed"),
        (["random", "--groups", "2-2-x"], "numbers such as 2-4-4"),
        (["random", "--groups", "4-2-2"], "do not nest"),
        (["clustering", "--groups", "2-2-2"], "needs a baseline"),
        (["random", "--groups", "2-2-2", "--basemodel", "x"], "needs a baseline"),
    ]:
        fails("experiments/variants.py", *words, status=2, says=says)
    words = ["clustering", "--groups", "2-2-2", "--basemodel", grouped, "--data_dir", data_dir]
    fails("experiments/variants.py", *words, says="has groups of its own")
    other = shutil.copytree(data_dir, tmp_path / "other")
    description = utils.read_json(other / "split.json") | {"dataset": "cifar100"}
    utils.write_json(other / "split.json", description)
    fails("experiments/variants.py", *words[:-1], other, says="was trained on synthetic")
