"""Pictures in files: how each one is read, and the batches of a data set that is a list of them.

A picture is the same to `make_dataset.py`, to `predict.py` and to both kinds of data sets: upright,
in 8 bits of red, green and blue, what is transparent on white, of an animation the first frame. A
network takes its centre square, shrunk to the network's size.

A set of kind `files` has a list of its pictures, LISTING, and decodes each when a batch needs it.
"""

from __future__ import annotations

import copy
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

import rundir
from utils import tf

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]
ENDINGS = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
if "avif" in features.modules and features.check("avif"):  # Pillow from 11.3 on, mostly
    FORMATS.append("AVIF")
    ENDINGS.append(".avif")
# Pictures of formats that are not read here.
OTHERS = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef",
          ".arw"} - set(ENDINGS)  # fmt: skip
PILLOW_RAISES = (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, TypeError,
                 AttributeError, LookupError, OverflowError,
                 Image.DecompressionBombError)  # fmt: skip
JUNK = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave, besides hidden files

LISTING = "pictures.npz"
PARTS = ("train", "val", "test")
# Its arrays, an entry for each picture; `names` holds the paths one after the other.
COLUMNS = {
    "ends": np.int64,  # of its path in `names`
    "labels": np.int32,
    "splits": np.uint8,  # its place in PARTS
    "decoders": np.uint8,
    "heights": np.int32, "widths": np.int32,
    "bytes": np.int64, "times": np.int64, "checksums": np.uint32,  # of the file, to know it again
}  # fmt: skip
ANY, JPEG, PNG = range(3)  # decoders: Pillow, which reads everything; TensorFlow's, if they agree

TRIES = 10  # crops of random size and sides that are drawn, of which the first that fits is taken
AREA, SIDES = (0.08, 1.0), (3 / 4, 4 / 3)  # share of a picture that a crop has; width / height
CROP_DRAWS = 2 * TRIES + 3  # random numbers of a picture: those, its place, and whether to flip it


# ---------------------------------------------------------------- one picture


def find(folder: str, passed: Counter, seen: set[str] | None = None) -> Iterator[str]:
    """The files below a folder that end like pictures, sorted, links to folders followed once.

    Args:
        passed: counts what else there is, by its ending; hidden files and JUNK are "hidden".
        seen: folders that were met before.

    Raises:
        ValueError: a folder cannot be read.
    """
    seen = set() if seen is None else seen
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        if is_hidden(entry.name):
            passed["hidden"] += 1
        elif os.path.isdir(entry.path):  # also where a link leads nowhere
            yield from find(entry.path, passed, seen)
        elif entry.name.lower().endswith(tuple(ENDINGS)):
            yield entry.path
        else:
            passed[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def passed_over(passed: Counter) -> str:
    """What `find` counted, in words."""
    return ", ".join(f"{number} {ending}" for ending, number in sorted(passed.items()))


def read_file(path: str) -> bytes:
    """The content of a file; a ValueError names it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def decode(content: bytes, path: str) -> tuple[Image.Image, int]:
    """A picture upright in RGB, and which decoder gives the same.

    Raises:
        ValueError: it is no picture, or a damaged one; begins with its path.
    """
    try:
        with warnings.catch_warnings():  # of large pictures and of EXIF data that are damaged
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                decoder = _decoder(picture, content)
                opaque = picture.format == "BMP" and picture.mode == "RGBA"
                upright = ImageOps.exif_transpose(picture)
                if opaque and upright.getextrema()[3] == (0, 0):
                    upright = upright.convert("RGB")  # Windows tools leave the fourth byte at 0
                return _on_white(upright), decoder
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}" if content else "it is empty"
        raise ValueError(f"{path} is no picture that can be read ({reason})") from None
    except PILLOW_RAISES as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from None


def _decoder(picture: Image.Image, content: bytes) -> int:
    """TensorFlow's decoder of a picture, where that takes it as `decode` does: as it lies."""
    raw = picture.tile[0][3] if len(picture.tile) == 1 else None  # how its pixels are stored
    raw = raw[0] if isinstance(raw, tuple) else raw
    if raw not in ("RGB", "L") or picture.mode != raw or picture.has_transparency_data:
        return ANY
    if picture.getexif().get(0x0112, 1) != 1:  # orientation
        return ANY
    if picture.format == "JPEG" and content.endswith(b"\xff\xd9"):  # nothing before or after
        return JPEG
    return PNG if picture.format == "PNG" else ANY


def _on_white(picture: Image.Image) -> Image.Image:
    """Any picture with 8 bits for each of red, green and blue, what is transparent on white."""
    if picture.mode.startswith("I"):  # 16 bits of grey, of which Pillow would keep the lowest
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def fit(picture: Image.Image, size: int, centre: float = 1.0) -> np.ndarray:
    """What a network takes of a picture, uint8 `[size, size, 3]`.

    Its centre square, shrunk; one of this size stays as it is. `centre` is the square's share of
    the shorter side.
    """
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC, (1 - centre) / 2)
    return np.array(fitted)


