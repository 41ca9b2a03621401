"""Train one of the three stages of SplitNet (Algorithm 1 of the paper).

    baseline   a Wide ResNet, nothing split
    group      weights and group assignments together; eq. (1) with the regularizers of eq. (2)
    split      cut the grouped network (--basemodel) into its tree and finetune that

The same command goes on after an interruption, and ends with what it would have ended with. What a
run starts from is printed: the newest checkpoint in --train_dir, else --checkpoint, else the
weights of --basemodel, else new weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Sequence
from typing import NoReturn

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import utils  # isort: skip, it quiets TensorFlow's start
import numpy as np
import tensorflow as tf

import cifar100
import class_groups
import evaluation
import grouping
import placement
import resnet
import start

STAGES = ("baseline", "group", "split")
TERMS = ("overlap", "weight_split", "uniform")
SCHEDULES = ("step", "linear", "cosine")
METRICS = ("loss", "cross_entropy", "l2", *TERMS, "accuracy")


# ---------------------------------------------------------------- flags


def _flag_table() -> list[tuple]:
    """(name, type, default, stages that it applies to, help) of every flag."""
    count, positive = utils.number(int, low=1), utils.number(float, above=0)
    weight, grouped = utils.number(float, low=0), ("group",)
    return [
        ("train_dir", utils.path, None, STAGES, "run directory: checkpoints, metrics, result"),
        ("data_dir", utils.path, "data/cifar100", STAGES,
         "where download_cifar100.py put the data"),
        ("batch_size", count, 90, STAGES, "images a step"),
        ("num_residual_units", count, 2, STAGES, "blocks in each of the three stages; 2: WRN-16"),
        ("k", _factor, 8, STAGES, "widening factor"),
        ("ngroups1", count, 1, ("group", "split"), "groups of the classifier; 1: not split"),
        ("ngroups2", count, 1, ("group", "split"), "groups of unit_3; 1: not split"),
        ("ngroups3", count, 1, ("group", "split"), "groups of unit_2; 1: not split"),
        ("groups", str, "", ("split",),
         f"cut a baseline into given groups instead: {', '.join(class_groups.KINDS)} (by --seed)"),
        ("l2_weight", weight, 1e-4, STAGES, "weight decay, lambda of eq. (1)"),
        ("gamma1", weight, 1.0, grouped, "weight of overlap (R_D, eq. 5): makes groups disjoint"),
        ("gamma2", weight, 1.0, grouped, "weight of weight_split (R_W, eq. 4): empties the cut"),
        ("gamma2_step_epoch", _epochs, "", grouped, "epochs at which gamma2 grows, such as 10"),
        ("gamma2_growth", positive, 10.0, grouped, "factor of each growth"),
        ("gamma3", weight, 10.0, grouped, "weight of uniform (R_E, eq. 6): balances the groups"),
        ("dropout_keep_prob", utils.number(float, above=0, high=1), 1.0, STAGES,
         "share of the inputs of split layers that training keeps (baseline: of unit_2 and on)"),
        ("momentum", utils.number(float, low=0, below=1), 0.9, STAGES, "of the optimizer"),
        ("nesterov", utils.boolean, False, STAGES, "Nesterov's momentum instead of the plain one"),
        ("label_smoothing", utils.number(float, low=0, below=1), 0.0, STAGES,
         "share of each label that is spread evenly over all classes"),
        ("bn_no_scale", utils.boolean, False, STAGES, "do not train gamma of the blocks' BN"),
        ("weighted_group_loss", utils.boolean, True, grouped,
         "weight each layer's R_W by its own value instead of all alike"),
        ("initial_lr", positive, 0.1, STAGES, "learning rate of the first step"),
        ("lr_step_epoch", _epochs, "", STAGES, "epochs at which it drops, such as 240,300"),
        ("lr_decay", utils.number(float, above=0, high=1), 0.1, STAGES, "factor of each drop"),
        ("lr_schedule", str, "step", STAGES,
         f"how the rate falls: {', '.join(SCHEDULES)}; step: by the drops alone, as published"),
        ("final_lr", weight, 0.0, STAGES, "where a linear or cosine schedule ends"),
        ("lr_warmup_epochs", weight, 0.0, STAGES, "epochs in which the rate first rises from 0"),
        ("lr_total_steps", count, None, STAGES,
         "length of a linear or cosine schedule (default: to the end of this stage)"),
        ("lr_first_step", utils.number(int, low=0), 0, STAGES,
         "steps of that schedule that earlier stages have taken, so that stages share it"),
        ("max_steps", count, 200000, STAGES, "steps in all"),
        ("display", count, 100, STAGES, "steps between two lines of progress"),
        ("val_interval", count, 1000, STAGES, "steps between two validations"),
        ("checkpoint_interval", count, 5000, STAGES, "steps between two checkpoints"),
        ("group_summary_interval", count, 1000, grouped,
         "steps between two records of how sharp and how large the groups are"),
        ("basemodel", utils.path, "", STAGES, "run or checkpoint whose weights to start from"),
        ("checkpoint", utils.path, "", STAGES,
         "run or checkpoint to go on from: weights, momentum, step"),
        ("seed", utils.number(int, low=0, below=2**31), 0, STAGES,
         "of initialization, order, augmentation and dropout"),
        ("precision", str, "float32", STAGES,
         f"of the convolutions: {' or '.join(evaluation.DTYPES)}"),
        ("deterministic", utils.boolean, False, STAGES, "TensorFlow's deterministic operations"),
        ("keep", count, 3, STAGES, "newest checkpoints to keep, besides the best"),
        ("group_lr_scale", positive, 1.0, grouped, "factor of the alphas' learning rate"),
        ("group_equal_growth", utils.boolean, False, grouped,
         "even out how fast groups form: by their number and by what they divide"),
        ("devices", str, "", STAGES, "share each batch out over devices, such as /GPU:0,/GPU:1"),
        ("jit_compile", utils.boolean, False, STAGES, "compile the step with XLA, on one device"),
        ("preset", str, "", STAGES, "name of this set of flags, for result.json"),
    ]  # fmt: skip


def _factor(text: str) -> float:
    """A widening factor; a whole one is an int, as it is written."""
    value = utils.number(float, above=0)(text)
    return int(value) if value == int(value) else value


def _epochs(text: str) -> list[float]:
    """`'240,300'` -> `[240.0, 300.0]`."""
    epoch = utils.number(float, above=0)
    epochs = [epoch(part) for part in text.split(",") if part.strip()]
    if epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"expected ascending epochs such as 240,300, got {text!r}")
    return epochs


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of a run, checked against each other; `groups` is (unit_2, unit_3, logits).

    A mistake ends the program with one line. In stage split, `k`, `num_residual_units` and `groups`
    are None where they were not given: the cut network's hold.
    """
    table = _flag_table()
    parser = utils.FlagParser(__doc__, needed=("stage", "train_dir"))
    parser.add_argument("--stage", choices=STAGES, help=" | ".join(STAGES))
    for name, kind, default, stages, text in table:
        shown = f" (default: {default})" if default not in (None, "") else ""
        only = f" [{' and '.join(stages)} only]" if stages != STAGES else ""
        # None tells a flag that was not given.
        optional = {"nargs": "?", "const": True} if kind is utils.boolean else {}
        parser.add_argument(f"--{name}", type=kind, help=text + shown + only, **optional)
    flags = parser.parse_args(argv)
    given = {name for name, *_ in table if getattr(flags, name) is not None}
    for name, _, default, stages, _ in table:
        if name in given and flags.stage not in stages:
            parser.error(
                f"--{name} has no effect in stage {flags.stage}: leave it out, or use --stage "
                + " or ".join(stages)
            )
        if name not in given:
            setattr(flags, name, [] if name.endswith("_step_epoch") else default)
    _check_flags(parser, flags, given)
    return flags


