"""train.py: the optimizer by hand, the three stages as processes, and what is refused."""

import contextlib
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import fails, grouped_net, inside, python, train_flags, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import cifar100
import objective
import restore
import resnet
import train
import rundir
import utils
from training import loop

GROUPED = {"ngroups1": 4, "ngroups2": 4, "ngroups3": 2, "group_lr_scale": 20}


def run(stage, train_dir, data_dir, **flags):
    status, out, error = inside("train.py", *train_flags(stage, train_dir, data_dir, **flags))
    assert status == 0, error
    return out


def records(train_dir):
    with open(os.path.join(train_dir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """The pipeline, once: baseline, group from its weights, split."""
    root = tmp_path_factory.mktemp("runs")
    base, group, split = (str(root / name) for name in ("baseline", "group", "split"))
    out = {"baseline": run("baseline", base, data_dir, lr_step_epoch="0.2,0.3")}
    out["group"] = run("group", group, data_dir, basemodel=base, bn_no_scale=True, **GROUPED)
    out["split"] = run("split", split, data_dir, basemodel=group, dropout_keep_prob=0.9)
    return {"baseline": base, "group": group, "split": split, "out": out}


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand_and_when_the_rate_drops(nesterov):
    variable = tf.Variable([1.0, 2.0], name="w")
    optimizer = objective.Momentum([variable], 0.9, nesterov)
    w, a = np.array([1.0, 2.0]), np.zeros(2)
    rng = np.random.default_rng(0)
    for rate in [0.1, 0.1, 0.01, 0.01]:
        grad = rng.normal(size=2)
        a = 0.9 * a + grad
        w = w - rate * (grad + 0.9 * a if nesterov else a)
        optimizer.apply([(tf.constant(grad, tf.float32), variable, 1.0)], rate)
        np.testing.assert_allclose(variable, w, rtol=1e-5)
    net = resnet.ResNet(resnet.NetworkConfig(num_residual_units=1, k=1))
    trainer = objective.Trainer(net, objective.Objective(nesterov=nesterov), {})
    assert trainer.optimizer.nesterov == nesterov


def rates(steps, per_epoch=10, **flags):
    parsed = train.parse_flags(train_flags("baseline", "x", "data", **flags))
    return [objective.learning_rate(parsed, step, per_epoch) for step in steps]


def test_linear_and_cosine_schedules_in_closed_form():
    """Two epochs of ten steps of warm-up, then 80 steps of falling from 0.4 to 0.04."""
    flags = {"initial_lr": 0.4, "final_lr": 0.04, "lr_warmup_epochs": 2, "max_steps": 100}
    rising = [0.02, 0.2, 0.4]
    linear = rates([0, 9, 19, 20, 60, 99], lr_schedule="linear", **flags)
    assert linear == pytest.approx([*rising, 0.4, 0.22, 0.04 + 0.36 / 80])
    cosine = rates([0, 9, 19, 20, 40, 60, 99], lr_schedule="cosine", **flags)
    half = np.sqrt(0.5) / 2
    last = 0.04 + 0.18 * (1 - np.cos(np.pi / 80))
    assert cosine == pytest.approx([*rising, 0.4, 0.04 + 0.36 * (0.5 + half), 0.22, last])


def test_a_step_schedule_has_its_drops_after_the_warm_up():
    flags = {"initial_lr": 0.4, "lr_warmup_epochs": 2, "lr_step_epoch": "3,5", "max_steps": 100}
    assert rates([0, 19, 29, 30, 50], **flags) == pytest.approx([0.02, 0.4, 0.4, 0.04, 0.004])
    assert rates([0, 29, 30], lr_step_epoch="3") == [0.1, 0.1, 0.1 * 0.1]  # as published


def test_stages_share_one_line_of_the_rate():
    flags = {"lr_schedule": "linear", "lr_warmup_epochs": 1}
    whole = rates(range(85), max_steps=85, **flags)
    first = rates(range(35), max_steps=35, lr_total_steps=85, **flags)
    second = rates(range(50), max_steps=50, lr_first_step=35, **flags)
    assert first + second == whole


def test_label_smoothing_spreads_the_labels():
    logits = tf.constant(np.random.default_rng(0).normal(size=(4, 100)), tf.float32)
    labels = tf.constant([3, 1, 4, 1])
    config = resnet.NetworkConfig(num_residual_units=1, k=1)
    terms = {}
    for smoothing in (0.0, 0.2):
        target = objective.Objective(l2_weight=0, label_smoothing=smoothing)
        terms[smoothing] = objective.Trainer(resnet.ResNet(config), target, {}).loss(logits, labels)
    target = 0.8 * np.eye(100)[labels] + 0.2 / 100
    expected = -np.mean(np.sum(target * tf.nn.log_softmax(logits), axis=1))
    assert float(terms[0.2]["loss"]) == pytest.approx(expected, rel=1e-5)
    assert terms[0.2]["cross_entropy"] == terms[0.0]["cross_entropy"] == terms[0.0]["loss"]


def test_alphas_have_their_own_rate():
    config = resnet.NetworkConfig(num_residual_units=1, k=1, groups=(1, 1, 2))
    batch, labels = tf.ones([2, 32, 32, 3]), tf.constant([0, 1])
    moved = []
    for scale in (1.0, 5.0):
        net = resnet.ResNet(config)
        before = [net.alphas["q1"].numpy(), net.logits.fc.weights.numpy()]
        trainer = objective.Trainer(net, objective.Objective(group_lr_scale=scale), {})
        trainer.step(batch, labels, 0.1)
        moved.append([net.alphas["q1"] - before[0], net.logits.fc.weights - before[1]])
    np.testing.assert_allclose(
        moved[1][0], 5 * moved[0][0], rtol=1e-3, atol=1e-8
    )  # alpha is 0.01 in float32
    np.testing.assert_allclose(moved[1][1], moved[0][1], rtol=1e-5)


@pytest.mark.parametrize("groups", [(2, 2, 2), (2, 2, 4), (2, 4, 4)])
def test_equal_growth_of_few_and_many_groups(groups):
    net = resnet.ResNet(resnet.NetworkConfig(num_residual_units=1, k=1, groups=groups))
    before = {name: alpha.numpy() for name, alpha in net.alphas.items()}
    target = objective.Objective(gamma2=0, gamma3=0, group_equal_growth=True)
    trainer = objective.Trainer(net, target, {})  # named: a tf.function holds its object weakly
    trainer.step(tf.ones([2, 32, 32, 3]), tf.constant([0, 1]), 100.0)
    growth = {}
    for name, alpha in before.items():
        seen = alpha - alpha.mean(axis=0)  # by softmax
        moved = net.alphas[name] - alpha
        growth[name] = np.sum(moved * seen) / np.sum(seen**2)
    # R_D is the mean of five values, of which the classifier's two share one. In two groups a
    # deviation then grows by 1 / (5 D), in the classifier's by half of that, at a rate of 100
    # times D / 100, the classifier's twice that. Four groups have a sixth of the pull of two, which
    # six pairs and twice the rate make up for twice over.
    expected = {name: alpha.shape[0] / 2 / 5 for name, alpha in before.items()}
    assert growth == pytest.approx(expected, rel=0.02)


def test_gamma2_grows_at_epochs(data_dir):
    flags = train_flags("group", "x", data_dir, gamma2=2, gamma2_step_epoch="3,5", gamma2_growth=4)
    flags = train.parse_flags(flags)
    at = [objective.stepwise(s, 10, 1.0, 4, flags.gamma2_step_epoch) for s in (0, 29, 30, 49, 50)]
    assert at == [1, 1, 4, 4, 16]
    trainer = objective.Trainer(grouped_net((2, 2, 2)), objective.objective(flags), {})
    logits, labels = tf.zeros([2, 100]), tf.constant([1, 2])
    plain, grown = (trainer.loss(logits, labels, growth) for growth in (1.0, 4.0))
    assert float(grown["loss"] - plain["loss"]) == pytest.approx(
        6 * float(plain["weight_split"]), rel=1e-4
    )


def test_groups_rest_until_they_start(data_dir, tmp_path):
    flags = {"max_steps": 6, "checkpoint_interval": 1, "keep": 9, "group_lr_scale": 50} | GROUPED
    start = 3 * train.parse_flags(train_flags("group", "x", data_dir)).batch_size / 300
    run("group", str(tmp_path), data_dir, **flags, group_start_epoch=start)
    [first, third, fourth] = (
        rundir.read_checkpoint(str(tmp_path / f"model.ckpt-{step}")) for step in (1, 3, 4)
    )
    for name in names_of(first, "alpha"):
        np.testing.assert_array_equal(first[name], third[name])
        assert (fourth[name] != third[name]).any()
    for name in names_of(first, "kernel"):
        assert (first[name] != third[name]).any()
    late = train_flags("group", tmp_path / "late", data_dir, **GROUPED, group_start_epoch=50)
    fails("train.py", *late, says="--group_start_epoch 50 is after the end of this stage, 6 steps")


def names_of(tensors, ending):
    """The network's tensors, without the optimizer's."""
    return [name for name in tensors if name.startswith("net/") and name.endswith(ending)]


def test_a_step_trains_under_bfloat16():
    config = resnet.NetworkConfig(num_residual_units=1, k=1, groups=(2, 2, 2))
    trainer = objective.Trainer(
        resnet.ResNet(config), objective.Objective(precision="bfloat16"), {}
    )
    images = tf.random.stateless_normal([8, 32, 32, 3], [0, 0])
    labels = tf.range(8)
    losses = [trainer.step(images, labels, 0.05).numpy() for _ in range(8)]
    assert losses[-1][1] < losses[0][1]
    assert {v.dtype for v in trainer.net.variables} == {tf.float32}


# ---------------------------------------------------------------- the stages


def test_run_directory(runs):
    for stage in train.STAGES:
        config = utils.read_json(os.path.join(runs[stage], "config.json"))
        assert (
            config["flags"]["stage"] == stage and config["versions"]["tensorflow"] == tf.__version__
        )
        assert config["hardware"] and config["dataset"] == "synthetic"
        result = utils.read_json(os.path.join(runs[stage], "result.json"))
        assert result["split"] == "val" and result["num_examples"] == 130
        assert result["step"] == 6 and result["correct"] / 130 == result["accuracy"]
        assert result["dataset"] == "synthetic"
        steps = {record["step"] for record in records(runs[stage])}
        assert steps >= {2, 3, 4, 6}
        assert 6 in rundir.checkpoint_steps(runs[stage])
        assert len(rundir.checkpoint_steps(runs[stage])) <= 4


def test_progress_and_learning_rate(runs):
    out = runs["out"]["baseline"]
    assert "step 2/6  loss " in out and "images/s" in out and "left" in out
    assert out.strip().splitlines()[-1].startswith("done: validation accuracy")
    rates = {
        r["step"]: r["learning_rate"] for r in records(runs["baseline"]) if "learning_rate" in r
    }
    # 15 steps an epoch: drops from step 3 (0.2) and 4.5 (0.3) on, counted from 0
    assert rates == pytest.approx({2: 0.1, 4: 0.01, 6: 0.001})


def test_groups_are_recorded(runs):
    record = [r for r in records(runs["group"]) if "group_sizes" in r][-1]
    assert {"sharpness/p1", "sharpness/q1", "sharpness/p3", "sharpness/r21"} <= record.keys()
    assert sum(record["group_sizes"]["q1"]) == 100 and len(record["group_sizes"]["p3"]) == 2
    terms = [r for r in records(runs["group"]) if "overlap" in r][0]
    assert terms["uniform"] == pytest.approx(1, abs=0.05)


def test_restore_order_is_printed(runs, tmp_path, data_dir):
    out = runs["out"]
    assert "starting from new weights, seed 0" in out["baseline"]
    assert "(--basemodel)" in out["group"] and "(--basemodel)" in out["split"]
    flags = {"basemodel": runs["baseline"], "bn_no_scale": True} | GROUPED
    copy = str(shutil.copytree(runs["group"], tmp_path / "copy"))
    again = run("group", copy, data_dir, **flags, max_steps=7)
    assert f"going on from {copy}/model.ckpt-6, step 6" in again
    assert "changed since the last start: --max_steps 6 -> 7" in again and "--l2" not in again
    again = run("group", copy, data_dir, **flags, max_steps=8, l2_weight=0.001)
    assert "changed since the last start: --l2_weight 0.0001 -> 0.001" in again
    (Path(copy) / "config.json").write_text("")
    assert "of the last start are not known" in run("group", copy, data_dir, **flags, max_steps=9)
    flags["checkpoint"] = os.path.join(runs["group"], "model.ckpt-4")
    other = run("group", str(tmp_path / "r"), data_dir, **flags)
    assert "model.ckpt-4 (--checkpoint)" in other and "last start" not in other
    other = run("group", str(tmp_path / "s"), data_dir, **flags, l2_weight=0.001)
    assert "changed since the last start: --l2_weight 0.0001 -> 0.001" in other
    nothing_left = run("group", str(tmp_path / "n"), data_dir, **flags, max_steps=4)
    assert "at step 4; best validation accuracy" in nothing_left


def test_complete_run_is_left_as_it_is(runs, data_dir):
    flags = {"basemodel": runs["baseline"], "bn_no_scale": True} | GROUPED
    files = [Path(runs["group"]) / name for name in ("config.json", "result.json")]
    before = [(file.read_text(), file.stat().st_mtime_ns) for file in files]
    again = run("group", runs["group"], data_dir, **flags, display=5)  # numbers stay the same
    assert f"{runs['group']} was complete before" in again
    assert again.strip().splitlines()[-1] == runs["out"]["group"].strip().splitlines()[-1]
    other = train_flags("group", runs["group"], data_dir, **flags, l2_weight=0.001)
    fails("train.py", *other, says="trained with other flags (--l2_weight 0.0001 -> 0.001)")
    assert before == [(file.read_text(), file.stat().st_mtime_ns) for file in files]


def test_complete_run_of_the_network_that_flags_repeat(runs, data_dir):
    flags = {"basemodel": runs["group"], "dropout_keep_prob": 0.9}
    same = {"k": 1, "num_residual_units": 1, "ngroups1": 4, "ngroups2": 4, "ngroups3": 2}
    assert "was complete before" in run("split", runs["split"], data_dir, **flags, **same)
    other = flags | same | {"ngroups1": 8}
    says = "(--ngroups3-2-1 2-4-4 -> 2-4-8)"
    refused("split", runs["split"], data_dir, says, **other)


def test_a_tree_does_not_become_equal(runs, data_dir, tmp_path):
    says = "is a tree of unequal groups: leave --equal_groups out"
    tree, flags = str(shutil.copytree(runs["split"], tmp_path / "tree")), {"equal_groups": True}
    for more in ({"max_steps": 7}, {"checkpoint": tree, "max_steps": 7}):
        where = tree if "checkpoint" not in more else str(tmp_path / "on")
        refused("split", where, data_dir, says, basemodel=runs["group"], **flags, **more)
    refused("split", str(tmp_path / "new"), data_dir, says, basemodel=tree, **flags)


def test_complete_run_on_another_division_of_the_data(runs, data_dir, tmp_path):
    other = shutil.copytree(data_dir, tmp_path / "data")
    description = utils.read_json(other / "split.json") | {"indices_sha256": "other"}
    utils.write_json(other / "split.json", description)
    refused("baseline", runs["baseline"], str(other), "indices_sha256", lr_step_epoch="0.2,0.3")


def test_complete_run_after_an_extension_that_came_to_nothing(runs, data_dir, tmp_path):
    copy = shutil.copytree(runs["baseline"], tmp_path / "copy")
    config = utils.read_json(copy / "config.json")
    config["flags"]["max_steps"] = 8
    utils.write_json(copy / "config.json", config)
    assert "was complete before" in run("baseline", str(copy), data_dir, lr_step_epoch="0.2,0.3")
    # A line of the rate that ends with the stage, and one that does not.
    linear = {"lr_schedule": "linear", "lr_step_epoch": [], "lr_first_step": 0, "lr_total_steps": 8}
    config["flags"] |= linear
    utils.write_json(copy / "config.json", config)
    assert "was complete before" in run("baseline", str(copy), data_dir, lr_schedule="linear")
    flags = {"lr_schedule": "linear", "lr_total_steps": 9}
    refused("baseline", str(copy), data_dir, "--lr_total_steps 8 -> 9", **flags)


def test_a_start_that_comes_to_no_checkpoint_leaves_the_flags_of_those_there_are(
    runs, data_dir, tmp_path
):
    copy, flags = str(shutil.copytree(runs["baseline"], tmp_path / "copy")), {"initial_lr": 1e30}
    diverging = train_flags("baseline", copy, data_dir, max_steps=50, **flags)
    fails("train.py", *diverging, says="not finite at step")
    assert "was complete before" in run("baseline", copy, data_dir, lr_step_epoch="0.2,0.3")
    # The first checkpoint of a tree is that of step 0.
    tree, base = str(tmp_path / "tree"), {"basemodel": runs["group"], "val_interval": 100}
    diverging = train_flags("split", tree, data_dir, max_steps=50, **base, **flags)
    fails("train.py", *diverging, says=f"the last good checkpoint is {tree}/model.ckpt-0")
    out = run("split", tree, data_dir, **base, batch_size=50)
    assert "changed since the last start: --initial_lr 1e+30 -> 0.1" in out
    assert "--batch_size 20 -> 50" in out and "step 0 ended epoch" not in out


def test_a_line_of_the_rate_that_goes_on_elsewhere_than_its_base_ended(runs, data_dir, tmp_path):
    flags = {"basemodel": runs["group"], "lr_schedule": "linear", "max_steps": 1}
    says = "goes on from step 5 (--lr_first_step), though"
    for steps, said in [(5, True), (6, False), (0, False)]:
        out = run("split", str(tmp_path / f"{steps}"), data_dir, **flags, lr_first_step=steps)
        assert (says in out) == said


def test_metrics_of_a_run_that_starts_anew_are_its_own(runs, data_dir, tmp_path):
    copy = shutil.copytree(runs["split"], tmp_path / "copy")
    for file in copy.glob("model.ckpt-*"):
        file.unlink()
    (copy / "result.json").unlink()
    (copy / rundir.NOTHING_SAVED).touch()  # as if it had been killed before its first checkpoint
    before = records(copy)
    run("split", str(copy), data_dir, basemodel=runs["group"], seed=5)
    after = records(copy)
    steps = [[r["step"] for r in rs if "val_accuracy" in r] for rs in (before, after)]
    assert steps[0] == steps[1] and before[-1] != after[-1]


def test_a_base_model_that_has_changed(runs, data_dir, tmp_path):
    """Going on, or leaving a complete run as it is, must not pass for starting from it."""
    base, tree = str(tmp_path / "group"), str(shutil.copytree(runs["split"], tmp_path / "split"))
    shutil.copytree(runs["group"], base)
    flags = {"basemodel": base, "dropout_keep_prob": 0.9}
    assert "was complete before" in run("split", tree, data_dir, **flags)
    run("group", base, data_dir, bn_no_scale=True, max_steps=7, **GROUPED)
    for steps in (6, 7):
        says = [f"not started from what {base}/model.ckpt-7 holds now", "another --train_dir"]
        refused("split", tree, data_dir, says, **flags, max_steps=steps)
    older = flags | {"basemodel": f"{base}/model.ckpt-6"}
    assert "was complete before" in run("split", tree, data_dir, **older)
    assert "step 7/7" in run("split", tree, data_dir, **flags, checkpoint=tree, max_steps=7)
    shutil.rmtree(base)
    assert "step 8/8" in run("split", tree, data_dir, **flags, max_steps=8)


def test_complete_run_whose_checkpoint_is_damaged(runs, data_dir, tmp_path):
    copy = shutil.copytree(runs["baseline"], tmp_path / "copy")
    whole = rundir.read_checkpoint(rundir.find_checkpoint(str(copy)))
    os.truncate(copy / "model.ckpt-6.data-00000-of-00001", 100)
    out = run("baseline", str(copy), data_dir, lr_step_epoch="0.2,0.3")
    assert "model.ckpt-6 is torn" in out and "model.ckpt-4, step 4" in out
    (copy / "config.json").write_text("{}")
    assert "model.ckpt-6, step 6" in run("baseline", str(copy), data_dir, lr_step_epoch="0.2,0.3")
    again = rundir.read_checkpoint(rundir.find_checkpoint(str(copy)))
    np.testing.assert_array_equal(again["net/logits/fc/weights"], whole["net/logits/fc/weights"])


def test_grouping_starts_from_the_baselines_weights(runs):
    baseline = rundir.read_checkpoint(rundir.find_checkpoint(runs["baseline"]))
    flags = train.parse_flags(train_flags(
        "group", "x", "y", basemodel=runs["baseline"], bn_no_scale=True, **GROUPED
    ))  # fmt: skip
    path = rundir.find_checkpoint(runs["baseline"])
    about = {"dataset": "synthetic", "indices_sha256": ""}
    net, _ = restore.network_from_weights(path, rundir.read_checkpoint(path), flags, about)
    np.testing.assert_array_equal(
        net.unit_3_0.conv_1.kernel, baseline["net/unit_3_0/conv_1/kernel"]
    )
    assert 0 < np.abs(net.alphas["q1"]).max() < 0.1


def test_split_starts_as_the_masked_network(runs):
    """Validation at step 0 of stage split is that of the grouped network under --mask."""
    first = records(runs["split"])[0]
    net, _ = restore.load_network(rundir.find_checkpoint(runs["group"]))
    resnet.mask(net)
    assert first["step"] == 0
    flags = utils.read_json(os.path.join(runs["split"], "config.json"))["flags"]
    data = cifar100.load(flags["data_dir"], "val")
    found = metrics.evaluate(metrics.predictor(net), *data, 20)
    assert first["val_accuracy"] == found.accuracy
    assert first["val_cross_entropy"] == pytest.approx(found.cross_entropy, rel=1e-5)


def test_split_checkpoint_describes_itself(runs):
    tree, description = restore.load_network(rundir.find_checkpoint(runs["split"]))
    assert isinstance(tree, resnet.SplitResNet) and len(list(tree.leaves())) == 4
    assert description["stage"] == "split" and description["preset"] == ""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "stage, flags, says",
    [
        ("group", {"gama1": 1}, "did you mean --gamma1?"),
        ("baseline", {"gamma1": 1}, "no effect in stage baseline"),
        ("baseline", {"ngroups1": 2}, "no effect in stage baseline"),
        ("baseline", {"groups": "random"}, "no effect in stage baseline"),
        ("split", {"basemodel": "x", "group_lr_scale": 2}, "no effect in stage split"),
        ("split", {}, "--basemodel"),
        ("group", {"equal_groups": True}, "no effect in stage group"),
        (
            "split",
            {"basemodel": "x", "equal_groups": True, "groups": "g", "ngroups1": 2},
            "exclude",
        ),
        ("group", {"ngroups1": 1, "ngroups2": 1, "ngroups3": 1}, "needs groups"),
        ("group", {"ngroups3": 4}, "do not nest"),
        ("group", {"ngroups1": 101}, "at most 100"),
        ("group", {"ngroups1": 20, "ngroups2": 20, "ngroups3": 20}, "larger k"),
        ("baseline", {"batch_size": 0}, ">= 1"),
        ("baseline", {"initial_lr": "nan"}, "a number > 0"),
        ("baseline", {"lr_step_epoch": "300,240"}, "ascending"),
        ("baseline", {"k": 0.3}, "16 * k a whole number of filters, got 0.3\n"),
        ("group", {"gamma2_growth": 1e200}, "<= 1"),
        ("baseline", {"precision": "float16"}, "float32 or bfloat16"),
        ("baseline", {"bn_no_scale": "perhaps"}, "True or False"),
        ("baseline", {"momentum": 1}, "< 1"),
        ("baseline", {"nesterov": True, "momentum": 0}, "--momentum is 0"),
        ("baseline", {"label_smoothing": 1}, "< 1"),
        ("baseline", {"lr_schedule": "exponential"}, "step, linear, cosine"),
        ("baseline", {"final_lr": 0.01}, "for --lr_schedule linear or cosine"),
        ("baseline", {"lr_first_step": 3}, "for --lr_schedule linear or cosine"),
        ("group", {"lr_schedule": "linear", "lr_step_epoch": "3"}, "--lr_step_epoch ''"),
        ("group", {"lr_schedule": "cosine", "final_lr": 0.2}, "above --initial_lr 0.1"),
        ("group", {"lr_schedule": "linear", "lr_total_steps": 5}, "less than the 6 steps"),
        ("group", {"lr_schedule": "linear", "lr_total_steps": 9, "lr_first_step": 4}, "10 steps"),
    ],
)
def test_contradictions(stage, flags, says, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_flags(train_flags(stage, "run", "data", **flags))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize("schedule", ["step", "linear"])
def test_a_warm_up_that_never_ends_is_refused(schedule, data_dir, tmp_path):
    flags = {"lr_schedule": schedule, "lr_warmup_epochs": 0.4}  # all of 6 steps
    says = "--lr_warmup_epochs 0.4 takes all of the schedule's 6 steps"
    fails("train.py", *train_flags("baseline", tmp_path / "run", data_dir, **flags), says=says)


def test_bad_flags_as_a_process(tmp_path):
    done = python("train.py", "--stage", "group", "--train_dir", tmp_path / "r", "--gama1", 1)
    assert done.returncode == 2 and "did you mean --gamma1?" in done.stderr
    assert done.stderr.count("\n") == 1 and not os.listdir(tmp_path)


def contents(directory):
    """Time of the last change of every file but the lock."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return {n: os.stat(os.path.join(directory, n)).st_mtime_ns for n in names if n != "lock"}


def refused(stage, train_dir, data_dir, says, **flags):
    before = contents(train_dir)
    fails("train.py", *train_flags(stage, train_dir, data_dir, **flags), says=says)
    assert contents(train_dir) == before
    assert before or not os.path.exists(train_dir)  # no litter


def test_missing_data(tmp_path):
    refused("baseline", str(tmp_path / "r"), str(tmp_path), "python download_cifar100.py")
    assert not os.path.exists(tmp_path / "r")


def test_another_networks_run_directory(runs, data_dir):
    other, on = {"k": 2}, {"max_steps": 7}
    refused("baseline", runs["baseline"], data_dir, "flags (--k 1 -> 2", **other)
    says = ["another network", "k is 1, not 2"]
    refused("baseline", runs["baseline"], data_dir, says, **other, **on)
    refused("baseline", runs["group"], data_dir, "(--stage group -> baseline")
    refused("baseline", runs["group"], data_dir, "is of stage group, not baseline", **on)


def test_base_models_that_do_not_fit(runs, tmp_path, data_dir):
    new = str(tmp_path / "r")
    refused("split", new, data_dir, "no groups to cut", basemodel=runs["baseline"])
    refused("split", new, data_dir, "k is 1, not 2", basemodel=runs["group"], k=2)
    refused("group", new, data_dir, "tree already", basemodel=runs["split"])
    refused("group", new, data_dir, "no checkpoint", basemodel=str(tmp_path))


def test_empty_group(runs, tmp_path, data_dir):
    path = rundir.find_checkpoint(runs["group"])
    net, _ = restore.load_network(path)
    net.alphas["q1"].assign(tf.zeros([4, 100]))
    about = {"stage": "group", "dataset": "synthetic"}
    with rundir.Run(str(tmp_path / "bad")) as bad:
        bad.save(objective.Trainer(net, objective.Objective(), about).checkpoint, 6)
    says = ["indicator q1 leaves group 1 empty", "larger gamma3"]
    refused("split", str(tmp_path / "r"), data_dir, says, basemodel=str(tmp_path / "bad"))


def test_checkpoint_of_another_data_set(runs, tmp_path):
    counts = {"train": 100, "val": 100}
    data = write_data(tmp_path / "data", counts)
    path = tmp_path / "data" / "split.json"
    path.write_text(path.read_text().replace("synthetic", "cifar100"))
    refused("split", str(tmp_path / "r"), data, "was trained on synthetic", basemodel=runs["group"])


def test_fewer_steps_than_done(runs, data_dir):
    refused(
        "baseline",
        runs["baseline"],
        data_dir,
        ["less than the 6 steps already done", "model.ckpt-6"],
        max_steps=5,
    )


def test_empty_validation_set(tmp_path):
    data = write_data(tmp_path / "data", {"train": 100, "val": 0})
    refused("baseline", str(tmp_path / "r"), data, "val.npz holds no images")


def test_batch_larger_than_the_data_set(tmp_path, data_dir):
    refused("baseline", str(tmp_path / "r"), data_dir, "batch_size 301", batch_size=301)


def test_non_finite_loss_names_step_and_term(tmp_path, data_dir):
    flags = {"initial_lr": 1e30, "max_steps": 50, "checkpoint_interval": 100, "val_interval": 100}
    says = [
        "not finite at step",
        "went first",
        "learning rate 1e+30",
        "last good checkpoint is none",
    ]
    fails("train.py", *train_flags("group", tmp_path / "r", data_dir, **flags), says=says)
    assert not rundir.checkpoint_steps(str(tmp_path / "r"))


def test_spoiled_weights_are_not_saved(tmp_path, data_dir):
    """A loss may still be finite when the update that follows it is not."""
    flags = train.parse_flags(train_flags("baseline", tmp_path, data_dir))
    net = resnet.ResNet(restore.network_config(flags))
    trainer = objective.Trainer(net, objective.objective(flags), {})
    data = {split: cifar100.load(data_dir, split) for split in ("train", "val")}
    with rundir.Run(str(tmp_path)) as run:
        steps = loop.Loop(flags, run, trainer, data)
        net.logits.fc.biases.assign(tf.fill([100], np.nan))
        with pytest.raises(
            ValueError, match="weights are not finite after step 0.*checkpoint is none"
        ):
            steps.save()
    assert not rundir.checkpoint_steps(str(tmp_path))


@pytest.fixture
def tensorboard(monkeypatch):
    """TensorBoard with what tf.summary uses of it."""
    for name in ("tensorboard", "tensorboard.summary", "tensorboard.summary.v2"):
        module = types.ModuleType(name)
        module.image = module.scalar = None
        monkeypatch.setitem(sys.modules, name, module)
    rundir.has_summaries.cache_clear()
    yield
    rundir.has_summaries.cache_clear()


def test_event_files_where_tensorboard_is_installed(tmp_path, monkeypatch, tensorboard):
    written = []
    monkeypatch.setattr(tf.summary, "scalar", lambda name, value: written.append((name, value)))
    with rundir.Run(str(tmp_path)) as run:
        run.log(3, loss=1.5, group_sizes={"q1": [50, 50]})
    assert written == [("loss", 1.5)]
    assert any(name.startswith("events") for name in os.listdir(tmp_path))


def test_pictures_where_tensorboard_is_installed(tmp_path, data_dir, monkeypatch, tensorboard):
    shapes = {}
    monkeypatch.setattr(tf.summary, "scalar", lambda name, value: None)
    monkeypatch.setattr(tf.summary, "image", lambda name, x: shapes.update({name: x.shape}))
    run("group", str(tmp_path / "r"), data_dir, max_steps=2, group_summary_interval=1)
    assert shapes.keys() == {"sharpness", "weights", "superclasses"}
    assert all(shape[0] == 1 and min(shape[1:3]) > 200 for shape in shapes.values())


# ---------------------------------------------------------------- any flags whatever

VALUES = {
    "schedule": st.sampled_from([*train.SCHEDULES, "constant"]),
    "int": st.integers(-1, 300).map(str) | st.sampled_from(["", "x", "1.5", "1e3", "nan"]),
    "float": st.floats(-1, 400).map(str) | st.sampled_from(["", "x", "inf", "nan", "1e-4", "0"]),
    "bool": st.sampled_from(["True", "false", "1", "0", "maybe", ""]),
    "text": st.sampled_from(["", "float32", "bfloat16", "240,300", "3,2", "1,,2", "runs", "/"]),
}
KINDS = {
    "batch_size": "int", "num_residual_units": "int", "k": "float", "ngroups1": "int",
    "ngroups2": "int", "ngroups3": "int", "l2_weight": "float", "gamma1": "float",
    "gamma2": "float", "gamma3": "float", "dropout_keep_prob": "float", "momentum": "float",
    "bn_no_scale": "bool", "weighted_group_loss": "bool", "initial_lr": "float",
    "lr_step_epoch": "text", "lr_decay": "float", "max_steps": "int", "display": "int",
    "val_interval": "int", "checkpoint_interval": "int", "group_summary_interval": "int",
    "basemodel": "text", "checkpoint": "text", "seed": "int", "precision": "text",
    "deterministic": "bool", "keep": "int", "group_lr_scale": "float", "preset": "text",
    "group_equal_growth": "bool", "equal_groups": "bool", "nesterov": "bool",
    "label_smoothing": "float",
    "lr_schedule": "schedule", "final_lr": "float", "lr_warmup_epochs": "float",
    "lr_total_steps": "int", "lr_first_step": "int",
    "group_start_epoch": "float", "gamma2_step_epoch": "text", "gamma2_growth": "float",
    "devices": "text",
    "jit_compile": "bool", "stray": "text",
}  # fmt: skip
FLAGS = st.lists(
    st.sampled_from(sorted(KINDS)).flatmap(lambda n: VALUES[KINDS[n]].map(lambda v: (n, v))),
    max_size=6,
    unique_by=lambda flag: flag[0],
).map(dict)


@settings(max_examples=1500, deadline=None)
@given(stage=st.sampled_from([*train.STAGES, "all", ""]), flags=FLAGS)
def test_any_flags_give_a_valid_run_or_one_line(stage, flags):
    """What passes the checks can be built; what does not ends in one line before any work."""
    words = [f"--stage={stage}", "--train_dir=run", *(f"--{n}={v}" for n, v in flags.items())]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            parsed = train.parse_flags(words)
        except SystemExit as stopped:
            assert stopped.code == 2
            assert error.getvalue().count("\n") == 1 and ": error: " in error.getvalue()
            return
    assert "stray" not in flags and stage in train.STAGES
    objective.objective(parsed)
    assert 0 < objective.learning_rate(parsed, 0, 500) <= parsed.initial_lr
    if stage == "split":
        assert parsed.basemodel or parsed.checkpoint
    else:
        config = restore.network_config(parsed)
        assert (max(config.groups) > 1) == (stage == "group")


def test_a_resume_with_another_batch_size_says_what_becomes_of_epochs_and_images(
    data_dir, tmp_path
):
    flags = {"max_steps": 3, "batch_size": 20}
    assert inside("train.py", *train_flags("baseline", tmp_path / "run", data_dir, **flags))[0] == 0
    flags = {"max_steps": 4, "batch_size": 50}
    status, out, error = inside(
        "train.py", *train_flags("baseline", tmp_path / "run", data_dir, **flags)
    )
    assert status == 0, error
    assert "changed since the last start: --batch_size 20 -> 50" in out
    # 3 steps of 300 images: 60 of them were seen, 150 are passed over.
    assert "step 3 ended epoch 0.20 and counts as epoch 0.50 from here on" in out
    assert "as if every step had taken 50" in out
