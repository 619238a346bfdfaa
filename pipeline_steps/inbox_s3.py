"""An inbox in a bucket: each first part of a key below the prefix is a delivery."""

import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from pipeline_steps import archives, buckets, sources
from pipeline_steps.deliveries import Delivery, RefusedError, archive_suffix, ignored, is_partial
from pipeline_steps.errors import PleatError
from pipeline_steps.progress import say


class BucketInbox:
    """All objects below `s3://bucket/prefix`, by boto3's usual settings."""

    def __init__(self, address: str) -> None:
        self.bucket, self.prefix = buckets.split_address(address)
        self.address = f"s3://{self.bucket}/{self.prefix}"
        if not self.prefix:
            raise PleatError(
                f"inbox.source is the whole bucket {address}, but what was handled is moved to a place beside the "
                f"inbox; name a prefix in it, such as s3://{self.bucket}/inbox."
            )

    def look(self, name: str | None = None) -> list[Delivery]:
        """See `Inbox`. A delivery's age is reckoned by the store's clock."""
        found: dict[str, list[dict[str, Any]]] = {}
        now = time.time()
        with buckets.connected(self.address, "read") as client:
            for item, now in _listed(client, self.bucket, self.prefix + (name or "")):  # noqa: B007
                entry = item["Key"].removeprefix(self.prefix).partition("/")[0]
                is_file = not item["Key"].endswith("/")  # others only stand for folders
                if is_file and not ignored(entry) and name in (None, entry):
                    found.setdefault(entry, []).append(item)
        return [self._delivery(entry, found[entry], now) for entry in sorted(found)]

    def fetch(self, delivery: Delivery, folder: Path) -> None:
        """See `Inbox`."""
        source = self.address + delivery.name
        if delivery.name not in delivery.files:
            try:
                # All of them before the first is downloaded.
                targets = [archives.target_of(key.partition("/")[2], folder, source) for key in delivery.files]
            except PleatError as error:
                raise RefusedError(str(error)) from error
            if not any(targets):
                raise RefusedError(f"{source} holds hidden files only.")
            buckets.download(source, folder)
            return
        archive = folder.with_name(f"archive{archive_suffix(delivery.name)}")
        with buckets.connected(source, "download") as client:
            client.download_file(self.bucket, self.prefix + delivery.name, str(archive))
        try:
            sources.bring(str(archive), folder)
        except PleatError as error:
            raise RefusedError(str(error).replace(str(archive), source)) from error

    def move(self, name: str, files: Mapping[str, str], place: str, batch: str, notes: Mapping[str, str]) -> None:
        """See `Inbox`. A store cannot rename: everything is copied within it, then removed."""
        target = f"{self.prefix.rstrip('/')}_{place}/{batch}/"
        with buckets.connected(self.address + name, f"move to s3://{self.bucket}/{target}:") as client:
            there = {item["Key"]: _state(item) for item, _ in _listed(client, self.bucket, self.prefix + name)}
            same = [key for key, state in files.items() if there.get(self.prefix + key) == state]
            changed = [key for key in files if key not in same and self.prefix + key in there]
            for title, text in notes.items():
                client.put_object(Bucket=self.bucket, Key=target + title, Body=text.encode())
            for key in same:
                client.copy({"Bucket": self.bucket, "Key": self.prefix + key}, self.bucket, target + key)
            marks = [key for key in there if key.startswith(f"{self.prefix}{name}/") and key.endswith("/")]
            for key in [self.prefix + key for key in same] + marks:
                client.delete_object(Bucket=self.bucket, Key=key)
        if changed:
            say(f"{self.address}{name}: {len(changed):,} objects have changed since, so they stay in the inbox")

    def _delivery(self, name: str, items: list[dict[str, Any]], now: float) -> Delivery:
        files = {item["Key"].removeprefix(self.prefix): _state(item) for item in items}
        newest = max(item["LastModified"].timestamp() for item in items)
        n_bytes = sum(item["Size"] for item in items)
        partial = [key for key in files if is_partial(key)]
        obstacle = "" if n_bytes else "It is empty."
        if partial:
            obstacle = f"{partial[0]} has the name of a file that is still being written; it waits until that is gone."
        return Delivery(name, files, n_bytes, max(0.0, now - newest), obstacle)


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[tuple[dict[str, Any], float]]:
    """Every object below a prefix, marks for folders included, each with the store's time when it was listed."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        for item in page.get("Contents", ()):
            yield item, now


def _state(item: Mapping[str, Any]) -> str:
    return f"{item['ETag']} {item['Size']} {item['LastModified'].timestamp()}"
