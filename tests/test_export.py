"""export.py: each format in its own engine, in a process that cannot import this repository."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, fails, grouped_net, inside, write_data

import cifar100
import export
import objective
import resnet
import rundir
import utils
from benchmark.cases import exported_model
from formats import files
from utils import tf

ENGINES = {  # load and run a model: what export.py says can be done with it
    "savedmodel": """
import tensorflow as tf
def outputs_of(path, x):
    loaded = tf.saved_model.load(path)
    signature = loaded.signatures["serving_default"]
    [name] = signature.structured_input_signature[1]
    return name, {n: v.numpy() for n, v in signature(**{name: tf.constant(x)}).items()}
""",
    "onnx": """
import onnxruntime
def outputs_of(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given], names = session.get_inputs(), [output.name for output in session.get_outputs()]
    return given.name, dict(zip(names, session.run(names, {given.name: x})))
""",
    "litert": """
from ai_edge_litert.interpreter import Interpreter
def outputs_of(path, x):
    interpreter = Interpreter(path)
    signature = interpreter.get_signature_runner()
    [name] = signature.get_input_details()
    return name, signature(**{name: x})
""",
}
PROGRAM = """
import json, sys
import numpy as np
{engine}
for number, path in enumerate(json.loads(sys.argv[1])):
    name, outputs = outputs_of(path, np.load(f"x{{number}}.npy"))
    np.savez(f"y{{number}}.npz", name=name, **outputs)
"""
NETS = {"dense": (1, 1, 1), "2-2-2": (2, 2, 2), "2-4-4": (2, 4, 4), "1-1-4": (1, 1, 4)}


def need(form):
    missing = [name for name in files.ENGINES[form] if not utils.is_installed(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Networks of random weights, and runs that hold them."""
    made = {}
    for name, groups in NETS.items():
        settings = {} if name == "2-4-4" else {"num_residual_units": 1}
        net = grouped_net(groups, **settings)
        net = resnet.split(net) if max(groups) > 1 else net
        run_info = {"stage": "split", "dataset": "cifar100", "seed": 0, "preset": ""}
        with rundir.Run(str(tmp_path_factory.mktemp("net"))) as run:
            trainer = objective.Trainer(net, objective.Objective(), run_info)
            trainer.steps_done.assign(7)
            run.save(trainer.checkpoint, 7)
        made[name] = net, run.directory
    return made


def exported(run, form, to, *flags):
    status, out, error = inside(
        "export.py", "--checkpoint", run, "--format", form, "--output", to, *flags
    )
    assert status == 0, error
    return out


def run_elsewhere(form, jobs, folder):
    """Runs models, each on its array, by the format's engine in a process of its own.

    Returns:
        For each the name of its input, and its outputs by name.
    """
    for number, (_, x) in enumerate(jobs):
        np.save(folder / f"x{number}.npy", x)
    program, paths = PROGRAM.format(engine=ENGINES[form]), json.dumps([str(p) for p, _ in jobs])
    command = [sys.executable, "-I", "-c", program, paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    results = []
    for number in range(len(jobs)):
        with np.load(folder / f"y{number}.npz") as found:
            outputs = {name: found[name] for name in found.files if name != "name"}
            results.append((str(found["name"]), outputs))
    return results


def random_images(number):
    return np.random.default_rng(number).integers(0, 256, (number, 32, 32, 3), np.uint8)


def logits_of(net, x):
    return net(cifar100.standardize(tf.constant(x))).numpy()


def metadata_of(form, path):
    if form == "savedmodel":
        return utils.read_json(os.path.join(path, "assets.extra", "metadata.json"))
    if form == "litert":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("metadata.json"))
    import onnx

    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}


def size_of(path):
    files = [os.path.join(f, n) for f, _, names in os.walk(path) for n in names] or [path]
    return sum(map(os.path.getsize, files))


