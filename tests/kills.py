"""Kills programs at random moments of their lives, and looks at what is left. No test of pytest.

    python tests/kills.py                                     # all, 100 kills each
    python tests/kills.py --only train --kills 9 --seed 1

After a kill (SIGKILL) there is what was there before, or what was to be made, or nothing: never a
half-made thing that passes for a whole one. Then the same command is run again, which is killed as
well every third time. In the end it leaves what one leaves that was never killed, to the bit, and
no other files.

Half of the kills fall on a random one of the operations on files that the program does (a file
opened or removed, a folder made, a name changed): right before it or within the 20 ms after it, in
which TensorFlow may be writing. The others hit at any moment, every third of them a process that
loads everything anew, so that they fall into its first seconds too.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from conftest import ROOT, grouped_net, inside, train_flags, write_data

import cifar100
import download_cifar100
import objective
import resnet
import rundir
import utils
from experiments import publish
from formats.files import RUNNERS
from utils import tf

OPERATIONS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")  # audit events
COUNTS = {"train": 60, "val": 20, "train_val": 80, "test": 20}


# ---------------------------------------------------------------- processes


def fork(work, log, prepare=lambda: None):
    """The id of a fork of this process that does some work and ends; what it prints goes to a log.

    This process itself never computes with TensorFlow, whose threads would not come along.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def do(work, log):
    """Do some work in a fork, to its end."""
    if os.waitpid(fork(work, log), 0)[1]:
        raise AssertionError(f"what is left is wrong:\n{Path(log).read_text()}")


def tell_operations(folder, pipe, number=0, wait=False):
    """Write a line to a pipe for operation `number` on files in a folder (0: for each one).

    Args:
        wait: for the kill, before that operation.
    """
    done = 0

    def hook(event, words):
        nonlocal done
        if event not in OPERATIONS:
            return
        path = words[0]
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        # shutil.rmtree names what it removes relative to a folder that it has opened.
        if not path.startswith(str(folder)) and event not in ("os.remove", "os.rmdir"):
            return
        done += 1
        if number in (0, done):
            os.write(pipe, f"{event} {os.path.basename(path)}\n".encode())
            while number and wait:
                time.sleep(60)

    sys.addaudithook(hook)


class Command:
    """A program with its flags, as often as it is started; how long that takes undisturbed."""

    def __init__(self, name, flags, folder):
        self.name, self.flags, self.folder = name, [str(flag) for flag in flags], folder
        self.log = f"{folder}.log"

    def work(self):
        os.chdir(self.folder)
        status, out, error = inside(self.name, *self.flags)
        print(f"{out}{error}")
        assert status == 0

    def run(self):
        do(self.work, self.log)

    def measure(self):
        """Run it: its operations on files, and the seconds of a fork."""
        reader, writer = os.pipe()
        begun = time.monotonic()
        pid = fork(self.work, self.log, lambda: tell_operations(self.folder, writer))
        os.close(writer)
        with open(reader) as lines:
            operations = list(lines)
        assert os.waitpid(pid, 0)[1] == 0, Path(self.log).read_text()
        return len(operations), time.monotonic() - begun

    def kill(self, operations, seconds, real):
        """Start it and kill it at a random moment; when that was in words, None if it had ended.

        Args:
            operations: how many of them there are.
            seconds: that it takes.
            real: it may be a process of its own, which loads everything.
        """
        if random.random() < 0.5:
            return self._kill_at(random.randint(1, operations), random.choice((0, 0.005, 0.02)))
        if real and random.random() < 1 / 3:
            with open(self.log, "a") as log:
                command = [sys.executable, os.path.join(ROOT, self.name), *self.flags]
                pid = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder).pid
            seconds += real
        else:
            pid = fork(self.work, self.log)
        after = random.uniform(0, seconds)
        time.sleep(after)
        return self._end(pid, f"any moment ({after:.2f} s)")

    def _kill_at(self, number, delay):
        reader, writer = os.pipe()
        pid = fork(
            self.work, self.log, lambda: tell_operations(self.folder, writer, number, delay == 0)
        )
        os.close(writer)
        with open(reader) as lines:
            operation = lines.readline().strip()  # empty where it has ended before
        time.sleep(random.uniform(0, delay))
        return self._end(pid, f"{'after' if delay else 'before'} {operation}")

    def _end(self, pid, moment):
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            return moment
        assert status == 0, Path(self.log).read_text()
        return None


# ---------------------------------------------------------------- what they leave


