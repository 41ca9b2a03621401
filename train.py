"""Train one of the three stages of SplitNet (Algorithm 1 of the paper).

    baseline   a Wide ResNet, or another --network, nothing split
    group      weights and group assignments together; eq. (1) with the regularizers of eq. (2)
    split      cut the grouped network (--basemodel) into its tree and finetune that

The same command goes on after an interruption, and ends with what it would have ended with. What a
run starts from is printed: the newest checkpoint in --train_dir, else --checkpoint, else the
weights of --basemodel, else new weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out
import cifar100
import networks
import utils
from parallel import devices

STAGES = ("baseline", "group", "split")
SCHEDULES = ("step", "linear", "cosine")


# ---------------------------------------------------------------- flags


def _flag_table() -> list[tuple]:
    """(name, type, default, stages that it applies to, help) of every flag."""
    count, positive = utils.number(int, low=1), utils.number(float, above=0)
    weight, grouped = utils.number(float, low=0), ("group",)
    return [
        ("train_dir", utils.path, None, STAGES, "the run's folder: checkpoints, metrics, result"),
        ("data_dir", utils.path, "data/cifar100", STAGES,
         "the folder in which download_cifar100.py put the data"),
        ("batch_size", count, 90, STAGES, "number of images in a step"),
        ("network", str, "wrn", STAGES,
         f"the network: {', '.join(networks.NETWORKS)}; in split the base's"),
        ("num_residual_units", count, 2, STAGES,
         "residual blocks in each of the three stages of a wrn (2: WRN-16); in split the base's"),
        ("k", utils.factor, 8, STAGES,
         "widening factor; resnet18's is 2 and alexnet's 1 by default; in split the base's"),
        ("ngroups1", count, 1, ("group", "split"),
         "number of groups of the classifier (1: not split); in split all are the base's, unless "
         "one is given"),
        ("ngroups2", count, 1, ("group", "split"),
         "number of groups of unit_3 (resnet18: conv5, alexnet: fc7), likewise"),
        ("ngroups3", count, 1, ("group", "split"),
         "number of groups of unit_2 (resnet18: conv4, alexnet: fc6), likewise"),
        ("ngroups4", count, 1, ("group", "split"), "number of groups of alexnet's conv5, likewise"),
        ("ngroups5", count, 1, ("group", "split"), "number of groups of alexnet's conv4, likewise"),
        ("groups", utils.path, "", ("group", "split"),
         "JSON file of class groups to cut a baseline into, or in stage group to train into "
         "(experiments/variants.py makes some)"),
        ("equal_groups", utils.boolean, False, ("split",),
         "cut into groups of equal size, with the largest sum of log shares"),
        ("l2_weight", weight, 1e-4, STAGES,
         "weight decay, twice the lambda of eq. (1): it stands before half the squared weights"),
        ("gamma1", weight, 1.0, grouped, "weight of overlap (R_D, eq. 5): makes groups disjoint"),
        ("gamma2", weight, 1.0, grouped, "weight of weight_split (R_W, eq. 4): empties the cut"),
        ("gamma2_step_epoch", _epochs, [], grouped, "epochs at which gamma2 grows, such as 10"),
        ("gamma2_growth", utils.number(float, above=0, high=1e6), 10.0, grouped,
         "factor by which gamma2 grows each time"),
        ("gamma3", weight, 10.0, grouped, "weight of uniform (R_E, eq. 6): balances the groups"),
        ("dropout_keep_prob", utils.number(float, above=0, high=1), 1.0, STAGES,
         "share of the inputs of split layers that dropout keeps (baseline: of unit_2 and on)"),
        ("momentum", utils.number(float, low=0, below=1), 0.9, STAGES, "momentum of the optimizer"),
        ("nesterov", utils.boolean, False, STAGES, "use Nesterov's momentum"),
        ("label_smoothing", utils.number(float, low=0, below=1), 0.0, STAGES,
         "share of each label that is spread evenly over all classes"),
        ("bn_no_scale", utils.boolean, False, STAGES,
         "do not train the scale (gamma) of the blocks' batch normalization"),
        ("weighted_group_loss", utils.boolean, True, grouped,
         "weight each layer's R_W by its own value, instead of all layers alike"),
        ("initial_lr", positive, 0.1, STAGES, "learning rate at first, after the warm-up"),
        ("lr_step_epoch", _epochs, [], STAGES,
         "epochs at which the learning rate of schedule step drops, such as 240,300"),
        ("lr_decay", utils.number(float, above=0, high=1), 0.1, STAGES,
         "factor by which the learning rate of schedule step drops each time"),
        ("lr_schedule", str, "step", STAGES,
         f"how the learning rate falls: {', '.join(SCHEDULES)} (step: by its drops, as published)"),
        ("final_lr", weight, 0.0, STAGES,
         "learning rate at the end of a linear or cosine schedule"),
        ("lr_warmup_epochs", weight, 0.0, STAGES,
         "number of epochs in which the learning rate first rises from 0"),
        ("lr_total_steps", count, None, STAGES,
         "length of a linear or cosine schedule in steps (default: to the end of this stage)"),
        ("lr_first_step", utils.number(int, low=0), 0, STAGES,
         "number of its steps that earlier stages have taken, where stages share a schedule"),
        ("max_steps", count, 200000, STAGES, "number of steps, of all starts of this run together"),
        ("display", count, 100, STAGES, "number of steps between two lines of progress"),
        ("val_interval", count, 1000, STAGES, "number of steps between two validations"),
        ("checkpoint_interval", count, 5000, STAGES, "number of steps between two checkpoints"),
        ("group_summary_interval", count, 1000, grouped,
         "number of steps between two records of how sharp and how large the groups are"),
        ("basemodel", utils.path, "", STAGES, "run or checkpoint whose weights to start from"),
        ("checkpoint", utils.path, "", STAGES,
         "run or checkpoint to go on from: weights, momentum, step"),
        ("seed", utils.number(int, low=0, below=2**31), 0, STAGES,
         "seed of initialization, order, augmentation and dropout"),
        ("precision", str, "float32", STAGES,
         f"precision of the convolutions: {' or '.join(utils.PRECISIONS)}"),
        ("deterministic", utils.boolean, False, STAGES,
         "use TensorFlow's deterministic operations"),
        ("keep", count, 3, STAGES, "number of newest checkpoints to keep, besides the best"),
        ("group_lr_scale", positive, 1.0, grouped, "factor of the learning rate of the alphas"),
        ("group_start_epoch", weight, 0.0, grouped,
         "epoch at which groups start to form: until then the gammas count as 0"),
        ("group_equal_growth", utils.boolean, False, grouped,
         "let groups grow alike, few or many, of a small or a large layer"),
        ("devices", utils.names, [], STAGES,
         "share each batch out over devices, such as /GPU:0,/GPU:1"),
        ("jit_compile", utils.boolean, False, STAGES, "compile the step with XLA, on one device"),
        ("preset", str, "", STAGES, "name of this set of flags, which result.json repeats"),
        ("schedule_for", count, None, STAGES,
         "number of training images that the steps and epochs BEFORE this flag are meant for: with "
         "more images the steps grow, with fewer the epochs"),
    ]  # fmt: skip


def _last(words: Sequence[str], word: str) -> int:
    """Where a word stands last; behind all where it does not."""
    return max((place for place, other in enumerate(words) if other == word), default=len(words))


def _epochs(text: str) -> list[float]:
    """`'240,300'` -> `[240.0, 300.0]`."""
    epoch = utils.number(float, above=0)
    epochs = [epoch(part) for part in text.split(",") if part.strip()]
    if epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"expected ascending epochs such as 240,300, got {text!r}")
    return epochs


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of a run, checked against each other; `ngroups` is (unit_2, unit_3, logits).

    A mistake ends the program with one line. In stage split, `network`, `k`, `num_residual_units`
    and `ngroups` are None where they were not given: the cut network's hold.
    """
    table = _flag_table()
    parser = utils.FlagParser(__doc__, needed=("stage", "train_dir"))
    parser.add_argument("--stage", choices=STAGES, help=" | ".join(STAGES))
    for name, kind, default, stages, text in table:
        shown = f" (default: {default})" if default not in (None, "", []) else ""
        only = f" [{' and '.join(stages)} only]" if stages != STAGES else ""
        # None tells a flag that was not given.
        optional = {"nargs": "?", "const": True} if kind is utils.boolean else {}
        parser.add_argument(f"--{name}", type=kind, help=text + shown + only, **optional)
    flags = parser.parse_args(argv)
    # What stands behind --schedule_for is meant for the data set at hand.
    words = [word.split("=")[0] for word in argv]
    flags.fixed = {word.removeprefix("--") for word in words[_last(words, "--schedule_for") :]}
    given = {name for name, *_ in table if getattr(flags, name) is not None}
    for name, _, default, stages, _ in table:
        if name in given and flags.stage not in stages:
            parser.error(
                f"--{name} has no effect in stage {flags.stage}: leave it out, or use --stage "
                + " or ".join(stages)
            )
        if name not in given:
            setattr(flags, name, default)
    _check_flags(parser, flags, given)
    return flags


