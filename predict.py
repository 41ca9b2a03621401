"""Classify pictures of one's own: the likeliest classes, and the branch that tells each apart.

    python predict.py cat.jpg holiday/                      with pretrained/deep_2-2-2
    python predict.py --checkpoint runs/cpu/split --json True holiday/

Pictures are PNG, JPEG, WebP, BMP, GIF (the first frame), TIFF or AVIF of any size: their centre
square is shrunk to the network's size. Of a folder all files with such an ending are taken. What is
no picture is named, the others are classified, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import numpy as np

import cifar100
import pictures
import rundir
import utils
from utils import tf

DEFAULT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "pretrained", "deep_2-2-2")
SHOWN = 5  # classes of a picture
MANY = 20  # pictures from which on a terminal sees how far it is


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Pictures and flags; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    parser.usage = "%(prog)s PICTURE ... --FLAG VALUE ..."
    add = parser.add_argument
    add("pictures", nargs="*", type=utils.path, help="files and folders of files")
    add("--checkpoint", type=utils.path, default=DEFAULT,
        help="run directory or model.ckpt-STEP (default: pretrained/deep_2-2-2)")  # fmt: skip
    add("--json", type=utils.boolean, nargs="?", const=True, default=False,
        help="print a line of JSON for each picture")  # fmt: skip
    add("--data_dir", type=utils.path, default="",
        help="data set to take the names of classes from (default: its own)")  # fmt: skip
    add("--batch_size", type=utils.number(int, low=1), default=100,
        help="number of pictures at once (default: 100)")  # fmt: skip
    flags = parser.parse_args(argv)
    if not flags.pictures:
        parser.error("name pictures or folders of pictures")
    return flags


# ---------------------------------------------------------------- pictures


def find_pictures(names: Sequence[str], passed: Counter) -> Iterator[str]:
    """The named files, and those below the named folders that end like pictures, sorted.

    Args:
        passed: counts what else there is in the folders, by its ending.
    """
    for name in names:
        if os.path.isdir(name):
            yield from pictures.find(name, passed)
        else:
            yield name


def read_picture(path: str, size: int = cifar100.IMAGE_SIZE, centre: float = 1.0) -> np.ndarray:
    """A picture as a network takes it, uint8 `[size, size, 3]` (`pictures.fit`)."""
    return pictures.read_picture(path, size, centre)


# ---------------------------------------------------------------- classes


def load_classifier(flags: argparse.Namespace):
    """How to classify.

    Returns:
        `classify(images uint8 [N, H, W, 3])` -> probabilities float32 `[N, classes]`; `read(path)`,
        a picture as the network takes it; the names of the classes; the group of each class, all 0
        where there are none.
    """
    import resnet
    import restore
    from parallel import tree

    path = rundir.find_checkpoint(flags.checkpoint)
    net, description = restore.load_network(path)
    names = restore.class_names(path, description, net.config.num_classes, flags.data_dir)
    branch_of = np.zeros(net.config.num_classes, int)
    for number, classes in enumerate(resnet.class_groups(net)):
        branch_of[classes] = number
    place = tree.place(net, [], "single")
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)

    @tf.function(input_signature=[spec], autograph=False)
    def classify(images):
        return tf.nn.softmax(place(cifar100.standardize(images)))

    def read(path):
        return read_picture(path, net.config.image_size, description.get("centre", 1.0))

    return classify, read, names, branch_of


def best_classes(probabilities: np.ndarray, names, branch_of) -> list[dict]:
    """The SHOWN likeliest classes of one picture, the best first."""
    order = np.argsort(-probabilities, kind="stable")[:SHOWN]
    return [
        {"class": names[c], "probability": float(probabilities[c]), "branch": int(branch_of[c])}
        for c in order
    ]


def report(path: str, classes: list[dict], as_json: bool) -> None:
    """One picture's classes on the screen."""
    if as_json:
        print(json.dumps({"picture": path, "classes": classes}))
        return
    print(path)
    for found in classes:
        print(f"    {found['probability']:7.2%}  {found['class']} (branch {found['branch']})")


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    passed: Counter = Counter()
    paths = list(find_pictures(flags.pictures, passed))
    others = Counter({ending: passed[ending] for ending in pictures.OTHERS if passed[ending]})
    if others:
        print(f"predict.py: passed over: {pictures.passed_over(others)}", file=sys.stderr)
    if not paths:
        endings = ", ".join(pictures.ENDINGS)
        raise ValueError(f"{', '.join(flags.pictures)}: no file there ends in {endings}")
    classify, read, names, branch_of = load_classifier(flags)
    shows_progress = len(paths) > MANY and sys.stderr.isatty()
    failed = 0
    for start in range(0, len(paths), flags.batch_size):
        batch = []
        for path in paths[start : start + flags.batch_size]:
            try:
                batch.append((path, read(path)))
            except ValueError as error:
                failed += 1
                print(f"predict.py: {' '.join(str(error).split())}", file=sys.stderr)
        if batch:
            probabilities = classify(np.stack([picture for _, picture in batch])).numpy()
            for (path, _), row in zip(batch, probabilities, strict=True):
                report(path, best_classes(row, names, branch_of), flags.json)
        if shows_progress:
            done = min(start + flags.batch_size, len(paths))
            width = 40 * done // len(paths)
            bar = f"\r[{'#' * width}{'.' * (40 - width)}] {done}/{len(paths)}"
            print(bar, end="\n" if done == len(paths) else "", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    utils.run_main(main)
