"""The input pipeline: from the files of a data set, CIFAR-100 or another, to a network's batches.

Order and augmentation of training step t are a pure function of (seed, t), so that a run that
starts again at step t sees what it would have seen. Everything works on whole batches.

A data set is a folder with `split.json`, which says what it is, and a `.npz` file of images for
each split. `download_cifar100.py` makes CIFAR-100, `make_dataset.py` a set of a person's own
pictures, which may also stay in their files and be read when they are needed (`pictures.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

import utils
from utils import tf

if TYPE_CHECKING:
    import pictures

NUM_CLASSES = 100
IMAGE_SIZE = 32
PADDING = 4
SPLITS = ("train", "val", "train_val", "test")
# Of CIFAR-100, in the order of the labels.
CLASS_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()  # noqa: SIM905, a list would be three times as long
GET_DATA = "get it with: python download_cifar100.py --dataset_path {} (or --archive, --synthetic)"
MAKE_AGAIN = "make it again with: python make_dataset.py PICTURES --dataset_path {} --overwrite"
# What programs read of split.json, and what those lack that download_cifar100.py wrote.
DESCRIPTION = {
    "dataset": str, "counts": dict,
    "class_names": list, "superclass_names": list, "superclass_of_class": list,
}  # fmt: skip
DEFAULTS = {
    "kind": "arrays",  # in memory; or "files": a list of pictures, see pictures.py
    "image_size": IMAGE_SIZE,
    "centre": 1.0,  # share of a picture's shorter side that evaluation sees
}

_AUGMENT = 1  # tells this use of a (seed, step) from others
SHIFT_DRAWS = 3  # random numbers of an image: two offsets, and whether it is flipped


def class_names(dataset: str | None, number: int) -> list[str]:
    """Names of the classes of a data set that is not at hand: CIFAR-100's, else numbers."""
    if dataset in (None, "cifar100") and number == NUM_CLASSES:
        return CLASS_NAMES
    return [f"class {label}" for label in range(number)]


def describe(data_dir: str) -> dict:
    """What `data_dir` holds (`split.json`): dataset, counts, names, and the DEFAULTS of the rest.

    Raises:
        ValueError: it is missing or damaged; says which command gets the data.
    """
    path = os.path.join(data_dir, "split.json")
    try:
        with open(path, encoding="utf-8") as file:
            description = DEFAULTS | json.load(file)
        kinds = {name: type(value) for name, value in DEFAULTS.items()} | DESCRIPTION
        good = all(isinstance(description[name], kind) for name, kind in kinds.items())
        problem = "" if good else f"{', '.join(kinds)} are not what they should be"
    except NotADirectoryError:
        raise ValueError(f"{data_dir} is a file: name the folder of the data set") from None
    except OSError:
        raise ValueError(
            f"no data set in {data_dir}: {GET_DATA.format(data_dir)}; of other pictures: python "
            f"make_dataset.py PICTURES --dataset_path {data_dir}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}): {GET_DATA.format(data_dir)}")
    return description


def network_settings(data_dir: str) -> dict[str, int]:
    """`num_classes` and `image_size` that a data set asks of a network; none where there is no
    data set, so that the network's own hold."""
    try:
        description = describe(data_dir)
    except ValueError:
        return {}
    sizes = {"num_classes": len(description["class_names"])}
    return sizes | {"image_size": description["image_size"]}


def is_own(description: dict) -> bool:
    """Whether `make_dataset.py` made a data set of a person's own pictures."""
    return "source" in description


def remedy(data_dir: str, description: dict) -> str:
    """The command that mends a data set, in words."""
    return (MAKE_AGAIN if is_own(description) else GET_DATA).format(data_dir)


def read_arrays(path: str, mend: str) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name.

    Raises:
        ValueError: it is missing or cannot be read; ends with `mend`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {mend}") from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into the memory that is free") from None
    except Exception as error:  # zipfile, zlib, tokenize and NumPy raise a dozen kinds
        raise ValueError(f"{path} cannot be read ({error}): {mend}") from None


