"""The scripts as they arrive and where they run: clones, zips, batch systems, strange shells."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import rundir

NAMES = ("group.sh", "split.sh", "eval.sh", "experiments/run.sh", "quickstart.sh", "test.sh")
SUBMITTED = ("SLURM_SUBMIT_DIR", "PBS_O_WORKDIR", "SGE_O_WORKDIR", "LSB_SUBCWD", "LS_SUBCWD")
SHELLS = [path for path in map(shutil.which, ("dash", "zsh", "ksh", "mksh")) if path]
# What a caller may have set for the scripts.
SETTINGS = ("PRESET", "PYTHON", "DATA_DIR", "RUNS", "CIFAR100_ARCHIVE", *SUBMITTED)
STUB = """#!/bin/sh
echo "$1 ${PYTHONSAFEPATH-} ${BASH_ENV-} ${POSIXLY_CORRECT-}"
"""


def start(*command, cwd, **settings):
    """A command without the settings of the tests' own surroundings."""
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=kept | settings, **pipes)


def run(*command, cwd, **settings):
    """The same to its end: (status, out, error)."""
    with start(*command, cwd=cwd, **settings) as process:
        try:
            out, error = process.communicate(timeout=600)
        finally:
            process.kill()
    return process.returncode, out, error


def fails(*command, says, status, **settings):
    code, _, error = run(*command, **settings)
    assert code == status and error.count("\n") == 1 and says in error, error
    return error


@pytest.fixture
def stub(tmp_path):
    """A Python that says which program it was to run, and some of its environment."""
    path = tmp_path / "stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return {"PYTHON": str(path), "PRESET": "smoke"}


@pytest.fixture
def spool(tmp_path):
    """What a batch system makes of a script: a copy under another name."""

    def copy(name):
        path = tmp_path / "spool" / "job 1" / "slurm_script"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), path)
        return path

    return copy


def started(program):
    return f"{os.path.realpath(ROOT)}/{program}   \n"


# ---------------------------------------------------------------- batch systems and shells


def test_every_script_begins_alike():
    def beginning(name):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            text = re.search(r"\n(\[ -n .*\nsource \S+)\n", file.read(), re.DOTALL).group(1)
        return text.replace('"$SCRIPT")/.."', '"$SCRIPT")"')  # experiments/ is one folder down

    assert len({beginning(name) for name in NAMES}) == 1


@pytest.mark.parametrize("variable", SUBMITTED)
def test_copy_of_a_batch_system(variable, spool, stub, tmp_path):
    assert run("bash", spool("group.sh"), cwd=tmp_path, **{variable: ROOT}, **stub) == (
        0, started("train.py"), ""
    )  # fmt: skip


def test_copies_of_all_scripts(spool, stub, tmp_path):
    here = {"SLURM_SUBMIT_DIR": ROOT}
    for name, program in [("split.sh", "train.py"), ("eval.sh", "eval.py")]:
        assert run("bash", spool(name), cwd=tmp_path, **here, **stub)[1] == started(program)
        assert run("bash", spool(name), cwd=ROOT, **stub)[1] == started(program)
    status, output, error = run(
        "bash",
        spool("experiments/run.sh"),
        "deep_2-2-2",
        cwd="/",
        **here,
        **stub,
        RUNS=str(tmp_path),
    )
    assert (status, error) == (0, "")
    programs = ["train.py", "eval.py", "eval.py", "train.py", "eval.py"]
    assert output == "".join(map(started, programs))
    status, output, error = run("bash", spool("quickstart.sh"), "--help", cwd=tmp_path, **here)
    assert status == 0 and "--synthetic" in output and "cifar-100-python" in output
    (tmp_path / "train.py").touch()  # of another project
    for name in NAMES:
        fails("bash", spool(name), says="cd into it and submit there", status=2, cwd=tmp_path)
    # From standard input, as `bsub <group.sh` reads it.
    with open(os.path.join(ROOT, "group.sh")) as script:
        text = script.read()
    done = subprocess.run(
        ["bash"], input=text, capture_output=True, text=True, cwd=ROOT, env=os.environ | stub
    )
    assert done.stdout == started("train.py"), done.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shell", SHELLS)
def test_other_shells_are_told_to_be_bash(shell, name, tmp_path):
    error = fails(shell, os.path.join(ROOT, name), says="use bash: bash ", status=2, cwd=tmp_path)
    assert error.startswith(f"{os.path.basename(name)}: error: ")


