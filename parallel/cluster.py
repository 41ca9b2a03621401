"""Workers on other machines: one offers its devices, another computes on them."""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import grpc

from utils import first_line, program, tf

PATIENCE = 20  # seconds without an answer after which another machine counts as lost


def serve(port: int) -> None:
    """Offer this machine's devices on a port to `connect` of any machine, until it is ended.

    Raises:
        ValueError: the port cannot be used.
    """
    use_no_proxy()
    try:
        server = tf.distribute.Server({"worker": [f"localhost:{port}"]}, "worker", 0)
    except tf.errors.OpError as error:
        raise ValueError(
            f"port {port} cannot be used ({first_line(error)}): name another with --worker"
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
            port = port_of(address)
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
    use_no_proxy()
    with at_most(
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


def port_of(address: str) -> int:
    """Of host:port; ValueError of anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"host:port is expected, got {address!r}")
    return int(port)


def use_no_proxy() -> None:
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
def at_most(message: str) -> Iterator[None]:
    """End the program with one line if what follows has not ended within PATIENCE seconds.

    TensorFlow may hold Python's lock meanwhile, so that no thread of Python could: faulthandler's
    ends the process, and what it writes has another process say the line.
    """
    line = f"{program()}: error: {message}"
    told = 'read -r _ && printf "%s\\n" "$0" >&2; cat >/dev/null'
    with subprocess.Popen(["sh", "-c", told, line], stdin=subprocess.PIPE) as teller:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=teller.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _give_up(message: str) -> NoReturn:
    """End the program from another thread: what waits in TensorFlow would wait for ever."""
    print(f"{program()}: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def lost(addresses: Sequence[str]) -> str:
    """What to say where one of these workers does not answer any more."""
    return (
        f"lost a worker of --cluster {','.join(addresses)}: start it again with "
        "`python eval.py --worker PORT`, then this command"
    )
