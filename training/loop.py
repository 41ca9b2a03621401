"""A run of one stage: steps, and what happens between them."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
import zlib
from typing import NoReturn

import numpy as np

import cifar100
import grouping
import metrics
import resnet
import restore
import rundir
import utils
from objective import (
    METRICS,
    TERMS,
    Trainer,
    fit_schedule,
    learning_rate,
    objective,
    slow_groups,
    stepwise,
)
from parallel import devices
from utils import tf


class Loop:
    """Steps, and what happens between them: progress, validation, group records, checkpoints."""

    def __init__(self, flags: argparse.Namespace, run: rundir.Run, trainer: Trainer, data: dict):
        self.flags, self.run, self.trainer, self.data = flags, run, trainer, data
        self.step = int(trainer.steps_done)
        self.batches = self._batches()
        self.steps_per_epoch = len(data["train"][1]) / flags.batch_size
        self.predict = metrics.predictor(
            trainer.net, flags.precision, image_size=trainer.net.config.image_size
        )
        self.evaluation = None  # the last validation
        description = json.loads(trainer.description)
        self.config = {
            "flags": vars(flags),
            "network": description["config"],
            "dataset": description.get("dataset"),
            "hardware": rundir.hardware(),
            "versions": rundir.versions(),
        }
        warmup = flags.lr_warmup_epochs * self.steps_per_epoch
        steps = flags.lr_total_steps or flags.max_steps
        if warmup >= steps:
            raise ValueError(
                f"--lr_warmup_epochs {flags.lr_warmup_epochs:g} takes all of the schedule's "
                f"{steps} steps: make it smaller"
            )
        if flags.group_start_epoch * self.steps_per_epoch >= flags.max_steps:
            raise ValueError(
                f"--group_start_epoch {flags.group_start_epoch:g} is after the end of this stage, "
                f"{flags.max_steps} steps: make it smaller"
            )
        self.several_workers = isinstance(
            trainer.strategy, tf.distribute.MultiWorkerMirroredStrategy
        )
        self.saved = self.step if self.step in rundir.checkpoint_steps(run.directory) else None
        # Where this process starts, and when its first step ended. The first step without and with
        # groups forming compiles: how many others there were, and their seconds.
        self._first, self._start = self.step, 0.0
        self._compiled, self._timed, self._seconds = set(), 0, 0.0

    def _batches(self) -> tf.data.Dataset | tf.distribute.DistributedDataset:
        """The training batches from this step on, each replica's share of them."""
        flags, strategy = self.flags, self.trainer.strategy
        replicas = strategy.num_replicas_in_sync
        of_run = (*self.data["train"], flags.batch_size, flags.seed, self.step)
        if replicas == 1:
            return cifar100.training_batches(*of_run)
        if flags.batch_size % replicas:
            raise ValueError(
                f"--batch_size {flags.batch_size} cannot be shared out over {replicas} replicas: "
                f"make it a multiple of {replicas}"
            )

        def own(context):
            worker, workers = context.input_pipeline_id, context.num_input_pipelines
            batches = cifar100.training_batches(*of_run, share=(worker, workers))
            return cifar100.share_out(batches, replicas // workers, 0, 1)

        return strategy.distribute_datasets_from_function(own)

    def check_workers(self) -> None:
        """Raise ValueError unless all workers, if there are several, do the same from here on."""
        if not self.several_workers:
            return
        own = ("train_dir", "data_dir", "basemodel", "checkpoint", "groups")  # paths may differ
        flags = {name: value for name, value in vars(self.flags).items() if name not in own}
        workers = self.trainer.strategy.num_replicas_in_sync
        number = zlib.crc32(json.dumps([self.step, flags, self.trainer.description]).encode())
        number %= 2**24 // workers  # their sum is exact in float32
        if self.trainer.total(tf.constant(float(number))) != workers * number:
            raise ValueError(
                f"the workers differ in their flags, their data set or the step that they start "
                f"from (here: {self.step}): give all the same, and a --train_dir that they share"
            )

    def learning_rate(self) -> float:
        return learning_rate(self.flags, self.step, self.steps_per_epoch)

    def gamma2_growth(self) -> float:
        """Factor of gamma2 at this step."""
        f = self.flags
        return stepwise(self.step, self.steps_per_epoch, 1.0, f.gamma2_growth, f.gamma2_step_epoch)

    def grouping_on(self) -> bool:
        """Whether groups form at this step."""
        return self.step >= self.flags.group_start_epoch * self.steps_per_epoch

    def train(self, interruption: utils.Interruption) -> None:
        """Steps up to `max_steps` or an interruption; a checkpoint at the end of either."""
        flags, batches = self.flags, iter(self.batches)
        while self.step < flags.max_steps and not self._interrupted(interruption):
            start, rate = time.perf_counter(), self.learning_rate()
            grouping_on = self.grouping_on()
            images, labels = self._next(batches)
            values = self.trainer.step(
                images, labels, tf.constant(rate, tf.float32), tf.constant(self.gamma2_growth()),
                grouping_on,
            )  # fmt: skip
            self._check_finite(values.numpy())
            self.step += 1
            if grouping_on in self._compiled:
                self._timed += 1
                self._seconds += time.perf_counter() - start
            elif not self._compiled:
                self._start = time.perf_counter()
            self._compiled.add(grouping_on)
            last = self.step == flags.max_steps
            if last or self.step % flags.display == 0:
                self._progress(rate)
            if self._groups_due(last):
                self._record_groups()
            if last or self.step % flags.val_interval == 0:
                self.validate()
            if last or self.step % flags.checkpoint_interval == 0:
                self.save()
        self.save()

    def _next(self, batches):
        """The next batch; where a picture of it cannot be read, a checkpoint first."""
        try:
            return next(batches)
        except tf.errors.OpError as error:
            problem = utils.raised_inside(error)
            if problem:
                self.save()
                raise ValueError(problem) from None
            raise

    def _interrupted(self, interruption: utils.Interruption) -> bool:
        """Whether this process was interrupted; of several workers, whether any was."""
        if self.several_workers:
            status = interruption.status  # a signal that comes from now on counts at the next step
            if self.trainer.total(tf.constant(float(status))) == 0:
                return False
            interruption.status = status or 143
        return bool(interruption.status)

    def _check_finite(self, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            return
        finite = dict(zip(METRICS, np.isfinite(values), strict=True))
        # The loss is their sum, so that it is to blame only where no term is.
        bad = [name for name in (*METRICS[1:], "loss") if not finite[name]]
        step = self.step + 1
        self._stop(f"the loss is not finite at step {step}: {bad[0]} went first", step)

    def _stop(self, problem: str, step: int) -> NoReturn:
        steps = rundir.checkpoint_steps(self.run.directory)
        last = rundir.checkpoint_path(self.run.directory, steps[-1]) if steps else "none"
        rate = learning_rate(self.flags, step - 1, self.steps_per_epoch)
        raise ValueError(
            f"{problem}, learning rate {rate:g}; the last good checkpoint is {last}; lower "
            "--initial_lr or the gammas"
        )

    def _progress(self, rate: float) -> None:
        """One line, and one record: the means since the last one."""
        flags = self.flags
        *sums, count = self.trainer.totals.numpy().tolist()
        self.trainer.totals.assign(tf.zeros_like(self.trainer.totals))
        means = {name: value / count for name, value in zip(METRICS, sums, strict=True)}
        line = f"step {self.step}/{flags.max_steps}  loss {means['loss']:.4f}  "
        line += f"accuracy {means['accuracy']:.3f}  lr {rate:g}"
        if self._timed:
            # What is left has validations and checkpoints as well.
            seconds = (time.perf_counter() - self._start) / (self.step - self._first - 1)
            line += f"  {flags.batch_size * self._timed / self._seconds:.0f} images/s"
            line += f"  {_duration(seconds * (flags.max_steps - self.step))} left"
        utils.say(line)
        if self.flags.stage != "group":
            means = {name: value for name, value in means.items() if name not in TERMS}
        self.run.log(self.step, **means, learning_rate=rate)

    def _groups_due(self, last: bool) -> bool:
        if self.flags.stage != "group":
            return False
        return last or self.step % self.flags.group_summary_interval == 0

    def _record_groups(self) -> None:
        """How sharp the indicators are and how many features each group has."""
        net = self.trainer.net
        sharp = grouping.sharpness(net)
        sizes = {
            name: np.bincount(np.argmax(alpha, axis=0), minlength=alpha.shape[0]).tolist()
            for name, alpha in net.alphas.items()
        }
        self.run.log(
            self.step, **{f"sharpness/{name}": v for name, v in sharp.items()}, group_sizes=sizes
        )
        shares = "  ".join(
            f"{name} {v:.2f} {'/'.join(map(str, sizes[name]))}" for name, v in sharp.items()
        )
        utils.say(f"    largest share and sizes of groups: {shares}")
        self.run.log_pictures(self.step, self._draw)

    def _draw(self) -> dict:
        """The report's pictures of the groups as they are now."""
        from report import (
            figures,
        )  # matplotlib takes a second to load, which most runs need not spend

        net = self.trainer.net
        drawn = {"sharpness": figures.sharpness(self.run.metrics)}
        with contextlib.suppress(ValueError):  # a group may still be empty
            drawn["weights"] = figures.weights(net)
            groups = [classes.tolist() for classes in resnet.class_groups(net)]
            data = cifar100.describe(self.flags.data_dir)
            if data["superclass_names"]:
                drawn["superclasses"] = figures.superclasses(groups, data)
        return drawn

    def evaluate(self) -> metrics.Evaluation:
        """Of the validation images."""
        config = self.trainer.net.config
        return metrics.evaluate(
            self.predict, *self.data["val"], self.flags.batch_size, config.num_classes
        )

    def validate(self) -> None:
        """Validation accuracy, into the log; a new best is kept as a checkpoint."""
        best = self.run.best()
        evaluation = self.evaluate()
        self.run.log(
            self.step, val_accuracy=evaluation.accuracy, val_cross_entropy=evaluation.cross_entropy
        )
        utils.say(f"    validation: accuracy {evaluation.accuracy:.4f}")
        if not best or evaluation.accuracy > best["best_accuracy"]:
            self.save()
        self.evaluation = evaluation

    def save(self) -> None:
        """A checkpoint of this step, unless there is one or the last update spoiled the weights."""
        if self.saved == self.step:
            return
        if not self.trainer.is_finite():
            self._stop(f"the weights are not finite after step {self.step}", self.step)
        # Not before: a start that comes to no checkpoint leaves the flags of those that there are.
        self.run.write("config.json", self.config)
        self.run.save(self.trainer.checkpoint, self.step)
        self.saved = self.step


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def run(flags: argparse.Namespace) -> int:
    """Everything that a command of train.py does; returns the exit status."""
    dataset = cifar100.describe(flags.data_dir)
    chosen = fit_schedule(flags, dataset["counts"]["train"])
    del flags.fixed  # no flag
    complete = restore.finished_result(flags, dataset)
    if complete:
        print(f"{flags.train_dir} was complete before\n{_last_line(complete)}")
        return 0
    if chosen:
        utils.say(chosen)
    strategy = devices.strategy(flags.devices)
    if flags.deterministic:
        tf.config.experimental.enable_op_determinism()
    data = {split: cifar100.load(flags.data_dir, split) for split in ("train", "val")}
    class_groups = "" if flags.stage == "baseline" else "learned"
    if flags.groups:
        class_groups = os.path.splitext(os.path.basename(flags.groups))[0]
    run_info = {
        "stage": flags.stage,
        "seed": flags.seed,
        "preset": flags.preset,
        "class_groups": class_groups,
        "dataset": dataset["dataset"],
        "indices_sha256": dataset.get("indices_sha256", ""),
    }
    if cifar100.is_own(dataset):  # travels with the network, as nobody else knows it
        run_info |= {name: dataset[name] for name in ("class_names", "centre")}
    try:
        with utils.Interruption() as interruption:  # after the strategy, which may take signals
            return _run(flags, data, run_info, strategy, interruption)
    except tf.errors.OpError as error:
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise
        raise ValueError(
            "lost another worker, which may say why: start all workers again, they go on from the "
            f"newest checkpoint (TensorFlow: {utils.first_line(error)})"
        ) from error


def _run(flags, data, run_info, strategy, interruption) -> int:
    """A run from its start to its end or interruption; returns the exit status."""
    kind = rundir.Run if devices.is_chief(strategy) else rundir.Follower
    with kind(flags.train_dir, flags.keep) as run:
        net, path, run_info = restore.starting_point(flags, run, run_info)
        flags.network = net.config.network  # in stage split the base's
        trainer = Trainer(net, objective(flags), run_info, strategy, flags.jit_compile)
        if path:
            trainer.restore(path)
        net, step = trainer.net, int(trainer.steps_done)
        if flags.max_steps < step:
            raise ValueError(
                f"--max_steps {flags.max_steps} is less than the {step} steps already done in "
                f"{path}: raise it, or start from another checkpoint in another --train_dir"
            )
        weights, flops = resnet.count(net)
        utils.say(
            f"{net.config.name}, groups {grouping.format_groups(net.config.groups)}, stage "
            f"{flags.stage}: {weights:,} weights, {flops:,} FLOPs an image; "
            f"{len(data['train'][1]):,} training images ({run_info['dataset']}); "
            f"{rundir.hardware()}"
        )
        slow = rundir.slow_precision(flags.precision, [*flags.devices, devices.default_device()][0])
        if slow:
            utils.say(slow)
        loop = Loop(flags, run, trainer, data)
        loop.check_workers()
        if flags.stage == "group" and flags.schedule_for not in (None, len(data["train"][1])):
            for line in slow_groups(flags, net.config, loop.steps_per_epoch):
                utils.say(line)
        if path:
            restore.print_changed_flags(path, flags, step, len(data["train"][1]))
        if rundir.checkpoint_steps(flags.train_dir):
            run.resume_metrics(step)
        else:
            run.write("config.json", loop.config)
            run.begin()
        cut_now = flags.stage == "split" and step == 0
        no_steps = step == flags.max_steps
        if not run.best() and (cut_now or no_steps):
            loop.validate()
        loop.train(interruption)
        return finish(loop, interruption, run_info)


def finish(loop: Loop, interruption: utils.Interruption, run_info: dict) -> int:
    """The last line, and result.json where the run is complete; returns the exit status."""
    flags, run = loop.flags, loop.run
    best = run.best()
    if interruption.status and loop.step < flags.max_steps:
        utils.say(
            f"interrupted at step {loop.step}: {_best_words(best)}; the same command goes on from "
            "here"
        )
        return interruption.status
    if loop.evaluation is None:  # it was interrupted after its last step
        loop.evaluation = loop.evaluate()
    replicas = loop.trainer.strategy.num_replicas_in_sync
    values = metrics.result(
        loop.trainer.net,
        loop.evaluation,
        split="val",
        step=loop.step,
        precision=flags.precision,
        placement="single" if replicas == 1 else f"{replicas} replicas",
        devices=flags.devices or [devices.default_device()],
        **run_info,
    )
    values |= best
    run.write("config.json", loop.config)
    run.write("result.json", values)
    utils.say(_last_line(values))
    return 0


def _last_line(result: dict) -> str:
    """What a complete run says at last."""
    return (
        f"done: validation accuracy {result['accuracy']:.4f} at step {result['step']}; "
        f"{_best_words(result)}"
    )


def _best_words(result: dict) -> str:
    if "best_step" not in result:
        return "no validation yet"
    return f"best validation accuracy {result['best_accuracy']:.4f} at step {result['best_step']}"