@pytest.mark.parametrize("shell", SHELLS)
def test_other_shells_that_read_a_script_go_on(shell, tmp_path):
    """The hint is of use in a terminal only if that stays open."""
    code = f". {ROOT}/group.sh; echo it goes on"
    status, output, error = run(shell, "-c", code, cwd=tmp_path)
    assert (status, output) == (0, "it goes on\n") and error.count("\n") == 1, error
    assert "error: use bash: bash " in error


def test_what_the_callers_shell_exports(stub, tmp_path):
    (tmp_path / "env").write_text("cd() { echo stray; }; dirname() { echo stray; }\n")
    settings = {
        "BASH_ENV": str(tmp_path / "env"), "CDPATH": "/tmp:/", "POSIXLY_CORRECT": "1",
        "PYTHONSAFEPATH": "1", "GREP_OPTIONS": "-v", "SHELLOPTS": "noclobber:noglob",
        "BASHOPTS": "failglob:nocasematch",
        "BASH_FUNC_readlink%%": "() { echo stray; }", "BASH_FUNC_pwd%%": "() { echo stray; }",
        "BASH_FUNC_bash%%": "() { echo stray; }", "BASH_FUNC_cat%%": "() { echo stray; }",
    }  # fmt: skip
    assert run("./group.sh", cwd=ROOT, **settings, **stub) == (0, started("train.py"), "")
    assert run("bash", "--posix", "group.sh", cwd=ROOT, **stub)[1] == started("train.py")
    status, output, error = run("experiments/run.sh", "deep_2-2-2", cwd=ROOT, **settings, **stub)
    assert (status, error) == (0, "") and output.count("\n") == 5 and "stray" not in output


