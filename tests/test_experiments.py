"""The rows of experiments/run.sh, end to end, their tables, and publishing them."""

import glob
import json
import math
import os
import re
import shutil
import signal
from concurrent import futures

import numpy as np
import pytest
from conftest import REAL_ARCHIVE, ROOT, fails, inside, run_script, write_data

import networks
import objective
import resnet
import train
import utils
from experiments import publish, rows, tables, trend

COUNTS = {"train": 100, "val": 20, "test": 100}


def listed_rows():
    """The rows that experiments/run.sh lists of the Wide ResNet, and those of other networks."""
    out = run_script("experiments/run.sh", PRESET="smoke").stdout
    names = r"(?:^|, )(baseline\w*|narrow|[a-z]+(?:18)?(?:_\d-\d-\d|_2x5)?(?:-[SCR])?)(?=,|\n| {2})"
    listed = re.findall(names, out, re.MULTILINE)
    others = [row for row in listed if rows.network_of(row) != "wrn"]
    return [row for row in listed if row not in others], others


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every row at the smoke preset, a few steps each: the folder of all seeds."""
    root = tmp_path_factory.mktemp("table")
    data = write_data(root / "data", COUNTS)

    def run(row):
        run_script(
            "experiments/run.sh", row,
            "--max_steps", 2, "--batch_size", 20, "--num_residual_units", 1,
            PRESET="smoke", RUNS=str(root / "runs" / "seed0"), DATA_DIR=data,
        )  # fmt: skip

    first, *rest = sorted(listed_rows()[0], key=lambda row: not row.endswith("-R"))
    run(first)  # trains the baseline that the other given groups share
    with futures.ThreadPoolExecutor(2) as pool:  # most of a row is TensorFlow's start, on one core
        list(pool.map(run, rest))
    return root / "runs"


def test_every_row_of_the_tables_has_a_command():
    listed, others = listed_rows()
    assert len(listed) == len(set(listed)) == 23
    assert len(others) == len(set(others)) == 2 + 2 * (3 + 4)
    for network, table in rows.OTHER_TABLES.items():
        assert table[0][1] == network and rows.table_of([table[-1][1]]) == table
        for _, row, *paper in table:
            assert row in others and rows.network_of(row) == network
            assert (f"{row}-R" in others) == (paper[2] is not None)
    for _, row, *paper in rows.TABLE_1:
        assert row in listed
        for variant, error in zip(rows.VARIANTS, paper, strict=False):
            assert error is None or f"{row}-{variant}" in listed


def test_every_row_runs(made):
    found = rows.find_results(str(made))
    assert set(found) == set(listed_rows()[0])
    for row, [result] in found.items():
        assert result["split"] == "test" and result["num_examples"] == COUNTS["test"]
        numbers = re.search(r"\d-\d-\d", row)
        assert result["groups"] == (numbers.group() if numbers else "1-1-1")
        kind = {"S": "semantic", "C": "clustering", "R": "random"}.get(row[-1], "learned")
        assert result["class_groups"] == (kind if numbers else "")
    baseline, dropout = found["baseline"][0], found["baseline_dropout"][0]
    assert baseline["weights"] == dropout["weights"] > found["narrow"][0]["weights"]
    for group in ("eval_val", "eval_mask_val"):
        assert (made / "seed0" / "deep_2-2-2" / "group" / group / "result.json").exists()


def test_tables_and_report_of_the_rows(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = made.parent / "data"
    status, out, error = inside("report", made / "seed0" / "deep_2-2-2", "--data_dir", data)
    assert status == 0, error
    assert "validation         grouped 0." in out and "test accuracy      finetuned tree 0." in out
    names = [name for name, writer in tables.WRITERS.items() if writer == "tables"]
    pages = {name: tmp_path / f"{name}.md" for name in names}
    for name in names:
        begin, end = tables.MARKERS[name]
        pages[name].write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert inside("experiments/publish.py", made)[0] == 0
    texts = {}
    for name, file in pages.items():
        status, out, error = inside("experiments/tables.py", made, "--write", file.name)
        assert status == 0, error
        texts[name] = text = file.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert texts["results"].count("|") > texts["summary"].count("|")
    text = texts["results"]
    first = utils.read_json(tmp_path / "results" / "deep_2-2-2" / "result.json")
    assert f"{100 * first['error']:.2f} (24.62)" in text and "synthetic data set" in text
    equal = resnet.count(resnet.equal_tree(resnet.NetworkConfig(1, k=1, groups=(2, 2, 2))))
    dense = resnet.count(resnet.ResNet(resnet.NetworkConfig(1, k=1)))
    assert f"{100 * (1 - equal[0] / dense[0]):.1f} %" in text
    files = ("config.json", "metrics.jsonl", "superclasses.png")
    for name in (*files, "group/metrics.jsonl", "group/eval_mask_val.json"):
        assert (tmp_path / "results" / "deep_2-2-2" / name).exists()
    published = [p.read_text() for p in (tmp_path / "results").rglob("*.json*")]
    assert len(published) > 50 and not any(str(made) in text for text in published)
    # The weights alone give the same numbers again.
    for row in publish.PRETRAINED_ROWS:
        status, _, error = inside(
            "eval.py", "--checkpoint", tmp_path / "pretrained" / row, "--data_dir", data
        )
        assert status == 0, error
        again = utils.read_json(tmp_path / "pretrained" / row / "eval" / "result.json")
        old = utils.read_json(tmp_path / "results" / row / "result.json")
        for name in ("correct", "accuracy", "weights", "flops", "group_classes", "seed"):
            assert again[name] == old[name]
    # Pictures of other groups neither come nor stay.
    picture = tmp_path / "results" / "deep_2-2-2" / "superclasses.png"
    report = made / "seed0" / "deep_2-2-2" / "report" / "superclasses.png"
    os.utime(report, (1, 1))
    status, out, _ = inside("experiments/publish.py", made)
    assert status == 0 and f"{report} is older than its run" in out and picture.exists()
    file = picture.with_name("result.json")
    utils.write_json(file, utils.read_json(file) | {"group_classes": [[0], [1]]})
    assert inside("experiments/publish.py", made)[0] == 0 and not picture.exists()
    # From what was published the same comes out, to the last digit.
    for name, file in pages.items():
        status, again, error = inside("experiments/tables.py", "--write", file.name)
        assert status == 0, error
        assert file.read_text() == texts[name]


def test_several_seeds(made, tmp_path):
    for seed, correct in enumerate((10, 14)):
        run = tmp_path / f"seed{seed}" / "baseline"
        shutil.copytree(made / "seed0" / "baseline", run)
        file = run / "eval" / "result.json"
        utils.write_json(file, utils.read_json(file) | {"seed": seed, "error": 1 - correct / 100})
    assert "88.00 ± 2.00 (24.28)" in tables.page(rows.find_results(str(tmp_path)))
    shutil.copytree(tmp_path / "seed1", tmp_path / "seed2")
    with pytest.raises(ValueError, match="two results of baseline, seed 1"):
        rows.find_results(str(tmp_path))


@pytest.fixture
def published(tmp_path):
    """A function that publishes a row of given numbers; all together are in the folder."""

    def publish_row(place, seed=0, correct=70, precision="float32", **values):
        result = {
            "split": "test", "seed": seed, "step": 5, "precision": "float32", "preset": "smoke",
            "dataset": "cifar100", "network": "WRN-16-2", "num_examples": 10000, "weights": 700000,
            "flops": 200000000, "hardware": "a machine", "groups": "1-1-1",
            "error": 1 - correct / 100,
        }  # fmt: skip
        folder = tmp_path / place
        folder.mkdir(parents=True)
        utils.write_json(folder / "result.json", result | values)
        flags = {"max_steps": 5, "precision": precision}
        utils.write_json(folder / "config.json", {"flags": flags})
        return str(tmp_path)

    return publish_row


def test_a_summary_has_a_line_a_network(published):
    published("baseline")
    published("narrow", network="WRN-16-1.4375", weights=366000, correct=67)
    published("deep_2-2-2", correct=66, weights=360000, groups="2-2-2")
    published("deep_2-2-2/seed1", seed=1, correct=68, weights=370000, groups="2-2-2")
    folder = published("deep_2-2-2-R", correct=64.5, groups="2-2-2", flops=135e6)
    text = tables.summary(rows.find_results(folder))
    first, _, *table = text.splitlines()
    assert first.startswith("WRN-16-2, preset `smoke`, 10,000 test images. The paper's numbers are")
    assert "the mean of 2 seeds and its standard error" in first and "bfloat16" not in first
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert lines[2:] == [
        ["WRN-16-2", "", "0.700 M", "0.200 G", "30.00", "24.28"],
        ["narrower WRN, not split", "", "0.366 M", "0.200 G", "33.00", ""],
        ["Deep", "2-2-2, learned", "0.365 M", "0.200 G", "33.00 ± 1.00", "24.62"],
        ["Deep", "2-2-2, random", "0.700 M", "0.135 G", "35.50", "27.12"],
    ]


def test_summary_says_which_rows_were_trained_in_bfloat16(published):
    published("baseline")
    folder = published("narrow", precision="bfloat16")
    says = "Trained in bfloat16 and evaluated in float32: {}."
    for made_of in (tables.page, tables.summary):
        assert says.format("narrow") in made_of(rows.find_results(folder))
    shutil.rmtree(os.path.join(folder, "baseline"))
    published("baseline", precision="bfloat16")
    for made_of in (tables.page, tables.summary):
        assert says.format("all rows") in made_of(rows.find_results(folder))


def test_summary_and_results_are_written_between_their_own_markers(tmp_path):
    file = tmp_path / "page.md"
    (begin, end), (first, last) = tables.MARKERS["results"], tables.MARKERS["summary"]
    file.write_text(f"a\n{first}\n{last}\nb\n{begin}\nold\n{end}\nc\n")
    texts = {"results": "all", "summary": "few"}
    assert tables.write_into(str(file), texts) == ["results", "summary"]
    expected = f"a\n{first}\n\nfew\n\n{last}\nb\n{begin}\n\nall\n\n{end}\nc\n"
    assert file.read_text() == expected
    file.write_text(f"{begin}\n{end}\n{first}\n")
    assert tables.write_into(str(file), texts) == ["results"]
    file.write_text(f"{begin}\n{last}\n")
    with pytest.raises(ValueError, match="put them in"):
        tables.write_into(str(file), texts)


def test_where_the_mistakes_are():
    """Each tree's beside the baseline's by the tree's groups, averaged over their seeds."""
    whole = {"confusion_matrix": [[6, 4, 0], [1, 9, 0], [2, 0, 8]], "num_examples": 30}
    tree = {"confusion_matrix": [[9, 0, 1], [0, 9, 1], [0, 5, 5]], "group_classes": [[0, 1], [2]]}
    tree |= {"num_examples": 30}
    other = tree | {"group_classes": [[0], [1, 2]]}
    found = {"baseline": [whole], "deep_2-2-2": [tree, other], "fc_1-1-4-S": [tree]}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in tables.mistakes_table(found).splitlines()[2:]]  # fmt: skip
    # Of 30 images: within 0 and 6 (baseline 5 and 0), between 7 and 1 (2 and 7); of the first only.
    assert lines == [["fc_1-1-4-S", "0.00 (16.67)", "23.33 (6.67)"],
                     ["deep_2-2-2", "10.00 (8.33)", "13.33 (15.00)"]]  # fmt: skip
    # Of two baselines the mean.
    better = {"confusion_matrix": [[7, 2, 1], [1, 9, 0], [0, 0, 10]], "num_examples": 30}
    both = tables.mistakes_table({"baseline": [whole, better], "deep_2-2-2": [tree]})
    assert "0.00 (13.33)" in both and "23.33 (5.00)" in both
    assert tables.mistakes_table({"baseline": [whole]}) == ""
    assert tables.mistakes_table({"deep_2-2-2": [tree]}) == ""


