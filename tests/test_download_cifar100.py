"""Tests of download_cifar100.py: no network but 127.0.0.1, no real data but one optional test."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.client
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
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_ARCHIVE, ROOT, fails, free_port, inside

import cifar100
import download_cifar100 as dl
import utils
from experiments import variants

PAYLOAD = np.random.default_rng(0).bytes(300_000)
SCRIPT = "download_cifar100.py"
PART = f"{dl.FOLDER}.tar.gz.part"


def run(folder, *flags):
    """What the command prints in this process, where it works."""
    code, output, error = inside(SCRIPT, "--dataset_path", folder, *flags)
    assert code == 0, error
    return output


def made(folder):
    """Names of a folder's files but that of its lock."""
    return sorted(set(os.listdir(folder)) - {".lock"})


def raising(error):
    """A function that raises, whatever it gets."""

    def function(*_, **__):
        raise error

    return function


# ---------------------------------------------------------------- a local server


@contextlib.contextmanager
def serve(*answers, payload=PAYLOAD):
    """Serves `payload`; request i is answered by answers[i], later ones by the last.

    Yields the address and the list of the first bytes that were asked for.
    """
    starts, stop = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            starts.append(int(self.headers.get("Range", "bytes=0-")[6:-1]))
            answers[min(len(starts), len(answers)) - 1](self, payload, starts[-1], stop)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/a.tar.gz", starts
        finally:
            stop.set()
            server.shutdown()