def read_picture(path: str, size: int, centre: float = 1.0) -> np.ndarray:
    """A file's picture as the network takes it (`fit`).

    Raises:
        ValueError: it cannot be read, or is no picture.
    """
    return fit(decode(read_file(path), path)[0], size, centre)


# ---------------------------------------------------------------- a list of pictures


def pack(paths: list[str]) -> dict[str, np.ndarray]:
    """`names` and `ends` of a listing."""
    names = [os.fsencode(path) for path in paths]
    blob = np.frombuffer(b"".join(names), np.uint8)
    return {"names": blob, "ends": np.cumsum([len(name) for name in names], dtype=np.int64)}


def path_of(listing: dict[str, np.ndarray], row: int) -> str:
    """The path of a picture of a listing, relative to the set's `source`."""
    start = listing["ends"][row - 1] if row else 0
    return os.fsdecode(listing["names"][start : listing["ends"][row]].tobytes())


def rows_of(listing: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Which entries of a listing a split has, in their order."""
    parts = ("train", "val") if split == "train_val" else (split,)
    return np.flatnonzero(np.isin(listing["splits"], [PARTS.index(part) for part in parts]))


def is_whole(listing: dict[str, np.ndarray]) -> bool:
    """Whether the arrays of a listing are what they should be."""
    types = {name: value.dtype for name, value in listing.items()}
    if types != COLUMNS | {"names": np.uint8}:
        return False
    shapes = {value.shape for name, value in listing.items() if name != "names"}
    if shapes != {(listing["ends"].size,)}:
        return False
    bounds = np.concatenate([[0], listing["ends"]])
    return bool((np.diff(bounds) > 0).all() and bounds[-1] == len(listing["names"]))


class Pictures:
    """Pictures of a split as an array `[N, size, size, 3]` would hold them, read when needed.

    One by its number is uint8 `[size, size, 3]`; of a slice, a list of numbers or a mask the
    result is as this is, and `np.asarray` reads all.

    Attributes:
        labels: int32 `[N]`.
        crop_draws: random numbers that `batches` takes for a picture, if it crops them; else 0.

    Raises:
        ValueError: the listing is damaged; ends with `mend`.
    """

    def __init__(self, listing: dict, split: str, data_dir: str, description: dict, mend: str):
        if not is_whole(listing):
            raise ValueError(f"{os.path.join(data_dir, LISTING)} is damaged: {mend}")
        self.listing, self.rows = listing, rows_of(listing, split)
        self.labels = listing["labels"][self.rows]
        self.data_dir, self.source, self.mend = data_dir, description["source"], mend
        self.size, self.centre = description["image_size"], description["centre"]
        self.crop_draws = CROP_DRAWS if description["augmentation"] == "crop" else 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), self.size, self.size, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, int | np.integer):
            return self._pixels(key)
        part = copy.copy(self)
        part.rows, part.labels = self.rows[key], self.labels[key]
        return part

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        pixels = [self._pixels(number) for number in range(len(self))]
        return np.array(pixels, dtype or np.uint8).reshape(self.shape)

    def _path(self, number: int) -> str:
        return os.path.join(self.source, path_of(self.listing, self.rows[number]))

    def _content(self, number: int, step: int = 0) -> bytes:
        """A file's content, which must be what it was when the set was made.

        Raises:
            ValueError: it is not; names the picture, and in training the step.
        """
        path, row = self._path(number), self.rows[number]
        where = f" (needed in step {step})" if step else ""
        try:
            content = read_file(path)
        except ValueError as error:
            raise ValueError(f"{error}{where}: put it back, or {self.mend}") from None
        if zlib.crc32(content) != self.listing["checksums"][row]:
            raise ValueError(
                f"{path} has changed since {self.data_dir} was made{where}: {self.mend}"
            )
        return content

    def _pixels(self, number: int, step: int = 0) -> np.ndarray:
        path = self._path(number)
        return fit(decode(self._content(number, step), path)[0], self.size, self.centre)

    def _crop(self, content: bytes, number: int, box: np.ndarray) -> np.ndarray:
        """A crop of a picture, shrunk to the network's size, by Pillow."""
        top, left, height, width = box.tolist()
        picture, size = decode(content, self._path(number))[0], (self.size, self.size)
        box = (left, top, left + width, top + height)
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box), np.float32)

    def in_order(self) -> tf.data.Dataset:
        """Every picture once."""

        @tf.autograph.experimental.do_not_convert
        def read(number):
            return self._read(self._pixels, [number], tf.uint8)

        numbers = tf.data.Dataset.range(len(self))
        return numbers.map(read, num_parallel_calls=rundir.num_cores(), deterministic=True)

    def batches(self, steps: tf.data.Dataset, plan, size: int) -> tf.data.Dataset:
        """Batches of training steps, their pictures read on all cores.

        Args:
            steps: numbers of the steps, from 0.
            plan: gives for a step the numbers of its pictures `[B]` and random numbers
                `[draws, B, 1]`.
            size: B.

        Returns:
            Pictures `[B, size, size, 3]`, float32 and flipped if they are cropped, else uint8;
            their numbers; the random numbers.
        """
        sizes = tf.constant([self.listing[name][self.rows] for name in ("heights", "widths")])
        decoders = tf.constant(self.listing["decoders"][self.rows])

        @tf.autograph.experimental.do_not_convert
        def of_step(step):
            numbers, draws = plan(step)
            boxes = tf.zeros([4, size], tf.int32)
            if self.crop_draws:
                boxes = random_boxes(tf.gather(sizes, numbers, axis=1), draws[..., 0])
            return (
                tf.repeat(step + 1, size),
                numbers,
                tf.transpose(boxes),
                tf.transpose(draws[..., 0]),
            )

        @tf.autograph.experimental.do_not_convert
        def read(step, number, box, draws):
            if not self.crop_draws:
                return self._read(self._pixels, [number, step], tf.uint8), number, draws
            content = tf.numpy_function(self._content, [number, step], tf.string)
            picture = tf.switch_case(
                tf.cast(decoders[number], tf.int32),
                [
                    lambda: self._read(self._crop, [content, number, box], tf.float32),
                    lambda: self._shrink(_jpeg_crop(content, box, self.size)),
                    lambda: self._shrink(_cut(tf.io.decode_png(content, channels=3), box)),
                ],
            )
            flipped = tf.cond(draws[-1] < 0.5, lambda: picture, lambda: picture[:, ::-1])
            return flipped, number, draws

        @tf.autograph.experimental.do_not_convert
        def together(pictures, numbers, draws):
            return pictures, numbers, tf.transpose(draws)[..., None]

        pictures = steps.map(of_step, num_parallel_calls=2, deterministic=True).unbatch()
        cores = rundir.num_cores()
        pictures = pictures.map(read, num_parallel_calls=cores, deterministic=True)
        return pictures.batch(size, drop_remainder=True).map(together)

    def _read(self, function, inputs, dtype) -> tf.Tensor:
        """A picture `[size, size, 3]` that a Python function makes."""
        picture = tf.numpy_function(function, inputs, dtype)
        return tf.ensure_shape(picture, self.shape[1:])

    def _shrink(self, picture: tf.Tensor) -> tf.Tensor:
        """To the network's size."""
        picture = tf.image.resize(picture, self.shape[1:3])
        return tf.ensure_shape(picture, self.shape[1:])


