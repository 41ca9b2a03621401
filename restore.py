"""From checkpoints to networks: what a run starts from, and whether it is complete already.

The newest checkpoint in --train_dir, else --checkpoint, else the weights of --basemodel, else new
weights. Whatever does not fit the flags ends in a ValueError that says how to mend it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence

import numpy as np

import cifar100
import grouping
import networks
import resnet
import rundir
import utils

SURE = 100.0  # alpha of the one group that a feature is given to: the shares of others are 0


# ---------------------------------------------------------------- networks out of checkpoints


def load_network(path: str, tensors: dict[str, np.ndarray] | None = None, **changes):
    """The network of a checkpoint, ours or the published code's, and what that says of itself.

    Args:
        path: of the checkpoint; a ValueError begins with it.
        tensors: of it by name, where `rundir.read_checkpoint` has read them before.
        changes: fields of the network's config to replace, such as dropout_keep_prob.
    """
    if tensors is None:
        tensors = rundir.read_checkpoint(path)
    try:
        if "description" in tensors:
            description = json.loads(tensors["description"])
            weights = {n[4:]: t for n, t in tensors.items() if n.startswith("net/")}
        else:
            description = _describe_published(tensors)
            own = [n for n in tensors if "/" in n and not n.endswith("/Momentum")]
            weights = {n: tensors[n] for n in own}
        description["config"] |= changes
        net = resnet.build(description)
        resnet.load_weights(net, weights)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its description makes no network ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return net, description


def _describe_published(tensors: dict[str, np.ndarray]) -> dict:
    """Description of a TensorFlow 1 checkpoint of the published code, from its names and shapes.

    Raises:
        ValueError: the checkpoint holds no such network.
    """
    try:
        alphas = [tensors.get(f"group/split_{name}/alpha") for name in ("p3", "p2", "p1")]
        units = [name for name in tensors if re.fullmatch(r"unit_1_\d+/conv_1/kernel", name)]
        filters = tensors["unit_1_0/conv_1/kernel"].shape[-1]
        config = resnet.NetworkConfig(
            num_residual_units=len(units),
            k=filters / 16 if filters % 16 else filters // 16,
            num_classes=tensors["logits/fc/biases"].shape[0],
            groups=[1 if alpha is None else alpha.shape[0] for alpha in alphas],
        )
    except KeyError as error:
        raise ValueError(f"no Wide ResNet in it: {error} is missing") from None
    return {"network": "dense", "config": dataclasses.asdict(config)}


def load_evaluated(path: str, masked: bool) -> tuple[resnet.Network, dict]:
    """The network of a checkpoint that is evaluated, and what that says (stage, seed, step ...).

    Args:
        masked: set the weights between different groups of a grouped network to zero.
    """
    try:
        tensors = rundir.read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}: name an older model.ckpt-STEP of the run") from None
    net, description = load_network(path, tensors)
    if masked:
        if not isinstance(net, resnet.Dense) or max(net.config.groups) == 1:
            raise ValueError(
                f"--mask needs a grouped dense network, but {path} is none: leave it out"
            )
        resnet.mask(net)
    return net, description | {"step": _step(tensors)}


def _step(tensors: dict) -> int:
    """Number of steps that a checkpoint's weights have been trained for."""
    return int(tensors.get("step", tensors.get("global_step", 0)))


def check_dataset(path: str, description: dict, data: dict, folder: str, split="train") -> None:
    """Raise ValueError where a checkpoint comes from another data set than the one in `folder`.

    Args:
        description: the checkpoint's. What it does not say, as a TensorFlow 1 checkpoint, may be.
        data: the data set's (`cifar100.describe`).
        split: the images that are to be used; only training and validation images depend on how
            the data set was divided into them (`indices_sha256`).
    """
    for key in ["dataset", *(["indices_sha256"] if split in ("train", "val") else [])]:
        trained_on, here = description.get(key), data.get(key, "")
        if trained_on not in (None, here):
            raise ValueError(
                f"{path} was trained on {description['dataset']} ({key} {trained_on}), but "
                f"{folder} holds {data['dataset']} ({key} {here}): name the data that it was "
                "trained on with --data_dir"
            )
    if description.get("class_names") not in (None, data.get("class_names")):
        raise ValueError(
            f"{path} was trained on other classes of {data['dataset']} than {folder} has by now: "
            "name the data that it was trained on with --data_dir"
        )


