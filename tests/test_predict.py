"""predict.py: pictures of all kinds, and the same classes as eval.py's."""

import io
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import fails, grouped_net, inside
from PIL import Image

import cifar100
import metrics
import networks
import objective
import pictures
import predict
import resnet
import rundir

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A run that holds a tree of random weights."""
    run_info = {"stage": "split", "dataset": "cifar100", "seed": 0, "preset": ""}
    net = resnet.split(grouped_net((1, 2, 2)))
    with rundir.Run(str(tmp_path_factory.mktemp("tree"))) as run:
        run.save(objective.Trainer(net, objective.Objective(), run_info).checkpoint, 1)
    return net, run.directory


def write(path, pixels):
    path.write_bytes(tf.io.encode_png(pixels).numpy())
    return path


def predicted(*words):
    status, out, error = inside("predict.py", "--json", "True", *words)
    return status, [json.loads(line) for line in out.splitlines()], error


def test_a_picture_is_cropped_as_in_an_evaluation(tmp_path):
    """A checkpoint tells how much of the centre that is; of ILSVRC 7/8."""
    config = networks.config_class("alexnet")(k=0.03125, image_size=64, num_classes=6)
    net, names = resnet.make(config), list("abcdef")
    run_info = {"stage": "baseline", "dataset": "mine", "class_names": names, "centre": 0.875}
    with rundir.Run(str(tmp_path / "run")) as run:
        run.save(objective.Trainer(net, objective.Objective(), run_info).checkpoint, 1)
    path = write(tmp_path / "a.png", RNG.integers(0, 256, (96, 120, 3), np.uint8))
    status, [line], error = predicted(path, "--checkpoint", run.directory)
    assert status == 0, error
    shares = {entry["class"]: entry["probability"] for entry in line["classes"]}
    for centre, same in [(0.875, True), (1.0, False)]:
        image = pictures.read_picture(str(path), 64, centre)
        logits = net(cifar100.standardize(tf.constant(image[None])))[0]
        expected = dict(zip(names, tf.nn.softmax(logits).numpy(), strict=True))
        close = [share == pytest.approx(expected[name], abs=1e-6) for name, share in shares.items()]
        assert all(close) == same


def test_pictures_of_the_data_set_get_the_classes_of_an_evaluation(tree, data_dir, tmp_path):
    net, run = tree
    images, labels = cifar100.load(data_dir, "test")
    images, labels = images[:200], labels[:200]
    for number, image in enumerate(images):
        write(tmp_path / f"{number:03}.png", image)
    status, lines, error = predicted(tmp_path, "--checkpoint", run)
    assert (status, error, len(lines)) == (0, "", 200)
    names = [line["classes"][0]["class"] for line in lines]
    classes = np.array([cifar100.CLASS_NAMES.index(name) for name in names])
    found = metrics.evaluate(metrics.predictor(net), images, labels, 100)
    confusion = np.zeros_like(found.confusion)
    np.add.at(confusion, (labels, classes), 1)
    np.testing.assert_array_equal(confusion, found.confusion)
    branch_of = {c: n for n, group in enumerate(resnet.class_groups(net)) for c in group}
    for line in lines:
        assert len(line["classes"]) == 5
        shares = [entry["probability"] for entry in line["classes"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-5
        for entry in line["classes"]:
            assert entry["branch"] == branch_of[cifar100.CLASS_NAMES.index(entry["class"])]


def test_pictures_of_all_kinds(tmp_path):
    pixels = RNG.integers(0, 256, (48, 64, 3), np.uint8)
    encoded = {
        "rgb.png": tf.io.encode_png(pixels), "photo.JPG": tf.io.encode_jpeg(pixels, quality=100),
        "grey.png": tf.io.encode_png(pixels[..., :1]),
        "deep.png": tf.io.encode_png(pixels.astype(np.uint16) * 257),
        "clear.png": tf.io.encode_png(np.concatenate([pixels, pixels[..., :1] * 0], axis=-1)),
        "dot.png": tf.io.encode_png(pixels[:1, :1]),
    }  # fmt: skip
    for name, content in encoded.items():
        (tmp_path / name).write_bytes(content.numpy())
    read = {name: predict.read_picture(str(tmp_path / name)) for name in encoded}
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in read.values())
    np.testing.assert_array_equal(read["deep.png"], read["rgb.png"])
    assert (read["clear.png"] == 255).all()  # nothing of it is to be seen
    assert (read["dot.png"] == pixels[0, 0]).all()
    assert (read["grey.png"] == read["grey.png"][..., :1]).all()
    # The centre square, shrunk: about the mean of what a pixel stands for.
    smooth = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 1, 3))
    write(tmp_path / "smooth.png", smooth)
    row = predict.read_picture(str(tmp_path / "smooth.png"))[16, :, 0].astype(float)
    np.testing.assert_allclose(row, 4 * (8 + (np.arange(32) + 0.5) * 1.5 - 0.5), atol=2.5)


def test_pictures_as_other_programs_save_them(tmp_path):
    pixels = RNG.integers(0, 256, (32, 32, 3), np.uint8)
    picture = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6  # upright once it is turned clockwise by 90 degrees
    picture.save(tmp_path / "lossless.webp", lossless=True)
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=turned)
    for name in ("lossless.webp", "photo.png"):
        np.testing.assert_array_equal(predict.read_picture(str(tmp_path / name)), pixels)
    colours = picture.quantize(16)
    colours.save(tmp_path / "palette.bmp")
    read = predict.read_picture(str(tmp_path / "palette.bmp"))
    np.testing.assert_array_equal(read, np.asarray(colours.convert("RGB")))
    clear = np.concatenate([pixels, 0 * pixels[..., :1]], axis=-1)
    for name in ("clear.gif", "clear.webp"):
        Image.fromarray(clear).save(tmp_path / name)
        assert (predict.read_picture(str(tmp_path / name)) == 255).all()
    grey = pixels[..., 0].astype(np.uint16) * 257  # 16 bits
    Image.fromarray(grey).save(tmp_path / "grey.png")
    read = predict.read_picture(str(tmp_path / "grey.png"))
    np.testing.assert_array_equal(read, np.repeat(pixels[..., :1], 3, axis=-1))


def test_what_is_no_picture_is_named_and_the_others_go_on(tree, tmp_path):
    pixels = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    good = write(tmp_path / "good.png", pixels)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    jpeg = tf.io.encode_jpeg(pixels).numpy()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 3])
    (tmp_path / "notes.txt").write_text("passed over in a folder")
    status, lines, error = predicted(tmp_path, tmp_path / "no.png", good, "--checkpoint", tree[1])
    assert status == 1 and [line["picture"] for line in lines] == [str(good)] * 2
    problems = error.splitlines()
    assert len(problems) == 4 and not any("tensorflow" in line.lower() for line in problems)
    for name in ("text.png", "empty.jpg", "cut.jpg", "no.png"):
        assert sum(name in line for line in problems) == 1


def test_words_on_the_screen(tree, tmp_path):
    picture = write(tmp_path / "a.png", RNG.integers(0, 256, (32, 32, 3), np.uint8))
    status, out, _ = inside("predict.py", picture, "--checkpoint", tree[1])
    first, *others = out.splitlines()
    assert status == 0 and first == str(picture) and len(others) == 5
    assert all(" (branch " in line and "%" in line for line in others)


def test_what_is_refused(tree, data_dir, tmp_path):
    fails("predict.py", says="name pictures", status=2)
    fails("predict.py", tmp_path, "--checkpoint", tree[1], says="no file there ends in .png")
    picture = write(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    fails("predict.py", picture, "--checkpoint", tmp_path, says="no checkpoint")
    data = ("--data_dir", data_dir)
    fails("predict.py", picture, "--checkpoint", tree[1], *data, says="was trained on cifar100")
    assert os.listdir(tmp_path) == ["a.png"]


def test_many_pictures_have_a_progress_bar_on_a_terminal(tree, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for number in range(3):
        write(tmp_path / f"{number}.png", RNG.integers(0, 256, (8, 8, 3), np.uint8))
    flags = (tmp_path, "--checkpoint", tree[1], "--batch_size", 2)
    monkeypatch.setattr(predict, "MANY", 2)
    assert predicted(*flags)[2] == ""
    monkeypatch.setattr(io, "StringIO", Terminal)
    status, lines, bar = predicted(*flags)
    assert status == 0 and len(lines) == 3
    assert bar == f"\r[{'#' * 26}{'.' * 14}] 2/3\r[{'#' * 40}] 3/3\n"
