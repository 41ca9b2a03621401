"""Weights and FLOPs of the paper's networks and splits, its Tables 2, 3 and 4, beside the paper's.

    python -m experiments.counts

Ours are those of actual trees of equal groups, which are what the paper's random groups should
come to; learned groups may be uneven. 2 FLOPs a multiply-add; kernels and weights of fully
connected layers, in Table 2 with the classifier's biases. Where ours and the paper's random groups,
or its networks that are not split, differ by more than 0.1 %, the last column says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import networks
import resnet
import utils

NAMED = 1e-3  # a difference from the paper's random groups that is worth a word
# Of each table: the network and, for each row, groups and the paper's weights (in millions) and
# FLOPs (in thousands of millions) as printed, of learned and of random groups.
TABLES = {
    "Table 2: WRN-16-8 on CIFAR-100": ("wrn", [
        ("not split", (1, 1, 1), ("11.0", "3.10"), ("11.0", "3.10")),
        ("FC split", (1, 1, 4), ("11.0", "3.10"), ("", "")),
        ("Shallow", (1, 2, 2), ("7.42", "2.64"), ("", "")),
        ("Deep", (2, 2, 2), ("5.90", "2.11"), ("", "")),
        ("Hierarchical", (2, 4, 4), ("4.12", "1.88"), ("", "")),
    ]),
    "Table 3: AlexNet on ILSVRC 2012 (conv4-conv5-fc6-fc7-fc8)": ("alexnet", [
        ("not split", (1, 1, 1, 1, 1), ("62.37", "2.278"), ("62.37", "2.278")),
        ("1-1-3", (1, 1, 1, 1, 3), ("59.64", "2.273"), ("", "")),
        ("1-2-5", (1, 1, 1, 2, 5), ("50.69", "2.256"), ("50.70", "")),
        ("2-4-8", (1, 1, 2, 4, 8), ("27.34", "2.209"), ("", "")),
        ("2x5", (2, 2, 2, 2, 2), ("31.96", "1.847"), ("31.94", "1.846")),
    ]),
    "Table 4: ResNet-18x2 on ILSVRC 2012 (conv4-conv5-fc)": ("resnet18", [
        ("not split", (1, 1, 1), ("45.67", "14.04"), ("45.67", "14.04")),
        ("1-1-3", (1, 1, 3), ("44.99", ""), ("44.99", "")),
        ("1-2-2", (1, 2, 2), ("28.39", "12.39"), ("28.38", "")),
        ("2-2-2", (2, 2, 2), ("24.21", "10.75"), ("24.14", "")),
    ]),
}  # fmt: skip


def count(network: str, groups: Sequence[int]) -> tuple[int, int]:
    """Weights and FLOPs of a network, or of its tree of equal groups."""
    config = networks.config_class(network)(groups=groups)
    return resnet.count(resnet.equal_tree(config) if max(groups) > 1 else resnet.make(config))


def differences(counted: Sequence[float], paper: Sequence[str]) -> str:
    """How ours differ from the paper's, where that is printed and the difference worth a word.

    What is printed may be half a unit of its last digit away from what was counted.
    """
    words = []
    for name, ours, printed in zip(("weights", "FLOPs"), counted, paper, strict=True):
        if not printed:
            continue
        half = 10.0 ** -len(printed.partition(".")[2]) / 2
        if abs(ours - float(printed)) > max(NAMED * float(printed), half):
            words.append(f"{name} {100 * (ours / float(printed) - 1):+.2f} %")
    return ", ".join(words)


def table(network: str, rows: Sequence[tuple]) -> str:
    """One of the paper's tables."""
    head = ["split", "groups", "weights", "saved", "FLOPs", "saved", "paper: learned",
            "paper: random", "ours beside random"]  # fmt: skip
    lines, whole = [head], count(network, rows[0][1])
    for name, groups, *papers in rows:
        counted = count(network, groups)
        saved = [f"{100 * (1 - own / of):.2f} %" for own, of in zip(counted, whole, strict=True)]
        printed = [
            ", ".join(
                f"{number} {unit}" for number, unit in zip(paper, "MG", strict=True) if number
            )
            for paper in papers
        ]
        scaled = (counted[0] / 1e6, counted[1] / 1e9)
        lines.append([
            name, networks.format_groups(groups), f"{counted[0]:,}", saved[0], f"{counted[1]:,}",
            saved[1], *printed, differences(scaled, papers[1]),
        ])  # fmt: skip
    return utils.markdown_table(lines)


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """No flags but --help; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    parser.usage = "%(prog)s"
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    parse_flags(argv)
    for title, (network, rows) in TABLES.items():
        print(f"{title}\n\n{table(network, rows)}\n")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
