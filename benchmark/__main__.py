"""Speed: the paper's parallel-inference table, the training step, the input pipeline, peers.

Everything is measured as a ratio: the two sides take turns, each in a process of its own, and
medians are given. No training and no data are needed: weights, images and groups are made up.

    parallel   inference of the dense network and of trees on one and several devices (Table 5)
    training   a step of each stage
    pipeline   augmented images a second, and how long a training step waits for them; pictures in
               files beside tf.keras.utils.image_dataset_from_directory
    engines    inference of exported networks by the engines of other makers that are installed;
               only where --only names it

`--network` takes the paper's other networks through the first two parts.

Without GPUs the devices are logical CPU devices of one core each: one thread an operation, and as
many operations at once as there are devices.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import networks
import resnet
import restore
import rundir
import utils
from benchmark import cases, engines, frameworks
from benchmark.timing import TimedProcess, compare
from formats import files
from utils import tf

PARTS = ("parallel", "training", "pipeline", "engines")
OTHER_PARTS = PARTS[:2]  # of other networks than the Wide ResNet
# The paper's Table 5: (row, groups, devices, placement, the paper's speed-up if it has one). The
# first is what the others are compared with; "dense" has no groups.
ROWS = [
    ("Baseline", "dense", 1, "single", 1.0),
    ("Baseline, horizontal", "dense", 2, "horizontal", 0.52),
    ("Baseline, vertical", "dense", 2, "vertical", 1.2),
    ("Baseline, vertical", "dense", 3, "vertical", 1.08),
    ("Shallow", "1-2-2", 1, "single", None),
    ("Shallow", "1-2-2", 2, "branch", 1.37),
    ("Shallow", "1-2-2", 2, "hybrid", None),
    ("Deep", "2-2-2", 1, "single", None),
    ("Deep", "2-2-2", 2, "branch", 1.73),
    ("Deep", "2-2-2", 2, "hybrid", None),
    ("Hierarchical", "2-4-4", 1, "single", None),
    ("Hierarchical", "2-4-4", 2, "branch", 1.71),
    ("Hierarchical", "2-4-4", 2, "hybrid", None),
    ("Deep, three ways", "3-3-3", 1, "single", None),
    ("Deep, three ways", "3-3-3", 3, "branch", 2.22),
    ("Deep, three ways", "3-3-3", 3, "hybrid", None),
]
# Splits of Tables 3 and 4, whose times the paper does not give.
OTHER_SPLITS = {"resnet18": ("1-2-2", "2-2-2"), "alexnet": ("1-1-2-4-8", "2-2-2-2-2")}
OTHER_ROWS = {
    network: [("Baseline", "dense", 1, "single", 1.0)]
    + [
        ("Tree", groups, number, how, None)
        for groups in splits
        for number, how in ((1, "single"), (2, "branch"), (2, "hybrid"))
    ]
    for network, splits in OTHER_SPLITS.items()
}
# (stage, dropout_keep_prob): the first is what the others are compared with.
STEPS = [("baseline", 1.0), ("group", 1.0), ("group", 0.5), ("split", 1.0), ("uneven split", 1.0)]
# Networks whose exports are timed: groups, and the branch if it is one alone.
EXPORTED = [("dense", None), ("2-2-2", None), ("2-4-4", None), ("2-2-2", 0)]
BATCHES = [(100, 1), (1, 20)]  # images, and how many times in a step
FILES_SIZE, FILES_BATCH, FILES_BATCHES = 224, 32, 10  # of pictures in files; batches in a step
READY = 10  # batches at most that the pipeline holds ready when the first step is compiled


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of a benchmark; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    add, count = parser.add_argument, utils.number(int, low=1)
    add(
        "--only",
        type=utils.names,
        default=[],
        help=f"one or some of {','.join(PARTS)} (default: all but engines; with --peer none)",
    )
    add("--devices", type=utils.names, default=[],
        help="of part parallel (default: the GPUs, else logical CPUs)")  # fmt: skip
    add("--network", default="wrn",
        help=f"one of {', '.join(networks.NETWORKS)} (default: wrn; others: parts parallel and "
        "training, and --peer keras)")  # fmt: skip
    add("--k", type=utils.factor, help="widening factor (default: the paper's)")
    add("--image_size", type=count, help="side of the images (default: the network's, 32 or 224)")
    add(
        "--batch_size",
        type=count,
        help="images (default: 100 in part parallel, else 90; part engines: always 100 and 1)",
    )
    add("--repeats", type=count, default=5, help="timed turns of each (default: 5)")
    add(
        "--precision",
        type=utils.names,
        default="float32",
        help="float32 or bfloat16, or both, with a comma (part pipeline: the first; part engines: "
        "float32)",
    )
    add("--peer", type=utils.names, default=[],
        help="also compare the step of stage baseline with keras,torch")  # fmt: skip
    add(
        "--checkpoint",
        type=utils.path,
        default="",
        help="also place this tree, with the groups that it learned",
    )
    add(
        "--output_file",
        type=utils.path,
        default="",
        help="default: benchmark.json; of --peer alone, peers.json",
    )
    flags = parser.parse_args(argv)
    for name, known in [
        ("only", PARTS),
        ("precision", utils.PRECISIONS),
        ("peer", frameworks.STEPS),
    ]:
        given = getattr(flags, name)
        if set(given) - set(known) or (name == "precision" and not given):
            parser.error(f"--{name} takes {', '.join(known)}, got {','.join(given)!r}")
    if flags.network not in networks.NETWORKS:
        known = ", ".join(networks.NETWORKS)
        parser.error(f"--network takes one of {known}, got {flags.network!r}")
    parts = PARTS[:3] if flags.network == "wrn" else OTHER_PARTS
    if not flags.only:
        flags.only = [] if flags.peer else parts
    if flags.network != "wrn" and (set(flags.only) - set(parts) or "torch" in flags.peer):
        parser.error(
            f"--network {flags.network} is for parts {' and '.join(parts)}, and --peer keras: "
            "leave the rest out"
        )
    if flags.image_size and flags.network == "wrn":
        parser.error("--image_size is for --network resnet18 and alexnet: leave it out")
    flags.output_file = flags.output_file or ("benchmark.json" if flags.only else "peers.json")
    for name in ("devices", "checkpoint"):
        if getattr(flags, name) and "parallel" not in flags.only:
            parser.error(f"--{name} has no effect without part parallel: add --only parallel")
    if flags.only == ["engines"] and not flags.peer:
        for name, default in (("batch_size", None), ("precision", ["float32"])):
            if getattr(flags, name) != default:
                parser.error(f"--{name} has no effect in part engines: leave it out")
    if "torch" in flags.peer and not utils.is_installed("torch"):
        parser.error("--peer torch needs PyTorch: pip install torch")
    _set_network(parser, flags)
    return flags


def _set_network(parser: utils.FlagParser, flags: argparse.Namespace) -> None:
    """Set `k`, `config` and `of`, which tells `cases` what the network is beside its k."""
    flags.k = flags.k or networks.config_class(flags.network).k
    flags.of = {"network": flags.network}
    if flags.image_size:
        flags.of["image_size"] = flags.image_size
    try:
        flags.config = cases.network_config(flags.k, "dense", **flags.of)
        for _, groups, *_ in rows_of(flags.network) if "parallel" in flags.only else []:
            cases.network_config(flags.k, groups, **flags.of)
    except ValueError as error:
        size = f" or --image_size {flags.image_size}" if flags.image_size else ""
        parser.error(f"--k {flags.k:g}{size} is too small for the table: {error}")


def rows_of(network: str) -> list[tuple]:
    """The rows of part parallel."""
    return OTHER_ROWS.get(network, ROWS)


# ---------------------------------------------------------------- parallel inference


def parallel(flags: argparse.Namespace) -> Iterator[dict]:
    """The rows of the paper's Table 5, or the like of another network, each as it is measured."""
    gpus = range(len(tf.config.list_physical_devices("GPU")))
    devices = flags.devices or [f"/GPU:{n}" for n in gpus] or [f"/CPU:{n}" for n in range(3)]
    batch_size = flags.batch_size or 100
    rows = [(row, (flags.k, groups), *others) for row, groups, *others in rows_of(flags.network)]
    if flags.checkpoint:
        path = _tree_checkpoint(flags)
        rows += [
            ("Given", path, number, how, None)
            for _, (_, groups), number, how, _ in rows
            if set(groups.split("-")) == {"2"}
        ]

    def timed(net, number, how, precision):
        used = devices[:number]
        # One thread an operation makes a core of each logical CPU device.
        threads = None if "GPU" in used[0].upper() else (1, number)
        return TimedProcess(
            cases.make_inference, net, used, how, precision, batch_size, flags.of, threads=threads
        )

    for precision in flags.precision:
        with timed(*rows[0][1:4], precision) as baseline:
            for row, net, number, how, paper in rows:
                if number > len(devices):
                    print(f"{row} needs {number} devices: left out")
                    continue
                with timed(net, number, how, precision) as other:
                    measured, stats = compare(baseline, other, flags.repeats), other.stats()
                used = stats["devices"]
                yield {
                    "row": row,
                    "network": flags.config.name,
                    "groups": stats["groups"],
                    "devices": number,
                    "placement": how,
                    "precision": precision,
                    "batch_size": batch_size,
                    "seconds": measured["seconds"],
                    "images_per_second": batch_size / measured["seconds"],
                    "speedup": measured["speedup"],
                    "ideal_speedup": baseline.about["flops"] / max(stats["device_flops"]),
                    "paper_speedup": paper if flags.k == 8 else None,
                    "device_weights": max(stats["device_weights"]),
                    "device_memory": memory_per_device(stats, used),
                    "k": flags.k,
                    "repeats": flags.repeats,
                }


