"""Groups of classes that are not learned: the paper's variants S, C and R.

    python -m experiments.variants semantic --groups 2-2-2 --output_file semantic.json
    python -m experiments.variants clustering --groups 2-4-4 --basemodel runs/baseline
    python -m experiments.variants random --groups 2-2-2 --seed 1

writes a JSON list of the groups of the classifier, each a list of class names, which
`train.py --stage split --groups FILE` cuts a baseline into. Neighbouring groups are the ones that a
hierarchy such as 2-4-4 merges; `grouping.given_assignment` shares the features out accordingly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import cifar100
import grouping
import networks
import rundir
import utils

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
    if not names:
        raise ValueError(
            f"semantic groups are of superclasses, and {data['dataset']} has none: give some to "
            "make_dataset.py (--superclasses), or take random or clustering"
        )
    order = range(len(names))
    if set(names) == set(SEMANTIC_ORDER):
        order = [names.index(name) for name in SEMANTIC_ORDER]
    if num_groups > len(names):
        raise ValueError(
            f"semantic puts {len(names)} superclasses into at most as many groups, not {num_groups}"
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
        ValueError: a cluster has too few classes to divide.
    """
    from sklearn.cluster import SpectralClustering

    directions = classifier / np.linalg.norm(classifier, axis=0)
    affinity = (1 + directions.T @ directions) / 2  # (classes, classes)

    def divide(classes: np.ndarray, numbers: Sequence[int]) -> list[np.ndarray]:
        """`classes` in numbers[0] clusters, and each in as many as the numbers after it say."""
        if not numbers:
            return [classes]
        if len(classes) < numbers[-1]:
            raise ValueError(
                f"clustering cannot divide {len(classes)} classes into {numbers[-1]} "
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


# ---------------------------------------------------------------- the command


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags and one kind; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__, needed=("kind", "groups"))
    parser.usage = "%(prog)s KIND --FLAG VALUE ..."
    add = parser.add_argument
    add("kind", nargs="?", help=" | ".join(KINDS))
    add("--groups", help="numbers of groups, the classifier's last, such as 2-4-4")
    add("--basemodel", type=utils.path, default="", help="baseline whose classifier is clustered")
    add("--data_dir", type=utils.path, default="data/cifar100", help="for names and superclasses")
    add("--seed", type=utils.number(int, low=0, below=2**31), default=0,
        help="of random groups and of clustering")  # fmt: skip
    add("--output_file", type=utils.path, default="", help="default: the terminal")
    flags = parser.parse_args(argv)
    if flags.kind not in KINDS:
        parser.error(f"KIND is one of {', '.join(KINDS)}, got {flags.kind!r}")
    try:
        flags.groups = tuple(int(number) for number in flags.groups.split("-"))
        levels = [f"level {number + 1}" for number in range(max(3, len(flags.groups)))]
        networks.check_nesting(flags.groups, levels)
    except ValueError as error:
        parser.error(f"--groups are numbers such as 2-4-4: {error}")
    if (flags.kind == "clustering") != bool(flags.basemodel):
        parser.error("clustering, and nothing else, needs a baseline: --basemodel RUN")
    return flags


def make(flags: argparse.Namespace, data: dict) -> list[np.ndarray]:
    """The classes of every group."""
    num_classes = len(data["class_names"])
    if flags.groups[-1] > num_classes:
        raise ValueError(f"{num_classes} classes make no {flags.groups[-1]} groups: give fewer")
    if flags.kind == "semantic":
        return semantic(flags.groups[-1], data)
    if flags.kind == "random":
        return random(flags.groups[-1], num_classes, flags.seed)
    import restore  # loads TensorFlow

    path = rundir.find_checkpoint(flags.basemodel)
    net, description = restore.load_network(path)
    restore.check_dataset(path, description, data, flags.data_dir, "test")
    if max(net.config.groups) > 1:
        raise ValueError(f"{flags.basemodel} has groups of its own: name a baseline")
    return clustering(flags.groups, net.logits.fc.weights.numpy(), flags.seed)


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    data = cifar100.describe(flags.data_dir)
    names = data["class_names"]
    lines = [json.dumps([names[c] for c in group]) for group in make(flags, data)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    if not flags.output_file:
        print(text, end="")
        return 0
    utils.check_file(flags.output_file, "output_file")
    with utils.atomic_write(flags.output_file) as file:
        file.write(text)
    return 0


if __name__ == "__main__":
    utils.run_main(main)
