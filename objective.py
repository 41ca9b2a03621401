"""What is minimized, eq. (1) and (2) of the paper, and how: one training step, and its rates."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

import grouping
import networks
import resnet
import rundir
from utils import tf

TERMS = ("overlap", "weight_split", "uniform")
METRICS = ("loss", "cross_entropy", "l2", *TERMS, "accuracy")


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
    momentum: float = 0.9
    group_lr_scale: float = 1.0
    group_equal_growth: bool = False
    seed: int = 0
    precision: str = "float32"
    label_smoothing: float = 0.0
    nesterov: bool = False


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
        net: resnet.Network,
        objective: Objective,
        run_info: dict,
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
            self._update = tf.function(self._replica_step, autograph=False, jit_compile=True)
        self.steps_done = tf.Variable(0, dtype=tf.int64)
        # Sums of the metrics, and the number of steps, since the last line of progress.
        self.totals = tf.Variable(tf.zeros(len(METRICS) + 1))
        self.description = json.dumps(run_info | resnet.to_dict(net))
        self.checkpoint = tf.train.Checkpoint(
            net=self.net,
            optimizer=self.optimizer,
            step=self.steps_done,
            totals=self.totals,
            description=tf.Variable(self.description, trainable=False),
        )
        self._alphas = {}  # with the factor of its learning rate
        for name, alpha in self.net.alphas.items():
            growth = grouping.growth_rate(name, alpha.shape) if objective.group_equal_growth else 1
            self._alphas[alpha.ref()] = objective.group_lr_scale * growth

    def restore(self, path: str) -> None:
        """Everything from a checkpoint, which must hold exactly that; the description stays ours.

        Raises:
            ValueError: it does not.
        """
        try:
            with rundir.plain_name(path) as plain:
                self.checkpoint.read(plain).assert_consumed()
        except AssertionError as error:
            raise ValueError(f"{path} is not a checkpoint of this network: {error}") from None
        self.checkpoint.description.assign(self.description)

    def is_finite(self) -> bool:
        """Whether all weights and statistics are finite numbers."""
        return all(bool(tf.reduce_all(tf.math.is_finite(v))) for v in self.net.variables)

    def loss(self, logits, labels, growth=1.0, grouping_on=True) -> dict[str, tf.Tensor]:
        """The objective, gamma2 times `growth`, and its terms (without weights), float32.

        Without `grouping_on` the regularizers are left out, and their terms are 0.
        `cross_entropy` is that of the labels as they are, without smoothing.
        """
        hyper = self.objective
        cross_entropy = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        )
        l2 = tf.add_n([tf.nn.l2_loss(w) for w in self.net.decayed_variables])
        terms = {name: tf.zeros([]) for name in TERMS}
        if self._alphas and grouping_on:
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

    # Its control flow is Python's own: AutoGraph would only take time to find nothing to convert.
    @tf.function(autograph=False)
    def step(self, images, labels, learning_rate, growth=1.0, grouping_on=True) -> tf.Tensor:
        """One update with gamma2 times `growth`; returns its METRICS, float32 `[7]`.

        Without `grouping_on`, a Python bool, the alphas stay as they are.
        `images` and `labels` are what `strategy` distributed, or plain tensors without one.
        """
        seed = tf.stack([tf.constant(self.objective.seed, tf.int64), self.steps_done])
        values = self.strategy.run(
            self._update, (images, labels, learning_rate, growth, seed, grouping_on)
        )
        values = self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)
        self.totals.assign_add(tf.concat([values, [1.0]], axis=0))
        self.steps_done.assign_add(1)
        return values

    def _replica_step(
        self, images, labels, learning_rate, growth, dropout_seed, grouping_on=True
    ) -> tf.Tensor:
        """The update on one replica, from its share of the batch; returns that one's METRICS."""
        hyper, context = self.objective, tf.distribute.get_replica_context()
        images = tf.cast(images, tf.as_dtype(hyper.precision))
        several = context.num_replicas_in_sync > 1
        if several:
            dropout_seed = tf.random.experimental.stateless_fold_in(
                dropout_seed, context.replica_id_in_sync_group
            )
        with tf.GradientTape() as tape:
            logits = self.net(images, training=True, dropout_seed=dropout_seed)
            metrics = self.loss(logits, labels, growth, grouping_on)
        variables = self.net.trainable_variables
        scales = [self._alphas.get(variable.ref(), 1.0) for variable in variables]
        # Without the regularizers nothing depends on the alphas.
        zero = tf.UnconnectedGradients.ZERO
        grads = tape.gradient(metrics["loss"], variables, unconnected_gradients=zero)
        if several:
            grads = context.all_reduce(tf.distribute.ReduceOp.MEAN, grads)
        self.optimizer.apply(zip(grads, variables, scales, strict=True), learning_rate)
        hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
        metrics["accuracy"] = tf.reduce_mean(tf.cast(hits, tf.float32))
        return tf.stack([metrics[name] for name in METRICS])

    @tf.function(autograph=False)
    def total(self, number: tf.Tensor) -> tf.Tensor:
        """Sum of the workers' numbers (float32 scalars), for what they have to agree upon."""
        return self.strategy.reduce(
            tf.distribute.ReduceOp.SUM, self.strategy.run(tf.identity, (number,)), axis=None
        )


