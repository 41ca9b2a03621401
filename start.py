"""What a run of train.py starts from, in the documented order, and whether it is complete already.

The newest checkpoint in --train_dir, else --checkpoint, else the weights of --basemodel, else new
weights. Whatever does not fit the flags ends in a ValueError that says how to mend it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os

import utils  # isort: skip, it quiets TensorFlow's start
import numpy as np

import cifar100
import class_groups
import evaluation
import grouping
import resnet


def network_to_go_on(path: str, tensors, flags: argparse.Namespace, about: dict):
    """The network of a checkpoint of the same stage, whose whole state is to be restored.

    Returns:
        The network, and what the checkpoint says of itself.
    """
    if "description" not in tensors:
        raise ValueError(
            f"{path} is a TensorFlow 1 checkpoint: start from its weights with --basemodel"
        )
    if not any(name.startswith("optimizer/") for name in tensors):
        raise ValueError(
            f"{path} holds weights without the optimizer's state: start from them with --basemodel"
        )
    changes = {"dropout_keep_prob": flags.dropout_keep_prob}
    net, description = evaluation.load_network(path, tensors, **changes)
    if description.get("stage") != flags.stage:
        raise ValueError(
            f"{path} is of stage {description.get('stage')}, not {flags.stage}: name another "
            "--train_dir or --checkpoint, or start from its weights with --basemodel"
        )
    _check_network(path, net.config, flags, also=("bn_no_scale",))
    evaluation.check_dataset(path, description, about, flags.data_dir)
    _check_given(path, description, flags)
    return net, description


def _check_given(path: str, description: dict, flags: argparse.Namespace) -> None:
    """Raise ValueError where a checkpoint's class groups are not those that --groups gives."""
    wanted, there = flags.groups, description.get("class_groups")
    if wanted == there == "random":
        wanted, there = f"random --seed {flags.seed}", f"random --seed {description.get('seed')}"
    if wanted and there and wanted != there:
        raise ValueError(
            f"{path} is of groups {there}, not {wanted}: name another --train_dir for these"
        )


def network_from_weights(path: str, tensors, flags: argparse.Namespace, about: dict):
    """The network of a new run from other weights: of the same kind, or a grouped one, cut.

    Returns:
        The network, and what the checkpoint says of itself.
    """
    changes = {name: getattr(flags, name) for name in ("dropout_keep_prob", "bn_no_scale")}
    base, description = evaluation.load_network(path, tensors, **changes)
    evaluation.check_dataset(path, description, about, flags.data_dir)
    grouped = max(base.config.groups) > 1
    if flags.stage == "split" and flags.groups:
        return _cut_as_given(path, base, flags), description
    if flags.stage == "split":
        _check_network(path, base.config, flags)
        if not grouped:
            raise ValueError(
                f"{path} has no groups to cut: run --stage group first, or give some with --groups"
            )
        tree = resnet.split(base) if isinstance(base, resnet.ResNet) else base
        return tree, description
    if not isinstance(base, resnet.ResNet):
        raise ValueError(f"{path} is a tree already: only stage split goes on from it")
    _check_network(path, base.config, flags, groups=grouped)
    return _with_weights_of(base, network_config(flags), flags.seed), description


def _with_weights_of(base: resnet.ResNet, config: resnet.NetworkConfig, seed: int) -> resnet.ResNet:
    """A dense network with another's weights; groups that the other does not have start anew."""
    net = resnet.ResNet(config, seed)
    variables = [*([] if base.alphas else net.alphas.values()), *base.variables]
    resnet.load_weights(net, {resnet.name_of(v): v.numpy() for v in variables})
    return net