# ---------------------------------------------------------------- random crops


def random_boxes(sizes: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Random crops: top, left, height and width, int32 `[4, B]`.

    A share AREA of the picture with sides of SIDES, the first of TRIES that fits; where none does,
    the centre of sides that are allowed.

    Args:
        sizes: heights and widths, int32 `[2, B]`.
        draws: random numbers, `[CROP_DRAWS, B]`; the last one is not used.
    """
    height, width = tf.unstack(tf.cast(sizes, tf.float32))
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draws[:TRIES])  # (TRIES, B)
    low, high = np.log(SIDES)
    side = tf.exp(low + (high - low) * draws[TRIES : 2 * TRIES])
    widths, heights = tf.round(tf.sqrt(area * side)), tf.round(tf.sqrt(area / side))
    fits = (widths <= width) & (heights <= height) & (widths >= 1) & (heights >= 1)
    # Behind the tries, what always fits.
    widths = tf.concat([widths, [tf.minimum(width, tf.round(height * SIDES[1]))]], axis=0)
    heights = tf.concat([heights, [tf.minimum(height, tf.round(width / SIDES[0]))]], axis=0)
    fits = tf.concat([fits, [tf.ones_like(height, tf.bool)]], axis=0)
    first = tf.argmax(fits, axis=0)[None]  # (1, B)
    w, h = (tf.experimental.numpy.take_along_axis(x, first, axis=0)[0] for x in (widths, heights))
    w, h = tf.maximum(w, 1), tf.maximum(h, 1)
    found = tf.reduce_any(fits[:-1], axis=0)
    places = tf.where(found, draws[2 * TRIES : 2 * TRIES + 2], 0.5)
    top, left = tf.floor(places[0] * (height - h + 1)), tf.floor(places[1] * (width - w + 1))
    top, left = tf.minimum(top, height - h), tf.minimum(left, width - w)
    return tf.cast(tf.stack([top, left, h, w]), tf.int32)


def _cut(picture: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    return tf.slice(picture, [box[0], box[1], 0], [box[2], box[3], 3])


def _jpeg_crop(content: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """A crop of a JPEG, decoded alone, at an eighth, a quarter or half of its size where that is
    still as large as the network's."""

    def decode_at(ratio: int):
        scaled = tf.maximum(box // ratio, [0, 0, 1, 1])
        return tf.io.decode_and_crop_jpeg(content, scaled, channels=3, ratio=ratio)

    factor = tf.reduce_min(box[2:]) // size
    which = tf.reduce_sum(tf.cast(factor >= [2, 4, 8], tf.int32))
    return tf.switch_case(which, [lambda ratio=ratio: decode_at(ratio) for ratio in (1, 2, 4, 8)])
