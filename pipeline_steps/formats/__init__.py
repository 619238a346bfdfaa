"""How a data set on disk becomes rows: one file for each format."""

from pathlib import Path

from pipeline_steps.errors import PleatError
from pipeline_steps.formats import attribute_lists, class_folders, clothing_csv, colour_garment
from pipeline_steps.formats.listing import Listing, hidden, image_files, inside

__all__ = ["READERS", "Listing", "detect", "hidden", "image_files", "inside", "read"]

READERS = {
    "clothing_csv": clothing_csv.read,
    "class_folders": class_folders.read,
    "attribute_lists": attribute_lists.read,
    "colour_garment": colour_garment.read,
}


def detect(folder: Path) -> str:
    """Names the format of the data set in `folder`.

    Raises:
        PleatError: the folder is absent or empty, or no format fits.
    """
    if not folder.is_dir():
        raise PleatError(f"{folder} does not exist; bring the data with `pleat data add` or `dvc pull`.")
    if (folder / clothing_csv.TABLE).is_file():
        return "clothing_csv"
    if (folder / attribute_lists.CLASSES).is_file():
        return "attribute_lists"
    images = image_files(folder)
    if colour_garment.fits(images):
        return "colour_garment"
    if class_folders.class_folders(images):
        return "class_folders"
    found = f"{len(images):,} image files" if images else "no image file"
    raise PleatError(
        f"{folder} holds no data set that Pleat knows. It looked for images.csv beside a folder images/ "
        f"(clothing_csv), for {attribute_lists.CLASSES} (attribute_lists), and for sub-folders with images directly in "
        "them that are named after their colour and garment, such as black_dress (colour_garment), or after their "
        f"class (class_folders); it found {found}, but none of these."
    )


def read(folder: Path, image_format: str) -> Listing:
    """Reads a data set's labels; the images themselves are not opened. `image_format` "auto" detects the format.

    Raises:
        PleatError: the format is unknown or does not fit the folder, or its labels cannot be read.
    """
    if image_format == "auto":
        image_format = detect(folder)
    if image_format not in READERS:
        raise PleatError(f"Expected the format to be one of auto, {', '.join(READERS)}, but got '{image_format}'.")
    return READERS[image_format](folder)
