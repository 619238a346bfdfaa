"""How data sets on disk are recognised and read."""

import unicodedata
from pathlib import Path

import pytest

from pipeline_steps import formats
from pipeline_steps.errors import PleatError

HEADER = "image,sender_id,label,kids\n"


def put(folder: Path, *paths: str) -> Path:
    """Makes empty files; what is in an image is no matter here."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def table(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "images.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_clothing_csv_rows_and_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "images/a.jpg", "images/b.JPEG", "images/c.png", "images/extra.jpg", "docs/figure.png", "LICENSE")
    table(tmp_path, HEADER + "a,1,T-Shirt,False\nb,2,Hat,True\nc,2,,False\ngone,3,Skip,False\n")
    assert formats.detect(tmp_path) == "clothing_csv"
    listing = formats.read(tmp_path, "auto")
    assert listing.rows.to_dict("list") == {
        "source_path": ["images/a.jpg", "images/b.JPEG", "images/c.png", "images/gone.jpg"],
        "sender_id": ["1", "2", "2", "3"],
        "given": ["", "", "", ""],
        "label": ["T-Shirt", "Hat", "", "Skip"],
    }
    assert listing.columns == ["label"]
    assert listing.unlabelled == ["docs/figure.png", "images/extra.jpg"]


def test_clothing_csv_needs_no_kids_column_and_takes_a_byte_order_mark(tmp_path: Path) -> None:
    table(put(tmp_path, "images/a.jpg"), b"\xef\xbb\xbflabel, image ,sender_id\r\nHat,a,7\r\n")
    assert formats.read(tmp_path, "auto").rows.to_dict("records") == [
        {"source_path": "images/a.jpg", "sender_id": "7", "given": "", "label": "Hat"}
    ]


def test_kaggles_folders_prefer_the_original_and_count_no_copy_as_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "images_original/a.jpg", "images_compressed/a.jpg", "images_compressed/only.jpg")
    put(tmp_path, "images_original/stray.jpg", "images_compressed/stray.jpg")
    table(tmp_path, HEADER + "a,1,Hat,False\nonly,1,Hat,False\nlost,1,Hat,False\n")
    listing = formats.read(tmp_path, "clothing_csv")
    assert list(listing.rows["source_path"]) == [
        "images_original/a.jpg",
        "images_compressed/only.jpg",
        "images_original/lost.jpg",
    ]
    assert listing.unlabelled == ["images_original/stray.jpg"]


def test_names_with_spaces_and_accents_match_however_the_accent_is_stored(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "süße Röcke 1")
    put(tmp_path, f"images/{decomposed}.jpg", "images/日本 2.jpg")
    table(tmp_path, HEADER + unicodedata.normalize("NFC", decomposed) + ",1,Hut,False\n日本 2,1,Hut,False\n")
    listing = formats.read(tmp_path, "auto")
    assert all((tmp_path / path).is_file() for path in listing.rows["source_path"])
    assert listing.unlabelled == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image,label,kids\na,Hat,False\n", "has no column `sender_id`; its columns are image, label, kids"),
        ("image;sender_id;label\na;1;Hat\n", "has no column `image`; its columns are image;sender_id;label"),
        (HEADER + "a,1,Hat,\nb,1,Hat,\na,2,Cap,\nb,2,Cap,\n", "more than once: 'a', 'b'; keep one row for each"),
        ("", "has no rows"),
        (HEADER, "has no rows"),
        (HEADER.encode() + b"a,1,Hat,\nb,1,R\xf6cke,\n", "is not UTF-8: line 3 cannot be read"),
        (HEADER + "a,1,Hat, wide,False\n", "line 2: more fields than the header's 4"),
        (HEADER + f"a,1,{'x' * 200_000},\n", "after line 1: field larger than field limit"),
    ],
)
def test_a_broken_csv_is_one_clear_sentence(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    table(put(tmp_path, "images/a.jpg"), text)
    with pytest.raises(PleatError, match=r"images\.csv") as caught:
        formats.read(tmp_path, "auto")
    assert sentence in str(caught.value)


def test_many_repeated_ids_are_counted_not_all_named(tmp_path: Path) -> None:
    table(tmp_path, HEADER + "".join(f"id{n},1,Hat,\n" * 2 for n in range(8)))
    with pytest.raises(PleatError, match=r"'id4' and 3 more; keep"):
        formats.read(tmp_path, "clothing_csv")


def test_ids_that_lead_outside_keep_their_text(tmp_path: Path) -> None:
    batch = put(tmp_path / "batch", "images/sub/x.jpg")
    put(tmp_path, "secret.jpg")
    table(batch, HEADER + "../../secret,1,Hat,\n/etc/hosts,1,Hat,\nsub/x,1,Hat,\n")
    paths = list(formats.read(batch, "auto").rows["source_path"])
    assert paths == ["images/../../secret.jpg", "/etc/hosts.jpg", "images/sub/x.jpg"]
    assert [formats.inside(batch, path) for path in paths] == [False, False, True]


def test_inside_resolves_links_but_knows_dvcs_cache(tmp_path: Path) -> None:
    batch = put(tmp_path / "batch", "a.jpg")
    outside = put(tmp_path / "outside", "b.jpg")
    cached = put(tmp_path, f"cache/files/md5/ab/{'0' * 30}") / f"cache/files/md5/ab/{'0' * 30}"
    (batch / "file.jpg").symlink_to(outside / "b.jpg")
    (batch / "folder").symlink_to(outside)
    (batch / "linked.jpg").symlink_to(cached)
    (batch / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to(batch)
    assert formats.inside(batch, "a.jpg")
    assert formats.inside(batch, "not/there.jpg")
    assert formats.inside(batch, "linked.jpg")
    assert formats.inside(tmp_path / "alias", "a.jpg")
    for path in ("file.jpg", "folder/b.jpg", "../outside/b.jpg", str(batch / "a.jpg"), "", ".", "a\0b", "loop/x"):
        assert not formats.inside(batch, path), path


def test_class_folders_of_stanford_dogs(tmp_path: Path) -> None:
    put(tmp_path, "Images/n02086240-Shih-Tzu/x 1.jpg", "Images/n02085620-Chihuahua/y.JPG", "Images/loose.jpg")
    put(tmp_path, "Images/.DS_Store", "Images/n02086240-Shih-Tzu/Thumbs.db", "__MACOSX/Images/n1/z.jpg", "README.md")
    assert formats.detect(tmp_path) == "class_folders"
    listing = formats.read(tmp_path, "auto")
    assert listing.rows.to_dict("list") == {
        "source_path": ["Images/n02085620-Chihuahua/y.JPG", "Images/n02086240-Shih-Tzu/x 1.jpg"],
        "sender_id": ["", ""],
        "given": ["", ""],
        "label": ["Chihuahua", "Shih-Tzu"],
    }
    assert listing.columns == ["label"]
    assert listing.unlabelled == ["Images/loose.jpg"]


def test_class_folders_at_the_top_with_a_deeper_image_left_over(tmp_path: Path) -> None:
    put(tmp_path, "red hat/a.png", "grüner Hut/b.webp", "red hat/old/c.png", ".hidden/d.png", "top.png")
    listing = formats.read(tmp_path, "class_folders")
    assert sorted(listing.rows["label"]) == ["grüner Hut", "red hat"]
    assert listing.unlabelled == ["red hat/old/c.png", "top.png"]


def test_two_classes_of_one_name_keep_their_wordnet_ids(tmp_path: Path) -> None:
    put(tmp_path, "n02012849-crane/a.jpg", "n03126707-crane/b.jpg", "n02085620-Chihuahua/c.jpg")
    assert sorted(formats.read(tmp_path, "auto").rows["label"]) == ["Chihuahua", "n02012849-crane", "n03126707-crane"]


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ([], "no image file"),
        (["notes.txt", "Hat/readme.txt"], "no image file"),
        (["a.jpg", "b.jpg"], "2 image files"),
        (["images/a.jpg", "images/b.jpg"], "2 image files"),
        (["images_original/a.jpg", "images_compressed/a.jpg"], "2 image files"),
        (["train/Hat/a.jpg", "val/Hat/b.jpg"], "2 image files"),
        (["train/a.jpg", "test/b.jpg"], "2 image files"),
        (["Hat/.hidden.jpg"], "no image file"),
    ],
)
def test_what_is_no_data_set_names_what_was_looked_for(tmp_path: Path, paths: list[str], found: str) -> None:
    put(tmp_path, *paths)
    with pytest.raises(PleatError, match=r"images\.csv beside a folder images/.*sub-folders with images") as caught:
        formats.detect(tmp_path)
    assert f"it found {found}, but none of these" in str(caught.value)
    assert all(f"({name})" in str(caught.value) for name in formats.READERS)
    with pytest.raises(PleatError, match="holds no class folders"):
        formats.read(tmp_path, "class_folders")


def test_absent_folder_unknown_format_and_unreadable_name(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match="does not exist; bring the data with `pleat data add` or `dvc pull`"):
        formats.detect(tmp_path / "nowhere")
    with pytest.raises(
        PleatError, match="one of auto, clothing_csv, class_folders, attribute_lists, colour_garment, but got 'coco'"
    ):
        formats.read(tmp_path, "coco")
    with pytest.raises(PleatError, match=r"images\.csv does not exist"):
        formats.read(put(tmp_path, "Hat/a.jpg"), "clothing_csv")
    try:
        put(tmp_path, "Hat/\udcff.jpg")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    with pytest.raises(PleatError, match="is not valid UTF-8; rename it"):
        formats.read(tmp_path, "auto")
