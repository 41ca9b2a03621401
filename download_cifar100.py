"""Get CIFAR-100, verify it, split it and write it as .npz files.

    python download_cifar100.py                                    # from the official host
    python download_cifar100.py --archive cifar-100-python.tar.gz  # from a file: .gz, .xz, .tar
    python download_cifar100.py --archive cifar-100-python         # from the unpacked folder
    python download_cifar100.py --synthetic                        # drawn, no network needed

Writes train.npz (45,000 images), val.npz (5,000), train_val.npz (50,000) and test.npz (10,000),
each with `images` uint8 [N, 32, 32, 3] (RGB) and `labels` int32 [N], and last split.json, which
says what they are: 340 MB. A second run verifies them and does nothing.
Exit status: 0 done, 1 an error, 2 wrong flags, 3 no network could be had, 128 + N stopped by
signal N.
A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import argparse
import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import pickletools
import re
import signal
import ssl
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

try:
    import numpy as np
    from six.moves import cPickle, urllib
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"download_cifar100.py: error: this Python lacks {error.name or 'NumPy'}: "
        f"{sys.executable} -m pip install numpy six, or use .venv/bin/python of quickstart.sh"
    )

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_NAME = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
MEMBER_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SLOW_HOST = (
    "169 MB. The official host was slow in 2026 (about 55 kB/s reported: about 50 minutes). "
    "If you have the archive elsewhere, --archive FILE reads it instead; a download that was "
    "stopped goes on where it ended."
)

CLASSES, SUPERCLASSES = 100, 20
TRAIN_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS = 500, 50, 100  # train still holds val here
MAX_BYTES = 200_000_000  # of a download, and of an unpacked archive (the real one: 186 MB)
NEEDED = "340 MB for the files and, without --archive, 170 MB for the download"

TIMEOUT = 30.0  # seconds, of every network operation
PAUSES = (1, 4, 15, 30)  # seconds before another try; as many tries in a row may fail
GOOD_PROGRESS = 1_000_000  # bytes that a try must bring to count as a success
BLOCK = 65_536  # bytes
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
PROGRESS_INTERVAL = 5.0  # seconds between progress lines where there is no terminal


class DataError(ValueError):
    """The data set could not be had; the message says why and what to do."""

    status = 1


class UsageError(DataError):
    """Wrong flags."""

    status = 2


class Interrupted(DataError):
    """A download stopped for a reason that may pass."""


class NoNetwork(Interrupted):
    """The host could not be reached at all."""

    status = 3


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


def say(text: str, end: str = "\n") -> None:
    """Prints at once. Where nobody can read it any more, or the disk is full, the work goes on."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end


# Download ----------------------------------------------------------------------------------------


def download(url: str, target: Path, md5: str | None = None) -> None:
    """Downloads `url` to `target` by way of `target`.part, going on from what is there already.

    Raises NoNetwork at once where the first connection fails, and DataError where the server
    refuses, where several tries in a row fail or where the bytes do not have this md5.
    """
    part = target.with_name(target.name + ".part")
    failures, connected = 0, False
    while True:
        before = _size(part)
        try:
            _transfer(url, part)
            break
        except Interrupted as error:
            connected = connected or not isinstance(error, NoNetwork)
            if not connected:
                raise
            failures = 1 if _size(part) - before >= GOOD_PROGRESS else failures + 1
            if failures > len(PAUSES):
                raise DataError(
                    f"{error}; gave up after {failures} tries; {part} holds {_size(part):,} bytes; "
                    "run the same command again to go on from there"
                ) from error
            pause = PAUSES[failures - 1]
            say(f"{error}; trying again in {pause} s")
            time.sleep(pause)
    if md5 and (received := _md5(part.read_bytes())) != md5:
        part.unlink()
        raise DataError(
            f"{url} brought other bytes than it should; expected md5 {md5}; received {received}; "
            "they were deleted: run again, or give --archive FILE"
        )
    os.replace(part, target)


