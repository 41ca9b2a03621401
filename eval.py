"""Test accuracy, confusion matrix and speed of a checkpoint, which describes its own network.

A tree (stage split), a dense network (baseline, group) or the published code's TensorFlow 1
checkpoint of a dense one. `--mask` evaluates a grouped dense network with every weight between
different groups at zero: what the tree is right after the cut. A tree's branches are spread over
all GPUs of this machine, over `--devices`, or over other machines (`--cluster`), each of which runs
`eval.py --worker`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
from six.moves import cPickle as pickle

import cifar100
import rundir
import utils
from parallel import cluster, devices
from utils import tf

if TYPE_CHECKING:
    import metrics


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of an evaluation; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=utils.path,
        help="run directory (its newest checkpoint) or model.ckpt-STEP",
    )
    add(
        "--data_dir",
        type=utils.path,
        default="data/cifar100",
        help="the data set (default: data/cifar100)",
    )
    add("--split", default="test", choices=cifar100.SPLITS, help="images to use (default: test)")
    add(
        "--batch_size",
        type=utils.number(int, low=1),
        default=100,
        help="images a batch (default: 100)",
    )
    add("--mask", type=utils.boolean, nargs="?", const=True, default=False,
        help="set the weights between different groups of a grouped network to zero")  # fmt: skip
    add(
        "--precision",
        default="float32",
        choices=utils.PRECISIONS,
        help="of the convolutions",
    )
    add(
        "--eval_dir",
        type=utils.path,
        default="",
        help="where result.json goes (default: eval/, eval_mask/ ... beside the checkpoint)",
    )
    add("--jit_compile", type=utils.boolean, nargs="?", const=True, default=False,
        help="compile with XLA, on one device")  # fmt: skip
    add(
        "--placement",
        default="auto",
        choices=("auto", *devices.PLACEMENTS),
        help="placement of a tree's branches (default: auto, branch where there are several "
        "devices, else single)",
    )
    add(
        "--devices",
        type=utils.names,
        default=[],
        help="such as /GPU:0,/GPU:1 (default: all GPUs for a tree, else the first device)",
    )
    add("--cluster", type=utils.names, default=[],
        help="compute on the workers at host:port,host:port instead")  # fmt: skip
    add("--worker", type=utils.number(int, low=1, high=2**16 - 1), metavar="PORT",
        help="serve this machine to --cluster on a port; takes no other flag")  # fmt: skip
    add(
        "--output_file",
        type=utils.path,
        default="",
        help="also write a pickle: accuracy, confusion_matrix, test_time, sec_per_image",
    )
    flags = parser.parse_args(argv)
    _check_flags(parser, flags)
    return flags


def _check_flags(parser: utils.FlagParser, flags: argparse.Namespace) -> None:
    """Contradictions between flags."""
    if flags.worker:
        if any(
            value != parser.get_default(name)
            for name, value in vars(flags).items()
            if name != "worker"
        ):
            parser.error("--worker takes no other flag: name the checkpoint where --cluster is")
        return
    if not flags.checkpoint:
        parser.error("--checkpoint is needed: a run directory or model.ckpt-STEP")
    if flags.devices and flags.cluster:
        parser.error("--devices are of this machine, --cluster's are of others: leave one out")
    places = len(flags.devices) + len(flags.cluster)
    if flags.placement != "auto" and (flags.placement == "single") != (places < 2):
        parser.error(
            f"--placement {flags.placement} and {places} devices or workers: single takes one "
            "at most, branch and hybrid take several"
        )
    if flags.jit_compile and (flags.cluster or places > 1):
        parser.error("--jit_compile compiles for one device of this machine: leave it out")


def write_pickle(path: str, evaluation: metrics.Evaluation, test_time: float) -> None:
    """The published evaluation's output file."""
    values = {
        "accuracy": evaluation.accuracy,
        "confusion_matrix": evaluation.confusion,
        "test_time": test_time,
        "sec_per_image": evaluation.seconds_per_image,
    }
    with utils.atomic_write(path, "wb") as file:
        pickle.dump(values, file, protocol=2)


