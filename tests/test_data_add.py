"""`pleat data add`: what it leaves when it succeeds, and what it says when it cannot begin."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_steps import data_add, params
from pipeline_steps.errors import PleatError

pytest_plugins = ["dvc_project"]
Snapshot = Callable[[], dict[str, bytes | None]]


def test_a_folder_becomes_a_tracked_and_listed_batch(
    project: Path, clothes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (project / "params.yaml").read_text().splitlines()
    data_add.add(str(clothes), "clothing", root=project)
    raw = project / "data" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == [".gitignore", "clothing", "clothing.dvc"]
    assert sorted(path.name for path in (raw / "clothing").iterdir()) == ["LICENSE", "images", "images.csv"]
    for path in clothes.rglob("*.*g"):
        assert (raw / "clothing" / path.relative_to(clothes)).read_bytes() == path.read_bytes()
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=project, capture_output=True, text=True)
    assert "up to date" in status.stdout
    after = (project / "params.yaml").read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [
        (
            "  batches: [sample]               # folders under data/raw; `pleat data add` appends here",
            "  batches: [sample, clothing]     # folders under data/raw; `pleat data add` appends here",
        )
    ]
    said = capsys.readouterr().out
    assert "data/raw/clothing: 3 labelled images, classes: 2 of label (clothing_csv)" in said
    assert "2 rows have no image or no label" in said
    assert "1 images have no row" in said
    assert "uses sample, clothing; for clothing alone: `pleat use sample --set 'experiment.batches=[clothing]'`" in said
    assert "data/raw/clothing.dvc" in said
    assert "params.yaml`, then `dvc repro`" in said

    # The name is taken now, and stays taken where only the .dvc file came with git.
    with pytest.raises(PleatError, match="data/raw/clothing exists already, and a batch is never changed"):
        data_add.add(str(clothes), "clothing", root=project)
    shutil.rmtree(raw / "clothing")
    with pytest.raises(PleatError, match=r"'clothing' exists already \(.*clothing\.dvc\); fetch it with `dvc pull`"):
        data_add.add(str(clothes), "clothing", root=project)


def test_a_zip_that_a_recipe_lists_already_in_a_format_that_the_pipeline_would_not_use(
    project: Path, clothes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set has both images.csv and class folders."""
    text = (project / "params.yaml").read_text().replace("batches: [sample] ", "batches: [clothing] ")
    (project / "params.yaml").write_text(text)
    with zipfile.ZipFile(project.parent / "set.zip", "w") as archive:
        for path in clothes.rglob("*"):
            archive.write(path, path.relative_to(clothes.parent))
        archive.writestr("clothes/Hat/x.jpg", b"x")
        archive.writestr("clothes/Shirt/y.jpg", b"y")
    data_add.add(str(project.parent / "set.zip"), "clothing", "class_folders", project)
    assert (project / "params.yaml").read_text() == text
    assert (project / "data" / "raw" / "clothing" / "Hat" / "x.jpg").is_file()
    said = capsys.readouterr().out
    assert "classes: 3 of label (class_folders)" in said
    assert "the pipeline would read it as clothing_csv; set `ingest.format: class_folders`" in said
    assert "The experiment now uses" not in said


def test_a_set_with_two_label_columns(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "garments"
    for name in ("black_dress/a.jpg", "black_shoes/b.jpg", "red_dress/c.jpg", "red_hat/d.jpg", "loose.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    data_add.add(str(source), "new", root=project)
    said = capsys.readouterr().out
    assert "data/raw/new: 4 labelled images, classes: 2 of colour, 3 of garment (colour_garment)" in said
    assert "1 images have no row" in said


def test_folders_that_the_pipeline_would_read_as_colours(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader of colour_garment refuses such a set; what the pipeline would do is said, and the add stands."""
    for name in ("black_bear/a.jpg", "brown_bear/b.jpg", "polar_bear/c.jpg"):
        (tmp_path / "bears" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bears" / name).write_bytes(name.encode())
    with pytest.raises(PleatError, match=r"bears/polar_bear: expected a folder called COLOUR_GARMENT"):
        data_add.add(str(tmp_path / "bears"), "new", root=project)
    data_add.add(str(tmp_path / "bears"), "new", "class_folders", project)
    said = capsys.readouterr().out
    assert "classes: 3 of label (class_folders)" in said
    assert "the pipeline would read it as colour_garment; set `ingest.format: class_folders` in params.yaml" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sample", "reserved for the images that come with Pleat"),
        ("a-b", "Expected --name to be letters, digits"),
        ("../up", "but got '../up'"),
        ("", "Expected --name"),
        (".hidden", "Expected --name"),
        ("x" * 81, "at most 80"),
        ("new\n", "Expected --name"),
        ("new.dvc", "not ending in .dvc"),
    ],
)
def test_an_unusable_name(project: Path, clothes: Path, name: str, sentence: str, snapshot: Snapshot) -> None:
    before = snapshot()
    with pytest.raises(PleatError) as caught:
        data_add.add(str(clothes), name, root=project)
    assert sentence in str(caught.value)
    assert snapshot() == before


def test_sources_that_are_no_data_set_leave_nothing(
    project: Path, clothes: Path, tmp_path: Path, snapshot: Snapshot
) -> None:
    before = snapshot()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".hidden.jpg").touch()
    with pytest.raises(PleatError, match="nothing holds no data set that Pleat knows") as caught:
        data_add.add(str(tmp_path / "nothing"), "new", root=project)
    assert ".adding" not in str(caught.value)
    with pytest.raises(PleatError, match=r"one of auto, clothing_csv, .*, but got 'coco'"):
        data_add.add(str(clothes), "new", "coco", project)
    shutil.rmtree(clothes / "images")
    with pytest.raises(PleatError, match=r"has 5 rows of labels and 0 other images, but no image with a label"):
        data_add.add(str(clothes), "new", root=project)
    (clothes / "images.csv").write_text("image,label\na,Hat\n")
    with pytest.raises(PleatError, match=r"clothes/images\.csv has no column `sender_id`"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == before
    with pytest.raises(PleatError, match="'nowhere' does not exist; a source is"):
        data_add.add("nowhere", "new", root=project)
    (project / "params.yaml").unlink()
    with pytest.raises(PleatError, match="does not exist here; run pleat in the project's folder"):
        data_add.add(str(clothes), "new", root=project)


def test_a_folder_that_is_no_dvc_project(project: Path, clothes: Path) -> None:
    shutil.rmtree(project / ".dvc")
    with pytest.raises(PleatError, match=r"is no DVC project \(it has no \.dvc folder\)"):
        data_add.add(str(clothes), "new", root=project)


def test_a_list_that_cannot_be_added_to_is_found_out_before_the_copy(project: Path, endless: Path) -> None:
    text = (project / "params.yaml").read_text().replace("batches: [sample] ", "batches: *names ")
    text = text.replace("  drop: [Not sure, Other, Others, Skip] ", "  drop: &names [sample] ")
    blocks = text.split("\n\n")
    text = "\n\n".join([*blocks[1:], blocks[0]])
    (project / "params.yaml").write_text(text)
    params.load(project / "params.yaml")
    with pytest.raises(PleatError, match=r"write experiment\.batches as a plain list"):
        data_add.add(str(endless), "new", root=project)