def memory_per_device(stats: dict, devices: Sequence[str]) -> float:
    """Peak bytes of a device: logical CPU devices share what the process has beyond an idle one."""
    if "GPU" in devices[0]:
        return stats["peak_memory"]
    return (stats["peak_memory"] - stats["idle_memory"]) / len(devices)


def _tree_checkpoint(flags: argparse.Namespace) -> str:
    """Path of --checkpoint, which must be a tree of the width that the table is of."""
    path = rundir.find_checkpoint(flags.checkpoint)
    net = restore.load_network(path)[0]
    dense = flags.config.name
    if not isinstance(net, resnet.Tree) or net.config.name != dense:
        raise ValueError(
            f"{path} is no tree of a {dense}, which the table compares with: name one that "
            "split.sh made, and its --k"
        )
    return path


# ---------------------------------------------------------------- training


def training(flags: argparse.Namespace) -> Iterator[dict]:
    """A row for each of STEPS; `relative` is its time in units of the first."""
    batch_size = flags.batch_size or 90
    for precision in flags.precision:
        how = (flags.k, precision, batch_size, flags.of)
        with TimedProcess(cases.make_training, *STEPS[0], *how) as baseline:
            for stage, keep_prob in STEPS:
                with TimedProcess(cases.make_training, stage, keep_prob, *how) as other:
                    measured, stats = compare(baseline, other, flags.repeats), other.stats()
                yield {
                    "stage": stage,
                    "dropout_keep_prob": keep_prob,
                    "network": flags.config.name,
                    "k": flags.k,
                    "precision": precision,
                    "batch_size": batch_size,
                    "seconds_per_step": measured["seconds"],
                    "relative": 1 / measured["speedup"],
                    "first_step_seconds": stats["first_step_seconds"],
                    "peak_memory": stats["peak_memory"],
                }


