"""The paper's CIFAR-100 tables from result.json files: our numbers beside the paper's.

    python table.py runs/cpu/table              rows that table.sh has made so far
    python table.py --publish runs/cpu/table    copy them into results/, two networks to pretrained/
    python table.py --write README.md           results/ into the README, between its markers

Errors are of the 10,000 test images, at the end of the last stage: nothing is picked.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import utils  # isort: skip, it quiets TensorFlow's start
import numpy as np

import class_groups
import evaluation
import resnet

RESULTS = "results"
PRETRAINED, PRETRAINED_ROWS = "pretrained", ("baseline", "deep_2-2-2")  # of seed 0
MARKERS = ("<!-- results: written by table.py -->", "<!-- end of results -->")
METRICS_LINES = 500  # of a published metrics.jsonl
PICTURES = ("sharpness.png", "superclasses.png")  # of report.py, where it was run
VARIANTS = ("S", "C", "R")
# Test error, %: (title, row, paper's with semantic, clustering, random and learned groups).
TABLE_1 = [
    ("WRN-16-k", "baseline", None, None, None, 24.28),
    ("WRN-16-k, dropout", "baseline_dropout", None, None, None, 24.52),
    ("narrower WRN, not split", "narrow", None, None, None, None),
    ("FC split (1-1-4)", "fc_1-1-4", 23.80, 23.72, 24.30, 24.26),
    ("Shallow (1-2-2)", "shallow_1-2-2", 24.46, 24.54, 25.46, 23.96),
    ("Deep (2-2-2)", "deep_2-2-2", 25.04, 26.04, 27.12, 24.62),
    ("Hierarchical (2-4-4)", "hier_2-4-4", 24.92, 25.98, 26.78, 24.80),
    ("Deep, three ways (3-3-3)", "deep_3-3-3", None, None, None, None),
]
# The paper's Table 2: % of weights and of FLOPs saved.
TABLE_2 = {
    "fc_1-1-4": (0.35, 0), "shallow_1-2-2": (32.54, 14.63),
    "deep_2-2-2": (46.39, 31.97), "hier_2-4-4": (62.58, 39.29),
}  # fmt: skip
ROWS = [row + kind for _, row, *paper in TABLE_1 for kind in ("", *(f"-{v}" for v in VARIANTS))]


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags and one folder; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    parser.usage = "%(prog)s FOLDER --FLAG VALUE ..."
    add = parser.add_argument
    add("folder", nargs="?", type=utils.path, default=RESULTS, help=f"default: {RESULTS}")
    add("--publish", action="store_true", help=f"copy its rows into {RESULTS}/")
    add("--write", metavar="FILE", type=utils.path, default="", help="put the table into a file")
    flags = parser.parse_args(argv)
    if not os.path.isdir(flags.folder):
        raise ValueError(f"there is no folder {flags.folder}: make rows with table.sh")
    return flags


# ---------------------------------------------------------------- what there is


def find_results(folder: str) -> dict[str, list[dict]]:
    """Test results by row, one for each seed; each has its file's name in `path`.

    Args:
        folder: what table.sh filled (`[seedN/]ROW/eval` or `[seedN/]ROW/split/eval`), or what
            `publish` did (`ROW/` or `ROW/seedN/`).

    Raises:
        ValueError: there are none, or they do not belong into one table.
    """
    found = _collect(folder)
    if not found:
        raise ValueError(f"no result of a row in {folder}: make one with table.sh")
    for row, of_row in found.items():
        for result in of_row:
            _check_complete(result)
        seeds = [result["seed"] for result in of_row]
        for seed in set(seeds):
            if seeds.count(seed) > 1:
                raise ValueError(f"{folder} has two results of {row}, seed {seed}: remove one")
    _check_alike(found, folder)
    return found


def _collect(folder: str) -> dict[str, list[dict]]:
    found = {}
    for row in ROWS:
        run = f"{row}/split" if _is_tree(row) else row
        for place in (f"{run}/eval", f"seed*/{run}/eval", row, f"{row}/seed*"):
            pattern = os.path.join(glob.escape(folder), place, "result.json")
            for path in sorted(glob.glob(pattern)):
                result = utils.read_json(path)
                if result.get("split") == "test":
                    found.setdefault(row, []).append(result | {"path": path})
    return found


def _is_tree(row: str) -> bool:
    return row not in ("baseline", "baseline_dropout", "narrow")


def _is_published(result: dict) -> bool:
    """Whether it lies beside its run's config.json, as `publish` puts it."""
    return os.path.basename(os.path.dirname(result["path"])) != "eval"


def _check_complete(result: dict) -> None:
    """Raise ValueError unless a result is of its run's last step, in float32."""
    run = os.path.dirname(result["path"])
    config = os.path.join(run if _is_published(result) else os.path.dirname(run), "config.json")
    steps = utils.read_json(config)["flags"]["max_steps"]
    if result["step"] != steps or result["precision"] != "float32":
        raise ValueError(
            f"{result['path']} is of step {result['step']} of {steps} in {result['precision']}: "
            "run eval.py on the run again when it is complete, in float32"
        )


