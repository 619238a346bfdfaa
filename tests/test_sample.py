"""The embedded sample: what it holds, its faults, and that the copy in git is what the generator draws."""

import io
from collections import Counter, defaultdict
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from pipeline_steps.errors import PleatError
from pipeline_steps.sample import LABEL_COUNTS, NO_CLASS, Scene, draw_garment, draw_sample, make_scene

IN_GIT = Path(__file__).parents[1] / "data" / "raw" / "sample"
NEAR_COPY_BITS = 4  # of 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "drawn"
    draw_sample(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decoded(content: bytes) -> Image.Image | None:
    """The whole picture, upright, or None where it cannot be read."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    except OSError:
        return None


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "images.csv")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (folder / "images").iterdir()}


def test_the_copy_in_git_is_small() -> None:
    files = contents(IN_GIT)
    assert sum(len(content) for content in files.values()) <= 2_000_000
    assert {name.split("/")[0] for name in files} == {"images", "images.csv"}


def test_the_same_seed_draws_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    draw_sample(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(drawn)


def test_another_seed_draws_other_pictures() -> None:
    first, again, other = (draw_garment("Polo", np.random.default_rng(seed), 40) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_copy_in_git_is_what_the_generator_draws(drawn: Path) -> None:
    assert (IN_GIT / "images.csv").read_bytes() == (drawn / "images.csv").read_bytes()
    in_git, fresh = bytes_of(IN_GIT), bytes_of(drawn)
    assert in_git.keys() == fresh.keys()
    for name, content in in_git.items():
        ours, theirs = decoded(content), decoded(fresh[name])
        assert (ours is None) == (theirs is None), name
        if ours and theirs:  # encoders differ a little between versions of Pillow
            assert ours.size == theirs.size, name
            assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 4, name


def test_labels_are_those_of_the_real_set_and_unbalanced() -> None:
    rows = rows_of(IN_GIT)
    assert list(rows.columns) == ["image", "sender_id", "label", "kids"]
    assert rows.image.is_unique
    assert set(rows.label) == set(LABEL_COUNTS)
    counts = rows.label.value_counts()
    assert 430 <= len(rows) <= 480
    assert counts.index[0] == "T-Shirt"
    assert counts.drop([*NO_CLASS]).index[-1] == "Blouse"
    assert rows.kids.dtype == bool


def test_every_class_has_enough_usable_images_from_enough_senders() -> None:
    rows, files = rows_of(IN_GIT), bytes_of(IN_GIT)
    usable = rows[[decoded(files.get(name, b"")) is not None for name in rows.image]]
    usable = usable[[min(decoded(files[name]).size) > 1 for name in usable.image]]  # type: ignore[union-attr]
    classes = usable[~usable.label.isin(NO_CLASS)].groupby("label")
    assert len(classes) == 17
    assert classes.size().min() >= 14
    assert classes.sender_id.nunique().min() >= 6


def test_one_sender_sends_far_more_than_the_others() -> None:
    counts = rows_of(IN_GIT).sender_id.value_counts()
    assert 25 <= len(counts) <= 30
    assert counts.iloc[0] > 1.3 * counts.iloc[1]


def test_exact_copies() -> None:
    rows, files = rows_of(IN_GIT), bytes_of(IN_GIT)
    labels = defaultdict(list)
    for row in rows.itertuples():
        if files.get(str(row.image)):
            labels[files[str(row.image)]].append(row.label)
    copied = [found for found in labels.values() if len(found) > 1]
    assert sorted(len(set(found)) for found in copied) == [1, 1, 1, 1, 2]
    assert {"T-Shirt", "Longsleeve"} in [set(found) for found in copied]


def test_near_copies_are_close_and_other_pictures_are_not() -> None:
    rows, files = rows_of(IN_GIT), bytes_of(IN_GIT)
    seen: dict[bytes, tuple[str, int]] = {}
    for row in rows.itertuples():
        content = files.get(str(row.image), b"")
        image = decoded(content)
        if image is not None and min(image.size) > 1:
            seen[content] = (str(row.label), int(str(row.sender_id)))
    owners = list(seen.values())
    hashes = np.array([imagehash.phash(decoded(content)).hash.ravel() for content in seen])
    first, second = np.triu_indices(len(hashes), 1)
    near = (hashes[first] != hashes[second]).sum(1) <= NEAR_COPY_BITS
    pairs = [(owners[i], owners[j]) for i, j in zip(first[near], second[near], strict=True)]
    assert len(pairs) == 9
    assert all(one[0] == other[0] for one, other in pairs)
    assert 1 <= sum(one[1] != other[1] for one, other in pairs) <= 3


def test_unreadable_missing_and_stray_files() -> None:
    rows, files = rows_of(IN_GIT), bytes_of(IN_GIT)
    unreadable = [content for content in files.values() if decoded(content) is None]
    kinds = Counter(
        "empty" if not content else "truncated" if content.startswith(b"\xff\xd8") else "text" for content in unreadable
    )
    assert kinds == {"empty": 2, "truncated": 2, "text": 1}
    missing = rows[~rows.image.isin(files)]
    assert list(missing.label) == ["Skip"] * 3
    stray = files.keys() - set(rows.image)
    assert len(stray) == 4
    assert all(decoded(files[name]) for name in stray)


def test_readable_oddities() -> None:
    images = [Image.open(io.BytesIO(content)) for content in bytes_of(IN_GIT).values() if decoded(content)]
    stored = Counter((image.format, image.mode) for image in images)
    assert stored[("JPEG", "L")] == stored[("JPEG", "CMYK")] == stored[("PNG", "P")] == 1
    assert sum(image.size == (1, 1) for image in images) == 1
    turned = [image for image in images if image.getexif().get(0x0112, 1) != 1]
    assert len(turned) == 1
    assert turned[0].getexif()[0x0112] == 6


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(PleatError, match="is not an empty folder"):
        draw_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("label", LABEL_COUNTS)
def test_garments_of_one_label_differ_and_fill_a_good_part_of_the_picture(label: str) -> None:
    scene: Scene = make_scene(np.random.default_rng(3))._replace(landscape=0.0)
    first, second = (np.asarray(draw_garment(label, np.random.default_rng(seed), 48, scene), float) for seed in (4, 5))
    assert first.shape == second.shape == (64, 48, 3)
    assert np.abs(first - second).mean() > 8
    assert first.std() > 10