def compare_peers(flags: argparse.Namespace) -> Iterator[dict]:
    """Our step of stage baseline beside each peer's; `relative` is ours in units of theirs."""
    batch_size = flags.batch_size or 90
    for precision in flags.precision:
        how = (flags.k, precision, batch_size, flags.of)
        for peer in flags.peer:
            with (
                TimedProcess(cases.make_training, *STEPS[0], *how) as ours,
                TimedProcess(frameworks.make, peer, *how) as theirs,
            ):
                measured = compare(ours, theirs, flags.repeats)
                stats = theirs.stats(), ours.stats()
            yield {
                "peer": peer,
                "network": flags.config.name,
                "k": flags.k,
                "precision": precision,
                "batch_size": batch_size,
                "seconds_per_step": measured["seconds"],
                "our_seconds_per_step": measured["baseline_seconds"],
                "relative": measured["speedup"],
                "peak_memory": stats[0]["peak_memory"],
                "our_peak_memory": stats[1]["peak_memory"],
            }


# ---------------------------------------------------------------- other engines


def compare_engines(flags: argparse.Namespace) -> Iterator[dict]:
    """Inference of each of EXPORTED in this program and by each engine that is installed;
    `relative` is our time in units of theirs."""
    there = {e: v for e, v in engines.ENGINES.items() if utils.is_installed(v[1])}
    formats = {form for form, *_ in there.values()}
    formats = {f for f in formats if all(map(utils.is_installed, files.ENGINES[f][:1]))}
    if not formats and not utils.is_installed("torch"):
        packages = "onnx onnxruntime openvino ai-edge-litert torch"
        raise ValueError(f"no other engine is installed: pip install some of {packages}")
    with tempfile.TemporaryDirectory() as folder:
        for number, (groups, branch) in enumerate(EXPORTED):
            model = cases.exported_model(flags.k, groups, branch)
            paths = {form: os.path.join(folder, f"{number}.{form}") for form in formats}
            for form, path in paths.items():
                files.WRITERS[form](model, path)
            for batch_size, calls in BATCHES:
                size = (batch_size, calls)
                others = {
                    engine: (engines.make_engine, engine, paths[form], *size)
                    for engine, (form, *_) in there.items()
                    if form in paths
                }
                if groups == "dense" and utils.is_installed("torch"):
                    others["PyTorch"] = (engines.make_torch, flags.k, *size)
                ours = (cases.make_exported, flags.k, groups, branch, *size)
                for engine, case in others.items():
                    with TimedProcess(*ours) as this, TimedProcess(*case) as other:
                        measured = compare(this, other, flags.repeats)
                        first = [each.stats()["first_step_seconds"] for each in (this, other)]
                    yield {
                        "network": groups if branch is None else f"{groups}, one branch",
                        "k": flags.k,
                        "batch_size": batch_size,
                        "engine": engine,
                        "seconds": measured["seconds"] / calls,
                        "our_seconds": measured["baseline_seconds"] / calls,
                        "relative": measured["speedup"],
                        "first_seconds": first[1],
                        "our_first_seconds": first[0],
                    }