def contents(folder):
    """Every file below a folder but locks and event files, by its name; folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
        if path.name not in ("lock", ".lock") and "tfevents" not in path.name
    }


class Program:
    """What is killed: a command for each of some variants, and what it may leave.

    `place` is a trial's folder. The undisturbed one of a variant is `root/whole/VARIANT`.
    """

    variants = ("",)
    real = True  # whether it can be started as a process of its own, without what is set here

    def __init__(self, root):
        self.root = root
        root.mkdir()

    def prepare(self):
        """Make what the command reads. In a fork."""

    def before(self, place, variant):
        """Make what there is before it."""

    def flags(self, place, variant):
        raise NotImplementedError

    def check(self, place, whole, variant):
        """Raise AssertionError where something half-made passes for a whole one. In a fork."""

    def compare(self, place, whole, variant):
        """Raise AssertionError unless both are the same. In a fork."""
        mine, expected = contents(place), contents(whole)
        assert mine.keys() == expected.keys(), sorted(mine.keys() ^ expected.keys())
        differing = [name for name in mine if mine[name] != expected[name]]
        assert not differing, differing


class Train(Program):
    variants = ("baseline", "group", "split")

    def prepare(self):
        write_data(self.root / "data", COUNTS)
        Command("train.py", self.flags(self.root, "group"), self.root).work()
        os.rename(self.root / "run", self.root / "base")

    def flags(self, place, variant):
        from test_resume import STAGES  # as there, with all that is a function of the step

        steps = {"max_steps": 6, "display": 2, "val_interval": 3, "checkpoint_interval": 1,
                 "keep": 2}  # fmt: skip
        base = {"basemodel": self.root / "base"} if variant == "split" else {}
        flags = steps | STAGES[variant] | base
        return train_flags(variant, place / "run", self.root / "data", **flags)

    def check(self, place, whole, variant):
        run = str(place / "run")
        for step in rundir.checkpoint_steps(run):
            assert rundir.read_checkpoint(rundir.checkpoint_path(run, step))["step"] == step
        if os.path.exists(f"{run}/result.json"):
            self._same_result(place, whole)

    def _same_result(self, place, whole):
        of = [utils.read_json(folder / "run" / "result.json") for folder in (place, whole)]
        for result in of:
            del result["seconds_per_image"]
        assert of[0] == of[1]

    def compare(self, place, whole, variant):
        from test_resume import assert_same

        assert_same(place / "run", whole / "run")
        self._same_result(place, whole)
        assert contents(place).keys() == contents(whole).keys()
        steps = rundir.checkpoint_steps(str(whole / "run"))
        for step in steps:
            mine, expected = (
                rundir.read_checkpoint(rundir.checkpoint_path(str(folder / "run"), step))
                for folder in (place, whole)
            )
            assert all(np.array_equal(mine[name], expected[name]) for name in expected)


class Data(Program):
    """A data set of pictures that is made, or made again with another seed."""

    variants = ("arrays", "files", "arrays again", "files again")

    def prepare(self):
        from test_pictures import picture

        for name in ("ant", "bee", "cow"):
            (self.root / "photos" / name).mkdir(parents=True)
            for number in range(12):
                picture().save(self.root / f"photos/{name}/{number}.png")
        for variant in self.variants:
            place = self.root / "old" / variant
            place.mkdir(parents=True)
            Command("make_dataset.py", [*self.flags(place, variant), "--seed=1"], place).work()

    def before(self, place, variant):
        if "again" in variant:
            shutil.copytree(self.root / "old" / variant, place, dirs_exist_ok=True)

    def flags(self, place, variant):
        kind = variant.split()[0]
        flags = [self.root / "photos", "--dataset_path", place / "set", "--kind", kind]
        return flags + ["--overwrite"] * ("again" in variant)

    def check(self, place, whole, variant):
        if not (place / "set" / "split.json").exists():
            return
        seed = cifar100.describe(place / "set")["seed"]
        assert seed == 0 or "again" in variant
        expected = self.root / "old" / variant if seed else whole
        for split in ("train", "val", "train_val", "test"):
            mine, other = (cifar100.load(folder / "set", split) for folder in (place, expected))
            assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))

    def compare(self, place, whole, variant):
        super().compare(place, whole, variant)
        self.check(place, whole, variant)


class Download(Program):
    variants = ("url", "archive", "synthetic")
    real = False  # the data set is small, with checksums of its own

    def __init__(self, root):
        from test_download_cifar100 import good, make_members, serve, tar_bytes

        super().__init__(root)
        for part, count in {"TRAIN": 4, "VAL": 1, "TEST": 2}.items():
            setattr(download_cifar100, f"{part}_PER_CLASS", count)
        blobs = {}
        for name, value in make_members().items():  # NumPy's module had another name
            blob = pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")
            blobs[name] = blob
            download_cifar100.MD5[name] = hashlib.md5(blob).hexdigest()
            download_cifar100.SHA256[name] = hashlib.sha256(blob).hexdigest()
        self.payload = gzip.compress(tar_bytes(blobs), compresslevel=1)
        (root / "archive.tar.gz").write_bytes(self.payload)
        os.environ["no_proxy"] = "*"

        def slowly(handler, payload, start, stop):
            with contextlib.suppress(ConnectionError):  # killed
                good(handler, payload, start, stop, upto=start)  # no more than the headers
                for first in range(start, len(payload), 20_000):
                    handler.wfile.write(payload[first : first + 20_000])
                    time.sleep(0.005)

        self.server = contextlib.ExitStack()  # as long as this process
        self.url, _ = self.server.enter_context(serve(slowly, payload=self.payload))

    def flags(self, place, variant):
        source = {"url": [self.url], "archive": [self.root / "archive.tar.gz"], "synthetic": []}
        return ["--dataset_path", place / "set", f"--{variant}", *source[variant]]

    def check(self, place, whole, variant):
        if (place / "set" / "split.json").exists():
            left = [name for name in contents(place / "set") if ".part" not in name]
            assert left == list(contents(whole / "set"))
            assert all(
                (place / "set" / name).read_bytes() == (whole / "set" / name).read_bytes()
                for name in left
            )


class Export(Program):
    """An export that replaces another network's."""

    variants = ("savedmodel", "savedmodel parts", *["onnx"] * utils.is_installed("onnx"))

    def prepare(self):
        for step in (7, 8):
            net = resnet.split(grouped_net((2, 2, 2), seed=step, num_residual_units=1))
            run_info = {"stage": "split", "dataset": "cifar100", "seed": 0, "preset": ""}
            with rundir.Run(str(self.root / f"net{step}")) as run:
                trainer = objective.Trainer(net, objective.Objective(), run_info)
                run.save(trainer.checkpoint, step)
        for variant in self.variants:
            place = self.root / "old" / variant
            place.mkdir(parents=True)
            Command("export.py", self.flags(place, variant, 7), place).work()

    def before(self, place, variant):
        shutil.copytree(self.root / "old" / variant, place, dirs_exist_ok=True)

    def flags(self, place, variant, step=8):
        form, *parts = variant.split()
        flags = ["--checkpoint", self.root / f"net{step}", "--output", place / "model"]
        return [*flags, "--format", form, "--overwrite", *["--parts"] * len(parts)]

    def check(self, place, whole, variant):
        model = place / "model"
        if not any(_alike(model, f / "model") for f in (self.root / "old" / variant, whole)):
            mine, expected = (self._numbers(folder / "model", variant) for folder in (place, whole))
            # Its files may say the same in another order.
            assert all(np.array_equal(*pair) for pair in zip(mine, expected, strict=True))

    def _numbers(self, model, variant):
        """What is computed for random images, by the trunk and the branches where these are it."""
        form, *parts = variant.split()
        x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
        if not parts:
            return [RUNNERS[form](str(model))(x)["logits"]]
        features = RUNNERS[form](str(model / "trunk" / "1"))(x)
        return [
            RUNNERS[form](str(model / f"branch_{n}" / "1"))(features[f"features_{n}"])["logits"]
            for n in (0, 1)
        ]

    def compare(self, place, whole, variant):
        assert os.listdir(place) == ["model"], os.listdir(place)
        assert not _alike(place / "model", self.root / "old" / variant / "model")
        self.check(place, whole, variant)