def test_only_a_rows_last_stage_counts(made, tmp_path):
    """Not its grouped network, not the baseline that others share."""
    run = tmp_path / "deep_2-2-2" / "split"
    shutil.copytree(made / "seed0" / "deep_2-2-2" / "split", run)
    for other in ("shared/baseline", "deep_2-2-2/group"):
        shutil.copytree(run, tmp_path / other)
    [result] = rows.find_results(str(tmp_path))["deep_2-2-2"]
    assert result["path"] == str(run / "eval" / "result.json")


@pytest.mark.parametrize("change, says", [
    ({"step": 1}, "of step 1 of 2"),
    ({"precision": "bfloat16"}, "in bfloat16"),
    ({"network": "WRN-10-2"}, "mixes networks"),
    ({"preset": "paper"}, "mixes presets"),
    ({"step": 3, "config": 3}, "mixes steps (2, 3)"),
])  # fmt: skip
def test_results_that_do_not_belong_together(change, says, made, tmp_path):
    for row in ("baseline", "baseline_dropout"):
        shutil.copytree(made / "seed0" / row, tmp_path / row)
    change = dict(change)
    file, config = (tmp_path / "baseline" / name for name in ("eval/result.json", "config.json"))
    if steps := change.pop("config", None):
        utils.write_json(config, {"flags": {"max_steps": steps}})
    utils.write_json(file, utils.read_json(file) | change)
    with pytest.raises(ValueError, match=re.escape(says)):
        rows.find_results(str(tmp_path))