def _cut_as_given(path: str, base, flags: argparse.Namespace) -> resnet.SplitResNet:
    """The tree of a baseline's weights in the class groups that --groups gives."""
    if max(base.config.groups) > 1:
        raise ValueError(f"{path} has groups of its own: --groups {flags.groups} cuts a baseline")
    _check_network(path, base.config, flags, groups=False)
    config = dataclasses.replace(base.config, groups=flags.ngroups, dropout_unsplit=False)
    if flags.groups == "semantic":
        given = class_groups.semantic(config.groups[2], cifar100.describe(flags.data_dir))
    elif flags.groups == "random":
        given = class_groups.random(config.groups[2], config.num_classes, flags.seed)
    else:
        classifier = base.logits.fc.weights.numpy()
        given = class_groups.clustering(config.groups, classifier, flags.seed)
    net = _with_weights_of(base, config, flags.seed)
    return resnet.split(net, grouping.given_assignment(config, given))


def network_config(flags: argparse.Namespace) -> resnet.NetworkConfig:
    """The network of stage baseline or group."""
    return resnet.NetworkConfig(
        num_residual_units=flags.num_residual_units,
        k=flags.k,
        num_classes=cifar100.NUM_CLASSES,
        groups=flags.ngroups,
        dropout_keep_prob=flags.dropout_keep_prob,
        bn_no_scale=flags.bn_no_scale,
        dropout_unsplit=flags.stage == "baseline",
    )


def _check_network(path, config, flags, groups=True, also=()) -> None:
    """Raise ValueError where a checkpoint's network is not the one that the flags ask for."""
    wanted = {name: getattr(flags, name) for name in ("num_residual_units", "k", *also)}
    if groups:
        wanted["groups"] = flags.ngroups
    differing = [
        f"{name} is {getattr(config, name)}, not {value}"
        for name, value in wanted.items()
        if value is not None and getattr(config, name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} holds another network ({'; '.join(differing)}): change the flags to match "
            "it, or name another run"
        )


def weights_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Of a checkpoint's weights and statistics: the same with an optimizer and without."""
    names = [name for name in sorted(tensors) if name.startswith("net/")] or sorted(tensors)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _check_basemodel(flags: argparse.Namespace, sha256: str | None) -> None:
    """Raise ValueError if --basemodel holds other weights by now than a run was started from.

    Args:
        sha256: of those weights; empty if there were none, None of a run that does not know.
    """
    if not flags.basemodel or flags.checkpoint or sha256 is None:
        return
    try:
        path = utils.find_checkpoint(flags.basemodel)
        same = weights_sha256(utils.read_checkpoint(path)) == sha256
    except ValueError:
        return  # it is gone: nothing needs it any more
    if not same:
        raise ValueError(
            f"{flags.train_dir} was not started from what {path} holds now: name another "
            f"--train_dir to start from it, or --checkpoint {flags.train_dir} to go on without it"
        )


def find(flags: argparse.Namespace, run: utils.Run, about: dict):
    """What a run starts from; prints it.

    Returns:
        The network; the checkpoint whose state is to be restored, None if there is none; and
        `about` with what the start adds to it: `class_groups` are those of the checkpoint that it
        comes from if that has some, `basemodel_sha256` is `weights_sha256` of --basemodel, empty
        without.

    Raises:
        ValueError: it does not fit the flags, or no checkpoint of the run can be read or is whole.
    """
    for path in run.discard_torn():
        print(f"ignoring {path}: a killed run did not finish writing it")
    for half in utils.half_checkpoints(flags.train_dir):
        print(f"ignoring {half}")
    steps = utils.checkpoint_steps(flags.train_dir)
    for step in reversed(steps):
        path = utils.checkpoint_path(flags.train_dir, step)
        try:
            tensors = utils.read_checkpoint(path)
        except ValueError as error:
            print(f"ignoring it: {error}")
            continue
        print(f"going on from {path}, step {step}")
        net, description = network_to_go_on(path, tensors, flags, about)
        _check_basemodel(flags, description.get("basemodel_sha256"))
        return net, path, about | _origin(description, about)
    if steps:
        raise ValueError(
            f"none of the {len(steps)} checkpoints in {flags.train_dir} can be read: to "
            "start anew, name another --train_dir or move this folder away"
        )
    run.check_nothing_lost()
    if flags.checkpoint:
        path = utils.find_checkpoint(flags.checkpoint)
        print(f"going on from {path} (--checkpoint)")
        net, description = network_to_go_on(path, utils.read_checkpoint(path), flags, about)
        return net, path, about | _origin(description, about)
    if flags.basemodel:
        path = utils.find_checkpoint(flags.basemodel)
        print(f"starting from the weights of {path} (--basemodel)")
        tensors = utils.read_checkpoint(path)
        net, description = network_from_weights(path, tensors, flags, about)
        description |= {"basemodel_sha256": weights_sha256(tensors)}
        return net, None, about | _origin(description, about)
    print(f"starting from new weights, seed {flags.seed}")
    net = resnet.ResNet(network_config(flags), flags.seed)
    return net, None, about | {"basemodel_sha256": ""}


