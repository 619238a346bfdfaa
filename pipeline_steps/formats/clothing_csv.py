"""The clothing data set: images.csv with `image,sender_id,label,kids` beside one or more folders of images."""

import csv
import io
import unicodedata
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline_steps.errors import PleatError
from pipeline_steps.formats.listing import IMAGE_SUFFIXES, Listing, image_files, read_text

TABLE = "images.csv"
NEEDED = ("image", "sender_id", "label")
# Kaggle's copy has the last two; where one image lies in several, the first folder wins and the others are copies.
IMAGE_FOLDERS = ("images", "images_original", "images_compressed")


def read(folder: Path) -> Listing:
    """Reads images.csv; a missing image file or an empty label is no error here, ingestion quarantines it.

    Raises:
        PleatError: images.csv is absent, empty, not UTF-8 or ragged, lacks a column, or names an image twice.
    """
    table = _table(folder / TABLE)
    _check_repeats([row["image"] for row in table], folder / TABLE)
    images = image_files(folder)
    files, copies = _by_stem(images)
    expected_in = next((name for name in IMAGE_FOLDERS if (folder / name).is_dir()), IMAGE_FOLDERS[0])

    def source_path(image: str) -> str:
        # An absolute id stays absolute here and `..` stays in the text, so that `inside` can tell.
        return files.get(_key(image)) or str(PurePosixPath(expected_in, f"{image}.jpg"))

    rows = pd.DataFrame(
        {
            "source_path": [source_path(row["image"]) for row in table],
            "sender_id": [row["sender_id"] for row in table],
            "given": "",
            "label": [row["label"] for row in table],
        },
        dtype="str",
    )
    return Listing(rows, ["label"], sorted(set(images) - set(rows["source_path"]) - copies))


def _table(path: Path) -> list[dict[str, str]]:
    text = read_text(path, f"clothing_csv needs its columns {', '.join(NEEDED)}")
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in NEEDED:
            if columns and name not in columns:
                raise PleatError(f"{path} has no column `{name}`; its columns are {', '.join(columns)}.")
        table = []
        for row in reader:
            if None in row:
                raise PleatError(
                    f"{path}, line {reader.line_num}: more fields than the header's {len(columns)}; "
                    "put quotes around a field that contains a comma."
                )
            table.append(row)
    except csv.Error as error:
        raise PleatError(f"{path}, after line {reader.line_num}: {error}.") from None
    if not table:
        raise PleatError(f"{path} has no rows; it needs a header and one line for each image.")
    return table


def _check_repeats(ids: list[str], path: Path) -> None:
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for image in ids:
        if _key(image) in seen:
            repeated[image] = None
        seen.add(_key(image))
    if repeated:
        first = ", ".join(f"'{image}'" for image in list(repeated)[:5])
        more = f" and {len(repeated) - 5:,} more" if len(repeated) > 5 else ""
        raise PleatError(f"{path} names these images more than once: {first}{more}; keep one row for each.")


def _by_stem(images: list[str]) -> tuple[dict[str, str], set[str]]:
    """Finds the file of each image id, and the files that are copies of it in a less preferred folder."""

    def preference(path: str) -> tuple[int, int, str]:
        return (
            IMAGE_FOLDERS.index(path.split("/")[0]),
            IMAGE_SUFFIXES.index(PurePosixPath(path).suffix.lower()),
            path,
        )

    files: dict[str, str] = {}
    copies = set()
    for path in sorted((path for path in images if path.split("/")[0] in IMAGE_FOLDERS), key=preference):
        folder, inner = path.split("/", 1)
        first = files.setdefault(_key(str(PurePosixPath(inner).with_suffix(""))), path)
        if not first.startswith(f"{folder}/"):
            copies.add(path)
    return files, copies


def _key(image: str) -> str:
    # macOS stores an accent as a character of its own; the same name must match however it was written.
    return unicodedata.normalize("NFC", image)