def reply(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def good(handler, payload, start, _, upto=None):
    total, size = len(payload), {"Content_Length": len(payload) - start}
    if start >= total:
        reply(handler, 416, Content_Range=f"bytes */{total}")
    elif start:
        span = f"bytes {start}-{total - 1}/{total}"
        reply(handler, 206, payload[start:upto], Content_Range=span, **size)
    else:
        reply(handler, 200, payload[:upto], **size)


def cut(handler, payload, start, stop):
    good(handler, payload, start, stop, upto=(start + len(payload)) // 2)


def hangs(handler, payload, start, stop):
    cut(handler, payload, start, stop)
    handler.wfile.flush()
    stop.wait(600)


def fixed(status, size, **headers):
    """The same answer to every request: a status and the first bytes."""
    return lambda handler, payload, *_: reply(handler, status, payload[:size], **headers)


without_range = fixed(200, None, Content_Length=len(PAYLOAD))
without_length = fixed(200, None)
other_range = fixed(206, 3, Content_Range=f"bytes 7-9/{len(PAYLOAD)}")
busy = fixed(503, 0, Content_Length=0)


def cut_chunk(handler, payload, *_):
    handler.protocol_version = "HTTP/1.1"
    reply(handler, 200, b"2000\r\n" + payload[:4096], Transfer_Encoding="chunked")


# ---------------------------------------------------------------- download


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(dl, "PAUSES", (0, 0))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def part(tmp_path):
    return tmp_path / "a.part"


@pytest.mark.parametrize(
    ("have", "answers", "expected"),
    [
        (0, [good], [0]),
        (0, [without_length], [0]),
        (0, [cut, good], [0, 150_000]),
        (0, [cut, cut, cut, good], [0, 150_000, 225_000, 262_500]),  # more than PAUSES
        (0, [cut, without_range], [0, 150_000]),
        (0, [cut, other_range, good], [0, 150_000, 0]),
        (0, [cut_chunk, good], [0, 4096]),
        (0, [lambda *_: None, good], [0, 0]),  # closes the connection
        (0, [busy, good], [0, 0]),
        (0, [busy, cut, fixed(429, 0, Content_Length=0), good], [0, 0, 150_000, 150_000]),
        (1234, [good], [1234]),  # of an earlier run
        (300_000, [good], [300_000]),
        (300_004, [good], [300_004, 0]),  # of another file
    ],
)
def test_download_arrives_whole(have, answers, expected, part):
    part.write_bytes((PAYLOAD + b"more")[:have])
    with serve(*answers) as (url, starts):
        dl.download(url, part)
    assert part.read_bytes() == PAYLOAD
    assert starts == expected


def test_download_times_out_on_a_silent_server_and_resumes(part, monkeypatch):
    monkeypatch.setattr(dl, "TIMEOUT", 0.2)
    started = time.monotonic()
    with serve(hangs, good) as (url, starts):
        dl.download(url, part)
    assert time.monotonic() - started < 300  # the server is silent for ten minutes
    assert part.read_bytes() == PAYLOAD and starts == [0, 150_000]


def test_download_gives_up_and_keeps_what_it_has(part, monkeypatch):
    pauses = []
    monkeypatch.setattr(dl, "PAUSES", (1, 2, 3))
    monkeypatch.setattr(dl.time, "sleep", pauses.append)
    with serve(cut, busy) as (url, starts):
        with pytest.raises(ValueError, match="503.*again to go on after 150,000 bytes"):
            dl.download(url, part)
    assert pauses == [1, 2, 3] and len(starts) == 4
    assert part.read_bytes() == PAYLOAD[:150_000]


@pytest.mark.parametrize(
    ("answer", "left"), [(good, ", of 0.3 MB, 0:00 left"), (without_length, "")]
)
def test_progress_is_shown_with_the_time_left(answer, left, part, monkeypatch, capsys):
    monkeypatch.setattr(dl, "PROGRESS_INTERVAL", 0)
    with serve(answer) as (url, _):
        dl.download(url, part)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"receiving {part} from byte 0 on" and len(lines) >= 300_000 / 65_536
    assert lines[-1].startswith("0.3 MB, ") and lines[-1].endswith(f" kB/s{left}")


def test_a_refusal_ends_the_download_at_once(tmp_path):
    with serve(fixed(404, 0)) as (url, starts):
        fails(SCRIPT, "--dataset_path", tmp_path, "--url", url, says=("404", "--url", "--archive"))
    assert len(starts) == 1


def test_download_refuses_a_flood(part, monkeypatch):
    monkeypatch.setattr(dl, "MAX_BYTES", 100_000)
    with serve(without_length) as (url, _), pytest.raises(ValueError, match="than 100,000 bytes"):
        dl.download(url, part)
    assert part.stat().st_size < 200_000


def refused_url():
    return f"http://127.0.0.1:{free_port()}/a.tar.gz"


def test_no_network_is_told_fast_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(dl.time, "sleep", lambda _: pytest.fail("it waited"))
    flags = ("--dataset_path", tmp_path, "--url", refused_url())
    fails(SCRIPT, *flags, says=("refused", "--archive", "--synthetic"), status=3)
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), 3),
        (urllib.error.URLError(TimeoutError("timed out")), 3),
        (urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate")), 1),
        (http.client.InvalidURL("nonnumeric port: 'x'"), 1),
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "ordinal not in range(128)"), 1),
    ],
)
def test_what_is_no_network_and_what_is_not(error, code, tmp_path, monkeypatch):
    monkeypatch.setattr(dl.time, "sleep", lambda _: pytest.fail("it waited"))
    monkeypatch.setattr(dl.urllib.request, "urlopen", raising(error))
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    fails(SCRIPT, "--dataset_path", tmp_path, says=str(reason), status=code)


def test_network_lost_later_is_not_no_network(tmp_path, monkeypatch):
    errors = iter([dl.Interrupted("cut"), *[dl.NoNetwork("gone")] * 9])
    monkeypatch.setattr(dl, "_transfer", lambda *_: raising(next(errors))())
    fails(SCRIPT, "--dataset_path", tmp_path, says="gone; gave up")