def _origin(description: dict, about: dict) -> dict:
    return {
        "class_groups": description.get("class_groups") or about["class_groups"],
        "basemodel_sha256": description.get("basemodel_sha256"),
    }


# ---------------------------------------------------------------- flags of its last start


def complete_result(flags: argparse.Namespace, about: dict) -> dict | None:
    """What result.json says of a run that has done all its steps already; None of any other.

    Args:
        about: the data set's description (`cifar100.describe`).

    Raises:
        ValueError: it did them with other flags, on another data set or from other weights, so
            that it is not what is asked for.
    """
    if utils.checkpoint_steps(flags.train_dir)[-1:] != [flags.max_steps]:
        return None
    try:
        utils.read_checkpoint(utils.checkpoint_path(flags.train_dir, flags.max_steps))
        result, config = (
            utils.read_json(os.path.join(flags.train_dir, name))
            for name in ("result.json", "config.json")
        )
    except (ValueError, FileNotFoundError):
        return None
    if result.get("step") != flags.max_steps:
        return None
    evaluation.check_dataset(flags.train_dir, result, about, flags.data_dir)
    # An extension that came to nothing leaves its number of steps in config.json.
    changes = _changed_flags(config, flags, besides=("max_steps",))
    if changes:
        raise ValueError(
            f"{flags.train_dir} is complete, and was trained with other flags "
            f"({'; '.join(changes)}): name another --train_dir"
        )
    _check_basemodel(flags, result.get("basemodel_sha256"))
    return result


def _changed_flags(config: dict, flags: argparse.Namespace, besides=()) -> list[str]:
    """How the flags that numbers depend on differ from those in a run's config.json."""
    same_numbers = (
        *besides,
        "train_dir", "data_dir", "basemodel", "checkpoint", "preset", "keep", "display",
        "val_interval", "checkpoint_interval", "group_summary_interval",
        "ngroups1", "ngroups2", "ngroups3",  # `ngroups` is all of them
    )  # fmt: skip
    # What was left out in stage split, None, is the base network's.
    network = config.get("network", {})
    before = config.get("flags", {}) | {
        name: network[attribute]
        for name, attribute in [("k", "k"), ("num_residual_units",) * 2, ("ngroups", "groups")]
        if attribute in network
    }
    return [
        f"--{name} {before[name]} -> {value}"
        for name, value in json.loads(json.dumps(vars(flags))).items()
        if name not in same_numbers and name in before and value not in (None, before[name])
    ]


def say_changes(path: str, flags: argparse.Namespace, step: int, num_images: int) -> None:
    """Tell which flags are not those of the run's last start.

    Args:
        path: of its config.json.
        step: that it goes on from.
        num_images: of the training set.
    """
    try:
        config = utils.read_json(path)
    except ValueError as error:
        print(f"the flags of the last start are not known: {error}")
        return
    for change in _changed_flags(config, flags):
        print(f"changed since the last start: {change}")
    sizes = config.get("flags", {}).get("batch_size"), flags.batch_size
    if isinstance(sizes[0], int) and sizes[0] != sizes[1]:
        before, now = (step * size / num_images for size in sizes)
        print(
            f"step {step} ended epoch {before:.2f} and counts as epoch {now:.2f} from here on, for "
            f"the schedules as for the images: they go on as if every step had taken {sizes[1]}"
        )
