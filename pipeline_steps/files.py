"""Writing files so that nothing half-written is ever taken for finished."""

import errno
import json
import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps.errors import PleatError

PARTIAL = ".partial-"  # .partial-PID-NAME beside NAME; git and DVC ignore it
REPLACED = ".replaced"
FLOAT_FORMAT = "%.6g"  # of CSV files
# The system's errors that say of a place that it cannot be written; others may be a network's, or of what is read.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success, removes it on failure.

    Raises:
        PleatError: the place cannot be written or the disk is full.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        remove(partial)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the place of `path` on success and is removed on failure.

    What is done inside may fail in other ways than by writing; these errors stay as they are.

    Raises:
        PleatError: the place cannot be written or the disk is full.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    replaced = partial.with_name(partial.name + REPLACED)
    try:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            partial.mkdir()
        with _told(path, UNWRITABLE):
            yield partial
        with _told(path):
            # Moved away before it is removed: a folder that is half removed must not stand under its own name.
            if path.exists():
                path.replace(replaced)
            partial.replace(path)
    finally:
        remove(partial)
        remove(replaced)


@contextmanager
def _told(path: Path, only: Container[int] | None = None) -> Iterator[None]:
    """Tells the system's errors (only those of these numbers) as what keeps `path` from being written."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise _unwritable(path, error) from error


def _sweep(path: Path) -> None:
    """Removes what killed processes left of `path`; what a living process is writing stays."""
    ours = re.compile(rf"{re.escape(PARTIAL)}(\d+)-{re.escape(path.name)}(?:{re.escape(REPLACED)})?")
    for left in path.parent.glob(f"{PARTIAL}*"):
        found = ours.fullmatch(left.name)
        if found and not _alive(int(found[1])):
            remove(left)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # a number used again, as happens in containers
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it lives, but belongs to somebody else
        return True
    return True


def remove(path: Path) -> None:
    """Removes a file or folder as far as that is possible; never raises, so that no other error gets hidden."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _unwritable(path: Path, error: OSError) -> PleatError:
    # Files are written inside a temporary folder; what the reader knows is the folder's final name.
    final = Path(*(re.sub(rf"^{re.escape(PARTIAL)}\d+-", "", part) for part in path.parts))
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PleatError(
        f"Could not write {final}: {reason}. "
        "Free some space or make the folder writable, then run the same command again; nothing was left behind.",
        temporary=True,
    )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, atomically; the same value gives the same bytes."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Writes a frame as zstd-compressed Parquet without its index, atomically."""
    with atomic_path(path) as partial:
        frame.to_parquet(partial, index=False, compression="zstd")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a frame as CSV without its index, atomically; floats keep six significant digits."""
    with atomic_path(path) as partial:
        frame.to_csv(partial, index=False, float_format=FLOAT_FORMAT)


def read_json(path: Path) -> Any:
    """Reads one JSON file.

    Raises:
        PleatError: the file is absent, so the stage before has not run.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PleatError(f"{path} is missing: the stage that writes it has not run; run `dvc repro`.") from None


def read_parquet(path: Path) -> pd.DataFrame:
    """Reads one Parquet file.

    Raises:
        PleatError: the file is absent, so the stage before has not run.
    """
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise PleatError(f"{path} is missing: the stage that writes it has not run; run `dvc repro`.") from None
