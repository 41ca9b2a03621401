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
        f"superclasses       {tree['superclass_pairs']:.2f} of the pairs of classes of one "
        f"superclass are together (chance {tree['superclass_pairs_chance']:.2f})"
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