def load(data_dir: str, split: str) -> tuple[np.ndarray | pictures.Pictures, np.ndarray]:
    """Images uint8 `[N, H, W, 3]` and labels int32 `[N]` of train, val, train_val or test.

    The images of kind `files` are `pictures.Pictures`, which are read when they are needed.

    Raises:
        ValueError: the file is missing, damaged, or its arrays are not what they should be.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    description = describe(data_dir)
    expected, mend = description["counts"].get(split), remedy(data_dir, description)
    num_classes = len(description["class_names"])
    if description["kind"] == "files":
        import pictures  # needs Pillow, which arrays do not

        path = os.path.join(data_dir, pictures.LISTING)
        images = pictures.Pictures(read_arrays(path, mend), split, data_dir, description, mend)
        labels = images.labels
    else:
        path = os.path.join(data_dir, f"{split}.npz")
        images, labels = _check_arrays(read_arrays(path, mend), description, path, mend)
    if not len(labels):
        raise ValueError(f"{path} holds no images: {mend}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: expected whole-number labels, got {labels.dtype}: {mend}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{path}: labels must be 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}: "
            + mend
        )
    if len(labels) != expected:
        raise ValueError(f"{path}: {expected} images expected, {len(labels)} found: {mend}")
    return images, labels.astype(np.int32)


def _check_arrays(arrays: dict[str, np.ndarray], description: dict, path: str, mend: str):
    """`images` and `labels` of a file, of the data set's size."""
    if not {"images", "labels"} <= arrays.keys():
        raise ValueError(f"{path} lacks images or labels: {mend}")
    images, labels = arrays["images"], arrays["labels"]
    size = description["image_size"]
    shape = (len(labels), size, size, 3) if labels.ndim else None
    if images.dtype != np.uint8 or images.shape != shape or labels.ndim != 1:
        raise ValueError(
            f"{path}: expected images uint8 {shape} and labels [N], got {images.dtype} "
            f"{images.shape} and labels {labels.dtype} {labels.shape}: {mend}"
        )
    return images, labels


