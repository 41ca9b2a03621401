"""Copy finished rows into results/, and two networks into pretrained/, to be committed.

    python -m experiments.publish runs/cpu/table
    python -m experiments.publish runs/cpu-k2/table --results results/trend/k2

The second form is for rows of another width than that of results/: their networks stay, but for
the tree, the smaller one, where --pretrained names a folder. Both networks are of one seed,
--pretrained_seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import restore
import rundir
import utils
from experiments.rows import RESULTS, check_alike, collect, find_results, is_published, is_tree
from utils import tf

PRETRAINED, PRETRAINED_ROWS = "pretrained", ("baseline", "deep_2-2-2")
METRICS_LINES = 500  # of a published metrics.jsonl
CUT = ("eval_val", "eval_mask_val")  # of a grouped network: before and right after the cut
PICTURES = ("sharpness.png", "superclasses.png")  # of the report, where it was made


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """One folder; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__, needed=("folder",))
    parser.usage = "%(prog)s FOLDER --FLAG VALUE ..."
    add = parser.add_argument
    add("folder", nargs="?", type=utils.path, help="what experiments/run.sh filled")
    add("--results", type=utils.path, default=RESULTS, help=f"where to (default: {RESULTS})")
    add("--pretrained", type=utils.path, default="",
        help=f"where networks go (default: {PRETRAINED}, if rows go to {RESULTS})")  # fmt: skip
    add("--pretrained_seed", type=utils.number(int, low=0), default=0,
        help="whose networks go there (default: 0)")  # fmt: skip
    flags = parser.parse_args(argv)
    if not flags.pretrained and os.path.abspath(flags.results) == os.path.abspath(RESULTS):
        flags.pretrained = PRETRAINED
    flags.pretrained = flags.pretrained and os.path.normpath(flags.pretrained)
    return flags


def publish(
    folder: str,
    results_by_row: dict[str, list[dict]],
    to: str = RESULTS,
    pretrained: str = PRETRAINED,
    pretrained_seed: int = 0,
) -> list[str]:
    """Copy each row's result, flags, thinned metrics, groups and pictures into `to`.

    The baseline that given groups cut is copied as a part of their row. The weights of
    PRETRAINED_ROWS of one seed, without the optimizer's state, go to `pretrained` ('': nowhere),
    where this is not PRETRAINED those of trees only. Returns the folders that it wrote.

    Raises:
        ValueError: they are published already, or `to` holds those of another preset, network
            or data set, or seeds of another recipe.
    """
    first = next(iter(results_by_row.values()))[0]
    if is_published(first):
        raise ValueError(
            f"{folder} is published already: name the folder that experiments/run.sh filled"
        )
    new = {(row, result["seed"]) for row, results in results_by_row.items() for result in results}
    both = {
        row: [result for result in results if (row, result["seed"]) not in new]
        for row, results in collect(to).items()
    }
    for row, results in results_by_row.items():
        both[row] = both.get(row, []) + results
    check_alike(both, f"{to} with {folder}")
    whole = os.path.abspath(pretrained) == os.path.abspath(PRETRAINED)
    networks = PRETRAINED_ROWS if whole else filter(is_tree, PRETRAINED_ROWS)
    networks = {row: os.path.join(pretrained, row) for row in networks if pretrained}
    for row, results in results_by_row.items():
        for result in results:
            _check_parts(row, result)
    folders = []
    for row, results in results_by_row.items():
        for result in results:
            run, seed = _run_of(result), result["seed"]
            target = os.path.join(to, row, *([f"seed{seed}"] if seed else []))
            # Without result.json a row is not there: it goes first and comes last.
            same = _take_back(target, result["group_classes"])
            _publish_run(run, target, folder)
            _publish_pictures(run, target, same)
            if is_tree(row):
                _publish_base(run, target, folder)
            if row in networks and seed == pretrained_seed:
                checkpoint = os.path.join(run, os.path.basename(result["checkpoint"]))
                with utils.replacing(networks[row]) as part:
                    export_weights(checkpoint, part)
                folders.append(networks[row])
            published = _without_machine({k: v for k, v in result.items() if k != "path"}, folder)
            utils.write_json(os.path.join(target, "result.json"), published)
            folders.append(target)
    return folders


def export_weights(checkpoint: str, folder: str) -> str:
    """Copy a checkpoint into a folder without the optimizer's state; returns the copy's path.

    The copy is half as large: enough to evaluate, to cut and to start a run from (--basemodel).
    """
    tensors = rundir.read_checkpoint(checkpoint)
    net, _ = restore.load_network(checkpoint, tensors)
    copy = tf.train.Checkpoint(
        net=net,
        step=tf.Variable(tensors["step"]),
        description=tf.Variable(tensors["description"], trainable=False),
    )
    os.makedirs(folder, exist_ok=True)
    return copy.write(os.path.join(folder, os.path.basename(checkpoint)))


