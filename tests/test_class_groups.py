"""Given class groups: semantic, clustering, random; features in proportion; trees of baselines."""

import numpy as np
import pytest
from conftest import fails, inside, train_flags

import class_groups
import grouping
import resnet
import utils

DATA = {
    "superclass_names": sorted(class_groups.SEMANTIC_ORDER),
    "superclass_of_class": np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5)),
}


def check(groups, number, num_classes=100):
    assert len(groups) == number and min(len(g) for g in groups) >= 1
    assert sorted(np.concatenate(groups)) == list(range(num_classes))


@pytest.mark.parametrize("number, sizes", [(2, [50, 50]), (3, [35, 35, 30]), (4, [25] * 4)])
def test_semantic_groups_hold_whole_superclasses(number, sizes):
    groups = class_groups.semantic(number, DATA)
    check(groups, number)
    assert [len(group) for group in groups] == sizes
    supers = [set(DATA["superclass_of_class"][group]) for group in groups]
    assert not set.intersection(*supers[:2])
    first = {DATA["superclass_names"][i] for i in supers[0]}
    assert {"people", "small_mammals"} <= first and "vehicles_1" not in first


def test_semantic_groups_of_another_data_set():
    data = DATA | {"superclass_names": [f"super{i}" for i in range(20)]}
    groups = class_groups.semantic(2, data)
    assert set(DATA["superclass_of_class"][groups[0]]) == set(range(10))
    with pytest.raises(ValueError, match="20 superclasses"):
        class_groups.semantic(21, data)


def test_random_groups_are_equal_and_drawn_from_the_seed():
    groups = class_groups.random(3, 100, seed=1)
    check(groups, 3)
    assert [len(group) for group in groups] == [34, 33, 33]
    again, other = class_groups.random(3, 100, seed=1), class_groups.random(3, 100, seed=2)
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
    groups = class_groups.clustering((2, 4, 4), classifier, seed=0)
    check(groups, 4)
    found = [set(kind[group]) for group in groups]
    assert all(len(kinds) == 1 for kinds in found)
    assert {frozenset(found[0] | found[1]), frozenset(found[2] | found[3])} == {
        frozenset({0, 1}), frozenset({2, 3})
    }  # fmt: skip
    # In 2-3-4 the first three groups are of one branch: two of them are divided a second time.
    groups = class_groups.clustering((2, 3, 4), classifier, seed=0)
    halves = set(kind[np.concatenate(groups[:3])]), set(kind[groups[3]])
    assert set(map(frozenset, halves)) == {frozenset({0, 1}), frozenset({2, 3})}
    for shape in [(1, 1, 4), (2, 2, 2), (3, 3, 3), (1, 2, 4), (2, 3, 4), (2, 3, 5)]:
        check(class_groups.clustering(shape, classifier, seed=0), shape[2])


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


@pytest.mark.parametrize("kind", class_groups.KINDS)
def test_a_baseline_is_cut_into_given_groups(kind, data_dir, tmp_path):
    if kind == "clustering":
        pytest.importorskip("sklearn")
    base = tmp_path / "baseline"
    status, _, error = inside("train.py", *train_flags("baseline", base, data_dir, max_steps=2))
    assert status == 0, error
    flags = {"ngroups1": 4, "ngroups2": 4, "ngroups3": 2, "basemodel": base, "groups": kind}
    for steps in (2, 4):  # and goes on
        run = train_flags("split", tmp_path / kind, data_dir, max_steps=steps, seed=3, **flags)
        status, _, error = inside("train.py", *run)
        assert status == 0, error
    result = utils.read_json(tmp_path / kind / "result.json")
    assert result["groups"] == "2-4-4" and result["class_groups"] == kind
    check([np.array(group) for group in result["group_classes"]], 4)
    if kind == "random":
        expected = class_groups.random(4, 100, seed=3)
        assert result["group_classes"] == [group.tolist() for group in expected]
        other = train_flags("split", tmp_path / kind, data_dir, max_steps=6, seed=4, **flags)
        fails("train.py", *other, says="is of groups random --seed 3, not random --seed 4")
    # Whose groups they are does not change with the flags of a later start.
    others = flags | {"groups": "semantic" if kind == "random" else "random"}
    other = train_flags("split", tmp_path / kind, data_dir, max_steps=6, seed=3, **others)
    fails("train.py", *other, says=f"is of groups {kind}")
    for base, to in ((flags["basemodel"], tmp_path / kind), (tmp_path / kind, tmp_path / "on")):
        on = train_flags("split", to, data_dir, max_steps=6, seed=3, basemodel=base)
        status, _, error = inside("train.py", *on)
        assert status == 0, error
        assert utils.read_json(to / "result.json")["class_groups"] == kind


def test_what_groups_mean_counted_by_hand():
    of = [0, 0, 0, 1, 1, 1]  # three pairs each
    groups = [[0, 1, 3], [2, 4, 5]]
    assert class_groups.pairs_together(groups, of) == pytest.approx(2 / 6)
    assert class_groups.purity(groups, of) == pytest.approx(2 / 3)
    assert class_groups.chance_together(groups) == pytest.approx(6 / 15)
    for whole in ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]):
        assert class_groups.pairs_together(whole, of) == class_groups.purity(whole, of) == 1
    assert class_groups.pairs_together([[c] for c in range(6)], of) == 0


def test_chance_is_that_of_random_groups_of_these_sizes():
    of = [c // 5 for c in range(100)]
    groups = [list(range(30)), list(range(30, 100))]
    expected = (30 * 29 + 70 * 69) / (100 * 99)
    assert class_groups.chance_together(groups) == pytest.approx(expected)
    measure = class_groups.pairs_together
    mean, deviation = class_groups.by_chance(measure, groups, of)
    rng = np.random.default_rng(9)
    drawn = [measure([p[:30], p[30:]], of) for p in (rng.permutation(100) for _ in range(2000))]
    assert mean == pytest.approx(expected, abs=3 * deviation / 1000**0.5)
    assert deviation == pytest.approx(np.std(drawn), rel=0.1)
    assert measure(groups, of) > mean + 10 * deviation


def test_mistakes_within_and_between_groups():
    confusion = np.array([[9, 1, 0, 2], [3, 9, 4, 0], [0, 0, 9, 5], [6, 0, 7, 9]])
    assert class_groups.mistakes(confusion, [[0, 1], [2, 3]]) == (1 + 3 + 5 + 7, 2 + 4 + 6)
    assert class_groups.mistakes(confusion, [[0, 2], [3, 1]]) == (0, 28)
    assert class_groups.mistakes(confusion, [[3, 0, 2, 1]]) == (28, 0)


def test_what_is_refused(data_dir, tmp_path):
    split = {"basemodel": tmp_path, "groups": "random"}
    fails("train.py", *train_flags("split", tmp_path / "r", data_dir, **split), status=2,
          says="set --ngroups1 to 2")  # fmt: skip
    split |= {"ngroups1": 2, "groups": "rondom"}
    fails("train.py", *train_flags("split", tmp_path / "r", data_dir, **split), status=2,
          says="must be one of semantic")  # fmt: skip
    grouped = tmp_path / "group"
    assert inside("train.py", *train_flags("group", grouped, data_dir, max_steps=1))[0] == 0
    split |= {"basemodel": grouped, "groups": "random"}
    fails("train.py", *train_flags("split", tmp_path / "r", data_dir, **split),
          says="has groups of its own")  # fmt: skip
