"""The benchmark, its timed processes, and what the devices have to do by FLOPs."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, fails, grouped_net, images, inside, randomize, stand_in

import objective
import resnet
import rundir
import utils
from benchmark import __main__ as benchmark
from benchmark import cases, frameworks, timing
from benchmark.dense import Horizontal, Vertical
from parallel.tree import PlacedTree, place

DEVICES = ["/CPU:0"] * 3  # the same one again and again computes the same


def dense(**settings):
    return randomize(resnet.ResNet(resnet.NetworkConfig(**settings)))


@pytest.mark.parametrize("kind", [Horizontal, Vertical])
@pytest.mark.parametrize(
    "number, settings", [(1, {}), (2, {"k": 2}), (3, {"num_residual_units": 3})]
)
def test_dense_placements_compute_the_network(kind, number, settings):
    net = dense(**{"k": 1} | settings)
    placed = kind(net, DEVICES[:number])
    np.testing.assert_allclose(placed(images(7)), net(images(7)), rtol=1e-4, atol=1e-4)
    assert sum(placed.device_flops) == resnet.count(net)[1]
    assert max(placed.device_flops) < 1.4 * resnet.count(net)[1] / number


@pytest.mark.parametrize(
    "groups, number, branch, hybrid",
    [("1-2-2", 2, 1.35, 2.42), ("2-2-2", 2, 2.08, 3.06), ("2-4-4", 2, 2.29, 3.53),
     ("3-3-3", 3, 2.61, 5.57)],
)  # fmt: skip
def test_speedups_by_flops_are_the_papers(groups, number, branch, hybrid):
    flops = resnet.count(resnet.ResNet(cases.network_config(8, "dense")))[1]
    tree = resnet.equal_tree(cases.network_config(8, groups))
    for expected, how in [(branch, "branch"), (hybrid, "hybrid")]:
        placed = place(tree, DEVICES[:number], how)
        assert flops / max(placed.device_flops) == pytest.approx(expected, abs=0.015)


def test_a_devices_flops_are_what_it_computes():
    tree = resnet.split(grouped_net((2, 4, 4)))
    placed = PlacedTree(tree, ["/CPU:0"], hybrid=False)
    assert placed.device_flops == [resnet.count(tree)[1]]
    two = PlacedTree(tree, ["/CPU:0"] * 2, hybrid=True)
    assert sum(two.device_flops) == pytest.approx(resnet.count(tree)[1])


def test_equal_groups_are_equal():
    tree = resnet.equal_tree(resnet.NetworkConfig(k=2, groups=(2, 4, 4)))
    for name, group_of in tree.assignment.items():
        sizes = np.bincount(group_of)
        assert sizes.max() - sizes.min() <= 1, name


@pytest.fixture
def forks(monkeypatch):
    """Timed processes are forks of one that has loaded TensorFlow, which takes most of their time.

    Not where their start or what they load is looked at, below.
    """
    monkeypatch.setattr(sys, "executable", stand_in())


def test_the_whole_benchmark(monkeypatch, forks, tmp_path):
    """Every part, as a person runs it, with fewer rows."""
    monkeypatch.setattr(benchmark, "ROWS", [benchmark.ROWS[i] for i in (0, 1, 3, 8, 9)])
    monkeypatch.setattr(benchmark, "STEPS", benchmark.STEPS[:2])
    monkeypatch.setattr(rundir, "num_cores", lambda: 2)
    file = tmp_path / "benchmark.json"
    flags = ["--k", 1, "--batch_size", 6, "--repeats", 2, "--output_file", file]
    status, out, error = inside("benchmark", *flags, "--devices", "/CPU:0,/CPU:1,/CPU:2")
    assert status == 0, error
    found = utils.read_json(file)
    assert {"hardware", "versions", "parallel", "training", "pipeline"} == found.keys()
    placed = [(r["row"], r["devices"], r["placement"]) for r in found["parallel"]]
    assert placed == [(row, number, how) for row, _, number, how, _ in benchmark.ROWS]
    for row in found["parallel"]:
        assert row["images_per_second"] == pytest.approx(6 / row["seconds"])
        assert row["speedup"] > 0 and row["device_memory"] > 0 and row["batch_size"] == 6
    assert found["parallel"][3]["groups"] == "2-2-2"
    assert [(r["stage"], r["k"]) for r in found["training"]] == [("baseline", 1), ("group", 1)]
    assert found["training"][0]["seconds_per_step"] > 0
    assert found["pipeline"]["images_per_second_per_core"] > 0
    assert 0 <= found["pipeline"]["wait_share"] < 1
    assert "| Deep " in out and "too few cores" in out
    assert {(r["k"], r["repeats"], r["paper_speedup"]) for r in found["parallel"]} == {(1, 2, None)}
    # Another part is added to what is there, but not to what another machine measured.
    other = {"images_per_second_per_core": 1, "wait_share": 0.5}
    monkeypatch.setattr(benchmark, "pipeline", lambda flags: other)
    monkeypatch.setattr(benchmark, "files_pipeline", lambda flags: found["pipeline"]["files"])
    assert inside("benchmark", *flags, "--only", "pipeline")[0] == 0
    again = utils.read_json(file)
    assert again["parallel"] == found["parallel"] and again["pipeline"] != found["pipeline"]
    utils.write_json(file, again | {"hardware": "another"})
    status, out, _ = inside("benchmark", *flags, "--only", "pipeline")
    assert status == 0 and "is of other code or of another machine: it starts anew" in out
    assert "parallel" not in utils.read_json(file)


def test_the_input_pipeline_costs_less_than_its_operations_one_by_one():
    """In turns on one core, however fast or busy that is. Measured: a tenth of the time."""
    work = (6, 20)
    with timing.TimedProcess(cases.make_plain_input, *work, threads=(1, 1)) as plain:
        with timing.TimedProcess(cases.make_pipeline, *work, threads=(1, 1)) as pipeline:
            assert timing.compare(plain, pipeline, repeats=9)["speedup"] > 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keras_peer(precision, tmp_path):
    file = tmp_path / "peers.json"
    flags = ["--k", 1, "--batch_size", 6, "--repeats", 1, "--output_file", file]
    status, _, error = inside("benchmark", "--peer", "keras", "--precision", precision, *flags)
    assert status == 0, error
    [row] = utils.read_json(file)["peers"]
    assert row["peer"] == "keras" and row["precision"] == precision
    assert row["relative"] == pytest.approx(row["our_seconds_per_step"] / row["seconds_per_step"])
    assert row["peak_memory"] > 0 and row["our_peak_memory"] > 0


@pytest.mark.parametrize("network, k, size", [("resnet18", 0.125, 32), ("alexnet", 0.03125, 64)])
def test_keras_has_the_same_network(network, k, size):
    config = frameworks.config(k, network=network, image_size=size)
    model, net = frameworks.keras_model(config, "float32"), resnet.make(config)
    shapes = [sorted(tuple(v.shape) for v in of.trainable_variables) for of in (model, net)]
    kernels = [[s for s in of if len(s) == 4] for of in shapes]
    if network == "alexnet":  # its fully connected layers are convolutions here
        kernels = [[s for s in of if s[0] not in (1, config.resolution(5))] for of in kernels]
    assert kernels[0] == kernels[1] and len(kernels[0]) == (20 if network == "resnet18" else 5)
    assert sum(map(np.prod, shapes[0])) == sum(map(np.prod, shapes[1]))


def test_other_networks(monkeypatch, forks, tmp_path):
    """What a device holds of a tree; only what is there for them is taken."""
    monkeypatch.setitem(benchmark.OTHER_ROWS, "alexnet", benchmark.OTHER_ROWS["alexnet"][::5])
    monkeypatch.setattr(benchmark, "STEPS", benchmark.STEPS[:1])
    small = ["--network", "alexnet", "--k", 0.03125, "--image_size", 64, "--batch_size", 2]
    flags = [*small, "--repeats", 1, "--output_file", tmp_path / "b.json"]
    status, out, error = inside("benchmark", *flags)
    assert status == 0, error
    found = utils.read_json(tmp_path / "b.json")
    dense, tree = found["parallel"]
    config = cases.network_config(0.03125, "2-2-2-2-2", network="alexnet", image_size=64)
    net = resnet.equal_tree(config)
    half = net.own_count()[0] + max(resnet.count(branch)[0] for branch in net.branches)
    assert (
        dense["device_weights"]
        == resnet.count(resnet.make(dataclasses.replace(config, groups=(1,) * 5)))[0]
    )
    assert (tree["devices"], tree["groups"], tree["device_weights"]) == (2, "2-2-2-2-2", half)
    assert "AlexNet-x0.03125" in out and found["training"][0]["network"] == "AlexNet-x0.03125"
    for more, says in [
        (["--only", "engines"], "parts parallel and training"),
        (["--peer", "torch"], "--peer keras"),
        (["--image_size", 20], "57 or more"),
    ]:
        fails("benchmark", *small, *more, status=2, says=says)
    fails("benchmark", "--image_size", 64, status=2, says="--network resnet18 and alexnet")
    fails("benchmark", "--network", "vgg", status=2, says="one of wrn, resnet18, alexnet")


def test_what_is_refused(tmp_path):
    for flags, says in [
        (["--only", "paralel"], "--only takes parallel"),
        (["--peer", "jax"], "--peer takes keras"),
        (["--precision", "float16"], "--precision takes"),
        (["--k", "0.1"], "too small"),
        (["--repeats", "0"], "whole number"),
        (["--only", "engines", "--batch_size", 4], "no effect in part engines"),
        (["--only", "engines", "--precision", "bfloat16"], "no effect in part engines"),
    ]:
        fails("benchmark", *flags, status=2, says=says)
    fails("benchmark", "--output_file", tmp_path / "no" / "b.json", says="output_file")
    flags = ["--only", "parallel", "--output_file", tmp_path / "b.json", "--k", 1]
    fails("benchmark", *flags, "--devices", "/GPU:7", says="/GPU:7 is not there")
    fails("benchmark", *flags, "--checkpoint", tmp_path, says="no checkpoint")
    fails("benchmark", "--peer", "keras", "--checkpoint", tmp_path, status=2, says="no effect")
    fails("benchmark", "--output_file", tmp_path, says="is a folder")
    with rundir.Run(str(tmp_path)) as run:
        run.save(objective.Trainer(dense(k=1), objective.Objective(), {}).checkpoint, 1)
    fails("benchmark", *flags, "--checkpoint", tmp_path, says="is no tree of a WRN-16-1")


def test_a_given_tree_has_rows_of_its_own(monkeypatch, forks, tmp_path):
    monkeypatch.setattr(benchmark, "ROWS", [benchmark.ROWS[0], benchmark.ROWS[9]])
    with rundir.Run(str(tmp_path)) as run:
        tree = resnet.split(grouped_net((2, 2, 2)))
        run.save(objective.Trainer(tree, objective.Objective(), {}).checkpoint, 1)
    flags = ["--only", "parallel", "--k", 1, "--batch_size", 1, "--repeats", 1]
    flags += ["--checkpoint", tmp_path, "--output_file", tmp_path / "b.json"]
    status, _, error = inside("benchmark", *flags)
    assert status == 0, error
    rows = utils.read_json(tmp_path / "b.json")["parallel"]
    assert [(r["row"], r["placement"]) for r in rows][2:] == [("Given", "hybrid")]
    assert rows[2]["paper_speedup"] is None


def test_a_timed_process_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match="could not measure it.*nothere"):
        timing.TimedProcess(frameworks.make, "nothere", 1, "float32", 2)


def test_a_peer_loads_no_tensorflow():
    """Its peak memory is to be its own."""
    code = "import sys; from benchmark import engines, frameworks, timing\n"
    code += "print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_engines_of_other_makers(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(benchmark, "EXPORTED", [("dense", None), ("2-2-2", 1)])
    monkeypatch.setattr(benchmark, "BATCHES", [(2, 1)])
    file = tmp_path / "b.json"
    flags = ["--only", "engines", "--k", 1, "--repeats", 1, "--output_file", file]
    status, out, error = inside("benchmark", *flags)
    assert status == 0, error
    rows = utils.read_json(file)["engines"]
    ours = [row for row in rows if row["engine"] == "ONNX Runtime"]
    assert [row["network"] for row in ours] == ["dense", "2-2-2, one branch"]
    for row in ours:
        assert row["relative"] == pytest.approx(row["our_seconds"] / row["seconds"])
        assert row["k"] == 1 and row["first_seconds"] > 0 and row["our_first_seconds"] > 0
    assert "| ONNX Runtime |" in out


def test_files_of_peers_and_of_the_table_are_two():
    assert benchmark.parse_flags([]).output_file == "benchmark.json"
    assert benchmark.parse_flags(["--peer", "keras"]).output_file == "peers.json"
    both = benchmark.parse_flags(["--peer", "keras", "--only", "pipeline"])
    assert both.output_file == "benchmark.json"


def test_waiting_is_measured_after_the_batches_that_were_ready(monkeypatch):
    class Fed:
        """Two steps to start; batches that were ready take no time, later ones half of a step."""

        def __init__(self, *_, **__):
            self.steps = 2

        def seconds(self):
            self.steps += 1
            return 1.0

        def stats(self):
            waits = [float(i >= benchmark.READY) for i in range(self.steps)]
            return {"waits": waits, "steps": [2.0] * self.steps}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(benchmark, "TimedProcess", Fed)
    assert benchmark.pipeline(benchmark.parse_flags(["--only", "pipeline"]))["wait_share"] == 0.5


def test_first_step_is_counted_from_the_processs_start():
    begun = time.monotonic()
    with timing.TimedProcess(cases.make_training, "baseline", 1.0, 1, "float32", 2) as it:
        whole = time.monotonic() - begun  # TensorFlow's import, most of it, and two steps
        assert whole / 2 < it.about["first_step_seconds"] < whole + 0.1
        assert it.seconds() < it.about["first_step_seconds"]


def test_bfloat16_keeps_the_rest_in_float32():
    net = dense(k=1)
    logits = net(tf.cast(images(2), tf.bfloat16))
    assert logits.dtype == tf.float32
    assert all(v.dtype == tf.float32 for v in net.variables)


def test_an_uneven_split_can_be_timed():
    step, _ = cases.make_training("uneven split", 1.0, 1, "float32", 2)
    step()
