"""Tests of download_cifar100.py: no network but 127.0.0.1, no real data but one optional test."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import pickle
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_ARCHIVE

from experiments import variants
import download_cifar100 as dl

ROOT = Path(dl.__file__).parent
PAYLOAD = np.random.default_rng(0).bytes(300_000)
PAYLOAD_MD5 = hashlib.md5(PAYLOAD).hexdigest()


# A local server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(*answers, payload=PAYLOAD):
    """Serves `payload`; request i is answered by answers[i], later ones by the last.

    Yields the address and the list of the Range headers received.
    """
    ranges, stop = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers.get("Range"))
            answers[min(len(ranges), len(answers)) - 1](self, payload, stop)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a.tar.gz", ranges
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def reply(handler, status, headers=(), body=b""):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def first_byte(handler):
    asked = handler.headers.get("Range")
    return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0


def good(handler, payload, _, upto=None):
    start = first_byte(handler)
    if start >= len(payload):
        return reply(handler, 416, [("Content-Range", f"bytes */{len(payload)}")])
    headers = [("Content-Length", len(payload) - start)]
    if start:
        headers.append(("Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}"))
    reply(handler, 206 if start else 200, headers, payload[start:upto])


def cut(handler, payload, stop):
    good(handler, payload, stop, upto=(first_byte(handler) + len(payload)) // 2)


def hangs(handler, payload, stop):
    cut(handler, payload, stop)
    handler.wfile.flush()
    stop.wait(10)


def without_range(handler, payload, _):
    reply(handler, 200, [("Content-Length", len(payload))], payload)


def without_length(handler, payload, _):
    reply(handler, 200, [], payload)


def other_range(handler, payload, _):
    reply(handler, 206, [("Content-Range", f"bytes 7-9/{len(payload)}")], payload[7:10])


def status(code):
    return lambda handler, *_: reply(handler, code, [("Content-Length", 0)])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(dl, "PAUSES", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.tar.gz"


def part_of(target):
    return target.with_name(target.name + ".part")


# Download ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "requests"),
    [
        ([good], 1),
        ([without_length], 1),
        ([cut, good], 2),
        ([cut, cut, cut, good], 4),
        ([cut, without_range], 2),
        ([cut, other_range, good], 3),
        ([status(503), good], 2),
        ([status(503), cut, status(429), good], 4),
    ],
)
def test_download_arrives_whole(answers, requests, target):
    with serve(*answers) as (url, ranges):
        dl.download(url, target, PAYLOAD_MD5)
    assert target.read_bytes() == PAYLOAD
    assert not part_of(target).exists()
    assert len(ranges) == requests


def test_download_resumes_where_it_was_cut(target):
    with serve(cut, good) as (url, ranges):
        dl.download(url, target, PAYLOAD_MD5)
    assert ranges == [None, f"bytes={len(PAYLOAD) // 2}-"]


def test_download_resumes_an_earlier_run(target):
    part_of(target).write_bytes(PAYLOAD[:1234])
    with serve(good) as (url, ranges):
        dl.download(url, target, PAYLOAD_MD5)
    assert ranges == ["bytes=1234-"]
    assert target.read_bytes() == PAYLOAD


def test_download_accepts_a_part_that_is_whole_already(target):
    part_of(target).write_bytes(PAYLOAD)
    with serve(good) as (url, ranges):
        dl.download(url, target, PAYLOAD_MD5)
    assert len(ranges) == 1
    assert target.read_bytes() == PAYLOAD


def test_download_starts_again_when_the_part_is_too_long(target):
    part_of(target).write_bytes(PAYLOAD + b"more")
    with serve(good) as (url, ranges):
        dl.download(url, target, PAYLOAD_MD5)
    assert ranges[1:] == [None]
    assert target.read_bytes() == PAYLOAD


def test_download_times_out_on_a_silent_server_and_resumes(target, monkeypatch):
    monkeypatch.setattr(dl, "TIMEOUT", 0.2)
    with serve(hangs, good) as (url, ranges):
        started = time.monotonic()
        dl.download(url, target, PAYLOAD_MD5)
        assert time.monotonic() - started < 5  # the server is silent for 10 seconds
    assert target.read_bytes() == PAYLOAD
    assert ranges[1] is not None


def test_download_gives_up_and_keeps_what_it_has(target, monkeypatch):
    pauses = []
    monkeypatch.setattr(dl, "PAUSES", (1, 2, 3))
    monkeypatch.setattr(dl.time, "sleep", pauses.append)
    with serve(cut, status(503)) as (url, ranges):
        with pytest.raises(dl.DataError, match=r"503.*150,000 bytes.*again") as caught:
            dl.download(url, target)
    assert caught.value.status == 1
    assert pauses == [1, 2, 3] and len(ranges) == 4
    assert part_of(target).read_bytes() == PAYLOAD[:150_000]
    assert not target.exists()


def test_progress_resets_the_count_of_failures(target, monkeypatch):
    monkeypatch.setattr(dl, "PAUSES", (0,))
    monkeypatch.setattr(dl, "GOOD_PROGRESS", 10_000)
    with serve(cut, cut, cut, good) as (url, _):
        dl.download(url, target, PAYLOAD_MD5)
    assert target.read_bytes() == PAYLOAD


def test_download_stops_at_once_on_404(target):
    with serve(status(404)) as (url, ranges):
        with pytest.raises(dl.DataError, match="404.*--url") as caught:
            dl.download(url, target)
    assert len(ranges) == 1 and caught.value.status == 1


def test_download_of_wrong_bytes_leaves_nothing(target):
    with serve(good, payload=b"other bytes") as (url, _):
        with pytest.raises(dl.DataError, match=f"expected md5 {PAYLOAD_MD5}; received"):
            dl.download(url, target, PAYLOAD_MD5)
    assert list(target.parent.iterdir()) == []


def test_download_refuses_a_flood(target, monkeypatch):
    monkeypatch.setattr(dl, "MAX_BYTES", 100_000)
    with serve(without_length) as (url, _):
        with pytest.raises(dl.DataError, match="at most 100,000 bytes"):
            dl.download(url, target)
    assert part_of(target).stat().st_size <= 100_000


def refused_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/a.tar.gz"


def test_no_network_is_told_fast_and_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dl.time, "sleep", lambda _: pytest.fail("it waited"))
    assert dl.main(["--dataset_path", str(tmp_path), "--url", refused_url()]) == 3
    error = capsys.readouterr().err
    assert error.startswith("download_cifar100.py: error: ") and error.count("\n") == 1
    assert "--archive" in error and "--synthetic" in error


def test_unresolved_host_is_no_network(target, monkeypatch):
    def unresolved(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(dl.NoNetwork, match="not known"):
        dl.download("http://host.invalid/a", target)


def test_bad_certificate_is_not_no_network(target, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(dl.urllib.request, "urlopen", refuse)
    with pytest.raises(dl.DataError, match="self-signed") as caught:
        dl.download("https://127.0.0.1/", target)
    assert caught.value.status == 1


def test_network_lost_later_is_not_no_network(target, monkeypatch):
    answers = iter([dl.Interrupted("cut"), *[dl.NoNetwork("gone")] * 9])
    monkeypatch.setattr(dl, "_transfer", lambda *_: (_ for _ in ()).throw(next(answers)))
    with pytest.raises(dl.DataError, match="gone; gave up") as caught:
        dl.download("http://127.0.0.1/", target)
    assert caught.value.status == 1


def test_full_disk_is_not_retried(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dl, "_transfer", full)
    assert dl.main(["--dataset_path", str(tmp_path), "--url", "http://127.0.0.1/"]) == 1
    assert "No space left" in capsys.readouterr().err


@contextlib.contextmanager
def command(*flags, options=(), **settings):
    """download_cifar100.py as a process of its own, ended with the test."""
    words = [sys.executable, *options, "download_cifar100.py", *map(str, flags)]
    # A test run in the background would pass on that SIGINT is ignored.
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": restore}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes | settings) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, path):
    """Waits until the process has written something to the file."""
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


STOPS = {"INT": 130, "TERM": 143, "HUP": 129, "USR1": 138, "USR2": 140, "XCPU": 152}


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of Linux")
@pytest.mark.parametrize(("name", "code"), STOPS.items())
def test_signals_end_in_one_line_and_keep_the_part(name, code, tmp_path):
    part = tmp_path / (dl.ARCHIVE_NAME + ".part")
    with serve(hangs) as (url, _), command("--dataset_path", tmp_path, "--url", url) as process:
        wait_for(process, part)
        process.send_signal(getattr(signal, f"SIG{name}"))
        error = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert error.startswith("download_cifar100.py: error: stopped") and error.count("\n") == 1
    assert part.exists() and os.listdir(tmp_path) == [part.name]


def goes_on(release):
    """An answer that is whole only once `release` is set."""

    def answer(handler, payload, _):
        reply(handler, 200, [("Content-Length", len(payload))], payload[:1000])
        handler.wfile.flush()
        release.wait(20)
        handler.wfile.write(payload[1000:])

    return answer


@pytest.mark.parametrize("output", ["closed", "no reader", "full"])
def test_download_outlives_its_output_and_a_hangup_that_is_ignored(output, tmp_path):
    """What arrives is no archive, which is found once it is whole."""
    release = threading.Event()

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if output == "closed":
            os.close(1)

    with contextlib.ExitStack() as stack:
        full = stack.enter_context(open("/dev/full", "w"))
        url, ranges = stack.enter_context(serve(goes_on(release)))
        settings = {"preexec_fn": prepare} | ({"stdout": full} if output == "full" else {})
        flags = ("--dataset_path", tmp_path, "--url", url)
        process = stack.enter_context(command(*flags, **settings))
        deadline = time.monotonic() + 20
        while not ranges:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        if output == "no reader":
            process.stdout.close()
            process.stdout = None
        process.send_signal(signal.SIGHUP)
        release.set()
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and error.count("\n") == 1 and "cannot be read" in error
    assert len(ranges) == 1 and os.listdir(tmp_path) == []


def test_second_download_into_a_folder_says_so(tmp_path):
    release = threading.Event()
    part = tmp_path / (dl.ARCHIVE_NAME + ".part")
    flags = ("--dataset_path", tmp_path, "--url")
    with serve(hangs) as (url, ranges), command(*flags, url) as first:
        wait_for(first, part)
        for _ in range(2):
            with command(*flags, url) as second:
                error = second.communicate(timeout=20)[1]
            assert second.returncode == 1 and error.count("\n") == 1
            assert f"another process is making {tmp_path / dl.ARCHIVE_NAME}" in error
        assert len(ranges) == 1
        first.kill()  # which leaves no lock behind
        first.wait()
    release.set()
    with serve(goes_on(release)) as (url, ranges), command(*flags, url) as third:
        assert "cannot be read" in third.communicate(timeout=20)[1]
    assert ranges == ["bytes=150000-"] and os.listdir(tmp_path) == []


def test_download_where_files_cannot_be_locked(pack, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(dl.fcntl, "flock", unsupported)
    with serve(good, payload=pack(make_members()).read_bytes()) as (url, _):
        assert run(tmp_path / "data", "--url", url) == 0


def test_full_disk_names_the_path_and_keeps_the_part(tmp_path):
    """Files may have 100,000 bytes: a download that is cut there goes on when there is room."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    flags = ("--dataset_path", tmp_path, "--url")
    with serve(good) as (url, ranges), command(*flags, url, preexec_fn=limit) as process:
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and error.count("\n") == 1 and len(ranges) == 1
    assert f"{tmp_path} needs room: 340 MB" in error and "170 MB" in error
    assert (tmp_path / (dl.ARCHIVE_NAME + ".part")).read_bytes() == PAYLOAD[:100_000]


