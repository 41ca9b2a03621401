"""The rows of the paper's tables, and the results of those that there are."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

import networks
import train
import utils

RESULTS = "results"
VARIANTS = ("S", "C", "R")
# What seeds of a row have in common, of the flags of their last stage.
RECIPE = ("batch_size", "initial_lr", "lr_schedule", "lr_decay", "lr_step_epoch", "final_lr",
          "lr_warmup_epochs", "lr_total_steps", "lr_first_step", "momentum", "nesterov",
          "l2_weight", "label_smoothing", "dropout_keep_prob", "bn_no_scale", "equal_groups",
          "precision")  # fmt: skip
# And of the flags of the grouping that a learned tree was cut from.
GROUPING = (*RECIPE, "max_steps", "gamma1", "gamma2", "gamma2_step_epoch", "gamma2_growth",
            "gamma3", "weighted_group_loss", "group_lr_scale", "group_start_epoch",
            "group_equal_growth")  # fmt: skip
# A run that is older than a flag did what the flag's default does.
DEFAULTS = vars(train.parse_flags(["--stage=baseline", "--train_dir=."]))
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
# Tables 3 and 4, on ILSVRC 2012, in the same form.
OTHER_TABLES = {
    "alexnet": [
        ("AlexNet", "alexnet", None, None, None, 41.72),
        ("1-1-3", "alexnet_1-1-3", None, None, 42.20, 42.07),
        ("1-2-5", "alexnet_1-2-5", None, None, 43.20, 42.21),
        ("2-4-8", "alexnet_2-4-8", None, None, 43.35, 43.02),
        ("2x5", "alexnet_2x5", None, None, 44.99, 44.60),
    ],
    "resnet18": [
        ("ResNet-18xk", "resnet18", None, None, None, 25.58),
        ("1-1-3", "resnet18_1-1-3", None, None, 25.86, 24.90),
        ("1-2-2", "resnet18_1-2-2", None, None, 26.41, 25.48),
        ("2-2-2", "resnet18_2-2-2", None, None, 28.61, 26.45),
    ],
}
# The paper's Table 2: % of weights and of FLOPs saved.
TABLE_2 = {
    "fc_1-1-4": (0.35, 0), "shallow_1-2-2": (32.54, 14.63),
    "deep_2-2-2": (46.39, 31.97), "hier_2-4-4": (62.58, 39.29),
}  # fmt: skip


def is_tree(row: str) -> bool:
    return row not in ("baseline", "baseline_dropout", "narrow", *OTHER_TABLES)


def network_of(row: str) -> str:
    """Name of a row's network in `networks.NETWORKS`."""
    name = row.partition("_")[0]
    return name if name in OTHER_TABLES else "wrn"


def table_of(rows: Iterable[str]) -> list[tuple]:
    """The paper's table, as TABLE_1, of some rows, which are of one network. Its first line is of
    the network that is not split."""
    return OTHER_TABLES.get(network_of(next(iter(rows))), TABLE_1)


ROWS = [
    row + kind
    for table in (TABLE_1, *OTHER_TABLES.values())
    for _, row, *_ in table
    for kind in ("", *(f"-{v}" for v in VARIANTS if is_tree(row)))
]


