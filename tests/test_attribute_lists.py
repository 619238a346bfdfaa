"""The format attribute_lists: lists of images and of class indices become names of classes, and what is refused."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from test_formats import put

from pipeline_steps import formats
from pipeline_steps.errors import PleatError

# Two types: a colour of two, a sleeve of three; the lines of the two types are mixed.
CLASSES = "5\nattribute_name  attribute_type\nred 1\nlong 2\nblue\t1\nno sleeve at all   2\nshort 2 \n"
FILES = {
    "list_attr_cloth.txt": CLASSES,
    "train.txt": "picture_filename\nimg/b.jpg\nimg/a.jpg\nimg/gone.jpg\n",
    "train_attr.txt": "colour sleeve\n1 0\n0 2\n1 1\n",
    "val.txt": "picture_filename\nimg/c.PNG\n",
    "val_attr.txt": "colour sleeve\n0 1\n",
    "test.txt": "picture_filename\nimg/d.jpg\nimg/absent.jpg\n",
}
IMAGES = ("img/a.jpg", "img/b.jpg", "img/c.PNG", "img/d.jpg", "img/stray.jpg")
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the small set with some files changed; None leaves a file out."""

    def write(**changes: str | bytes | None) -> Path:
        put(tmp_path, *IMAGES, "split/.DS_Store")
        for name, text in {**FILES, **{f"{stem}.txt": text for stem, text in changes.items()}}.items():
            if text is not None:
                (tmp_path / "split" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def test_indices_become_names_and_each_row_knows_its_list(write: Write) -> None:
    folder = write()
    assert formats.detect(folder) == "attribute_lists"
    listing = formats.read(folder, "auto")
    assert listing.columns == ["colour", "sleeve"]
    assert listing.rows.to_dict("list") == {
        "source_path": ["img/b.jpg", "img/a.jpg", "img/gone.jpg", "img/c.PNG"],
        "sender_id": [""] * 4,
        "given": ["train", "train", "train", "val"],
        "colour": ["blue", "red", "blue", "red"],
        "sleeve": ["long", "short", "no sleeve at all", "no sleeve at all"],
    }
    assert listing.unlabelled == ["img/d.jpg", "img/stray.jpg"]
    assert listing.test == {"img/d.jpg"}


def test_lists_of_val_and_test_need_not_exist(write: Write) -> None:
    listing = formats.read(write(val=None, val_attr=None, test=None), "attribute_lists")
    assert list(listing.rows["given"]) == ["train"] * 3
    assert listing.unlabelled == ["img/c.PNG", "img/d.jpg", "img/stray.jpg"]
    assert listing.test == frozenset()


def test_line_ends_byte_order_marks_and_blank_lines_at_the_end_do_not_matter(write: Write) -> None:
    expected = formats.read(write(), "auto")
    windows = {
        Path(name).stem: b"\xef\xbb\xbf" + f"{text}\n \n".replace("\n", "\r\n").encode() for name, text in FILES.items()
    }
    found = formats.read(write(**windows), "auto")
    pd.testing.assert_frame_equal(found.rows, expected.rows)
    assert (found.columns, found.unlabelled, found.test) == (expected.columns, expected.unlabelled, expected.test)


def test_paths_match_their_file_however_they_are_written(write: Write) -> None:
    accent = unicodedata.normalize("NFD", "img/süß 1.jpg")
    paths = ["./img/a.jpg", unicodedata.normalize("NFC", accent), "img//b.jpg"]
    folder = put(write(train="\n".join(["picture_filename", *paths])), accent)
    listing = formats.read(folder, "auto")
    assert list(listing.rows["source_path"][:3]) == ["img/a.jpg", accent, "img/b.jpg"]
    assert listing.unlabelled == ["img/d.jpg", "img/stray.jpg"]


def test_paths_that_lead_outside_keep_their_text(write: Write) -> None:
    folder = write(train="picture_filename\nimg/../../secret.jpg\n/etc/hosts\nimg/a.jpg\n")
    paths = list(formats.read(folder, "auto").rows["source_path"][:3])
    assert paths == ["img/../../secret.jpg", "/etc/hosts", "img/a.jpg"]
    assert [formats.inside(folder, path) for path in paths] == [False, False, True]


def refusal(folder: Path) -> str:
    with pytest.raises(PleatError) as caught:
        formats.read(folder, "auto")
    return str(caught.value).replace(f"{folder}/split/", "")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("1 0\n0 3\n1 1", "line 3: expected sleeve to be an integer from 0 to 2, but got '3'."),
        ("2 0\n0 2\n1 1", "line 2: expected colour to be an integer from 0 to 1, but got '2'."),
        ("1 0\n0 2\n1 -1", "line 4: expected sleeve to be an integer from 0 to 2, but got '-1'."),
        ("1 0\nred 2\n1 1", "line 3: expected colour to be an integer from 0 to 1, but got 'red'."),
        ("1 0.0", "line 2: expected sleeve to be an integer from 0 to 2, but got '0.0'."),
        (f"1 {'9' * 5000}", f"line 2: expected sleeve to be an integer from 0 to 2, but got '{'9' * 100}'."),
        ("1 0\n0\n1 1", "line 3: expected 2 integers, but got '0'."),
        ("1 0 1", "line 2: expected 2 integers, but got '1 0 1'."),
        ("1 0\n\n0 2\n1 1", "line 3: expected 2 integers, but got ''."),
    ],
)
def test_a_broken_line_of_labels(write: Write, lines: str, sentence: str) -> None:
    assert refusal(write(train_attr=f"colour sleeve\n{lines}\n")) == f"train_attr.txt, {sentence}"


