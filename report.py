"""What a pipeline learned, in words: accuracy before and after the cut, what is saved, the groups.

    python report.py --run runs/smoke

reads the result.json files that eval.py wrote below the run directories of group.sh and split.sh.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence

import utils  # isort: skip, it quiets TensorFlow's start

import cifar100

RESULTS = {
    "grouped": "group/eval/result.json",
    "cut": "group/eval_mask/result.json",
    "tree": "split/eval/result.json",
}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The pipeline's directory and its data; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__.partition("\n")[0], needed=("run",))
    parser.add_argument("--run", help="directory that holds group/ and split/")
    parser.add_argument("--data_dir", default="data/cifar100", help="for the names of the classes")
    return parser.parse_args(argv)


def pairs_together(groups: Sequence[Sequence[int]], superclass_of_class: Sequence[int]) -> float:
    """Share of the pairs of classes of one superclass that are in one group."""
    group_of = {c: g for g, classes in enumerate(groups) for c in classes}
    together = [
        group_of[a] == group_of[b]
        for a in group_of
        for b in group_of
        if a < b and superclass_of_class[a] == superclass_of_class[b]
    ]
    return sum(together) / len(together)


def chance_together(groups: Sequence[Sequence[int]]) -> float:
    """The same for random groups of these sizes: the share of all pairs that are in one group."""
    sizes = [len(classes) for classes in groups]
    total = sum(sizes)
    return sum(n * (n - 1) for n in sizes) / (total * (total - 1))


def summary(results: dict[str, dict], data: dict) -> str:
    """One page of text from the three results of `RESULTS` and the data set's description."""
    grouped, cut, tree = (results[name] for name in RESULTS)
    if not cut["masked"] or grouped["masked"] or len({r["dataset"] for r in results.values()}) > 1:
        raise ValueError("the results are not of one pipeline: run eval.py again for each")
    note = " (SYNTHETIC images, not CIFAR-100)" if tree["dataset"] == "synthetic" else ""
    groups = tree["group_classes"]
    lines = [
        f"data set           {tree['dataset']}, {tree['num_examples']:,} {tree['split']} images"
        f"{note}",
        f"network            {tree['network']}, groups {tree['groups']}",
        "test accuracy      "
        f"grouped {grouped['accuracy']:.4f}, right after the cut {cut['accuracy']:.4f}, "
        f"finetuned tree {tree['accuracy']:.4f}",
    ]
    for name in ("weights", "flops"):
        saved = 1 - tree[name] / grouped[name]
        lines.append(f"{name:<19}{grouped[name]:,} -> {tree[name]:,}, {saved:.1%} saved")
    lines.append(
        f"superclasses       {pairs_together(groups, data['superclass_of_class']):.2f} of the "
        f"pairs of classes of one superclass are together (chance {chance_together(groups):.2f})"
    )
    for number, classes in enumerate(groups):
        names = ", ".join(data["class_names"][c] for c in classes)
        title = f"group {number} ({len(classes)})"
        lines += textwrap.wrap(f"{title:<19}{names}", 100, subsequent_indent=" " * 19)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    results = {}
    for name, file in RESULTS.items():
        path = os.path.join(flags.run, file)
        if not os.path.exists(path):
            raise ValueError(
                f"{path} is missing: run quickstart.sh, or eval.py with --checkpoint RUN/group, "
                "the same with --mask, and RUN/split"
            )
        try:
            results[name] = utils.read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}: run eval.py again") from None
    try:
        print(summary(results, cifar100.describe(flags.data_dir)))
    except KeyError as error:
        raise ValueError(f"a result or split.json lacks {error}: run eval.py again") from None
    return 0


if __name__ == "__main__":
    utils.run_main(main)