@pytest.mark.parametrize("flags", [["--synthetic"], ["--url"]])
def test_full_file_system(flags, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted")
    try:
        with serve(good) as (url, _):
            words = [*flags, url] if flags == ["--url"] else flags
            with command("--dataset_path", tmp_path, *words) as process:
                error = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and error.count("\n") == 1, error
        assert f"{tmp_path} needs room: 340 MB" in error
        left = [dl.ARCHIVE_NAME + ".part"] if flags == ["--url"] else []
        assert os.listdir(tmp_path) == left
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Archives ----------------------------------------------------------------------------------------


def make_batch(per_class, seed):
    rng = np.random.default_rng(seed)
    fine = rng.permutation(np.repeat(np.arange(100), per_class))
    return {
        "data": rng.integers(0, 256, (len(fine), 3072), np.uint8),
        "fine_labels": fine.tolist(),
        "coarse_labels": (fine % 20).tolist(),
        "filenames": [f"{i}.png" for i in range(len(fine))],
    }


def make_members():
    return {
        "train": make_batch(4, 1),
        "test": make_batch(2, 2),
        "meta": {
            "fine_label_names": [f"class {i}" for i in range(100)],
            "coarse_label_names": [f"superclass {i}" for i in range(20)],
        },
    }


def tar_bytes(blobs, extra=()):
    """A tar of cifar-100-python/NAME for every blob, after the entries `extra`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for entry, body in extra:
            tar.addfile(entry, io.BytesIO(body))
        for name, body in blobs.items():
            tar.addfile(make_entry(f"cifar-100-python/{name}", size=len(body)), io.BytesIO(body))
    return file.getvalue()


def make_entry(name, kind=tarfile.REGTYPE, link="", size=0):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, size
    return entry


@pytest.fixture
def small(monkeypatch):
    """Six images per class instead of 600."""
    monkeypatch.setattr(dl, "TRAIN_PER_CLASS", 4)
    monkeypatch.setattr(dl, "VAL_PER_CLASS", 1)
    monkeypatch.setattr(dl, "TEST_PER_CLASS", 2)


@pytest.fixture
def pack(small, monkeypatch, tmp_path):
    """Writes members as an archive whose md5s are taken for the official ones."""

    def write(members, extra=(), name="small.tar.gz"):
        blobs = {key: pickle.dumps(value, protocol=2) for key, value in members.items()}
        md5s = {key: hashlib.md5(blob).hexdigest() for key, blob in blobs.items()}
        monkeypatch.setattr(dl, "MEMBER_MD5", {**dict.fromkeys(dl.MEMBER_MD5, ""), **md5s})
        path = tmp_path / name
        tar = tar_bytes(blobs, extra)
        path.write_bytes(lzma.compress(tar, preset=0) if "xz" in name else gzip.compress(tar, 1))
        return path

    return write


@pytest.mark.parametrize("name", ["small.tar.gz", "small.tar.xz"])
def test_archive_is_decoded(name, pack):
    members = make_members()
    data = dl.read_archive(pack(members, name=name))
    assert data.name == "cifar100"
    assert data.train_images.shape == (400, 32, 32, 3)
    assert data.test_images.shape == (200, 32, 32, 3)
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
    row = members["train"]["data"][17]  # 1024 red values row by row, then green, then blue
    assert data.train_images[17, 3, 5].tolist() == [row[c * 1024 + 3 * 32 + 5] for c in range(3)]
    assert data.test_labels.tolist() == members["test"]["fine_labels"]
    assert data.superclass_of_class == [c % 20 for c in range(100)]
    assert data.class_names[7] == "class 7" and data.superclass_names[7] == "superclass 7"


def test_unpacked_archive_is_read(pack, tmp_path):
    """As a browser leaves it: the .tar, the folder, or the folder that this was unpacked in."""
    packed = pack(make_members())
    expected = dl.read_archive(packed)
    tar = tmp_path / "cifar-100-python.tar"
    tar.write_bytes(gzip.decompress(packed.read_bytes()))
    parent, linked = tmp_path / "unpacked", tmp_path / "links"
    linked.mkdir()
    with tarfile.open(tar) as file:
        file.extractall(parent, filter="data")
    for path in (parent / "cifar-100-python").iterdir():
        (linked / path.name).symlink_to(path)
    for path in (tar, parent, parent / "cifar-100-python", linked):
        data = dl.read_archive(path)
        np.testing.assert_array_equal(data.train_images, expected.train_images)
        np.testing.assert_array_equal(data.test_labels, expected.test_labels)
        assert run(tmp_path / f"of {path.name}", "--archive", path) == 0
    (linked / "test").unlink()
    os.mkfifo(linked / "test")  # reading it would not end
    with pytest.raises(dl.DataError, match="test not found"):
        dl.read_archive(linked)
    (parent / "cifar-100-python" / "test").write_bytes(b"other")
    with pytest.raises(dl.DataError, match="test is not the official one; expected md5"):
        dl.read_archive(parent)


@pytest.mark.parametrize("name", dl.MEMBER_MD5)
def test_unpacked_archive_has_a_limit(name, pack, tmp_path, monkeypatch):
    with tarfile.open(pack(make_members())) as file:
        file.extractall(tmp_path, filter="data")
    os.truncate(tmp_path / "cifar-100-python" / name, 5_000_000)
    monkeypatch.setattr(dl, "MAX_BYTES", 4_000_000)
    with pytest.raises(dl.DataError, match="more than 4,000,000 bytes"):
        dl.read_archive(tmp_path)


def test_harmless_other_members_are_ignored(pack):
    extra = [
        (make_entry("cifar-100-python", tarfile.DIRTYPE), b""),
        (make_entry("cifar-100-python/file.txt~", size=3), b"abc"),
        (make_entry("elsewhere/train", size=3), b"abc"),
        (make_entry("train", size=3), b"abc"),
    ]
    assert len(dl.read_archive(pack(make_members(), extra)).train_labels) == 400


@pytest.mark.parametrize(
    "entry",
    [
        make_entry("../evil"),
        make_entry("cifar-100-python/../../evil"),
        make_entry("/etc/evil"),
        make_entry("cifar-100-python/link", tarfile.SYMTYPE, "/etc/passwd"),
        make_entry("cifar-100-python/train", tarfile.SYMTYPE, "test"),
        make_entry("cifar-100-python/train", tarfile.LNKTYPE, "cifar-100-python/test"),
        make_entry("cifar-100-python/device", tarfile.CHRTYPE),
        make_entry("cifar-100-python/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda entry: f"{entry.name}-{entry.type.decode()}",
)
def test_harmful_entries_are_refused(entry, pack):
    path = pack(make_members(), [(entry, b"")])
    with pytest.raises(dl.DataError, match="is refused for its entry"):
        dl.read_archive(path)
    assert list(path.parent.iterdir()) == [path]


def test_duplicate_member_is_refused(pack):
    twice = [(make_entry("cifar-100-python/train", size=3), b"abc")]
    with pytest.raises(dl.DataError, match="train twice"):
        dl.read_archive(pack(make_members(), twice))


def test_bomb_is_refused(pack, monkeypatch):
    path = pack(make_members(), [(make_entry("zeros", size=5_000_000), bytes(5_000_000))])
    assert path.stat().st_size < 3_000_000
    monkeypatch.setattr(dl, "MAX_BYTES", 4_000_000)
    with pytest.raises(dl.DataError, match="more than 4,000,000 bytes"):
        dl.read_archive(path)


def test_missing_member_is_named(pack):
    members = make_members()
    del members["meta"]
    with pytest.raises(dl.DataError, match="meta not found"):
        dl.read_archive(pack(members))


def test_wrong_md5_is_refused_before_unpickling(pack, monkeypatch):
    path = pack(make_members())
    monkeypatch.setitem(dl.MEMBER_MD5, "test", "0" * 32)
    monkeypatch.setattr(dl, "load_pickle", lambda _: pytest.fail("unpickled"))
    with pytest.raises(dl.DataError, match="test is not.*expected md5 0{32}; received [0-9a-f]+"):
        dl.read_archive(path)


@pytest.mark.parametrize("body", [b"", b"no archive", b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh91AY"])
def test_other_files_are_refused(body, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(body)
    with pytest.raises(dl.DataError, match="neither .tar.gz nor .tar.xz|cannot be read"):
        dl.read_archive(path)


def test_truncated_archive_is_refused(pack):
    path = pack(make_members())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(dl.DataError, match="cannot be read"):
        dl.read_archive(path)


def set_item(part, key, value):
    return lambda members: members[part].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_item("train", "data", np.zeros((399, 3072), np.uint8)), "expected data"),
        (set_item("train", "data", "text"), "expected data"),
        (set_item("train", "data", np.zeros((400, 3072), np.int8)), "expected an array of u1"),
        (set_item("train", "fine_labels", [0] * 400), "4 images of each of 100"),
        (set_item("train", "fine_labels", [*range(1, 101)] * 4), "4 images of each of 100"),
        (set_item("train", "fine_labels", [*range(100)] * 3 + [0] * 100), "received 3 to 103"),
        (set_item("train", "fine_labels", []), "4 images of each of 100"),
        (set_item("train", "fine_labels", [0.5] * 400), "whole numbers"),
        (set_item("test", "coarse_labels", [0] * 200), "10 images of each of 20"),
        (set_item("test", "coarse_labels", None), "whole numbers"),
        (set_item("meta", "fine_label_names", ["a"] * 100), "100 different"),
        (set_item("meta", "coarse_label_names", [1] * 20), "list of names"),
        (lambda members: members["train"]["coarse_labels"].reverse(), "one superclass per class"),
        (lambda members: members["train"].pop("data"), "expected data"),
        (lambda members: members.update(meta=["a list"]), "holds a list"),
    ],
)
def test_content_is_validated(change, message, pack):
    members = make_members()
    change(members)
    with pytest.raises(dl.DataError, match=message):
        dl.read_archive(pack(members))


# Pickles -----------------------------------------------------------------------------------------

# What Python 2 writes for {'data': numpy.array([[1, 2]], 'uint8'), 'n': [5]}: strings are bytes.
PYTHON2_PICKLE = (
    b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
    b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x01K\x02\x86q\x08cnumpy\ndtype\nq\tU\x02u1q\n"
    b"K\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89"
    b"U\x02\x01\xfeq\x0ftq\x10bU\x01nq\x11]q\x12K\x05au."
)


def test_python2_pickle_is_read():
    loaded = dl.load_pickle(PYTHON2_PICKLE)
    assert loaded["data"].dtype == np.uint8 and loaded["data"].tolist() == [[1, 254]]
    assert loaded["n"] == [5]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_array_pickles_are_read(protocol):
    content = {"data": np.arange(256, dtype=np.uint8).reshape(2, 128), "n": [1, 2], "s": "é"}
    loaded = dl.load_pickle(pickle.dumps(content, protocol=protocol))
    np.testing.assert_array_equal(loaded.pop("data"), content.pop("data"))
    assert loaded == content


class Attack:
    """Pickled, it is a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_runs_code_is_refused(protocol, tmp_path):
    victim = tmp_path / "made_by_the_pickle"
    for attack in [
        Attack(os.system, f"touch {victim}"),
        Attack(os.mkdir, str(victim)),
        Attack(eval, f"__import__('os').mkdir({str(victim)!r})"),
        Attack(np.savez, str(victim)),
    ]:
        data = pickle.dumps({"data": attack}, protocol=protocol)
        with pytest.raises(dl.DataError, match="it asks for"):
            dl.load_pickle(data)
        assert list(tmp_path.iterdir()) == []
    pickle.loads(pickle.dumps(Attack(os.mkdir, str(victim)), protocol=protocol))
    assert victim.exists()  # so the attack itself works


def test_pickle_with_a_huge_memo_is_refused_before_it_is_allocated():
    bomb = b"\x80\x02}r\xff\xff\xff\x7f."  # puts the dict at place 2**31 - 1 of the memo
    with pytest.raises(dl.DataError, match="memo"):
        dl.load_pickle(bomb)


@pytest.mark.parametrize("value", [[1], "text", np.zeros(2, np.uint8)])
def test_pickle_of_no_dict_is_refused(value):
    with pytest.raises(dl.DataError, match="expected a dict"):
        dl.load_pickle(pickle.dumps(value, protocol=2))


def mutate(data, rng):
    """Overwrites, inserts or removes a few bytes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        where = rng.integers(len(data))
        data[where : where + rng.integers(0, 3)] = rng.bytes(rng.integers(0, 3))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of invalid escapes in the mutants
def test_fuzzed_pickles_raise_only_data_errors():
    rng, outcomes = np.random.default_rng(0), set()
    recent = pickle.dumps({"data": np.arange(9, dtype=np.uint8), "n": [1, 2, "a"]}, protocol=2)
    for _ in range(1500):
        for pickled in (PYTHON2_PICKLE, recent):
            try:
                outcomes.add(type(dl.load_pickle(mutate(pickled, rng))))
            except dl.DataError:
                outcomes.add(dl.DataError)
    assert outcomes == {dict, dl.DataError}


def test_fuzzed_archives_raise_only_data_errors(pack, monkeypatch):
    path, rng, refused = pack(make_members()), np.random.default_rng(0), 0
    headers = tar_bytes({"train": b"a", "test": b"b", "meta": b"c"})[:3072]
    packed = path.read_bytes()
    for trial in range(300):
        if trial % 10:  # within the tar's headers, where its structure is
            path.write_bytes(gzip.compress(mutate(headers, rng), compresslevel=1))
        else:
            path.write_bytes(mutate(packed, rng))
        try:
            dl.read_archive(path)
        except dl.DataError:
            refused += 1
    assert refused > 280


# Files -------------------------------------------------------------------------------------------


def run(folder, *flags):
    return dl.main(["--dataset_path", str(folder), *map(str, flags)])


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def load(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return file["images"], file["labels"]


def test_archive_to_files(pack, tmp_path):
    members, folder = make_members(), tmp_path / "new" / "data"
    archive = pack(members)
    assert run(folder, "--archive", archive, "--seed", 3) == 0
    assert archive.exists()
    names = {"train.npz", "val.npz", "train_val.npz", "test.npz"}
    assert {path.name for path in folder.iterdir()} == {*names, "split.json"}
    split = json.loads((folder / "split.json").read_text())
    assert split["dataset"] == "cifar100" and split["seed"] == 3
    assert split["counts"] == {"train": 300, "val": 100, "train_val": 400, "test": 200}
    assert set(split["files"]) == names
    assert len(split["class_names"]) == len(split["superclass_of_class"]) == 100
    assert len(split["superclass_names"]) == 20 and len(split["indices_sha256"]) == 64
    for name, count in split["counts"].items():
        images, labels = load(folder, name)
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int32
        assert (np.bincount(labels) == count // 100).all()
        content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        assert split["files"][f"{name}.npz"] == content
    assert load(folder, "train_val")[1].tolist() == members["train"]["fine_labels"]
    train, val = dl.split_indices(np.array(members["train"]["fine_labels"]), 3)
    for name, indices in (("train", train), ("val", val)):
        for part, whole in zip(load(folder, name), load(folder, "train_val"), strict=True):
            np.testing.assert_array_equal(part, whole[indices])


def test_split_is_seeded_stratified_and_disjoint():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 500))
    train, val = dl.split_indices(labels, 0)
    assert sorted([*train, *val]) == list(range(50_000))
    assert (np.bincount(labels[val]) == 50).all() and (np.bincount(labels[train]) == 450).all()
    assert np.array_equal(dl.split_indices(labels, 0)[1], val)
    assert not np.array_equal(dl.split_indices(labels, 1)[1], val)


def test_second_run_verifies_and_writes_nothing(small, tmp_path, capsys):
    assert run(tmp_path, "--synthetic") == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert run(tmp_path, "--synthetic") == 0
    assert "verified; nothing to do" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def flip_a_bit(path):
    images, labels = np.load(path)["images"], np.load(path)["labels"]
    images[0, 0, 0, 0] ^= 1
    np.savez(path, images=images, labels=labels)


@pytest.mark.parametrize("name", ["train.npz", "val.npz", "train_val.npz", "test.npz"])
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-200])],
    ids=["missing", "flipped", "truncated"],
)
def test_damaged_file_is_rebuilt(name, harm, small, tmp_path, capsys):
    assert run(tmp_path, "--synthetic") == 0
    before = (tmp_path / name).read_bytes()
    harm(tmp_path / name)
    assert run(tmp_path, "--synthetic") == 0
    assert name in capsys.readouterr().out
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("needed", ["train_val.npz", "test.npz"])
def test_damaged_part_of_the_split_needs_no_archive(needed, pack, tmp_path):
    folder, url = tmp_path / "data", refused_url()
    assert run(folder, "--archive", pack(make_members())) == 0
    before = {name: body for name, (body, _) in snapshot(folder).items()}
    (folder / "train.npz").unlink()
    flip_a_bit(folder / "val.npz")
    assert run(folder, "--url", url) == 0
    assert {name: body for name, (body, _) in snapshot(folder).items()} == before
    (folder / needed).unlink()
    assert run(folder, "--url", url) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"dataset": "cifar100"}', "[" * 100_000])
def test_damaged_split_json_is_rebuilt(text, small, tmp_path):
    assert run(tmp_path, "--synthetic") == 0
    before = (tmp_path / "split.json").read_text()
    (tmp_path / "split.json").write_text(text)
    assert dl.read_split(tmp_path) is None
    assert run(tmp_path, "--synthetic") == 0
    assert (tmp_path / "split.json").read_text() == before


@pytest.mark.parametrize("key", ["files", "counts", "seed", "class_names", "dataset"])
@pytest.mark.parametrize("value", [None, [], {}, 1.5, ["train.npz", "val.npz"]])
def test_split_json_of_another_form_is_damaged(key, value, small, tmp_path):
    split = dl.write_split(tmp_path, dl.synthetic(0), 0)
    assert dl.read_split(tmp_path) == split
    (tmp_path / "split.json").write_text(json.dumps({**split, key: value}))
    assert dl.read_split(tmp_path) is None


@pytest.mark.parametrize(
    ("flags", "fix"),
    [(["--synthetic", "--seed", 1], "--seed 0"), (["--url", "http://127.0.0.1/"], "--synthetic")],
)
def test_another_data_set_is_left_alone(flags, fix, small, tmp_path, capsys):
    assert run(tmp_path, "--synthetic") == 0
    before = snapshot(tmp_path)
    assert run(tmp_path, *flags) == 1
    error = capsys.readouterr().err
    assert fix in error and "--dataset_path" in error and error.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_failed_write_leaves_no_half_file(small, tmp_path, monkeypatch, capsys):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert run(tmp_path, "--synthetic") == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_mix_their_files(small, tmp_path, monkeypatch, capsys):
    savez, statuses = np.savez, []

    def meanwhile(*args, **arrays):
        monkeypatch.setattr(np, "savez", savez)
        statuses.append(run(tmp_path, "--synthetic", "--seed", 1))
        savez(*args, **arrays)

    monkeypatch.setattr(np, "savez", meanwhile)
    assert run(tmp_path, "--synthetic") == 0 and statuses == [1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"making {tmp_path / 'split.json'}" in error
    assert run(tmp_path, "--synthetic") == 0 and len(list(tmp_path.iterdir())) == 5


def test_split_json_is_written_last(small, tmp_path, monkeypatch):
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(b.name), replace(a, b)))
    assert run(tmp_path, "--synthetic") == 0
    assert len(replaced) == 5 and replaced[-1] == "split.json"


def test_download_to_files_removes_the_archive(pack, tmp_path, monkeypatch):
    payload, folder = pack(make_members()).read_bytes(), tmp_path / "data"
    with serve(cut, good, payload=payload) as (url, ranges):
        assert run(folder, "--url", url) == 0
    assert len(ranges) == 2
    assert len(list(folder.iterdir())) == 5
    monkeypatch.setattr(dl, "ARCHIVE_MD5", "0" * 32)
    with serve(good, payload=payload) as (url, _):
        monkeypatch.setattr(dl, "URL", url)  # the official one, whose md5 must fit
        assert run(tmp_path / "official") == 1
    assert list((tmp_path / "official").iterdir()) == []


def test_download_with_wrong_members_is_deleted(pack, tmp_path, capsys):
    payload = pack(make_members()).read_bytes()
    dl.MEMBER_MD5["train"] = "0" * 32  # pack has put its own dict there
    with serve(good, payload=payload) as (url, _):
        assert run(tmp_path / "data", "--url", url) == 1
    assert "train is not the official one" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []


def test_finished_download_of_a_killed_run_is_used_and_kept(pack, tmp_path):
    target = tmp_path / "data" / dl.ARCHIVE_NAME
    target.parent.mkdir()
    pack(make_members()).rename(target)
    assert run(target.parent, "--url", refused_url()) == 0
    assert target.exists()


# Flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--archive", "a", "--synthetic"], "--archive and --synthetic contradict"),
        (["--archive", "a", "--url", "http://a/"], "--archive and --url contradict"),
        (["--url", "http://a/", "--synthetic"], "--url and --synthetic contradict"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--synth"], "--synth"),
        (["stray"], "stray"),
        (["--seed", "-1"], "'-1'"),
        (["--seed", "1.5"], "'1.5'"),
        (["--seed"], "--seed"),
        (["--archive", ""], "empty"),
        (["--dataset_path", ""], "empty"),
        (["--url", "ftp://a/"], "http"),
        (["--url", "file:///etc/passwd"], "http"),
        (["--dataset_path", "gs://bucket/data"], "expected a path on this machine"),
        (["--dataset_path=s3://bucket", "--synthetic"], "expected a path on this machine"),
        (["--archive", "gs://bucket/a.tar.gz"], "expected a path on this machine"),
        (["--archive", "https://a/a.tar.gz"], "--url"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dl.main(flags) == 2
    output = capsys.readouterr()
    assert output.err.startswith("download_cifar100.py: error: ") and output.err.count("\n") == 1
    assert message in output.err and "--help" in output.err and not output.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--archive", "missing"], ["--url", "http://127.0.0.1:x/"]])
def test_other_failures_are_one_line_and_status_1(flags, tmp_path, capsys):
    assert run(tmp_path / "data", *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("download_cifar100.py: error: ") and error.count("\n") == 1


def test_unusable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file", "--synthetic") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_home_folder(pack, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = pack(make_members()).name
    monkeypatch.chdir("/")
    assert dl.main(["--dataset_path=~/data", f"--archive=~/{name}"]) == 0
    assert (tmp_path / "data" / "split.json").exists()


@pytest.mark.parametrize("options", [[], ["-O"], ["-OO"]])
def test_help_as_a_command(options):
    settings = {"PYTHONSAFEPATH": "1"} if options else {}
    with command("--help", options=options, env=os.environ | settings) as process:
        output, error = process.communicate(timeout=30)
    assert process.returncode == 0 and not error
    for flag in ("--dataset_path", "--archive", "--url", "--synthetic", "--seed"):
        assert flag in output


def test_what_is_not_installed_is_one_line(tmp_path):
    with command("--dataset_path", tmp_path, options=["-S"]) as process:  # without site-packages
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and error.count("\n") == 1
    assert error.startswith("download_cifar100.py: error: ") and "pip install numpy six" in error


def test_nothing_heavy_is_imported():
    code = "import sys, download_cifar100; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0


# Synthetic images --------------------------------------------------------------------------------


def features(images):
    """Standardized as the input pipeline does; then power spectrum and channel correlations."""
    images = images.astype(np.float32)
    images -= images.mean((1, 2), keepdims=True)
    images /= images.std((1, 2), keepdims=True)
    power = np.log1p(np.abs(np.fft.rfft2(images, axes=(1, 2)))).reshape(len(images), -1)
    correlations = np.einsum("nyxc,nyxd->ncd", images, images).reshape(len(images), -1) / 1024
    return np.concatenate([power - power.mean(1, keepdims=True), 10 * correlations], axis=1)


def test_synthetic_is_deterministic():
    labels = np.arange(100)
    images = dl.draw_synthetic(labels, 0)
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8
    assert images.tobytes() == dl.draw_synthetic(labels, 0).tobytes()
    assert images.tobytes() != dl.draw_synthetic(labels, 1).tobytes()


def test_synthetic_data_set(small):
    data = dl.synthetic(0)
    assert data.name == "synthetic"
    assert data.train_images.shape == (400, 32, 32, 3)
    assert data.test_images.shape == (200, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [4] * 100
    assert np.bincount(data.test_labels).tolist() == [2] * 100
    assert data.train_labels.dtype == np.int32
    assert len(set(data.class_names)) == 100 and len(set(data.superclass_names)) == 20
    assert np.bincount(data.superclass_of_class).tolist() == [5] * 20
    for name, superclass in zip(data.class_names, data.superclass_of_class, strict=True):
        assert name.startswith(data.superclass_names[superclass] + "_class")
    assert all(data.superclass_of_class[i] != data.superclass_of_class[i + 1] for i in range(99))
    assert not {i.tobytes() for i in data.train_images} & {i.tobytes() for i in data.test_images}
    again, other = dl.synthetic(0), dl.synthetic(1)
    assert again.train_images.tobytes() == data.train_images.tobytes()
    assert other.train_images.tobytes() != data.train_images.tobytes()


def test_no_two_drawings_of_a_data_set_share_their_nuisances(small, monkeypatch):
    seeds = []
    monkeypatch.setattr(dl, "draw_synthetic", lambda labels, seed: seeds.append(tuple(seed)))
    for seed in (0, 1):
        dl.synthetic(seed)
    assert len(set(seeds)) == 4


def test_superclasses_are_told_apart_mirrored_or_not():
    """Nearest mean of whole-image features: knows the superclass, and as well in the mirror."""
    superclass = dl.PLACE // 5
    labels = np.tile(np.arange(100), 20)
    known = features(dl.draw_synthetic(labels, 0))
    means = np.stack([known[superclass[labels] == s].mean(0) for s in range(20)])
    images = dl.draw_synthetic(labels, 1)
    for tested in (images, images[:, :, ::-1]):
        distance = ((features(tested)[:, None] - means) ** 2).sum(-1)
        assert (distance.argmin(1) == superclass[labels]).mean() > 0.95


def test_classes_of_a_superclass_differ_in_a_detail_only():
    """The same seed draws the same nuisances, so only what the label decides differs."""
    of_place = np.argsort(dl.PLACE)

    def changed(a, b):
        first, second = (dl.draw_synthetic(np.full(50, of_place[p]), 0) for p in (a, b))
        return (np.abs(first.astype(int) - second).max(-1) > 30).mean((1, 2))

    for superclass in range(0, 100, 5):
        for detail in range(1, 5):
            share = changed(superclass, superclass + detail)
            assert share.min() > 0.01 and share.max() < 0.2
    assert min(changed(place, place + 5).mean() for place in range(0, 95, 5)) > 0.3


def test_detail_is_kept_by_a_shifted_crop():
    """What tells two classes of a superclass apart lies at least 4 pixels from the border."""
    of_place = np.argsort(dl.PLACE)
    first, second = (dl.draw_synthetic(np.full(200, of_place[p]), 0) for p in (2, 3))
    changed = (np.abs(first.astype(int) - second).max(-1) > 30).any(0)
    inner = np.zeros_like(changed)
    inner[4:-4, 4:-4] = True
    assert changed.any() and not (changed & ~inner).any()


# The real archive --------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists(REAL_ARCHIVE), reason=f"{REAL_ARCHIVE} is missing")
def test_real_archive(tmp_path):
    assert run(tmp_path, "--archive", REAL_ARCHIVE) == 0
    split = dl.read_split(tmp_path)
    assert split["counts"] == {"train": 45_000, "val": 5_000, "train_val": 50_000, "test": 10_000}
    assert dl.damaged_files(tmp_path, split) == []
    parts = {name: load(tmp_path, name) for name in split["counts"]}
    for name, per_class in (("train", 450), ("val", 50), ("train_val", 500), ("test", 100)):
        assert (np.bincount(parts[name][1]) == per_class).all()
    rows = {name: Counter(image.tobytes() for image in parts[name][0]) for name in parts}
    assert rows["train"] + rows["val"] == rows["train_val"]
    # The data set itself holds a few images twice; no other image is on both sides.
    assert all(rows["train_val"][row] > 1 for row in rows["train"].keys() & rows["val"].keys())
    assert split["indices_sha256"].startswith("067e10e5cab8d46c")  # the split of seed 0, for ever
    train, val = dl.split_indices(parts["train_val"][1], 0)
    np.testing.assert_array_equal(parts["train"][0], parts["train_val"][0][train])
    np.testing.assert_array_equal(parts["val"][0], parts["train_val"][0][val])
    apple = split["class_names"].index("apple")
    fruit = split["superclass_names"].index("fruit_and_vegetables")
    assert split["superclass_of_class"][apple] == fruit
    assert sorted(split["superclass_names"]) == sorted(variants.SEMANTIC_ORDER)
