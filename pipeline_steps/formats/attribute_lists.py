"""Attribute lists: split/ lists the images for train, val and test, and the class of each in every attribute type."""

import posixpath
import re
import unicodedata
from pathlib import Path

import pandas as pd

from pipeline_steps.errors import PleatError
from pipeline_steps.formats.listing import Listing, image_files, inside, read_text
from pipeline_steps.params import NAME, TAKEN

CLASSES = "split/list_attr_cloth.txt"
CLASSES_HEADER = ["attribute_name", "attribute_type"]
IMAGES_HEADER = "picture_filename"


def read(folder: Path) -> Listing:
    """Reads the labels as names of classes; the header of train_attr.txt names the label columns.

    The column at place k belongs to attribute type k of list_attr_cloth.txt; its integers count the classes of that
    type from 0, in the order of that file. Images of test.txt have no row. The lists for val and test need not exist.

    Raises:
        PleatError: a file is absent, not UTF-8 or malformed, an integer is no class, a list of images and that of their
            labels differ in length, or an image is listed twice.
    """
    split = folder / "split"
    images = image_files(folder)
    files = {_key(path): path for path in images}
    classes = _classes(folder / CLASSES)
    listed: dict[str, str] = {}
    columns, train = _part("train", split, classes, files, listed)
    parts = [train]
    if (split / "val.txt").exists() or (split / "val_attr.txt").exists():
        val_columns, val = _part("val", split, classes, files, listed)
        if val_columns != columns:
            header = f"the header of train_attr.txt, '{' '.join(columns)}'"
            raise _wrong(split / "val_attr.txt", 1, header, " ".join(val_columns))
        parts.append(val)
    rows = pd.concat(parts, ignore_index=True)
    test = _images(split / "test.txt", listed) if (split / "test.txt").exists() else []
    unlabelled = sorted(set(images) - set(rows["source_path"]))
    return Listing(rows, columns, unlabelled, frozenset(unlabelled) & {files.get(_key(path), path) for path in test})


def classes_by_column(folder: Path) -> dict[str, list[str]]:
    """The classes of each label column in the order in which the integers of train_attr.txt count them, from 0.

    Raises:
        PleatError: list_attr_cloth.txt or train_attr.txt is absent, not UTF-8 or malformed.
    """
    of_type = _classes(folder / CLASSES)
    columns, _ = _labels(folder / "split" / "train_attr.txt", of_type)
    return dict(zip(columns, of_type, strict=True))


def listed_images(folder: Path, name: str) -> list[tuple[str, Path]]:
    """The images of the list `folder / name` as they are written there, with their files.

    Raises:
        PleatError: the list is absent, not UTF-8 or malformed, or an image is listed twice, does not exist or lies
            outside the folder.
    """
    path = folder / name
    if not path.is_file():
        raise PleatError(f"{path} does not exist; name a list of images below {folder}, such as split/test.txt.")
    files = {_key(file): file for file in image_files(folder)}
    images: list[tuple[str, Path]] = []
    for number, image in enumerate(_images(path, {}), 2):
        file = files.get(_key(image), image)
        if not inside(folder, file):
            raise _wrong(path, number, f"the path of an image within {folder}", image)
        if not (folder / file).is_file():
            raise PleatError(f"{path}, line {number}: {image} does not exist in {folder}; restore the file.")
        images.append((image, folder / file))
    return images


def _part(
    given: str, split: Path, classes: list[list[str]], files: dict[str, str], listed: dict[str, str]
) -> tuple[list[str], pd.DataFrame]:
    """The label columns and the rows of `train` or `val`; `listed` gathers where each image is listed."""
    paths = _images(split / f"{given}.txt", listed)
    columns, labels = _labels(split / f"{given}_attr.txt", classes)
    if len(paths) != len(labels):
        raise PleatError(
            f"{split / given}.txt lists {len(paths):,} images, but {split / given}_attr.txt has labels for "
            f"{len(labels):,}; expected one line of labels for each image, in the same order."
        )
    rows = pd.DataFrame(
        {"source_path": [files.get(_key(path), path) for path in paths], "sender_id": "", "given": given}, dtype="str"
    )
    return columns, rows.join(pd.DataFrame(labels, columns=columns, dtype="str"))