# ---------------------------------------------------------------- the input pipeline


def pipeline(flags: argparse.Namespace) -> dict:
    """Images a second on one core, and the share of a training step that is waiting for them."""
    batch_size, batches = flags.batch_size or 90, 20
    with TimedProcess(cases.make_pipeline, batch_size, batches, threads=(1, 1)) as alone:
        seconds = statistics.median(alone.seconds() for _ in range(flags.repeats))
    with TimedProcess(cases.make_fed_training, flags.k, flags.precision[0], batch_size) as fed:
        for _ in range(READY + flags.repeats):
            fed.seconds()
        stats = fed.stats()
    measured = slice(-flags.repeats, None)
    return {
        "images_per_second_per_core": batches * batch_size / seconds,
        "wait_share": sum(stats["waits"][measured]) / sum(stats["steps"][measured]),
        "k": flags.k,
        "precision": flags.precision[0],
        "batch_size": batch_size,
    }


def files_pipeline(flags: argparse.Namespace) -> dict:
    """Pictures a second from their files on all cores, beside Keras with the same crops."""
    with tempfile.TemporaryDirectory() as folder:
        photos, data_dir = os.path.join(folder, "photos"), os.path.join(folder, "data")
        cases.make_pictures(photos)
        make = os.path.join(os.path.dirname(os.path.dirname(__file__)), "make_dataset.py")
        words = [photos, "--dataset_path", data_dir, "--kind", "files"]
        words += ["--image_size", str(FILES_SIZE)]
        subprocess.run([sys.executable, make, *words], check=True, stdout=subprocess.DEVNULL)
        how = (FILES_BATCH, FILES_BATCHES)
        with (
            TimedProcess(cases.make_files_pipeline, data_dir, *how) as ours,
            TimedProcess(cases.make_keras_pipeline, photos, FILES_SIZE, *how) as theirs,
        ):
            measured = compare(ours, theirs, flags.repeats)
    number = FILES_BATCH * FILES_BATCHES
    return {
        "images_per_second": number / measured["baseline_seconds"],
        "keras_images_per_second": number / measured["seconds"],
        "relative": measured["speedup"],
        "image_size": FILES_SIZE,
        "batch_size": FILES_BATCH,
    }


# ---------------------------------------------------------------- the report


