"""Colour and garment: each sub-folder is called COLOUR_GARMENT, such as `black_dress`, which gives two labels."""

import unicodedata
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline_steps.errors import PleatError
from pipeline_steps.formats.class_folders import class_folders, label_by_folder
from pipeline_steps.formats.listing import Listing, image_files

# A list of its own, since only it can tell `black_dress` from a class such as `polar_bear`.
COLOURS = (
    "beige", "black", "blue", "bronze", "brown", "burgundy", "charcoal", "coral", "cream", "cyan", "gold", "gray",
    "green", "grey", "indigo", "ivory", "khaki", "lavender", "lilac", "magenta", "maroon", "mauve", "mint",
    "multicolor", "multicolour", "mustard", "navy", "olive", "orange", "peach", "pink", "purple", "red", "rose",
    "salmon", "silver", "tan", "taupe", "teal", "turquoise", "violet", "white", "yellow",
)  # fmt: skip


def read(folder: Path) -> Listing:
    """Reads the labels from the folders' names; the first underscore divides them: `black_t_shirt` is a black t_shirt.

    Raises:
        PleatError: no sub-folder holds images directly, or one that does is not called COLOUR_GARMENT.
    """
    images = image_files(folder)
    folders = class_folders(images)
    if not folders:
        raise PleatError(
            f"{folder} holds no folders called COLOUR_GARMENT, such as black_dress, with images directly in them "
            f"({len(images):,} image files were found elsewhere)."
        )
    labels = [_divided(PurePosixPath(path).name) for path in folders]
    for path, (colour, garment) in zip(folders, labels, strict=True):
        if colour not in COLOURS or not garment:
            raise PleatError(
                f"{folder / path}: expected a folder called COLOUR_GARMENT, such as black_dress, with a colour of "
                f"{', '.join(COLOURS)}; rename it, or choose the format class_folders to take whole names as labels."
            )
    return label_by_folder(images, pd.DataFrame(labels, index=folders, columns=["colour", "garment"]))


def fits(images: list[str]) -> bool:
    """Whether most of the folders that hold these images are called COLOUR_GARMENT, and they differ in it."""
    labels = [_divided(PurePosixPath(path).name) for path in class_folders(images)]
    known = [(colour, garment) for colour, garment in labels if colour in COLOURS and garment]
    return 2 * len(known) > len(labels) and len(set(known)) > 1


def _divided(name: str) -> tuple[str, str]:
    colour, _, garment = unicodedata.normalize("NFC", name).partition("_")
    return colour.lower(), garment
