"""utils.py: commands in environments that were made for other programs; oneDNN's numbers."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, python, train_flags

import rundir
import utils

SWEEP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "convolutions.py")
# From the least up; what the processor lacks, oneDNN leaves out by itself.
LEVELS = ("SSE41", "AVX2", "AVX512_CORE", "DEFAULT")
KEPT = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")


def environment(**settings):
    """The caller's, without what pytest's own import of TensorFlow has set."""
    return {k: v for k, v in os.environ.items() if k not in KEPT} | settings


# ---------------------------------------------------------------- oneDNN


@pytest.mark.skipif(not utils.is_x86(), reason="oneDNN's kernels are of x86")
@pytest.mark.parametrize("level", LEVELS)
def test_convolutions_of_uneven_groups_are_right(level):
    """Outputs and gradients of layers that uneven groups make, beside those in float64."""
    done = subprocess.run(
        [sys.executable, SWEEP], capture_output=True, text=True, timeout=600,
        env=environment(ONEDNN_MAX_CPU_ISA=level, TF_ENABLE_ONEDNN_OPTS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]  # a kernel that writes too far aborts
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 4 * (5 + 12) * 3 and max(differences.values()) < 1e-4


@pytest.fixture(scope="module")
def twice(tmp_path_factory, data_dir):
    """Each stage in two processes with one seed, with oneDNN of AVX2: the runs' folders."""
    root, made = tmp_path_factory.mktemp("twice"), {}

    def run(stage):
        if stage == "split" and "group" not in made:
            run("group")
        if stage not in made:
            made[stage] = [root / f"{stage}_{n}" for n in (1, 2)]
            more = {"group": {"ngroups1": 4, "ngroups2": 4}, "baseline": {}}
            more["split"] = {"basemodel": root / "group_1"}
            for folder in made[stage]:
                flags = train_flags(stage, folder, data_dir, batch_size=30, **more[stage])
                env = environment(ONEDNN_MAX_CPU_ISA="AVX2")  # which oneDNN reads when it is used
                done = python("train.py", *flags, fork=True, env=env)
                assert done.returncode == 0, done.stderr
        return made[stage]

    return run


