"""Runs the project's programs in forks of one process that has loaded TensorFlow already.

Most of a short run's time is the import of TensorFlow. `start` gives the path of something that is
called as Python is, and that runs a program of this project in a fork of a server; whatever else it
is asked for, it leaves to Python itself. Signals do not reach a fork: tests that send some, or set
what TensorFlow reads at its import, start real processes.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@functools.cache
def start() -> str:
    """The path of the stand-in for Python. The server ends with the process that calls this."""
    folder = tempfile.mkdtemp(prefix="forkserver-")
    server = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "serve", folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    start.server = server  # its stdin closes with this process
    assert server.stdout.readline() == b"ready\n"
    path = os.path.join(folder, "python")
    with open(path, "w") as file:
        words = map(shlex.quote, (sys.executable, "-SE", __file__, "run", folder))
        file.write(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
    os.chmod(path, 0o755)
    return path


def serve(folder: str) -> None:
    """Accept requests until standard input ends."""
    sys.path[0] = ROOT
    from utils import tf

    tf.Module  # noqa: B018, loads TensorFlow
    gc.freeze()  # else every fork would look through all of it, which copies its memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    server = os.getpid()
    if os.fork() == 0:  # ends the server when standard input does
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        sys.stdin.read()
        if os.getppid() == server:
            os.kill(server, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.join(folder, "socket"))
        listening.listen(16)
        os.write(1, b"ready\n")
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _run_request(connection)
            connection.close()


def _run_request(connection: socket.socket) -> None:
    """In a fork: do what `run` asks for, tell it the exit status, and end."""
    size, streams, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(size, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # TensorFlow's temporary files
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status]))
        os._exit(status)


def _end_with(connection: socket.socket) -> None:
    """End this fork when the stand-in that asked for it has gone, as by a timeout."""
    connection.recv(1)
    os._exit(1)


def run(folder: str, words: list[str]) -> None:
    """What the stand-in does: a request to the server, or Python itself."""
    program = words[0] if words else ""
    own = os.path.realpath(program).startswith(ROOT + os.sep) and ".venv" not in program
    if not own or not (program.endswith(".py") or os.path.isdir(program)):
        os.execv(sys.executable, [sys.executable, *words])
    request = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, "socket"))
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        status = connection.recv(1)
    sys.exit(status[0] if status else 1)  # nothing: the fork crashed


if __name__ == "__main__":
    action, where, *rest = sys.argv[1:]
    run(where, rest) if action == "run" else serve(where)
