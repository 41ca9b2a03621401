"""Take a trained network away, to other programs and formats.

    python export.py --checkpoint runs/cpu/split --format onnx --output tree.onnx
    python export.py --checkpoint pretrained/deep_2-2-2 --format savedmodel --output tree --branch 1
    python export.py --checkpoint pretrained/deep_2-2-2 --format savedmodel --output tree --parts

Images go in as uint8 `[N, H, W, 3]` of the network's size (32x32 for CIFAR-100), named `images`,
for any N: standardizing is part of the model. Float32 `logits` come out in the order of the labels.
`--branch` exports the trunk and one branch, with the logits of its classes alone; `--parts` the
trunk and each branch as models of their own, the trunk's outputs `features_0`, `features_1` ...
being what the branches take. Classes, groups and where the network is from travel as metadata. What
was written is run by its own engine and compared with the network.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import numpy as np

import cifar100
import rundir
import utils
from formats.files import ENGINES, PACKAGES, RUNNERS, WRITERS
from formats.models import Model, one_branch, parts, whole
from utils import tf

TOLERANCE = 1e-4  # of logits; of features in units of their largest
ENDINGS = {"savedmodel": "/1", "onnx": ".onnx", "litert": ".tflite"}  # of parts
# The names in a folder of ours.
SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}
PART = re.compile(r"(trunk|branch_\d+)(\.onnx|\.tflite)?")


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of an export; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__, needed=("checkpoint", "format", "output"))
    add = parser.add_argument
    add("--checkpoint", type=utils.path, help="run directory or model.ckpt-STEP")
    add("--format", choices=tuple(ENGINES), help=" | ".join(ENGINES))
    add("--output", type=utils.path, help="file or folder to write; with --parts a folder of them")
    add("--branch", type=utils.number(int, low=0),
        help="export the trunk and this branch only, counted from 0")  # fmt: skip
    add("--parts", type=utils.boolean, nargs="?", const=True, default=False,
        help="export the trunk and the branches as models of their own")  # fmt: skip
    add("--quantize", default="", choices=("", "int8"), help="weights of litert: int8")
    add("--overwrite", type=utils.boolean, nargs="?", const=True, default=False,
        help="replace a file that exists, or a folder that holds an export alone")  # fmt: skip
    add("--data_dir", type=utils.path, default="",
        help="data set for names of classes (default: its own), int8's accuracy")  # fmt: skip
    flags = parser.parse_args(argv)
    if flags.parts and flags.branch is not None:
        parser.error("--parts and --branch exclude each other: leave one of them out")
    if flags.quantize and flags.format != "litert":
        parser.error("--quantize is of --format litert: leave it out")
    return flags


# ---------------------------------------------------------------- writing


def compare(model: Model, run, number: int = 16) -> tuple[float, float]:
    """Largest difference of a written model from the network on random inputs, for two numbers of
    them; and the share of inputs whose largest output is the same.

    Features, which no softmax bounds, count in units of their largest.
    """
    largest, alike = np.float32(0), []
    for count in (1, number):
        x = model.random_input(count)
        outputs = run(x)
        for name, value in zip(model.outputs, model.function(tf.constant(x)), strict=True):
            difference = np.abs(outputs[name] - value.numpy()).max()
            if name != "logits":
                difference /= max(np.abs(value).max(), 1)
            largest = np.maximum(largest, difference)  # max() would lose NaN
            flat = [np.reshape(v, (count, -1)).argmax(axis=1) for v in (outputs[name], value)]
            alike += (flat[0] == flat[1]).tolist()
    return float(largest), float(np.mean(alike))


def accuracy(run, data_dir: str, numbers: list[int]) -> float:
    """Of the test images whose classes the model tells apart."""
    images, labels = cifar100.load(data_dir, "test")
    kept = np.isin(labels, numbers)
    images, labels = images[kept], np.searchsorted(numbers, labels[kept])
    size = 100  # at once
    parts = (np.asarray(images[i : i + size]) for i in range(0, len(images), size))
    batches = [run(part)["logits"] for part in parts]
    return float(np.mean(np.concatenate(batches).argmax(axis=1) == labels))


def export(model: Model, path: str, flags: argparse.Namespace) -> str:
    """Write a model and run it; how it compares with the network, in words.

    Raises:
        ValueError: it does not compute what the network does.
    """
    options = {"int8": True} if flags.quantize else {}
    WRITERS[flags.format](model, path, **options)
    run = RUNNERS[flags.format](path)
    difference, alike = compare(model, run)
    words = f"largest difference from the network {difference:.2g}"
    if flags.quantize:
        words += f", {alike:.1%} of the predictions the same"
        if flags.data_dir and not flags.parts:
            numbers = model.metadata["classes"]
            share = accuracy(run, flags.data_dir, numbers)
            words += f", accuracy {share:.4f} on the test images of its {len(numbers)} classes"
    elif not difference <= TOLERANCE:
        raise ValueError(
            f"{flags.output} was not written: {flags.format} differs from the network by "
            f"{difference:.2g}, more than {TOLERANCE:g}"
        )
    return words


def check_output(path: str, overwrite: bool) -> None:
    """Raise ValueError unless a name is free, or what has it may be replaced."""
    if not os.path.exists(path):
        return
    if os.path.isdir(path):
        names = os.listdir(path)
        if not SAVED_MODEL.issuperset(names) and not all(map(PART.fullmatch, names)):
            raise ValueError(
                f"{path} is a folder that holds more than an export: name another --output"
            )
    if not overwrite:
        raise ValueError(f"{path} exists: name another --output, or give --overwrite")


def size_of(path: str) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names]
    return sum(map(os.path.getsize, files or [path]))


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    missing = [p for p in ENGINES[flags.format] if not utils.is_installed(p)]
    if missing:
        names = " ".join(PACKAGES.get(package, package) for package in missing)
        raise ValueError(f"--format {flags.format} needs more packages: pip install {names}")
    flags.output = os.path.normpath(flags.output)  # without a slash at the end
    check_output(flags.output, flags.overwrite)
    utils.check_folder(os.path.dirname(flags.output) or ".", "output")
    import resnet  # loads TensorFlow, for which a mistake in the flags need not wait
    import restore

    path = rundir.find_checkpoint(flags.checkpoint)
    net, description = restore.load_evaluated(path, masked=False)
    resnet.freeze(net, lanes=1)  # zeros would take room, and cost one image more than they save
    metadata = describe(net, description, path, flags)
    if flags.parts:
        models = {name + ENDINGS[flags.format]: m for name, m in parts(net, metadata).items()}
    elif flags.branch is not None:
        models = {"": one_branch(net, flags.branch, metadata)}
    else:
        models = {"": whole(net, metadata)}
    lines = []
    with utils.replacing(flags.output) as part:
        for name, model in models.items():
            target = os.path.join(part, name) if name else part
            with utils.writing(flags.output):
                os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
            words = export(model, target, flags)
            shown = os.path.join(flags.output, name) if name else flags.output
            lines.append(f"written: {shown}, {size_of(target) / 2**20:.2f} MiB; {words}")
    print("\n".join(lines))
    return 0


def describe(net, description: dict, path: str, flags: argparse.Namespace) -> dict:
    """What travels with a model."""
    import grouping
    import restore

    names = restore.class_names(path, description, net.config.num_classes, flags.data_dir)
    return {
        "network": net.config.name,
        "groups": grouping.format_groups(net.config.groups),
        "class_names": list(names),
        "dataset": description.get("dataset", ""),
        "image_size": net.config.image_size,
        "stage": description.get("stage", ""),
        "step": description["step"],
        "git_revision": rundir.git_revision(),
    }


if __name__ == "__main__":
    utils.run_main(main)