def _transfer(url: str, part: Path) -> None:
    """Appends to `part` what one connection brings; returns only when the file is whole."""
    have = _size(part)
    response = _connect(url, part)
    if response is None:
        return
    with response:
        start, total = 0, response.length  # a plain 200 starts from 0, whatever was asked for
        if response.status == 206:
            match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            start, total = (int(match[1]), int(match[2])) if match else (-1, None)
        if start not in (0, have):
            part.unlink(missing_ok=True)  # without it the next try asks for the whole
            raise Interrupted(
                f"{url} answered with another range; expected bytes from {have:,}; "
                f"received {response.headers.get('Content-Range', 'no Content-Range')!r}"
            )
        size = "of unknown size" if total is None else f"{total / 1e6:.1f} MB"
        say(f"{part}: {size}, {start / 1e6:.1f} MB of it already here")
        with part.open("ab" if start else "wb") as file:
            for block in _shown(_blocks(response, url), start, total):
                file.write(block)
                if file.tell() > MAX_BYTES:
                    file.truncate(0)
                    raise DataError(
                        f"{url} is no CIFAR-100 archive; expected at most {MAX_BYTES:,} bytes; "
                        "received more; check --url"
                    )
    if total is not None and _size(part) != total:
        raise Interrupted(
            f"the connection to {url} ended early; expected {total:,} bytes; "
            f"received {_size(part):,}"
        )


def _connect(url: str, part: Path) -> http.client.HTTPResponse | None:
    """Asks for the bytes that `part` lacks; None where the server says that it lacks none."""
    headers = {"User-Agent": "download_cifar100", "Accept-Encoding": "identity"}
    if have := _size(part):
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
                return None
        answer = f"{url} answered {error.code} {error.reason}"
        if error.code == 416 and have:
            part.unlink()  # longer than the file there, so it is another file's
        elif error.code not in (408, 429, 500, 502, 503, 504):
            raise DataError(
                f"{answer}; expected 200 or 206; check --url, or give --archive FILE"
            ) from error
        raise Interrupted(answer) from error
    except urllib.error.URLError as error:
        kind = DataError if isinstance(error.reason, ssl.SSLCertVerificationError) else NoNetwork
        raise kind(
            f"{url} cannot be reached ({error.reason}); expected a network connection; check it, "
            "or give --archive FILE, or --synthetic for drawn images"
        ) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise DataError(f"{url!r} is no address ({error}); check --url") from error
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"{url} did not answer properly ({error!r})") from error