@contextlib.contextmanager
def command(*flags, options=(), **settings):
    """download_cifar100.py as a process of its own, ended with the test."""
    words = [sys.executable, *options, SCRIPT, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **pipes, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_download_at_a_time_which_can_be_ended(number, tmp_path):
    part, flags = tmp_path / PART, ("--dataset_path", tmp_path, "--url")
    with serve(hangs) as (url, starts), command(*flags, url) as process:
        deadline = time.monotonic() + 600
        while not (part.exists() and part.stat().st_size == 150_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        fails(SCRIPT, *flags, url, says=f"another process is making {tmp_path}")
        process.send_signal(number)
        error = process.communicate(timeout=600)[1]
        assert len(starts) == 1 and made(tmp_path) == [PART]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert error.startswith(f"{SCRIPT}: interrupted") and error.count("\n") == 1
    with serve(good) as (url, starts):  # it goes on; what arrives is no archive
        fails(SCRIPT, *flags, url, says="cannot be read")
    assert starts == [150_000] and made(tmp_path) == []


def test_files_that_cannot_be_locked(small, tmp_path, monkeypatch):
    unsupported = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(utils.fcntl, "flock", raising(unsupported))
    assert "cannot be locked (No locks available)" in run(tmp_path, "--synthetic")


def test_full_disk_names_the_path_and_keeps_the_part(tmp_path):
    """Files may have 100,000 bytes: a download that is cut there goes on when there is room."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    flags = ("--dataset_path", tmp_path, "--url")
    with serve(good) as (url, starts), command(*flags, url, preexec_fn=limit) as process:
        error = process.communicate(timeout=600)[1]
    assert process.returncode == 1 and error.count("\n") == 1 and len(starts) == 1
    assert f"{tmp_path / PART} cannot be written (File too large): make room there" in error
    assert (tmp_path / PART).read_bytes() == PAYLOAD[:100_000]


# ---------------------------------------------------------------- archives


class Python2Array:
    """Is pickled as Python 2 pickles an array of bytes: as a string."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        reconstruct, _, (*state, data) = self.array.__reduce__()
        return reconstruct, (np.ndarray, (0,), "b"), (*state, data.decode("latin-1"))


def make_batch(per_class, seed):
    rng = np.random.default_rng(seed)
    fine = rng.permutation(np.repeat(np.arange(100), per_class))
    data = Python2Array(rng.integers(0, 256, (len(fine), 3072), np.uint8))
    return {"data": data, "fine_labels": fine.tolist(), "coarse_labels": (fine % 20).tolist()}


def make_members():
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    names["coarse_label_names"] = [f"superclass {i}" for i in range(20)]
    return {"train": make_batch(4, 1), "test": make_batch(2, 2), "meta": names}


def entry(name, body=b"abc", kind=tarfile.REGTYPE, link="", **pax):
    """What `tar_bytes` takes: an entry of a tar and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, len(body), pax
    return info, io.BytesIO(body)


def tar_bytes(blobs, extra=(), folder=dl.FOLDER):
    """A tar of the entries `extra`, then FOLDER/NAME for every blob."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, body in (*extra, *(entry(f"{folder}/{n}", body) for n, body in blobs.items())):
            tar.addfile(info, body)
    return file.getvalue()


@pytest.fixture
def small(monkeypatch):
    """Six images per class instead of 600."""
    for name, count in {"TRAIN": 4, "VAL": 1, "TEST": 2}.items():
        monkeypatch.setattr(dl, f"{name}_PER_CLASS", count)


@pytest.fixture
def pack(small, monkeypatch, tmp_path):
    """Writes members as an archive whose digests are taken for the official ones."""
    packers = {"gz": functools.partial(gzip.compress, compresslevel=1), "tar": bytes}
    packers["xz"] = functools.partial(lzma.compress, preset=0)

    def write(members, extra=(), name="small.tar.gz", **settings):
        blobs = {}
        for key, value in members.items():  # NumPy's module had another name
            blobs[key] = pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")
            monkeypatch.setitem(dl.MD5, key, hashlib.md5(blobs[key]).hexdigest())
            monkeypatch.setitem(dl.SHA256, key, hashlib.sha256(blobs[key]).hexdigest())
        path = tmp_path / name
        path.write_bytes(packers[name.split(".")[-1]](tar_bytes(blobs, extra, **settings)))
        return path

    return write


def unpack(path, folder):
    # Python 3.10.12 and 3.11.4 brought the filter; 3.12 warns where none is named.
    settings = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(path) as file:
        file.extractall(folder, **settings)
    return folder / dl.FOLDER


@pytest.mark.filterwarnings("error")
def test_archive_is_decoded(pack, tmp_path):
    """Also as a browser leaves it: the .tar, the folder, or the one that this was unpacked in."""
    members, linked = make_members(), tmp_path / "links"
    packed = [pack(members, name=name) for name in ("a.tar.gz", "a.tar.xz", "a.tar")]
    folder = unpack(packed[0], tmp_path / "unpacked")
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    for path in (*packed, folder, folder.parent, linked):
        data = dl.read_archive(path)
        assert data.name == "cifar100"
        assert data.train_images.shape == (400, 32, 32, 3)
        assert data.test_images.shape == (200, 32, 32, 3)
        assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
        row = members["train"]["data"].array[17]  # 1024 red values row by row, green, then blue
        assert (data.train_images[17, 3, 5] == row.reshape(3, 1024)[:, 3 * 32 + 5]).all()
        assert data.test_labels.tolist() == members["test"]["fine_labels"]
        assert data.superclass_of_class == [c % 20 for c in range(100)]
        assert data.class_names[7] == "class 7" and data.superclass_names[7] == "superclass 7"
    (linked / "test").unlink()
    with pytest.raises(ValueError, match="cannot be read.*No such file.*links/test"):
        dl.read_archive(linked)


def test_other_entries_are_neither_read_nor_written(pack):
    """The official files are found by their names, and nothing goes to the disk."""
    names = ("file", "../../evil", "/etc/evil", "train")
    for folder in (dl.FOLDER, f"./{dl.FOLDER}"):
        extra = [entry(f"{dl.FOLDER}/{name}") for name in names]
        extra += [entry(name) for name in ("elsewhere/train", "train", "../evil", "/etc/evil")]
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            extra.append(entry(f"{dl.FOLDER}/test", b"", kind, f"{dl.FOLDER}/file"))
        path = pack(make_members(), extra, folder=folder)
        assert len(dl.read_archive(path).train_labels) == 400
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["bomb.tar.gz", "bomb.tar.xz", "bomb.tar", "folder", "sparse.tar"])
def test_no_more_is_read_than_a_limit(name, pack, tmp_path, monkeypatch):
    """What is larger is refused, after no more than MAX_BYTES of it."""
    members, sizes, head, new = make_members(), [], dl._head, hashlib.new
    extra = entry("zeros", bytes(5_000_000))
    if name == "sparse.tar":  # an entry without data, of 8 GB of zeros
        del members["train"]
        pax = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "8000000000"}
        extra = entry(f"{dl.FOLDER}/train", b"", **pax)
    path = pack(members, [extra], name="a.tar" if name == "folder" else name)
    if name == "folder":
        path = unpack(path, tmp_path)
        os.truncate(path / "train", 5_000_000)
    monkeypatch.setattr(dl, "MAX_BYTES", 4_000_000)
    monkeypatch.setattr(dl, "_head", lambda *args: sizes.append(len(h := head(*args))) or h)
    monkeypatch.setattr(hashlib, "new", lambda _, b, **__: sizes.append(len(b)) or new("md5", b))
    with pytest.raises(ValueError, match="cannot be read|train is not the official one"):
        dl.read_archive(path)
    assert max(sizes) == 4_000_000