@pytest.mark.parametrize("header", ["1 0", "colour", "colour sleeve neck", "colour 2", ""])
def test_a_header_of_labels_names_one_column_for_each_type(write: Write, header: str) -> None:
    assert refusal(write(train_attr=f"{header}\n1 0\n0 2\n1 1\n")) == (
        "train_attr.txt, line 1: expected a header that names 2 columns, one for each attribute type, "
        f"but got '{header}'."
    )


@pytest.mark.parametrize(
    ("header", "wrong"), [("a a", "a"), ("batch a", "batch"), ("a given", "given"), ("p:x a", "p:x")]
)
def test_names_of_label_columns_that_later_stages_could_not_use(write: Write, header: str, wrong: str) -> None:
    assert refusal(write(train_attr=f"{header}\n1 0\n0 2\n1 1\n")) == (
        "train_attr.txt, line 1: expected names of letters, digits, '_' and '.', each once and none that the pipeline "
        f"uses for other columns, but got '{wrong}'."
    )


def test_both_files_of_labels_have_the_same_header(write: Write) -> None:
    assert refusal(write(val_attr="sleeve colour\n0 1\n")) == (
        "val_attr.txt, line 1: expected the header of train_attr.txt, 'colour sleeve', but got 'sleeve colour'."
    )


