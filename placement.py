"""Where a network computes: one device, several, or other machines.

A tree's branches exchange nothing, so that each device can take some of them. A dense network has
no such cut: `Horizontal` and `Vertical` are the two ways that the paper compares with (Table 5).
Every class here is called as the network is, images in and logits out, and tells in
`device_flops` what it gives each device to do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import grpc
import numpy as np
import tensorflow as tf

import resnet

PLACEMENTS = ("single", "branch", "hybrid")
PATIENCE = 20  # seconds without an answer after which another machine counts as lost
START_PATIENCE = 600  # seconds for the other workers of TF_CONFIG to be started


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
    """The same network on another device; None: on TensorFlow's first."""
    with tf.device(device):
        return resnet.copy(net)


# ---------------------------------------------------------------- training on several


def strategy(names: Sequence[str]) -> tf.distribute.Strategy | None:
    """How training is spread: over devices, or over the workers of TF_CONFIG; None: it is not.

    To be called before TensorFlow's first operation.

    Raises:
        ValueError: a device is not there, or TF_CONFIG cannot be used.
    """
    config = read_tf_config()
    if config is None:
        if os.environ.get("TF_CONFIG"):
            print("TF_CONFIG names no other worker: training on this machine alone")
        return tf.distribute.MirroredStrategy(find_devices(names)) if names else None
    if names:
        raise ValueError("TF_CONFIG is set: each worker uses all its GPUs, so leave --devices out")
    cluster, kind, index = config
    mine, others = cluster[kind][index], sum(cluster.values(), [])
    others.remove(mine)
    print(
        f"waiting for the workers {', '.join(others)}, at most {START_PATIENCE / 60:g} minutes",
        flush=True,
    )
    _wait_for(others, _port(mine))
    _use_no_proxy()
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(cluster),
        task_type=kind,
        task_id=index,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
    )
    try:
        with _at_most(
            f"the workers of TF_CONFIG do not come together within {PATIENCE} seconds: start all "
            f"again, each with the same cluster, which all can reach: {cluster}"
        ):
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise _unusable(_first_line(error)) from None