@pytest.mark.parametrize("form", ENGINES)
def test_its_engine_computes_what_the_network_does(form, saved, tmp_path):
    need(form)
    jobs, expected = [], []
    for name, (net, run) in saved.items():
        path = tmp_path / name
        assert "largest difference" in exported(run, form, path)
        for number in (1, 5):
            jobs.append((path, random_images(number)))
            expected.append(logits_of(net, jobs[-1][1]))
        about = metadata_of(form, path)
        assert about["class_names"] == list(cifar100.CLASS_NAMES) and about["step"] == 7
        assert about["groups"] == ("1-1-1" if name == "dense" else name)
        assert about["dataset"] == "cifar100" and "git_revision" in about
        assert about["group_classes"] == [sorted(g.tolist()) for g in resnet.class_groups(net)]
    for (given, outputs), logits in zip(run_elsewhere(form, jobs, tmp_path), expected, strict=True):
        assert given == "images" and set(outputs) == {"logits"}
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-4)


def test_onnx_has_normalization_only_where_no_convolution_can_do_it(saved, tmp_path):
    need("onnx")
    import onnx

    for name, (net, run) in saved.items():
        exported(run, "onnx", tmp_path / name)
        kinds = [node.op_type for node in onnx.load(tmp_path / name).graph.node]
        blocks = sum(isinstance(part, resnet.Block) for part in net.submodules)
        leaves = len(list(net.leaves()))
        # A block's first and a leaf's last, but not the network's first.
        assert kinds.count("BatchNormalization") == blocks - 1 + leaves


@pytest.mark.parametrize("form", ENGINES)
def test_a_branch_and_joined_parts_compute_what_the_tree_does(form, saved, tmp_path):
    need(form)
    ending = {"savedmodel": "/1", "onnx": ".onnx", "litert": ".tflite"}[form]
    x = random_images(3)
    names = ("2-4-4", "1-1-4")
    for name in names:
        run = saved[name][1]
        exported(run, form, tmp_path / f"{name}_whole")
        exported(run, form, tmp_path / f"{name}_branch", "--branch", 2)
        exported(run, form, tmp_path / f"{name}_parts", "--parts", True)
    jobs = [(tmp_path / f"{name}_branch", x) for name in names]
    jobs += [(tmp_path / f"{name}_parts/trunk{ending}", x) for name in names]
    *branches, trunk_244, trunk_114 = run_elsewhere(form, jobs, tmp_path)
    trunks = dict(zip(names, (trunk_244, trunk_114), strict=True))
    for name, (given, outputs) in zip(names, branches, strict=True):
        net, path = saved[name][0], tmp_path / f"{name}_branch"
        classes = sorted(resnet.class_groups(net)[2].tolist())
        assert given == "images"
        np.testing.assert_allclose(outputs["logits"], logits_of(net, x)[:, classes], atol=1e-5)
        about = metadata_of(form, path)
        assert about["classes"] == classes
        assert about["class_names"] == [cifar100.CLASS_NAMES[c] for c in classes]
        # Smaller by the weights of the other branches, and of what the trunk has for them.
        leaf = list(net.leaves())[2]
        others = [b for b in _branches(net) if not any(x is leaf for x in b.leaves())]
        spared = 4 * sum(_own_weights(branch) for branch in others)
        assert size_of(path) < size_of(tmp_path / f"{name}_whole") - 0.98 * spared
    for name in names:
        net, features = saved[name][0], trunks[name][1]
        assert len(features) == net.num_branches
        paths = [tmp_path / f"{name}_parts/branch_{n}{ending}" for n in range(net.num_branches)]
        jobs = [(path, features[f"features_{n}"]) for n, path in enumerate(paths)]
        joined = np.zeros((3, 100), np.float32)
        for path, (given, outputs) in zip(paths, run_elsewhere(form, jobs, tmp_path), strict=True):
            assert given.startswith("features_")
            joined[:, metadata_of(form, path)["classes"]] = outputs["logits"]
        np.testing.assert_allclose(joined, logits_of(net, x), atol=1e-5)


def _branches(branch):
    yield branch
    for child in branch.branches:
        yield from _branches(child)


def _own_weights(branch):
    return resnet.count(branch)[0] - sum(resnet.count(child)[0] for child in branch.branches)


def test_weights_of_eight_bits(saved, tmp_path):
    need("litert")
    _, run = saved["2-2-2"]
    exported(run, "litert", tmp_path / "whole")
    out = exported(run, "litert", tmp_path / "small", "--quantize", "int8")
    assert "of the predictions the same" in out
    assert size_of(tmp_path / "small") < 0.5 * size_of(tmp_path / "whole")
    other = write_data(tmp_path / "data", {"test": 100})
    path = tmp_path / "data" / "split.json"
    path.write_text(path.read_text().replace("synthetic", "cifar100"))
    data = ("--data_dir", other)
    out = exported(run, "litert", tmp_path / "measured", "--quantize", "int8", *data)
    assert "on the test images of its 100 classes" in out
    exported(run, "litert", tmp_path / "parts", "--quantize", "int8", "--parts", True, *data)