# ---------------------------------------------------------------- clones and archives


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of the last commit as Windows makes it, and without execute bits."""
    path = tmp_path_factory.mktemp("clones") / "clone"
    command = ["git", "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.filemode=false"]
    try:
        subprocess.run([*command, ROOT, path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout that git can clone")
    for script in [*path.glob("*.sh"), path / ".ci" / "run"]:
        script.chmod(0o644)
    return path


def test_clone_with_windows_line_ends_and_no_execute_bits(clone, stub, tmp_path):
    texts = [*clone.glob("**/*.sh"), *clone.glob("**/*.py"), clone / "requirements.txt"]
    assert len(texts) > 20 and not [path for path in texts if b"\r" in path.read_bytes()]
    name = "pretrained/deep_2-2-2/model.ckpt-13500.index"
    with open(os.path.join(ROOT, name), "rb") as file:
        assert (clone / name).read_bytes() == file.read()
    status, output, error = run(
        "bash", "experiments/run.sh", "deep_2-2-2", cwd=clone, RUNS=str(tmp_path), **stub
    )
    assert (status, error) == (0, "") and output.count("\n") == 5
    fake = tmp_path / "ci"
    shutil.copytree(clone / ".ci", fake / ".ci")
    (fake / "test.sh").write_text('echo "tested $1"\n')
    (fake / "test.sh").chmod(0o644)
    missing = {"SYSTEM_PYTHON": str(fake / "python3")}
    output = run("bash", fake / ".ci" / "run", cwd="/", **missing)[1]
    assert output == f"tested \n{fake}/python3 is left out: it is missing\n"


@pytest.mark.parametrize(
    "reason, code",
    [
        ("it is missing", "exit 127"),
        ("it is not Python 3.10 to 3.13", "case $2 in *exit*) exit 1 ;; esac"),
        ("it is the Python of .venv", f'exec "{sys.executable}" "$@"'),
        ("it has no venv, or no ensurepip", '[ "$1" != -m ] || { echo long; exit 1; }'),
    ],
)
def test_system_python_that_is_left_out(reason, code, tmp_path):
    """In one line; what was tested before counts."""
    shutil.copytree(os.path.join(ROOT, ".ci"), tmp_path / ".ci")
    (tmp_path / "test.sh").write_text("echo tested\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    system = tmp_path / "python3"
    system.write_text(f"#!/bin/sh\n{code}\n")
    system.chmod(0o755)
    settings = {"SYSTEM_PYTHON": str(system), "TMPDIR": str(tmp_path / ".venv")}
    said = run("bash", ".ci/run", cwd=tmp_path, **settings)
    assert said == (0, f"tested\n{system} is left out: {reason}\n", "")
    assert os.listdir(tmp_path / ".venv") == ["bin"]  # nothing is left behind
    (tmp_path / "test.sh").write_text("exit 3\n")
    assert run("bash", ".ci/run", cwd=tmp_path, **settings)[0] == 3


def revision_of(folder, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "__file__", str(folder / "rundir.py"))
        for name, value in settings.items():
            patch.setenv(name, str(value))
        return rundir.git_revision()


def test_git_revision_is_of_the_code_itself(clone, tmp_path, monkeypatch):
    def git(*words, cwd):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout

    outer = tmp_path / "outer"
    inside = outer / "vendored"
    shutil.copytree(clone, inside, ignore=shutil.ignore_patterns(".git", "results"))
    git("init", "-q", cwd=outer)
    git("add", ".", cwd=outer)
    git("commit", "-q", "-m", "all", cwd=outer)
    assert revision_of(inside, monkeypatch) == ""
    (inside / ".git").mkdir()  # an empty one, which git passes over
    assert revision_of(inside, monkeypatch) == ""

    head = git("rev-parse", "HEAD", cwd=clone).strip()
    git("tag", "-a", "v1.0", "-m", "a release", cwd=clone)
    link = tmp_path / "link"
    link.symlink_to(clone)
    others = {"GIT_DIR": outer / ".git", "GIT_WORK_TREE": outer, "GIT_INDEX_FILE": outer / "none"}
    for folder in (clone, link):
        assert revision_of(folder, monkeypatch, **others).removesuffix("-dirty") == head
    assert revision_of(inside, monkeypatch, **others) == ""
    assert revision_of(inside, monkeypatch, GIT_DIR=outer / ".git") == ""
    if os.getuid() == 0:  # a repository of another user
        config = tmp_path / "gitconfig"
        config.touch()
        own = shutil.copytree(clone, tmp_path / "own", ignore=shutil.ignore_patterns("results"))
        assert revision_of(own, monkeypatch, GIT_CONFIG_GLOBAL=config)
        for path in (own, own / ".git"):
            os.chown(path, 12345, 12345)
        settings = {"GIT_CONFIG_GLOBAL": config, "GIT_CONFIG_SYSTEM": config}
        assert revision_of(own, monkeypatch, **settings) == ""


# ---------------------------------------------------------------- .venv


@pytest.fixture
def checkout(tmp_path):
    """What quickstart.sh needs to make .venv; nothing is installed, and status 7 is success."""
    here = tmp_path / "a checkout & more"
    here.mkdir()
    for name in ("quickstart.sh", "split.sh", "presets.sh"):
        shutil.copy(os.path.join(ROOT, name), here)
    (here / "requirements.txt").write_text("pip\n")
    (here / "download_cifar100.py").write_text("raise SystemExit(7)")
    return here


def quickstart(here, says="", status=7):
    """Runs it; without `says`, it must come to the data."""
    command = ("bash", here / "quickstart.sh", "--synthetic")
    settings = {"PYTHON": sys.executable, "PIP_USER": "1", "PIP_NO_INDEX": "1"}
    if says:
        fails(*command, says=says, status=1, cwd="/", **settings)
    else:
        code, _, error = run(*command, cwd="/", **settings)
        assert code == status, error


def test_environment_without_pip_keeps_what_it_holds(checkout):
    """As `uv venv` makes it."""
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "mine").touch()
    python = venv / "bin" / "python"
    assert run(python, "-m", "pip", "--version", cwd="/")[0]
    quickstart(checkout)
    assert (venv / "mine").exists() and run(python, "-m", "pip", "--version", cwd="/")[0] == 0
    # Read-only now: complete as it is, but not for another requirement.
    bound = subprocess.run(["mount", "--bind", venv, venv], capture_output=True)
    if bound.returncode:
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", venv], check=True)
        quickstart(checkout)
        (checkout / "requirements.txt").write_text("pip\nsplitnet-wrn-of-nobody\n")
        quickstart(checkout, says="is read-only and not complete: make it writable, or move it")
    finally:
        subprocess.run(["umount", venv], check=True)


def test_environment_without_pip_where_none_can_be_had(checkout):
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next((venv / "lib").glob("python*")) / "site-packages"
    # Not in sitecustomize.py: Debian's Python has one of its own, which comes first.
    (packages / "none.pth").write_text("import sys; sys.modules['ensurepip'] = None\n")
    before = sorted(venv.rglob("*"))
    quickstart(checkout, says="has no pip, and 'python -m ensurepip' cannot add it: move it away")
    assert [path for path in sorted(venv.rglob("*")) if "__pycache__" not in str(path)] == before


@pytest.mark.parametrize("python", ["missing", "old", "dangling", "no folder"])
def test_environment_that_does_not_run_is_left_alone(python, checkout):
    venv = checkout / ".venv"
    if python == "no folder":
        venv.write_text("mine")
    else:
        (venv / "bin").mkdir(parents=True)
        (venv / "mine").touch()
    if python == "old":
        (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
        (venv / "bin" / "python").chmod(0o755)
    elif python == "dangling":
        (venv / "bin" / "python").symlink_to("/nowhere/python3")
    before = sorted(checkout.rglob("*"))
    quickstart(checkout, says="does not run, or is not Python 3.10 to 3.13: move it away (mv ")
    assert sorted(checkout.rglob("*")) == before


def test_environment_that_was_not_finished_is_mended(checkout):
    bin_folder = checkout / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (checkout / ".venv" / ".unfinished").touch()
    (bin_folder / "python").symlink_to("/nowhere/python3")
    quickstart(checkout)
    assert not (checkout / ".venv" / ".unfinished").exists()
    quickstart(checkout)


def test_environment_that_a_person_finished_is_kept(checkout):
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    for name in (".unfinished", "mine"):
        (venv / name).touch()
    quickstart(checkout)
    assert (venv / "mine").exists() and not (venv / ".unfinished").exists()


@pytest.fixture
def tools(tmp_path):
    """A folder of all commands but flock, which macOS has not."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for path in map(Path, os.environ["PATH"].split(os.pathsep)):
        for file in path.iterdir() if path.is_dir() else []:
            if file.name != "flock" and not (folder / file.name).is_symlink():
                (folder / file.name).symlink_to(file)
    return str(folder)


