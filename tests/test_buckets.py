"""Downloads from an S3 server over HTTP (moto's), and every way in which a store says no."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3_store import put

from pipeline_steps import buckets, sources
from pipeline_steps.errors import PleatError

pytest_plugins = ["s3_store"]

SET = {"images.csv": b"image,sender_id,label\na,1,Hat\n", "images/a.jpg": b"a", "Röcke/b c+d%20.jpg": b"b"}


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging" / "batch"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("address", ["s3://photos/in/set", "s3://photos/in/set/"])
def test_a_prefix_becomes_a_folder(client: Any, batch: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(buckets, "KEYS_A_PART", 2)
    large = {"images/large.jpg": os.urandom(9_000_000)}  # fetched in several ranges
    put(client, {f"in/set/{name}": data for name, data in (SET | large).items()})
    put(client, {"in/set-old/x.jpg": b"x", "other.jpg": b"x", "in/set/images/": b"", "in/set/.DS_Store": b"x"})
    sources.bring(address, batch)
    assert contents(batch) == SET | large


def test_a_whole_bucket(client: Any, batch: Path) -> None:
    put(client, {"Hat/a.jpg": b"a"})
    sources.bring("s3://photos", batch)
    assert contents(batch) == {"Hat/a.jpg": b"a"}


@pytest.mark.parametrize("key", ["in/../../evil.jpg", "in//../evil.jpg", "in/..\\evil.jpg"])
def test_a_key_that_leads_outside_is_refused_before_anything_is_fetched(client: Any, batch: Path, key: str) -> None:
    put(client, {"in/Hat/a.jpg": b"a", key: b"evil"})
    with pytest.raises(PleatError, match=r"s3://photos/in holds .*evil\.jpg', which leads outside"):
        sources.bring("s3://photos/in", batch)
    assert not batch.exists()


def test_nothing_there(client: Any, batch: Path) -> None:
    put(client, {"set-old/a.jpg": b"a"})
    with pytest.raises(PleatError, match="No objects lie below s3://photos/set/; check"):
        sources.bring("s3://photos/set", batch)
    with pytest.raises(PleatError, match="Could not download s3://absent/set: the bucket does not exist"):
        sources.bring("s3://absent/set", batch)
    assert not batch.exists()


def test_no_credentials_or_server(client: Any, batch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refused at once
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:s3cret@127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(PleatError, match="Could not download s3://photos/set: Could not connect") as caught:
            sources.bring("s3://photos/set", batch)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(PleatError, match=r"Could not download .*profile \(nobody\) could not be found"):
        sources.bring("s3://photos/set", batch)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(PleatError, match="No credentials were found for s3://photos/set; set AWS_ACCESS_KEY_ID"):
        sources.bring("s3://photos/set", batch)


@pytest.mark.parametrize("address", ["s3://", "s3:///set", "s3://a b/set", "s3://me:s3cret@host/set"])
def test_addresses_without_a_usable_bucket(address: str) -> None:
    with pytest.raises(PleatError, match="Expected an address such as s3://bucket/folder") as caught:
        buckets.split_address(address)
    assert "s3cret" not in str(caught.value)


def test_ctrl_c_ends_a_download(client: Any, batch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends half of an object keeps the download open until it is interrupted."""
    listing = (
        b'<?xml version="1.0"?><ListBucketResult><Name>photos</Name><IsTruncated>false</IsTruncated><Contents>'
        b'<Key>Hat/a.jpg</Key><Size>7000000</Size><ETag>"x"</ETag></Contents></ListBucketResult>'
    )
    code = "import sys; from pathlib import Path; from pipeline_steps.buckets import download; "
    code += "download('s3://photos', Path(sys.argv[1]))"
    with socket.create_server(("127.0.0.1", 0)) as slow:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{slow.getsockname()[1]}")
        child = subprocess.Popen([sys.executable, "-c", code, str(batch)], stderr=subprocess.PIPE)
        answer(slow, listing, len(listing)).close()
        connection = answer(slow, bytes(1_000_000), 7_000_000)
        until(lambda: any(path.stat().st_size for path in batch.rglob("a.jpg*")))
        child.send_signal(signal.SIGINT)
        with connection, suppress(ConnectionError):
            while child.poll() is None:  # the server goes on, far from the object's end
                connection.sendall(bytes(20_000))
                time.sleep(0.05)
        _, said = child.communicate(timeout=20)
        assert child.returncode
        assert b"KeyboardInterrupt" in said


def answer(server: socket.socket, body: bytes, n_bytes: int) -> socket.socket:
    """Answers the next request with `body`, announced as `n_bytes` long, and gives back the open connection."""
    connection, _ = server.accept()
    while b"\r\n\r\n" not in connection.recv(65536):
        pass
    head = b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "x"\r\nContent-Length: %d\r\n\r\n' % n_bytes
    connection.sendall(head + body)
    return connection


def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 30
        time.sleep(0.01)