def _run_of(result: dict) -> str:
    return os.path.dirname(os.path.dirname(result["path"]))  # without eval/result.json


def _base_of(run: str) -> str:
    """What a tree was cut from: its own grouped network, or a baseline that rows share."""
    group = os.path.join(os.path.dirname(run), "group")
    if os.path.isdir(group):
        return group
    base = utils.read_json(os.path.join(run, "config.json"))["flags"]["basemodel"]
    row = os.path.dirname(run)
    return os.path.join(os.path.dirname(row), "shared", os.path.basename(base))


def _check_parts(row: str, result: dict) -> None:
    """Raise ValueError unless all that is published of a row is there."""
    run = _run_of(result)
    base = _base_of(run) if is_tree(row) else run
    needed = [os.path.join(folder, "config.json") for folder in (run, base)]
    if os.path.basename(base) == "group":
        needed += [os.path.join(base, name, "result.json") for name in CUT]
    missing = [path for path in needed if not os.path.exists(path)]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing: run the same command of experiments/run.sh again, which "
            f"makes what {row} lacks"
        )


def _publish_base(run: str, target: str, folder: str) -> None:
    """What a tree was cut from, and what the cut costs."""
    base = _base_of(run)
    to = os.path.join(target, os.path.basename(base))
    _publish_run(base, to, folder)
    for name in CUT if os.path.basename(base) == "group" else ():
        cut = utils.read_json(os.path.join(base, name, "result.json"))
        utils.write_json(os.path.join(to, f"{name}.json"), _without_machine(cut, folder))


def _take_back(target: str, group_classes: list) -> bool:
    """Remove a published result; whether it was of the same groups."""
    before = os.path.join(target, "result.json")
    if not os.path.exists(before):
        return False
    same = utils.read_json(before)["group_classes"] == group_classes
    os.remove(before)
    return same


def _publish_pictures(run: str, target: str, same: bool) -> None:
    """Copy a report's pictures; what is published of other groups, not the `same`, goes."""
    for name in PICTURES:
        picture = os.path.join(os.path.dirname(run), "report", name)
        published = os.path.join(target, name)
        made = os.path.getmtime(picture) if os.path.exists(picture) else 0
        if made >= os.path.getmtime(os.path.join(run, "config.json")):
            shutil.copy(picture, published)
            continue
        if made:
            print(f"{picture} is older than its run, so it stays here: make the report again")
        if os.path.exists(published) and not same:
            os.remove(published)


def _publish_run(run: str, target: str, folder: str) -> None:
    os.makedirs(target, exist_ok=True)
    config = utils.read_json(os.path.join(run, "config.json"))
    config["flags"] = _without_machine(config["flags"], folder)
    utils.write_json(os.path.join(target, "config.json"), config)
    lines = thin(rundir.read_metrics(run))
    with utils.atomic_write(os.path.join(target, "metrics.jsonl")) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _without_machine(values: dict, folder: str) -> dict:
    """Paths relative to the folder that is published, where they lie in it, else their last part:
    the rest is of no use elsewhere."""

    def shorten(path: str) -> str:
        relative = os.path.relpath(path, folder)
        return os.path.basename(path) if relative.startswith(os.pardir) else relative

    paths = ("train_dir", "data_dir", "basemodel", "checkpoint", "groups")
    return {k: shorten(v) if k in paths and v else v for k, v in values.items()}


def thin(records: list[dict]) -> list[dict]:
    """At most METRICS_LINES records: validations and groups before lines of progress."""
    progress = [i for i, record in enumerate(records) if "loss" in record]
    kept = [i for i, record in enumerate(records) if "loss" not in record][-METRICS_LINES:]
    room = METRICS_LINES - len(kept)
    every = max(-(-len(progress) // room), 1) if room else len(progress) + 1
    return [records[i] for i in sorted(kept + progress[every - 1 :: every])]


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    to = (flags.results, flags.pretrained, flags.pretrained_seed)
    folders = publish(flags.folder, find_results(flags.folder), *to)
    print("published: " + ", ".join(folders))
    if flags.pretrained and flags.pretrained not in map(os.path.dirname, folders):
        rows = " or ".join(PRETRAINED_ROWS)
        print(
            f"{flags.pretrained}/ stays as it is: there was no {rows} of seed "
            f"{flags.pretrained_seed}"
        )
    return 0


if __name__ == "__main__":
    utils.run_main(main)
