"""eval.py on every kind of checkpoint, its files, and what it refuses."""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, fails, free_port, grouped_net, images, inside, python, write_data

import cifar100
import grouping
import metrics
import objective
import resnet
import restore
import rundir
import utils
from parallel import cluster, devices
from parallel import tree as placing
from parallel.tree import PlacedTree

TF1 = os.path.join(ROOT, "tests", "reference", "tf1_k1_2-2-2", "model.ckpt-0")


def save(net, directory, stage):
    """A run directory that holds `net`; its checkpoint's path."""
    about = {
        "stage": stage,
        "seed": 7,
        "preset": "smoke",
        "dataset": "synthetic",
        "indices_sha256": "",
    }
    trainer = objective.Trainer(net, objective.Objective(), about)
    trainer.steps_done.assign(12)
    with rundir.Run(str(directory)) as run:
        return run.save(trainer.checkpoint, 12)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    dense = grouped_net((2, 4, 4))
    return {"dense": save(dense, root / "group", "group"),
            "tree": save(resnet.split(dense), root / "split", "split")}  # fmt: skip


def evaluate(checkpoint, data_dir, *flags):
    status, out, error = inside(
        "eval.py", "--checkpoint", checkpoint, "--data_dir", data_dir, *flags
    )
    assert status == 0, error
    return out


def test_result_of_a_tree(checkpoints, data_dir, tmp_path):
    run, file = os.path.dirname(checkpoints["tree"]), tmp_path / "result.pkl"
    out = evaluate(run, data_dir, "--output_file", file, "--batch_size", 100)
    result = utils.read_json(os.path.join(run, "eval", "result.json"))
    tree, _ = restore.load_network(checkpoints["tree"])
    pictures, labels = cifar100.load(data_dir, "test")
    predictions = np.argmax(tree(cifar100.standardize(pictures)), axis=1)
    assert result["num_examples"] == 230 and result["correct"] == (predictions == labels).sum()
    assert result["accuracy"] == result["correct"] / 230
    assert result["error"] == 1 - result["accuracy"]
    confusion = np.array(result["confusion_matrix"])
    assert confusion.sum() == 230 and np.trace(confusion) == result["correct"]
    np.testing.assert_array_equal(confusion.sum(axis=0), np.bincount(predictions, minlength=100))
    assert (result["weights"], result["flops"]) == resnet.count(tree)
    assert result["groups"] == "2-4-4" and result["step"] == 12 and result["seed"] == 7
    assert result["preset"] == "smoke" and result["dataset"] == "synthetic"
    assert sorted(sum(result["group_classes"], [])) == list(range(100))
    for classes, accuracy in zip(result["group_classes"], result["group_accuracy"], strict=True):
        mine = np.isin(labels, classes)
        assert accuracy == pytest.approx((predictions == labels)[mine].mean())
    assert {"hardware", "versions", "placement", "devices", "precision"} <= result.keys()
    published = pickle.loads(file.read_bytes())
    assert set(published) == {"accuracy", "confusion_matrix", "test_time", "sec_per_image"}
    np.testing.assert_array_equal(published["confusion_matrix"], confusion)
    assert f"accuracy {result['accuracy']:.4f}" in out and "group 3:" in out


def test_masked_network_is_the_tree(checkpoints, data_dir, tmp_path):
    results = []
    for name, flags in [("tree", ()), ("dense", ("--mask", "True")), ("dense", ())]:
        directory = tmp_path / f"{name}{len(flags)}"
        evaluate(checkpoints[name], data_dir, "--eval_dir", directory, *flags)
        results.append(utils.read_json(directory / "result.json"))
    tree, masked, dense = results
    assert tree["confusion_matrix"] == masked["confusion_matrix"] != dense["confusion_matrix"]
    assert tree["group_classes"] == masked["group_classes"]
    assert masked["masked"] and tree["weights"] < masked["weights"] == dense["weights"]


