"""The paper's tables from result.json files: our numbers beside the paper's.

    python -m experiments.tables                    those of results/
    python -m experiments.tables runs/cpu/table     of the rows that experiments/run.sh has made
    python -m experiments.tables --write FILE       into a page, between its markers

A page has markers of all tables (docs/results.md), of the summary (README.md) or of the rows'
commands (experiments/README.md). Errors are of all test images, at the end of the last stage:
nothing is picked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import metrics
import resnet
import utils
from experiments.rows import (
    RESULTS,
    ROWS,
    TABLE_2,
    VARIANTS,
    config_of,
    find_results,
    flags_of,
    is_tree,
    network_of,
    table_of,
)

WRITERS = {"results": "tables", "summary": "tables", "commands": "tables", "trend": "trend"}
MARKERS = {
    name: (f"<!-- {name}: written by experiments/{writer}.py -->", f"<!-- end of {name} -->")
    for name, writer in WRITERS.items()
}
# Of each network: the table of its test errors, and what the paper's numbers are of.
PAPER = {
    "wrn": ("Table 1", "WRN-16-8"),
    "alexnet": ("Table 3", "AlexNet on ILSVRC 2012"),
    "resnet18": ("Table 4", "ResNet-18x2 on ILSVRC 2012"),
}
KINDS = {"S": "semantic", "C": "clustering", "R": "random"}  # of groups; else they are learned


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags and one folder; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    parser.usage = "%(prog)s FOLDER --FLAG VALUE ..."
    add = parser.add_argument
    add("folder", nargs="?", type=utils.path, default=RESULTS, help=f"default: {RESULTS}")
    add("--write", metavar="FILE", type=utils.path, default="", help="put the tables into a page")
    return parser.parse_args(argv)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard error where there are several."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def _percent(results: list[dict] | None, paper: float | None) -> str:
    """Our error beside the paper's, which is in brackets."""
    words = []
    if results:
        mean, error = mean_and_error([100 * result["error"] for result in results])
        words.append(f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
    if paper is not None:
        words.append(f"({paper:.2f})")
    return " ".join(words)


def table_1(results_by_row: dict[str, list[dict]]) -> str:
    """Test errors, by who made the groups."""
    lines = [["test error, % (paper)", "S: semantic", "C: clustering", "R: random", "learned"]]
    for title, row, *paper in table_of(results_by_row):
        names = [*(f"{row}-{variant}" for variant in VARIANTS), row]
        cells = [_percent(results_by_row.get(n), p) for n, p in zip(names, paper, strict=True)]
        if any(cells):
            lines.append([title, *cells])
    return utils.markdown_table(lines)


def table_2(results_by_row: dict[str, list[dict]]) -> str:
    """What each network that we have costs, counted from the actual one."""
    shares = ["saved", "saved by equal groups", "saved in the paper"]
    head = ["network", "weights", *shares, "FLOPs", *shares, "error, %", "seeds", "pairs (chance)"]
    lines = [head]
    whole = results_by_row.get(_not_split(results_by_row), [None])[0]
    for row in (name for name in ROWS if name in results_by_row):
        results = results_by_row[row]
        first = results[0]
        cells = [row]
        equal = _equal_counts(row, first)
        for i, name in enumerate(("weights", "flops")):
            count = statistics.mean(result[name] for result in results)
            cells.append(_count(name, count))
            cells.append(f"{100 * (1 - count / whole[name]):.1f} %" if whole else "")
            cells.append(f"{100 * (1 - equal[i] / whole[name]):.1f} %" if whole and equal else "")
            cells.append(f"{TABLE_2[row][i]:.2f} %" if row in TABLE_2 else "")
        cells.append(_percent(results, None))
        cells.append(", ".join(str(result["seed"]) for result in results))
        pairs = ""
        if "superclass_pairs" in first:
            pairs = "{:.2f} ({:.2f})".format(*(
                statistics.mean(result[name] for result in results)
                for name in ("superclass_pairs", "superclass_pairs_chance")
            ))  # fmt: skip
        lines.append([*cells, pairs])
    return utils.markdown_table(lines)


def _network(results_by_row: dict[str, list[dict]]) -> str:
    """The network of all rows, as `networks.NETWORKS` names it."""
    return network_of(next(iter(results_by_row)))


def _not_split(results_by_row: dict[str, list[dict]]) -> str:
    """The row of the network that the trees are cut from."""
    return table_of(results_by_row)[0][1]


def _count(name: str, count: float) -> str:
    return f"{count / 1e6:.3f} M" if name == "weights" else f"{count / 1e9:.3f} G"


def mistakes_table(results_by_row: dict[str, list[dict]]) -> str:
    """Where trees go wrong: within a group, which one branch decides, or between groups.

    In % of the test images, beside the baseline's (in brackets) by the same groups; each the mean
    over its seeds. Empty without a tree and a baseline.
    """
    lines = [["mistakes, % (baseline's)", "within a group", "between groups"]]
    trees = [row for row in ROWS if row in results_by_row and is_tree(row)]
    whole = results_by_row.get(_not_split(results_by_row))
    if not trees or not whole:
        return ""
    for row in trees:
        groups = [tree["group_classes"] for tree in results_by_row[row]]
        ours = [_mistakes(*pair) for pair in zip(results_by_row[row], groups, strict=True)]
        baselines = [_mistakes(result, of) for result in whole for of in groups]
        means = zip(np.mean(ours, axis=0), np.mean(baselines, axis=0), strict=True)
        lines.append([row, *(f"{share:.2f} ({base:.2f})" for share, base in means)])
    return utils.markdown_table(lines)


def _mistakes(result: dict, groups: Sequence[Sequence[int]]) -> list[float]:
    """% of the images that are mistaken within the groups and between them."""
    counts = metrics.mistakes(np.array(result["confusion_matrix"]), groups)
    return [100 * count / result["num_examples"] for count in counts]


def _equal_counts(row: str, result: dict) -> tuple[int, int] | None:
    """Weights and FLOPs of equal groups for a tree's result."""
    if not is_tree(row):
        return None
    return resnet.count(resnet.equal_tree(config_of(row, result)))


def summary_table(results_by_row: dict[str, list[dict]]) -> str:
    """One line a network: its groups, what it costs, our error and the paper's."""
    head = ["network", "groups", "weights", "FLOPs", "test error, %", "paper's, %"]
    lines = [head]
    for title, row, *paper in table_of(results_by_row):
        for kind, error in zip(("", *VARIANTS), (paper[-1], *paper), strict=False):
            results = results_by_row.get(f"{row}-{kind}" if kind else row)
            if not results:
                continue
            groups = ""
            if is_tree(row):
                groups = f"{results[0]['groups']}, {KINDS.get(kind, 'learned')}"
            network = title.partition(" (")[0].replace("WRN-16-k", results[0]["network"])
            counts = [
                _count(name, statistics.mean(result[name] for result in results))
                for name in ("weights", "flops")
            ]
            published = "" if error is None else f"{error:.2f}"
            lines.append([network, groups, *counts, _percent(results, None), published])
    return utils.markdown_table(lines)


def commands_table(results_by_row: dict[str, list[dict]]) -> str:
    """The rows that the paper or we have a number of, with the words after experiments/run.sh."""
    lines = [["paper", "row", "paper's, %", "ours, %", "file"]]
    table, _ = PAPER[_network(results_by_row)]
    for title, row, *paper in table_of(results_by_row):
        for kind, error in zip(("", *VARIANTS), (paper[-1], *paper), strict=False):
            name = f"{row}-{kind}" if kind else row
            results = results_by_row.get(name)
            if error is None and not results:
                continue
            where = f"{table}, 2" if name in (*TABLE_2, "baseline") else table
            words = title.replace("WRN-16-k", "WRN-16-8").partition(" (")[0]
            words += f", {KINDS.get(kind, 'learned')}" if is_tree(row) else ""
            file = f"`{RESULTS}/{name}/`" if results else ""  # where `publish` puts it
            lines.append([
                f"{where}: {words}" if error else words, f"`{name}`",
                f"{error:.2f}" if error else "", _percent(results, None) or "–", file,
            ])  # fmt: skip
    return utils.markdown_table(lines)


def _setting(results_by_row: dict[str, list[dict]]) -> str:
    """What all rows have in common, in words."""
    first = next(
        results_by_row[row] for row in sorted(results_by_row, key=lambda row: row == "narrow")
    )[0]
    note = "" if first["dataset"] == "cifar100" else f" **on the {first['dataset']} data set**"
    return (
        f"{first['network']}, preset `{first['preset']}`{note}, {first['num_examples']:,} test "
        "images"
    )


def _notes(results_by_row: dict[str, list[dict]]) -> str:
    """What a reader has to know of the numbers, in sentences."""
    notes = [f"The paper's numbers are of {PAPER[_network(results_by_row)][1]}."]
    numbers = {len(results) for results in results_by_row.values()} - {1}
    if numbers:
        of = f"{numbers.pop()} seeds" if len(numbers) == 1 else "several seeds"
        notes.append(f"Where ± stands, the mean of {of} and its standard error.")
    low = [
        row
        for row in ROWS
        if any(flags_of(r)["precision"] == "bfloat16" for r in results_by_row.get(row, []))
    ]
    if low:
        which = "all rows" if len(low) == len(results_by_row) else ", ".join(low)
        notes.append(f"Trained in bfloat16 and evaluated in float32: {which}.")
    return " ".join(notes)


def page(results_by_row: dict[str, list[dict]]) -> str:
    """The tables and what they were measured on."""
    hardware = sorted(
        {result["hardware"] for results in results_by_row.values() for result in results}
    )
    parts = [
        f"{_setting(results_by_row)}; evaluated on {'; '.join(hardware)}. {_notes(results_by_row)}",
        table_1(results_by_row),
        table_2(results_by_row),
        mistakes_table(results_by_row),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(results_by_row: dict[str, list[dict]]) -> str:
    """The one table of the README."""
    return _introduced(summary_table(results_by_row), results_by_row)


def commands(results_by_row: dict[str, list[dict]]) -> str:
    """The table of experiments/README.md."""
    return _introduced(commands_table(results_by_row), results_by_row)


def _introduced(table: str, results_by_row: dict[str, list[dict]]) -> str:
    return f"{_setting(results_by_row)}. {_notes(results_by_row)}\n\n{table}"


def write_into(path: str, texts: dict[str, str]) -> list[str]:
    """Replace what is between the MARKERS of a file.

    Args:
        texts: by the names of the markers; a file has some of these.

    Returns:
        The names that it has.

    Raises:
        ValueError: it has none, or is not there.
    """
    try:
        with open(path, encoding="utf-8") as file:
            page = file.read()
    except FileNotFoundError:
        raise ValueError(f"there is no page {path} to write into") from None
    written = []
    for name, text in texts.items():
        first, last = MARKERS[name]
        before, begin, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if end:
            page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
            written.append(name)
    if not written:
        pairs = " or ".join(" and ".join(MARKERS[name]) for name in texts)
        raise ValueError(f"{path} lacks the lines {pairs}: put them in")
    with utils.atomic_write(path) as file:
        file.write(page)
    return written


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    results_by_row = find_results(flags.folder)
    texts = {
        "results": page(results_by_row),
        "summary": summary(results_by_row),
        "commands": commands(results_by_row),
    }
    print(texts["results"])
    if flags.write:
        written = write_into(flags.write, texts)
        print(f"\nwritten into {flags.write}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
