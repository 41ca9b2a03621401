"""Get CIFAR-100, verify it, split it and write it as .npz files.

    python download_cifar100.py                                    # from the official host
    python download_cifar100.py --archive cifar-100-python.tar.gz  # from a file: .gz, .xz, .tar
    python download_cifar100.py --archive cifar-100-python         # from the unpacked folder
    python download_cifar100.py --synthetic                        # drawn, no network needed

Writes train.npz (45,000 images), val.npz (5,000), train_val.npz (50,000) and test.npz (10,000),
each with `images` uint8 [N, 32, 32, 3] (RGB) and `labels` int32 [N], and last split.json, which
says what they are: 340 MB. A second run verifies them and does nothing.
Exit status: 0 done, 1 an error, 2 wrong flags, 3 no network could be had, 128 + N signal N.
A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import utils  # first: it says in one line which package is missing
import cifar100
from utils import say

import numpy as np
from six.moves import cPickle, urllib

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"  # in the archive
PART = f"{FOLDER}.tar.gz.part"  # of a download
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SHA256 = {
    "train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
    "test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
    "meta": "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9",
}

CLASSES, SUPERCLASSES = 100, 20
TRAIN_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS = 500, 50, 100  # train still holds val here
MAX_BYTES = 200_000_000  # of a download, and of what is read of an archive (unpacked: 186 MB)

TIMEOUT = 30.0  # seconds, of every network operation
PAUSES = (1, 4, 15, 30)  # seconds before another try; as many tries in a row may bring nothing
RETRIED = (206, 408, 416, 429, 500, 502, 503, 504)  # answers that may be better next time
PROGRESS_INTERVAL = 10.0  # seconds


class Interrupted(ValueError):
    """A download stopped for a reason that may pass."""


class NoNetwork(Interrupted):
    """The host could not be reached at all."""


class Dataset(NamedTuple):
    """Images uint8 [N, 32, 32, 3], labels int32 [N], and what the labels mean."""

    name: str  # "cifar100" or "synthetic"
    train_images: np.ndarray  # with the validation images, in the original order
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    superclass_names: list[str]
    superclass_of_class: list[int]


NAMES = Dataset._fields[-3:]  # stand in split.json as well

# ---------------------------------------------------------------- flags


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Where the data come from and go; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--dataset_path", type=utils.path, default="data/cifar100",
        help="where the files go: 340 MB, a download 170 MB (default: data/cifar100)")  # fmt: skip
    source("--archive", type=utils.path,
           help="read this .tar.gz, .tar.xz, .tar or folder instead of downloading")  # fmt: skip
    source("--url", default=URL, help="download from here (default: %(default)s)")
    source("--synthetic", action="store_true", help="draw images: 100 classes in 20 superclasses")
    add("--seed", type=utils.number(int, low=0), default=0,
        help="of the split and of the drawn images (default: 0)")  # fmt: skip
    flags = parser.parse_args(argv)
    if "" in (flags.archive, flags.dataset_path):
        parser.error("a path is empty: give it a value, or leave the flag out")
    if not re.match(r"https?://[^/]", flags.url):
        parser.error(f"argument --url: expected http://... or https://..., got {flags.url!r}")
    return flags


# ---------------------------------------------------------------- download


def download(url: str, part: Path) -> None:
    """Download `url` to the file `part`, going on from what is there already.

    Raises:
        NoNetwork: the first connection failed; at once.
        ValueError: the server refuses, or several tries in a row brought nothing.
    """
    failures = 0
    while True:
        before = _size(part)
        try:
            return _transfer(url, part)
        except Interrupted as error:
            if failures == 0 and isinstance(error, NoNetwork):
                raise
            failures = 1 if _size(part) > before else failures + 1
            if failures > len(PAUSES):
                more = f"run the same command again to go on after {_size(part):,} bytes"
                raise ValueError(f"{error}; gave up after {failures} tries: {more}") from None
            pause = PAUSES[failures - 1]
            say(f"{error}; trying again in {pause} s")
            time.sleep(pause)


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what one connection brings; returns only when the file is whole."""
    have = _size(part)
    with _connect(url, have) as response:
        answer = f"{url} answered {response.status} {response.reason}"
        content_range = response.headers.get("Content-Range", "")
        rest = re.fullmatch(rf"bytes {have}-\d+/(\d+)", content_range)
        if response.status == 206 and rest:
            start, total = have, int(rest[1])
        elif response.status == 200:  # all of it, whatever was asked for
            start, total = 0, response.length
        elif response.status == 416 and content_range == f"bytes */{have}":
            return
        elif response.status in RETRIED:
            if response.status in (206, 416):  # another range: what is here is of another file
                part.unlink(missing_ok=True)
            raise Interrupted(answer)
        else:
            raise ValueError(f"{answer}, not 200 or 206: check --url, or give --archive FILE")
        say(f"receiving {part} from byte {start:,} on")
        with utils.writing(part), part.open("ab" if start else "wb") as file:
            for block in _blocks(response, url, start, total):
                file.write(block)
                if file.tell() > MAX_BYTES:
                    raise ValueError(f"{url} brings more than {MAX_BYTES:,} bytes: check --url")
    if total not in (None, _size(part)):
        raise Interrupted(f"{url} ended early, after {_size(part):,} of {total:,} bytes")


