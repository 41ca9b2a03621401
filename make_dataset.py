"""Make a data set of your own pictures, for all programs here (--data_dir).

    python make_dataset.py photos --dataset_path data/photos                 photos/CLASS/*.jpg
    python make_dataset.py photos --dataset_path data/photos --image_size 64
    python make_dataset.py root --dataset_path data/mine --list train=train.txt,test=test.txt

PICTURES is a folder with a folder of pictures for each class; or one with train/, val/ and test/ of
them, of which those that are missing are divided off train/; or ILSVRC 2012 as it comes. A list has
a picture's path, below PICTURES, and its class or the class's number (from 0) on each line.

Pictures are PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF. Each is read once here, so that one that is
damaged is named now. Kind `arrays` keeps them shrunk in memory, kind `files` reads them from where
they are. A second run looks whether anything has changed, and does nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import utils  # first: it says in one line which package is missing
import cifar100
import pictures
import rundir
from pictures import PARTS
from utils import say

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SYNSET = re.compile(r"n\d{8}")  # a class's folder in ILSVRC 2012
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # in its development kit
SYNSET_WORDS = ("synset_words.txt", "LOC_synset_mapping.txt")  # lists of names that come with it
ILSVRC_CENTRE = 224 / 256  # shorter side to 256 pixels, centre crop of 224
RESERVED = ("cifar100", "synthetic")  # names of download_cifar100.py's data sets
MAKING = ".making"  # folder, in the data set's, of what is not complete
SHEET = "samples.png"
BLOCK = 512  # pictures that are read at once
PROGRESS_INTERVAL = 5.0  # seconds
NAMED = 5  # of things of one kind, in a message


class Found:
    """The pictures that there are: `parts`, of train, val and test those that are given, each a
    list of (path below `source`, class); the classes' names; what was passed over."""

    def __init__(self, source: str):
        self.source = os.path.abspath(source)
        self.parts: dict[str, list[tuple[str, str]]] = {}
        self.classes: list[str] = []  # in the order of the labels, as `parts` call them
        self.names: dict[str, str] = {}  # of a class, where it is not what `parts` call it
        self.passed: Counter = Counter()
        self.centre = 1.0

    @property
    def class_names(self) -> list[str]:
        return [self.names.get(name, name) for name in self.classes]


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Pictures and flags; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__, needed=("pictures", "dataset_path"))
    parser.usage = "%(prog)s PICTURES --dataset_path FOLDER --FLAG VALUE ..."
    add = parser.add_argument
    share = utils.number(float, above=0, below=1)
    add("pictures", nargs="?", type=utils.path, help="the folder of the pictures")
    add("--dataset_path", type=utils.path, help="where the data set goes")
    add("--image_size", type=utils.number(int, low=8, high=4096), default=cifar100.IMAGE_SIZE,
        help="side of what a network sees of a picture (default: %(default)s)")  # fmt: skip
    add("--kind", choices=("arrays", "files"),
        help="arrays in memory or files (default: arrays, up to a quarter of it)")  # fmt: skip
    add("--list", type=_lists, default={},
        help="lists of `path label`: FILE, or train=FILE,val=FILE,test=FILE")  # fmt: skip
    add("--superclasses", type=utils.path, default="", help='JSON: {"name": ["class", ...], ...}')
    add("--val_share", type=share, default=0.1,
        help="share of train for validation, where none is given (default: 0.1)")  # fmt: skip
    add("--test_share", type=share, default=0.1, help="likewise for the test (default: 0.1)")
    add("--seed", type=utils.number(int, low=0), default=0, help="of the division (default: 0)")
    add("--augmentation", choices=("shift", "crop"),
        help="in training: shifts by up to 4 pixels, or random crops of 8 to 100 %% of a picture "
        "(default: crop for kind files, but for pictures of just this size)")  # fmt: skip
    add("--centre", type=utils.number(float, above=0, high=1),
        help="share of the shorter side that evaluation sees (default: 1; ILSVRC 7/8)")  # fmt: skip
    add("--skip_bad", type=utils.boolean, nargs="?", const=True, default=False,
        help="leave out pictures that cannot be read")  # fmt: skip
    add("--overwrite", type=utils.boolean, nargs="?", const=True, default=False,
        help="make a data set again that is there")  # fmt: skip
    flags = parser.parse_args(argv)
    if "" in (flags.pictures, flags.dataset_path):
        parser.error("a path is empty: give it a value")
    if flags.val_share + flags.test_share >= 1:
        parser.error("--val_share and --test_share leave nothing for training: make them smaller")
    if flags.augmentation == "crop" and flags.kind == "arrays":
        parser.error("--augmentation crop needs the pictures themselves: give --kind files")
    return flags


