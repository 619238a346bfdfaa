"""An inbox in a bucket, on an S3 server over HTTP (moto's)."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import content
from inbox_help import batches, change, dark, images, settings, take
from s3_store import objects, put

from pipeline_steps import inbox, inbox_s3
from pipeline_steps.errors import PleatError

pytest_plugins = ["inbox_project", "s3_store"]


@pytest.fixture(autouse=True)
def source(shop: Path) -> None:
    change(shop, {"inbox.source": "s3://photos/in"})


def test_folders_and_archives_of_a_bucket(shop: Path, client: Any) -> None:
    new = images(100, 6)
    put(client, new, "in/good set/")
    put(client, {"": b"", "Hat/": b"", ".DS_Store": b"x"}, "in/good set/")
    put(client, {"": b"", "to be filled/": b""}, "in/")
    put(client, images(200, 12, dark), "in/night/")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in new.items():
            archive.writestr(name, data)
    put(client, {"again.zip": packed.getvalue(), "half.zip.part": b"x", ".hidden": b"x", "note.txt": b"x"}, "in/")
    put(client, {"Hat/../../evil.jpg": b"evil", "Hat/a.jpg": b"a"}, "in/outside/")
    put(client, {"x.jpg": b"x"}, "in-other/Hat/")
    found = {one.delivery: one for one in take(shop)}
    assert {name: one.outcome for name, one in found.items()} == {
        "again.zip": "added",
        "good set": "nothing new",
        "night": "set aside",
        "note.txt": "set aside",
        "outside": "set aside",
    }
    added = found["again.zip"].batch
    assert added is not None
    assert batches(shop) == ["old", added]
    assert content(shop / "data" / "raw" / added) == new
    assert found["outside"].reasons[0].startswith("s3://photos/in/outside holds 'Hat/../../evil.jpg', which leads")

    left = objects(client)
    assert {key for key in left if key.startswith("in/")} == {
        "in/",
        "in/to be filled/",
        "in/.hidden",
        "in/half.zip.part",
    }
    done = {key.split("/", 2)[2]: data for key, data in left.items() if key.startswith("in_done/")}
    assert {key: data for key, data in done.items() if key.startswith("good set/H")} == {
        f"good set/{name}": data for name, data in new.items() if name.startswith("H")
    }
    assert done["again.zip"] == packed.getvalue()
    aside = {key.split("/", 2)[2]: data for key, data in left.items() if key.startswith("in_set_aside/inbox_night_")}
    assert aside["reasons.txt"].decode().splitlines() == found["night"].reasons
    assert aside["index.html"] == (shop / str(found["night"].report)).read_bytes()
    assert {f"night/{name}" for name in images(200, 12)} < aside.keys()
    assert left["in-other/Hat/x.jpg"] == b"x"
    inbox.acknowledge(list(found.values()), shop)
    assert take(shop) == []


def test_objects_that_are_still_arriving(shop: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(shop, {"inbox.source": "s3://photos/in", "inbox.settle_s": 60})
    put(client, images(100, 3), "in/new/")
    [waits] = take(shop)
    assert waits.outcome == "waiting"
    assert "is taken after 60 s without a change" in waits.reasons[0]
    [seen] = inbox.waiting(settings(shop), shop)
    assert (seen.name, seen.n_files(), seen.n_bytes) == ("new", 3, sum(map(len, images(100, 3).values())))
    # By the store's clock, not by this machine's.
    later = datetime.now(UTC).timestamp() + 3600
    monkeypatch.setattr(inbox_s3, "parsedate_to_datetime", lambda _: datetime.fromtimestamp(later, UTC))
    assert inbox.waiting(settings(shop), shop)[0].wait(60) == ""

    true = inbox_s3.BucketInbox.fetch

    def fetch_while_written(self: inbox_s3.BucketInbox, delivery: Any, folder: Path) -> None:
        true(self, delivery, folder)
        put(client, {"Hat/late.jpg": b"late"}, "in/new/")

    monkeypatch.setattr(inbox_s3.BucketInbox, "fetch", fetch_while_written)
    [waits] = take(shop)
    assert waits.reasons == ["It changed while it was copied."]
    assert batches(shop) == ["old"]


def test_a_move_that_was_cut_short_is_ended_by_the_next_look(
    shop: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: everything is copied and a part of it deleted, so the rest looks like another delivery."""
    new = images(100, 6)
    put(client, new, "in/new/")
    true, deleted = inbox_s3.buckets.connected, []

    class StoppedError(BaseException):
        pass

    @contextmanager
    def connected(source: str, verb: str) -> Iterator[Any]:
        with true(source, verb) as client:
            delete = client.delete_object

            def delete_object(**named: Any) -> None:
                if len(deleted) == 2:
                    raise StoppedError
                deleted.append(named["Key"])
                delete(**named)

            client.delete_object = delete_object
            yield client

    with monkeypatch.context() as patch:
        patch.setattr(inbox_s3.buckets, "connected", connected)
        with pytest.raises(StoppedError):
            take(shop)
    assert len([key for key in objects(client) if key.startswith("in/new/")]) == 4
    [added] = take(shop)
    assert added.outcome == "added"
    assert batches(shop) == ["old", added.batch]
    left = objects(client)
    assert {key.removeprefix(f"in_done/{added.batch}/") for key in left} == {"index.html", *(f"new/{n}" for n in new)}


def test_addresses_and_stores_that_do_not_work(shop: Path, client: Any) -> None:
    change(shop, {"inbox.source": "s3://photos"})
    with pytest.raises(PleatError, match=r"is the whole bucket s3://photos, but .* such as s3://photos/inbox"):
        take(shop)
    change(shop, {"inbox.source": "s3://absent/in"})
    with pytest.raises(PleatError, match="Could not read s3://absent/in/: the bucket does not exist"):
        take(shop)