def _check_flags(parser: utils.FlagParser, flags: argparse.Namespace, given: set[str]) -> None:
    """Contradictions between flags; sets `flags.ngroups`."""
    if flags.precision not in utils.PRECISIONS:
        known = " or ".join(utils.PRECISIONS)
        parser.error(f"--precision must be {known}, got {flags.precision!r}")
    if flags.jit_compile and (len(flags.devices) > 1 or devices.read_tf_config()):
        several = "--devices" if len(flags.devices) > 1 else "TF_CONFIG"
        parser.error(f"--jit_compile compiles for one device: leave it or {several} out")
    _check_schedule(parser, flags, given)
    if flags.nesterov and not flags.momentum:
        parser.error("--nesterov is a kind of momentum, and --momentum is 0: leave one of them out")
    _check_network(parser, flags, given)
    if flags.groups and max(flags.ngroups or (1,)) == 1:
        parser.error(f"--groups {flags.groups} needs their numbers: set --ngroups1 to 2 or more")
    if flags.stage == "split":
        if flags.equal_groups and flags.groups:
            parser.error("--equal_groups and --groups exclude each other: leave one of them out")
        if not flags.basemodel and not flags.checkpoint:
            parser.error("stage split cuts a grouped network: name its run with --basemodel")
    elif flags.stage == "group" and max(flags.ngroups) == 1:
        parser.error(
            f"stage group needs groups, but {networks.groups_flags(len(flags.ngroups))} are "
            f"{networks.format_groups(flags.ngroups)}: set --ngroups1 to 2 or more, or use --stage "
            "baseline"
        )