def _lists(text: str) -> dict[str, str]:
    """`FILE` or `train=FILE,test=FILE` -> the file of each part."""
    if not re.match(r"(train|val|test)=", text):
        return {"train": utils.path(text)}
    lists = {}
    for word in re.split(r",(?=(?:train|val|test)=)", text):
        part, _, name = word.partition("=")
        if not name or part in lists:
            raise argparse.ArgumentTypeError(f"expected train=FILE,test=FILE, got {text!r}")
        lists[part] = utils.path(name)
    if "train" not in lists:
        raise argparse.ArgumentTypeError(f"expected a list of train, got {text!r}")
    return lists


# ---------------------------------------------------------------- which pictures there are


def find(flags: argparse.Namespace) -> Found:
    """The pictures, by lists or by folders, and their classes.

    Raises:
        ValueError: they make no data set; names the file, class or line.
    """
    root = flags.pictures
    if not os.path.isdir(root):
        problem = "is a file" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {problem}: name a folder of pictures, one folder for each class")
    found = Found(root)
    if flags.list:
        _read_lists(found, flags.list)
    else:
        _read_folders(found)
    if not any(found.parts.values()):
        passed = pictures.passed_over(found.passed)
        raise ValueError(
            f"no pictures in {root}{f' (passed over: {passed})' if passed else ''}: expected "
            f"files that end in {', '.join(pictures.ENDINGS)}, in a folder for each class"
        )
    if len(found.classes) < 2:
        raise ValueError(
            f"{root} has one class, {found.classes[0]}: at least two are needed, each with a "
            "folder of its own"
        )
    return found


def _folders(path: str, passed: Counter) -> list[str]:
    """Names of the folders in a folder, sorted; counts the files there as passed over."""
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    folders = []
    for entry in entries:
        if pictures.is_hidden(entry.name):
            passed["hidden"] += 1
        elif os.path.isdir(entry.path):
            folders.append(entry.name)
        else:
            passed["beside the classes' folders"] += 1
    return folders


def _read_folders(found: Found) -> None:
    """Classes by their folders."""
    top, nothing = _folders(found.source, found.passed), Counter()
    path = {part: os.path.join(found.source, part) for part in PARTS}
    trained = _folders(path["train"], nothing) if "train" in top else []
    if trained and all(map(SYNSET.fullmatch, trained)):
        _read_ilsvrc(found, path)
    # train/ may also be a class of its own, as one of CIFAR-100 is.
    elif trained and set(top) <= set(PARTS):
        for part in [part for part in PARTS if part in top]:
            found.parts[part] = _read_classes(found, path[part], part == "train")
    else:
        found.parts["train"] = _read_classes(found, found.source, True)


def _read_classes(found: Found, folder: str, is_train: bool) -> list[tuple[str, str]]:
    """(path, class) of all pictures below a folder with a folder for each class.

    Those of train say which classes there are.
    """
    names = _folders(folder, Counter() if folder == found.source else found.passed)
    if is_train:
        found.classes = names
        folded: dict[str, str] = {}
        for name in names:
            other = folded.setdefault(name.casefold(), name)
            if other != name:
                raise ValueError(
                    f"the classes {other} and {name} in {folder} differ in case only: rename or "
                    "join them"
                )
    members = []
    for name in names:
        if name not in found.classes:
            raise ValueError(
                f"{folder} has the class {name}, which train lacks: put pictures of it there, or "
                "remove it"
            )
        files = list(pictures.find(os.path.join(folder, name), found.passed))
        if not files and is_train:
            raise ValueError(
                f"the class {name} has no pictures in {os.path.join(folder, name)}: put some "
                "there, or remove the folder"
            )
        members += [(os.path.relpath(file, found.source), name) for file in files]
    return members