@pytest.mark.parametrize("begun", [False, True])
def test_two_at_once_make_one_environment(begun, checkout, tools):
    """Also where there is no flock command, and where an earlier one was killed."""
    venv, made = checkout / ".venv", checkout / "made"
    if begun:
        venv.mkdir()
        (venv / ".unfinished").touch()
    python = checkout / "python"  # counts, and is slow, so that the other has begun
    python.write_text(
        f'#!/bin/sh\n[ "$2" != venv ] || {{ echo "$$" >>"{made}"; sleep 1; }}\n'
        f"exec '{sys.executable}' \"$@\"\n"
    )
    python.chmod(0o755)
    command = ("bash", checkout / "quickstart.sh", "--setup", checkout / "requirements.txt")
    settings = {"PYTHON": str(python), "PIP_NO_INDEX": "1", "PATH": tools}
    two = [start(*command, cwd="/", **settings) for _ in range(2)]
    said = sorted(process.communicate(timeout=600) for process in two)
    assert [process.returncode for process in two] == [0, 0], said
    assert said[1:] == [("waiting for another script that makes .venv\n", "")]
    assert said[0][0].startswith("making .venv\n") and len(made.read_text().split()) == 1
    assert run(venv / "bin" / "python", "-m", "pip", "--version", cwd="/")[0] == 0


def test_checkout_that_is_read_only_or_another_python(checkout, tmp_path):
    command = ("bash", checkout / "quickstart.sh", "--synthetic")
    others = []
    for version in [(3, 9), (3, 14)]:
        others.append(tmp_path / f"python{version[1]}")
        says = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
        others[-1].write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{says}' \"$2\"\n")
        others[-1].chmod(0o755)
    for python in (*map(str, others), "no-such-python"):
        fails(*command, says="Python 3.10 to 3.13 is needed", status=1, cwd="/", PYTHON=python)
    assert not (checkout / ".venv").exists()
    bound = subprocess.run(["mount", "--bind", "-o", "ro", checkout, checkout], capture_output=True)
    if bound.returncode:
        pytest.skip("nothing can be mounted")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", checkout], check=True)
        quickstart(checkout, says=".venv cannot be made: make")
    finally:
        subprocess.run(["umount", checkout], check=True)