def check_images(path: str, net, folder: str) -> None:
    """Raise ValueError unless a network is of the number of classes and the size of the images of
    the data set in `folder`."""
    words = {"num_classes": "tells {} classes apart", "image_size": "takes images of {} pixels"}
    for name, here in cifar100.network_settings(folder).items():
        own = getattr(net.config, name)
        if own != here:
            raise ValueError(
                f"{path} {words[name].format(own)}, and the data set has {here}: name the data "
                f"that it was trained on instead of {folder}, or another network"
            )


def class_names(path: str, description: dict, number: int, data_dir: str) -> list[str]:
    """Names of the classes that a checkpoint's network tells apart, in the order of the labels.

    Args:
        number: of the classes.
        data_dir: a data set to take them from, which must be the one that it was trained on; empty:
            those that the checkpoint knows, those of CIFAR-100, or numbers.
    """
    if not data_dir:
        known = description.get("class_names")
        return known or cifar100.class_names(description.get("dataset"), number)
    data = cifar100.describe(data_dir)
    check_dataset(path, description, data, data_dir, "test")
    if len(data["class_names"]) != number:
        raise ValueError(f"{path} tells {number} classes apart, {data_dir} has others")
    return data["class_names"]


# ---------------------------------------------------------------- what a run starts from


def network_to_resume(path: str, tensors, flags: argparse.Namespace, run_info: dict):
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
    net, description = load_network(path, tensors, **changes)
    check_images(path, net, flags.data_dir)
    if description.get("stage") != flags.stage:
        raise ValueError(
            f"{path} is of stage {description.get('stage')}, not {flags.stage}: name another "
            "--train_dir or --checkpoint, or start from its weights with --basemodel"
        )
    _check_network(path, net.config, flags, also=("bn_no_scale",))
    check_dataset(path, description, run_info, flags.data_dir)
    _check_given(path, [group.tolist() for group in resnet.class_groups(net)], flags)
    _check_equal(path, net, flags)
    return net, description


def read_groups(path: str, num_groups: int, class_names: Sequence[str]) -> list[np.ndarray]:
    """The classes of every group of the classifier, from a file of --groups.

    Args:
        path: of a JSON list of groups, each a list of class names or numbers. Neighbouring groups
            are the ones that a hierarchy such as 2-4-4 merges.
        num_groups: how many there must be.

    Raises:
        ValueError: it cannot be read, or is no such list; says which group or class is wrong.
    """
    try:
        groups = utils.read_users_json(path)
    except ValueError as error:
        raise ValueError(f"--groups {error}") from None
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError(
            f"--groups {path} is to hold a list of groups, each a list of class names or numbers, "
            'such as [["apple", "pear"], [2, 3]]'
        )
    if len(groups) != num_groups:
        raise ValueError(
            f"--groups {path} holds {len(groups)} groups, but --ngroups1 is {num_groups}: change "
            "one of them"
        )
    number_of = {name: number for number, name in enumerate(class_names)}
    group_of: dict[int, int] = {}
    for index, group in enumerate(groups):
        if not group:
            raise ValueError(f"--groups {path}: group {index} (counted from 0) is empty")
        for word in group:
            number = number_of.get(word, -1) if isinstance(word, str) else word
            if type(number) is not int or not 0 <= number < len(class_names):
                raise ValueError(
                    f"--groups {path}: group {index} names the class {word!r}, which is neither a "
                    f"class of the data set nor a number from 0 to {len(class_names) - 1}"
                )
            if number in group_of:
                raise ValueError(
                    f"--groups {path} names the class {class_names[number]} twice, in group "
                    f"{group_of[number]} and in group {index} (counted from 0)"
                )
            group_of[number] = index
    missing = [name for number, name in enumerate(class_names) if number not in group_of]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"--groups {path} lacks the class {missing[0]}{others}")
    of_class = np.array([group_of[number] for number in range(len(class_names))])
    return [np.flatnonzero(of_class == index) for index in range(num_groups)]


def _given_groups(flags: argparse.Namespace, num_groups: int) -> list[np.ndarray]:
    names = cifar100.describe(flags.data_dir)["class_names"]
    return read_groups(flags.groups, num_groups, names)


def _check_given(path: str, groups: Sequence[Sequence[int]], flags: argparse.Namespace) -> None:
    """Raise ValueError where the classes of a run's groups are not those that --groups gives."""
    if not flags.groups:
        return
    given = _given_groups(flags, len(groups))
    if [list(group) for group in groups] != [group.tolist() for group in given]:
        raise ValueError(
            f"{path} is of other groups than those in {flags.groups}: name another --train_dir for "
            "these"
        )


