"""What every format gives back, and how files of a batch are found."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline_steps.errors import PleatError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # the first of a stem wins
SYSTEM_NAMES = {"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini"}
DVC_CACHE_FILE = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


@dataclass(frozen=True)
class Listing:
    """A batch as its labels describe it.

    Attributes:
        rows: one row for each labelled row, all strings: `source_path` (posix, relative to the batch's folder: where
            the image should be), `sender_id` ("" where the data set has no senders), `given` ("train" or "val" where
            the data set comes with a split, else ""), then the label columns ("" where there is no label).
        columns: the names of the label columns.
        unlabelled: image files that no row names, as sorted posix paths relative to the batch's folder.
        test: those of `unlabelled` that the data set lists for testing.
    """

    rows: pd.DataFrame
    columns: list[str]
    unlabelled: list[str]
    test: frozenset[str] = frozenset()


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is an operating system's or tool's own, never data."""
    return name.startswith(".") or name in SYSTEM_NAMES


def image_files(folder: Path) -> list[str]:
    """Lists every file with an image's suffix, as sorted posix paths relative to `folder`; hidden ones are left out.

    Raises:
        PleatError: a sub-folder cannot be read, or a name is not valid UTF-8.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not hidden(name)]
        inner = Path(parent).relative_to(folder)
        found += [
            (inner / name).as_posix()
            for name in files
            if not hidden(name) and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    for path in found:
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise PleatError(f"{folder} holds the file {path!r}, whose name is not valid UTF-8; rename it.")
    return sorted(found)


def read_text(path: Path, use: str) -> str:
    """Reads a file of labels; `use` says in the error what the format needs it for.

    Raises:
        PleatError: the file is absent, cannot be read, or is not UTF-8.
    """
    try:
        encoded = path.read_bytes()
        return encoded.decode("utf-8-sig")
    except FileNotFoundError:
        raise PleatError(f"{path} does not exist; {use}.") from None
    except OSError as error:
        raise PleatError(f"{path} cannot be read: {error.strerror}; {use}.") from None
    except UnicodeDecodeError as error:
        line = encoded[: error.start].count(b"\n") + 1
        raise PleatError(f"{path} is not UTF-8: line {line} cannot be read; save the file as UTF-8.") from None


def inside(folder: Path, relative: str) -> bool:
    """Whether `relative` stays within `folder` once `..` and symbolic links are resolved; the file need not exist."""
    first = Path(os.path.normpath(relative)).parts[:1]
    if "\0" in relative or relative.startswith("/") or first in ((), (os.pardir,)):
        return False
    top = folder.resolve()
    try:
        real = (top / relative).resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    # With `cache.type symlink` DVC replaces every file of a batch by a link into its cache.
    return real.is_relative_to(top) or DVC_CACHE_FILE.search(real.as_posix()) is not None


def _unreadable(error: OSError) -> None:
    raise PleatError(f"{error.filename} cannot be read: {error.strerror}.") from error