def _classes(path: Path) -> list[list[str]]:
    """The classes of each attribute type, in the order of the file."""
    lines = _lines(path)
    if _integer(lines[0]) is None:
        raise _wrong(path, 1, "the number of classes", lines[0])
    if len(lines) == 1 or lines[1].split() != CLASSES_HEADER:
        raise _wrong(path, 2, f"the header '{' '.join(CLASSES_HEADER)}'", lines[1] if len(lines) > 1 else "")
    of_type: dict[int, list[str]] = {}
    for number, line in enumerate(lines[2:], 3):
        *names, last = line.rsplit(maxsplit=1) or [""]  # DeepFashion's names of classes have spaces
        attribute_type = _integer(last)
        if not names or attribute_type is None:
            raise _wrong(path, number, "the name of a class and the number of its type", line)
        if names[0] in of_type.setdefault(attribute_type, []):
            raise PleatError(f"{path}, line {number}: type {attribute_type} has the class '{names[0]}' already.")
        of_type[attribute_type].append(names[0])
    if _integer(lines[0]) != len(lines) - 2:
        raise _wrong(path, 1, f"{len(lines) - 2}, the number of classes below", lines[0])
    if not of_type or sorted(of_type) != list(range(1, len(of_type) + 1)):
        raise PleatError(f"{path}: expected types numbered 1, 2, 3 and so on, but got {sorted(of_type) or 'none'}.")
    return [of_type[attribute_type] for attribute_type in sorted(of_type)]


def _labels(path: Path, classes: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The header's columns, and each line's classes by name."""
    lines = _lines(path)
    columns = lines[0].split()
    if len(columns) != len(classes) or any(_integer(column) is not None for column in columns):
        raise _wrong(path, 1, f"a header that names {len(classes)} columns, one for each attribute type", lines[0])
    for column in columns:
        if not re.fullmatch(NAME, column) or column in TAKEN or columns.count(column) > 1:
            rule = "names of letters, digits, '_' and '.', each once and none that the pipeline uses for other columns"
            raise _wrong(path, 1, rule, column)
    labels: list[list[str]] = []
    for number, line in enumerate(lines[1:], 2):
        if len(line.split()) != len(columns):
            raise _wrong(path, number, f"{len(columns)} integers", line)
        labels.append([])
        for text, column, names in zip(line.split(), columns, classes, strict=True):
            index = _integer(text)
            if index is None or not 0 <= index < len(names):
                raise _wrong(path, number, f"{column} to be an integer from 0 to {len(names) - 1}", text)
            labels[-1].append(names[index])
    return columns, labels


def _images(path: Path, listed: dict[str, str]) -> list[str]:
    """The listed paths as they are written."""
    lines = _lines(path)
    if lines[0] != IMAGES_HEADER:
        raise _wrong(path, 1, f"the header '{IMAGES_HEADER}'", lines[0])
    if len(lines) == 1:
        raise PleatError(f"{path} lists no image; it needs a header and one line for each image.")
    for number, line in enumerate(lines[1:], 2):
        if not line:
            raise _wrong(path, number, "the path of an image", line)
        if _key(line) in listed:
            raise PleatError(f"{path}, line {number}: {line} is in {listed[_key(line)]} already; list each image once.")
        listed[_key(line)] = f"line {number} of {path.name}"
    return lines[1:]


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which divides at rare characters too that editors do not count as the end of a line.
    text = read_text(path, f"attribute_lists needs train.txt, train_attr.txt and {CLASSES}")
    return [line.strip() for line in text.rstrip().split("\n")]


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


def _wrong(path: Path, number: int, expected: str, got: str) -> PleatError:
    return PleatError(f"{path}, line {number}: expected {expected}, but got {got[:100]!r}.")


def _key(path: str) -> str:
    # However it is written: `./a.jpg` is `a.jpg`, and macOS stores an accent as a character of its own.
    return unicodedata.normalize("NFC", posixpath.normpath(path))