def _check_flags(parser: utils.FlagParser, flags: argparse.Namespace, given: set[str]) -> None:
    """Contradictions between flags; sets `flags.ngroups`."""
    if flags.precision not in evaluation.DTYPES:
        known = " or ".join(evaluation.DTYPES)
        parser.error(f"--precision must be {known}, got {flags.precision!r}")
    flags.devices = [name for name in flags.devices.split(",") if name]
    if flags.jit_compile and (len(flags.devices) > 1 or placement.read_tf_config()):
        several = "--devices" if flags.devices else "TF_CONFIG"
        parser.error(f"--jit_compile compiles for one device: leave it or {several} out")
    _check_schedule(parser, flags, given)
    if flags.nesterov and not flags.momentum:
        parser.error("--nesterov is a kind of momentum, and --momentum is 0: leave one of them out")
    flags.ngroups = (flags.ngroups3, flags.ngroups2, flags.ngroups1)
    shown = grouping.format_groups(flags.ngroups)
    if flags.groups not in ("", *class_groups.KINDS, None):
        kinds = ", ".join(class_groups.KINDS)
        parser.error(f"--groups must be one of {kinds}, got {flags.groups!r}")
    if flags.groups and max(flags.ngroups) == 1:
        parser.error(f"--groups {flags.groups} needs their numbers: set --ngroups1 to 2 or more")
    if flags.stage == "split":
        if not flags.basemodel and not flags.checkpoint:
            parser.error("stage split cuts a grouped network: name its run with --basemodel")
        if not given & {"ngroups1", "ngroups2", "ngroups3"}:
            flags.ngroups = None
        for name in {"k", "num_residual_units"} - given:
            setattr(flags, name, None)
    elif flags.stage == "group" and max(flags.ngroups) == 1:
        parser.error(
            f"stage group needs groups, but --ngroups3-2-1 are {shown}: set --ngroups1 to 2 or "
            "more, or use --stage baseline"
        )
    try:
        settings = {name: getattr(flags, name) for name in ("k", "num_residual_units")}
        settings["groups"] = flags.ngroups
        resnet.NetworkConfig(**{name: v for name, v in settings.items() if v is not None})
    except ValueError as error:
        parser.error(f"{error} [--ngroups3 is unit_2, --ngroups2 unit_3, --ngroups1 logits]")