def main(argv: Sequence[str]) -> int | None:
    flags = parse_flags(argv)
    if flags.worker:
        return cluster.serve(flags.worker)
    # They load TensorFlow, for which a mistake in the flags need not wait.
    import metrics
    import restore
    from parallel import tree

    path = rundir.find_checkpoint(flags.checkpoint)
    placed_on = devices.find_devices(flags.devices) if flags.devices else []
    if flags.cluster:
        placed_on = cluster.connect(flags.cluster)
    net, description = restore.load_evaluated(path, flags.mask)
    data = cifar100.describe(flags.data_dir)
    restore.check_dataset(path, description, data, flags.data_dir, flags.split)
    restore.check_images(path, net, flags.data_dir)
    images, labels = cifar100.load(flags.data_dir, flags.split)
    result_file, output_file = output_files(flags, path)
    placement = flags.placement
    if placement == "auto":
        placement, placed_on = tree.choose(net, placed_on, alone=flags.jit_compile)
        if len(placed_on) > 1:
            print(f"placement {placement} on {', '.join(placed_on)}")
    slow = rundir.slow_precision(flags.precision, [*placed_on, devices.default_device()][0])
    if slow and not flags.cluster:  # whose machines may have other processors
        print(slow)
    with cluster.Watch(flags.cluster):
        try:
            placed = tree.place(net, placed_on, placement)
            predict = metrics.predictor(
                placed, flags.precision, flags.jit_compile, net.config.image_size
            )
            start = time.perf_counter()
            evaluation = metrics.evaluate(
                predict, images, labels, flags.batch_size, net.config.num_classes
            )
        except (tf.errors.UnavailableError, tf.errors.AbortedError):
            raise ValueError(cluster.lost(flags.cluster)) from None
    test_time = time.perf_counter() - start
    values = metrics.result(
        net,
        evaluation,
        **{name: description.get(name) for name in ("stage", "seed", "preset", "class_groups")},
        step=description["step"],
        dataset=data["dataset"],
        split=flags.split,
        checkpoint=path,
        masked=flags.mask,
        precision=flags.precision,
        placement=placement,
        devices=placed_on or [devices.default_device()],
        cluster=flags.cluster,
    )
    values |= metrics.of_groups(net, evaluation.confusion, data["superclass_of_class"], flags.mask)
    values["test_time"] = test_time
    values["confusion_matrix"] = evaluation.confusion.tolist()
    utils.write_json(result_file, values)
    if output_file:
        write_pickle(output_file, evaluation, test_time)
    report(values)
    print(f"written: {result_file} {output_file}".rstrip())
    return 0


def output_files(flags: argparse.Namespace, checkpoint: str) -> tuple[str, str]:
    """Paths of result.json and of the pickle, in folders that exist and can be written to.

    Each question has its own folder beside the checkpoint: eval, eval_mask, eval_val ...
    """
    parts = ["eval", *(["mask"] if flags.mask else [])]
    parts += [flags.split] if flags.split != "test" else []
    directory = flags.eval_dir or os.path.join(os.path.dirname(checkpoint), "_".join(parts))
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be made ({error.strerror}): make room there, or name another "
            "--eval_dir"
        ) from None
    utils.check_folder(directory, "eval_dir")
    if flags.output_file:
        utils.check_file(flags.output_file, "output_file")
    return os.path.join(directory, "result.json"), flags.output_file


def report(values: dict) -> None:
    """The result on the screen."""
    print(
        f"{values['network']}, groups {values['groups']}, step {values['step']}, "
        f"{values['dataset']} {values['split']}: accuracy {values['accuracy']:.4f} "
        f"({values['correct']} of {values['num_examples']}), "
        + (f"top-5 error {values['top5_error']:.4f}, " if "top5_error" in values else "")
        + f"cross entropy {values['cross_entropy']:.4f}"
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
