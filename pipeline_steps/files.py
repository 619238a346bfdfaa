"""Writing files so that nothing half-written is ever taken for finished."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps.errors import PleatError

PARTIAL = ".partial-"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success, removes it on failure.

    Raises:
        PleatError: the place cannot be written or the disk is full.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise PleatError(
            f"Could not write {path}: {error.strerror or error}. "
            "Free some space or make the folder writable, then run the same command again; nothing was left behind."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the place of `path` on success and is removed on failure.

    Raises:
        PleatError: the place cannot be written or the disk is full.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    except OSError as error:
        raise PleatError(
            f"Could not write {path}: {error.strerror or error}. "
            "Free some space or make the folder writable, then run the same command again; nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        frame.to_csv(partial, index=False, float_format="%.6g")


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