def _read_ilsvrc(found: Found, path: dict[str, str]) -> None:
    """ILSVRC 2012: its val is the test set, and validation a part of train."""
    found.centre = ILSVRC_CENTRE
    found.parts["train"] = _read_classes(found, path["train"], True)
    devkit = _find_devkit(found.source)
    synsets = _read_synsets(os.path.join(devkit, "meta.mat")) if devkit else []
    _name_synsets(found, {synset: words for _, synset, words in synsets})
    if not os.path.isdir(path["val"]):
        return
    if any(map(SYNSET.fullmatch, _folders(path["val"], Counter()))):
        found.parts["test"] = _read_classes(found, path["val"], False)
        return
    if not devkit:
        raise ValueError(
            f"{path['val']} is not sorted into folders, and {GROUND_TRUTH} is not in "
            f"{found.source}: put the development kit there (ILSVRC2012_devkit_t12)"
        )
    synset_of = {number: synset for number, synset, _ in synsets}
    truth = [synset_of.get(line.strip()) for line in _lines(os.path.join(devkit, GROUND_TRUTH))]
    found.parts["test"] = []
    for file in pictures.find(path["val"], found.passed):
        number = re.search(r"_(\d{8})\.", os.path.basename(file))
        if not number or not 1 <= int(number[1]) <= len(truth):
            raise ValueError(f"{file} is none of the pictures of {GROUND_TRUTH}")
        name = truth[int(number[1]) - 1]
        if name not in found.classes:
            raise ValueError(f"{file} is of the class {name}, which train lacks")
        found.parts["test"].append((os.path.relpath(file, found.source), name))


def _find_devkit(source: str) -> str:
    """The folder of ILSVRC's development kit that says what is in val; empty without one."""
    if os.path.exists(os.path.join(source, GROUND_TRUTH)):
        return source
    for name in set(_folders(source, Counter())) - set(PARTS):
        for folder, _, files in os.walk(os.path.join(source, name)):
            if GROUND_TRUTH in files:
                return folder
    return ""


def _read_synsets(path: str) -> list[tuple[str, str, str]]:
    """ILSVRC2012_ID, synset and words of each class, from the development kit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(path, squeeze_me=True)["synsets"])
        return [tuple(str(s[n]) for n in ("ILSVRC2012_ID", "WNID", "words")) for s in synsets]
    except Exception as error:  # a damaged one raises a dozen kinds
        raise ValueError(f"{path} cannot be read: {error}") from None


def _name_synsets(found: Found, words_of: dict[str, str]) -> None:
    """Name each synset by its first word in the development kit, or in a list that is there."""
    for file in SYNSET_WORDS:
        with contextlib.suppress(OSError):
            lines = _lines(os.path.join(found.source, file))
            words_of |= {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    names = {s: words_of.get(s, "").split(",")[0].strip() or s for s in found.classes}
    often = Counter(names.values())  # two are called crane
    found.names = {s: f"{name} ({s})" if often[name] > 1 else name for s, name in names.items()}


def _lines(path: str) -> list[str]:
    """Lines of a text file of any system's, without a byte order mark."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        return file.read().split("\n")