def test_seeds_of_a_row_share_their_grouping(published, tmp_path):
    for place, seed, gamma in [("deep_2-2-2", 0, 1.0), ("deep_2-2-2/seed1", 1, 0.4)]:
        published(place, seed=seed)
        group = tmp_path / place / "group"
        group.mkdir()
        utils.write_json(group / "config.json", {"flags": {"gamma1": 1.0, "gamma3": gamma}})
    with pytest.raises(ValueError, match=r"deep_2-2-2, grouping, mixes gamma3s \(0.4, 1.0\)"):
        rows.find_results(str(tmp_path))
    utils.write_json(group / "config.json", {"flags": {"gamma1": 1.0, "gamma3": 1.0}})
    assert len(rows.find_results(str(tmp_path))["deep_2-2-2"]) == 2


def test_seeds_older_than_a_flag_did_what_it_leaves_alone(published, tmp_path):
    published("baseline", seed=0)
    published("baseline/seed1", seed=1)
    newer = tmp_path / "baseline" / "seed1" / "config.json"
    flags = utils.read_json(newer)["flags"]
    utils.write_json(newer, {"flags": flags | {"lr_schedule": "step", "nesterov": False}})
    assert len(rows.find_results(str(tmp_path))["baseline"]) == 2
    utils.write_json(newer, {"flags": flags | {"lr_schedule": "linear"}})
    with pytest.raises(ValueError, match=r"mixes lr_schedules \(linear, step\)"):
        rows.find_results(str(tmp_path))


