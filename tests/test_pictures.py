"""pictures.py, make_dataset.py: data sets of one's own pictures, from folder to tree."""

import functools
import io
import json
import os
import resource
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from conftest import fails, inside, python, train_flags
from PIL import Image

import cifar100
import make_dataset
import networks
import objective
import pictures
import predict
import rundir
import utils

RNG = np.random.default_rng(0)
SIZE = 16


def picture(*size, mode="RGB"):
    """A random picture, smooth so that JPEG keeps it."""
    small = Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8))
    return small.resize(size or (24, 18), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three classes of six JPEGs and PNGs of several sizes."""
    for name in ("ant", "bee", "cow"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            ending = "jpg" if number % 2 else "png"
            picture(20 + number, 18).save(tmp_path / f"photos/{name}/{number}.{ending}")
    return tmp_path / "photos"


def made(folder, *flags, to="data", size=SIZE):
    """The data set of a folder beside it, and what make_dataset.py says."""
    data_dir = folder.parent / to
    flags = [folder, "--dataset_path", data_dir, "--image_size", size, *flags]
    status, out, error = inside("make_dataset.py", *flags)
    assert status == 0, error
    return str(data_dir), out


def refused(folder, *flags, says):
    """make_dataset.py ends with one line, and leaves nothing."""
    data_dir = folder.parent / "refused"
    fails("make_dataset.py", folder, "--dataset_path", data_dir, *flags, says=says)
    assert not data_dir.exists()


# ---------------------------------------------------------------- one picture, wherever it is read


def written(image, **settings):
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def odd_pictures():
    """The same picture in ways that a decoder may get wrong: name -> bytes."""
    upright = picture(20, 12)
    pixels = np.asarray(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turned by 90 degrees clockwise to be seen
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    grey = upright.convert("L")
    clear = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    bmp = bytearray(written(Image.fromarray(clear), format="BMP"))
    return upright, {
        "plain.png": written(upright, format="PNG"),
        "plain.tif": written(upright, format="TIFF"),
        "turned.png": written(turned, format="PNG", exif=exif),
        "clear.png": written(Image.fromarray(clear), format="PNG"),
        "frames.webp": written(upright, format="WEBP", lossless=True, save_all=True,
                               append_images=[grey.convert("RGB")]),
        "alpha.bmp": bytes(bmp),
        "deep.png": tf.io.encode_png(pixels.astype(np.uint16) * 257).numpy(),
    }, grey  # fmt: skip


def test_odd_pictures_are_the_same_everywhere(tmp_path):
    upright, files, grey = odd_pictures()
    expected = pictures.fit(upright, SIZE)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(pictures.read_picture(str(tmp_path / name), SIZE), expected), name
    grey.save(tmp_path / "grey.png")
    deep = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep_grey.png")
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    upright.save(tmp_path / "rgb.jpg", quality=100)
    read = {p: pictures.read_picture(str(tmp_path / p), SIZE).astype(int)
            for p in ("grey.png", "deep_grey.png", "cmyk.jpg", "rgb.jpg")}  # fmt: skip
    assert np.array_equal(read["grey.png"], read["deep_grey.png"])
    assert np.abs(read["cmyk.jpg"] - read["rgb.jpg"]).mean() < 16


def test_both_kinds_and_predict_read_the_same_pixels(tmp_path):
    _, files, _ = odd_pictures()
    for label in ("a", "b"):
        (tmp_path / "odd" / label).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "odd" / label / name).write_bytes(content)
    of_kind = {}
    for kind in ("arrays", "files"):
        data_dir, _ = made(tmp_path / "odd", "--kind", kind, to=kind)
        for split in cifar100.SPLITS:
            images, labels = cifar100.load(data_dir, split)
            of_kind.setdefault(split, []).append((np.asarray(images), labels))
            batches = cifar100.evaluation_batches(images, labels, 3)
            seen = np.concatenate([batch for batch, _ in batches])
            np.testing.assert_allclose(seen, cifar100.standardize(np.asarray(images)), atol=1e-5)
    for (arrays, labels), (files, other_labels) in of_kind.values():
        assert np.array_equal(arrays, files) and np.array_equal(labels, other_labels)
    images, _ = cifar100.load(data_dir, "test")
    first = os.path.join(tmp_path / "odd", pictures.path_of(images.listing, images.rows[0]))
    assert np.array_equal(images[0], predict.read_picture(first, SIZE))


def test_a_bmp_that_is_transparent_everywhere_is_not():
    pixels = RNG.integers(0, 256, (4, 5, 4), np.uint8)
    for alpha in (0, 255):
        pixels[..., 3] = alpha  # in the order blue, green, red, as its masks say
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack("<IiiHHIIiiII", 108, 5, -4, 1, 32, 3, pixels.size, 0, 0, 0, 0)
        body = header + masks + bytes(108 - 40 - 16) + pixels.tobytes()
        content = struct.pack("<2sIHHI", b"BM", 14 + len(body), 0, 0, 14 + 108) + body
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.mode == "RGBA"
        seen = pictures.decode(content, "blank.bmp")[0]
        assert np.array_equal(np.asarray(seen), pixels[..., 2::-1])


def test_what_tensorflow_decodes_itself_is_what_pillow_reads(tmp_path):
    upright, files, _ = odd_pictures()
    decoders = {name: pictures.decode(content, name)[1] for name, content in files.items()}
    plain = {name for name, decoder in decoders.items() if decoder == pictures.PNG}
    assert plain == {"plain.png"}
    upright.save(tmp_path / "x.jpg", quality=95)
    content = (tmp_path / "x.jpg").read_bytes()
    seen, decoder = pictures.decode(content, "x.jpg")
    assert decoder == pictures.JPEG and pictures.decode(content + b"x", "x")[1] == pictures.ANY
    other = tf.io.decode_jpeg(content).numpy().astype(int)
    assert np.abs(other - np.asarray(seen)).max() < 12


def test_random_boxes_are_in_the_picture_and_of_the_sizes_that_are_said():
    sizes = RNG.integers(8, 500, (2, 4000)).astype(np.int32)
    draws = RNG.random((pictures.CROP_DRAWS, 4000), np.float32)
    top, left, height, width = pictures.random_boxes(sizes, tf.constant(draws)).numpy()
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= sizes[0]).all() and (left + width <= sizes[1]).all()
    square = (sizes[0] > 100) & (np.abs(np.log(sizes[0] / sizes[1])) < 0.2)
    area = (height * width / (sizes[0] * sizes[1]))[square]
    assert 0.07 < area.min() < 0.12 and area.max() > 0.9 and 0.45 < area.mean() < 0.6
    sides = (width / height)[square]
    assert 0.72 < sides.min() < 0.8 and 1.25 < sides.max() < 1.39
    long = np.full((2, 1), [[20], [400]], np.int32)
    box = pictures.random_boxes(long, tf.fill([pictures.CROP_DRAWS, 1], 0.999))
    np.testing.assert_array_equal(box[:, 0], [0, 187, 20, 27])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_crops_by_tensorflow_agree_with_those_by_pillow(tmp_path, image_format):
    """A smooth picture, so that how pixels are averaged hardly counts."""
    for label in ("a", "b"):
        (tmp_path / "p" / label).mkdir(parents=True)
        for number in range(6):
            picture(200, 160).save(tmp_path / f"p/{label}/{number}.x", format=image_format)
            os.rename(tmp_path / f"p/{label}/{number}.x", tmp_path / f"p/{label}/{number}.png")
    data_dir, _ = made(tmp_path / "p", "--kind", "files")
    images, labels = cifar100.load(data_dir, "train")
    ours = next(iter(cifar100.training_batches(images, labels, 8, 3)))[0]
    images.listing["decoders"][:] = pictures.ANY
    others = next(iter(cifar100.training_batches(images, labels, 8, 3)))[0]
    # A JPEG that is shrunk while it is decoded is cut to a pixel of the result.
    assert np.abs(ours - others).mean() < {"PNG": 0.06, "JPEG": 0.3}[image_format]


# ---------------------------------------------------------------- making a data set


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_a_folder_becomes_a_data_set(folder, kind):
    data_dir, out = made(folder, "--kind", kind)
    for text in (
        "classes         3",
        "12 train, 3 val, 3 test",
        "20 to 25 wide, 18",
        "is complete",
    ):
        assert text in out
    with Image.open(os.path.join(data_dir, "samples.png")) as sheet:
        assert sheet.size[1] == 3 * 64
    description = cifar100.describe(data_dir)
    assert description["class_names"] == ["ant", "bee", "cow"] and cifar100.is_own(description)
    labels = [cifar100.load(data_dir, split)[1] for split in ("train", "val", "test")]
    assert [np.bincount(of).tolist() for of in labels] == [[4] * 3, [1] * 3, [1] * 3]
    before = sorted((p, os.stat(os.path.join(data_dir, p)).st_mtime_ns)
                    for p in os.listdir(data_dir))  # fmt: skip
    assert "unchanged" in made(folder, "--kind", kind)[1]
    assert before == sorted(
        (p, os.stat(os.path.join(data_dir, p)).st_mtime_ns) for p in os.listdir(data_dir)
    )
    if kind == "arrays":
        os.truncate(os.path.join(data_dir, "val.npz"), 100)
        assert "val.npz is missing or damaged; writing again" in made(folder)[1]
        assert len(cifar100.load(data_dir, "val")[1]) == 3


def test_the_division_is_the_seeds_and_of_every_class(folder):
    labels = np.repeat(np.arange(5), [2, 3, 10, 100, 7])
    divided = []
    for seed in (0, 0, 1):
        splits = np.zeros(len(labels), np.uint8)
        make_dataset.divide(labels, splits, {"val": 0.1, "test": 0.2}, seed)
        divided.append(splits)
    assert np.array_equal(divided[0], divided[1]) and not np.array_equal(divided[0], divided[2])
    counts = [np.bincount(labels[divided[0] == split], minlength=5) for split in (0, 1, 2)]
    np.testing.assert_array_equal(counts, [[1, 1, 7, 70, 5], [0, 1, 1, 10, 1], [1, 1, 2, 20, 1]])


def test_splits_that_are_there_stay(folder):
    root = folder.parent / "split"
    for part in ("train", "test"):
        shutil.copytree(folder, root / part)
    shutil.rmtree(root / "test" / "bee")
    data_dir, out = made(root)
    assert "15 train, 3 val, 12 test" in out
    assert set(cifar100.load(data_dir, "test")[1].tolist()) == {0, 2}
    shutil.copytree(folder, root / "val")
    assert "18 train, 18 val, 12 test" in made(root, to="all")[1]
    # A class may bear such a name.
    shutil.copytree(folder / "ant", folder / "train")
    assert "classes         4" in made(folder, to="four")[1]


def test_lists(folder):
    lines = [f"{c}/{n}.{'jpg' if n % 2 else 'png'} {['ant', 'bee', 'cow'].index(c)}"
             for c in ("ant", "bee", "cow") for n in range(6)]  # fmt: skip
    os.rename(folder / "ant" / "0.png", folder / "ant" / "my first\tpicture.png")
    lines[0] = "ant/my first\tpicture.png 0"
    train, test = (folder.parent / f"{part}.txt" for part in ("train", "test"))
    train.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[:5] + lines[6:]).encode() + b"\r\n\r\n")
    test.write_text(lines[5] + "\n")
    data_dir, out = made(folder, "--list", f"train={train},test={test}")
    assert "14 train, 3 val, 1 test" in out
    assert cifar100.describe(data_dir)["class_names"] == ["ant", "bee", "cow"]
    words = [line.replace(" 0", " x").replace(" 1", " y").replace(" 2", " z") for line in lines]
    train.write_text("\n".join(words))
    data_dir, _ = made(folder, "--list", train, to="named")
    assert cifar100.describe(data_dir)["class_names"] == ["x", "y", "z"]
    for number, line, says in [
        (3, "ant/9.png 0", "train.txt, line 3: there is no picture"),
        (2, "bee/0.png", "train.txt, line 2: expected a path and a label"),
        (4, "ant/3.jpg 9", "train.txt, line 4: the label 9 is out of range"),
        (4, "ant/3.jpg -1", "train.txt, line 4: the label -1 is out of range"),
        (2, lines[0], "train.txt, line 2: ant/my first\tpicture.png stands in"),
    ]:
        train.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]))
        refused(folder, "--list", train, says=" ".join(says.split()))
    train.write_text("\n".join(lines[:12]))
    test.write_text(lines[12])
    says = "test.txt, line 1: the class 2 has no picture in the list of train"
    refused(folder, "--list", f"train={train},test={test}", says=says)
    refused(folder, "--list", folder.parent / "none.txt", says="none.txt cannot be read")


def spoil(folder, kind):
    """What is wrong with a folder of pictures, and what is said of it."""
    if kind == "bad":
        (folder / "ant" / "0.png").write_text("no picture")
        (folder / "bee" / "1.jpg").write_bytes((folder / "bee" / "1.jpg").read_bytes()[:300])
        return ["2 pictures cannot be read", "ant/0.png", "bee/1.jpg", "--skip_bad"]
    if kind == "empty class":
        (folder / "dog").mkdir()
        return "the class dog has no pictures"
    if kind == "one class":
        for name in ("bee", "cow"):
            shutil.rmtree(folder / name)
        return "one class, ant"
    if kind == "case":
        shutil.copytree(folder / "ant", folder / "Ant")
        return "Ant and ant in"
    if kind == "one picture":
        for number in range(1, 6):
            os.remove(next((folder / "cow").glob(f"{number}.*")))
        return "the class cow has one picture"
    if kind == "no pictures":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "x.heic").write_text("")
        return ["no pictures in", "beside the classes"]
    if kind == "test class":
        os.rename(folder, folder.parent / "train")
        folder.mkdir()
        os.rename(folder.parent / "train", folder / "train")
        shutil.copytree(folder / "train" / "ant", folder / "test" / "gnu")
        return "has the class gnu, which train lacks"
    os.symlink("nowhere.png", folder / "ant" / "link.png")
    return ["1 picture cannot be read", "link.png cannot be read: No such file"]


SPOILED = ("bad", "empty class", "one class", "case", "one picture", "no pictures", "test class",
           "broken link")  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_what_makes_no_data_set_is_named(folder, kind):
    refused(folder, says=spoil(folder, kind))
    if kind == "bad":
        _, out = made(folder, "--skip_bad")
        assert "left out        2 pictures that cannot be read" in out
        assert "unchanged" in made(folder)[1]


def test_what_systems_leave_is_passed_over_and_links_are_followed_once(folder):
    for name in (".DS_Store", "ant/Thumbs.db", "ant/._0.jpg", ".git/x.png", "bee/.x/y.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (folder / "ant" / "notes.heic").write_text("")
    os.symlink("..", folder / "ant" / "loop")
    os.symlink(folder / "bee", folder / "cow" / "more")
    passed = Counter()
    found = [os.path.basename(p) for p in pictures.find(str(folder / "ant"), passed)]
    assert len(found) == 6 + 6 + 6 and passed["hidden"] == 5  # the loop leads to all, once
    os.remove(folder / "ant" / "loop")
    _, out = made(folder)
    assert "6" in out and "1 .heic" in out and "24" in out.split("pictures of 3 classes")[0]


def test_superclasses(folder):
    file = folder.parent / "super.json"
    file.write_bytes(b'\xef\xbb\xbf{"small": ["ant", "bee"], "large": ["cow"]}')
    data_dir, out = made(folder, "--superclasses", file)
    description = cifar100.describe(data_dir)
    assert "3 in 2 superclasses" in out and description["superclass_of_class"] == [0, 0, 1]
    for text, says in [
        ('{"small": ["ant", "gnu"], "large": ["bee", "cow"]}', "names the class 'gnu'"),
        ('{"small": ["ant", "bee"]}', "the class cow is in no superclass"),
        ('{"small": ["ant", "bee"], "large": ["cow", "bee"]}', "bee stands in two"),
        ('["ant"]', "expected {"),
        ("[" * 100_000, "too many brackets"),
        ("{", "cannot be read as JSON"),
    ]:
        file.write_text(text)
        refused(folder, "--superclasses", file, says=["super.json", says])


def test_changed_pictures_are_noticed(folder):
    data_dir, _ = made(folder)
    os.utime(folder / "ant" / "0.png", (1, 1))  # touched, not changed
    assert "unchanged" in made(folder)[1]
    shutil.copy(folder / "bee" / "0.png", folder / "ant" / "0.png")
    os.remove(folder / "cow" / "1.jpg")
    picture().save(folder / "bee" / "new.png")
    flags = [folder, "--dataset_path", data_dir, "--image_size", SIZE]
    says = ["1 added: bee/new.png", "1 changed: ant/0.png", "1 gone: cow/1.jpg", "--overwrite"]
    fails("make_dataset.py", *flags, says=says)
    assert "12 train, 3 val, 3 test" in made(folder, "--overwrite")[1]
    fails("make_dataset.py", *flags[:3], says="image_size is 16, not 32")
    fails("make_dataset.py", *flags, "--seed", 1, says="seed is 0, not 1")
    other = ["download_cifar100.py", "--dataset_path", data_dir, "--synthetic"]
    fails(*other, says="holds a data set that make_dataset.py made")


def test_a_disk_that_fills_leaves_nothing(folder):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5000, 5000))
    data_dir = folder.parent / "data"
    done = python("make_dataset.py", folder, "--dataset_path", data_dir, preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "train.npz cannot be written (File too large)" in done.stderr
    assert not data_dir.exists()


def test_what_a_killed_run_left_goes(folder):
    (folder.parent / "refused" / make_dataset.MAKING).mkdir(parents=True)
    (folder.parent / "refused" / ".lock").touch()
    (folder / "ant" / "0.png").write_bytes(b"half")
    refused(folder, says="0.png")
    picture().save(folder / "ant" / "0.png")
    data_dir, _ = made(folder)
    left = sorted(os.listdir(data_dir))
    os.mkdir(os.path.join(data_dir, make_dataset.MAKING))  # it was killed when all was there
    assert "nothing to do" in made(folder)[1] and sorted(os.listdir(data_dir)) == left


def test_ilsvrc_as_it_comes(tmp_path):
    from scipy.io import savemat

    root, synsets = tmp_path / "imagenet", ["n00000003", "n00000007", "n00000009"]
    for synset in synsets:
        (root / "train" / synset).mkdir(parents=True)
        for number in range(4):
            picture(30, 20).save(root / "train" / synset / f"{synset}_{number}.JPEG")
    (root / "val").mkdir()
    truth = [2, 1, 3, 2]  # ILSVRC2012_IDs, not in the order of the synsets' names
    for number in range(4):
        picture(30, 20).save(root / "val" / f"ILSVRC2012_val_{number + 1:08}.JPEG")
    fails("make_dataset.py", root, "--dataset_path", tmp_path / "d", says="development kit")
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    ids = {"n00000003": (2, "crane, bird"), "n00000007": (3, "crane"), "n00000009": (1, "tench")}
    table = np.array(
        [(number, synset, words) for synset, (number, words) in ids.items()],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)],
    )
    savemat(devkit / "meta.mat", {"synsets": table})
    (devkit / make_dataset.GROUND_TRUTH).write_text("\n".join(map(str, truth)))
    data_dir, out = made(root, "--kind", "files", to="d")
    description = cifar100.describe(data_dir)
    names = ["crane (n00000003)", "crane (n00000007)", "tench"]
    assert description["class_names"] == names and "9 train, 3 val, 4 test" in out
    assert cifar100.load(data_dir, "test")[1].tolist() == [0, 2, 1, 0]
    assert description["centre"] == 0.875 and description["augmentation"] == "crop"
    images, _ = cifar100.load(data_dir, "test")
    first = pictures.read_picture(str(root / "val" / "ILSVRC2012_val_00000001.JPEG"), SIZE, 0.875)
    assert np.array_equal(images[0], first)


def test_a_damaged_list_is_refused(folder):
    data_dir, _ = made(folder, "--kind", "files")
    path = os.path.join(data_dir, pictures.LISTING)
    good = dict(np.load(path))
    for name, value in [
        ("labels", good["labels"] + 9), ("ends", good["ends"][::-1]), ("names", good["names"][1:]),
        ("splits", good["splits"].astype(int)), ("labels", good["labels"][1:]),
    ]:  # fmt: skip
        np.savez(path, **(good | {name: value}))
        with pytest.raises(ValueError, match=r"pictures.npz(:| is damaged).*: make it again"):
            cifar100.load(data_dir, "train")
    os.truncate(path, 200)
    with pytest.raises(ValueError, match="pictures.npz cannot be read"):
        cifar100.load(data_dir, "train")
    assert "pictures.npz is missing or damaged; writing again" in made(folder, "--kind", "files")[1]
    assert len(cifar100.load(data_dir, "train")[1]) == 12


# ---------------------------------------------------------------- every program takes it


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The same pictures, of the network's size, as arrays of CIFAR-100's kind and as both of
    ours: name -> data_dir. The split is given by lists."""
    root = tmp_path_factory.mktemp("kinds")
    counts, names = {"train": 40, "val": 14, "test": 21}, [f"c{n}" for n in range(7)]
    lists, parts = [], {}
    for part, count in counts.items():
        images = RNG.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        labels = (np.arange(count) % 7).astype(np.int32)
        parts[part], lines = (images, labels), []
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = f"{names[label]}/{part}{number:03}.png"
            (root / "p" / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / "p" / path)
            lines.append(f"{path} {label}")
        (root / f"{part}.txt").write_text("\n".join(lines))
        lists.append(f"{part}={root}/{part}.txt")
    parts["train_val"] = tuple(map(np.concatenate, zip(parts["train"], parts["val"], strict=True)))
    (root / "plain").mkdir()
    for part, arrays in parts.items():
        cifar100.save(str(root / "plain"), part, *arrays)
    utils.write_json(root / "plain" / "split.json", {
        "dataset": "plain", "counts": {part: len(of[1]) for part, of in parts.items()},
        "class_names": names, "superclass_names": [], "superclass_of_class": [],
        "image_size": SIZE,
    })  # fmt: skip
    for kind in ("arrays", "files"):
        made(root / "p", "--list", ",".join(lists), "--kind", kind, to=kind)
    return {kind: str(root / kind) for kind in ("plain", "arrays", "files")}


def run(stage, train_dir, data_dir, **flags):
    keep = 0.5 if stage == "group" else 1
    flags = {"k": 1, "batch_size": 10, "max_steps": 6, "dropout_keep_prob": keep} | flags
    done = python("train.py", *train_flags(stage, train_dir, data_dir, **flags))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pipelines(kinds, tmp_path_factory):
    """All stages on each kind: name -> folder of the runs."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind, data_dir in kinds.items():
        run("baseline", root / kind / "baseline", data_dir)
        run("group", root / kind / "group", data_dir)
        run("split", root / kind / "split", data_dir, basemodel=root / kind / "group")
    return {kind: root / kind for kind in kinds}


@pytest.mark.parametrize("stage", ["baseline", "group", "split"])
def test_kinds_train_alike_to_the_bit(pipelines, stage):
    tensors = {kind: rundir.read_checkpoint(str(folder / stage / "model.ckpt-6"))
               for kind, folder in pipelines.items()}  # fmt: skip
    for kind in ("arrays", "files"):
        assert tensors[kind].keys() == tensors["plain"].keys()
        for name in tensors["plain"].keys() - {"description"}:
            np.testing.assert_array_equal(tensors[kind][name], tensors["plain"][name])
        description = json.loads(tensors[kind]["description"])
        assert description["class_names"] == [f"c{n}" for n in range(7)]
        assert (description["config"]["num_classes"], description["config"]["image_size"]) == (
            7,
            16,
        )


def test_kinds_are_evaluated_alike(pipelines, kinds):
    results = []
    for kind, folder in pipelines.items():
        flags = ["--checkpoint", folder / "split", "--data_dir", kinds[kind], "--batch_size", 8]
        for more in ([], ["--devices", "/CPU:0,/CPU:1", "--placement", "hybrid"]):
            done = python("eval.py", *flags, *more)
            assert done.returncode == 0, done.stderr
            found = utils.read_json(str(folder / "split" / "eval" / "result.json"))
            results.append([found["confusion_matrix"], found["flops"], found["num_examples"]])
            assert "superclass_pairs" not in found
    assert all(result == results[0] for result in results) and results[0][2] == 21


def test_every_program_takes_pictures_in_files(pipelines, kinds, tmp_path):
    folder, data_dir = tmp_path / "run", kinds["files"]
    shutil.copytree(pipelines["files"], folder)
    for flags in (["group"], ["group", "--mask"], ["split"]):
        status, _, error = inside(
            "eval.py", "--checkpoint", folder / flags[0], "--data_dir", data_dir, *flags[1:]
        )
        assert status == 0, error
    status, out, error = inside("report", folder, "--data_dir", data_dir)
    assert status == 0 and "superclasses" not in out, error
    page = (folder / "report.html").read_text()
    assert "SplitNet: run, files" in page and "Classes of each group" in page
    image = os.path.join(cifar100.describe(data_dir)["source"], "c1", "test001.png")
    status, out, _ = inside("predict.py", image, "--checkpoint", folder / "split", "--json", "True")
    assert status == 0 and json.loads(out)["classes"][0]["class"].startswith("c")
    flags = ["--checkpoint", folder / "split", "--format", "savedmodel", "--output", tmp_path / "m"]
    status, out, error = inside("export.py", *flags, "--data_dir", data_dir)
    assert status == 0, error
    about = utils.read_json(str(tmp_path / "m" / "assets.extra" / "metadata.json"))
    assert about["class_names"] == [f"c{n}" for n in range(7)] and about["image_size"] == SIZE
    words = ["semantic", "--groups", "2-2-2", "--data_dir", data_dir]
    fails("experiments/variants.py", *words, says="superclasses, and files has none")
    given = tmp_path / "given.json"
    given.write_bytes(b'\xef\xbb\xbf[["c0", "c1", "c2"], ["c3", "c4", "c5", "c6"]]')
    flags = {"basemodel": folder / "baseline", "groups": given, "ngroups1": 2, "ngroups2": 2}
    run("split", tmp_path / "given", data_dir, **flags)


def test_another_data_set_or_size_is_refused(pipelines, kinds, folder):
    other, _ = made(folder)
    flags = ["--checkpoint", pipelines["files"] / "split", "--data_dir", other]
    fails("eval.py", *flags, says="was trained on files")
    third, _ = made(folder, size=18, to="odd")
    flags = train_flags("baseline", folder.parent / "r", third, batch_size=4)
    fails("train.py", *flags, says="multiple of 4 from 8 up, got 18", status=2)
    flags = train_flags("group", folder.parent / "r", other, batch_size=4, ngroups1=4)
    fails("train.py", *flags, says="split 3 classes into 4 groups", status=2)


def test_pictures_that_change_or_go_are_named_with_the_step(folder):
    data_dir, _ = made(folder, "--kind", "files", "--augmentation", "crop")
    train_dir = str(folder.parent / "run")
    flags = train_flags("baseline", train_dir, data_dir, batch_size=3, max_steps=8)
    images, labels = cifar100.load(data_dir, "train")
    steps = [cifar100.batch_indices(step, 3, len(labels), 0).numpy() for step in range(4)]
    number = next(n for n in steps[3] if n not in np.concatenate(steps[:3]))
    path = images._path(number)
    good = open(path, "rb").read()  # noqa: SIM115
    os.remove(path)
    fails("train.py", *flags, says=[path, "No such file", "(needed in step 4)", "put it back"])
    with open(path, "wb") as file:
        file.write(good + b" ")
    fails("train.py", *flags, says=[path, "has changed since", "(needed in step 4)"])
    with open(path, "wb") as file:
        file.write(good)
    assert "going on from" in inside("train.py", *flags)[1]
    again = train_flags("baseline", f"{train_dir}2", data_dir, batch_size=3, max_steps=8)
    assert inside("train.py", *again)[0] == 0
    for name, value in rundir.read_checkpoint(f"{train_dir}/model.ckpt-8").items():
        other = rundir.read_checkpoint(f"{train_dir}2/model.ckpt-8")[name]
        np.testing.assert_array_equal(value, other)


def test_workers_read_their_own_shares(kinds):
    images, labels = cifar100.load(kinds["files"], "train")
    read = []
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    images._pixels = lambda number, step=0: read.append(int(number)) or blank
    batches = cifar100.training_batches(images, labels, 10, 0, share=(1, 2))
    next(iter(batches))
    wanted = [cifar100.batch_indices(step, 10, len(labels), 0).numpy()[5:] for step in range(99)]
    assert set(read) <= set(np.concatenate(wanted[: len(read) // 5 + 1]).tolist())
    for kind in ("arrays", "files"):
        images, labels = cifar100.load(kinds[kind], "train")
        whole, *parts = (
            next(iter(cifar100.training_batches(images, labels, 10, 0, share=share)))
            for share in ((0, 1), (0, 2), (1, 2))
        )
        for one, *two in zip(whole, *parts, strict=True):
            np.testing.assert_allclose(one, np.concatenate(two), atol=1e-6)


def test_two_replicas_lose_alike(kinds, tmp_path):
    losses = []
    for devices in ("", "/CPU:0,/CPU:1"):
        more = {"devices": devices} if devices else {}
        out = tmp_path / (devices.strip("/").replace(",/", "-") or "one")
        run("group", out, kinds["files"], batch_size=12, dropout_keep_prob=1, **more)
        losses.append([r["loss"] for r in rundir.read_metrics(str(out)) if "loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


# ---------------------------------------------------------------- schedules, weights of others


def fitted(num_images, *words):
    import train

    flags = train.parse_flags(["--stage=group", "--train_dir=x", "--ngroups1=2", *words])
    return flags, objective.fit_schedule(flags, num_images)


def test_a_schedule_fits_the_number_of_images():
    words = ["--max_steps=100", "--lr_step_epoch=6,8", "--group_start_epoch=1", "--batch_size=60"]
    flags, said = fitted(45000, *words, "--schedule_for=45000")
    assert (flags.max_steps, flags.lr_step_epoch, said) == (100, [6, 8], "")
    flags, said = fitted(4500, *words, "--schedule_for=45000")
    assert (flags.max_steps, flags.lr_step_epoch) == (100, [60, 80]) and "as many steps" in said
    assert flags.group_start_epoch == 10
    flags, said = fitted(90000, *words, "--schedule_for=45000", "--lr_step_epoch", "1")
    assert (flags.max_steps, flags.lr_step_epoch) == (200, [1]) and "as many epochs" in said
    flags, _ = fitted(90000, "--schedule_for", "45000", "--max_steps", "20")
    assert flags.max_steps == 20
    flags, _ = fitted(30, *words, "--schedule_for=45000")
    assert flags.batch_size == 30
    words = ["--lr_schedule=linear", "--max_steps=5", "--lr_first_step=5", "--lr_total_steps=10"]
    flags, _ = fitted(45001, *words, "--schedule_for=10000")
    assert flags.lr_total_steps >= flags.lr_first_step + flags.max_steps


def test_groups_that_need_more_steps_are_warned_of():
    flags, _ = fitted(45000, "--max_steps=3000", "--schedule_for=45000")

    def slow(network, **settings):
        return objective.slow_groups(flags, networks.config_class(network)(**settings), 500)

    groups = {"groups": (2, 2, 2)}
    assert not slow("wrn", k=0.25, num_classes=10, **groups)
    [line] = slow("wrn", k=0.5, num_classes=1000, **groups)
    assert "1,000 classes need about 112,000 steps" in line and "--group_lr_scale 37" in line
    [line] = slow("alexnet", groups=(2,) * 5)
    assert "4,096 features (p1) need about 327,680 steps" in line
    [line] = slow("wrn", k=0.5, num_classes=100, groups=(1, 1, 4))  # six pairs of groups
    assert "100 classes need about 9,600 steps" in line


def test_weights_of_a_network_with_other_classes(pipelines, kinds, folder):
    data_dir, _ = made(folder)
    out = run("group", folder.parent / "r", data_dir, basemodel=pipelines["files"] / "baseline",
              batch_size=4, max_steps=1, initial_lr=1e-9)  # fmt: skip
    assert "7 classes of files apart, this run 3 of data: the classifier and all" in out
    base = rundir.read_checkpoint(str(pipelines["files"] / "baseline" / "model.ckpt-6"))
    ours = rundir.read_checkpoint(str(folder.parent / "r" / "model.ckpt-1"))
    for name in ("net/unit_3_0/conv_1/kernel", "net/init_conv/kernel"):
        np.testing.assert_allclose(ours[name], base[name], atol=1e-6)
    assert ours["net/logits/fc/weights"].shape == (64, 3)
    # Of the same classes in other groups only the indicators start anew.
    out = run("group", folder.parent / "r2", kinds["files"], basemodel=pipelines["files"] / "group",
              max_steps=1, initial_lr=1e-9, ngroups1=4)  # fmt: skip
    assert "its groups are 2-2-2, not 2-2-4: all indicators start anew" in out
    base = rundir.read_checkpoint(str(pipelines["files"] / "group" / "model.ckpt-6"))
    ours = rundir.read_checkpoint(str(folder.parent / "r2" / "model.ckpt-1"))
    kept = "net/logits/fc/weights"
    np.testing.assert_allclose(ours[kept], base[kept], atol=1e-6)
    assert np.abs(ours["net/group/split_p1/alpha"]).max() < 0.1
