"""Test accuracy, confusion matrix and speed of a checkpoint, which describes its own network.

A tree (stage split), a dense network (baseline, group) or a TensorFlow 1 checkpoint of the
published code. `--mask` evaluates a grouped dense network with every weight between different
groups at zero: what the tree is right after the cut. `--placement` spreads a tree over devices.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import utils  # isort: skip, it quiets TensorFlow's start
import numpy as np
import tensorflow as tf
from six.moves import cPickle as pickle

import cifar100
import resnet
import train

PLACEMENTS = ("single", "branch", "hybrid")


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of an evaluation; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__.partition("\n")[0], needed=("checkpoint",))
    add = parser.add_argument
    add(
        "--checkpoint",
        help="run directory (its newest checkpoint) or model.ckpt-STEP",
    )
    add("--data_dir", default="data/cifar100", help="the data set (default: data/cifar100)")
    add("--split", default="test", choices=cifar100.SPLITS, help="images to use (default: test)")
    add(
        "--batch_size",
        type=utils.number(int, low=1),
        default=100,
        help="images a batch (default: 100)",
    )
    add("--mask", type=utils.boolean, nargs="?", const=True, default=False,
        help="set the weights between different groups of a grouped network to zero")  # fmt: skip
    add("--precision", default="float32", choices=tuple(train.DTYPES), help="of the convolutions")
    add(
        "--eval_dir",
        default="",
        help="where result.json goes (default: eval/, eval_mask/ ... beside the checkpoint)",
    )
    add("--placement", default="single", choices=PLACEMENTS, help="of a tree's branches on devices")
    add("--devices", default="", help="such as /GPU:0,/GPU:1 (default: TensorFlow's first)")
    add(
        "--output_file",
        default="",
        help="also write a pickle: accuracy, confusion_matrix, test_time, sec_per_image",
    )
    flags = parser.parse_args(argv)
    flags.devices = [name for name in flags.devices.split(",") if name]
    if (flags.placement == "single") != (len(flags.devices) < 2):
        parser.error(
            f"--placement {flags.placement} and {len(flags.devices)} --devices: single takes one "
            "at most, branch and hybrid take several"
        )
    return flags


# ---------------------------------------------------------------- devices


def find_devices(names: Sequence[str]) -> list[str]:
    """TensorFlow's names of devices; CPUs beyond the first are made, as logical devices.

    Raises:
        ValueError: one of them is not there; names those that are.
    """
    try:
        specs = [tf.DeviceSpec.from_string(name) for name in names]
        wanted = [(spec.device_type, spec.device_index or 0) for spec in specs]
    except ValueError:
        raise ValueError(f"--devices are names such as /GPU:0, got {','.join(names)}") from None
    cpus = 1 + max((index for kind, index in wanted if kind == "CPU"), default=0)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * cpus
    )
    there = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    for (kind, index), name in zip(wanted, names, strict=True):
        if f"{kind}:{index}" not in there:
            raise ValueError(f"device {name} is not there: there are /{', /'.join(there)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--devices {','.join(names)} name a device twice")
    return [f"/{kind}:{index}" for kind, index in wanted]


def copy_to(device: str, net: resnet.ResNet | resnet.SplitResNet):
    """The same network with its variables on another device."""
    with tf.device(device):
        copy = resnet.build(resnet.describe(net))
        resnet.load_weights(copy, {resnet.name_of(v): v.numpy() for v in net.variables})
    return copy


class PlacedTree:
    """A tree on several devices, called as the tree is.

    `branch`: each device computes the trunk and its own branches for the whole batch, and only
    logits travel (the paper's scheme). `hybrid`: each device computes the trunk for its share of
    the batch, the features are exchanged once, and each computes its own branches for the whole
    batch. Neighbouring leaves share a device where there are fewer devices.

    Raises:
        ValueError: the network has no branches.
    """

    def __init__(self, tree: resnet.SplitResNet, devices: Sequence[str], hybrid: bool):
        if not tree.num_branches:
            raise ValueError(
                "only a tree has branches to place: run split.sh, or --placement single"
            )
        self.devices, self.hybrid = devices, hybrid
        self.copies = [copy_to(device, tree) for device in devices]
        owners = self._owners(tree)
        self.leaves = [
            [leaf for leaf, owner in zip(copy.leaves(), owners, strict=True) if owner == number]
            for number, copy in enumerate(self.copies)
        ]

    def _owners(self, tree: resnet.SplitResNet) -> list[int]:
        """Number of the device of each leaf: runs of neighbours with about equal FLOPs."""
        flops = np.array([
            resnet.count(branch)[1] / len(list(branch.leaves()))
            for branch in tree.branches
            for _ in branch.leaves()
        ])  # fmt: skip
        middle = np.cumsum(flops) - flops / 2
        return (middle / flops.sum() * len(self.devices)).astype(int).tolist()

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, 32, 32, 3]`."""
        logits = self._hybrid(images) if self.hybrid else self._branch(images)
        with tf.device(self.devices[0]):
            return self.copies[0].in_label_order(logits)

    def _branch(self, images) -> list[tf.Tensor]:
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            if leaves:
                with tf.device(device):
                    logits += copy.leaf_logits(tf.identity(images), wanted=leaves)
        return logits

    def _hybrid(self, images) -> list[tf.Tensor]:
        number, batch = len(self.devices), tf.shape(images)[0]
        sizes = [(batch + i) // number for i in range(number)]
        shares = []  # of each device: what every branch reads, for a part of the batch
        for device, copy, part in zip(
            self.devices, self.copies, tf.split(images, sizes, num=number), strict=True
        ):
            with tf.device(device):
                shares.append(copy.fork(copy.features(tf.identity(part))))
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            for place, branch in enumerate(copy.branches):
                if any(leaf in leaves for leaf in branch.leaves()):
                    with tf.device(device):
                        x = tf.concat([share[place] for share in shares], axis=0)
                        logits += branch.leaf_logits(x, wanted=leaves)
        return logits


def place(net: resnet.ResNet | resnet.SplitResNet, devices: Sequence[str], placement: str):
    """`net` itself, or something that is called like it and computes on the given devices."""
    if placement != "single":
        return PlacedTree(net, devices, hybrid=placement == "hybrid")
    if not devices:
        return net
    copy = copy_to(devices[0], net)

    def on_device(images):
        with tf.device(devices[0]):
            return copy(images)

    return on_device


# ---------------------------------------------------------------- evaluation


def load_network(path: str, masked: bool) -> tuple[resnet.ResNet | resnet.SplitResNet, dict]:
    """The network of a checkpoint, and what that says of itself (stage, seed, step ...)."""
    try:
        tensors = utils.read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}: name an older model.ckpt-STEP of the run") from None
    net, description = train.load_network(path, tensors)
    if masked:
        if not isinstance(net, resnet.ResNet) or max(net.config.groups) == 1:
            raise ValueError(
                f"--mask needs a grouped dense network, but {path} is none: leave it out"
            )
        resnet.mask(net)
    about = {name: description.get(name) for name in ("dataset", "stage", "seed", "preset")}
    return net, about | {"step": int(tensors.get("step", tensors.get("global_step", 0)))}


def group_accuracies(confusion: np.ndarray, groups: list[np.ndarray]) -> list[float]:
    """Accuracy over the images of each group's classes, all classes competing; 0 if none."""
    hits, images = np.diag(confusion), confusion.sum(axis=1)
    return [float(hits[g].sum() / max(images[g].sum(), 1)) for g in groups]


def write_pickle(path: str, evaluation: train.Evaluation, test_time: float) -> None:
    """The published evaluation's output file."""
    values = {
        "accuracy": evaluation.accuracy,
        "confusion_matrix": evaluation.confusion,
        "test_time": test_time,
        "sec_per_image": evaluation.seconds_per_image,
    }
    with utils.atomic_write(path, "wb") as file:
        pickle.dump(values, file, protocol=2)


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    path = utils.find_checkpoint(flags.checkpoint)
    devices = find_devices(flags.devices) if flags.devices else []
    net, about = load_network(path, flags.mask)
    dataset = cifar100.describe(flags.data_dir)["dataset"]
    if about["dataset"] not in (None, dataset):
        raise ValueError(
            f"{path} was trained on {about['dataset']}, but {flags.data_dir} holds {dataset}: "
            "name the data set that it was trained on with --data_dir"
        )
    images, labels = cifar100.load(flags.data_dir, flags.split)
    result_file, output_file = output_files(flags, path)
    predict = train.predictor(place(net, devices, flags.placement), flags.precision)
    start = time.perf_counter()
    evaluation = train.evaluate(predict, images, labels, flags.batch_size)
    test_time = time.perf_counter() - start
    about |= {
        "dataset": dataset,
        "split": flags.split,
        "checkpoint": path,
        "masked": flags.mask,
        "precision": flags.precision,
        "placement": flags.placement,
        "devices": devices or [train.default_device()],
    }
    values = train.result(net, evaluation, **about)
    groups = [np.array(classes, int) for classes in values["group_classes"]]
    values["group_accuracy"] = group_accuracies(evaluation.confusion, groups)
    values["test_time"] = test_time
    values["confusion_matrix"] = evaluation.confusion.tolist()
    report(values)
    utils.write_json(result_file, values)
    if output_file:
        write_pickle(output_file, evaluation, test_time)
    print(f"written: {result_file} {output_file}".rstrip())
    return 0


def output_files(flags: argparse.Namespace, checkpoint: str) -> tuple[str, str]:
    """Paths of result.json and of the pickle, in folders that exist and can be written to.

    Each question has its own folder beside the checkpoint: eval, eval_mask, eval_val ...
    """
    parts = ["eval", *(["mask"] if flags.mask else [])]
    parts += [flags.split] if flags.split != "test" else []
    directory = flags.eval_dir or os.path.join(os.path.dirname(checkpoint), "_".join(parts))
    if os.path.isdir(flags.output_file):
        raise ValueError(f"--output_file {flags.output_file} is a folder: name a file in it")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be made ({error.strerror}): name another --eval_dir"
        ) from None
    for flag, folder in [("eval_dir", directory), ("output_file", flags.output_file)]:
        folder = os.path.dirname(folder) or "." if flag == "output_file" else folder
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} does not exist or is read-only: name another --{flag}")
    return os.path.join(directory, "result.json"), flags.output_file


def report(values: dict) -> None:
    """The result on the screen."""
    print(
        f"{values['network']}, groups {values['groups']}, step {values['step']}, "
        f"{values['dataset']} {values['split']}: accuracy {values['accuracy']:.4f} "
        f"({values['correct']} of {values['num_examples']}), "
        f"cross entropy {values['cross_entropy']:.4f}"
    )
    print(
        f"{values['weights']:,} weights, {values['flops']:,} FLOPs an image, "
        f"{1e3 * values['seconds_per_image']:.3f} ms an image on {values['hardware']}"
    )
    if len(values["group_classes"]) > 1:
        pairs = zip(values["group_classes"], values["group_accuracy"], strict=True)
        for number, (classes, accuracy) in enumerate(pairs):
            print(f"group {number}: {len(classes)} classes, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    utils.run_main(main)