def _check_schedule(parser: utils.FlagParser, flags: argparse.Namespace, given: set[str]) -> None:
    """Contradictions between the flags of the learning rate; sets `flags.lr_total_steps`."""
    kind = flags.lr_schedule
    if kind not in SCHEDULES:
        parser.error(f"--lr_schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "step":
        for name in ("final_lr", "lr_total_steps", "lr_first_step"):
            if name in given:
                parser.error(f"--{name} is for --lr_schedule linear or cosine: give one of them")
        return
    if flags.lr_step_epoch:
        parser.error(
            f"--lr_step_epoch is for --lr_schedule step, not {kind}: give --lr_step_epoch ''"
        )
    if flags.final_lr > flags.initial_lr:
        parser.error(f"--final_lr {flags.final_lr:g} is above --initial_lr {flags.initial_lr:g}")
    steps = flags.lr_first_step + flags.max_steps
    flags.lr_total_steps = flags.lr_total_steps or steps
    if flags.lr_total_steps < steps:
        parser.error(
            f"--lr_total_steps {flags.lr_total_steps} is less than the {steps} steps of "
            "--lr_first_step and --max_steps: make it larger"
        )


# ---------------------------------------------------------------- the training step


def learning_rate(flags: argparse.Namespace, step: int, steps_per_epoch: float) -> float:
    """Of step `step` (from 0) of a stage.

    A linear or cosine schedule of T steps is at its t-th, t = `lr_first_step` + `step`. The rate
    rises in proportion to t + 1 to `initial_lr` in W steps of warm-up, then falls so that it
    would be `final_lr` at t = T. A step schedule has its drops instead.
    """
    position = step + flags.lr_first_step
    warmup = flags.lr_warmup_epochs * steps_per_epoch
    rate = flags.initial_lr * min(1.0, (position + 1) / max(warmup, 1.0))
    if flags.lr_schedule == "step":
        return utils.stepwise(step, steps_per_epoch, rate, flags.lr_decay, flags.lr_step_epoch)
    if position < warmup:
        return rate
    left = (flags.lr_total_steps - position) / (flags.lr_total_steps - warmup)
    if flags.lr_schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return flags.final_lr + (flags.initial_lr - flags.final_lr) * left


class Momentum(tf.Module):
    """TensorFlow 1's momentum: a = momentum * a + grad; w -= lr * a.

    With `nesterov` w -= lr * (grad + momentum * a), where momentum has gone one step ahead.
    """

    def __init__(self, variables: Sequence[tf.Variable], momentum: float, nesterov: bool = False):
        super().__init__()
        self.momentum, self.nesterov = momentum, nesterov
        self.slots = {resnet.name_of(v): tf.Variable(tf.zeros_like(v)) for v in variables}

    def apply(self, grads_and_vars, learning_rate) -> None:
        for grad, variable, scale in grads_and_vars:
            tf.raw_ops.ResourceApplyMomentum(
                var=variable.handle,
                accum=self.slots[resnet.name_of(variable)].handle,
                lr=learning_rate * scale,
                grad=grad,
                momentum=self.momentum,
                use_nesterov=self.nesterov,
            )


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimized, eq. (1) and (2), and how; the fields are the flags of these names."""

    l2_weight: float = 1e-4
    gamma1: float = 1.0
    gamma2: float = 1.0
    gamma3: float = 10.0
    weighted_group_loss: bool = True
    label_smoothing: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    group_lr_scale: float = 1.0
    group_equal_growth: bool = False
    seed: int = 0
    precision: str = "float32"


def objective(flags: argparse.Namespace) -> Objective:
    """The flags that the objective is made of."""
    names = [field.name for field in dataclasses.fields(Objective)]
    return Objective(**{name: getattr(flags, name) for name in names})


class Trainer(tf.Module):
    """A network with everything that its training changes: `checkpoint` holds all of it.

    Under a `strategy` each replica has copies of the variables and takes its share of the batch;
    batch normalization and the gradients are those of the whole batch. Only dropout differs from
    one device's: each replica draws its own.
    """

    def __init__(
        self,
        net: resnet.ResNet | resnet.SplitResNet,
        objective: Objective,
        about: dict,
        strategy: tf.distribute.Strategy | None = None,
        jit_compile: bool = False,
    ):
        super().__init__()
        self.objective, self.strategy = objective, strategy or tf.distribute.get_strategy()
        with self.strategy.scope():
            self.net = resnet.copy(net) if strategy else net
            self.optimizer = Momentum(
                self.net.trainable_variables, objective.momentum, objective.nesterov
            )
        self._update = self._replica_step
        if jit_compile:
            self._update = tf.function(self._replica_step, jit_compile=True)
        self.steps_done = tf.Variable(0, dtype=tf.int64)
        # Sums of the metrics, and the number of steps, since the last line of progress.
        self.totals = tf.Variable(tf.zeros(len(METRICS) + 1))
        self.description = json.dumps(about | resnet.describe(net))
        self.checkpoint = tf.train.Checkpoint(
            net=self.net,
            optimizer=self.optimizer,
            step=self.steps_done,
            totals=self.totals,
            description=tf.Variable(self.description, trainable=False),
        )
        self._alphas = {}  # with the factor of its learning rate
        for name, alpha in getattr(self.net, "alphas", {}).items():
            self._alphas[alpha.ref()] = objective.group_lr_scale
            if objective.group_equal_growth:
                self._alphas[alpha.ref()] *= grouping.growth_rates(self.net)[name]

    def restore(self, path: str) -> None:
        """Everything from a checkpoint, which must hold exactly that; the description stays ours.

        Raises:
            ValueError: it does not.
        """
        try:
            with utils.plain_name(path) as plain:
                self.checkpoint.read(plain).assert_consumed()
        except AssertionError as error:
            raise ValueError(f"{path} is not a checkpoint of this network: {error}") from None
        self.checkpoint.description.assign(self.description)

    def is_finite(self) -> bool:
        """Whether all weights and statistics are finite numbers."""
        return all(bool(tf.reduce_all(tf.math.is_finite(v))) for v in self.net.variables)

    def loss(self, logits, labels, growth=1.0) -> dict[str, tf.Tensor]:
        """The objective, gamma2 times `growth`, and its terms (without weights), float32.

        `cross_entropy` is that of the labels as they are, without smoothing.
        """
        hyper = self.objective
        cross_entropy = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        )
        l2 = tf.add_n([tf.nn.l2_loss(w) for w in self.net.decayed_variables])
        terms = {name: tf.zeros([]) for name in TERMS}
        if self._alphas:
            terms = grouping.regularizers(
                self.net, hyper.weighted_group_loss, hyper.group_equal_growth
            )
        gammas = (hyper.gamma1, hyper.gamma2 * growth, hyper.gamma3)
        loss = cross_entropy + hyper.l2_weight * l2
        if hyper.label_smoothing:
            # Of labels spread evenly: the mean over the classes of -log softmax.
            spread = tf.reduce_mean(tf.reduce_logsumexp(logits, axis=1)) - tf.reduce_mean(logits)
            loss += hyper.label_smoothing * (spread - cross_entropy)
        loss += sum(gamma * terms[name] for gamma, name in zip(gammas, TERMS, strict=True))
        return {"loss": loss, "cross_entropy": cross_entropy, "l2": l2} | terms

    @tf.function
    def step(self, images, labels, learning_rate, growth=1.0) -> tf.Tensor:
        """One update with gamma2 times `growth`; returns its METRICS, float32 `[7]`.

        `images` and `labels` are what `strategy` distributed, or plain tensors without one.
        """
        seed = tf.stack([tf.constant(self.objective.seed, tf.int64), self.steps_done])
        values = self.strategy.run(self._update, (images, labels, learning_rate, growth, seed))
        values = self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)
        self.totals.assign_add(tf.concat([values, [1.0]], axis=0))
        self.steps_done.assign_add(1)
        return values

    def _replica_step(self, images, labels, learning_rate, growth, dropout_seed) -> tf.Tensor:
        """The update on one replica, from its share of the batch; returns that one's METRICS."""
        hyper, context = self.objective, tf.distribute.get_replica_context()
        images = tf.cast(images, evaluation.DTYPES[hyper.precision])
        several = context.num_replicas_in_sync > 1
        if several:
            dropout_seed = tf.random.experimental.stateless_fold_in(
                dropout_seed, context.replica_id_in_sync_group
            )
        with tf.GradientTape() as tape:
            logits = self.net(images, training=True, dropout_seed=dropout_seed)
            metrics = self.loss(logits, labels, growth)
        variables = self.net.trainable_variables
        scales = [self._alphas.get(variable.ref(), 1.0) for variable in variables]
        grads = tape.gradient(metrics["loss"], variables)
        if several:
            grads = context.all_reduce(tf.distribute.ReduceOp.MEAN, grads)
        self.optimizer.apply(zip(grads, variables, scales, strict=True), learning_rate)
        hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
        metrics["accuracy"] = tf.reduce_mean(tf.cast(hits, tf.float32))
        return tf.stack([metrics[name] for name in METRICS])

    @tf.function
    def total(self, number: tf.Tensor) -> tf.Tensor:
        """Sum of the workers' numbers (float32 scalars), for what they have to agree upon."""
        return self.strategy.reduce(
            tf.distribute.ReduceOp.SUM, self.strategy.run(tf.identity, (number,)), axis=None
        )


# ---------------------------------------------------------------- the loop


class Loop:
    """Steps, and what happens between them: progress, validation, group records, checkpoints."""

    def __init__(self, flags: argparse.Namespace, run: utils.Run, trainer: Trainer, data: dict):
        self.flags, self.run, self.trainer, self.data = flags, run, trainer, data
        self.step = int(trainer.steps_done)
        self.batches = self._batches()
        self.steps_per_epoch = len(data["train"][1]) / flags.batch_size
        self.predict = evaluation.predictor(trainer.net, flags.precision)
        self.evaluation = None  # the last validation
        warmup = flags.lr_warmup_epochs * self.steps_per_epoch
        if flags.lr_schedule != "step" and warmup >= flags.lr_total_steps:
            raise ValueError(
                f"--lr_warmup_epochs {flags.lr_warmup_epochs:g} takes all of the schedule's "
                f"{flags.lr_total_steps} steps: make it smaller"
            )
        self.several_workers = isinstance(
            trainer.strategy, tf.distribute.MultiWorkerMirroredStrategy
        )
        self.saved = self.step if self.step in utils.checkpoint_steps(run.directory) else None
        self._first, self._start = self.step, 0.0  # of this process's steps but the first

    def _batches(self) -> tf.data.Dataset | tf.distribute.DistributedDataset:
        """The training batches from this step on, each replica's share of them."""
        flags, strategy = self.flags, self.trainer.strategy
        replicas = strategy.num_replicas_in_sync
        batches = cifar100.training_batches(
            *self.data["train"], flags.batch_size, flags.seed, self.step
        )
        if replicas == 1:
            return batches
        if flags.batch_size % replicas:
            raise ValueError(
                f"--batch_size {flags.batch_size} cannot be shared out over {replicas} replicas: "
                f"make it a multiple of {replicas}"
            )
        return strategy.distribute_datasets_from_function(
            lambda context: cifar100.share_out(
                batches, replicas, context.input_pipeline_id, context.num_input_pipelines
            )
        )

    def check_workers(self) -> None:
        """Raise ValueError unless all workers, if there are several, do the same from here on."""
        if not self.several_workers:
            return
        own = ("train_dir", "data_dir", "basemodel", "checkpoint")  # paths may differ
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
        return utils.stepwise(
            self.step, self.steps_per_epoch, 1.0, f.gamma2_growth, f.gamma2_step_epoch
        )

    def train(self, interruption: utils.Interruption) -> None:
        """Steps up to `max_steps` or an interruption; a checkpoint at the end of either."""
        flags, batches = self.flags, iter(self.batches)
        while self.step < flags.max_steps and not self._interrupted(interruption):
            rate = self.learning_rate()
            images, labels = next(batches)
            values = self.trainer.step(
                images, labels, tf.constant(rate, tf.float32), tf.constant(self.gamma2_growth())
            )
            self._check_finite(values.numpy())
            self.step += 1
            if self.step == self._first + 1:
                self._start = time.perf_counter()
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
        bad = [name for name, value in zip(METRICS, values, strict=True) if not np.isfinite(value)]
        self._stop(bad[1] if bad[0] == "loss" and len(bad) > 1 else bad[0], self.step + 1)

    def _stop(self, first: str, step: int) -> NoReturn:
        steps = utils.checkpoint_steps(self.run.directory)
        last = utils.checkpoint_path(self.run.directory, steps[-1]) if steps else "none"
        raise ValueError(
            f"the loss is not finite at step {step}: {first} went first, learning rate "
            f"{self.learning_rate():g}; the last good checkpoint is {last}; lower --initial_lr or "
            "the gammas"
        )

    def _progress(self, rate: float) -> None:
        """One line, and one record: the means since the last one."""
        flags = self.flags
        *sums, count = self.trainer.totals.numpy().tolist()
        self.trainer.totals.assign(tf.zeros_like(self.trainer.totals))
        means = {name: value / count for name, value in zip(METRICS, sums, strict=True)}
        timed = self.step - self._first - 1
        line = f"step {self.step}/{flags.max_steps}  loss {means['loss']:.4f}  "
        line += f"accuracy {means['accuracy']:.3f}  lr {rate:g}"
        if timed:
            seconds = (time.perf_counter() - self._start) / timed
            left = seconds * (flags.max_steps - self.step)
            line += f"  {flags.batch_size / seconds:.0f} images/s  {_duration(left)} left"
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
        import pictures  # matplotlib takes a second to load, which most runs need not spend

        net = self.trainer.net
        drawn = {"sharpness": pictures.sharpness(self.run.metrics)}
        with contextlib.suppress(ValueError):  # a group may still be empty
            drawn["weights"] = pictures.weights(net)
            if net.config.groups[2] > 1:
                groups = [classes.tolist() for classes in resnet.class_groups(net)]
                data = cifar100.describe(self.flags.data_dir)
                drawn["superclasses"] = pictures.superclasses(groups, data)
        return drawn

    def validate(self) -> None:
        """Validation accuracy, into the log; a new best is kept as a checkpoint."""
        best = self.run.best()
        found = evaluation.evaluate(self.predict, *self.data["val"], self.flags.batch_size)
        self.run.log(self.step, val_accuracy=found.accuracy, val_cross_entropy=found.cross_entropy)
        utils.say(f"    validation: accuracy {found.accuracy:.4f}")
        if best is None or found.accuracy > best[1]:
            self.save()
        self.evaluation = found

    def save(self) -> None:
        """A checkpoint of this step, unless there is one or the last update spoiled the weights."""
        if self.saved == self.step:
            return
        if not self.trainer.is_finite():
            self._stop("weights", self.step)
        self.run.save(self.trainer.checkpoint, self.step)
        self.saved = self.step


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    dataset = cifar100.describe(flags.data_dir)
    complete = start.complete_result(flags, dataset)
    if complete:
        print(f"{flags.train_dir} was complete before\n{_last_line(complete)}")
        return 0
    strategy = placement.strategy(flags.devices)
    if flags.deterministic:
        tf.config.experimental.enable_op_determinism()
    data = {split: cifar100.load(flags.data_dir, split) for split in ("train", "val")}
    about = {
        "stage": flags.stage,
        "seed": flags.seed,
        "preset": flags.preset,
        "class_groups": flags.groups or "learned" if flags.stage != "baseline" else "",
        "dataset": dataset["dataset"],
        "indices_sha256": dataset.get("indices_sha256", ""),
    }
    try:
        with utils.Interruption() as interruption:  # after the strategy, which may take signals
            return _run(flags, data, about, strategy, interruption)
    except tf.errors.OpError as error:
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "lost another worker, which may say why: start all workers again, they go on from the "
            f"newest checkpoint (TensorFlow: {reason})"
        ) from error


