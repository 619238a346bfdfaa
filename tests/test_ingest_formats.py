"""Stage `ingest` on data sets of the formats other than clothing_csv: class folders, two labels, attribute lists."""

import shutil
from pathlib import Path

import pandas as pd
from conftest import MANIFEST_COLUMNS, load_params
from test_ingest import JPEGS, read

from pipeline_steps import ingest


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, encoded in files.items():
        path = root / "data" / "raw" / "b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)


def test_class_folders_are_ingested_too(tmp_path: Path) -> None:
    paths = ["red hat/a.jpg", "red hat/b.jpg", "grüner Hut/a.jpg", "red hat/old/c.jpg"]
    put(tmp_path, dict(zip(paths, JPEGS, strict=False)))
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, _ = read(tmp_path)
    assert list(manifest["label"]) == ["grüner Hut", "red hat", "red hat"]
    assert set(manifest["sender_id"]) == {""}
    assert list(quarantine["source_path"]) == ["red hat/old/c.jpg"]


def test_two_label_columns_and_what_the_quarantine_says_of_them(tmp_path: Path) -> None:
    paths = ["black_dress/a.jpg", "black_shoes/a.jpg", "red_dress/a.jpg", "loose.jpg"]
    put(tmp_path, {**dict(zip(paths, JPEGS, strict=False)), "red_t_shirt/b.jpg": b"", "red_t_shirt/b.txt": b"note"})
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, _ = read(tmp_path)
    assert sorted(manifest.columns) == sorted([*MANIFEST_COLUMNS, "colour", "garment"])
    assert manifest[["source_path", "colour", "garment"]].to_numpy().tolist() == [
        ["black_dress/a.jpg", "black", "dress"],
        ["black_shoes/a.jpg", "black", "shoes"],
        ["red_dress/a.jpg", "red", "dress"],
    ]
    assert list(quarantine.columns) == ingest.QUARANTINE_COLUMNS
    assert quarantine.to_numpy().tolist() == [
        ["b", "red_t_shirt/b.jpg", "red / t_shirt", "undecodable", "the file is empty"],
        ["b", "loose.jpg", "", "no label", "no row names this file"],
    ]


def test_a_row_needs_a_label_in_every_column(tmp_path: Path) -> None:
    """No format of today leaves one of several labels out, so the rows are handed over here."""
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    cells = [("a.jpg", "red", "dress"), ("a.jpg", " ", "dress"), ("a.jpg", "red", ""), ("a.jpg", "", "")]
    rows = pd.DataFrame(cells, columns=["source_path", "colour", "garment"]).assign(batch="b")
    limits = load_params().ingest
    kept, refused = ingest._read_all(rows, ["colour", "garment"], tmp_path, limits, tmp_path / "images.arrow")
    assert kept[["colour", "garment"]].to_numpy().tolist() == [["red", "dress"]]
    assert [(row["reason"], row["label"], row["detail"]) for row in refused] == [
        ("no label", "dress", "empty in the row: colour"),
        ("no label", "red", "empty in the row: garment"),
        ("no label", "", "empty in the row: colour, garment"),
    ]


def test_the_given_split_and_the_test_list_of_attribute_lists(tmp_path: Path) -> None:
    lists = {
        "list_attr_cloth.txt": "3\nattribute_name attribute_type\nred 1\nblue 1\nlong 2\n",
        "train.txt": "picture_filename\nimg/0.jpg\nimg/1.jpg\n../secret.jpg\nimg/text.jpg\n",
        "train_attr.txt": "colour sleeve\n1 0\n0 0\n0 0\n0 0\n",
        "val.txt": "picture_filename\nimg/2.jpg\nimg/gone.jpg\n",
        "val_attr.txt": "colour sleeve\n1 0\n0 0\n",
        "test.txt": "picture_filename\nimg/3.jpg\nimg/never.jpg\n",
    }
    put(tmp_path, {f"split/{name}": text.encode() for name, text in lists.items()})
    put(tmp_path, {f"img/{number}.jpg": encoded for number, encoded in enumerate(JPEGS[:5])})
    put(tmp_path, {"img/text.jpg": b"a note", "img/.hidden.jpg": JPEGS[5], "../secret.jpg": JPEGS[5]})
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, counts = read(tmp_path)
    assert manifest[["source_path", "given", "colour", "sleeve"]].to_numpy().tolist() == [
        ["img/0.jpg", "train", "blue", "long"],
        ["img/1.jpg", "train", "red", "long"],
        ["img/2.jpg", "val", "blue", "long"],
    ]
    assert quarantine[["source_path", "label", "reason"]].to_numpy().tolist() == [
        ["../secret.jpg", "red / long", "outside the folder"],
        ["img/text.jpg", "red / long", "undecodable"],
        ["img/gone.jpg", "red / long", "missing file"],
        ["img/3.jpg", "", "no label"],
        ["img/4.jpg", "", "no label"],
    ]
    assert list(quarantine["detail"][3:]) == ["listed for testing, without labels", "no row names this file"]
    assert counts["samples"] == 3


def test_the_real_apparel_set(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "b").symlink_to(real_data / "data" / "apparel")
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, counts = read(tmp_path)
    assert counts == {"samples": 2570, "quarantine": {}}
    assert quarantine.empty
    folders = manifest["source_path"].str.split("/").str[0]
    assert list(manifest["colour"] + "_" + manifest["garment"]) == list(folders)
    assert folders.value_counts().drop("brown_shorts").unique().tolist() == [110]
    assert folders.nunique() == 24


def test_a_part_of_the_real_fashion_attributes(real_data: Path, tmp_path: Path) -> None:
    """The whole lists, and the images of the first lines of each: the other rows have no file."""
    source, batch = real_data / "data" / "fashion_attributes", tmp_path / "data" / "raw" / "b"
    shutil.copytree(source / "split", batch / "split")
    (batch / "img").mkdir()
    for number in [*range(30), *range(5000, 5020), *range(6000, 6010)]:
        shutil.copy(source / "img" / f"{number:05}.jpg", batch / "img")
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, counts = read(tmp_path)
    assert manifest["given"].value_counts().to_dict() == {"train": 30, "val": 20}
    assert counts["quarantine"] == {"missing file": 5950, "no label": 10}
    assert set(quarantine["detail"][quarantine["reason"] == "no label"]) == {"listed for testing, without labels"}
    # The first line of train_attr.txt is 5 0 2 0 2 2.
    first = manifest.iloc[0]
    assert first["source_path"] == "img/00000.jpg"
    assert list(first[[f"category{number}" for number in range(1, 7)]]) == [
        "solid", "long_sleeve", "no_dress", "crew_neckline", "cotton", "conventional",
    ]  # fmt: skip