def _blocks(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The body in blocks. Only what the network raises becomes Interrupted, not a full disk."""
    try:
        while block := response.read1(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection to {url} was cut ({error!r})") from error


def _shown(blocks: Iterator[bytes], have: int, total: int | None) -> Iterator[bytes]:
    """Passes blocks on and prints how far the download is: one line on a terminal, rewritten."""
    terminal = sys.stdout.isatty()
    end = "" if terminal else "\n"
    started = shown = time.monotonic()
    here = have
    try:
        for block in blocks:
            yield block
            here += len(block)
            now = time.monotonic()
            if here == total or now - shown >= (0.2 if terminal else PROGRESS_INTERVAL):
                shown = now
                rate = (here - have) / max(now - started, 1e-6)
                line = f"{here / 1e6:.1f} MB, {rate / 1e3:,.0f} kB/s"
                if total is not None:
                    minutes, seconds = divmod(round((total - here) / rate), 60)
                    line += f", of {total / 1e6:.1f} MB, {minutes}:{seconds:02d} left"
                say("\r" + line.ljust(72) if terminal else line, end=end)
    finally:
        if terminal:
            say("")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Makes sure that no other process makes `target` as well; DataError where one does.

    The lock is the system's, which frees it however the process ends. Where the file system has
    none, the work goes on without.
    """
    lock = target.with_name(target.name + ".lock")
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        if not free:
            raise DataError(
                f"another process is making {target}: wait for it, end it, or give another "
                "--dataset_path"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# Archive -----------------------------------------------------------------------------------------


def read_archive(path: Path) -> Dataset:
    """Reads, verifies and decodes the official archive, never to the disk.

    It may be a .tar.gz, .tar.xz or .tar, the unpacked folder or the folder that this lies in.
    Raises DataError where it is no such archive, where an entry is not harmless, where a member's
    md5 is not the official one, or where the content is not that of CIFAR-100.
    """
    blobs = _read_members(Path(path))
    for name, expected in MEMBER_MD5.items():
        if (received := _md5(blobs[name])) != expected:
            raise DataError(
                f"{path}: {name} is not the official one; expected md5 {expected}; "
                f"received {received}; get the archive again"
            )
    meta = load_pickle(blobs.pop("meta"))
    test_images, *test_labels = _decode(load_pickle(blobs.pop("test")), "test", TEST_PER_CLASS)
    train_images, *train_labels = _decode(load_pickle(blobs.pop("train")), "train", TRAIN_PER_CLASS)
    pairs = np.unique(np.concatenate([train_labels, test_labels], axis=1), axis=1)  # [2, classes]
    if pairs.shape[1] != CLASSES:
        raise DataError(f"expected one superclass per class; received {pairs.shape[1]} pairs")
    return Dataset(
        "cifar100",
        train_images,
        train_labels[0],
        test_images,
        test_labels[0],
        _names(meta, "fine_label_names", CLASSES),
        _names(meta, "coarse_label_names", SUPERCLASSES),
        pairs[1].tolist(),  # sorted by class, so one entry per class in order
    )


def _read_members(path: Path) -> dict[str, bytes]:
    """The bytes of train, test and meta, by name."""
    blobs = _read_folder(path) if path.is_dir() else _read_tar(path)
    if missing := [name for name in MEMBER_MD5 if name not in blobs]:
        raise DataError(
            f"{path} is not CIFAR-100 (Python version); expected cifar-100-python/"
            f"{{train,test,meta}}; {', '.join(missing)} not found; check the file"
        )
    return blobs


def _read_folder(path: Path) -> dict[str, bytes]:
    """The files of an unpacked archive that are there, by links as well."""
    inner = path / "cifar-100-python"
    folder = inner if inner.is_dir() else path
    blobs, left = {}, MAX_BYTES
    for name in MEMBER_MD5:
        if (folder / name).is_file():  # a pipe or a device could be without an end
            with (folder / name).open("rb") as file:
                blobs[name] = _read_limited(file, path, left)
            left -= len(blobs[name])
    return blobs


def _read_tar(path: Path) -> dict[str, bytes]:
    """The members of an archive that are there."""
    blobs: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_decompress(path)), mode="r:") as tar:
            for entry in tar:
                name = _checked_name(entry, path)
                if name in blobs:
                    raise DataError(f"{path} holds {name} twice; get the archive again")
                if name in MEMBER_MD5:
                    blobs[name] = tar.extractfile(entry).read()
    except DataError:
        raise
    except Exception as error:  # tarfile, gzip and lzma raise a dozen kinds on damaged bytes
        raise DataError(
            f"{path} cannot be read ({error!r}); expected a whole .tar.gz, .tar.xz or .tar; "
            "get the archive again"
        ) from error
    return blobs


def _decompress(path: Path) -> bytes:
    """The tar within, or the file itself where it is not packed."""
    if not path.is_file():
        raise DataError(
            f"{path} is no file; expected {ARCHIVE_NAME}, a .tar.xz or .tar of it, or the folder "
            "that it unpacks to"
        )
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as stream:
                return _read_limited(stream, path, MAX_BYTES)
        if magic == b"\xfd7zXZ\x00":
            with lzma.LZMAFile(file) as stream:
                return _read_limited(stream, path, MAX_BYTES)
        return _read_limited(file, path, MAX_BYTES)


def _read_limited(stream: IO[bytes], path: Path, limit: int) -> bytes:
    """All bytes; a bomb ends in an error instead of filling the memory."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{path} is no CIFAR-100: it unpacks to more than {MAX_BYTES:,} bytes")
    return data


def _checked_name(entry: tarfile.TarInfo, path: Path) -> str:
    """The entry's name within cifar-100-python/, or "" for an entry without interest."""
    plain = entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    if not plain or entry.issparse() or entry.name.startswith("/") or ".." in entry.name.split("/"):
        raise DataError(
            f"{path} is refused for its entry {entry.name[:80]!r}; expected plain files and "
            "folders within cifar-100-python/; get the archive again"
        )
    folder, _, name = entry.name.removeprefix("./").partition("/")
    return name if folder == "cifar-100-python" and entry.isreg() else ""