@pytest.mark.parametrize("stage", ["baseline", "group", "split"])
def test_same_seed_same_numbers(twice, stage):
    one, other = (rundir.read_checkpoint(rundir.find_checkpoint(str(f))) for f in twice(stage))
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_results_say_whether_onednn_is_on_and_on_what(twice, tmp_path, data_dir):
    run = twice("baseline")[0]
    config, result = (utils.read_json(run / name) for name in ("config.json", "result.json"))
    for about in (config, result):
        assert about["versions"]["onednn"] == "on"
        assert re.search(r"\(.+, oneDNN up to avx2\), \d+ core", about["hardware"])
    done = python(
        "eval.py", "--checkpoint", run, "--data_dir", data_dir, "--eval_dir", tmp_path,
        env=environment(TF_ENABLE_ONEDNN_OPTS="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # a person's own setting counts
    assert utils.read_json(tmp_path / "result.json")["versions"]["onednn"] == "off"


@pytest.mark.parametrize(
    "flags, title",
    [
        ("flags : fpu avx avx2 fma", "avx2"),
        ("flags : avx avx2 avx_vnni", "avx2_vnni"),
        ("flags : avx avx2 avx512f avx512_vnni avx512_bf16", "avx512_bf16"),
        ("flags : avx avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "amx"),
        ("Features : fp asimd evtstrm", "neon"),
        ("flags : fpu", ""),
    ],
)
def test_instruction_sets(flags, title):
    assert rundir.instruction_set(f"model name : X\n{flags}\n") == title


AVX512, AMX = "flags : avx2 avx512f avx512_bf16\n", "flags : avx2 avx512f avx512_bf16 amx_tile\n"


@pytest.mark.parametrize(
    "cpuinfo, limit, precision, device, says",
    [
        (AVX512, None, "bfloat16", "/CPU:0", "(this one: avx512_bf16)"),
        (AVX512, "ALL", "bfloat16", "/CPU:1", "(this one: avx512_bf16)"),
        (AMX, "AVX512_CORE_BF16", "bfloat16", "/CPU:0", "amx, oneDNN up to avx512_core_bf16)"),
        (AMX, None, "bfloat16", "/CPU:0", None),
        (AMX, "AVX512_CORE_AMX", "bfloat16", "/CPU:0", None),
        (AVX512, None, "float32", "/CPU:0", None),
        (AVX512, None, "bfloat16", "/GPU:0", None),
        ("Features : asimd\n", None, "bfloat16", "/CPU:0", None),
        ("", None, "bfloat16", "/CPU:0", None),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bfloat16_without_amx_is_called_slow(
    cpuinfo, limit, precision, device, says, name, monkeypatch
):
    for other in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(other, raising=False)
    if limit:
        monkeypatch.setenv(name, limit)
    monkeypatch.setattr(rundir, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(rundir, "is_x86", lambda: "Features" not in cpuinfo)
    line = rundir.slow_precision(precision, device)
    assert "\n" not in line and (says in line if says else line == "")


def test_a_run_and_an_evaluation_say_that_bfloat16_is_slow(tmp_path, data_dir):
    precision = ("--data_dir", data_dir, "--precision", "bfloat16")
    env = environment(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    for words in (
        ("train.py", "--stage", "baseline", "--k", 1, "--num_residual_units", 1, "--max_steps", 1,
         "--train_dir", tmp_path, "--batch_size", 8),
        ("eval.py", "--checkpoint", tmp_path),
    ):  # fmt: skip
        done = python(*words, *precision, fork=True, env=env)
        assert done.returncode == 0, done.stderr
        slow = "--precision bfloat16 may be slower than float32"
        assert done.stdout.count(slow) == rundir.is_x86()


# ---------------------------------------------------------------- other programs' settings

OTHERS = {
    "a notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "another Keras": {"KERAS_BACKEND": "theano", "KERAS_MAX_EPOCHS": "many"},
    "an old Keras": {"TF_USE_LEGACY_KERAS": "1"},
    "strict warnings": {"PYTHONWARNINGS": "error"},
    "no docstrings": {"PYTHONOPTIMIZE": "2"},
    "a safe path": {"PYTHONSAFEPATH": "1"},
    "no home": {"HOME": "/dev/null"},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_commands_where_other_programs_left_settings(settings):
    done = python("train.py", "--help", env=environment(**settings))
    assert done.returncode == 0 and "--group_lr_scale" in done.stdout, done.stderr
    assert done.stderr == ""


def test_a_run_with_all_of_them_at_once(tmp_path, data_dir):
    """And with a keras.json of long ago, and a folder that only has TensorBoard's name."""
    (tmp_path / "keras.json").write_text('{"backend": "theano", "image_data_format": "tf"}')
    (tmp_path / "tensorboard").mkdir()
    settings = {key: value for one in OTHERS.values() for key, value in one.items()}
    del settings["PYTHONWARNINGS"]  # after the import, warnings are a person's to be strict about
    settings |= {"KERAS_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    # TensorFlow without its docstrings is compiled once, not once a process.
    settings |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    flags = train_flags("group", tmp_path / "run", data_dir, max_steps=2)
    done = python("train.py", *flags, env=environment(**settings))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in ("eval.py", "report"):
        words = ["--checkpoint"] if name == "eval.py" else []
        words += [tmp_path / "run", "--data_dir", data_dir]
        done = python(name, *words, env=environment(**settings))
        assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("how", ["missing", "only a folder", "broken"])
def test_python_without_tensorflow(how, tmp_path):
    """One line that names what is missing and how to get it."""
    code = "raise ImportError('libtensorflow is no library')" if how == "broken" else ""
    for name in ("numpy", "six", "grpc", "matplotlib", "scipy", "sklearn", "tensorflow"):
        if name == "tensorflow" and how != "broken":
            (tmp_path / name).mkdir(exist_ok=how == "missing") if how != "missing" else None
            continue
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code if name == "tensorflow" else "")
    flags = train_flags("baseline", tmp_path / "run", tmp_path)
    words = {"train.py": flags if how == "broken" else ["--help"]}  # it loads TensorFlow late
    words |= dict.fromkeys(("report", "benchmark", "experiments/tables.py"), ["--help"])
    for script, flags in words.items():
        done = subprocess.run(
            [sys.executable, "-S", os.path.join(ROOT, script), *flags],
            capture_output=True, text=True, env=environment(PYTHONPATH=str(tmp_path)),
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"{os.path.basename(script)}: error: ")
        assert "tensorflow" in done.stderr and "pip install -r requirements.txt" in done.stderr


def test_a_broken_tensorboard_is_none(tmp_path, data_dir):
    package = tmp_path / "tensorboard" / "summary"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise TypeError('of another protobuf')")
    flags = train_flags("baseline", tmp_path / "run", data_dir, max_steps=2)
    done = python("train.py", *flags, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not [name for name in os.listdir(tmp_path / "run") if "events" in name]


IMPORT = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
def state():
    handlers = [signal.getsignal(n) for n in range(1, 32)]
    streams = [os.readlink(f'/proc/self/fd/{{n}}') for n in range(3)]
    kept = {{k: v for k, v in os.environ.items() if k != 'TF_ENABLE_ONEDNN_OPTS'}}
    return handlers, streams, kept, os.getcwd(), sys.excepthook, sys.stdout, sys.stderr
before = state()
import train, training.loop, eval, report.__main__, benchmark.__main__, experiments.tables
assert state() == before
"""


def test_a_mistake_in_the_flags_loads_no_tensorflow():
    code = "import sys, utils\nsys.argv = ['train.py', '--hlep']\nimport train\ntry:\n"
    code += "    utils.run_main(train.main)\nexcept SystemExit as stopped:\n"
    code += "    print(stopped.code, 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 False\n", done.stderr
    assert "did you mean --help?" in done.stderr


def test_keras_is_not_loaded_until_it_is_asked_for():
    code = "import sys, utils\nutils.tf.Module\nprint('keras' in sys.modules)\n"
    code += "import tensorflow as tf\nprint(tf.keras.layers.Dense.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\nDense\n", done.stderr


def test_importing_changes_nothing_of_the_process():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(root=ROOT)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