# ---------------------------------------------------------------- rates


def fit_schedule(flags: argparse.Namespace, num_images: int) -> str:
    """Fit a schedule that was made for `schedule_for` images to another number, in `flags`.

    With more images the steps grow, so that the epochs stay. With fewer the epochs grow, so that
    the steps stay: groups need a number of steps to form, however few images there are
    (docs/grouping.md). What `flags.fixed` names was given for this very run, and stays.

    Returns:
        What was chosen and why; empty where nothing had to be.
    """
    meant_for, fixed = flags.schedule_for, flags.fixed
    if not meant_for or meant_for == num_images:
        return ""
    factor = num_images / meant_for
    words = f"schedule: made for {meant_for:,} training images, and here are {num_images:,}: "
    if factor > 1:
        whole = flags.lr_total_steps == flags.lr_first_step + flags.max_steps
        for name in {"max_steps", "lr_total_steps", "lr_first_step"} - fixed:
            if getattr(flags, name):
                setattr(flags, name, round(getattr(flags, name) * factor))
        steps = flags.lr_first_step + flags.max_steps
        if flags.lr_total_steps and (whole or flags.lr_total_steps < steps):
            flags.lr_total_steps = steps
        return words + f"as many epochs, so {factor:.3g} times the steps, {flags.max_steps:,}"
    for name in {"lr_step_epoch", "gamma2_step_epoch"} - fixed:
        setattr(flags, name, [epoch / factor for epoch in getattr(flags, name)])
    for name in {"lr_warmup_epochs", "group_start_epoch"} - fixed:
        setattr(flags, name, getattr(flags, name) / factor)
    if "batch_size" not in fixed:
        flags.batch_size = min(flags.batch_size, num_images)
    epochs = flags.max_steps * flags.batch_size / num_images
    return words + (
        f"as many steps, {flags.max_steps:,}, as groups form in steps and not in epochs; these are "
        f"{epochs:.0f} epochs of batches of {flags.batch_size}"
    )


def slow_groups(
    flags: argparse.Namespace, config: networks.Config, steps_per_epoch: float
) -> list[str]:
    """A warning where the slowest groups of a network have too few steps to get sharp
    (docs/grouping.md), or none."""
    if flags.group_equal_growth or flags.groups or not flags.gamma1:
        return []
    # A factor of e takes a matrix of two groups V D steps at a rate of 0.1, V being how many values
    # R_D is the mean of. 8 of them make a group sharp.
    shapes = grouping.indicator_shapes(config)
    times = {
        name: (len(shapes) - 1)
        * size
        * groups
        * (groups - 1)
        / 2
        * (2 if name in ("p1", "q1") else 1)
        for name, (groups, size) in shapes.items()
    }
    slowest = max(times, key=times.get)
    pace = flags.initial_lr / 0.1 * flags.gamma1 * flags.group_lr_scale
    needed = 8 * times[slowest] / pace
    end = min([flags.max_steps, *(epoch * steps_per_epoch for epoch in flags.lr_step_epoch)])
    there = end - flags.group_start_epoch * steps_per_epoch
    if needed <= there:
        return []
    scale = flags.group_lr_scale * needed / max(there, 1)
    kind = "classes" if slowest == "q1" else f"features ({slowest})"
    return [
        f"the groups of {shapes[slowest][1]:,} {kind} need about {needed:,.0f} steps to get sharp "
        f"and have {max(there, 0):,.0f} at the full rate: give --group_lr_scale {scale:.2g} or "
        "more, or more steps (docs/grouping.md)"
    ]


def stepwise(
    step: int, steps_per_epoch: float, initial: float, factor: float, epochs: Sequence[float]
) -> float:
    """Learning rate or gamma2 of step `step` (from 0): `initial`, times `factor` for each epoch
    of `epochs` that has come."""
    return initial * factor ** sum(step >= epoch * steps_per_epoch for epoch in epochs)


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
        return stepwise(step, steps_per_epoch, rate, flags.lr_decay, flags.lr_step_epoch)
    if position < warmup:
        return rate
    left = (flags.lr_total_steps - position) / (flags.lr_total_steps - warmup)
    if flags.lr_schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return flags.final_lr + (flags.initial_lr - flags.final_lr) * left