def read_tf_config() -> tuple[dict[str, list[str]], str, int] | None:
    """The cluster of TF_CONFIG, addresses by job, and this process's job and place in that.

    None where it names one machine only or none: managed services always set it. `master` is the
    chief's older name.

    Raises:
        ValueError: it cannot be used; says what is expected.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text or "{}")
        jobs = {job: them for job, them in (config.get("cluster") or {}).items() if them}
        task = config.get("task") or {}
        kind = task.get("type")
        if not all(isinstance(addresses, list) for addresses in jobs.values()):
            raise ValueError("a job is not a list of addresses")
        for job in {*jobs, kind} - {"chief", "master", "worker", "evaluator", None}:
            raise ValueError(f"there are no {job} jobs here, only chief, worker and evaluator")
        if kind == "evaluator":
            raise ValueError("training has no evaluator: run eval.py for that")
        if len(jobs.get("chief", []) + jobs.get("master", [])) > 1:
            raise ValueError("there is more than one chief")
        # An evaluator takes no part; the others need not know of it.
        cluster = {"chief": jobs.get("chief", jobs.get("master")), "worker": jobs.get("worker")}
        cluster = {job: addresses for job, addresses in cluster.items() if addresses}
        addresses = sum(cluster.values(), [])
        if len(addresses) < 2:
            return None
        if len(set(addresses)) < len(addresses):
            raise ValueError("an address is there twice")
        for address in addresses:
            _port(address)
        if not kind or "index" not in task:
            raise ValueError("its task lacks a type or an index")
        kind, index = kind.replace("master", "chief"), int(task["index"])
        if not 0 <= index < len(cluster.get(kind, [])):
            raise ValueError(f"its task, {kind} {index}, is not in its cluster")
    except (ValueError, TypeError, AttributeError) as error:
        raise _unusable(str(error)) from None
    return cluster, kind, index


def _unusable(reason: str) -> ValueError:
    return ValueError(
        f"TF_CONFIG cannot be used ({reason}): it is a JSON object such as "
        '{"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": "worker", '
        '"index": 0}}, or unset'
    )


def _wait_for(others: Sequence[str], port: int) -> None:
    """Return when all the other workers are there, and tell them that this one is.

    TensorFlow waits too, but for ever, keeps SIGTERM from ending that and hears of no Ctrl-C.

    Raises:
        ValueError: this worker's port is taken, or another is not there in START_PATIENCE.
    """
    end = time.monotonic() + START_PATIENCE
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family == socket.AF_INET6
    try:
        listening = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise _unusable(f"port {port} of this worker: {error.strerror}") from None
    with listening:
        for address in others:
            while not _listens(address):
                if time.monotonic() > end:
                    raise ValueError(
                        f"no worker of TF_CONFIG answered at {address}: start it there with the "
                        "same cluster, then this command again"
                    )
                time.sleep(0.5)


def _listens(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError):  # its name may be unknown as well until it has started
        socket.create_connection((host, _port(address)), timeout=PATIENCE / 4).close()
        return True
    return False


def is_chief(spread: tf.distribute.Strategy | None) -> bool:
    """Whether this process writes a run's files: the chief, or without one the first worker."""
    resolver = getattr(spread, "cluster_resolver", None)
    if resolver is None or resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0


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
    """Something that is called like `net` and computes the same on the given devices.

    Its weights are constant (`resnet.freeze`): what becomes of those of `net` does not reach it.
    """
    if placement != "single":
        placed = PlacedTree(net, devices, hybrid=placement == "hybrid")
        for copy in placed.copies:
            resnet.freeze(copy)
        return placed
    copy = _copy_to(devices[0] if devices else None, net)
    resnet.freeze(copy)
    if not devices:
        return copy

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
    _use_no_proxy()
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
        try:
            port = _port(address)
        except ValueError:
            raise ValueError(f"--cluster takes host:port,host:port, got {address!r}") from None
        try:
            host = address.rpartition(":")[0].strip("[]")
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
    _use_no_proxy()
    with _at_most(
        f"the workers of --cluster {','.join(addresses)} answer, but do not connect within "
        f"{PATIENCE} seconds: they must reach each other and this machine"
    ):
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


def _port(address: str) -> int:
    """Of host:port; ValueError of anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"host:port is expected, got {address!r}")
    return int(port)


def _use_no_proxy() -> None:
    """Let TensorFlow reach workers without the proxy of http_proxy and its like.

    That is for the world outside, and what speaks to a worker by it may wait for ever. Empty,
    this variable goes before the others, for gRPC only.
    """
    os.environ["grpc_proxy"] = ""  # noqa: SIM112, so gRPC spells it


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
                _give_up(lost([address]))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_) -> None:
        self._over.set()


@contextlib.contextmanager
def _at_most(message: str) -> Iterator[None]:
    """End the program with one line if what follows has not ended within PATIENCE seconds.

    TensorFlow may hold Python's lock meanwhile, so that no thread of Python could: faulthandler's
    ends the process, and what it writes has another process say the line.
    """
    line = f"{os.path.basename(sys.argv[0])}: error: {message}"
    told = 'read -r _ && printf "%s\\n" "$0" >&2; cat >/dev/null'
    with subprocess.Popen(["sh", "-c", told, line], stdin=subprocess.PIPE) as teller:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=teller.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _give_up(message: str) -> NoReturn:
    """End the program from another thread: what waits in TensorFlow would wait for ever."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def lost(addresses: Sequence[str]) -> str:
    """What to say where one of these workers does not answer any more."""
    return (
        f"lost a worker of --cluster {','.join(addresses)}: start it again with "
        "`python eval.py --worker PORT`, then this command"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