def load_pickle(data: bytes) -> dict:
    """Unpickles a dict of plain values and byte arrays; any other content is a DataError."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" in opcode.name and argument > len(data):
                raise DataError("its memo is larger than itself")  # and would be allocated
        loaded = _Unpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # on damaged bytes an unpickler may raise anything at all
        raise DataError(
            f"a pickle is refused ({error!r}); expected a dict of plain values and byte arrays; "
            "get the archive again"
        ) from error
    if type(loaded) is not dict:
        raise DataError(f"a pickle holds a {type(loaded).__name__}; expected a dict")
    return {k: v.array if isinstance(v, _ByteArray) else v for k, v in loaded.items()}


class _Byte:
    """Stands in for numpy.dtype: the only element type in the archive is uint8."""

    def __init__(self, code: str, *_: object) -> None:
        if code != "u1":
            raise DataError(f"expected an array of u1; received {code!r}")

    def __setstate__(self, state: tuple) -> None:
        """Byte order and alignment say nothing about bytes."""


class _ByteArray:
    """Stands in for numpy.ndarray, whose own __setstate__ is C code that trusts its input."""

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, raw = state
        if not isinstance(dtype, _Byte) or fortran_order:
            raise DataError("expected an array of bytes in C order")
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # str: Python 2 wrote it
        self.array = np.frombuffer(raw, np.uint8).reshape(shape)


class _Unpickler(cPickle.Unpickler):
    """Knows four names and no other, so that a pickle cannot call anything."""

    def find_class(self, module: str, name: str) -> object:
        known = {
            ("numpy", "dtype"): _Byte,
            ("numpy", "ndarray"): _ByteArray,
            ("numpy.core.multiarray", "_reconstruct"): _ByteArray,
            ("numpy._core.multiarray", "_reconstruct"): _ByteArray,
            ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
        }
        if (module, name) not in known:
            raise DataError(f"it asks for {module}.{name}")
        return known[module, name]


def _decode(batch: dict, part: str, per_class: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3], classes [N] and superclasses [N] of one pickle."""
    count = CLASSES * per_class
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.shape != (count, 3072):
        raise DataError(
            f"{part}: expected data [{count}, 3072]; received {getattr(data, 'shape', type(data))}"
        )
    fine = _labels(batch, part, "fine_labels", CLASSES, per_class)
    coarse = _labels(
        batch, part, "coarse_labels", SUPERCLASSES, per_class * CLASSES // SUPERCLASSES
    )
    images = data.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)  # stored channel by channel
    return np.ascontiguousarray(images), fine, coarse


def _labels(batch: dict, part: str, key: str, classes: int, per_class: int) -> np.ndarray:
    values = batch.get(key)
    if not isinstance(values, list) or not {*map(type, values)} <= {int}:
        raise DataError(f"{part}: expected {key} to be a list of whole numbers")
    present, counts = np.unique(values, return_counts=True)
    if present.tolist() != list(range(classes)) or (counts != per_class).any():
        raise DataError(
            f"{part}: expected {per_class} images of each of {classes} in {key}; received "
            f"{min(counts, default=0)} to {max(counts, default=0)} of each of {len(present)}"
        )
    return np.array(values, np.int32)


def _names(meta: dict, key: str, count: int) -> list[str]:
    names = meta.get(key)
    if not isinstance(names, list) or not {*map(type, names)} <= {str}:
        raise DataError(f"meta: expected {key} to be a list of names")
    if not len(names) == len(set(names)) == count:
        raise DataError(f"meta: expected {count} different {key}; received {len(set(names))}")
    return names