def test_what_is_refused_leaves_nothing(saved, tmp_path, monkeypatch):
    import export

    _, run = saved["2-2-2"]
    tree = ("--checkpoint", run, "--format", "savedmodel")
    to = ("--output", tmp_path / "model")
    fails("export.py", "--checkpoint", run, "--format", "tflite", *to, status=2,
          says="invalid choice: 'tflite'")  # fmt: skip
    fails("export.py", *tree, says="--output is needed", status=2)
    fails("export.py", *tree, *to, "--parts", True, "--branch", 0, says="exclude", status=2)
    fails("export.py", *tree, *to, "--quantize", "int8", says="of --format litert", status=2)
    fails("export.py", *tree, *to, "--branch", 2, says="no branch 2: the tree has 0 to 1")
    dense = ("--checkpoint", saved["dense"][1], "--format", "savedmodel", *to)
    fails("export.py", *dense, "--branch", 0, says="no branches: leave --branch out")
    fails("export.py", *dense, "--parts", True, says="no branches: leave --parts out")
    fails("export.py", *tree[2:], *to, "--checkpoint", tmp_path, says="no checkpoint")
    fails("export.py", *tree, "--output", tmp_path / "no" / "model", says="--output")
    monkeypatch.setitem(files.ENGINES, "onnx", ("nobodys_package",))
    onnx = ("--checkpoint", run, "--format", "onnx", *to)
    fails("export.py", *onnx, says="pip install nobodys_package")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    fails("export.py", *tree, *to, says="differs from the network by")
    fails("export.py", *tree, *to, "--parts", True, says="differs from the network by")
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_replaced_on_request_only(saved, tmp_path):
    _, run = saved["2-2-2"]
    (tmp_path / "model").mkdir()
    tree = ("--checkpoint", run, "--format", "savedmodel", "--output", tmp_path / "model")
    fails("export.py", *tree, says="exists: name another --output, or give --overwrite")
    mine = tmp_path / "model" / "mine"
    mine.touch()
    says = "holds more than an export: name another --output"
    fails("export.py", *tree, "--overwrite", says=says)
    assert os.listdir(tmp_path / "model") == ["mine"]
    mine.unlink()
    exported(run, "savedmodel", tmp_path / "model", "--overwrite", True)
    assert "saved_model.pb" in os.listdir(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    exported(run, "savedmodel", f"{tmp_path}/model/", "--overwrite", True)
    exported(run, "savedmodel", tmp_path / "model", "--overwrite", True, "--parts")
    exported(run, "savedmodel", tmp_path / "model", "--overwrite", True, "--parts")
    exported(run, "savedmodel", f"{tmp_path}/lr=[0.1]\\*/")
    assert sorted(os.listdir(tmp_path)) == ["lr=[0.1]\\*", "model"]


def test_features_count_in_units_of_their_largest(tmp_path):
    """Those of a trained trunk go up to 40, where engines differ by 1e-4 through rounding."""
    need("onnx")
    run = os.path.join(ROOT, "pretrained", "deep_2-2-2")
    exported(run, "onnx", tmp_path / "parts", "--parts", True)


def test_a_model_that_is_not_a_number_is_no_copy():
    model = exported_model(1, "dense", None)
    difference, _ = export.compare(model, lambda x: {"logits": np.full((len(x), 100), np.nan)})
    assert np.isnan(difference)


@pytest.mark.parametrize("form", ENGINES)
def test_a_disk_that_is_full(form, saved, tmp_path):
    """Files may have 100 kB, a fifth of what is to be written: one line, and nothing is left."""
    need(form)
    words = [sys.executable, os.path.join(ROOT, "export.py"), "--checkpoint", saved["2-4-4"][1]]
    words += ["--format", form, "--output", tmp_path / "model"]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *map(str, words)]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("export.py: error: ") and "model" in done.stderr
    assert os.listdir(tmp_path) == []