def _connect(url: str, have: int) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """The answer, of whatever status, to a request for what comes after `have` bytes."""
    headers = {"User-Agent": "download_cifar100"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, ValueError, http.client.HTTPException) as error:
        unreached = isinstance(error, urllib.error.URLError)
        reason = error.reason if unreached else error
        wrong = isinstance(reason, (ValueError, http.client.InvalidURL))  # or a bad certificate
        kind = ValueError if wrong else NoNetwork if unreached else Interrupted
        raise kind(
            f"{url} cannot be reached ({reason}): check --url and the network, or give "
            "--archive FILE, or --synthetic for drawn images"
        ) from None


def _blocks(response, url: str, have: int, total: int | None) -> Iterator[bytes]:
    """The rest of the file in blocks; prints how far it is. A cut connection is Interrupted."""
    here, started, shown = have, time.monotonic(), time.monotonic()
    while True:
        try:
            block = response.read1(65_536)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(f"the connection to {url} was cut ({error!r})") from None
        if not block:
            return
        yield block
        here += len(block)
        now = time.monotonic()
        if here == total or now - shown >= PROGRESS_INTERVAL:
            shown, rate = now, (here - have) / max(now - started, 1e-6)
            line = f"{here / 1e6:.1f} MB, {rate / 1e3:,.0f} kB/s"
            if total is not None:
                minutes, seconds = divmod(round((total - here) / rate), 60)
                line += f", of {total / 1e6:.1f} MB, {minutes}:{seconds:02d} left"
            say(line)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------- archive


def read_archive(path: Path) -> Dataset:
    """Read, verify and decode the official .tar.gz, a .tar.xz or .tar of it, or what it unpacks to.

    Raises:
        ValueError: it is no such archive, or a digest is not the official one.
    """
    try:
        blobs = _read_members(path)
    except MemoryError:
        raise
    except Exception as error:  # tarfile, gzip and lzma raise a dozen kinds on damaged bytes
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): expected {FOLDER}/train, "
            "test and meta in a whole .tar.gz, .tar.xz, .tar or folder; get it again"
        ) from None
    for kind, official in (("md5", MD5), ("sha256", SHA256)):
        for name, expected in official.items():
            received = hashlib.new(kind, blobs[name], usedforsecurity=False).hexdigest()
            if received != expected:
                raise ValueError(
                    f"{path}: {name} is not the official one (expected {kind} {expected}, got "
                    f"{received}): get it again"
                )
    meta, test, train = (load_pickle(blobs.pop(name)) for name in ("meta", "test", "train"))
    pairs = sorted({*zip(train["fine_labels"], train["coarse_labels"], strict=True)})  # by class
    names = meta["fine_label_names"], meta["coarse_label_names"]
    return Dataset("cifar100", *_decode(train), *_decode(test), *names, [s for _, s in pairs])