# Synthetic images --------------------------------------------------------------------------------

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
    """The whole drawn data set, the same size as CIFAR-100; the same seed gives the same bytes."""
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
    """Draws uint8 images [N, 32, 32, 3] of the classes `labels` [N].

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


# Split and files ---------------------------------------------------------------------------------


def split_indices(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation images, VAL_PER_CLASS of every class.

    The keys are the bit generator's raw output, which NumPy promises never to change.
    """
    keys = np.random.PCG64(seed).random_raw(len(labels))
    by_class = np.lexsort((keys, labels)).reshape(CLASSES, -1)  # shuffled within each class
    val, train = np.split(by_class, [VAL_PER_CLASS], axis=1)
    return np.sort(train, axis=None), np.sort(val, axis=None)


def write_split(folder: Path, dataset: Dataset, seed: int) -> dict:
    """Writes the four .npz files and then split.json, whose content it returns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, val = split_indices(dataset.train_labels, seed)
    images, labels = dataset.train_images, dataset.train_labels
    parts = {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "train_val": (images, labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    split = {
        "dataset": dataset.name,
        "seed": seed,
        "counts": {name: len(part_labels) for name, (_, part_labels) in parts.items()},
        "indices_sha256": _sha256(train.astype("<i8"), val.astype("<i8")),
        "files": {f"{name}.npz": _sha256(*arrays) for name, arrays in parts.items()},
        "class_names": dataset.class_names,
        "superclass_names": dataset.superclass_names,
        "superclass_of_class": dataset.superclass_of_class,
    }
    with _alone(folder / "split.json"):
        for name, (part_images, part_labels) in parts.items():
            with _replacing(folder / f"{name}.npz") as file:
                np.savez(file, images=part_images, labels=part_labels)
        with _replacing(folder / "split.json") as file:
            file.write((json.dumps(split, indent=1) + "\n").encode())
    return split


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is whole and on the disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read_split(folder: Path) -> dict | None:
    """The content of split.json; None where it is missing or damaged."""
    try:
        split = json.loads((Path(folder) / "split.json").read_text("utf-8"))
        whole = (
            split["dataset"] in ("cifar100", "synthetic")
            and type(split["seed"]) is int
            and split["files"].keys() == {f"{name}.npz" for name in split["counts"]}
            and set(split["counts"]) == {"train", "val", "train_val", "test"}
            and isinstance(split["indices_sha256"], str)
            and len(split["class_names"]) == len(split["superclass_of_class"]) == CLASSES
            and len(split["superclass_names"]) == SUPERCLASSES
        )
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return split if whole else None


def damaged_files(folder: Path, split: dict) -> list[str]:
    """Names of the .npz files that are missing or do not hold what split.json says."""
    return [
        name
        for name, expected in split["files"].items()
        if (arrays := _load(Path(folder) / name)) is None or _sha256(*arrays) != expected
    ]


def _load(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of an .npz file; None where it cannot be read or has other shapes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (MemoryError, PermissionError):
        raise  # of this machine, not of the file
    except Exception:  # zipfile, zlib and NumPy raise a dozen kinds on damaged bytes
        return None
    whole = images.dtype == np.uint8 and images.shape == (len(images), 32, 32, 3)
    return (images, labels) if whole and labels.dtype == np.int32 else None


# Command -----------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Leaves `args.dataset_path` complete and verified, with no more work than that needs."""
    folder = Path(args.dataset_path)
    name = "synthetic" if args.synthetic else "cifar100"
    split, damaged = read_split(folder), []
    if split:
        if (split["dataset"], split["seed"]) != (name, args.seed):
            flag = "--synthetic" if split["dataset"] == "synthetic" else "no --synthetic"
            raise DataError(
                f"{folder} holds another data set, which was left alone; expected {name}, seed "
                f"{args.seed}; received {split['dataset']}, seed {split['seed']}; give {flag} and "
                f"--seed {split['seed']} to use it, or another --dataset_path"
            )
        damaged = damaged_files(folder, split)
        if not damaged:
            say(f"{folder} is complete: {name}, seed {args.seed}, verified; nothing to do")
            return
        say(f"{folder}: {', '.join(damaged)} missing or damaged; writing again")
    if args.synthetic:
        say("drawing synthetic images (results on them are not results on CIFAR-100)")
        split = write_split(folder, synthetic(args.seed), args.seed)
    elif split and not {"train_val.npz", "test.npz"} & set(damaged):
        split = write_split(folder, _whole(folder, split), args.seed)
    elif args.archive:
        say(f"reading {args.archive}")
        split = write_split(folder, read_archive(args.archive), args.seed)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ARCHIVE_NAME):
            split = _from_download(folder, args)
    counts = ", ".join(f"{part} {count:,}" for part, count in split["counts"].items())
    say(f"{folder} is complete: {name}, seed {args.seed}: {counts}")