def _check_equal(path: str, net: resnet.Network, flags) -> None:
    """Raise ValueError if --equal_groups asks for other groups than a tree has already."""
    if flags.equal_groups and any(np.ptp(np.bincount(g)) > 1 for g in net.assignment.values()):
        raise ValueError(
            f"{path} is a tree of unequal groups: leave --equal_groups out, or cut its grouped "
            "network in another --train_dir"
        )


def network_from_weights(path: str, tensors, flags: argparse.Namespace, run_info: dict):
    """The network of a new run from other weights: of the same kind, or a grouped one, cut.

    Returns:
        The network, and what the checkpoint says of itself.
    """
    changes = {name: getattr(flags, name) for name in ("dropout_keep_prob", "bn_no_scale")}
    base, description = load_network(path, tensors, **changes)
    if flags.stage != "split" and isinstance(base, resnet.Dense):
        _check_network(path, base.config, flags, groups=False)
        net = _new_network_with(base, description, flags, run_info)
        return _with_given_groups(net, flags), description
    check_dataset(path, description, run_info, flags.data_dir)
    check_images(path, base, flags.data_dir)
    grouped = max(base.config.groups) > 1
    if flags.stage == "split" and flags.groups:
        return _cut_into_given_groups(path, base, flags), description
    if flags.stage == "split":
        _check_network(path, base.config, flags)
        if not grouped:
            raise ValueError(
                f"{path} has no groups to cut: run --stage group first, or give some with --groups"
            )
        if not isinstance(base, resnet.Dense):
            _check_equal(path, base, flags)
            return base, description
        equal = grouping.equal_assignments(base) if flags.equal_groups else None
        return resnet.split(base, equal), description
    raise ValueError(f"{path} is a tree already: only stage split goes on from it")


def _with_weights_of(
    base: resnet.Dense, config: networks.Config, seed: int, new: Sequence[str] = ()
) -> resnet.Dense:
    """A dense network with another's weights, but for those whose names begin like `new`; groups
    that the other does not have start anew."""
    net = resnet.make(config, seed=seed)
    own = {resnet.name_of(variable): variable.numpy() for variable in net.variables}
    known = {resnet.name_of(variable): variable.numpy() for variable in base.variables}
    new = (*new, *(() if base.alphas else ("group/",)))
    kept = {name: value for name, value in known.items() if not name.startswith(new)}
    resnet.load_weights(net, kept | {n: value for n, value in own.items() if n.startswith(new)})
    return net


def _new_network_with(base, description: dict, flags, run_info: dict) -> resnet.Dense:
    """The network that the flags ask for with a base's weights, as far as they are of use; prints
    what starts anew: the classifier where the classes are others, and indicators."""
    config, new = network_config(flags), []
    try:
        check_dataset(flags.basemodel, description, run_info, flags.data_dir)
        others = config.num_classes != base.config.num_classes
    except ValueError:
        # Of the same classes, divided in another way: its training images may be validated here.
        if all(description.get(key) == run_info.get(key) for key in ("dataset", "class_names")):
            raise
        others = True
    if others:
        new = ["logits/", "group/"]
        print(
            f"it tells {base.config.num_classes} classes of {description.get('dataset')} apart, "
            f"this run {config.num_classes} of {run_info['dataset']}: the classifier and all "
            "indicators start anew"
        )
    elif base.alphas and base.config.groups != config.groups:
        new = ["group/"]
        shown = [grouping.format_groups(c.groups) for c in (base.config, config)]
        print("its groups are {}, not {}: all indicators start anew".format(*shown))
    return _with_weights_of(base, config, flags.seed, new)


def _with_given_groups(net: resnet.Dense, flags: argparse.Namespace) -> resnet.Dense:
    """The network of stage group, with the groups that --groups gives if it does, for good: where
    indicators are exactly 0 and 1, no gradient moves them, and only the weights follow."""
    if flags.groups:
        given = _given_groups(flags, net.config.groups[-1])
        for name, group_of in grouping.given_assignment(net.config, given).items():
            alpha = net.alphas[name]
            alpha.assign(SURE * np.eye(alpha.shape[0])[group_of].T)
    return net


def _cut_into_given_groups(path: str, base, flags: argparse.Namespace) -> resnet.Tree:
    """The tree of a baseline's weights in the class groups that --groups gives."""
    if max(base.config.groups) > 1:
        raise ValueError(f"{path} has groups of its own: --groups {flags.groups} cuts a baseline")
    _check_network(path, base.config, flags, groups=False)
    groups = _fill(flags.ngroups, len(base.config.groups))
    config = dataclasses.replace(base.config, groups=groups, dropout_unsplit=False)
    given = _given_groups(flags, config.groups[-1])
    net = _with_weights_of(base, config, flags.seed)
    return resnet.split(net, grouping.given_assignment(config, given))


