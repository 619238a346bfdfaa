"""Unpacking .zip and .tar files that may be hostile: nothing leaves the folder, nothing expands without bound."""

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from pipeline_steps.errors import PleatError
from pipeline_steps.formats import hidden
from pipeline_steps.progress import track

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# An archive may expand to the smaller of the two; photos barely compress, tables and bitmaps rarely beyond this.
MAX_BYTES = 64 * 2**30
MAX_RATIO, RATIO_SLACK_BYTES = 200, 100_000_000
MAX_MEMBERS = 5_000_000
MAX_READ = 2**24  # no tar header needs more; a larger one would be held in memory
CHUNK = 2**20
# What the standard library raises for broken bytes.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
)


@dataclass
class Member:
    """One entry of an archive: `stream` is None for a folder; `n_read` bytes of the archive lie before it."""

    name: str
    stream: IO[bytes] | None
    n_read: int


def extract(archive: Path, folder: Path) -> None:
    """Unpacks `archive` into `folder`, which must be new; hidden and system files are left out.

    Raises:
        PleatError: the archive is damaged, or a member is a link, a device, leads outside the folder or is there twice,
            or the archive expands beyond the limits.
    """
    n_bytes = archive.stat().st_size
    limit = min(MAX_BYTES, MAX_RATIO * n_bytes + RATIO_SLACK_BYTES)
    members = _zip_members(archive) if archive.suffix.lower() == ".zip" else _tar_members(archive, limit)
    steps = _unpack(members, archive, folder, limit)
    try:
        for _ in track(steps, f"unpack {archive.name}", max(1, n_bytes // CHUNK), "MiB"):
            pass
    except DAMAGE as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        # bz2 says so in this way; errors of the disk have a number.
        if error.errno is not None:
            raise
        raise _damaged(archive, error) from error
    except RuntimeError as error:
        # zipfile's way to ask for a password.
        raise PleatError(f"{archive} cannot be unpacked: {error}.") from error


def target_of(name: str, folder: Path, origin: str) -> Path | None:
    """Where the file that `origin` calls `name` goes below `folder`; None if it is hidden or a system file.

    Raises:
        PleatError: the name leads outside the folder.
    """
    path = name.replace("\\", "/")  # some tools on Windows write these
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or re.match(r"[A-Za-z]:/", path) or ".." in parts or "\0" in path:
        raise PleatError(f"{origin} holds {name!r}, which leads outside of the folder; it is refused as a whole.")
    return None if not parts or any(left_out(part) for part in parts) else folder.joinpath(*parts)


def left_out(name: str) -> bool:
    """Whether a file or folder of this name never becomes part of a batch."""
    # Another project's DVC files would become stages of this one.
    return hidden(name) or name in ("dvc.yaml", "dvc.lock") or name.endswith(".dvc")


def _unpack(members: Iterator[Member], archive: Path, folder: Path, limit: int) -> Iterator[None]:
    """Writes the members and yields once for each MiB of the archive that was read."""
    folder.mkdir()
    written = shown = 0
    for count, member in enumerate(members, start=1):
        if count > MAX_MEMBERS:
            raise PleatError(f"{archive} holds more than {MAX_MEMBERS:,} files; unpack it yourself and add the folder.")
        while shown < member.n_read // CHUNK:
            shown += 1
            yield
        target = target_of(member.name, folder, str(archive))
        if target is None:
            continue
        if member.stream is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = target.open("xb")
        except FileExistsError:
            raise PleatError(f"{archive} holds {member.name!r} twice; it is refused as a whole.") from None
        with file:
            # What is really written counts, not what the header claims.
            while chunk := member.stream.read(CHUNK):
                written += len(chunk)
                if written > limit:
                    raise _too_large(archive, limit)
                file.write(chunk)


def _damaged(archive: Path, error: Exception) -> PleatError:
    reason = str(error).rstrip(".") or "it ends too early"
    return PleatError(f"{archive} is damaged, incomplete or not the archive that its name says: {reason}.")


def _special(archive: Path, name: str) -> PleatError:
    return PleatError(f"{archive} holds {name!r}, which is a link or a device; it is refused as a whole.")


def _too_large(archive: Path, limit: int) -> PleatError:
    return PleatError(
        f"{archive} expands beyond {limit / 1e9:.1f} GB, the most that an archive of its size may; "
        "if it is what it should be, unpack it yourself and add the folder."
    )


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        n_read = 0
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _special(path, info.filename)
            if info.is_dir():
                yield Member(_zip_name(info), None, n_read)
                continue
            with archive.open(info) as stream:
                yield Member(_zip_name(info), stream, n_read)
            n_read += info.compress_size


def _zip_name(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 0x800:
        return info.filename
    try:
        # Many tools write UTF-8 without saying so, and zipfile then reads the bytes as code page 437.
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


class _Bounded:
    """A tar's decompressed bytes; refuses to go beyond `limit` bytes or to hold a huge header in memory."""

    def __init__(self, file: IO[bytes], path: Path, limit: int) -> None:
        self.file, self.path, self.limit = file, path, limit

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or position > self.limit:
            raise _too_large(self.path, self.limit)
        return self.file.seek(position)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise PleatError(f"{self.path} holds a header of {size:,} bytes; it is refused as a whole.")
        data = self.file.read(size)
        if self.file.tell() > self.limit:
            raise _too_large(self.path, self.limit)
        return data


def _tar_members(path: Path, limit: int) -> Iterator[Member]:
    with path.open("rb") as raw, _decompressed(raw) as file:
        bounded = _Bounded(file, path, limit)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as archive:
            while info := archive.next():
                archive.members = []  # type: ignore[attr-defined]  # millions of them would fill the memory
                if not info.isreg() and not info.isdir():
                    raise _special(path, info.name)
                stream = None if info.isdir() else archive.extractfile(info)
                yield Member(info.name, stream, raw.tell())
            # tarfile takes a damaged header for the end; a whole archive ends in blocks of zeros.
            bounded.seek(archive.offset)
            if bounded.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends too early")
            # Only at its very end does a compressed file say whether its checksum is right.
            while bounded.read(CHUNK):
                pass


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if magic.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(raw))
    if magic == b"\xfd7zXZ\0":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    return raw