def _whole(folder: Path, split: dict) -> Dataset:
    """The data set from train_val.npz and test.npz, which hold all of it."""
    arrays = *_load(folder / "train_val.npz"), *_load(folder / "test.npz")
    keys = "class_names", "superclass_names", "superclass_of_class"
    return Dataset(split["dataset"], *arrays, *(split[key] for key in keys))


def _from_download(folder: Path, args: argparse.Namespace) -> dict:
    """Writes the files from the archive in the folder, which is downloaded if it is missing."""
    target = folder / ARCHIVE_NAME
    downloaded = not target.exists()
    if downloaded:
        official = args.url == URL
        say(f"downloading {args.url}\n{SLOW_HOST if official else ''}")
        download(args.url, target, ARCHIVE_MD5 if official else None)
    say(f"reading {target}")
    try:
        split = write_split(folder, read_archive(target), args.seed)
    except DataError as error:
        if not downloaded:
            raise DataError(f"{error}; or remove {target}, and it is downloaded") from error
        target.unlink()  # so that the next run does not meet it again
        raise
    if downloaded:
        target.unlink()  # 169 MB that nothing needs any more
    else:
        say(f"{target} is no longer needed")
    return split


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags; raises UsageError on unknown, contradicting or impossible ones."""
    parser = _Parser("download_cifar100.py", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--dataset_path",
        metavar="DIR",
        default="data/cifar100",
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument(
        "--archive",
        metavar="FILE",
        help="read this .tar.gz, .tar.xz, .tar or unpacked folder instead of downloading",
    )
    parser.add_argument("--url", help=f"download from here (default: {URL})")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="draw images instead: 100 classes in 20 superclasses",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the split and of the drawn images (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    given = [f for f in ("archive", "url", "synthetic") if getattr(args, f) not in (None, False)]
    if len(given) > 1:
        parser.error(f"--{' and --'.join(given)} contradict each other: give one of them")
    if "" in (args.archive, args.url, args.dataset_path):
        parser.error("a flag is empty: give it a value or leave it out")
    for flag in ("archive", "dataset_path"):
        value = getattr(args, flag)
        if value and re.match(r"\w[\w.+-]*://", value):
            parser.error(
                f"--{flag} {value!r} is an address: expected a path on this machine; "
                "--url downloads from http:// or https://"
            )
        if value:  # --archive=~/FILE comes with the ~ from every shell
            setattr(args, flag, os.path.expanduser(value))
    args.url = args.url or URL
    if not re.match(r"https?://[^/]", args.url):
        parser.error(f"--url {args.url!r} is no address: expected http://... or https://...")
    return args


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0; received {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status and prints one line about any failure."""
    try:
        args = parse_args(argv)
        prepare(args)
        return 0
    except DataError as error:
        message, status = str(error), error.status
    except (OSError, MemoryError, UnicodeError) as error:
        mend = "mend that and run again"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            mend = f"{args.dataset_path} needs room: {NEEDED}; the same command again goes on"
        message, status = f"{str(error) or 'out of memory'}; {mend}", 1
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        message, status = "stopped; run the same command again to go on", 128 + number
    line = " ".join(message.split())
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print(f"download_cifar100.py: error: {line}", file=sys.stderr, flush=True)
    return status


def _set_up_process() -> None:
    """Signals that ask to end raise KeyboardInterrupt; outputs take any text, or lead nowhere."""

    def stop(number: int, _: object) -> NoReturn:
        for other in signals:  # a second one must not cut the message off
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    numbers = [getattr(signal, name) for name in names]
    signals = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    for number in signals:
        signal.signal(number, stop)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    _set_up_process()
    sys.exit(main())