def _read_lists(found: Found, lists: dict[str, str]) -> None:
    """Pictures by lists of `path label`; a label is the last word of its line."""
    lines: dict[str, list[tuple[str, str, str]]] = {}  # of a part: path, label, where it stands
    met: dict[str, str] = {}
    for part, file in lists.items():
        lines[part] = []
        try:
            text = _lines(file)
        except OSError as error:
            raise ValueError(f"the list {file} cannot be read: {error.strerror}") from None
        for number, line in enumerate(text, 1):
            words = line.rsplit(None, 1)
            where = f"{file}, line {number}"
            if not words:
                continue
            if len(words) < 2:
                raise ValueError(f"{where}: expected a path and a label, got {line!r}")
            path = os.path.join(found.source, words[0])
            if not os.path.isfile(path):
                raise ValueError(f"{where}: there is no picture {path}")
            if path in met:
                raise ValueError(f"{where}: {words[0]} stands in {met[path]} already")
            met[path] = where
            lines[part].append((words[0], words[1], where))
    _name_classes(found, lines)
    for part, members in lines.items():
        found.parts[part] = [(path, label) for path, label, _ in members]


def _name_classes(found: Found, lines: dict[str, list[tuple[str, str, str]]]) -> None:
    """The classes of lists: by their names; or numbers from 0, with the names of folders where
    each class has one folder to itself."""
    every = [line for part in PARTS for line in lines.get(part, [])]
    if not every:
        return
    numbered = [re.fullmatch(r"[+-]?\d+", label) is not None for _, label, _ in every]
    trained = {label for _, label, _ in lines["train"]}
    if all(numbered):
        largest = max((int(label) for label in trained), default=-1)
        missing = next(n for n in range(largest + 2) if str(n) not in trained)
        for _, label, where in every:
            if int(label) < 0 or str(int(label)) != label or int(label) > missing:
                raise ValueError(
                    f"{where}: the label {label} is out of range: labels are whole numbers from "
                    f"0 on without gaps, and no picture of train has the label {missing}"
                )
        found.classes = [str(number) for number in range(missing)]
        folders: dict[str, set[str]] = {}
        for path, label, _ in every:
            folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
        names = [min(folders.get(name, {""})) for name in found.classes]
        alone = all(len(folders[name]) == 1 for name in found.classes if name in folders)
        if not (alone and all(names) and len(set(names)) == len(names)):
            names = [f"class {name}" for name in found.classes]
        found.names = dict(zip(found.classes, names, strict=True))
    else:
        found.classes = sorted(trained)
    for _, label, where in every:
        if label not in found.classes:
            raise ValueError(f"{where}: the class {label} has no picture in the list of train")


