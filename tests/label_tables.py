"""The labels of the real data sets with several targets, without their images."""

from pathlib import Path

import pandas as pd


def apparel(real_data: Path) -> pd.DataFrame:
    """Columns colour and garment, one row an image; both stand in the folder's name."""
    folders = sorted(path for path in (real_data / "data" / "apparel").iterdir() if path.is_dir())
    rows = [folder.name.split("_") for folder in folders for _ in folder.iterdir()]
    return pd.DataFrame(rows, columns=["colour", "garment"])


def attributes(real_data: Path) -> pd.DataFrame:
    """Columns category1 to category6 (names of classes) and given ("train" or "val"), one row an image."""
    folder = real_data / "data" / "fashion_attributes" / "split"
    classes = pd.read_csv(folder / "list_attr_cloth.txt", sep=r"\s+", skiprows=1)
    tables = []
    for part in ("train", "val"):
        numbers = pd.read_csv(folder / f"{part}_attr.txt", sep=r"\s+")
        for place, column in enumerate(numbers, start=1):
            named = classes["attribute_name"][classes["attribute_type"] == place].to_numpy()
            numbers[column] = named[numbers[column]]
        tables.append(numbers.assign(given=part))
    return pd.concat(tables, ignore_index=True)