def test_published_checkpoint(data_dir, tmp_path):
    evaluate(TF1, data_dir, "--eval_dir", tmp_path, "--mask")
    result = utils.read_json(tmp_path / "result.json")
    assert result["groups"] == "2-2-2" and result["weights"] == 179_556 + 432


def test_other_splits(checkpoints, data_dir, tmp_path):
    evaluate(checkpoints["tree"], data_dir, "--eval_dir", tmp_path, "--split", "val")
    assert utils.read_json(tmp_path / "result.json")["num_examples"] == 130


def test_what_is_refused(checkpoints, data_dir, tmp_path):
    data = ("--data_dir", data_dir)
    fails("eval.py", "--chekpoint", "x", status=2, says="did you mean --checkpoint?")
    fails("eval.py", "--checkpoint", tmp_path, *data, says="no checkpoint")
    fails("eval.py", "--checkpoint", checkpoints["tree"], "--mask", *data, says="--mask needs")
    fails("eval.py", "--checkpoint", checkpoints["tree"], "--data_dir", tmp_path, says="download")
    other = write_data(tmp_path / "other", {"test": 100})
    path = tmp_path / "other" / "split.json"
    path.write_text(path.read_text().replace("synthetic", "cifar100"))
    fails("eval.py", "--checkpoint", checkpoints["tree"], "--data_dir", other, says="synthetic")
    assert not os.path.exists(tmp_path / "eval")
    missing = tmp_path / "no" / "such.pkl"
    fails("eval.py", "--checkpoint", checkpoints["tree"], *data, "--output_file", missing,
          says="name another --output_file")  # fmt: skip


def test_each_question_has_its_own_folder(checkpoints, data_dir):
    evaluate(checkpoints["dense"], data_dir, "--mask", "--split", "val")
    run = os.path.dirname(checkpoints["dense"])
    assert utils.read_json(os.path.join(run, "eval_mask_val", "result.json"))["masked"]


@pytest.mark.parametrize(
    "description",
    ["{", "[]", "{}", '{"network": "dense"}', '{"network": "dense", "config": "x"}',
     '{"network": "tree", "config": {"k": 1, "groups": [1, 1, 2]}}',
     '{"network": "dense", "config": {"k": "1"}}', '{"network": "dense", "config": {"depth": 3}}'],
)  # fmt: skip
def test_descriptions_that_make_no_network(description, data_dir, tmp_path):
    variable = tf.Variable(description)
    with rundir.Run(str(tmp_path)) as run:
        path = run.save(tf.train.Checkpoint(description=variable, x=tf.Variable(1.0)), 1)
    fails("eval.py", "--checkpoint", tmp_path, "--data_dir", data_dir, says=path)


def test_a_network_of_other_classes(data_dir, tmp_path):
    net = resnet.ResNet(resnet.NetworkConfig(num_residual_units=1, k=1, num_classes=10))
    variable = tf.Variable(json.dumps(resnet.to_dict(net)))
    with rundir.Run(str(tmp_path)) as run:
        run.save(tf.train.Checkpoint(net=net, description=variable), 1)
    says = "tells 10 classes apart, and the data set has 100"
    fails("eval.py", "--checkpoint", tmp_path, "--data_dir", data_dir, says=says)


