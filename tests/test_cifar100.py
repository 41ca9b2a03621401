"""cifar100.py: what is loaded, and that order and augmentation are a function of (seed, step)."""

import glob
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, write_data

import cifar100

PICTURES = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("batch_size, num_images", [(90, 450), (7, 20), (20, 20)])
def test_every_image_once_an_epoch(batch_size, num_images):
    steps = 3 * num_images
    order = np.concatenate(
        [cifar100.batch_indices(t, batch_size, num_images, 5) for t in range(steps)]
    )
    epochs = order[: len(order) // num_images * num_images].reshape(-1, num_images)
    assert (np.sort(epochs, axis=1) == np.arange(num_images)).all()
    assert np.any(epochs[0] != epochs[1])
    other = cifar100.batch_indices(0, batch_size, num_images, 6)
    assert np.any(order[:batch_size] != other)


def test_order_is_well_mixed():
    order = np.concatenate([cifar100.batch_indices(t, 100, 5000, 0) for t in range(50)])
    correlation = np.corrcoef(np.arange(5000), order)[0, 1]
    assert abs(correlation) < 0.05
    neighbours = np.abs(np.diff(order)) == 1
    assert neighbours.mean() < 0.005


def test_augmented_images_are_crops_of_padded_images():
    padded = np.pad(PICTURES, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    seen = set()
    for step in range(4):
        for before, after in zip(
            padded, cifar100.augment(tf.constant(PICTURES), 1, step).numpy(), strict=True
        ):
            found = [
                (y, x, flip)
                for y in range(9)
                for x in range(9)
                for flip in (1, -1)
                if np.array_equal(before[y : y + 32, x : x + 32][:, ::flip], after)
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert 0.3 < np.mean([flip == 1 for _, _, flip in seen]) < 0.7


def test_augmentation_depends_on_seed_and_step_alone():
    a, b, c, d = (
        cifar100.augment(tf.constant(PICTURES), *key).numpy()
        for key in [(1, 2), (1, 2), (1, 3), (2, 2)]
    )
    assert np.array_equal(a, b) and np.any(a != c) and np.any(a != d)


def test_standardization_is_per_image_and_channel():
    out = cifar100.standardize(PICTURES).numpy()
    np.testing.assert_allclose(out.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=(1, 2)), 1, atol=1e-3)
    flat = np.full((2, 32, 32, 3), [0, 77, 255], np.uint8)
    assert np.array_equal(cifar100.standardize(flat), np.zeros((2, 32, 32, 3)))


def test_a_run_that_starts_again_sees_the_same_batches():
    labels = np.arange(50, dtype=np.int32)
    whole = list(cifar100.training_batches(PICTURES, labels, 8, 3).take(6))
    rest = list(cifar100.training_batches(PICTURES, labels, 8, 3, first_step=4).take(2))
    for (x, y), (x2, y2) in zip(whole[4:], rest, strict=True):
        assert np.array_equal(x, x2) and np.array_equal(y, y2)


def test_evaluation_sees_every_image_once_and_the_partial_batch():
    labels = np.arange(50, dtype=np.int32)
    batches = list(cifar100.evaluation_batches(PICTURES, labels, 8))
    assert [len(y) for _, y in batches] == [8] * 6 + [2]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), labels)
    images = np.concatenate([x for x, _ in batches])
    np.testing.assert_allclose(images, cifar100.standardize(PICTURES), atol=1e-5)


def test_no_input_waits_for_a_thread_that_tunes_it():
    labels = np.arange(50, dtype=np.int32)
    training = cifar100.training_batches(PICTURES, labels, 8, 3)
    for batches in (
        training,
        cifar100.share_out(training, 2, 0, 1),
        cifar100.evaluation_batches(PICTURES, labels, 8),
    ):
        assert batches.options().autotune.enabled is False


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch_size 51"):
        cifar100.training_batches(PICTURES, np.zeros(50, np.int32), 51, 0)


def damage(path, kind):
    """Spoil one file of a data set; what the error must say."""
    file = os.path.join(path, "train.npz")
    good = dict(np.load(file))
    if kind == "missing":
        os.remove(file)
        return "missing"
    if kind == "truncated":
        with open(file, "r+b") as stream:
            stream.truncate(1000)
        return "cannot be read"
    if kind == "objects":
        good["labels"] = good["labels"].astype(object)
    elif kind == "dtype":
        good["images"] = good["images"].astype(np.float32)
    elif kind == "shape":
        good["images"] = good["images"][:, :16]
    elif kind == "label":
        good["labels"][3] = 100
    elif kind == "count":
        good = {name: array[:-1] for name, array in good.items()}
    elif kind == "floats":
        good["labels"] = good["labels"].astype(np.float32)
    elif kind == "no images":
        del good["images"]
    np.savez(file, **good)
    return {"label": "0 to 99", "count": "expected", "floats": "whole-number"}.get(
        kind, "train.npz"
    )


KINDS = [
    "missing",
    "truncated",
    "objects",
    "dtype",
    "shape",
    "label",
    "count",
    "floats",
    "no images",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data_are_refused(tmp_path, kind):
    path = write_data(tmp_path, {"train": 20})
    says = damage(path, kind)
    with pytest.raises(ValueError, match=says) as caught:
        cifar100.load(path, "train")
    assert "\n" not in str(caught.value) and tmp_path.name in str(caught.value)


def test_no_data_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="download_cifar100.py --dataset_path"):
        cifar100.load(str(tmp_path), "train")
    (tmp_path / "split.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        cifar100.load(str(tmp_path), "train")
    write_data(tmp_path, {"train": 20})
    names = json.loads((tmp_path / "split.json").read_text())
    del names["superclass_of_class"]
    for description in ([1], names):
        (tmp_path / "split.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="damaged"):
            cifar100.load(str(tmp_path), "train")


def test_the_project_has_no_other_readers_of_the_files():
    sources = glob.glob(os.path.join(ROOT, "*.py"))
    readers = {os.path.basename(path) for path in sources if "np.load(" in Path(path).read_text()}
    assert readers <= {"cifar100.py", "download_cifar100.py"}


def test_mutated_files_are_refused_or_read_whole(tmp_path):
    """2,000 files with bytes changed or cut: an error that is declared, or good arrays."""
    path = write_data(tmp_path, {"train": 3})
    file = os.path.join(path, "train.npz")
    good = Path(file).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    edges = [*range(400), *range(len(good) - 600, len(good))]  # where the headers are
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            bad[rng.choice(edges)] = rng.integers(256)
        if rng.random() < 0.2:
            bad = bad[: rng.integers(len(bad))]
        Path(file).write_bytes(bad)
        try:
            images, labels = cifar100.load(path, "train")
            assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
            assert labels.shape == (3,) and 0 <= labels.min() <= labels.max() < 100
        except ValueError as error:
            assert "train.npz" in str(error)
            refused += 1
    assert refused > 500
