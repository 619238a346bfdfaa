"""Folders called COLOUR_GARMENT: how they are told from other class folders, and the two labels they give."""

from collections import Counter
from pathlib import Path

import pytest
from test_formats import put

from pipeline_steps import formats
from pipeline_steps.errors import PleatError


def test_the_first_underscore_divides_colour_and_garment(tmp_path: Path) -> None:
    put(tmp_path, "black_dress/a b.jpg", "White_t_shirt/é.PNG", "red_Röcke/c.webp", "red_Röcke/old/d.jpg", "loose.jpg")
    put(tmp_path, "black_dress/notes.txt", "black_dress/.hidden.jpg", ".git/e.jpg", "__MACOSX/black_dress/a.jpg")
    assert formats.detect(tmp_path) == "colour_garment"
    listing = formats.read(tmp_path, "auto")
    assert listing.columns == ["colour", "garment"]
    assert listing.rows.to_dict("list") == {
        "source_path": ["White_t_shirt/é.PNG", "black_dress/a b.jpg", "red_Röcke/c.webp"],
        "sender_id": ["", "", ""],
        "given": ["", "", ""],
        "colour": ["white", "black", "red"],
        "garment": ["t_shirt", "dress", "Röcke"],
    }
    assert listing.unlabelled == ["loose.jpg", "red_Röcke/old/d.jpg"]


def test_the_folders_may_share_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "apparel/black_dress/a.jpg", "apparel/black_shoes/b.jpg", "apparel/readme.png")
    rows = formats.read(tmp_path, "auto").rows
    assert rows[["source_path", "colour", "garment"]].to_numpy().tolist() == [
        ["apparel/black_dress/a.jpg", "black", "dress"],
        ["apparel/black_shoes/b.jpg", "black", "shoes"],
    ]


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["black_dress", "black_shoes"], "colour_garment"),
        (["black_dress", "red_dress"], "colour_garment"),
        (["black_dress"], "class_folders"),
        (["polar_bear", "grizzly_bear", "black_bear"], "class_folders"),
        (["black_dress", "polar_bear", "red_dress", "grizzly_bear"], "class_folders"),
        (["black_dress", "red_dress", "polar_bear"], "colour_garment"),
        (["black_", "red_", "blue_"], "class_folders"),
        (["blackdress", "red dress", "_dress"], "class_folders"),
        (["n02086240-Shih-Tzu", "n02085620-Chihuahua"], "class_folders"),
    ],
)
def test_what_is_taken_for_colours_and_garments(tmp_path: Path, folders: list[str], found: str) -> None:
    assert formats.detect(put(tmp_path, *(f"{name}/a.jpg" for name in folders))) == found


@pytest.mark.parametrize("strange", ["polar_dress", "dress", "black_", "_dress", "light_blue_dress", "blackdress"])
def test_one_strange_folder_among_others_is_named_with_the_known_colours(tmp_path: Path, strange: str) -> None:
    put(tmp_path, "all/black_dress/a.jpg", "all/red_dress/a.jpg", f"all/{strange}/a.jpg")
    with pytest.raises(PleatError, match=r"with a colour of beige, black, .*, yellow; rename it, or") as caught:
        formats.read(tmp_path, "auto")
    assert str(caught.value).startswith(f"{tmp_path}/all/{strange}: expected a folder called COLOUR_GARMENT, such as")
    # The way out that the message names.
    assert len(formats.read(tmp_path, "class_folders").rows) == 3


def test_no_folders_at_all(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match=r"holds no folders called COLOUR_GARMENT, .* \(1 image files were found else"):
        formats.read(put(tmp_path, "a.jpg"), "colour_garment")


def test_the_real_apparel_set(real_data: Path) -> None:
    folder = real_data / "data" / "apparel"
    assert formats.detect(folder) == "colour_garment"
    listing = formats.read(folder, "auto")
    assert listing.unlabelled == []
    assert len(listing.rows) == 2570
    of_folder = Counter(f"{row.colour}_{row.garment}" for row in listing.rows.itertuples())
    assert of_folder == {path.name: len(list(path.iterdir())) for path in folder.iterdir()}
    assert len(of_folder) == 24
    assert set(listing.rows["colour"]) == {"black", "blue", "brown", "green", "red", "white"}
    assert set(listing.rows["garment"]) == {"dress", "pants", "shirt", "shoes", "shorts"}
    assert listing.rows["source_path"].map(lambda path: (folder / path).is_file()).all()
