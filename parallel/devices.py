"""The devices of this machine, and how training is spread over several of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Sequence

from parallel import cluster
from utils import first_line, tf

PLACEMENTS = ("single", "branch", "hybrid")  # of a tree
START_PATIENCE = 600  # seconds for the other workers of TF_CONFIG to be started


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
    return next(iter(gpu_names()), "/CPU:0")


def gpu_names() -> list[str]:
    """The GPUs of this machine, such as /GPU:0."""
    return [f"/GPU:{number}" for number in range(len(tf.config.list_logical_devices("GPU")))]


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
    jobs, kind, index = config
    mine, others = jobs[kind][index], sum(jobs.values(), [])
    others.remove(mine)
    print(
        f"waiting for the workers {', '.join(others)}, at most {START_PATIENCE / 60:g} minutes",
        flush=True,
    )
    _wait_for(others, cluster.port_of(mine))
    cluster.use_no_proxy()
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs),
        task_type=kind,
        task_id=index,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
    )
    try:
        with cluster.at_most(
            f"the workers of TF_CONFIG do not come together within {cluster.PATIENCE} seconds: "
            f"start all again, each with the same cluster, which all can reach: {jobs}"
        ):
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise _unusable(first_line(error)) from None


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
        jobs = {"chief": jobs.get("chief", jobs.get("master")), "worker": jobs.get("worker")}
        jobs = {job: addresses for job, addresses in jobs.items() if addresses}
        addresses = sum(jobs.values(), [])
        if len(addresses) < 2:
            return None
        if len(set(addresses)) < len(addresses):
            raise ValueError("an address is there twice")
        for address in addresses:
            cluster.port_of(address)
        if not kind or "index" not in task:
            raise ValueError("its task lacks a type or an index")
        kind, index = kind.replace("master", "chief"), int(task["index"])
        if not 0 <= index < len(jobs.get(kind, [])):
            raise ValueError(f"its task, {kind} {index}, is not in its cluster")
    except (ValueError, TypeError, AttributeError) as error:
        raise _unusable(str(error)) from None
    return jobs, kind, index


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
    where = address.rpartition(":")[0].strip("[]"), cluster.port_of(address)
    with contextlib.suppress(OSError):  # its name may be unknown as well until it has started
        socket.create_connection(where, timeout=cluster.PATIENCE / 4).close()
        return True
    return False


def is_chief(spread: tf.distribute.Strategy | None) -> bool:
    """Whether this process writes a run's files: the chief, or without one the first worker."""
    resolver = getattr(spread, "cluster_resolver", None)
    if resolver is None or resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0