def _check_alike(found: dict[str, list[dict]], where: str) -> None:
    """Raise ValueError where results differ in what one table has in common."""
    for name in ("dataset", "preset", "network"):
        rows = [row for row in found if name != "network" or row != "narrow"]
        values = {str(result[name]) for row in rows for result in found[row]}
        if len(values) > 1:
            raise ValueError(
                f"{where} mixes {name}s ({', '.join(sorted(values))}): name a folder of one's"
            )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard error where there are several."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


# ---------------------------------------------------------------- tables


def _percent(results: list[dict] | None, paper: float | None) -> str:
    """Our error beside the paper's, which is in brackets."""
    words = []
    if results:
        mean, error = mean_and_error([100 * result["error"] for result in results])
        words.append(f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
    if paper is not None:
        words.append(f"({paper:.2f})")
    return " ".join(words)


def table_1(found: dict[str, list[dict]]) -> str:
    """Test errors, by who made the groups."""
    lines = [["test error, % (paper)", "S: semantic", "C: clustering", "R: random", "learned"]]
    for title, row, *paper in TABLE_1:
        names = [*(f"{row}-{variant}" for variant in VARIANTS), row]
        cells = [_percent(found.get(n), p) for n, p in zip(names, paper, strict=True)]
        if any(cells):
            lines.append([title, *cells])
    return utils.markdown_table(lines)


def table_2(found: dict[str, list[dict]]) -> str:
    """What each network that we have costs, counted from the actual one."""
    saved = "saved (paper; equal groups)"
    head = ["network", "weights", saved, "FLOPs", saved, "error, %", "seeds", "pairs (chance)"]
    lines = [head]
    whole = found.get("baseline", [None])[0]
    for row in (name for name in ROWS if name in found):
        results = found[row]
        first = results[0]
        cells = [row]
        equal = _equal_counts(first)
        for i, name in enumerate(("weights", "flops")):
            count = statistics.mean(result[name] for result in results)
            cells.append(f"{count / 1e6:.3f} M" if name == "weights" else f"{count / 1e9:.3f} G")
            share = f"{100 * (1 - count / whole[name]):.1f} %" if whole else ""
            if whole and equal:
                paper = f"{TABLE_2[row][i]:.2f} %" if row in TABLE_2 else "–"
                share += f" ({paper}; {100 * (1 - equal[i] / whole[name]):.1f} %)"
            cells.append(share)
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


def mistakes_table(found: dict[str, list[dict]]) -> str:
    """Where trees go wrong: within a group, which one branch decides, or between groups.

    In % of the test images, beside the baseline's (in brackets) by the same groups; each the mean
    over its seeds. Empty without a tree and a baseline.
    """
    lines = [["mistakes, % (baseline's)", "within a group", "between groups"]]
    trees = [row for row in ROWS if row in found and _is_tree(row)]
    if not trees or "baseline" not in found:
        return ""
    for row in trees:
        groups = [tree["group_classes"] for tree in found[row]]
        ours = [_mistakes(*pair) for pair in zip(found[row], groups, strict=True)]
        baselines = [_mistakes(whole, of) for whole in found["baseline"] for of in groups]
        means = zip(np.mean(ours, axis=0), np.mean(baselines, axis=0), strict=True)
        lines.append([row, *(f"{share:.2f} ({base:.2f})" for share, base in means)])
    return utils.markdown_table(lines)


def _mistakes(result: dict, groups: Sequence[Sequence[int]]) -> list[float]:
    """% of the images that are mistaken within the groups and between them."""
    counts = class_groups.mistakes(np.array(result["confusion_matrix"]), groups)
    return [100 * count / result["num_examples"] for count in counts]


def _equal_counts(result: dict) -> tuple[int, int] | None:
    """Weights and FLOPs of equal groups for a tree's result."""
    groups = tuple(map(int, result["groups"].split("-")))
    if max(groups) == 1:
        return None
    _, depth, k = result["network"].split("-")
    config = resnet.NetworkConfig((int(depth) - 4) // 6, float(k), groups=groups)
    return resnet.count(resnet.equal_tree(config))


def page(found: dict[str, list[dict]]) -> str:
    """The tables and what they were measured on."""
    first = next(found[row] for row in sorted(found, key=lambda row: row == "narrow"))[0]
    hardware = sorted({result["hardware"] for of_row in found.values() for result in of_row})
    note = "" if first["dataset"] == "cifar100" else f" **on the {first['dataset']} data set**"
    parts = [
        f"{first['network']}, preset `{first['preset']}`{note}, {first['num_examples']:,} test "
        f"images; evaluated on {'; '.join(hardware)}. The paper's numbers are of WRN-16-8.",
        table_1(found),
        table_2(found),
        mistakes_table(found),
    ]
    return "\n\n".join(part for part in parts if part)


# ---------------------------------------------------------------- results/ and the README


def publish(folder: str, found: dict[str, list[dict]]) -> list[str]:
    """Copy each row's result, flags, thinned metrics, groups and pictures into RESULTS.

    The baseline that given groups cut is copied as a part of their row. The weights of
    PRETRAINED_ROWS, without the optimizer's state, go to PRETRAINED. Returns the folders that it
    wrote.

    Raises:
        ValueError: they are published already, or RESULTS holds those of another preset, network
            or data set.
    """
    first = next(iter(found.values()))[0]
    if _is_published(first):
        raise ValueError(f"{folder} is published already: name the folder that table.sh filled")
    there = _collect(RESULTS)
    both = {row: there.get(row, []) + found.get(row, []) for row in {*there, *found}}
    _check_alike(both, f"{RESULTS} with {folder}")
    folders = []
    for row, of_row in found.items():
        for result in of_row:
            path, seed = result.pop("path"), result["seed"]
            target = os.path.join(RESULTS, row, *([f"seed{seed}"] if seed else []))
            run = os.path.dirname(os.path.dirname(path))  # without eval/result.json
            _publish_run(run, target, folder)
            utils.write_json(os.path.join(target, "result.json"), _without_machine(result, folder))
            if _is_tree(row):
                _publish_base(run, target, folder)
            for name in PICTURES:
                picture = os.path.join(os.path.dirname(run), "report", name)
                published = os.path.join(target, name)
                made = os.path.getmtime(picture) if os.path.exists(picture) else 0
                if made >= os.path.getmtime(os.path.join(run, "config.json")):
                    shutil.copy(picture, published)
                elif os.path.exists(published):  # of other groups
                    os.remove(published)
            folders.append(target)
            if row in PRETRAINED_ROWS and seed == 0:
                weights = os.path.join(PRETRAINED, row)
                checkpoint = os.path.join(run, os.path.basename(result["checkpoint"]))
                shutil.rmtree(f"{weights}.new", ignore_errors=True)
                evaluation.export_weights(checkpoint, f"{weights}.new")
                shutil.rmtree(weights, ignore_errors=True)
                os.rename(f"{weights}.new", weights)
                folders.append(weights)
    return folders


def _publish_base(run: str, target: str, folder: str) -> None:
    """What a tree was cut from: the grouped network with what the cut costs, or a baseline."""
    group = os.path.join(os.path.dirname(run), "group")
    if not os.path.isdir(group):
        base = os.path.basename(
            utils.read_json(os.path.join(run, "config.json"))["flags"]["basemodel"]
        )
        shared = os.path.join(os.path.dirname(os.path.dirname(run)), "shared", base)
        return _publish_run(shared, os.path.join(target, base), folder)
    _publish_run(group, os.path.join(target, "group"), folder)
    for name in ("eval_val", "eval_mask_val"):
        cut = utils.read_json(os.path.join(group, name, "result.json"))
        utils.write_json(
            os.path.join(target, "group", f"{name}.json"), _without_machine(cut, folder)
        )


def _publish_run(run: str, target: str, folder: str) -> None:
    os.makedirs(target, exist_ok=True)
    config = utils.read_json(os.path.join(run, "config.json"))
    config["flags"] = _without_machine(config["flags"], folder)
    utils.write_json(os.path.join(target, "config.json"), config)
    lines = thin(utils.read_metrics(run))
    with utils.atomic_write(os.path.join(target, "metrics.jsonl")) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _without_machine(values: dict, folder: str) -> dict:
    """Paths relative to the folder that is published, where they lie in it, else their last part:
    the rest is of no use elsewhere."""

    def shorten(path: str) -> str:
        relative = os.path.relpath(path, folder)
        return os.path.basename(path) if relative.startswith(os.pardir) else relative

    paths = ("train_dir", "data_dir", "basemodel", "checkpoint")
    return {k: shorten(v) if k in paths and v else v for k, v in values.items()}


def thin(records: list[dict]) -> list[dict]:
    """At most METRICS_LINES records: validations and groups before lines of progress."""
    progress = [i for i, record in enumerate(records) if "loss" in record]
    kept = [i for i, record in enumerate(records) if "loss" not in record][-METRICS_LINES:]
    room = METRICS_LINES - len(kept)
    every = max(-(-len(progress) // room), 1) if room else len(progress) + 1
    return [records[i] for i in sorted(kept + progress[every - 1 :: every])]


def write_into(path: str, text: str) -> None:
    """Replace what is between the MARKERS of a file.

    Raises:
        ValueError: it does not have them.
    """
    with open(path, encoding="utf-8") as file:
        before, begin, rest = file.read().partition(MARKERS[0])
        _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise ValueError(f"{path} lacks the lines {' and '.join(MARKERS)}: put them in")
    with utils.atomic_write(path) as file:
        file.write(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    found = find_results(flags.folder)
    text = page(found)
    print(text)
    if flags.publish:
        print("\npublished: " + ", ".join(publish(flags.folder, found)))
    if flags.write:
        write_into(flags.write, text)
        print(f"\nwritten into {flags.write}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