def _check_network(parser: utils.FlagParser, flags: argparse.Namespace, given: set[str]) -> None:
    """Contradictions between the flags of the network; sets `flags.ngroups`."""
    if flags.network not in networks.NETWORKS:
        known = ", ".join(networks.NETWORKS)
        parser.error(f"--network must be one of {known}, got {flags.network!r}")
    kind = networks.config_class(flags.network)
    named = [s for s in range(1, 6) if f"ngroups{s}" in given]
    of_base = flags.stage == "split" and "network" not in given
    number = max([3, *named]) if of_base else len(kind.groups)
    if named and max(named) > number:
        parser.error(
            f"--ngroups{max(named)} is of a network that can be split in so many levels, and "
            f"{flags.network} can in {number}: leave it out, or give --network alexnet"
        )
    ngroups = (flags.ngroups5, flags.ngroups4, flags.ngroups3, flags.ngroups2, flags.ngroups1)
    flags.ngroups = ngroups[-number:]
    if not hasattr(kind, "num_residual_units"):
        if flags.num_residual_units != networks.NetworkConfig.num_residual_units:  # group.sh's own
            parser.error(
                f"--num_residual_units is for --network wrn, not {flags.network}: leave it out"
            )
        flags.num_residual_units = None
    if "k" not in given:
        flags.k = kind.k
    settings = {name: getattr(flags, name) for name in ("k", "num_residual_units")}
    settings["groups"] = flags.ngroups
    if flags.stage == "split":
        if not named:
            flags.ngroups = None
        for name in {"network", "k", "num_residual_units"} - given:
            setattr(flags, name, None)
    try:
        if of_base:  # of which nothing is known yet
            names = [f"--ngroups{s}" for s in range(number, 0, -1)]
            networks.check_nesting(settings["groups"], names)
        else:
            settings |= cifar100.network_settings(flags.data_dir)
            kind(**{name: v for name, v in settings.items() if v is not None})
    except ValueError as error:
        names = [f"--ngroups{number - i} is {n}" for i, n in enumerate(kind.levels[-number:])]
        tells = str(error).startswith("groups") and not of_base
        parser.error(f"{error} [{', '.join(names)}]" if tells else str(error))


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


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    from training import loop  # loads TensorFlow, for which a mistake in the flags need not wait

    return loop.run(flags)


if __name__ == "__main__":
    utils.run_main(main)