def save(data_dir: str, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write what `load` reads, whole or not at all."""
    with utils.atomic_write(os.path.join(data_dir, f"{split}.npz"), "wb") as file:
        np.savez(file, images=images, labels=labels)


def sha256(*arrays: np.ndarray) -> str:
    """Of the arrays' contents, by which split.json knows them."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def standardize(images: tf.Tensor) -> tf.Tensor:
    """Zero mean and unit deviation per image and channel, `[B, H, W, C]` in float32.

    The deviation is floored at 1 / sqrt(pixels), so that a flat image gives zeros.
    """
    images = tf.cast(images, tf.float32)
    mean, variance = tf.nn.moments(images, axes=(1, 2), keepdims=True)
    pixels = tf.cast(tf.shape(images)[1] * tf.shape(images)[2], tf.float32)
    return (images - mean) * tf.minimum(tf.math.rsqrt(variance), tf.sqrt(pixels))


def batch_indices(step, batch_size: int, num_images: int, seed: int) -> tf.Tensor:
    """Which images step `step` (from 0) takes: int64 `[B]`.

    Every image comes once an epoch, each epoch has its own order, and a batch may reach into the
    next epoch.
    """
    position = tf.cast(step, tf.int64) * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch, place = position // num_images, position % num_images
    key = tf.stack([tf.fill([batch_size], tf.constant(seed, tf.int64)), epoch], axis=1)
    key = tf.pad(key, [[0, 0], [0, 1]])  # (B, 3), as the operation wants it
    last = tf.constant(num_images - 1, tf.int64)
    # tf.random.experimental.index_shuffle takes one key for all only.
    return tf.raw_ops.RandomIndexShuffle(index=place, seed=key, max_index=last, rounds=8)


def draw(seed: int, step, number: int, batch) -> tf.Tensor:
    """`number` random numbers in [0, 1) for each image of step `step`: float32 `[number, B, 1]`."""
    key = tf.random.experimental.stateless_fold_in(
        tf.stack([tf.cast(seed, tf.int64), tf.cast(step, tf.int64)]), _AUGMENT
    )
    return tf.random.stateless_uniform([number, batch, 1], key)


def augment(images: tf.Tensor, seed: int, step) -> tf.Tensor:
    """Pad by 4 (reflected), crop at random and flip every other image at random, `[B, H, W, 3]`."""
    return shift(images, draw(seed, step, SHIFT_DRAWS, tf.shape(images)[0]))


def shift(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """What `augment` does, by the random numbers `draws [3, B, 1]`.

    The three are one change of indices: row r of an image is row |r + offset - 4|, mirrored at the
    far side.
    """
    offsets = tf.cast(draws[:2] * (2 * PADDING + 1), tf.int32) - PADDING
    size = images.shape[1]
    last = size - 1
    source = last - tf.abs(last - tf.abs(tf.range(size) + offsets))  # (2, B, size)
    rows, columns = source[0], tf.where(draws[2] < 0.5, source[1], source[1][:, ::-1])
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


def training_batches(
    images: np.ndarray | pictures.Pictures,
    labels: np.ndarray,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Endless batches (float32 `[B, H, W, 3]`, int32 `[B]`) of steps `first_step`, + 1, ...

    Args:
        share: `(n, of)`, for a worker that computes the n-th (from 0) of so many equal parts of
            every batch: of files, its own are read alone.

    Raises:
        ValueError: a batch would hold more images than there are.
    """
    num_images = len(labels)
    if batch_size > num_images:
        raise ValueError(
            f"batch_size {batch_size} is more than the {num_images} training images: make it "
            "smaller"
        )
    size = batch_size // share[1]
    own = slice(share[0] * size, (share[0] + 1) * size)
    steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
    if not isinstance(images, np.ndarray):
        return _as_written(_batches_of_files(images, labels, steps, batch_size, seed, own))
    images, labels = tf.constant(images), tf.constant(labels)

    @tf.autograph.experimental.do_not_convert  # it has no control flow (so below)
    def batch(step):
        indices = batch_indices(step, batch_size, num_images, seed)
        pictures = standardize(augment(tf.gather(images, indices), seed, step))
        return pictures[own], tf.gather(labels, indices)[own]

    return _as_written(steps.map(batch, num_parallel_calls=2, deterministic=True).prefetch(4))


def _batches_of_files(
    images: pictures.Pictures, labels: np.ndarray, steps, batch_size: int, seed: int, own: slice
) -> tf.data.Dataset:
    """`training_batches` of pictures that are read one by one, of each batch the part `own`."""
    number, labels = len(labels), tf.constant(labels)

    @tf.autograph.experimental.do_not_convert
    def plan(step):
        draws = draw(seed, step, images.crop_draws or SHIFT_DRAWS, batch_size)
        return batch_indices(step, batch_size, number, seed)[own], draws[:, own]

    @tf.autograph.experimental.do_not_convert
    def finish(pictures, indices, draws):
        if not images.crop_draws:
            pictures = shift(pictures, draws)
        return standardize(pictures), tf.gather(labels, indices)

    batches = images.batches(steps, plan, own.stop - own.start)
    return batches.map(finish, num_parallel_calls=2, deterministic=True).prefetch(2)


def share_out(
    batches: tf.data.Dataset, num_replicas: int, worker: int, num_workers: int
) -> tf.data.Dataset:
    """A worker's shares of every batch: one element for each of its replicas, in their order."""
    own = num_replicas // num_workers

    @tf.autograph.experimental.do_not_convert
    def shares(*tensors):
        return tuple(
            tf.reshape(x, [num_replicas, -1, *x.shape[1:]])[worker * own : (worker + 1) * own]
            for x in tensors
        )

    return batches.map(shares).unbatch().prefetch(own)


def evaluation_batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Every image once, in order, standardized; the last batch may be smaller."""

    @tf.autograph.experimental.do_not_convert
    def batch(pictures, targets):
        return standardize(pictures), targets

    if isinstance(images, np.ndarray):
        dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    else:
        dataset = tf.data.Dataset.zip(
            (images.in_order(), tf.data.Dataset.from_tensor_slices(labels))
        )
    dataset = dataset.batch(batch_size)
    return _as_written(dataset.map(batch, num_parallel_calls=2).prefetch(2))


def _as_written(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Without tf.data's autotuning, which has nothing to choose here.

    Its thread sleeps for up to a minute at a time, and TensorFlow waits for it where an iterator
    ends: on one core about every second evaluation ended seconds late, a training up to a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