def _alike(*paths):
    """Whether two files are the same, or all files of two folders."""
    one, other = (contents(p) if p.is_dir() else p.exists() and p.read_bytes() for p in paths)
    return one == other


class Publish(Program):
    """Rows and networks that replace those of an earlier training."""

    def prepare(self):
        data = write_data(self.root / "data", COUNTS)
        for name, rate in (("old", 0.1), ("new", 0.2)):
            runs = self.root / f"{name}-runs"
            tree, steps = runs / "deep_2-2-2", {"max_steps": 2, "initial_lr": rate}
            base = {"basemodel": tree / "group"}
            for stage, run, more in [
                ("baseline", runs / "baseline", {}),
                ("group", tree / "group", {}),
                ("split", tree / "split", base),
            ]:
                flags = train_flags(stage, run, data, **steps | more)
                Command("train.py", flags, self.root).work()
            for run, *more in [
                (runs / "baseline",),
                (tree / "group", "--split", "val"),
                (tree / "group", "--split", "val", "--mask"),
                (tree / "split",),
            ]:
                flags = ["--checkpoint", run, "--data_dir", data, *more]
                Command("eval.py", flags, self.root).work()
            (tree / "report").mkdir()
            for picture in publish.PICTURES:
                (tree / "report" / picture).write_bytes(random.randbytes(100_000))
        (self.root / "old").mkdir()
        Command("experiments/publish.py", [self.root / "old-runs"], self.root / "old").work()

    def before(self, place, variant):
        shutil.copytree(self.root / "old", place, dirs_exist_ok=True)

    def flags(self, place, variant):
        return [self.root / "new-runs"]

    def check(self, place, whole, variant):
        """Each row and its network are both old, or both new; or the row is not there."""
        versions = [contents(folder) for folder in (self.root / "old", whole)]
        mine = contents(place)
        for row in publish.PRETRAINED_ROWS:
            networks = [_below(files, f"pretrained/{row}/") for files in (*versions, mine)]
            assert networks[2] in networks[:2], networks[2].keys()
            if f"results/{row}/result.json" in mine:
                number = networks.index(networks[2])
                expected = _below(versions[number], f"results/{row}/")
                left = _below(mine, f"results/{row}/")
                assert expected.items() <= left.items()