def test_publishing_what_is_published_or_differs(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "seed0" / "narrow", tmp_path / "runs" / "narrow")
    assert inside("experiments/publish.py", "runs")[0] == 0
    fails("experiments/publish.py", "results", says="is published already")
    file = tmp_path / "runs" / "narrow" / "eval" / "result.json"
    # Another seed has to fit to what is published; the same one replaces it.
    config, result = tmp_path / "runs" / "narrow" / "config.json", utils.read_json(file)
    flags = utils.read_json(config)["flags"] | {"l2_weight": 0.25}
    utils.write_json(config, {"flags": flags})
    utils.write_json(file, result | {"seed": 7})
    says = "results with runs, row narrow, mixes l2_weights (0.0005, 0.25)"
    fails("experiments/publish.py", "runs", says=says)
    utils.write_json(file, result)
    assert inside("experiments/publish.py", "runs")[0] == 0
    utils.write_json(file, result | {"dataset": "cifar100", "seed": 7})
    fails("experiments/publish.py", "runs", says="mixes datasets (cifar100, synthetic)")


def test_what_lacks_a_part_is_not_published(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    shutil.copytree(made / "seed0" / "baseline", runs / "baseline")
    shutil.copytree(made / "seed0" / "deep_2-2-2-R", runs / "deep_2-2-2-R")
    fails("experiments/publish.py", "runs", says="/config.json is missing: run")
    shutil.rmtree(runs / "deep_2-2-2-R")
    shutil.copytree(made / "seed0" / "deep_2-2-2", runs / "deep_2-2-2")
    shutil.rmtree(runs / "deep_2-2-2" / "group" / "eval_mask_val")
    fails("experiments/publish.py", "runs", says="group/eval_mask_val/result.json is missing")
    assert os.listdir(tmp_path) == ["runs"]


def test_networks_go_to_pretrained_from_results_only(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "seed0" / "baseline", tmp_path / "runs" / "baseline")
    for to, seed, kept in [("other", 0, False), ("results", 1, False), ("./results/", 0, True)]:
        flags = ("--results", to, "--pretrained_seed", seed)
        status, out, _ = inside("experiments/publish.py", "runs", *flags)
        assert status == 0 and ("stays as it is" in out) == (seed == 1)
        assert (tmp_path / to / "baseline" / "result.json").exists()
        assert (tmp_path / publish.PRETRAINED).exists() == kept
    shutil.rmtree(tmp_path / publish.PRETRAINED)
    status, out, _ = inside("experiments/publish.py", "runs", "--pretrained", "./pretrained/")
    assert status == 0 and "stays as it is" not in out
    assert os.listdir(tmp_path / publish.PRETRAINED) == ["baseline"]


def test_the_tree_of_another_width_goes_where_it_is_told(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for row in publish.PRETRAINED_ROWS:
        shutil.copytree(made / "seed0" / row, tmp_path / "runs" / row)
    flags = ("--results", "results/trend/k8", "--pretrained", "pretrained/wrn-16-8")
    assert inside("experiments/publish.py", "runs", *flags)[0] == 0
    assert os.listdir(tmp_path / "pretrained") == ["wrn-16-8"]
    assert os.listdir(tmp_path / "pretrained" / "wrn-16-8") == ["deep_2-2-2"]
    weights = tmp_path / "pretrained" / "wrn-16-8" / "deep_2-2-2"
    data = made.parent / "data"
    status, _, error = inside("eval.py", "--checkpoint", weights, "--data_dir", data)
    assert status == 0, error
    again = utils.read_json(weights / "eval" / "result.json")
    old = utils.read_json(tmp_path / "results/trend/k8/deep_2-2-2/result.json")
    assert again["correct"] == old["correct"]


def test_publishing_that_is_stopped_leaves_no_row(made, tmp_path, monkeypatch):
    """A row whose parts are of two trainings must not pass for one; its network stays whole."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "seed0" / "baseline", tmp_path / "runs" / "baseline")

    def files():
        published = [*tmp_path.glob("results/**/*"), *tmp_path.glob("pretrained/**/*")]
        return {path: path.read_bytes() for path in published if path.is_file()}

    assert inside("experiments/publish.py", "runs")[0] == 0
    before, result = files(), tmp_path / "results" / "baseline" / "result.json"
    with monkeypatch.context() as patch:
        patch.setattr(publish, "export_weights", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert inside("experiments/publish.py", "runs")[0] == 143
    assert files() == {path: content for path, content in before.items() if path != result}
    assert inside("experiments/publish.py", "runs")[0] == 0
    assert files() == before


def test_thinning_keeps_validations_first():
    records = [{"step": s, "loss": 1.0} for s in range(3000)]
    records += [{"step": s, "val_accuracy": 0.5} for s in range(0, 3000, 100)]
    kept = publish.thin(records)
    assert len(kept) <= publish.METRICS_LINES
    assert sum("val_accuracy" in r for r in kept) == 30
    assert sum("loss" in r for r in kept) > 400 and {"step": 2999, "loss": 1.0} not in kept[:-31]
    assert publish.thin(records[:10]) == records[:10]


def test_what_is_refused(tmp_path):
    fails("experiments/tables.py", tmp_path / "no", says="there is no folder")
    fails("experiments/tables.py", tmp_path, says="no result of a row")
    fails("experiments/tables.py", os.path.join(ROOT, "results"), "--write", tmp_path / "no.md",
          says="there is no page")  # fmt: skip
    done = run_script("experiments/run.sh", "deep_2-2-2", "--help", RUNS=tmp_path / "runs")
    assert "baseline_dropout" in done.stdout and not (tmp_path / "runs").exists()
    done = run_script("experiments/run.sh", "dep_2-2-2", PRESET="smoke", check=False)
    assert done.returncode == 2 and "no row 'dep_2-2-2'" in done.stderr and "shallow" in done.stderr
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="put them in"):
        tables.write_into(str(tmp_path / "page.md"), {"results": "text", "summary": "text"})


@pytest.fixture
def caught(tmp_path):
    """A function of a preset, a script and words: the flags of every training that it starts."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text('#!/bin/sh\nshift\nprintf "%s\\n" "$@" END >>"$LOG"\n')
    fake.chmod(0o755)

    def catch(preset, script, *words, **variables):
        log.write_text("")
        variables = {"PRESET": preset, "RUNS": str(tmp_path / "r"), "BASEMODEL": "b"} | variables
        run_script(script, *words, PYTHON=str(fake), LOG=str(log), **variables)
        calls = [call.strip().split("\n") for call in log.read_text().split("END")[:-1]]
        return [train.parse_flags(call) for call in calls if "--stage" in call]

    return catch


def test_flags_go_to_the_trainings_that_know_them(caught):
    words = ("--gamma2", 5, "--weighted_group_loss", "False", "--l2_weight=3e-4", "--gamma3=2")
    group, split = caught("cpu", "experiments/run.sh", "deep_2-2-2", *words)
    assert (group.gamma2, group.gamma3, group.weighted_group_loss) == (5, 2, False)
    assert group.l2_weight == split.l2_weight == 3e-4
    group, split = caught("cpu", "experiments/run.sh", "deep_2-2-2", "--equal_groups", "True")
    assert split.equal_groups and not group.equal_groups
    for row, flag in [("baseline", "--seed=1"), ("hier_2-4-4", "--ngroups1"), ("narrow", "--k"),
                      ("deep_2-2-2-R", "--data_dir")]:  # fmt: skip
        done = run_script("experiments/run.sh", row, flag, "1", PRESET="smoke", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert flag.partition("=")[0] in done.stderr


def test_rows_in_the_home_folder(caught, tmp_path):
    """In quotes, where the shell leaves ~ as it is."""
    row = ("experiments/run.sh", "deep_2-2-2-R")
    first, given = caught("cpu", *row, RUNS="~/x", HOME=str(tmp_path))
    assert first.train_dir.startswith(f"{tmp_path}/x/shared/")
    assert given.groups == f"{tmp_path}/x/deep_2-2-2-R/random.json"
    assert (tmp_path / "x" / "deep_2-2-2-R").is_dir()


def test_rows_share_a_baseline_of_the_same_flags_only(caught):
    bases = [
        caught("cpu", "experiments/run.sh", row, *words)[0].train_dir
        for row, words in [("fc_1-1-4-R", ()), ("deep_2-2-2-S", ()), ("deep_2-2-2-S", ("--k", "4")),
                           ("deep_2-2-2-C", ("--k", "4")), ("deep_2-2-2-C", ("--k=4",))]
    ]  # fmt: skip
    names = ["baseline", "baseline", "baseline--k_4", "baseline--k_4", "baseline--k=4"]
    assert [os.path.basename(base) for base in bases] == names


def test_dropout_is_where_the_paper_has_it(caught):
    for row, keep in [("fc_1-1-4", 1), ("shallow_1-2-2", 1), ("deep_2-2-2", 0.5)]:
        group, split = caught("paper", "experiments/run.sh", row)
        first, given = caught("paper", "experiments/run.sh", f"{row}-C")
        assert (group.dropout_keep_prob, split.dropout_keep_prob) == (keep, 1)
        assert (first.dropout_keep_prob, given.dropout_keep_prob) == (keep, 1)
        assert os.path.basename(first.train_dir) == "baseline" + "_dropout" * (keep < 1)
        assert given.basemodel == first.train_dir


@pytest.mark.parametrize(
    "preset, k",
    [(preset, "") for preset in ("paper", "cpu", "cpu18", "smoke")]
    + [("cpu", k) for k in ("1", "2", "8")]
    + [("cpu18", k) for k in ("2", "8")],
)
def test_rows_have_the_same_number_of_steps(preset, k, caught):
    """Steps and drops of the rate of all rows are those of group.sh and split.sh."""
    group, split = caught(preset, "experiments/run.sh", "deep_2-2-2", K=k)
    [whole] = caught(preset, "experiments/run.sh", "baseline", K=k)
    first, given = caught(preset, "experiments/run.sh", "deep_2-2-2-R", K=k)
    [narrow] = caught(preset, "experiments/run.sh", "narrow", K=k)
    assert not k or whole.k == int(k)
    assert whole.max_steps == narrow.max_steps == group.max_steps + split.max_steps
    assert (first.max_steps, given.max_steps) == (group.max_steps, split.max_steps)
    assert first.dropout_keep_prob == group.dropout_keep_prob
    assert len({run.batch_size for run in (group, split, whole, narrow, first, given)}) == 1
    per_epoch = 45000 / whole.batch_size
    left = [whole.max_steps / per_epoch - e for e in whole.lr_step_epoch]
    assert left == pytest.approx([split.max_steps / per_epoch - e for e in split.lr_step_epoch])

    def rates(run):
        steps = range(0, run.max_steps, 10)
        return [objective.learning_rate(run, step, per_epoch) for step in steps]

    assert rates(first) == rates(group) and rates(given) == rates(split)
    assert rates(whole) == rates(narrow)
    if whole.lr_schedule != "step":  # one line through both stages
        assert rates(whole) == rates(group) + rates(split)
    assert whole.k == group.k == first.k
    if preset in ("cpu", "cpu18"):  # groups form alike at every width, in half the epochs too
        assert [group.gamma1 / group.k, group.gamma2 / group.k] == pytest.approx([0.2, 0.5])
        assert group.gamma3 == 16
        epochs = whole.max_steps / per_epoch
        assert epochs == {"cpu": 36, "cpu18": 18}[preset]
        assert group.group_lr_scale == {1: 288, 2: 80, 4: 24, 8: 7}[group.k] * 36 / epochs
        times = [group.max_steps / per_epoch, group.group_start_epoch, *group.gamma2_step_epoch]
        assert [time / epochs for time in times] == pytest.approx([9 / 36, 6 / 36, 8 / 36])
    target = resnet.count(resnet.equal_tree(resnet.NetworkConfig(k=whole.k, groups=(2, 2, 2))))[0]

    def distance(k):
        return abs(resnet.count(resnet.ResNet(resnet.NetworkConfig(k=k)))[0] - target)

    assert distance(narrow.k) == min(distance(narrow.k + d / 16) for d in (-1, 0, 1))


@pytest.mark.parametrize(
    "row, groups",
    [("resnet18_1-2-2", (1, 2, 2)), ("resnet18_2-2-2", (2, 2, 2)),
     ("alexnet_1-1-3", (1, 1, 1, 1, 3)), ("alexnet_1-2-5", (1, 1, 1, 2, 5)),
     ("alexnet_2-4-8", (1, 1, 2, 4, 8)), ("alexnet_2x5", (2, 2, 2, 2, 2))],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["own", "cpu"])
def test_rows_of_other_networks(preset, row, groups, caught):
    """Their network and groups; steps and drops of the rate as those of the Wide ResNet's rows."""
    network = rows.network_of(row)
    preset = network if preset == "own" else preset
    group, split = caught(preset, "experiments/run.sh", row)
    [whole] = caught(preset, "experiments/run.sh", network)
    first, given = caught(preset, "experiments/run.sh", f"{row}-R")
    runs = (group, split, whole, first, given)
    assert {run.network for run in (group, whole, first)} == {network}
    config = networks.config_class(network)
    wanted = config.k if preset == network else {"resnet18": 0.5, "alexnet": 0.25}[network]
    assert {run.k for run in (group, whole, first)} == {wanted}
    assert group.ngroups == split.ngroups == given.ngroups == groups
    assert whole.max_steps == group.max_steps + split.max_steps
    assert (first.max_steps, given.max_steps) == (group.max_steps, split.max_steps)
    for name in ("batch_size", "initial_lr", "schedule_for", "preset", "data_dir"):
        assert len({getattr(run, name) for run in runs}) == 1, name
    assert whole.initial_lr == (0.1 if network == "resnet18" else 0.05 if preset == "cpu" else 0.01)
    per_epoch = whole.schedule_for / whole.batch_size
    left = [whole.max_steps / per_epoch - e for e in whole.lr_step_epoch]
    ends = [split.max_steps / per_epoch - e for e in split.lr_step_epoch]
    assert left == pytest.approx(ends, abs=0.1)


def test_rows_of_networks_need_their_presets():
    for row, preset, says in [("alexnet_2x5", "paper", "presets alexnet and cpu, not 'paper'"),
                              ("resnet18", "alexnet", "presets resnet18 and cpu, not 'alexnet'"),
                              ("deep_2-2-2", "resnet18", "PRESET=resnet18 is for the rows"),
                              ("resnet18_2-2-3", "cpu", "no row 'resnet18_2-2-3'")]:  # fmt: skip
        done = run_script("experiments/run.sh", row, PRESET=preset, check=False)
        assert done.returncode == 2 and says in done.stderr.splitlines()[0], done.stderr


def test_tables_of_another_network(published, tmp_path):
    settings = {"network": "ResNet-18x0.5", "num_classes": 30, "image_size": 64, "dataset": "mine"}
    settings["confusion_matrix"] = np.eye(30, dtype=int).tolist()
    published("resnet18", weights=2_800_000, **settings)
    settings |= {"groups": "2-2-2", "group_classes": np.arange(30).reshape(2, 15).tolist()}
    folder = published("resnet18_2-2-2-R", correct=60, weights=1_500_000, **settings)
    file = tmp_path / "resnet18_2-2-2-R" / "config.json"
    utils.write_json(file, utils.read_json(file) | {"network": {"k": 0.5}})
    text = tables.page(rows.find_results(folder))
    assert "**on the mine data set**" in text and "are of ResNet-18x2 on ILSVRC 2012." in text
    config = networks.config_class("resnet18")(
        k=0.5, groups=(2, 2, 2), num_classes=30, image_size=64
    )
    equal = resnet.count(resnet.equal_tree(config))[0]
    assert f"{100 * (1 - equal / 2_800_000):.1f} %" in text and "40.00 (28.61)" in text
    assert "30.00 (25.58)" in text and "WRN" not in text
    assert "| Table 4: 2-2-2, random" in tables.commands(rows.find_results(folder))


def test_published_results_are_in_the_readme(monkeypatch):
    """README.md and docs/results.md hold what experiments/ makes of results/."""
    if not os.path.isdir(os.path.join(ROOT, "results")):
        pytest.skip("no results are published yet")
    monkeypatch.chdir(ROOT)
    found = rows.find_results(rows.RESULTS)
    for page, text in (
        ("README.md", tables.summary(found)),
        ("docs/results.md", tables.page(found)),
        ("experiments/README.md", tables.commands(found)),
        ("docs/results.md", trend.page(trend.by_preset(trend.parse_flags([]).folders))),
    ):
        with open(os.path.join(ROOT, page), encoding="utf-8") as file:
            assert text in file.read(), f"python -m experiments.tables (or trend) --write {page}"
    for path in glob.glob(os.path.join(ROOT, "results", "**", "metrics.jsonl"), recursive=True):
        with open(path, encoding="utf-8") as file:
            assert len([json.loads(line) for line in file]) <= publish.METRICS_LINES


@pytest.mark.skipif(not os.path.exists(REAL_ARCHIVE), reason=f"{REAL_ARCHIVE} is missing")
def test_pretrained_networks_have_the_published_numbers(tmp_path):
    """What a user gets from eval.sh on the networks in pretrained/ is what results/ says."""
    if not os.path.isdir(os.path.join(ROOT, publish.PRETRAINED)):
        pytest.skip("no networks are published yet")
    data = str(tmp_path / "data")
    status, _, error = inside(
        "download_cifar100.py", "--archive", REAL_ARCHIVE, "--dataset_path", data
    )
    assert status == 0, error
    for row in publish.PRETRAINED_ROWS:
        flags = ("--checkpoint", os.path.join(ROOT, publish.PRETRAINED, row))
        run_script("eval.sh", *flags, "--eval_dir", tmp_path / row, DATA_DIR=data)
        found = utils.read_json(tmp_path / row / "result.json")
        seeds = rows.find_results(os.path.join(ROOT, rows.RESULTS))[row]
        (published,) = (result for result in seeds if result["seed"] == found["seed"])
        # Another processor adds in another order, which may tip an image between two classes.
        tipped = 0 if found["hardware"] == published["hardware"] else 5
        assert abs(found["correct"] - published["correct"]) <= tipped
        for name in ("weights", "flops", "groups", "group_classes", "step", "seed"):
            assert found[name] == published[name]


# ---------------------------------------------------------------- the trend over the width


@pytest.fixture
def widths(tmp_path):
    """Published rows of three widths whose gaps are c / k of 8, 10 and 4 points, two seeds each;
    of the fourth, elsewhere, they are twice that."""
    for k in (1, 2, 4, 8):
        folder = tmp_path / {4: "results", 8: "k8"}.get(k, f"results/trend/k{k}")
        for row, c in [("baseline", 0), ("deep_2-2-2", 8), ("deep_2-2-2-R", 10), ("narrow", 4)]:
            c *= 1 + (k == 8)
            for seed in (0, 1):
                here = folder / row / (f"seed{seed}" if seed else "")
                here.mkdir(parents=True)
                error = 0.3 + c / k / 100 + (0.002 if seed else -0.002)
                result = {"split": "test", "step": 5, "precision": "float32", "seed": seed,
                          "dataset": "cifar100", "preset": "cpu", "network": f"WRN-16-{k}",
                          "error": error, "num_examples": 10000}  # fmt: skip
                utils.write_json(str(here / "result.json"), result)
                utils.write_json(str(here / "config.json"), {"flags": {"max_steps": 5}})
    return [str(tmp_path / "results" / name) for name in ("", "trend/k1", "trend/k2")]


def _set_preset(folder, preset):
    for row in ("baseline", "deep_2-2-2", "deep_2-2-2-R", "narrow"):
        for file in glob.glob(f"{folder}/{row}/**/result.json", recursive=True):
            utils.write_json(file, utils.read_json(file) | {"preset": preset})


def test_the_trend_finds_the_law(widths, tmp_path, monkeypatch):
    found = trend.gaps(trend.by_width(widths))
    assert found == trend.gaps(trend.by_width(widths[::-1]))
    assert [k for k, *_ in found["narrow"]] == [1, 2, 4]
    for row, c in [("deep_2-2-2", 8), ("deep_2-2-2-R", 10), ("narrow", 4)]:
        assert [gap for _, gap, _ in found[row]] == pytest.approx([c, c / 2, c / 4])
        fitted, error = trend.fit(found[row])
        assert fitted == pytest.approx(c) and 0 < error < 1
        power, error, factor = trend.fit_power(found[row])
        assert (power, factor) == pytest.approx((1, c)) and 0 < error < 1
    # Between two points the line of logarithms is exact: var(a) = sum of (error / gap)^2 / ln(2)^2.
    power, error, factor = trend.fit_power([(1, 6, 0.6), (2, 3 * 2**0.5, 0.6)])
    assert (power, factor) == pytest.approx((0.5, 6))
    assert error == pytest.approx((0.1**2 + 0.02) ** 0.5 / math.log(2))
    assert trend.gap_table({"narrow": [(1, -1, 1), (2, 1, 1)]})  # no error
    # The standard error of a difference of two means over 20,000 images each.
    expected = 100 * (0.38 * 0.62 / 20000 + 0.3 * 0.7 / 20000) ** 0.5
    assert found["deep_2-2-2"][0][2] == pytest.approx(expected)
    file, page = tmp_path / "trend.png", tmp_path / "page.md"
    page.write_text("# Ours\n" + "\n".join(tables.MARKERS["trend"]) + "\nmore\n")
    monkeypatch.chdir(tmp_path)
    for folders in ([], widths):
        flags = ("--output_file", file, "--write", page)
        status, out, error = inside("experiments/trend.py", *folders, *flags)
        assert status == 0, error
        assert all(line in page.read_text() for line in out.splitlines() if "|" in line)
        first, second = re.findall(r"learned groups.*", out)
        assert re.findall(r"\d+\.\d+ \(2\)", first) == ["38.00 (2)", "34.00 (2)", "32.00 (2)"]
        learned = second.split("|")
        assert [cell.split(" ± ")[0].strip() for cell in learned[1:-1]] == [
            "8.00", "4.00", "2.00", "8.0", "7.6", "1.00", "1.00", "1.00"
        ]  # fmt: skip
    assert file.stat().st_size > 10000
    assert page.read_text().startswith("# Ours\n<!-- trend") and "more" in page.read_text()
    # What is said of k = 8 stays, beside what comes out.
    wide = trend.gaps(trend.by_width([*widths, str(tmp_path / "k8")]))
    cells = [
        cell.split(" ± ")[0].strip() for cell in trend.gap_table(wide).splitlines()[2].split("|")
    ]
    assert cells[2:-1] == ["8.00", "4.00", "2.00", "2.00", "8.0", "7.6", "1.00", "1.00", "1.00"]
    trend.draw({"cpu": wide})


def test_each_preset_has_a_trend(widths, tmp_path):
    for folder in (widths[2], str(tmp_path / "k8")):
        _set_preset(folder, "cpu18")
    file = tmp_path / "trend.png"
    flags = (*widths, tmp_path / "k8", "--output_file", file)
    status, out, error = inside("experiments/trend.py", *flags)
    assert status == 0, error
    first, second = out.split("Preset `cpu18`:")
    assert first.startswith("Preset `cpu`:") and file.stat().st_size > 10000
    names = [re.findall(r"(?m)^\| not split.*", text) for text in (first, second)]
    assert [len(re.findall(r"\(2\)", line)) for (line,) in names] == [2, 2]
    # Of cpu18, c is that of k = 2.
    cells = second.split("learned groups")[2].split("|")
    values = [cell.split(" ± ")[0].strip() for cell in cells[1:6]]
    assert values == ["4.00", "2.00", "8.0", "7.6", "1.00"]


def test_what_the_trend_refuses(widths, tmp_path):
    fails("experiments/trend.py", *widths, widths[1], says="k1 is of k = 1, as another folder is")
    fails("experiments/trend.py", tmp_path / "no", says="there is no folder")
    _set_preset(widths[1], "smoke")
    fails("experiments/trend.py", *widths, says="the trend mixes presets (cpu, smoke)")
    shutil.rmtree(os.path.join(widths[2], "baseline"))
    fails("experiments/trend.py", *widths, says="k2 has no baseline")