@pytest.mark.parametrize("kind", ["MD5", "SHA256"])
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_wrong_digest_is_refused_before_unpickling(kind, name, pack, monkeypatch):
    path = pack(make_members())
    monkeypatch.setitem(getattr(dl, kind), name, "0" * 32)
    monkeypatch.setattr(dl, "load_pickle", lambda _: pytest.fail("unpickled"))
    found = rf"{name} is not.*expected {kind.lower()} 0{{32}}, got [0-9a-f]+\)"
    with pytest.raises(ValueError, match=found):
        dl.read_archive(path)


def test_what_is_no_archive_or_not_all_of_it(pack):
    members = make_members()
    path = pack(members)
    bodies = [path.read_bytes()[:-1000], b"", b"no archive", b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh91AY"]
    name = f"{dl.FOLDER}/{members.popitem()[0]}"
    for extra in (
        [],
        [entry(name, b"", tarfile.SYMTYPE, name)],
        [entry(name, b"", tarfile.FIFOTYPE)],
    ):
        bodies.append(pack(members, extra).read_bytes())
    for body in bodies:
        path.write_bytes(body)
        with pytest.raises(ValueError, match="cannot be read"):
            dl.read_archive(path)


def test_fuzzed_archives_are_refused_in_one_way(tmp_path):
    """Bytes are overwritten, inserted or removed, at most places in what gives the structure."""
    path, rng = tmp_path / "fuzzed", np.random.default_rng(0)
    tar = tar_bytes({"train": b"a", "test": b"b", "meta": b"c"})[:3072]
    packed = [tar, gzip.compress(tar), lzma.compress(tar)]
    for trial in range(300):
        data = bytearray(packed[trial % 3])
        for _ in range(rng.integers(1, 6)):
            where = rng.integers(len(data))
            data[where : where + rng.integers(0, 3)] = rng.bytes(rng.integers(0, 3))
        path.write_bytes(data)
        with pytest.raises(ValueError, match="get it again"):
            dl.read_archive(path)


# ---------------------------------------------------------------- pickles

# What Python 2 writes for {'data': numpy.array([[1, 2]], 'uint8'), 'n': [5]}: strings are bytes.
PYTHON2_PICKLE = (
    b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
    b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x01K\x02\x86q\x08cnumpy\ndtype\nq\tU\x02u1q\n"
    b"K\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89"
    b"U\x02\x01\xfeq\x0ftq\x10bU\x01nq\x11]q\x12K\x05au."
)


@pytest.mark.filterwarnings("error")
def test_python2_pickle_is_read():
    loaded = dl.load_pickle(PYTHON2_PICKLE)
    assert loaded["data"].dtype == np.uint8 and loaded["data"].tolist() == [[1, 254]]
    assert loaded["n"] == [5]


class Attack:
    """Pickled, it is a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_runs_code_is_refused(protocol, tmp_path):
    victim = str(tmp_path / "made_by_the_pickle")
    for attack in [
        Attack(os.system, f"touch {victim}"),
        Attack(eval, f"__import__('os').mkdir({victim!r})"),
        Attack(np.savez, victim),
        Attack(os.mkdir, victim),
    ]:
        data = pickle.dumps({"data": attack}, protocol=protocol)
        with pytest.raises(ValueError, match="asks for"):
            dl.load_pickle(data)
        assert not os.listdir(tmp_path)
    pickle.loads(data)
    assert os.path.isdir(victim)  # so the attack itself works


# ---------------------------------------------------------------- files


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def load(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return file["images"], file["labels"]


def test_archive_to_files(pack, tmp_path):
    members, folder = make_members(), tmp_path / "new" / "data"
    archive = pack(members)
    run(folder, "--archive", archive, "--seed", 3)
    assert archive.exists()
    split = json.loads((folder / "split.json").read_text())
    assert made(folder) == sorted([*split["files"], "split.json"])
    assert split["dataset"] == "cifar100" and split["seed"] == 3
    assert split["counts"] == {"train": 300, "val": 100, "train_val": 400, "test": 200}
    assert dl.read_split(folder) == split
    for name, count in split["counts"].items():
        images, labels = load(folder, name)
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert (np.bincount(labels) == count // 100).all() and labels.dtype == np.int32
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


@pytest.fixture
def drawn(small, tmp_path):
    """A folder of a small synthetic data set."""
    run(tmp_path, "--synthetic")
    return tmp_path


def test_what_is_complete_is_left_alone(drawn):
    before = snapshot(drawn)
    assert "verified; nothing to do" in run(drawn, "--synthetic")
    for flags, fix in ((["--synthetic", "--seed", 1], "--seed 0"), ([], "--synthetic")):
        fails(SCRIPT, "--dataset_path", drawn, *flags, says=(fix, "--dataset_path"))
    assert snapshot(drawn) == before


def flip_a_bit(path):
    images, labels = np.load(path)["images"], np.load(path)["labels"]
    images[0, 0, 0, 0] ^= 1
    np.savez(path, images=images, labels=labels)


@pytest.mark.parametrize("name", [f"{name}.npz" for name in cifar100.SPLITS])
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-200])],
    ids=["missing", "flipped", "truncated"],
)
def test_damaged_file_is_rebuilt(name, harm, drawn):
    before = (drawn / name).read_bytes()
    harm(drawn / name)
    assert f": {name} missing or damaged" in run(drawn, "--synthetic")
    assert (drawn / name).read_bytes() == before


def test_what_killed_runs_left_goes(pack, tmp_path):
    """Of one that wrote a file; of one that had written all, and not yet removed the download."""
    archive, folder = pack(make_members()), tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        part = f"train.npz.{process.pid}.part"
    folder.mkdir()
    (folder / part).write_bytes(b"half")
    run(folder, "--archive", archive)
    (folder / PART).write_bytes(b"whole")
    assert "nothing to do" in run(folder, "--archive", archive)
    assert made(folder) == sorted(["split.json", *(f"{name}.npz" for name in cifar100.SPLITS)])


@pytest.mark.parametrize("needed", ["train_val.npz", "test.npz"])
def test_damaged_part_of_the_split_needs_no_archive(needed, pack, tmp_path):
    folder, url = tmp_path / "data", refused_url()
    run(folder, "--archive", pack(make_members()))
    before = {name: body for name, (body, _) in snapshot(folder).items()}
    (folder / "train.npz").unlink()
    flip_a_bit(folder / "val.npz")
    run(folder, "--url", url)
    assert {name: body for name, (body, _) in snapshot(folder).items()} == before
    (folder / needed).unlink()
    fails(SCRIPT, "--dataset_path", folder, "--url", url, says="refused", status=3)


def test_damaged_split_json_is_rebuilt(drawn):
    path, split = drawn / "split.json", dl.read_split(drawn)
    texts = ["", "{", "[]", "null", '{"dataset": "cifar100"}', "[" * 100_000]
    for key in ("dataset", "seed", "files", *dl.NAMES, "indices_sha256"):
        texts += [json.dumps({**split, key: value}) for value in (None, [], {}, 1.5, ["val.npz"])]
    for text in texts:
        path.write_text(text)
        assert dl.read_split(drawn) is None
    for value in (None, [], {}, 1.5, dict.fromkeys(cifar100.SPLITS, 0)):
        path.write_text(json.dumps({**split, "counts": value}))
        assert len(dl.damaged_files(drawn, split)) == 4
    run(drawn, "--synthetic")
    assert dl.read_split(drawn) == split


@pytest.mark.parametrize(
    ("error", "says"), [(OSError(28, "No space"), "make room"), (MemoryError(), "out of memory")]
)
def test_failed_write_leaves_no_half_file(error, says, small, tmp_path, monkeypatch):
    write = raising(error)
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and write())
    fails(SCRIPT, "--dataset_path", tmp_path, "--synthetic", says=says)
    assert made(tmp_path) == []


def test_split_json_is_written_last(small, tmp_path, monkeypatch):
    replaced, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (replaced.append(os.path.basename(b)), replace(a, b))
    )
    run(tmp_path, "--synthetic")
    assert len(replaced) == 5 and replaced[-1] == "split.json"


def test_download_of_other_files_is_deleted(pack, tmp_path, monkeypatch):
    payload, folder = pack(make_members()).read_bytes(), tmp_path / "data"
    monkeypatch.setitem(dl.MD5, "train", "0" * 32)
    with serve(good, payload=payload) as (url, _):
        fails(SCRIPT, "--dataset_path", folder, "--url", url, says="train is not the official one")
    assert made(folder) == []


def test_finished_download_is_kept_until_the_files_are_there(pack, tmp_path, monkeypatch):
    """Where the memory ends while it is read or written. A synthetic set lets it be."""
    payload, folder = pack(make_members()).read_bytes(), tmp_path / "data"
    with serve(cut, good, payload=payload) as (url, starts):
        monkeypatch.setattr(dl, "URL", url)  # the official one
        for function in ("_head", "write_split"):
            with monkeypatch.context() as patch:
                patch.setattr(dl, function, raising(MemoryError()))
                fails(SCRIPT, "--dataset_path", folder, says="out of memory")
            assert (folder / PART).read_bytes() == payload
        output = run(folder)
    assert "169 MB" in output and "--archive" in output and len(made(folder)) == 5
    assert starts == [0, len(payload) // 2, len(payload), len(payload)]
    (folder / PART).write_bytes(b"part")
    (folder / "split.json").unlink()
    run(folder, "--synthetic")
    assert (folder / PART).read_bytes() == b"part"


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--archive", "a", "--synthetic"], "--synthetic: not allowed with argument --archive"),
        (["--archive", "a", "--url", "http://a/"], "--url: not allowed with argument --archive"),
        (["--url", "http://a/", "--synthetic"], "--synthetic: not allowed with argument --url"),
        (["--synth"], "did you mean --synthetic?"),
        (["--seed", "-1"], "'-1'"),
        (["--archive", ""], "empty"),
        (["--dataset_path", ""], "empty"),
        (["--url", "file:///etc/passwd"], "expected http"),
        (["--dataset_path=s3://bucket", "--synthetic"], "expected a path of this machine"),
        (["--archive", "gs://bucket/a.tar.gz"], "expected a path of this machine"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(SCRIPT, *flags, says=message, status=2)
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    flags = ("--dataset_path", tmp_path / "file", "--synthetic")
    fails(SCRIPT, *flags, says=f"{tmp_path / 'file'} cannot be written")
    flags = ("--dataset_path", tmp_path / "data", "--archive", tmp_path / "missing")
    fails(SCRIPT, *flags, says=f"{tmp_path / 'missing'} cannot be read")


def test_help_as_a_command():
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    with command("--help", options=["-OO"], env=environment) as process:
        output, error = process.communicate(timeout=600)
    assert process.returncode == 0 and not error
    for flag in ("--dataset_path", "--archive", "--url", "--synthetic", "--seed"):
        assert flag in output


def test_what_is_not_installed_is_one_line():
    with command("--help", options=["-S"]) as process:  # without site-packages
        error = process.communicate(timeout=600)[1]
    assert process.returncode == 1 and error.count("\n") == 1
    assert error.startswith(f"{SCRIPT}: error: ") and "has no numpy, six: `pip install" in error


def test_nothing_heavy_is_imported():
    code = "import sys, download_cifar100; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=600).returncode == 0


# ---------------------------------------------------------------- synthetic images


def features(images):
    """Standardized as the input pipeline does; then power spectrum and channel correlations."""
    images = images.astype(np.float32)
    images -= images.mean((1, 2), keepdims=True)
    images /= images.std((1, 2), keepdims=True)
    power = np.log1p(np.abs(np.fft.rfft2(images, axes=(1, 2)))).reshape(len(images), -1)
    correlations = np.einsum("nyxc,nyxd->ncd", images, images).reshape(len(images), -1) / 1024
    return np.concatenate([power - power.mean(1, keepdims=True), 10 * correlations], axis=1)


def test_synthetic_data_set(small):
    data = dl.synthetic(0)
    assert data.name == "synthetic"
    assert data.train_images.shape == (400, 32, 32, 3)
    assert data.test_images.shape == (200, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [4] * 100
    assert np.bincount(data.test_labels).tolist() == [2] * 100
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
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
    labels = np.tile(np.arange(100), 10)
    known = features(dl.draw_synthetic(labels, 0))
    means = np.stack([known[superclass[labels] == s].mean(0) for s in range(20)])
    images = dl.draw_synthetic(labels, 1)
    for tested in (images, images[:, :, ::-1]):
        distance = (means**2).sum(-1) - 2 * features(tested) @ means.T  # and a constant
        assert (distance.argmin(1) == superclass[labels]).mean() > 0.95


def test_classes_of_a_superclass_differ_in_a_detail_only():
    """The same seed draws the same nuisances, so only what the label decides differs."""
    of_place = np.argsort(dl.PLACE)

    def changed(a, b):
        first, second = (dl.draw_synthetic(np.full(12, of_place[p]), 0) for p in (a, b))
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


# ---------------------------------------------------------------- the real archive


@pytest.mark.skipif(not os.path.exists(REAL_ARCHIVE), reason=f"{REAL_ARCHIVE} is missing")
def test_real_archive(tmp_path):
    """Data and split of seed 0 are the same for ever."""
    run(tmp_path, "--archive", REAL_ARCHIVE)
    split = dl.read_split(tmp_path)
    assert split["counts"] == {"train": 45_000, "val": 5_000, "train_val": 50_000, "test": 10_000}
    assert dl.damaged_files(tmp_path, split) == []
    digests = {name: digest[:16] for name, digest in split["files"].items()}
    assert digests == {
        "train.npz": "2ec4ff02dfa85b33",
        "val.npz": "f8be432b31476362",
        "train_val.npz": "33b4898e79a0d0ac",
        "test.npz": "bf7086fd9842a9f0",
    }
    assert split["indices_sha256"].startswith("067e10e5cab8d46c")
    train, val = (load(tmp_path, name)[1] for name in ("train", "val"))
    assert (np.bincount(train) == 450).all() and (np.bincount(val) == 50).all()
    apple = split["class_names"].index("apple")
    fruit = split["superclass_names"].index("fruit_and_vegetables")
    assert split["superclass_of_class"][apple] == fruit
    assert sorted(split["superclass_names"]) == sorted(variants.SEMANTIC_ORDER)
