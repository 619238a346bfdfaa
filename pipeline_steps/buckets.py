"""Downloading a data set from S3 or any store that speaks its protocol, and uploading a file to it."""

import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.archives import target_of
from pipeline_steps.errors import PleatError
from pipeline_steps.progress import track

N_THREADS = 16
KEYS_A_PART = 1000  # downloads queued at a time, so that a bucket of millions does not fill the memory
REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; check its name and AWS_ENDPOINT_URL",
    "AccessDenied": "the credentials do not allow it; check the policy of the bucket or use others",
    "403": "the credentials do not allow it; check the policy of the bucket or use others",
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session has expired; log in again",
}


def download(source: str, folder: Path) -> None:
    """Downloads every object below `s3://bucket/prefix` into `folder`, which must be new, by boto3's usual settings.

    Raises:
        PleatError: the address is wrong, nothing lies below it, a key leads outside the folder, credentials are missing
            or refused, or the store cannot be reached.
    """
    bucket, prefix = split_address(source)
    with connected(source, "download") as client:
        objects = _list(client, bucket, prefix)
        files = {key: target_of(key[len(prefix) :], folder, source) for key in objects}
        wanted = [(key, path, objects[key]) for key, path in files.items() if path is not None]
        if not wanted:
            raise PleatError(f"No objects lie below s3://{bucket}/{prefix}; check the bucket's name and the prefix.")
        folder.mkdir()
        with closing(_fetch(client, bucket, wanted)) as steps:
            for _ in track(steps, f"download {source}", len(wanted), "objects"):
                pass


def upload(path: Path, address: str) -> None:
    """Uploads a file as the object `s3://bucket/key`, which appears only when it is complete.

    Raises:
        PleatError: the address is wrong, credentials are missing or refused, or the store cannot be reached.
    """
    bucket, key = split_object(address)
    with connected(address, "upload to") as client, path.open("rb") as file:
        client.upload_fileobj(file, bucket, key)  # upload_file would wrap what the store answers


@contextmanager
def connected(source: str, verb: str) -> Iterator[Any]:
    """Yields an S3 client by boto3's usual settings; what goes wrong with it in the block becomes a sentence.

    Raises:
        PleatError: credentials are missing or refused, or the store refuses or cannot be reached; temporary where it
            may go better later.
    """
    # Imported here, because boto3 takes half a second that no other source needs.
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from botocore.config import Config

    try:
        # A session of its own: the default one would remember credentials that are gone since.
        yield boto3.Session().client("s3", config=Config(max_pool_connections=N_THREADS))
    except exceptions.NoCredentialsError:
        raise PleatError(
            f"No credentials were found for {source}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
            "(and AWS_ENDPOINT_URL for a store other than AWS)."
        ) from None
    except exceptions.ClientError as error:
        answer = error.response.get("Error", {})
        code = str(answer.get("Code"))
        reason = REMEDIES.get(code, f"the store answered {code}: {answer.get('Message')}")
        raise PleatError(f"Could not {verb} {source}: {reason}.", temporary=code not in REMEDIES) from error
    except (exceptions.BotoCoreError, Boto3Error) as error:
        away = isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError))
        reason = redact(str(error)).rstrip(".")
        raise PleatError(f"Could not {verb} {source}: {reason}.", temporary=away) from error


def split_address(source: str) -> tuple[str, str]:
    """Splits `s3://bucket/some/prefix` into the bucket and a prefix that ends in a slash or is empty.

    Raises:
        PleatError: there is no bucket's name, or a query or version is attached.
    """
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])(?:/(.*))?", source, re.DOTALL)
    if found is None:
        raise PleatError(f"Expected an address such as s3://bucket/folder, but got '{redact(source)}'.")
    prefix = (found[2] or "").strip("/")
    # Without the slash `photos` would bring `photos-old/` as well.
    return found[1], f"{prefix}/" if prefix else ""


def split_object(address: str) -> tuple[str, str]:
    """Splits `s3://bucket/some/key` into the bucket and the key.

    Raises:
        PleatError: there is no bucket's name or no key, or the key ends in a slash as a folder's does.
    """
    bucket, prefix = split_address(address)
    if not prefix or address.endswith("/"):
        raise PleatError(f"Expected the address of a file such as s3://bucket/folder/a, but got '{redact(address)}'.")
    return bucket, prefix.rstrip("/")


def redact(text: str) -> str:
    """Removes user names and passwords from the addresses in `text`."""
    return re.sub(r"://[^/@\s'\"]+@", "://***@", text)


@dataclass
class _Known:
    """What the listing said of an object; s3transfer would ask for each again."""

    n_bytes: int
    etag: str

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self.n_bytes)
        future.meta.provide_object_etag(self.etag)


def _list(client: Any, bucket: str, prefix: str) -> dict[str, _Known]:
    """Every object by its key; keys that end in a slash only stand for folders and are left out."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    items = (item for page in pages for item in page.get("Contents", ()))
    return {item["Key"]: _Known(item["Size"], item["ETag"]) for item in items if not item["Key"].endswith("/")}


def _fetch(client: Any, bucket: str, files: list[tuple[str, Path, _Known]]) -> Generator[None, None, None]:
    """Downloads in parallel and yields once for each object that is complete; Ctrl-C cancels what is under way."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(max_concurrency=N_THREADS, preferred_transfer_client="classic")
    with create_transfer_manager(client, config) as manager:
        for start in range(0, len(files), KEYS_A_PART):
            under_way = []
            for key, path, known in files[start : start + KEYS_A_PART]:
                path.parent.mkdir(parents=True, exist_ok=True)
                under_way.append(manager.download(bucket, key, str(path), subscribers=[known]))
            for download_of_one in under_way:
                download_of_one.result()
                yield
