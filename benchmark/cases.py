"""What the benchmark times: each `make_...` returns `step()` and what else there is to tell.

A process of its own calls it (`timing`), without a data set or a trained network: weights, images
and groups are made up.
"""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np
from PIL import Image

import cifar100
import grouping
import metrics
import networks
import objective
import pictures
import resnet
import restore
from benchmark import frameworks
from benchmark.dense import Horizontal, Vertical
from benchmark.engines import random_images
from benchmark.frameworks import LEARNING_RATE, random_batch
from formats.models import Model, one_branch, whole
from parallel import devices as devices_
from parallel import tree
from utils import surroundings, tf

DENSE = {"horizontal": Horizontal, "vertical": Vertical}
NUM_IMAGES = 10000  # made up, for the pipeline


def network_config(k: float, groups: str, **of) -> networks.Config:
    """`of` is what tells another network than the WRN, or other images: `frameworks.config`."""
    config = frameworks.config(k, **of)
    if groups == "dense":
        return config
    return dataclasses.replace(config, groups=tuple(map(int, groups.split("-"))))


def equal_network(k: float, groups: str, **of) -> resnet.Network:
    """The dense network, or the tree of equal groups."""
    config = network_config(k, groups, **of)
    return resnet.equal_tree(config) if max(config.groups) > 1 else resnet.make(config)


def make_inference(net, devices, how, precision, batch_size, of=None):
    """`net` is a number k with groups, such as (8, '2-2-2'), or the path of a tree."""
    devices = devices_.find_devices(devices)
    net = restore.load_network(net)[0] if isinstance(net, str) else equal_network(*net, **of or {})
    weights, flops = resnet.count(net)
    placed = DENSE[how](net, devices) if how in DENSE else tree.place(net, devices, how)
    predict = metrics.predictor(placed, precision, image_size=net.config.image_size)
    images, labels = (tf.constant(x) for x in random_batch(batch_size, net.config))

    def step():
        predict(images, labels)[1].numpy()

    return step, {
        "groups": grouping.format_groups(net.config.groups),
        "flops": flops,
        "device_flops": getattr(placed, "device_flops", [flops]),
        "device_weights": getattr(placed, "device_weights", [weights]),
        "devices": devices,
    }


def exported_model(k: float, groups: str, branch: int | None) -> Model:
    """What export.py makes of a network of equal groups, or of one of its branches."""
    net = equal_network(k, groups)
    resnet.freeze(net, lanes=1)
    about = {"class_names": cifar100.CLASS_NAMES}
    return whole(net, about) if branch is None else one_branch(net, branch, about)


def make_exported(k: float, groups: str, branch: int | None, batch_size: int, calls: int):
    """`calls` batches of such a network in this program, on the CPU as the other engines."""
    call = exported_model(k, groups, branch).concrete()
    images = tf.constant(random_images(batch_size))

    def step():
        with tf.device("/CPU:0"):
            for _ in range(calls):
                call(images)["logits"].numpy()

    return step, {}


def make_training(stage, keep_prob, k, precision, batch_size, of=None):
    """A step of a stage, with the regularizers and metrics that it has in train.py."""
    config = network_config(k, "dense", **of or {})
    groups = config.groups if stage == "baseline" else (2,) * len(config.groups)
    config = dataclasses.replace(config, groups=groups, dropout_keep_prob=keep_prob)
    net = resnet.make(config)
    if stage == "split":
        net = resnet.equal_tree(config)
    elif stage == "uneven split":
        net = resnet.split(net)  # by groups that nothing has evened out, as no learned ones are
    trainer = objective.Trainer(net, objective.Objective(precision=precision), {})
    images, labels = (tf.constant(x) for x in random_batch(batch_size, config))
    rate = tf.constant(LEARNING_RATE)

    def step():
        trainer.step(images, labels, rate).numpy()

    return step, {}


def random_batches(batch_size: int):
    rng = np.random.default_rng(0)
    images = rng.integers(
        0, 256, (NUM_IMAGES, cifar100.IMAGE_SIZE, cifar100.IMAGE_SIZE, 3), np.uint8
    )
    labels = rng.integers(0, cifar100.NUM_CLASSES, NUM_IMAGES).astype(np.int32)
    return iter(cifar100.training_batches(images, labels, batch_size, seed=0))


def make_pipeline(batch_size, batches_per_step):
    """Nothing but batches, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batches = random_batches(batch_size)

    def step():
        for _ in range(batches_per_step):
            next(batches)

    return step, {}


def make_plain_input(batch_size, batches_per_step):
    """The same work operation by operation, without an input pipeline, on the same core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shape = (NUM_IMAGES, cifar100.IMAGE_SIZE, cifar100.IMAGE_SIZE, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def step():
        for number in range(batches_per_step):
            indices = cifar100.batch_indices(number, batch_size, NUM_IMAGES, 0)
            cifar100.standardize(cifar100.augment(tf.constant(images[indices]), 0, number))

    return step, {}


def make_pictures(folder: str, number: int = 200) -> None:
    """JPEGs of 500x375 pixels with some detail, in two folders."""
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noise = rng.normal(scale=8, size=picture.shape)
        path = os.path.join(folder, f"class {i % 2}", f"{i}.jpg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_files_pipeline(data_dir, batch_size, batches_per_step):
    """Batches of a data set of kind `files`: random crops of pictures, resized, flipped."""
    batches = iter(cifar100.training_batches(*cifar100.load(data_dir, "train"), batch_size, 0))

    def step():
        for _ in range(batches_per_step):
            next(batches)

    return step, {}


def make_keras_pipeline(folder, image_size, batch_size, batches_per_step):
    """The same by `image_dataset_from_directory`, which reads whole pictures, and the same crops.

    As its users write it: pictures are brought to the size before they are cropped, of which a
    crop of 7/8 is what is usual.
    """
    with surroundings():
        import keras

    read = keras.utils.image_dataset_from_directory(
        folder, image_size=[image_size * 8 // 7] * 2, batch_size=batch_size, verbose=False
    )

    def crop(images, labels):
        number = tf.shape(images)[0]
        sizes = tf.fill([2, number], images.shape[1])
        boxes = pictures.random_boxes(sizes, tf.random.uniform([pictures.CROP_DRAWS, number]))
        top, left, height, width = tf.unstack(tf.cast(boxes, tf.float32) / images.shape[1])
        boxes = tf.stack([top, left, top + height, left + width], axis=1)
        images = tf.image.crop_and_resize(images, boxes, tf.range(number), [image_size] * 2)
        flipped = tf.random.uniform([number, 1, 1, 1]) < 0.5
        return tf.where(flipped, images[:, :, ::-1], images), labels

    batches = iter(read.map(crop, tf.data.AUTOTUNE).repeat().prefetch(tf.data.AUTOTUNE))

    def step():
        for _ in range(batches_per_step):
            next(batches)

    return step, {}


def make_fed_training(k, precision, batch_size):
    """Steps of stage group on batches of the pipeline; tells how much of its time it waited."""
    trainer = objective.Trainer(
        resnet.ResNet(resnet.NetworkConfig(k=k, groups=(2, 2, 2))),
        objective.Objective(precision=precision),
        {},
    )
    batches, rate = random_batches(batch_size), tf.constant(LEARNING_RATE)
    about = {"waits": [], "steps": []}

    def step():
        start = time.perf_counter()
        images, labels = next(batches)
        about["waits"].append(time.perf_counter() - start)
        trainer.step(images, labels, rate).numpy()
        about["steps"].append(time.perf_counter() - start)

    return step, about