@pytest.mark.parametrize(
    ("name", "labels", "counts"),
    [
        ("train", "1 0\n0 2\n", (3, 2)),
        ("train", "1 0\n" * 4, (3, 4)),
        ("train", "", (3, 0)),
        ("val", "0 1\n" * 2, (1, 2)),
    ],
)
def test_a_list_and_its_labels_have_as_many_lines(
    write: Write, name: str, labels: str, counts: tuple[int, int]
) -> None:
    folder = write(**{f"{name}_attr": f"colour sleeve\n{labels}"})
    assert refusal(folder) == (
        f"{name}.txt lists {counts[0]} images, but {name}_attr.txt has labels for {counts[1]}; expected one line of "
        "labels for each image, in the same order."
    )


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("train", "img/b.jpg\nimg/a.jpg\n", ", line 1: expected the header 'picture_filename', but got 'img/b.jpg'."),
        ("test", "", ", line 1: expected the header 'picture_filename', but got ''."),
        ("train", "picture_filename\n", " lists no image; it needs a header and one line for each image."),
        ("train", "picture_filename\nimg/b.jpg\n\nx.jpg", ", line 3: expected the path of an image, but got ''."),
        (
            "train",
            "picture_filename\nb\na\n./b\n",
            ", line 4: ./b is in line 2 of train.txt already; list each image once.",
        ),
        (
            "val",
            "picture_filename\nimg/a.jpg",
            ", line 2: img/a.jpg is in line 3 of train.txt already; list each image once.",
        ),
        (
            "test",
            "picture_filename\nimg/c.PNG",
            ", line 2: img/c.PNG is in line 2 of val.txt already; list each image once.",
        ),
        ("val", b"picture_filename\n\xf6.jpg", " is not UTF-8: line 2 cannot be read; save the file as UTF-8."),
    ],
)
def test_a_broken_list_of_images(write: Write, name: str, text: str | bytes, sentence: str) -> None:
    assert refusal(write(**{name: text})) == f"{name}.txt{sentence}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("red 1\nblue 1\n", ", line 1: expected the number of classes, but got 'red 1'."),
        ("", ", line 1: expected the number of classes, but got ''."),
        ("5\n", ", line 2: expected the header 'attribute_name attribute_type', but got ''."),
        ("1\nred 1\n", ", line 2: expected the header 'attribute_name attribute_type', but got 'red 1'."),
        (CLASSES.replace("5", "4", 1), ", line 1: expected 5, the number of classes below, but got '4'."),
        (
            CLASSES.replace("\t1", ""),
            ", line 5: expected the name of a class and the number of its type, but got 'blue'.",
        ),
        (
            CLASSES.replace("blue\t1", ""),
            ", line 5: expected the name of a class and the number of its type, but got ''.",
        ),
        (
            CLASSES.replace("\t1", " I"),
            ", line 5: expected the name of a class and the number of its type, but got 'blue I'.",
        ),
        (CLASSES.replace("blue", "red"), ", line 5: type 1 has the class 'red' already."),
        (CLASSES.replace("1\n", "3\n"), ": expected types numbered 1, 2, 3 and so on, but got [2, 3]."),
        ("0\nattribute_name attribute_type\n", ": expected types numbered 1, 2, 3 and so on, but got none."),
    ],
)
def test_a_broken_list_of_classes(write: Write, text: str, sentence: str) -> None:
    assert refusal(write(list_attr_cloth=text)) == f"list_attr_cloth.txt{sentence}"


@pytest.mark.parametrize("missing", ["train", "train_attr", "val", "val_attr", "list_attr_cloth"])
def test_a_missing_file_is_named(write: Write, missing: str) -> None:
    folder = write(**{missing: None})
    with pytest.raises(PleatError) as caught:
        formats.read(folder, "attribute_lists")
    assert str(caught.value) == (
        f"{folder}/split/{missing}.txt does not exist; "
        "attribute_lists needs train.txt, train_attr.txt and split/list_attr_cloth.txt."
    )


def test_a_folder_in_place_of_a_file(write: Write) -> None:
    folder = write(test=None)
    (folder / "split" / "test.txt").mkdir()
    with pytest.raises(PleatError, match=r"split/test\.txt cannot be read: Is a directory; attribute_lists needs"):
        formats.read(folder, "auto")


def test_the_real_fashion_attributes(real_data: Path) -> None:
    """Every label of all six types against pandas' own reading of the files."""
    folder = real_data / "data" / "fashion_attributes"
    assert formats.detect(folder) == "attribute_lists"
    listing = formats.read(folder, "auto")
    assert listing.columns == [f"category{number}" for number in range(1, 7)]
    assert listing.rows["given"].value_counts().to_dict() == {"train": 5000, "val": 1000}
    assert len(listing.unlabelled) == 1000
    assert listing.test == set(listing.unlabelled)
    assert listing.rows["source_path"].map(lambda path: (folder / path).is_file()).all()

    names = pd.read_csv(folder / "split" / "list_attr_cloth.txt", sep=r"\s+", skiprows=1)
    assert len(names) == 26
    for given in ("train", "val"):
        paths = pd.read_csv(folder / "split" / f"{given}.txt")["picture_filename"]
        indices = pd.read_csv(folder / "split" / f"{given}_attr.txt", sep=" ")
        rows = listing.rows[listing.rows["given"] == given].reset_index(drop=True)
        assert list(rows["source_path"]) == list(paths)
        for number in range(1, 7):
            of_type = names.loc[names["attribute_type"] == number, "attribute_name"].reset_index(drop=True)
            assert list(rows[f"category{number}"]) == list(indices[f"category{number}"].map(of_type))
    # The README of the data: attribute type 4 has a class with 19 train and 2 val images.
    counts = pd.crosstab(listing.rows["category4"], listing.rows["given"])
    assert counts.loc[counts.sum(axis=1).idxmin()].to_dict() == {"train": 19, "val": 2}