def test_damaged_checkpoint(checkpoints, data_dir, tmp_path):
    for ending in (".index", ".data-00000-of-00001"):
        content = open(checkpoints["tree"] + ending, "rb").read()  # noqa: SIM115
        (tmp_path / f"model.ckpt-12{ending}").write_bytes(content[: len(content) // 2])
    fails("eval.py", "--checkpoint", tmp_path, "--data_dir", data_dir, says="model.ckpt-12 is torn")


def test_group_accuracies():
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    groups = [np.array([0, 1]), np.array([2])]
    assert metrics.group_accuracies(confusion, groups) == [5 / 8, 0.0]


# ---------------------------------------------------------------- devices

PLACED = [
    ("single", "/CPU:1"),
    ("hybrid", "/CPU:0,/CPU:1"),
    ("branch", "/CPU:0,/CPU:1,/CPU:2,/CPU:3"),
]


@pytest.mark.parametrize("placement, devices", PLACED)
def test_predictions_do_not_depend_on_the_placement(
    placement, devices, checkpoints, data_dir, tmp_path
):
    """In a process of its own: logical devices are made before TensorFlow's first operation."""
    evaluate(checkpoints["tree"], data_dir, "--eval_dir", tmp_path / "here")
    flags = ["--placement", placement, "--devices", devices, "--eval_dir", tmp_path / "there"]
    flags += ["--checkpoint", checkpoints["tree"], "--data_dir", data_dir, "--batch_size", 33]
    done = python("eval.py", *flags)
    assert done.returncode == 0, done.stderr
    here, there = (utils.read_json(tmp_path / name / "result.json") for name in ("here", "there"))
    assert here["confusion_matrix"] == there["confusion_matrix"]
    assert here["cross_entropy"] == pytest.approx(there["cross_entropy"], rel=1e-5)
    assert there["placement"] == placement and there["devices"] == devices.split(",")


def test_branches_go_over_all_gpus_where_a_person_leaves_it_open(monkeypatch):
    net = grouped_net((1, 2, 2))
    tree = resnet.split(net)
    for gpus, expected in [([], ("single", [])), (["/GPU:0"], ("single", [])),
                           (["/GPU:0", "/GPU:1"], ("branch", ["/GPU:0", "/GPU:1"]))]:  # fmt: skip
        monkeypatch.setattr(placing, "gpu_names", lambda gpus=gpus: gpus)
        assert placing.choose(tree, []) == expected
        assert placing.choose(net, []) == placing.choose(tree, [], alone=True) == ("single", [])
    assert placing.choose(tree, ["/CPU:1"]) == ("single", ["/CPU:1"])
    assert placing.choose(tree, ["/CPU:0", "/CPU:1"]) == ("branch", ["/CPU:0", "/CPU:1"])
    with pytest.raises(ValueError, match="only a tree has branches to share out over 2 devices"):
        placing.choose(net, ["/CPU:0", "/CPU:1"])


def test_the_default_placement_says_what_it_chose(checkpoints, data_dir, tmp_path):
    flags = ["--checkpoint", checkpoints["tree"], "--data_dir", data_dir]
    done = python("eval.py", *flags, "--devices", "/CPU:0,/CPU:1", "--eval_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("placement branch on /CPU:0, /CPU:1\n")
    result = utils.read_json(tmp_path / "result.json")
    assert result["placement"] == "branch" and result["devices"] == ["/CPU:0", "/CPU:1"]


def test_each_device_computes_its_own_branches_only():
    tree = resnet.split(grouped_net((2, 4, 8)))
    placed = PlacedTree(tree, ["/CPU:0"] * 2, hybrid=False)
    classes = [np.concatenate([leaf.classes for leaf in leaves]) for leaves in placed.leaves]
    assert sorted(np.concatenate(classes)) == list(range(100))
    np.testing.assert_allclose(placed(images()), tree(images()), rtol=1e-5, atol=1e-6)
    for leaves, own in zip(placed.leaves, classes, strict=True):
        with tf.GradientTape() as tape:
            logits = tf.concat(tree.leaf_logits(images(), wanted=leaves), axis=1)
        assert logits.shape == (4, len(own))
        grads = tape.gradient(logits, tree.trainable_variables)
        read = {
            v.ref() for v, g in zip(tree.trainable_variables, grads, strict=True) if g is not None
        }
        for leaf in tree.leaves():
            assert (leaf.logits.fc.weights.ref() in read) == (leaf in leaves)


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.7])
def test_the_busiest_device_has_as_little_as_can_be(share, number):
    """Of all ways to cut the row of leaves, also where the first branch is much larger."""
    config = resnet.NetworkConfig(k=1, groups=(2, 4, 4))
    assignment = {}
    for name, (groups, size) in grouping.indicator_shapes(config).items():
        bounds = np.array([share] if groups == 2 else [share / 2, share, share + (1 - share) / 2])
        assignment[name] = np.searchsorted(np.round(bounds * size), np.arange(size), "right")
    tree = resnet.SplitResNet(config, assignment)
    placed, leaves = PlacedTree(tree, ["/CPU:0"] * number, hybrid=False), list(tree.leaves())
    assert sum(placed.leaves, []) == leaves
    busiest = []
    for cuts in itertools.combinations_with_replacement(range(5), number - 1):
        bounds = [0, *cuts, 4]
        placed.leaves = [leaves[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        busiest.append(max(placed.device_flops))
    best = PlacedTree(tree, ["/CPU:0"] * number, hybrid=False)
    assert max(best.device_flops) == min(busiest)
    assert sum(map(bool, best.leaves)) == min(number, 4)  # nobody idle


def test_devices_by_tensorflows_names():
    assert devices.find_devices(["/device:CPU:0"]) == devices.find_devices(["cpu:0"])


def test_a_cluster_of_this_machine_and_others(monkeypatch):
    monkeypatch.setattr(cluster, "_answers", lambda *_: True)
    for here in ("127.0.0.1:5000", "[::1]:5000"):
        with pytest.raises(ValueError, match="the others cannot reach"):
            cluster.connect([here, "192.0.2.1:5000"])


def test_devices_that_are_refused(checkpoints, data_dir):
    tree = ("--checkpoint", checkpoints["tree"], "--data_dir", data_dir)
    for names in ("CPU", "/job:worker/task:3/CPU:0", "/CPU:500", "0,1"):
        fails("eval.py", *tree, "--devices", names, "--placement", "single" if "," not in names
              else "branch", says="names such as /GPU:0")  # fmt: skip
    for flags, says in [
        (("--placement", "branch"), "branch and hybrid take several"),
        (("--devices", "/CPU:0,/CPU:1", "--placement", "single"), "single takes one"),
    ]:
        fails("eval.py", *tree, *flags, says=says, status=2)
    done = python("eval.py", *tree, "--devices", "/GPU:7")
    assert done.returncode == 1 and "/GPU:7 is not there: there are /CPU:0" in done.stderr
    flags = ("--placement", "hybrid", "--devices", "/CPU:0,/CPU:1")
    done = python("eval.py", "--checkpoint", checkpoints["dense"], "--data_dir", data_dir, *flags)
    assert done.returncode == 1 and "only a tree has branches" in done.stderr


def test_validation_images_must_be_the_runs_own(checkpoints, data_dir, tmp_path):
    """Those of another division may have been trained on; test images are the same in all."""
    other = shutil.copytree(data_dir, tmp_path / "other")
    about = utils.read_json(other / "split.json") | {"indices_sha256": "12ab"}
    utils.write_json(other / "split.json", about)
    flags = ("--checkpoint", checkpoints["tree"], "--data_dir", other, "--eval_dir", tmp_path)
    assert inside("eval.py", *flags)[0] == 0
    fails("eval.py", *flags, "--split", "val", says=["was trained on", "12ab", "--data_dir"])


# ---------------------------------------------------------------- other machines


@contextlib.contextmanager
def workers(number):
    """Processes of `eval.py --worker` that have said that they serve, and their addresses."""
    ports = [free_port() for _ in range(number)]
    command = [sys.executable, os.path.join(ROOT, "eval.py"), "--worker"]
    started = [
        subprocess.Popen([*command, str(port)], stdout=subprocess.PIPE, text=True) for port in ports
    ]
    try:
        for process in started:
            assert process.stdout.readline().startswith("serving")
        yield started, ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_workers_of_a_cluster_predict_the_same(checkpoints, data_dir, tmp_path):
    evaluate(checkpoints["tree"], data_dir, "--eval_dir", tmp_path / "here")
    here = utils.read_json(tmp_path / "here" / "result.json")
    flags = ["--checkpoint", checkpoints["tree"], "--data_dir", data_dir]
    with workers(2) as (_, cluster):
        for placement in ("branch", "hybrid"):  # one after the other on the same workers
            where = ["--placement", placement, "--cluster", cluster, "--eval_dir", tmp_path / "far"]
            done = python("eval.py", *flags, *where)
            assert done.returncode == 0, done.stderr
            far = utils.read_json(tmp_path / "far" / "result.json")
            assert far["confusion_matrix"] == here["confusion_matrix"]
            assert far["cluster"] == cluster.split(",") and far["placement"] == placement
            assert [name.split("/")[3] for name in far["devices"]] == ["task:0", "task:1"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_worker_that_is_lost(number, checkpoints, tmp_path):
    """It dies, or it hangs: one line, soon after it counts as lost."""
    data = write_data(tmp_path / "data", {"test": 20000})  # one by one: a minute's work
    results = tmp_path / "eval"
    flags = ["--checkpoint", checkpoints["tree"], "--data_dir", data, "--batch_size", "1"]
    with workers(2) as (started, addresses):
        flags += ["--placement", "branch", "--cluster", addresses, "--eval_dir", str(results)]
        command = [sys.executable, os.path.join(ROOT, "eval.py"), *flags]
        begun = time.monotonic()
        client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not results.exists():  # made when the workers have answered, before evaluating
            assert client.poll() is None
            time.sleep(0.1)
        start_up = time.monotonic() - begun  # on this machine, as busy as it is now
        time.sleep(5)
        assert client.poll() is None
        started[1].send_signal(number)
        start = time.monotonic()
        _, error = client.communicate(timeout=600)
    assert time.monotonic() - start < cluster.PATIENCE + max(10, 2 * start_up)
    assert client.returncode == 1
    assert error.count("\n") == 1 and error.startswith("eval.py: error: lost a worker"), error


def test_clusters_that_are_refused(checkpoints, data_dir, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 2)
    tree = ("--checkpoint", checkpoints["tree"], "--data_dir", data_dir, "--placement", "branch")
    silent = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    start = time.monotonic()
    fails("eval.py", *tree, "--cluster", silent, says=["no worker answers", "--worker"])
    assert 0.9 < time.monotonic() - start < 300  # it waits, and not for ever
    fails("eval.py", *tree, "--cluster", "here,there", says="host:port")
    fails("eval.py", *tree, "--cluster", "a:1,b:2", "--devices", "/CPU:0", status=2,
          says="leave one out")  # fmt: skip
    fails("eval.py", "--worker", "0", status=2, says="whole number")
    for worker in (["--worker", "5000"], ["--worker=5000"]):
        fails("eval.py", *worker, "--mask", status=2, says="takes no other flag")
    listening = socket.create_server(("127.0.0.1", 0))  # something, but no worker
    other = f"127.0.0.1:{listening.getsockname()[1]},127.0.0.1:{free_port()}"
    fails("eval.py", *tree, "--cluster", other, says="no worker answers")
    listening.close()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        done = python("eval.py", "--worker", taken.getsockname()[1])
    assert done.returncode == 1 and "cannot be used" in done.stderr


# ---------------------------------------------------------------- XLA


def test_jit_compile_predicts_the_same(checkpoints, data_dir, tmp_path):
    for name, flags in [("plain", []), ("jit", ["--jit_compile"])]:
        evaluate(checkpoints["tree"], data_dir, "--eval_dir", tmp_path / name, *flags)
    plain, jit = (utils.read_json(tmp_path / name / "result.json") for name in ("plain", "jit"))
    assert plain["cross_entropy"] == pytest.approx(jit["cross_entropy"], rel=1e-5)
    flags = ("--checkpoint", checkpoints["tree"], "--data_dir", data_dir, "--jit_compile")
    flags += ("--placement", "branch", "--devices", "/CPU:0,/CPU:1")
    fails("eval.py", *flags, status=2, says="one device")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_smaller_than_the_devices(size):
    """Parts without images break TensorFlow's fused convolutions: the batch is filled up."""
    tree = resnet.split(grouped_net((2, 4, 4)))
    placed = PlacedTree(tree, ["/CPU:0"] * 4, hybrid=True)
    expected, found = (tf.function(f)(images(size)) for f in (tree, placed))
    assert found.shape == (size, 100)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
