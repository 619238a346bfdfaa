"""Class folders: each sub-folder's name is the label of the images in it, as in Stanford Dogs or ImageNet."""

import re
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline_steps.errors import PleatError
from pipeline_steps.formats.clothing_csv import IMAGE_FOLDERS
from pipeline_steps.formats.listing import Listing, image_files

# Folders of these names alone are a data set of another kind, such as a clothing set whose images.csv was forgotten.
NO_CLASSES = {*IMAGE_FOLDERS, "image", "img", "imgs", "photos", "pictures", "train", "val", "valid", "test"}
WORDNET_ID = re.compile(r"^n\d{8}-(?=.)")


def read(folder: Path) -> Listing:
    """Reads the labels from the folders' names; `n02086240-Shih-Tzu` becomes `Shih-Tzu` where that is unambiguous.

    Raises:
        PleatError: no sub-folder holds images directly.
    """
    images = image_files(folder)
    classes = class_folders(images)
    if not classes:
        raise PleatError(
            f"{folder} holds no class folders: no folder named after its class has images directly in it "
            f"({len(images):,} image files were found elsewhere)."
        )
    names = {path: PurePosixPath(path).name for path in classes}
    labels = _labels(set(names.values()))
    return label_by_folder(images, pd.DataFrame({"label": {path: labels[name] for path, name in names.items()}}))


def label_by_folder(images: list[str], labels: pd.DataFrame) -> Listing:
    """Gives the images directly in each folder that folder's labels.

    Args:
        images: posix paths, relative to the batch's folder.
        labels: one row for each folder, indexed by its posix path, and one string column for each label.
    """
    parents = pd.Series({path: str(PurePosixPath(path).parent) for path in images}, dtype="str")
    parents = parents[parents.isin(labels.index)]
    rows = pd.DataFrame({"source_path": parents.index, "sender_id": "", "given": ""}, dtype="str")
    rows[labels.columns] = labels.loc[parents.to_list()].astype("str").to_numpy()
    return Listing(rows, list(labels.columns), sorted(set(images) - set(parents.index)))


def class_folders(images: list[str]) -> list[str]:
    """Finds the class folders among images' posix paths; they may share one folder, such as Stanford Dogs' `Images`."""
    paths = [tuple(path.split("/")) for path in images]
    depth = 0
    while True:
        paths = [path for path in paths if len(path) > depth + 1]
        n_direct = sum(len(path) == depth + 2 for path in paths)
        # A folder on its own is a class only if most images lie directly in it.
        if len({path[depth] for path in paths}) != 1 or 2 * n_direct > len(paths):
            break
        depth += 1
    found = sorted({"/".join(path[: depth + 1]) for path in paths if len(path) == depth + 2})
    return [] if {path.rsplit("/", 1)[-1].lower() for path in found} <= NO_CLASSES else found


def _labels(names: set[str]) -> dict[str, str]:
    short = {name: WORDNET_ID.sub("", name) for name in names}
    # ImageNet has two classes called "crane": then the full names stay.
    uses = Counter(short.values())
    return {name: unicodedata.normalize("NFC", short[name] if uses[short[name]] == 1 else name) for name in names}