def _read_members(path: Path) -> dict[str, bytes]:
    """The official files by name, in memory."""
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        return {name: _head(folder / name) for name in MD5}
    data = _head(path)
    unpack = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}.get(data[:2])
    if unpack:
        data = _head(io.BytesIO(data), unpack)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        entries = {entry.name.removeprefix("./"): entry for entry in tar}
        files = {name: tar.extractfile(entries[f"{FOLDER}/{name}"]) for name in MD5}
        return {name: file.read(MAX_BYTES) for name, file in files.items()}


def _head(source: Path | IO, unpack: Callable = open) -> bytes:
    """What a file holds, up to a limit: a bomb must not fill the memory."""
    with unpack(source, "rb") as stream:
        return stream.read(MAX_BYTES)


def load_pickle(data: bytes) -> dict:
    """Unpickle an official file, whose arrays and strings Python 2 wrote."""
    return _Unpickler(io.BytesIO(data), encoding="latin-1").load()


class _Unpickler(cPickle.Unpickler):
    """Knows the three names in the official files, so that a pickle calls nothing else."""

    KNOWN = (("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"))

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.KNOWN:
            raise ValueError(f"a pickle asks for {module}.{name}: get the archive again")
        return super().find_class(module, name)


def _decode(batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of one pickle."""
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # stored by channels
    return np.ascontiguousarray(images), np.array(batch["fine_labels"], np.int32)


# ---------------------------------------------------------------- synthetic images

# The place of each class in the list of superclasses (place // 5) and their details (place % 5):
# a fixed shuffle, so that neighbouring labels have nothing in common. 37 and 100 are coprime.
PLACE = (37 * np.arange(100) + 11) % 100

# A superclass is a grating: 5 orientations x 4 pairs of colours. Its stripes' channels move with or
# against one another, which standardizing each channel leaves as it is.
STRIPES = np.array(
    [
        [[0.25, 0.22, 0.25], [0.75, 0.78, 0.72]],  # dark and light
        [[0.25, 0.30, 0.75], [0.80, 0.72, 0.25]],  # blue and yellow
        [[0.25, 0.70, 0.28], [0.75, 0.30, 0.72]],  # green and magenta
        [[0.78, 0.28, 0.30], [0.25, 0.70, 0.72]],  # red and cyan
    ],
    np.float32,
)
PERIODS = np.array([5.0, 9.0], np.float32)  # pixels
SPOTS = np.array(  # the colours of the details: red, green, blue, white, black
    [[0.95, 0.1, 0.1], [0.1, 0.9, 0.1], [0.15, 0.15, 1.0], [1, 1, 1], [0, 0, 0]], np.float32
)


def synthetic(seed: int) -> Dataset:
    """The whole drawn data set, of the size of CIFAR-100; the same seed gives the same bytes."""
    superclass, detail = np.divmod(PLACE, 5)
    parts = []
    for part, per_class in enumerate((TRAIN_PER_CLASS, TEST_PER_CLASS)):
        rng = np.random.Generator(np.random.PCG64([seed, part]))
        labels = rng.permutation(np.repeat(np.arange(100, dtype=np.int32), per_class))
        parts += [draw_synthetic(labels, [seed, part, 1]), labels]
    return Dataset(
        "synthetic",
        *parts,
        class_names=[f"super{s:02d}_class{d}" for s, d in zip(superclass, detail, strict=True)],
        superclass_names=[f"super{s:02d}" for s in range(SUPERCLASSES)],
        superclass_of_class=superclass.tolist(),
    )


def draw_synthetic(labels: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Draw uint8 images [N, 32, 32, 3] of the classes `labels` [N].

    The superclass is a grating (orientation, period, two colours), the class within it a spot
    (shape, colour). Everything else is drawn anew for each image and does not depend on its label.
    An image and its mirror image are equally likely, so flipping does not change what is learned.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chunks = np.split(np.asarray(labels), range(1000, len(labels), 1000))  # bounds the memory
    return np.concatenate([_draw_chunk(chunk, rng) for chunk in chunks])


def _draw_chunk(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(labels), 1, 1)).astype(np.float32)

    superclass, detail = np.divmod(PLACE[labels], 5)
    colours, direction = np.divmod(superclass, 5)
    y, x = np.mgrid[:32, :32].astype(np.float32) - 15.5

    # Orientations from 0 to 90 degrees, of either sign: mirrored, they are the same superclass.
    angle = np.radians(22.5 * direction, dtype=np.float32)[:, None, None] + uniform(-0.1, 0.1)
    angle *= np.sign(uniform(-1, 1))
    period = PERIODS[(direction + colours) % 2][:, None, None] * uniform(0.93, 1.07)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period) + uniform(0, 6.3))
    first, second = np.moveaxis(STRIPES[colours], 1, 0)[:, :, None, None]  # [N, 1, 1, 3] each
    images = first + (second - first) * (0.5 + 0.5 * wave[..., None])  # [N, 32, 32, 3]

    # The spot is small and faint, so that the superclass is learned first, as in photographs, and
    # classes of one superclass look alike to a network while it decides on groups.
    radius = uniform(3.0, 4.0)
    # Within 4 pixels of the border no part of it is needed: a shifted crop keeps it whole.
    u = np.abs(x - uniform(-5.5, 5.5)) / radius
    v = np.abs(y - uniform(-5.5, 5.5)) / radius
    far = np.hypot(u, v)
    shapes = [  # every one its own mirror image
        far < 0.95,  # disc
        np.abs(far - 0.8) < 0.25,  # ring
        np.maximum(u, v) < 0.85,  # square
        (np.minimum(u, v) < 0.3) & (np.maximum(u, v) < 1.05),  # upright cross
        (np.abs(u - v) < 0.4) & (np.maximum(u, v) < 1),  # diagonal cross
    ]
    spot = np.choose(detail[:, None, None], shapes)
    # The colour turns with the superclass, so that neither shape nor colour alone is a grouping.
    paint = SPOTS[(detail + superclass) % 5][:, None, None]
    images += 0.35 * spot[..., None] * (paint - images)

    images = 0.5 + uniform(0.4, 1.0)[..., None] * (images - 0.5) + uniform(-0.15, 0.15)[..., None]
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    images += uniform(0.06, 0.16)[..., None] * noise
    return (255 * images.clip(0, 1)).round().astype(np.uint8)


# ---------------------------------------------------------------- split and files


def split_indices(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation images, VAL_PER_CLASS of every class.

    The keys are the bit generator's raw output, which NumPy promises never to change.
    """
    keys = np.random.PCG64(seed).random_raw(len(labels))
    by_class = np.lexsort((keys, labels)).reshape(CLASSES, -1)  # shuffled within each class
    val, train = np.split(by_class, [VAL_PER_CLASS], axis=1)
    return np.sort(train, axis=None), np.sort(val, axis=None)


def write_split(folder: Path, dataset: Dataset, seed: int) -> None:
    """Write the four .npz files, and last split.json, which says what they hold."""
    train, val = split_indices(dataset.train_labels, seed)
    whole = dataset.train_images, dataset.train_labels
    parts = {
        "train": [array[train] for array in whole],
        "val": [array[val] for array in whole],
        "train_val": whole,
        "test": (dataset.test_images, dataset.test_labels),
    }
    split = {
        "dataset": dataset.name,
        "seed": seed,
        "counts": {name: len(labels) for name, (_, labels) in parts.items()},
        "indices_sha256": cifar100.sha256(train.astype("<i8"), val.astype("<i8")),
        "files": {f"{name}.npz": cifar100.sha256(*arrays) for name, arrays in parts.items()},
        **{key: getattr(dataset, key) for key in NAMES},
    }
    for name, (images, labels) in parts.items():
        cifar100.save(folder, name, images, labels)
    with utils.atomic_write(folder / "split.json") as file:
        file.write(json.dumps(split, indent=1) + "\n")


def read_split(folder: Path) -> dict | None:
    """The content of split.json; None where it is missing or damaged."""
    try:
        split = utils.read_json(folder / "split.json")
        whole = (
            split["dataset"] in ("cifar100", "synthetic")
            and type(split["seed"]) is int
            and split["files"].keys() == {f"{name}.npz" for name in cifar100.SPLITS}
            and [len(split[key]) for key in NAMES] == [CLASSES, SUPERCLASSES, CLASSES]
            and len(split["indices_sha256"]) == 64
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return split if whole else None


def damaged_files(folder: Path, split: dict) -> list[str]:
    """Names of the .npz files that are missing or do not hold what split.json says."""

    def is_whole(name: str) -> bool:
        try:
            return cifar100.sha256(*cifar100.load(folder, name)) == split["files"][f"{name}.npz"]
        except ValueError:
            return False

    return [f"{name}.npz" for name in cifar100.SPLITS if not is_whole(name)]


# ---------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status."""
    flags = parse_flags(argv)
    try:
        prepare(flags)
    except NoNetwork as error:
        print(f"{utils.program()}: error: {error}", file=sys.stderr)
        return 3
    except MemoryError:
        raise ValueError("out of memory: 1 GB must be free") from None
    return 0


def prepare(flags: argparse.Namespace) -> None:
    """Leave `flags.dataset_path` complete and verified, with no more work than that needs."""
    folder = Path(flags.dataset_path)
    name = "synthetic" if flags.synthetic else "cifar100"
    split, damaged = read_split(folder), []
    with contextlib.suppress(ValueError):
        if cifar100.is_own(cifar100.describe(folder)):
            raise OSError(
                f"{folder} holds a data set that make_dataset.py made: name another --dataset_path"
            )
    if split:
        if (split["dataset"], split["seed"]) != (name, flags.seed):
            flag = "--synthetic" if split["dataset"] == "synthetic" else "no --synthetic"
            raise ValueError(
                f"{folder} holds {split['dataset']}, seed {split['seed']}, not {name}, seed "
                f"{flags.seed}: give {flag} and --seed {split['seed']}, or another --dataset_path"
            )
        damaged = damaged_files(folder, split)
        if not damaged:
            _remove_download(folder, flags)  # where one was killed right before it did
            say(f"{folder} is complete: {name}, seed {flags.seed}, verified; nothing to do")
            return
        say(f"{folder}: {', '.join(damaged)} missing or damaged; writing again")
    with utils.lock_folder(folder):
        if flags.synthetic:
            say("drawing synthetic images (results on them are not results on CIFAR-100)")
            dataset = synthetic(flags.seed)
        elif split and not {"train_val.npz", "test.npz"} & set(damaged):  # which hold all of it
            arrays = *cifar100.load(folder, "train_val"), *cifar100.load(folder, "test")
            dataset = Dataset(name, *arrays, *(split[key] for key in NAMES))
        elif flags.archive:
            say(f"reading {flags.archive}")
            dataset = read_archive(Path(flags.archive))
        else:
            dataset = _read_url(flags.url, folder / PART)
        write_split(folder, dataset, flags.seed)
        _remove_download(folder, flags)
    say(f"{folder} is complete: {name}, seed {flags.seed}")


def _remove_download(folder: Path, flags: argparse.Namespace) -> None:
    """169 MB that nothing needs any more, unless what is there is drawn."""
    if not flags.synthetic:
        with contextlib.suppress(OSError):
            (folder / PART).unlink()


def _read_url(url: str, part: Path) -> Dataset:
    """The data set, downloaded to the file `part`, which stays if it is good."""
    say(f"downloading {url}; a download that was stopped goes on where it ended")
    if url == URL:
        say("169 MB; this host was slow in 2026 (50 minutes reported): --archive FILE reads a copy")
    download(url, part)
    try:
        return read_archive(part)
    except ValueError:
        part.unlink()  # so that the next run does not meet it again
        raise


if __name__ == "__main__":
    utils.run_main(main)