def read_superclasses(path: str, class_names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names of the superclasses, and the superclass of each class.

    Raises:
        ValueError: the file is no `{"name": ["class", ...], ...}`, or its classes are not just
            those of the data set.
    """
    of = utils.read_users_json(path)
    if not isinstance(of, dict) or not all(isinstance(members, list) for members in of.values()):
        raise ValueError(f'{path}: expected {{"superclass": ["class", ...], ...}}')
    number_of = {name: number for number, name in enumerate(class_names)}
    superclass_of: dict[int, int] = {}
    for index, (superclass, members) in enumerate(of.items()):
        if not members:
            raise ValueError(f"{path}: the superclass {superclass} has no classes")
        for word in members:
            number = number_of.get(word) if isinstance(word, str) else None
            if number is None:
                raise ValueError(
                    f"{path}: the superclass {superclass} names the class {word!r}, which there is "
                    "not"
                )
            if number in superclass_of:
                raise ValueError(f"{path}: the class {word} stands in two superclasses")
            superclass_of[number] = index
    missing = [name for number, name in enumerate(class_names) if number not in superclass_of]
    if missing:
        raise ValueError(f"{path}: the class {missing[0]} is in no superclass")
    return list(of), [superclass_of[number] for number in range(len(class_names))]


# ---------------------------------------------------------------- reading and dividing


def read_all(paths: Sequence[str], size: int, centre: float, pixels: np.ndarray | None):
    """Read every picture, on all cores; shows how far it is.

    Args:
        paths: of the files.
        pixels: uint8 `[N, size, size, 3]` to be filled, or None.

    Returns:
        The numeric columns of a listing, and what is wrong with those that cannot be read, by
        their numbers.
    """
    columns = {
        name: np.zeros(len(paths), kind)
        for name, kind in pictures.COLUMNS.items()
        if name not in ("ends", "labels", "splits")
    }
    bad: dict[int, str] = {}

    def read(number: int) -> None:
        path = paths[number]
        try:
            content = pictures.read_file(path)
            picture, decoder = pictures.decode(content, path)
        except ValueError as error:
            bad[number] = str(error)
            return
        about = os.stat(path)
        values = {
            "decoders": decoder, "heights": picture.height, "widths": picture.width,
            "bytes": len(content), "times": about.st_mtime_ns, "checksums": zlib.crc32(content),
        }  # fmt: skip
        for name, value in values.items():
            columns[name][number] = value
        if pixels is not None:
            pixels[number] = pictures.fit(picture, size, centre)

    start = shown = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(rundir.num_cores()) as readers:
        for first in range(0, len(paths), BLOCK):
            done = min(first + BLOCK, len(paths))
            list(readers.map(read, range(first, done)))
            now = time.monotonic()
            if now - shown > PROGRESS_INTERVAL:
                shown, left = now, (now - start) * (len(paths) - done) / done
                say(f"read {done:,} of {len(paths):,}, {left / 60:.0f}:{left % 60:02.0f} left")
    return columns, dict(sorted(bad.items()))


def divide(labels: np.ndarray, splits: np.ndarray, shares: dict[str, float], seed: int) -> None:
    """Divide `shares` of each class off train, in place, in an order that the seed draws.

    A class gives at least one picture to the test, and to validation where it has three.
    """
    train = PARTS.index("train")
    keys = np.random.PCG64(seed).random_raw(len(labels))  # NumPy promises never to change them
    for label in range(labels.max() + 1):
        members = np.flatnonzero((labels == label) & (splits == train))
        members = members[np.argsort(keys[members], kind="stable")]
        wanted = {part: max(round(len(members) * share), 1) for part, share in shares.items()}
        for part, number in sorted(wanted.items()):  # test, val
            number = min(number, len(members) - 1)
            splits[members[:number]] = PARTS.index(part)
            members = members[number:]


def check_numbers(labels: np.ndarray, splits: np.ndarray, class_names: Sequence[str]) -> None:
    """Raise ValueError where a class has too few pictures, before or after the division."""
    train = splits == PARTS.index("train")
    trained = np.bincount(labels[train], minlength=len(class_names))
    every = np.bincount(labels, minlength=len(class_names))
    for name, of_train, number in zip(class_names, trained, every, strict=True):
        if not of_train:
            raise ValueError(f"the class {name} has no picture to train with: add some")
        if number == 1:
            raise ValueError(
                f"the class {name} has one picture, which cannot be both learned and tested: add "
                "more, or remove the class"
            )


# ---------------------------------------------------------------- the data set


def make(flags: argparse.Namespace, found: Found) -> dict:
    """Read the pictures and write the data set; returns its description.

    Raises:
        ValueError: pictures cannot be read, or classes are too small.
    """
    class_names = found.class_names
    superclasses = [], []
    if flags.superclasses:
        superclasses = read_superclasses(flags.superclasses, class_names)
    paths, labels, splits = _in_order(found)
    check_numbers(labels, splits, class_names)
    size, centre = flags.image_size, flags.centre or found.centre
    needed = len(paths) * size * size * 3
    kind = flags.kind or ("arrays" if needed <= memory() / 4 else "files")
    if flags.augmentation == "crop" and not flags.kind:
        kind = "files"
    say(f"reading {len(paths):,} pictures of {len(class_names)} classes (kind {kind})")
    with _room_for(flags.dataset_path) as folder:
        pixels = np.empty((len(paths), size, size, 3), np.uint8) if kind == "arrays" else None
        absolute = [os.path.join(found.source, path) for path in paths]
        columns, bad = read_all(absolute, size, centre, pixels)
        if bad and not flags.skip_bad:
            raise ValueError(
                f"{_number(len(bad), 'picture')} cannot be read: {'; '.join(bad.values())}: mend "
                "or remove them, or leave them out by --skip_bad"
            )
        skipped = [paths[number] for number in bad]
        if bad:
            good = np.setdiff1d(np.arange(len(paths)), list(bad))
            paths, labels, splits = [paths[number] for number in good], labels[good], splits[good]
            columns = {name: column[good] for name, column in columns.items()}
            pixels = None if pixels is None else pixels[good]
        check_numbers(labels, splits, class_names)
        shares = {"val": flags.val_share, "test": flags.test_share}
        shares = {part: share for part, share in shares.items() if not found.parts.get(part)}
        divide(labels, splits, shares, flags.seed)
        for part in PARTS:
            if PARTS.index(part) not in splits:
                raise ValueError(
                    f"nothing is left for {part}: add pictures, or make its share larger"
                )
        listing = columns | pictures.pack(paths) | {"labels": labels, "splits": splits}
        just = ((columns["heights"] == size) & (columns["widths"] == size)).all()
        description = {
            "dataset": dataset_name(flags.dataset_path),
            "kind": kind,
            "source": found.source,
            "image_size": size,
            "centre": float(centre),
            "augmentation": flags.augmentation or ("shift" if kind == "arrays" or just else "crop"),
            "seed": flags.seed,
            "val_share": flags.val_share,
            "test_share": flags.test_share,
            "counts": {name: len(pictures.rows_of(listing, name)) for name in cifar100.SPLITS},
            "indices_sha256": cifar100.sha256(
                listing["names"], listing["ends"], labels, splits, columns["checksums"]
            ),
            "skipped": skipped,
            "class_names": class_names,
            "superclass_names": superclasses[0],
            "superclass_of_class": superclasses[1],
        }
        _write(folder, description, listing, pixels)
        _put_in_place(folder, flags.dataset_path)
    show(description, listing, found.passed, bad)
    return description


def _in_order(found: Found) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, labels int32 and splits uint8 (`pictures.PARTS`) of all pictures."""
    members = [(part, *member) for part in PARTS for member in found.parts.get(part, [])]
    number_of = {name: number for number, name in enumerate(found.classes)}
    labels = np.array([number_of[name] for _, _, name in members], np.int32)
    splits = np.array([PARTS.index(part) for part, _, _ in members], np.uint8)
    return [path for _, path, _ in members], labels, splits


def memory() -> int:
    """Bytes of memory of this machine, or of the container that this runs in."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            sizes.append(int(file.read()))
    return min(sizes)


def dataset_name(folder: str) -> str:
    """The data set's name, that of its folder."""
    name = os.path.basename(os.path.abspath(folder))
    return f"{name}-pictures" if name in RESERVED else name


@contextlib.contextmanager
def _room_for(dataset_path: str) -> Iterator[str]:
    """A folder for what is not complete, in the data set's; both go unless that gets complete."""
    # A killed run leaves the lock and what it was making.
    new = not os.path.exists(dataset_path) or {".lock", MAKING}.issuperset(os.listdir(dataset_path))
    with utils.lock_folder(dataset_path):
        folder = os.path.join(dataset_path, MAKING)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with utils.writing(folder):
                os.mkdir(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if new and not os.path.exists(os.path.join(dataset_path, "split.json")):
                shutil.rmtree(dataset_path, ignore_errors=True)


def _write(folder: str, description: dict, listing: dict, pixels: np.ndarray | None) -> None:
    """The files of a data set; split.json says what they hold."""
    description["files"] = {}
    if pixels is not None:
        for part in cifar100.SPLITS:
            rows = pictures.rows_of(listing, part)
            arrays = pixels[rows], listing["labels"][rows]
            cifar100.save(folder, part, *arrays)
            description["files"][f"{part}.npz"] = cifar100.sha256(*arrays)
    with utils.atomic_write(os.path.join(folder, pictures.LISTING), "wb") as file:
        np.savez(file, **listing)
    path = os.path.join(folder, SHEET)
    with utils.writing(path):
        sheet(description, listing, pixels).save(path)
    utils.write_json(os.path.join(folder, "split.json"), description)


def _put_in_place(folder: str, dataset_path: str) -> None:
    """Move the files of a data set to where they belong; without split.json there is none."""
    with utils.writing(dataset_path):
        for name in ("split.json", *(f"{part}.npz" for part in cifar100.SPLITS)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(dataset_path, name))
        for name in sorted(os.listdir(folder), key=lambda name: name == "split.json"):
            os.replace(os.path.join(folder, name), os.path.join(dataset_path, name))


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


# ---------------------------------------------------------------- is it complete?


def is_complete(flags: argparse.Namespace, found: Found) -> bool:
    """Whether the data set is there as the flags ask for it, of the pictures that there are.

    Raises:
        ValueError: another one is there, or the pictures have changed since.
    """
    path = os.path.join(flags.dataset_path, "split.json")
    if not os.path.exists(path):
        return False
    try:
        description = cifar100.describe(flags.dataset_path)
    except ValueError:
        if flags.overwrite:
            return False
        raise ValueError(f"{path} is damaged: give --overwrite to make it again") from None
    if not cifar100.is_own(description):
        raise ValueError(
            f"{flags.dataset_path} holds {description['dataset']} of download_cifar100.py: name "
            "another --dataset_path"
        )
    if flags.overwrite:
        return False
    mend = "give --overwrite to make it again, or another --dataset_path"
    wanted = {
        name: getattr(flags, name) for name in ("image_size", "seed", "val_share", "test_share")
    }
    wanted |= {"source": found.source, "centre": flags.centre or found.centre}
    wanted |= {
        name: getattr(flags, name) for name in ("kind", "augmentation") if getattr(flags, name)
    }
    wanted["class_names"] = found.class_names
    if flags.superclasses and found.class_names == description["class_names"]:
        superclasses = read_superclasses(flags.superclasses, found.class_names)
        wanted |= dict(zip(("superclass_names", "superclass_of_class"), superclasses, strict=True))
    for name, value in wanted.items():
        if description.get(name) != value:
            words = f"{description.get(name)}, not {value}"
            words = "differ" if isinstance(value, list) else f"is {words}"
            raise ValueError(f"{flags.dataset_path} is another data set ({name} {words}): {mend}")
    try:
        path = os.path.join(flags.dataset_path, pictures.LISTING)
        listing = cifar100.read_arrays(path, mend)
    except ValueError:
        listing = {}
    if not pictures.is_whole(listing):
        say(f"{path} is missing or damaged; writing again")
        return False
    changes = _changes(listing, description, found)
    if changes:
        raise ValueError(
            f"the pictures have changed since {flags.dataset_path} was made ({changes}): {mend}"
        )
    return not _damaged(flags.dataset_path, description)


def _changes(listing: dict, description: dict, found: Found) -> str:
    """How the pictures differ from those that a data set was made of, in words."""
    before = {pictures.path_of(listing, row): row for row in range(len(listing["ends"]))}
    number_of = {name: number for number, name in enumerate(found.classes)}
    added, changed, skipped = [], [], set(description["skipped"])
    for part, members in found.parts.items():
        for path, name in members:
            row = before.pop(path, None)
            if row is None:
                added += [path] if path not in skipped else []
                continue
            split = PARTS[listing["splits"][row]]
            moved = part != split and (part != "train" or found.parts.get(split))
            same = not moved and listing["labels"][row] == number_of[name]
            if not (same and _is_same(os.path.join(found.source, path), listing, row)):
                changed.append(path)
    kinds = {"added": added, "changed": changed, "gone": list(before)}
    return "; ".join(
        f"{len(paths):,} {kind}: {', '.join(paths[:NAMED])}{' ...' * (len(paths) > NAMED)}"
        for kind, paths in kinds.items()
        if paths
    )


def _is_same(path: str, listing: dict, row: int) -> bool:
    """Whether a file is the one that was read, by its size and time, else by its content."""
    try:
        about = os.stat(path)
        if about.st_size != listing["bytes"][row]:
            return False
        if about.st_mtime_ns == listing["times"][row]:
            return True
        return zlib.crc32(pictures.read_file(path)) == listing["checksums"][row]
    except (OSError, ValueError):
        return False


def _damaged(dataset_path: str, description: dict) -> bool:
    """Whether a file of arrays is missing or does not hold what split.json says; names it."""
    for name, expected in description["files"].items():
        try:
            arrays = cifar100.load(dataset_path, name.removesuffix(".npz"))
            whole = cifar100.sha256(*arrays) == expected
        except ValueError:
            whole = False
        if not whole:
            say(f"{os.path.join(dataset_path, name)} is missing or damaged; writing again")
            return True
    return False


# ---------------------------------------------------------------- what it looks like


def show(description: dict, listing: dict, passed: Counter, bad: dict[int, str]) -> None:
    """A table of the data set."""
    per_class = np.bincount(listing["labels"], minlength=len(description["class_names"]))
    small, large = per_class.argmin(), per_class.argmax()
    names = description["class_names"]
    sides = np.stack([listing["widths"], listing["heights"]], axis=1)
    sizes, often = np.unique(sides, axis=0, return_counts=True)
    met = f"{sizes[often.argmax()][0]}x{sizes[often.argmax()][1]}"
    if len(sizes) > 1:
        low, high = sides.min(axis=0), sides.max(axis=0)
        met = f"{low[0]} to {high[0]} wide, {low[1]} to {high[1]} high, mostly {met}"
    counts = description["counts"]
    kind = f"{description['kind']} at {description['image_size']} pixels"
    lines = {
        "classes": f"{len(names)}" + f" in {len(description['superclass_names'])} superclasses"
        * bool(description["superclass_names"]),
        "pictures": ", ".join(f"{counts[part]:,} {part}" for part in PARTS),
        "smallest class": f"{names[small]}, {per_class[small]:,}",
        "largest class": f"{names[large]}, {per_class[large]:,}",
        "sizes met": met,
        "kept as": f"{kind}; training {description['augmentation']}s them",
        "passed over": pictures.passed_over(passed) or "nothing",
        "left out": f"{_number(len(bad), 'picture')} that cannot be read: "
        + "; ".join(bad.values()) if bad else "none",
    }  # fmt: skip
    for name, text in lines.items():
        say(f"{name:<15} {text}")


def sheet(description: dict, listing: dict, pixels: np.ndarray | None, per_class=10) -> Image.Image:
    """A picture of training pictures, a class a row."""
    names, side, text = description["class_names"], 64, 220
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), 25)).astype(int))
    image = Image.new("RGB", (text + per_class * side, len(shown) * side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    train = listing["splits"] == PARTS.index("train")
    for row, label in enumerate(shown):
        name = names[label][:30].encode("latin-1", "replace").decode("latin-1")
        draw.text((4, row * side + side // 2 - 8), name, "black", font)
        for place, number in enumerate(np.flatnonzero(train & (listing["labels"] == label))):
            if place == per_class:
                break
            if pixels is None:
                path = os.path.join(description["source"], pictures.path_of(listing, number))
                size, centre = description["image_size"], description["centre"]
                picture = pictures.read_picture(path, size, centre)
            else:
                picture = pixels[number]
            thumbnail = Image.fromarray(picture).resize((side - 2, side - 2))
            image.paste(thumbnail, (text + place * side, row * side))
    return image


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    found = find(flags)
    if not is_complete(flags, found):
        make(flags, found)
        say(f"look at {os.path.join(flags.dataset_path, SHEET)}")
    else:
        say("nothing to do: the pictures are unchanged")
    say(f"{flags.dataset_path} is complete: {dataset_name(flags.dataset_path)}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
