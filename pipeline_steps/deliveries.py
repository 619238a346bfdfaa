"""What lies in the inbox, and how it gets out of there: a folder here, a bucket in inbox_s3.py.

A delivery is an entry at the top of the inbox: a folder or an archive. Its files are described by what changes when
they do, so that one that is still being written is seen, before it is copied and while.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline_steps import archives, sources
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_text
from pipeline_steps.formats import hidden
from pipeline_steps.progress import say

PARTIAL_SUFFIXES = (".part", ".partial", ".filepart", ".tmp", ".crdownload", ".download")
HELD = ".pleat-"  # .pleat-BATCH in the inbox: a delivery that is on its way out of it
DONE, SET_ASIDE = "done", "set_aside"


class RefusedError(PleatError):
    """A delivery that can never become a batch as it is, such as a damaged archive."""


@dataclass(frozen=True)
class Delivery:
    """One entry of the inbox.

    Attributes:
        name: of the entry.
        files: each file and folder in it (a folder's name ends in a slash), and what changes when it does.
        n_bytes: of all files.
        quiet_s: seconds since the last change.
        obstacle: why it cannot be taken however long it is quiet, as a sentence; "" where nothing stands against it.
    """

    name: str
    files: dict[str, str]
    n_bytes: int
    quiet_s: float
    obstacle: str

    def n_files(self) -> int:
        """The number of files."""
        return sum(not name.endswith("/") for name in self.files)

    def wait(self, settle_s: int) -> str:
        """Why it is not taken now; "" where it is."""
        if self.obstacle or self.quiet_s >= settle_s:
            return self.obstacle
        return f"It changed {self.quiet_s:.0f} s ago and is taken after {settle_s} s without a change."


class Inbox(Protocol):
    """Where deliveries arrive."""

    def look(self, name: str | None = None) -> list[Delivery]:
        """What lies there, or only the entry `name`, in the order of names."""

    def fetch(self, delivery: Delivery, folder: Path) -> None:
        """Fills `folder`, which must be new, with the delivery's files, an archive unpacked.

        Raises:
            RefusedError: it can never become a batch as it is.
            PleatError: the store cannot be reached.
            OSError: the disk is full, or a file is gone or cannot be read.
        """

    def move(self, name: str, files: Mapping[str, str], place: str, batch: str, notes: Mapping[str, str]) -> None:
        """Moves a delivery to `<inbox>_<place>/<batch>/<name>`, with texts beside it; goes on where a kill stopped it.

        What changed since `files` was seen stays in the inbox, as a delivery of its own.

        Raises:
            PleatError: a place cannot be written, or the store cannot be reached.
        """


def open_inbox(source: str, root: Path) -> Inbox:
    """The inbox that `inbox.source` names."""
    if source.startswith("s3://"):
        from pipeline_steps.inbox_s3 import BucketInbox

        return BucketInbox(source)
    return FolderInbox((root / Path(source).expanduser()).absolute())


def ignored(name: str) -> bool:
    """Whether an entry of this name is no delivery, or not yet."""
    return hidden(name) or is_partial(name)


def is_partial(name: str) -> bool:
    """Whether a program gave this name to a file that it had not finished."""
    return name.lower().endswith(PARTIAL_SUFFIXES)


def archive_suffix(name: str) -> str:
    """The suffix that says which kind of archive a file is.

    Raises:
        RefusedError: it is none.
    """
    for suffix in archives.SUFFIXES:
        if name.lower().endswith(suffix):
            return suffix
    raise RefusedError(f"{name} is neither a folder nor an archive ({', '.join(archives.SUFFIXES)}).")


def _unprintable(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


class FolderInbox:
    """A folder on this machine, or on a share that is mounted on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def look(self, name: str | None = None) -> list[Delivery]:
        """See `Inbox`.

        A delivery's age follows from ctime, since mtime is set back by tools that copy, and ahead by cameras.
        """
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PleatError(f"The inbox {self.folder} cannot be read: {error.strerror}.") from error
        wanted = [entry for entry in names if not ignored(entry) and name in (None, entry)]
        for entry in filter(_unprintable, wanted):
            say(f"{self.folder} holds {entry!r}, whose name is not valid UTF-8; rename it")
        return [_delivery(self.folder / entry) for entry in wanted if not _unprintable(entry)]

    def fetch(self, delivery: Delivery, folder: Path) -> None:
        """See `Inbox`."""
        source = self.folder / delivery.name
        try:
            if source.is_dir():  # whatever its name is; `sources.bring` would clone one that ends in .git
                sources._bring_folder(source, folder, move=False)
            else:
                archive_suffix(delivery.name)
                sources.bring(str(source), folder)
        except PleatError as error:
            raise RefusedError(str(error).replace(str(source), delivery.name)) from error

    def move(self, name: str, files: Mapping[str, str], place: str, batch: str, notes: Mapping[str, str]) -> None:
        """See `Inbox`. One rename takes it out of sight, so no other look and no kill finds half of it."""
        target = self.folder.with_name(f"{self.folder.name}_{place}") / batch
        source, held, final = self.folder / name, self.folder / f"{HELD}{batch}", target / name
        try:
            if not os.path.lexists(held):
                if not os.path.lexists(source):
                    return
                if _delivery(source).files != files:
                    say(f"{source} has changed since it was looked at, so it stays in the inbox")
                    return
            for title, text in notes.items():
                write_text(target / title, text)
            if not os.path.lexists(held):
                source.rename(held)
            target.mkdir(parents=True, exist_ok=True)
            _move(held, final)
        except OSError as error:
            raise PleatError(
                f"Could not move {source} to {target}: {error.strerror or error}. Free some space or make both "
                "writable; the next look at the inbox goes on from here.",
                temporary=True,
            ) from error


def _move(held: Path, final: Path) -> None:
    """Moves a file or folder, to another file system too; where the same content lies there already, that one stays."""
    if not os.path.lexists(final):
        try:
            held.rename(final)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        partial = final.with_name(f".partial-{final.name}")
        _remove(partial)
        if held.is_dir() and not held.is_symlink():
            shutil.copytree(held, partial, symlinks=True)
        else:
            shutil.copy2(held, partial, follow_symlinks=False)
        partial.rename(final)
    _remove(held)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _delivery(path: Path) -> Delivery:
    """What lies at `path` in an inbox."""
    files: dict[str, str] = {}
    n_bytes, newest, obstacle = 0, 0.0, ""
    try:
        for inner, status in _walk(path, ""):
            folder = inner.endswith("/")
            files[inner] = f"{status.st_ctime_ns} {0 if folder else status.st_size}"
            n_bytes += 0 if folder else status.st_size
            newest = max(newest, status.st_ctime)
            if _unprintable(inner):
                obstacle = f"It holds {inner!r}, whose name is not valid UTF-8; rename it."
            elif not folder and is_partial(inner):
                obstacle = f"{inner} has the name of a file that is still being written; it waits until that is gone."
        obstacle = obstacle or ("" if n_bytes else "It is empty.")
    except FileNotFoundError:
        newest = time.time()  # it is being changed right now
        obstacle = "It is changing right now."
    except OSError as error:
        obstacle = f"{error.filename or path} cannot be read: {error.strerror}."
    return Delivery(path.name, files, n_bytes, max(0.0, time.time() - newest), obstacle)


def _walk(path: Path, inner: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yields everything at and below `path`; links are not followed, but for one that is the delivery itself."""
    status = path.stat() if not inner else path.lstat()
    if not path.is_dir() or (inner and path.is_symlink()):
        yield inner or path.name, status
        return
    yield f"{inner}/", status
    with suppress(NotADirectoryError):
        for entry in sorted(path.iterdir()):
            yield from _walk(entry, f"{inner}/{entry.name}" if inner else entry.name)