def find_results(folder: str) -> dict[str, list[dict]]:
    """Test results by row, one for each seed; each has its file's name in `path`.

    Args:
        folder: what experiments/run.sh filled (`[seedN/]ROW/eval` or `[seedN/]ROW/split/eval`),
            or what `publish` did (`ROW/` or `ROW/seedN/`).

    Raises:
        ValueError: there are none, or they do not belong into one table.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder}: make rows with experiments/run.sh")
    results_by_row = collect(folder)
    if not results_by_row:
        raise ValueError(f"no result of a row in {folder}: make one with experiments/run.sh")
    for row, results in results_by_row.items():
        for result in results:
            _check_complete(result)
        seeds = [result["seed"] for result in results]
        for seed in set(seeds):
            if seeds.count(seed) > 1:
                raise ValueError(f"{folder} has two results of {row}, seed {seed}: remove one")
    check_alike(results_by_row, folder)
    return results_by_row


def collect(folder: str) -> dict[str, list[dict]]:
    results_by_row = {}
    for row in ROWS:
        run = f"{row}/split" if is_tree(row) else row
        for place in (f"{run}/eval", f"seed*/{run}/eval", row, f"{row}/seed*"):
            pattern = os.path.join(glob.escape(folder), place, "result.json")
            for path in sorted(glob.glob(pattern)):
                result = utils.read_json(path)
                if result.get("split") == "test":
                    results_by_row.setdefault(row, []).append(result | {"path": path})
    return results_by_row


def is_published(result: dict) -> bool:
    """Whether it lies beside its run's config.json, as `publish` puts it."""
    return os.path.basename(os.path.dirname(result["path"])) != "eval"


def _config_file(result: dict, grouping: bool = False) -> str:
    run, group = ("", "group") if is_published(result) else ("..", "../../group")
    folder = os.path.join(os.path.dirname(result["path"]), group if grouping else run)
    return os.path.join(folder, "config.json")


def flags_of(result: dict, grouping: bool = False) -> dict:
    """Flags of a result's run, or of the grouping that its tree was cut from ({} if none was)."""
    config = _config_file(result, grouping)
    if grouping and not os.path.exists(config):
        return {}
    return DEFAULTS | utils.read_json(config)["flags"]


def config_of(row: str, result: dict) -> networks.Config:
    """What defines the network of a result."""
    # Results that are older than other data sets lack these, which are CIFAR-100's by default.
    settings = {name: result[name] for name in ("num_classes", "image_size") if name in result}
    settings["groups"] = tuple(map(int, result["groups"].split("-")))
    network = network_of(row)
    if network == "wrn":
        _, depth, k = result["network"].split("-")
        settings |= {"num_residual_units": (int(depth) - 4) // 6, "k": float(k)}
    else:
        settings["k"] = utils.read_json(_config_file(result))["network"]["k"]
    return networks.config_class(network)(**settings)


def _check_complete(result: dict) -> None:
    """Raise ValueError unless a result is of the last step of its run, in float32."""
    steps = flags_of(result)["max_steps"]
    if result["step"] != steps or result["precision"] != "float32":
        raise ValueError(
            f"{result['path']} is of step {result['step']} of {steps} in {result['precision']}: "
            "run eval.py on the run again when it is complete, in float32"
        )


def check_alike(results_by_row: dict[str, list[dict]], where: str) -> None:
    """Raise ValueError where results differ in what one table has in common.

    That is the data set and the preset of all, the network but that of `narrow`, the number of
    steps of all networks that are not split, and of all trees, and the recipe of a row's seeds.
    """
    rows = list(results_by_row)
    for name, alike in [
        ("dataset", rows),
        ("preset", rows),
        ("network", [row for row in rows if row != "narrow"]),
        ("network", ["narrow"]),
        ("step", [row for row in rows if not is_tree(row)]),
        ("step", [row for row in rows if is_tree(row)]),
    ]:
        check_same(name, [result for row in alike for result in results_by_row.get(row, [])], where)
    for row, results in results_by_row.items():
        for grouping, names in [(False, RECIPE), (True, GROUPING)]:
            flags = [flags_of(result, grouping) for result in results]
            for name in names:
                values = [{name: of.get(name)} for of in flags]
                check_same(name, values, f"{where}, row {row}{', grouping' if grouping else ''},")


def check_same(name: str, results: list[dict], where: str) -> None:
    """Raise ValueError where results differ in `name`."""
    values = {str(result[name]) for result in results}
    if len(values) > 1:
        raise ValueError(
            f"{where} mixes {name}s ({', '.join(sorted(values))}): name a folder of one's"
        )
