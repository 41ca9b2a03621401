"""Where a network computes: one device, several, or other machines.

A tree's branches exchange nothing, so that each device can take some of them. A dense network has
no such cut: `Horizontal` and `Vertical` are the two ways that the paper compares with (Table 5).
Every class here is called as the network is, images in and logits out, and tells in
`device_flops` what it gives each device to do.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import grpc
import numpy as np
import tensorflow as tf

import resnet

PLACEMENTS = ("single", "branch", "hybrid")
PATIENCE = 20  # seconds without an answer after which another machine counts as lost


# ---------------------------------------------------------------- devices of this machine


def find_devices(names: Sequence[str]) -> list[str]:
    """TensorFlow's names of devices; CPUs beyond the first are made, as logical devices.

    Raises:
        ValueError: one of them is not there; names those that are.
    """
    wanted = []
    for name in names:
        match = re.fullmatch(r"/?(?:DEVICE:)?([A-Z]+):(\d{1,2})", name.strip().upper())
        if not match:
            raise ValueError(f"--devices are names such as /GPU:0,/GPU:1, got {name!r}")
        wanted.append((match[1], int(match[2])))
    cpus = 1 + max((index for kind, index in wanted if kind == "CPU"), default=0)
    if cpus > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * cpus,
        )
    there = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    for (kind, index), name in zip(wanted, names, strict=True):
        if f"{kind}:{index}" not in there:
            raise ValueError(f"device {name} is not there: there are /{', /'.join(there)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--devices {','.join(names)} name a device twice")
    return [f"/{kind}:{index}" for kind, index in wanted]


def default_device() -> str:
    """Name of the device that TensorFlow uses where none is named."""
    gpus = tf.config.list_logical_devices("GPU")
    return "/GPU:0" if gpus else "/CPU:0"


def _copy_to(device: str | None, net: resnet.ResNet | resnet.SplitResNet):
    """The same network on another device (None: on TensorFlow's first), its weights constant."""
    with tf.device(device):
        copy = resnet.copy(net)
    resnet.freeze(copy)
    return copy


# ---------------------------------------------------------------- training on several


def strategy(names: Sequence[str]) -> tf.distribute.Strategy | None:
    """How training is spread: over devices, or over the workers of TF_CONFIG; None: it is not.

    To be called before TensorFlow's first operation.

    Raises:
        ValueError: a device is not there, or TF_CONFIG cannot be used.
    """
    if not os.environ.get("TF_CONFIG"):
        return tf.distribute.MirroredStrategy(find_devices(names)) if names else None
    if names:
        raise ValueError("TF_CONFIG is set: each worker uses all its GPUs, so leave --devices out")
    try:
        cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
        if list(cluster) != ["worker"] or len(cluster["worker"]) < 2:
            raise ValueError("its cluster is not of two or more workers")
        print(f"waiting for the workers {', '.join(cluster['worker'])}", flush=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may take long: Ctrl-C ends it
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        finally:
            signal.signal(signal.SIGINT, handler)
    except (ValueError, KeyError, TypeError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            f"TF_CONFIG cannot be used ({_first_line(error)}): it is a JSON object such as "
            '{"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": "worker", '
            '"index": 0}}, or unset'
        ) from None


def is_chief(spread: tf.distribute.Strategy | None) -> bool:
    """Whether this process is the one that writes a run's files: of several workers, the first."""
    resolver = getattr(spread, "cluster_resolver", None)
    return resolver is None or resolver.task_id == 0


# ---------------------------------------------------------------- a tree on several devices


class PlacedTree:
    """A tree on several devices.

    `branch`: each device computes the trunk and its own branches for the whole batch, and only
    logits travel (the paper's scheme). `hybrid`: each device computes the trunk for its share of
    the batch, the features are exchanged once, and each computes its own branches for the whole
    batch. Neighbouring leaves share a device where there are fewer devices.

    Raises:
        ValueError: the network has no branches.
    """

    def __init__(self, tree: resnet.SplitResNet, devices: Sequence[str], hybrid: bool):
        if not tree.num_branches:
            raise ValueError(
                "only a tree has branches to place: run split.sh, or --placement single"
            )
        self.devices, self.hybrid = devices, hybrid
        self.copies = [_copy_to(device, tree) for device in devices]
        owners = self._owners(tree)
        self.leaves = [
            [leaf for leaf, owner in zip(copy.leaves(), owners, strict=True) if owner == number]
            for number, copy in enumerate(self.copies)
        ]

    def _owners(self, tree: resnet.SplitResNet) -> list[int]:
        """Number of the device of each leaf: runs of neighbours with about equal FLOPs."""
        flops = np.array([
            resnet.count(branch)[1] / len(list(branch.leaves()))
            for branch in tree.branches
            for _ in branch.leaves()
        ])  # fmt: skip
        middle = np.cumsum(flops) - flops / 2
        return (middle / flops.sum() * len(self.devices)).astype(int).tolist()

    @property
    def device_flops(self) -> list[float]:
        """FLOPs per image of each device."""
        trunk_share = 1 / len(self.devices) if self.hybrid else 1
        return [
            trunk_share * copy.own_flops() + sum(_flops(b, leaves) for b in copy.branches)
            for copy, leaves in zip(self.copies, self.leaves, strict=True)
        ]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, 32, 32, 3]`."""
        logits = self._hybrid(images) if self.hybrid else self._branch(images)
        with tf.device(self.devices[0]):
            return self.copies[0].in_label_order(logits)[: tf.shape(images)[0]]

    def _branch(self, images) -> list[tf.Tensor]:
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            if leaves:
                with tf.device(device):
                    logits += copy.leaf_logits(tf.identity(images), wanted=leaves)
        return logits

    def _hybrid(self, images) -> list[tf.Tensor]:
        shares = []  # of each device: what every branch reads, for a part of the batch
        parts = _split_batch(images, len(self.devices))
        for device, copy, part in zip(self.devices, self.copies, parts, strict=True):
            with tf.device(device):
                shares.append(copy.fork(copy.features(tf.identity(part))))
        logits = []
        for device, copy, leaves in zip(self.devices, self.copies, self.leaves, strict=True):
            for place, branch in enumerate(copy.branches):
                if any(leaf in leaves for leaf in branch.leaves()):
                    with tf.device(device):
                        x = tf.concat([share[place] for share in shares], axis=0)
                        logits += branch.leaf_logits(x, wanted=leaves)
        return logits


def _flops(branch: resnet.Branch, leaves: list[resnet.Branch]) -> int:
    """FLOPs per image of what leads from a branch's input to those of its leaves."""
    if not any(leaf in leaves for leaf in branch.leaves()):
        return 0
    return branch.own_flops() + sum(_flops(child, leaves) for child in branch.branches)


def _split_batch(images: tf.Tensor, number: int) -> list[tf.Tensor]:
    """`number` equal parts of a batch, with empty images at the end if it is not a multiple.

    The logits of these are to be dropped. (TensorFlow's kernels fail on parts without images.)
    """
    missing = tf.math.floormod(-tf.shape(images)[0], number)
    return tf.split(tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]]), number)


# ---------------------------------------------------------------- a dense network on several


class Vertical:
    """A dense network whose layers are shared out: each device computes a run of them.

    The batch flows through in parts, so that a device works on one while the next device works on
    the part before; a device takes one part at a time.
    """

    PARTS_PER_DEVICE = 2

    def __init__(self, net: resnet.ResNet, devices: Sequence[str]):
        self.devices = devices
        flops = [resnet.count(module)[1] for module in (net.init_conv, *net.blocks, net.logits.fc)]
        middle = np.cumsum(flops) - np.array(flops) / 2
        owners = (middle / sum(flops) * len(devices)).astype(int)
        self.device_flops = np.bincount(owners, flops, len(devices)).tolist()
        self.runs = []  # of each device: what it applies, one after the other
        for number, device in enumerate(devices):
            copy = _copy_to(device, net)
            steps = (copy.init_conv, *copy.blocks, copy.head)
            self.runs.append([s for s, owner in zip(steps, owners, strict=True) if owner == number])

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, 32, 32, 3]`."""
        logits, done = [], [[] for _ in self.devices]  # done: each device's last part
        for x in _split_batch(images, self.PARTS_PER_DEVICE * len(self.devices)):
            for number, (device, run) in enumerate(zip(self.devices, self.runs, strict=True)):
                with tf.device(device), tf.control_dependencies(done[number]):
                    x = tf.identity(x)
                    for step in run:
                        x = step(x)
                done[number] = [x]
            logits.append(x)
        return tf.concat(logits, axis=0)[: tf.shape(images)[0]]


class Horizontal:
    """A dense network whose every layer's outputs are shared out over the devices.

    Each device computes its share of a layer's filters from all of the layer's inputs, so that the
    features are exchanged before every convolution.
    """

    def __init__(self, net: resnet.ResNet, devices: Sequence[str]):
        self.net, self.devices = net, devices
        self.shares = []  # of each device: its part of every layer, by the layer's name
        for number, device in enumerate(devices):
            with tf.device(device):
                share = {
                    resnet.path_of(layer): self._part(layer, number) for layer in resnet.layers(net)
                }
            self.shares.append(share)
        self.device_flops = [
            sum(part.count()[1] for part in share.values()) for share in self.shares
        ]

    def _part(self, layer, number):
        """What device `number` computes of a layer: that much of its output channels."""

        def mine(channels):
            return np.array_split(channels, len(self.devices))[number]

        name = resnet.path_of(layer)
        if isinstance(layer, resnet.Conv):
            size, outputs = layer.kernel.shape[0], mine(layer.outputs)
            part = resnet.Conv(name, size, layer.inputs, outputs, layer.resolution, layer.stride)
        elif isinstance(layer, resnet.BatchNorm):
            part = resnet.BatchNorm(name, mine(layer.channels))
        else:
            part = resnet.Linear(name, layer.inputs, mine(layer.outputs))
        part.cut(layer)
        resnet.freeze(part)
        return part

    def _on_each(self, function, *values) -> list[tf.Tensor]:
        """`function(share, value ...)` on every device."""
        results = []
        for device, share, *own in zip(self.devices, self.shares, *values, strict=True):
            with tf.device(device):
                results.append(function(share, *own))
        return results

    def _apply(self, layer, inputs) -> list[tf.Tensor]:
        """Each device's outputs of a layer from all of its inputs."""
        path = resnet.path_of(layer)
        return self._on_each(lambda share, x: share[path](x), inputs)

    def _normalize(self, layer, parts) -> list[tf.Tensor]:
        """ReLU of batch normalization: it needs no other device's channels."""
        path = resnet.path_of(layer)
        return self._on_each(lambda share, x: tf.nn.relu(share[path](x, False)), parts)

    def _exchange(self, parts) -> list[tf.Tensor]:
        """All devices' channels on every device."""
        return self._on_each(lambda _: tf.concat(parts, axis=-1))

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Logits float32 `[B, num_classes]` of images `[B, 32, 32, 3]`."""
        net = self.net
        x = self._apply(net.init_conv, self._exchange([images]))
        for block in net.blocks:
            h = self._normalize(block.bn_1, x)
            whole = self._exchange(h)
            y = self._normalize(block.bn_2, self._apply(block.conv_1, whole))
            y = self._apply(block.conv_2, self._exchange(y))
            shortcut = h if block.first else x
            if block.shortcut is not None:
                shortcut = self._apply(block.shortcut, whole)
            x = self._on_each(lambda _, a, b: a + b, y, shortcut)
        x = self._normalize(net.unit_last.bn, x)
        x = self._on_each(lambda _, a: tf.reduce_mean(tf.cast(a, tf.float32), axis=(1, 2)), x)
        return self._exchange(self._apply(net.logits.fc, self._exchange(x)))[0]


# ---------------------------------------------------------------- choosing


def place(net: resnet.ResNet | resnet.SplitResNet, devices: Sequence[str], placement: str):
    """Something that is called like `net` and computes the same on the given devices."""
    if placement != "single":
        return PlacedTree(net, devices, hybrid=placement == "hybrid")
    if not devices:
        return _copy_to(None, net)
    copy = _copy_to(devices[0], net)

    def on_device(images):
        with tf.device(devices[0]):
            return copy(images)

    return on_device


# ---------------------------------------------------------------- other machines


def serve(port: int) -> None:
    """Offer this machine's devices on a port to `connect` of any machine, until it is ended.

    Raises:
        ValueError: the port cannot be used.
    """
    try:
        server = tf.distribute.Server({"worker": [f"localhost:{port}"]}, "worker", 0)
    except tf.errors.OpError as error:
        raise ValueError(
            f"port {port} cannot be used ({_first_line(error)}): name another with --worker"
        ) from None
    devices = ", ".join(device.name for device in tf.config.list_logical_devices())
    print(f"serving {devices} on port {port}; Ctrl-C ends it", flush=True)
    threading.Event().wait()  # server.join() would not let Ctrl-C through
    del server


def connect(addresses: Sequence[str]) -> list[str]:
    """Names of one device of each worker: its first GPU, else its CPU.

    Raises:
        ValueError: an address is not host:port, is named twice, or no worker answers there.
    """
    resolved = set()
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) >= 2**16:
            raise ValueError(f"--cluster takes host:port,host:port, got {address!r}")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            resolved.add(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4])
        except OSError as error:
            raise ValueError(f"--cluster names {address}: {error}") from None
        if not _answers(address, PATIENCE / 2):
            raise ValueError(
                f"no worker answers at {address}: start one there with "
                f"`python eval.py --worker {port}`"
            )
    if len(resolved) < len(addresses):
        raise ValueError(f"--cluster {','.join(addresses)} names a worker twice")
    if len({_is_loopback(worker) for worker in resolved}) > 1:
        raise ValueError(
            f"--cluster {','.join(addresses)} names this machine by an address that the others "
            "cannot reach: name it by the one that they see"
        )
    # TensorFlow would call this process localhost, where no other machine finds it.
    here = tf.train.ClusterSpec({"worker": list(addresses), "localhost": [_own_address(resolved)]})
    tf.config.experimental_connect_to_cluster(here, job_name="localhost", task_index=0)
    there, devices = tf.config.list_logical_devices(), []
    for task in range(len(addresses)):
        mine = [d.name for d in there if f"/job:worker/replica:0/task:{task}/" in d.name]
        devices.append(next((name for name in mine if "GPU" in name), mine[0]))
    return devices


def _own_address(workers: set[tuple]) -> str:
    """host:port of this machine as the workers see it; the port is free."""
    host = "localhost"
    for worker in workers:
        if not _is_loopback(worker):
            with socket.create_connection(worker[:2], timeout=PATIENCE / 2) as there:
                host = there.getsockname()[0]
    host = f"[{host}]" if ":" in host else host
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def _is_loopback(address: tuple) -> bool:
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


def _answers(address: str, seconds: float) -> bool:
    """Whether a gRPC server, which every worker is, greets at an address within some seconds."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            return False
    return True


class Watch:
    """Ends the program with one line when a worker of `connect` no longer answers.

    A worker that died breaks what is being computed on it, and TensorFlow raises. One that hangs,
    or whose machine has gone, does not: greeting each again and again tells. A worker that
    computes for long still answers.
    """

    def __init__(self, addresses: Sequence[str]):
        self._over = threading.Event()
        for address in addresses:
            threading.Thread(target=self._greet, args=(address,), daemon=True).start()

    def _greet(self, address: str) -> None:
        while not self._over.wait(1):
            if not _answers(address, PATIENCE) and not self._over.is_set():
                print(f"eval.py: error: {lost([address])}", file=sys.stderr, flush=True)
                os._exit(1)  # whatever waits for that worker would wait for ever

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_) -> None:
        self._over.set()


def lost(addresses: Sequence[str]) -> str:
    """What to say where one of these workers does not answer any more."""
    return (
        f"lost a worker of --cluster {','.join(addresses)}: start it again with "
        "`python eval.py --worker PORT`, then this command"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