def table(rows: Sequence[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Rows as a Markdown table."""
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    return utils.markdown_table([list(columns), *lines])


def _of(name: str, form: str) -> Callable[[dict], str]:
    """A table's cell: a field in a format, empty where there is none."""
    return lambda row: "" if row[name] is None else format(row[name], form)


def _megabytes(name: str) -> Callable[[dict], str]:
    return lambda row: f"{row[name] / 2**20:,.0f}"


PARALLEL_COLUMNS = {
    "network": _of("row", ""),
    "groups": _of("groups", ""),
    "devices": _of("devices", ""),
    "placement": _of("placement", ""),
    "precision": _of("precision", ""),
    "seconds": _of("seconds", ".3f"),
    "images/s": _of("images_per_second", ".0f"),
    "speed-up": _of("speedup", ".2f"),
    "by FLOPs": _of("ideal_speedup", ".2f"),
    "paper": _of("paper_speedup", ".2f"),
    "weights a device": _of("device_weights", ","),
    "MiB a device": _megabytes("device_memory"),
}
TRAINING_COLUMNS = {
    "stage": _of("stage", ""),
    "dropout keeps": _of("dropout_keep_prob", "g"),
    "precision": _of("precision", ""),
    "seconds/step": _of("seconds_per_step", ".3f"),
    "of baseline's": _of("relative", ".3f"),
    "first step after, s": _of("first_step_seconds", ".1f"),
    "peak MiB": _megabytes("peak_memory"),
}
PEER_COLUMNS = {
    "peer": _of("peer", ""),
    "precision": _of("precision", ""),
    "its seconds/step": _of("seconds_per_step", ".3f"),
    "ours": _of("our_seconds_per_step", ".3f"),
    "ours/its": _of("relative", ".3f"),
    "its peak MiB": _megabytes("peak_memory"),
    "our peak MiB": _megabytes("our_peak_memory"),
}


ENGINE_COLUMNS = {
    "network": _of("network", ""),
    "batch": _of("batch_size", ""),
    "engine": _of("engine", ""),
    "its ms": lambda row: f"{1e3 * row['seconds']:.2f}",
    "ours": lambda row: f"{1e3 * row['our_seconds']:.2f}",
    "ours/its": _of("relative", ".2f"),
    "its first logits after, s": _of("first_seconds", ".1f"),
    "ours after, s": _of("our_first_seconds", ".1f"),
}


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    utils.check_file(flags.output_file, "output_file")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # processes share the GPUs
    name, cores = flags.config.name, rundir.num_cores()
    print(f"{name} on {rundir.hardware()}; medians of {flags.repeats} turns\n", flush=True)
    results = {"hardware": rundir.hardware(), "versions": rundir.versions()}
    if os.path.exists(flags.output_file):  # other parts that were measured alike stay
        before = utils.read_json(flags.output_file)
        if results.items() <= before.items():
            results = before
        else:
            print(f"{flags.output_file} is of other code or of another machine: it starts anew\n")

    def measure(part: str, title: str, rows: Iterator[dict], columns: dict) -> None:
        """A part's rows, told and written one by one: what comes later may fail; then a table."""
        measured = []
        for row in rows:
            measured.append(row)
            results[part] = measured
            utils.write_json(flags.output_file, results)
            print("  ".join(cell(row) for cell in columns.values()), flush=True)
        print(f"\n{title}\n\n{table(measured, columns)}\n", flush=True)

    if "parallel" in flags.only:
        measure("parallel", f"Inference of {name}", parallel(flags), PARALLEL_COLUMNS)
        most = max((row["devices"] for row in results["parallel"]), default=0)
        if not tf.config.list_physical_devices("GPU") and most > cores:
            print(f"Rows of more than {cores} devices have too few cores here.\n")
    if "training" in flags.only:
        measure("training", f"A training step of {name}", training(flags), TRAINING_COLUMNS)
    if "pipeline" in flags.only:
        results["pipeline"] = pipeline(flags) | {"files": files_pipeline(flags)}
        utils.write_json(flags.output_file, results)
        print(
            "Input pipeline: {images_per_second_per_core:,.0f} augmented images/s on one core; a "
            "training step waits for {wait_share:.2%} of its time".format(**results["pipeline"])
        )
        print(
            "Pictures in files (JPEG, 500x375, to {image_size} pixels): {images_per_second:,.0f} "
            "images/s on all cores; Keras {keras_images_per_second:,.0f}; time, ours/Keras "
            "{relative:.2f}\n".format(**results["pipeline"]["files"])
        )
    if "engines" in flags.only:
        title = f"Inference of exported {name} by other engines"
        measure("engines", title, compare_engines(flags), ENGINE_COLUMNS)
    if flags.peer:
        title = f"A training step of {name} beside plain {' and '.join(flags.peer)}"
        measure("peers", title, compare_peers(flags), PEER_COLUMNS)
    print(f"written: {flags.output_file}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
