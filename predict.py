"""Classify pictures of one's own: the likeliest classes, and the branch that tells each apart.

    python predict.py cat.jpg holiday/                      with pretrained/deep_2-2-2
    python predict.py --checkpoint runs/cpu/split --json True holiday/

Pictures are PNG, JPEG, WebP, BMP or GIF (the first frame) of any size: their centre square is
shrunk to 32x32. Of a folder all files with such an ending are taken. What is no picture is named,
the others are classified, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import cifar100
import rundir
import utils
from utils import tf

DEFAULT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "pretrained", "deep_2-2-2")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
PILLOW_RAISES = (OSError, SyntaxError, ValueError, EOFError, struct.error,
                 Image.DecompressionBombError)  # fmt: skip
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
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
        help="data set to take the names of classes from (default: CIFAR-100's)")  # fmt: skip
    add("--batch_size", type=utils.number(int, low=1), default=100,
        help="number of pictures at once (default: 100)")  # fmt: skip
    flags = parser.parse_args(argv)
    if not flags.pictures:
        parser.error("name pictures or folders of pictures")
    return flags


# ---------------------------------------------------------------- pictures


def find_pictures(names: Sequence[str]) -> Iterator[str]:
    """The named files, and those below the named folders that end like pictures, sorted."""
    for name in names:
        if not os.path.isdir(name):
            yield name
            continue
        for folder, folders, files in os.walk(name, onerror=_cannot_be_listed):
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(ENDINGS):
                    yield os.path.join(folder, file)


def _cannot_be_listed(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


def read_picture(path: str) -> np.ndarray:
    """A picture as the network takes it, uint8 `[32, 32, 3]`; 32x32 pixels stay as they are.

    Raises:
        ValueError: it cannot be read, or is no picture.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():  # of large pictures and of EXIF data that are damaged
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                picture = _on_white(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}" if content else "it is empty"
        raise ValueError(f"{path} is no picture that can be read ({reason})") from None
    except PILLOW_RAISES as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from None
    size = [cifar100.IMAGE_SIZE] * 2
    return np.array(ImageOps.fit(picture, size, Image.Resampling.BICUBIC))


def _on_white(picture: Image.Image) -> Image.Image:
    """Any picture with 8 bits for each of red, green and blue, what is transparent on white."""
    if picture.mode.startswith("I"):  # 16 bits of grey, of which Pillow would keep the lowest
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


# ---------------------------------------------------------------- classes


def load_classifier(flags: argparse.Namespace):
    """`classify(images uint8 [N, 32, 32, 3])` -> probabilities float32 `[N, classes]`; the names
    of the classes; the group of each class, all 0 where there are none."""
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

    return classify, names, branch_of


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
    paths = list(find_pictures(flags.pictures))
    if not paths:
        raise ValueError(f"{', '.join(flags.pictures)}: no file there ends in {', '.join(ENDINGS)}")
    classify, names, branch_of = load_classifier(flags)
    shows_progress = len(paths) > MANY and sys.stderr.isatty()
    failed = 0
    for start in range(0, len(paths), flags.batch_size):
        pictures = []
        for path in paths[start : start + flags.batch_size]:
            try:
                pictures.append((path, read_picture(path)))
            except ValueError as error:
                failed += 1
                print(f"predict.py: {' '.join(str(error).split())}", file=sys.stderr)
        if pictures:
            probabilities = classify(np.stack([picture for _, picture in pictures])).numpy()
            for (path, _), row in zip(pictures, probabilities, strict=True):
                report(path, best_classes(row, names, branch_of), flags.json)
        if shows_progress:
            done = min(start + flags.batch_size, len(paths))
            width = 40 * done // len(paths)
            bar = f"\r[{'#' * width}{'.' * (40 - width)}] {done}/{len(paths)}"
            print(bar, end="\n" if done == len(paths) else "", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    utils.run_main(main)