def _below(files, folder):
    return {name: content for name, content in files.items() if name.startswith(folder)}


# ---------------------------------------------------------------- trials

PROGRAMS = {
    "train": (Train, "train.py"),
    "data": (Data, "make_dataset.py"),
    "download": (Download, "download_cifar100.py"),
    "export": (Export, "export.py"),
    "publish": (Publish, "experiments/publish.py"),
}


class Trials:
    """All trials of a program: how long it takes undisturbed, and what it leaves then."""

    def __init__(self, kind, script, root, start):
        self.program, self.script = kind(root), script
        do(self.program.prepare, f"{root}.log")
        self.lives = {}
        for variant in self.program.variants:
            command = self.set_up(variant, self._whole(variant))
            operations, seconds = command.measure()
            self.lives[variant] = operations, seconds, start if self.program.real else 0
            print(f"{script} {variant}: {operations} operations, {seconds:.1f} s", flush=True)

    def _whole(self, variant):
        return self.program.root / "whole" / variant

    def set_up(self, variant, place):
        """What there is before a command, and the command."""
        place.mkdir(parents=True)
        self.program.before(place, variant)
        return Command(self.script, self.program.flags(place, variant), place)

    def check(self, variant, place, compare=False):
        check = self.program.compare if compare else self.program.check
        do(lambda: check(place, self._whole(variant), variant), f"{place}.log")

    def trial(self, variant, place, moments):
        """Kill a command, at moments that are added to a list; then let it come to its end."""
        while not moments:
            shutil.rmtree(place, ignore_errors=True)
            command = self.set_up(variant, place)
            while not moments or random.random() < 1 / 3:
                moment = command.kill(*self.lives[variant])
                if not moment:
                    break
                moments.append(moment)
                self.check(variant, place)
        command.run()
        self.check(variant, place, compare=True)
        shutil.rmtree(place)

    def run(self, number):
        """That many trials; how many of them were wrong."""
        kills, wrong = 0, 0
        for count in range(number):
            variant = self.program.variants[count % len(self.program.variants)]
            place, moments, result = self.program.root / f"trial{count}", [], "equal"
            try:
                self.trial(variant, place, moments)
            except AssertionError as error:
                wrong, result = wrong + 1, f"WRONG, see {place}: {error}"
            kills += len(moments)
            words = f"{self.script} {variant} {count + 1}/{number}: {'; '.join(moments)}"
            print(f"{words}: {result}", flush=True)
        print(f"{self.script}: {number - wrong} of {number} equal, {kills} kills", flush=True)
        return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=tuple(PROGRAMS))
    parser.add_argument("--kills", type=int, default=100, help="of each program, at least")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    random.seed(flags.seed)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    load = [sys.executable, "-c", "import utils; utils.tf.Module"]
    begun = time.monotonic()
    subprocess.run(load, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    start = time.monotonic() - begun
    tf.Module  # noqa: B018, loaded once: each command is a fork of this process
    root, wrong = Path(tempfile.mkdtemp(prefix="kills-")), 0
    for name in [flags.only] if flags.only else PROGRAMS:
        kind, script = PROGRAMS[name]
        begun = time.monotonic()
        wrong += Trials(kind, script, root / name, start).run(flags.kills)
        print(f"{script}: {time.monotonic() - begun:.0f} s", flush=True)
    if not wrong:
        shutil.rmtree(root)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