def network_config(flags: argparse.Namespace) -> networks.Config:
    """The network of stage baseline or group, for the classes and images of the data set."""
    own = {} if flags.network != "wrn" else {"num_residual_units": flags.num_residual_units}
    return networks.config_class(flags.network)(
        **own,
        k=flags.k,
        groups=flags.ngroups,
        dropout_keep_prob=flags.dropout_keep_prob,
        bn_no_scale=flags.bn_no_scale,
        dropout_unsplit=flags.stage == "baseline",
        **cifar100.network_settings(flags.data_dir),
    )


def _fill(groups: Sequence[int] | None, number: int) -> tuple[int, ...] | None:
    """Groups for a network in which `number` levels can be split, maybe more than were named."""
    return groups and (1,) * (number - len(groups)) + tuple(groups)


def _check_network(path, config, flags, groups=True, also=()) -> None:
    """Raise ValueError where a checkpoint's network is not the one that the flags ask for."""
    wanted = {"network": flags.network}
    if flags.network in (None, config.network):
        wanted = {name: getattr(flags, name) for name in ("num_residual_units", "k", *also)}
        if groups:
            wanted["groups"] = _fill(flags.ngroups, len(config.groups))
    differing = [
        f"{name} is {getattr(config, name, 'not one of its settings')}, not {value}"
        for name, value in wanted.items()
        if value is not None and getattr(config, name, None) != value
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
        path = rundir.find_checkpoint(flags.basemodel)
        same = weights_sha256(rundir.read_checkpoint(path)) == sha256
    except ValueError:
        return  # it is gone: nothing needs it any more
    if not same:
        raise ValueError(
            f"{flags.train_dir} was not started from what {path} holds now: name another "
            f"--train_dir to start from it, or --checkpoint {flags.train_dir} to go on without it"
        )


def starting_point(flags: argparse.Namespace, run: rundir.Run, run_info: dict):
    """What a run starts from; prints it.

    Returns:
        The network; the checkpoint whose state is to be restored, None if there is none; and
        `run_info` with what the start adds to it: `class_groups` are those of the checkpoint that
        it comes from if that has some, `basemodel_sha256` is `weights_sha256` of --basemodel, empty
        without.

    Raises:
        ValueError: it does not fit the flags, or no checkpoint of the run can be read or is whole.
    """
    for path in run.discard_torn():
        print(f"ignoring {path}: a killed run did not finish writing it")
    for half in rundir.half_checkpoints(flags.train_dir):
        print(f"ignoring {half}")
    steps = rundir.checkpoint_steps(flags.train_dir)
    for step in reversed(steps):
        path = rundir.checkpoint_path(flags.train_dir, step)
        try:
            tensors = rundir.read_checkpoint(path)
        except ValueError as error:
            print(f"ignoring it: {error}")
            continue
        print(f"going on from {path}, step {step}")
        net, description = network_to_resume(path, tensors, flags, run_info)
        _check_basemodel(flags, description.get("basemodel_sha256"))
        return net, path, run_info | _origin(description, run_info)
    if steps:
        raise ValueError(
            f"none of the {len(steps)} checkpoints in {flags.train_dir} can be read: to "
            "start anew, name another --train_dir or move this folder away"
        )
    run.check_nothing_lost()
    if flags.checkpoint:
        path = rundir.find_checkpoint(flags.checkpoint)
        print(f"going on from {path} (--checkpoint)")
        net, description = network_to_resume(path, rundir.read_checkpoint(path), flags, run_info)
        return net, path, run_info | _origin(description, run_info)
    if flags.basemodel:
        path = rundir.find_checkpoint(flags.basemodel)
        print(f"starting from the weights of {path} (--basemodel)")
        tensors = rundir.read_checkpoint(path)
        net, description = network_from_weights(path, tensors, flags, run_info)
        description |= {"basemodel_sha256": weights_sha256(tensors)}
        if flags.lr_first_step not in (0, _step(tensors)):
            print(
                f"the learning rate goes on from step {flags.lr_first_step} (--lr_first_step), "
                f"though {path} is of step {_step(tensors)}"
            )
        return net, None, run_info | _origin(description, run_info)
    print(f"starting from new weights, seed {flags.seed}")
    net = _with_given_groups(resnet.make(network_config(flags), seed=flags.seed), flags)
    return net, None, run_info | {"basemodel_sha256": ""}


def _origin(description: dict, run_info: dict) -> dict:
    return {
        "class_groups": description.get("class_groups") or run_info["class_groups"],
        "basemodel_sha256": description.get("basemodel_sha256"),
    }


# ---------------------------------------------------------------- flags of its last start


def finished_result(flags: argparse.Namespace, dataset: dict) -> dict | None:
    """What result.json says of a run that has done all its steps already; None of any other.

    Args:
        dataset: the data set's description (`cifar100.describe`).

    Raises:
        ValueError: it did them with other flags, on another data set or from other weights, so
            that it is not what is asked for.
    """
    if rundir.checkpoint_steps(flags.train_dir)[-1:] != [flags.max_steps]:
        return None
    try:
        rundir.read_checkpoint(rundir.checkpoint_path(flags.train_dir, flags.max_steps))
        result, config = (
            utils.read_json(os.path.join(flags.train_dir, name))
            for name in ("result.json", "config.json")
        )
        before = config["flags"]
    except (ValueError, KeyError, FileNotFoundError):
        return None
    if result.get("step") != flags.max_steps:
        return None
    check_dataset(flags.train_dir, result, dataset, flags.data_dir)
    # An extension that came to nothing leaves its number of steps in config.json.
    extended = {"max_steps"}
    if all(map(_schedule_ends_with_stage, (before, vars(flags)))):
        extended.add("lr_total_steps")
    changes = _changed_flags(config, flags, besides=extended)
    if changes:
        raise ValueError(
            f"{flags.train_dir} is complete, and was trained with other flags "
            f"({'; '.join(changes)}): name another --train_dir"
        )
    _check_given(flags.train_dir, result["group_classes"], flags)
    _check_basemodel(flags, result.get("basemodel_sha256"))
    return result


def _schedule_ends_with_stage(flags: dict) -> bool:
    """Whether the length of the schedule of the rate follows from the number of steps."""
    return flags.get("lr_total_steps") == flags.get("lr_first_step", 0) + flags["max_steps"]


def _changed_flags(config: dict, flags: argparse.Namespace, besides=()) -> list[str]:
    """How the flags that numbers depend on differ from those in a run's config.json."""
    same_numbers = (
        *besides,
        "train_dir", "data_dir", "basemodel", "checkpoint", "preset", "keep", "display",
        "val_interval", "checkpoint_interval", "group_summary_interval",
        *(f"ngroups{s}" for s in range(1, 6)),  # `ngroups` is all of them
        "groups",  # a file: its groups themselves are compared
    )  # fmt: skip
    # What was left out in stage split, None, is the base network's.
    network = config.get("network", {})
    before = config.get("flags", {}) | {
        name: network[attribute]
        for name, attribute in [("k", "k"), ("num_residual_units",) * 2, ("ngroups", "groups")]
        if attribute in network
    }
    before = {"network": "wrn"} | before  # which is older than other networks without one
    now = vars(flags) | {"ngroups": _fill(flags.ngroups, len(before.get("ngroups") or ()))}
    changes = [
        (name, before[name], value)
        for name, value in json.loads(json.dumps(now)).items()
        if name not in same_numbers and name in before and value not in (None, before[name])
    ]
    return [
        f"{networks.groups_flags(len(values[0]))} {{}} -> {{}}".format(
            *map(grouping.format_groups, values)
        )
        if name == "ngroups"
        else "--{} {} -> {}".format(name, *values)
        for name, *values in changes
    ]


def print_changed_flags(path: str, flags: argparse.Namespace, step: int, num_images: int) -> None:
    """Tell which flags are not those of the run whose checkpoint this one goes on from.

    Args:
        path: of the checkpoint.
        step: of it.
        num_images: of the training set.
    """
    try:
        config = utils.read_json(os.path.join(os.path.dirname(path), "config.json"))
    except FileNotFoundError:
        return
    except ValueError as error:
        print(f"the flags of the last start are not known: {error}")
        return
    for change in _changed_flags(config, flags):
        print(f"changed since the last start: {change}")
    sizes = config.get("flags", {}).get("batch_size"), flags.batch_size
    if step and isinstance(sizes[0], int) and sizes[0] != sizes[1]:
        before, now = (step * size / num_images for size in sizes)
        print(
            f"step {step} ended epoch {before:.2f} and counts as epoch {now:.2f} from here on, for "
            f"the schedules as for the images: they go on as if every step had taken {sizes[1]}"
        )
