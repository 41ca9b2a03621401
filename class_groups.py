"""Groups of classes: those that are given, the paper's variants S, C and R, and what groups mean.

`semantic`, `random` and `clustering` return the classes of every group of the classifier, first to
last; neighbouring groups are the ones that a hierarchy such as 2-4-4 merges.
`grouping.given_assignment` shares the features out accordingly. `pairs_together` tells how far
groups agree with the superclasses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import grouping

KINDS = ("semantic", "clustering", "random")

# CIFAR-100's superclasses, what is alike side by side: mammals and people, other animals, plants
# and landscapes, made things. Cut into two, three, four or five runs it gives groups that a person
# would name.
SEMANTIC_ORDER = (
    "people", "small_mammals", "medium_mammals", "large_carnivores",
    "large_omnivores_and_herbivores",
    "aquatic_mammals", "fish", "reptiles", "insects", "non-insect_invertebrates",
    "flowers", "fruit_and_vegetables", "trees", "large_natural_outdoor_scenes",
    "large_man-made_outdoor_things",
    "vehicles_1", "vehicles_2", "household_electrical_devices", "household_furniture",
    "food_containers",
)  # fmt: skip


def semantic(num_groups: int, data: dict) -> list[np.ndarray]:
    """Variant S: whole superclasses, in balanced groups.

    Args:
        data: the data set's description (`cifar100.describe`). The synthetic set's superclasses are
            taken in its own order.

    Raises:
        ValueError: there are fewer superclasses than groups.
    """
    names = data["superclass_names"]
    order = range(len(names))
    if set(names) == set(SEMANTIC_ORDER):
        order = [names.index(name) for name in SEMANTIC_ORDER]
    if num_groups > len(names):
        raise ValueError(
            f"--groups semantic puts {len(names)} superclasses into at most as many groups, not "
            f"{num_groups}"
        )
    superclass_of = np.asarray(data["superclass_of_class"])
    runs = grouping.merge_runs(len(names), num_groups)
    return [np.flatnonzero(np.isin(superclass_of, [order[i] for i in run])) for run in runs]


def random(num_groups: int, num_classes: int, seed: int) -> list[np.ndarray]:
    """Variant R: equal groups, drawn from the seed."""
    shuffled = np.random.default_rng(seed).permutation(num_classes)
    return [np.sort(part) for part in np.array_split(shuffled, num_groups)]


def clustering(groups: Sequence[int], classifier: np.ndarray, seed: int) -> list[np.ndarray]:
    """Variant C: spectral clustering of the classes by a baseline's classifier `[D, classes]`.

    Alike are classes whose weights have a large cosine. A hierarchy is clustered from its coarsest
    level down.

    Raises:
        ValueError: scikit-learn is not installed, or a cluster has too few classes to divide.
    """
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError:
        raise ValueError(
            "--groups clustering needs scikit-learn: pip install scikit-learn"
        ) from None
    directions = classifier / np.linalg.norm(classifier, axis=0)
    affinity = (1 + directions.T @ directions) / 2  # (classes, classes)

    def divide(classes: np.ndarray, numbers: Sequence[int]) -> list[np.ndarray]:
        """`classes` in numbers[0] clusters, and each in as many as the numbers after it say."""
        if not numbers:
            return [classes]
        if len(classes) < numbers[-1]:
            raise ValueError(
                f"--groups clustering cannot divide {len(classes)} classes into {numbers[-1]} "
                "groups: use fewer groups"
            )
        found = np.zeros(len(classes), int)
        if numbers[0] > 1:
            method = SpectralClustering(numbers[0], affinity="precomputed", random_state=seed)
            found = method.fit_predict(affinity[np.ix_(classes, classes)])
        divided = []
        for number in range(numbers[0]):
            # How many groups each later level has below this cluster.
            ends = range(2, len(numbers) + 1)
            rest = [len(grouping.groups_below(numbers[:end])[number]) for end in ends]
            divided += divide(classes[found == number], rest)
        return divided

    return divide(np.arange(classifier.shape[1]), groups)


# ---------------------------------------------------------------- what groups mean


def pairs_together(groups: Sequence[Sequence[int]], superclass_of_class: Sequence[int]) -> float:
    """Share of the pairs of classes of one superclass that are in one group."""
    of = np.asarray(superclass_of_class)
    inside = np.array([np.bincount(of[np.asarray(g, int)], minlength=of.max() + 1) for g in groups])
    sizes = np.bincount(of)
    return float((inside * (inside - 1)).sum() / (sizes * (sizes - 1)).sum())


def purity(groups: Sequence[Sequence[int]], superclass_of_class: Sequence[int]) -> float:
    """Largest share of a superclass that is in one group, averaged over the superclasses."""
    of = np.asarray(superclass_of_class)
    inside = [np.bincount(of[np.asarray(g, int)], minlength=of.max() + 1) for g in groups]
    return float(np.mean(np.max(inside, axis=0) / np.bincount(of)))


def by_chance(measure, groups, superclass_of_class, draws: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation of a measure for random groups of these sizes."""
    rng, bounds = np.random.default_rng(0), np.cumsum([len(g) for g in groups])[:-1]
    num_classes = len(superclass_of_class)
    values = [
        measure(np.split(rng.permutation(num_classes), bounds), superclass_of_class)
        for _ in range(draws)
    ]
    return float(np.mean(values)), float(np.std(values))


def chance_together(groups: Sequence[Sequence[int]]) -> float:
    """`pairs_together` of random groups of these sizes: the share of all pairs in one group."""
    sizes = [len(classes) for classes in groups]
    total = sum(sizes)
    return sum(n * (n - 1) for n in sizes) / (total * (total - 1))


def mistakes(confusion: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Mistakes of a confusion matrix [label, prediction] within the groups and between them."""
    inside = sum(confusion[np.ix_(classes, classes)].sum() for classes in groups)
    return int(inside - np.trace(confusion)), int(confusion.sum() - inside)
