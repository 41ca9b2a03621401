"""The shell scripts: flags exist and are read, syntax, overriding, the whole pipeline."""

import ast
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fails, inside, python, run_script

import networks
import train
import utils

SCRIPTS = sorted(glob.glob(os.path.join(ROOT, "**", "*.sh"), recursive=True))
PIPELINE = {"group.sh": "train.py", "split.sh": "train.py", "eval.sh": "eval.py"}
PROGRAMS = (
    "train.py", "eval.py", "report", "benchmark", "experiments/tables.py",
    "experiments/variants.py", "experiments/publish.py", "experiments/trend.py",
    "download_cifar100.py",
)  # fmt: skip


def source(name):
    if "." not in name:
        name += "/__main__.py"
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def flags_of(program):
    """Flags that a program knows, from its --help."""
    status, text, error = inside(program, "--help")
    assert (status, error) == (0, "")
    return set(re.findall(r"^\s+--(\w+)", text, re.MULTILINE)) - {"help"}


def names_read(program):
    """Flags that a program's code reads outside its parser: `flags.NAME`, getattr of a name in
    the same loop, and the fields of objective.Objective."""
    tree = ast.parse(source(program))
    for node in list(tree.body):
        if getattr(node, "name", "") in ("_flag_table", "parse_flags", "_parser", "parse_args"):
            tree.body.remove(node)

    def is_flags(node):
        name = getattr(node, "id", getattr(node, "attr", ""))
        return name in ("flags", "f", "args")

    def is_getattr(node):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
        return called and is_flags(node.args[0])

    read = set()
    for node in ast.walk(tree):
        inside = list(ast.walk(node))
        if isinstance(node, ast.Attribute) and is_flags(node.value):
            read.add(node.attr)
        elif isinstance(node, (ast.For, ast.DictComp, ast.ListComp)) and any(
            map(is_getattr, inside)
        ):
            read |= {n.value for n in inside if isinstance(n, ast.Constant)}
        elif isinstance(node, ast.ClassDef) and node.name == "Objective":
            read |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return read


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_helps(program):
    done = python(program, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    assert done.stderr == ""


@pytest.mark.parametrize("script, program", PIPELINE.items())
def test_every_flag_of_a_script_exists_once(script, program):
    passed = re.findall(r"^    --(\w+) ", source(script), re.MULTILINE)
    assert passed and len(passed) == len(set(passed))
    assert set(passed) <= flags_of(program)
    assert source(script).rstrip().endswith('"$@"')


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_read(program):
    flags = flags_of(program)
    read = names_read(program)
    if program == "train.py":
        for other in ("training/loop.py", "objective.py", "restore.py"):
            read |= names_read(other)
    assert flags and flags - read == set()


def test_published_flags_exist():
    published = """train_dir data_dir batch_size num_residual_units k ngroups1 ngroups2 ngroups3
        l2_weight gamma1 gamma2 gamma3 dropout_keep_prob momentum bn_no_scale weighted_group_loss
        initial_lr lr_step_epoch lr_decay max_steps display val_interval checkpoint_interval
        group_summary_interval basemodel checkpoint stage seed precision deterministic keep
        group_lr_scale"""
    assert set(published.split()) <= flags_of("train.py")
    assert {"dataset_path", "archive", "url", "synthetic", "seed"} <= flags_of(
        "download_cifar100.py"
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=os.path.basename)
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable)) or shutil.which(
        "shellcheck"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (tests/requirements.txt has it)")
    subprocess.run([shellcheck, "-x", path], check=True, cwd=ROOT)


# What bash 3.2, of macOS, does not know.
NEWER = {
    "associative arrays, names of variables": r"\b(declare|local|typeset|readonly)\s+-\w*[AgnlucI]",
    "commands": r"\b(mapfile|readarray|coproc)\b|\bwait\s+-[nfp]|\bread\b.*\s-\w*[iN]\b",
    "fractions of seconds": r"\bread\b.*\s-t\s*\d*\.",
    "another case of letters": r"\$\{\w+(\[[^]]*\])?(\^|,|@[A-Za-z]\})",
    "both streams": r"\|&|&>>",
    "the next patterns": r";;?&",
    "times": r"%\([^)]*\)T|\b(EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM)\b",
    "whether a variable is set": r"\[\[?\s+(!\s+)?-[vR]\s",
    "from the end": r"\[\s*-\d|\$\{[\w@*]+:[^}:]*:\s*-\d",
    "descriptors by name": r"\{\w+\}[<>]",
    "options": r"\bshopt\s.*\b(globstar|lastpipe|inherit_errexit|autocd|localvar_\w+)",
    "letters by number": r"\$'[^']*\\[uU]|\{0\d*\.\.",
    # It leaves the quotes in what comes instead, and takes an empty array for one that is not set.
    "quotes in a replacement": r"\$\{\w+/[^}]*/\"",
    # (One that begins another has something.)
    "arrays that may be empty": r"(?<!\+)(?<!=\()\"\$\{[A-Z_]+\[[@*]\]\}",
}


@pytest.mark.parametrize("pattern", NEWER.values(), ids=NEWER)
def test_scripts_keep_to_bash_3(pattern):
    for path in [*SCRIPTS, os.path.join(ROOT, ".ci", "run")]:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        code = [line for line in lines if not line.lstrip().startswith("#")]
        assert [line for line in code if re.search(pattern, line)] == [], path


@pytest.mark.parametrize("preset", ["paper", "cpu", "cpu18", "smoke", "resnet18", "alexnet"])
@pytest.mark.parametrize("script", ["group.sh", "split.sh"])
def test_presets_are_valid(script, preset, tmp_path):
    """The flags of a script, caught on their way to train.py, pass its checks."""
    if preset == "alexnet":  # whose file has its layers in it
        pytest.importorskip("tensorflow")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nshift\nfor word; do echo "$word"; done\n')
    fake.chmod(0o755)
    done = run_script(
        script, "--seed", "5", PRESET=preset, PYTHON=str(fake), BASEMODEL=str(tmp_path)
    )
    flags = train.parse_flags(done.stdout.splitlines())
    assert flags.seed == 5 and flags.preset == preset
    if preset == "paper" and script == "group.sh":
        assert (flags.k, flags.batch_size, flags.max_steps, flags.l2_weight) == (
            8,
            90,
            200000,
            1e-4,
        )
        assert (flags.gamma1, flags.gamma2, flags.gamma3, flags.dropout_keep_prob) == (
            1,
            1,
            10,
            0.5,
        )
        assert (
            flags.lr_step_epoch == [240, 300] and flags.bn_no_scale and flags.ngroups == (2, 2, 2)
        )
    if preset == "paper" and script == "split.sh":
        assert (flags.max_steps, flags.l2_weight, flags.lr_step_epoch) == (120000, 5e-4, [100, 140])
        assert flags.dropout_keep_prob == 1 and not flags.bn_no_scale
    if preset in networks.NETWORKS and script == "group.sh":
        assert flags.network == preset and flags.k == networks.config_class(preset).k
        assert flags.data_dir.endswith("/data/imagenet") and flags.schedule_for == 1281167


def test_unknown_preset():
    for script in ("group.sh", "split.sh", "eval.sh", "quickstart.sh"):
        done = run_script(script, PRESET="huge", PYTHON=sys.executable, check=False)
        assert (
            done.returncode == 2
            and "PRESET is paper, cpu, cpu18, smoke, resnet18 or alexnet" in done.stderr
        )
    done = run_script("quickstart.sh", PRESET="alexnet", DATA_DIR="/no", check=False)
    assert done.returncode == 2 and "give --data PICTURES" in done.stderr


def test_pipeline_with_flags_that_override(tmp_path, data_dir):
    """group.sh, split.sh, eval.sh and the summary, a few steps each."""
    runs = tmp_path / "runs"
    common = {"PRESET": "smoke", "DATA_DIR": data_dir}
    short = ["--max_steps", 4, "--display", 2, "--batch_size", 20]
    grouped = run_script(
        "group.sh", *short, "--k", 1.5, "--ngroups1", 4, "--ngroups2", 4, "--bn_no_scale", "False",
        "--num_residual_units", 1, TRAIN_DIR=str(runs / "group"), **common,
    )  # fmt: skip
    assert "WRN-10-1.5, groups 2-4-4" in grouped.stdout and "step 4/4" in grouped.stdout
    run_script(
        "split.sh", *short, BASEMODEL=str(runs / "group"), TRAIN_DIR=str(runs / "split"), **common
    )
    for name, run, flags in [
        ("eval", "group", []),
        ("eval_mask", "group", ["--mask"]),
        ("eval", "split", []),
    ]:
        checkpoint = str(runs / run)
        run_script(
            "eval.sh", "--eval_dir", runs / run / name, *flags, CHECKPOINT=checkpoint, **common
        )
    command = [
        sys.executable,
        os.path.join(ROOT, "report"),
        runs,
        "--data_dir",
        data_dir,
    ]
    summary = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tree = utils.read_json(runs / "split" / "eval" / "result.json")
    for text in (
        "SYNTHETIC",
        f"{tree['accuracy']:.4f}",
        f"{tree['weights']:,}",
        "group 3 (",
        "saved",
        "before the cut     every indicator's mean largest share 0.",
    ):
        assert text in summary
    listed = [int(n) for n in re.findall(r"\bclass(\d+)\b", summary)]
    assert sorted(listed) == list(range(100))
    page = (runs / "report.html").read_text()
    pictures = {name.removesuffix(".png") for name in os.listdir(runs / "report")}
    assert {
        "group_curves",
        "sharpness",
        "weights",
        "split_curves",
        "tree",
        "superclasses",
    } <= pictures
    assert {"samples", "confusion"} <= pictures and page.count("data:image/png") == len(pictures)
    assert re.search('alt="([^"]*)"', page)[1] == "The tree"  # opens the page
    assert 'src="http' not in page and "SYNTHETIC" in page and "deviations above chance" in page
    cut = utils.read_json(runs / "group" / "eval_mask" / "result.json")
    assert np.trace(cut["confusion_matrix"]) == cut["correct"]
    # Neither with another data set nor with what is not of one pipeline.
    photos = tmp_path / "photos"
    shutil.copytree(data_dir, photos)
    description = utils.read_json(photos / "split.json")
    utils.write_json(photos / "split.json", description | {"dataset": "cifar100"})
    fails("report", runs, "--data_dir", photos, says="was trained on synthetic")
    assert "by now there is" not in page
    utils.write_json(runs / "split" / "eval" / "result.json", tree | {"step": tree["step"] - 1})
    assert inside("report", runs, "--data_dir", data_dir)[0] == 0
    assert f"by now there is {tree['step']}" in (runs / "report.html").read_text()
    tree["group_classes"].reverse()
    utils.write_json(runs / "split" / "eval" / "result.json", tree)
    status, out, error = inside("report", runs, "--data_dir", data_dir)
    assert status == 0, error
    assert "No summary: the results are not of one pipeline (group_classes differ)" in out
    config = utils.read_json(runs / "split" / "config.json")
    config["flags"]["equal_groups"] = True  # which cuts into others than the learned ones
    utils.write_json(runs / "split" / "config.json", config)
    assert "No summary" not in inside("report", runs, "--data_dir", data_dir)[1]


STUB = """#!/bin/sh
[ "$1 ${REAL-}" = "-c ${REAL:-none}" ] && exec "$REAL" "$@"
[ "$1" = -c ] && exit 0
echo "$(basename "$1")" "$@" >>"$LOG"
case "$*" in
*download_cifar100.py*--synthetic*)
    mkdir -p "$3"
    echo '{"dataset": "synthetic"}' >"$3/split.json" ;;
*download_cifar100.py*--archive*) ;;
*download_cifar100.py*) exit "$DOWNLOAD" ;;
*"--stage group"*)
    echo "step ${STEP:-100}/3000  loss 1.0000  accuracy 0.500  lr 0.1  700 images/s  0:05:12 left"
    echo "step 200/3000  loss 1.0000  accuracy 0.500  lr 0.1  700 images/s  0:09:00 left"
    sleep "${SLEEP:-0}"
    exit "${GROUP:-0}" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """quickstart.sh with a Python that only notes its calls: (status, stderr, calls)."""
    here, log = tmp_path / "a copy", tmp_path / "log"
    python = here / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for name in ("quickstart.sh", "group.sh", "split.sh", "eval.sh", "presets.sh"):
        shutil.copy(os.path.join(ROOT, name), here)
    requirements = shutil.copy(os.path.join(ROOT, "requirements.txt"), here)
    python.write_text(STUB)
    python.chmod(0o755)
    stamp = subprocess.run(
        ["cksum"], input=source(requirements).encode(), capture_output=True
    ).stdout
    (here / ".venv" / "stamp-1").write_bytes(stamp)

    def start(*words, download=0, **environment):
        kept = {k: v for k, v in os.environ.items() if k not in ("PRESET", "CIFAR100_ARCHIVE")}
        return subprocess.Popen(
            [here / "quickstart.sh", *words], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=kept | {"PYTHON": str(python), "LOG": str(log), "DOWNLOAD": str(download)}
            | environment,
        )  # fmt: skip

    def run(*words, **settings):
        log.write_text("")
        process = start(*words, **settings)
        run.out, error = process.communicate()
        return process.returncode, error, log.read_text().splitlines()

    run.start, run.log = start, log
    return run


def test_quickstart_goes_through_the_pipeline(quickstart):
    status, error, calls = quickstart()
    assert (status, error) == (0, "")
    names = [call.split()[0] for call in calls]
    evaluated = ["eval.py", "eval.py", "train.py", "eval.py"]
    assert names == ["download_cifar100.py", "train.py", *evaluated, "report"]
    assert "--stage group" in calls[1] and "--stage split" in calls[4]
    assert [" --mask" in call for call in calls[2:4]] == [False, True]
    assert all("--preset smoke" in calls[i] and "/data/cifar100" in calls[i] for i in (1, 4))


def test_quickstart_says_how_long_it_takes(quickstart):
    quickstart()
    assert quickstart.out.count("minutes to the end") == 1
    # 5:12 and 0.8 as much again, in whole minutes.
    assert "0:05:12 left\n== about 10 minutes to the end" in quickstart.out
    quickstart(STEP="2500")  # a run that goes on: grouping takes six times what is left of it
    assert "0:05:12 left\n== about 31 minutes to the end" in quickstart.out
    assert quickstart(GROUP="130")[0] == 130  # an interruption ends it


def test_a_second_quickstart_waits_and_finds_what_the_first_made(quickstart):
    settings = {"REAL": sys.executable, "SLEEP": "1"}  # which takes locks
    two = [quickstart.start("--synthetic", **settings) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert sum("waiting for another script that works in " in out for out, _ in said) == 1
    names = [call.split()[0] for call in quickstart.log.read_text().splitlines()]
    assert names.count("download_cifar100.py") == 2
    names = [name for name in names if name != "download_cifar100.py"]
    assert names == 2 * ["train.py", "eval.py", "eval.py", "train.py", "eval.py", "report"]


def test_quickstart_where_there_is_no_network(quickstart):
    status, error, calls = quickstart(download=3)
    assert status == 0 and "no network" in error and "SYNTHETIC" in error
    assert ["--synthetic" in call for call in calls[:2]] == [False, True] and len(calls) == 8
    status, error, calls = quickstart(download=3)  # which is there now
    assert status == 0 and "SYNTHETIC" in error and "download" not in calls[0]


def test_quickstart_keeps_a_download_that_was_interrupted(quickstart, tmp_path):
    part = tmp_path / "a copy" / "data" / "cifar100" / "cifar-100-python.tar.gz.part"
    part.parent.mkdir(parents=True)
    part.write_text("much")
    status, error, calls = quickstart(download=3)
    assert (status, error, len(calls)) == (3, "", 1)


def test_quickstart_ends_where_there_are_no_data(quickstart, tmp_path):
    status, _, calls = quickstart(download=1)
    assert status == 1 and len(calls) == 1
    for words in (["--archive"], ["--archive", ""], ["--archive="], ["--archive", "none"],
                  ["--synthetic", "--archive", __file__], ["now"]):  # fmt: skip
        status, error, calls = quickstart(*words)
        assert status == 2 and error.count("\n") == 1 and not calls, error
    for words, settings in [(["--archive", __file__], {}), ([], {"CIFAR100_ARCHIVE": __file__})]:
        status, error, calls = quickstart(*words, **settings)
        assert status == 0 and f"--archive {__file__}" in calls[0], error
    (tmp_path / "unpacked").mkdir()
    status, error, calls = quickstart("--archive=~/unpacked", HOME=str(tmp_path), DATA_DIR="~/data")
    assert status == 0, error
    assert f"--dataset_path {tmp_path}/data --archive {tmp_path}/unpacked" in calls[0]
    status, error, calls = quickstart(DATA_DIR="gs://bucket/data")
    assert status == 2 and error.count("\n") == 1 and not calls


def test_scripts_by_a_link_and_with_cdpath(tmp_path):
    link = tmp_path / "group.sh"
    link.symlink_to(os.path.join(ROOT, "group.sh"))
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$1"\n')
    stub.chmod(0o755)
    for command, where in [([link], tmp_path), (["bash", "group.sh"], ROOT)]:
        settings = {"PYTHON": str(stub), "CDPATH": str(tmp_path), "PRESET": "smoke"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=where, env=os.environ | settings
        )
        assert done.stdout == os.path.join(os.path.realpath(ROOT), "train.py") + "\n", done.stderr