def _run(flags, data, about, strategy, interruption) -> int:
    """A run from its start to its end or interruption; returns the exit status."""
    kind = utils.Run if placement.is_chief(strategy) else utils.Follower
    with kind(flags.train_dir, flags.keep) as run:
        net, path, about = start.find(flags, run, about)
        trainer = Trainer(net, objective(flags), about, strategy, flags.jit_compile)
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
            f"{len(data['train'][1]):,} training images ({about['dataset']}); {utils.hardware()}"
        )
        loop = Loop(flags, run, trainer, data)
        loop.check_workers()
        if step and os.path.exists(run.path("config.json")):
            start.say_changes(run.path("config.json"), flags, step, len(data["train"][1]))
        run.write("config.json", {
            "flags": vars(flags),
            "network": resnet.describe(net)["config"],
            "dataset": about["dataset"],
            "hardware": utils.hardware(),
            "versions": utils.versions(),
        })  # fmt: skip
        if utils.checkpoint_steps(flags.train_dir):
            run.resume_metrics(step)
        else:
            run.begin()
        cut_now, no_steps = step == 0 and flags.stage == "split", step == flags.max_steps
        if run.best() is None and (cut_now or no_steps):
            loop.validate()
        loop.train(interruption)
        return finish(loop, interruption, about)


def finish(loop: Loop, interruption: utils.Interruption, about: dict) -> int:
    """The last line, and result.json where the run is complete; returns the exit status."""
    flags, run = loop.flags, loop.run
    best = dict(zip(("best_step", "best_accuracy"), run.best() or (), strict=False))
    if interruption.status and loop.step < flags.max_steps:
        utils.say(
            f"interrupted at step {loop.step}: {_best_words(best)}; the same command goes on from "
            "here"
        )
        return interruption.status
    if loop.evaluation is None:  # it was interrupted after its last step
        loop.evaluation = evaluation.evaluate(loop.predict, *loop.data["val"], flags.batch_size)
    replicas = loop.trainer.strategy.num_replicas_in_sync
    values = evaluation.result(
        loop.trainer.net,
        loop.evaluation,
        split="val",
        step=loop.step,
        precision=flags.precision,
        placement="single" if replicas == 1 else f"{replicas} replicas",
        devices=flags.devices or [placement.default_device()],
        **about,
    )
    values |= best
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


if __name__ == "__main__":
    utils.run_main(main)
