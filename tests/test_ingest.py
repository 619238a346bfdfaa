"""Stage `ingest`: everything ends up once in the manifest or the quarantine; interrupted, nothing is left."""

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from conftest import (
    MANIFEST_COLUMNS,
    PLEAT,
    content,
    draw,
    encode,
    load_params,
    names,
    pleat,
    write_batch,
    write_params,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps import ingest
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json

JPEGS = [encode(draw(seed)) for seed in range(6)]
# Content of a file and label of its row (None: no file, no row), and the reason for which it is left out.
KINDS: dict[str, tuple[bytes | None, str | None, str | None]] = {
    "good": (JPEGS[0], "Hat", None),
    "other": (JPEGS[1], " T-Shirt ", None),
    "png": (encode(draw(7), "PNG"), "Hat", None),
    "copy": (JPEGS[0], "Pants", None),
    "zero": (b"", "Hat", "undecodable"),
    "half": (JPEGS[2][:-300], "Hat", "truncated"),
    "text": (b"not an image", "Hat", "undecodable"),
    "tiny": (encode(draw(8, 5, 5), "PNG"), "Hat", "too small"),
    "large": (encode(draw(9, 300, 300), "PNG"), "Hat", "too many pixels"),
    "missing": (None, "Hat", "missing file"),
    "blank": (JPEGS[3], "  ", "no label"),
    "rowless": (JPEGS[4], None, "no label"),
}
LIMITS = {"ingest.max_pixels": 80_000}


def read(root: Path, batch: str = "b") -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    folder = root / "data" / "ingest" / batch
    return (
        pd.read_parquet(folder / "manifest.parquet"),
        pd.read_parquet(folder / "quarantine.parquet"),
        read_json(folder / "counts.json"),
    )


def packed(root: Path, batch: str = "b") -> dict[str, tuple[bytes, bool]]:
    table = pa.ipc.open_file(root / "data" / "ingest" / batch / "images.arrow").read_all()
    assert table.column_names == ["sample_id", "bytes", "plain_jpeg"]
    rows = table.to_pylist()
    assert len({row["sample_id"] for row in rows}) == len(rows), "every image once"
    return {row["sample_id"]: (row["bytes"], row["plain_jpeg"]) for row in rows}


def mixed_batch(root: Path, kinds: list[str]) -> dict[str, str]:
    """One file and row of each kind (repeats are copies); returns the kind of each path."""
    cases = {f"{number} {kind}": kind for number, kind in enumerate(kinds)}
    suffix = {name: "png" if kind in ("png", "tiny", "large") else "JPG" for name, kind in cases.items()}
    suffix |= {name: "jpg" for name, kind in cases.items() if kind == "missing"}
    files = {f"{name}.{suffix[name]}": KINDS[kind][0] for name, kind in cases.items()}
    write_batch(root, "b", {name: KINDS[kind][1] for name, kind in cases.items() if KINDS[kind][1] is not None}, files)
    return {f"images/{name}.{suffix[name]}": kind for name, kind in cases.items()}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=12))
def test_every_row_and_file_ends_up_exactly_once(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cases = mixed_batch(root, ["good", *kinds])
        ingest.run(load_params(LIMITS), "b", root)
        manifest, quarantine, counts = read(root)

        assert Counter([*manifest["source_path"], *quarantine["source_path"]]) == Counter(list(cases))
        assert dict(zip(quarantine["source_path"], quarantine["reason"], strict=True)) == {
            path: KINDS[kind][2] for path, kind in cases.items() if KINDS[kind][2]
        }
        assert dict(zip(manifest["source_path"], manifest["label"], strict=True)) == {
            path: KINDS[kind][1] for path, kind in cases.items() if KINDS[kind][2] is None
        }
        assert set(manifest["batch"]) | set(quarantine["batch"]) == {"b"}
        assert (quarantine["detail"] != "").all()
        assert sorted(manifest.columns) == sorted([*MANIFEST_COLUMNS, "label"])
        assert set(manifest["given"]) == {""}

        assert counts["samples"] == len(manifest)
        assert counts["quarantine"] == dict(Counter(KINDS[kind][2] for kind in cases.values() if KINDS[kind][2]))

        images = packed(root)
        for _, row in manifest.iterrows():
            original = (root / "data" / "raw" / "b" / row["source_path"]).read_bytes()
            assert row["sample_id"] == hashlib.sha256(original).hexdigest()
            assert images[row["sample_id"]] == (original, row["source_path"].endswith("JPG"))
            assert row["n_bytes"] == len(original)
        assert set(images) == set(manifest["sample_id"])


def test_names_in_every_script_and_paths_that_leave_the_folder(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "übung é")
    good = {"日本 語.jpg": JPEGS[0], f"{decomposed}.jpg": JPEGS[1], "a b.c.JPEG": JPEGS[2], "UPPER.JPG": JPEGS[3]}
    long_name = "x" * 300
    rows = ["日本 語", unicodedata.normalize("NFC", decomposed), "a b.c", "UPPER", "link", "folder/secret", long_name]
    rows += ["../../../../secret", "/etc/hosts", "nul\0byte", "pipe"]
    (tmp_path / "secret.jpg").write_bytes(JPEGS[4])
    folder = write_batch(tmp_path, "b", dict.fromkeys(rows, "Hat"), good)
    (folder / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "images" / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "images" / "pipe.jpg")
    ingest.run(load_params(), "b", tmp_path)
    manifest, quarantine, _ = read(tmp_path)
    assert sorted(manifest["source_path"]) == sorted(f"images/{name}" for name in good)
    reasons = dict(zip(quarantine["source_path"], quarantine["reason"], strict=True))
    assert reasons == {
        "images/link.jpg": "outside the folder",
        "images/folder/secret.jpg": "outside the folder",
        "images/../../../../secret.jpg": "outside the folder",
        "/etc/hosts.jpg": "outside the folder",
        "images/nul\0byte.jpg": "outside the folder",
        f"images/{long_name}.jpg": "missing file",
        "images/pipe.jpg": "missing file",
    }


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    mixed_batch(tmp_path, list(KINDS) * 30)
    ingest.run(load_params(LIMITS), "b", tmp_path)
    first = content(tmp_path / "data" / "ingest")
    ingest.run(load_params(LIMITS), "b", tmp_path)
    assert content(tmp_path / "data" / "ingest") == first
    assert sorted(first) == [
        f"b/{name}" for name in ("counts.json", "images.arrow", "manifest.parquet", "quarantine.parquet")
    ]


def test_what_cannot_be_ingested_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data" / "raw" / "empty").mkdir(parents=True)
    broken = write_batch(tmp_path, "broken", {"a": "Hat", "b": "Hat", "c": ""}, {"a.jpg": b"", "c.jpg": JPEGS[0]})
    (tmp_path / "data" / "raw" / "file").touch()
    for batch, sentence in {
        "absent": (
            f"params.yaml lists the batch 'absent', but {tmp_path / 'data' / 'raw' / 'absent'} does not exist. "
            "Add it with `pleat data add SOURCE --name absent`, fetch it with `dvc pull`, or remove it from the list."
        ),
        "file": "params.yaml lists the batch 'file', but ",
        "empty": f"{tmp_path / 'data' / 'raw' / 'empty'} holds no data set that Pleat knows.",
        "broken": f"Not one image of {broken} could be used (1 missing file, 1 no label, 1 undecodable); look at",
    }.items():
        with pytest.raises(PleatError) as caught:
            ingest.run(load_params(), batch, tmp_path)
        assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "data" / "ingest").exists() or names(tmp_path / "data" / "ingest") == []


def test_a_user_sees_the_sentence_and_no_traceback(tmp_path: Path) -> None:
    write_params(tmp_path)
    done = pleat(tmp_path, "ingest", "absent")
    assert done.returncode == 1
    assert done.stderr.startswith("pleat: params.yaml lists the batch 'absent', but data/raw/absent does not exist.")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch of 300 images, each some milliseconds of work, ingested without a disturbance."""
    root = tmp_path_factory.mktemp("undisturbed")
    large = encode(draw(1, 900, 700), quality=80)
    files = {
        f"{number}.jpg": large + str(number).encode() for number in range(300)
    }  # bytes after the end do not matter
    write_batch(root, "b", {str(number): "Hat" for number in range(300)}, files)
    write_params(root, {"experiment.batches": ["b"]})
    ingest.run(load_params(), "b", root)
    return root


def start_ingest(root: Path) -> subprocess.Popen[bytes]:
    """A child that has begun to write its pack of images."""
    child = subprocess.Popen([*PLEAT, "ingest", "b"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((root / "data" / "ingest").glob(".partial-*/images.arrow")):
        try:
            child.wait(0.005)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"it ended too soon: {child.stderr.read()}")
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_is_never_taken_for_finished(
    many_images: Path, tmp_path: Path, number: signal.Signals
) -> None:
    shutil.copy(many_images / "params.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "raw").symlink_to(many_images / "data" / "raw")
    child = start_ingest(tmp_path)
    child.send_signal(number)
    _, errors = child.communicate()
    left = names(tmp_path / "data" / "ingest")
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        assert left == [f".partial-{child.pid}-b"]
    else:
        assert child.returncode == 130
        assert errors.decode() == (
            "pleat: interrupted; nothing half-written was kept. Run the same command to go on.\n"
        )
        assert left == []

    assert pleat(tmp_path, "ingest", "b").returncode == 0
    assert names(tmp_path / "data" / "ingest") == ["b"], "what was left over is swept up"
    assert content(tmp_path / "data" / "ingest") == content(many_images / "data" / "ingest")


def test_a_disk_that_fills_up_at_any_point(small_disk: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    files = {f"{number}.jpg": JPEGS[number % 6] + bytes([number]) for number in range(40)}
    write_batch(root, "b", {str(number): "Hat" for number in range(40)}, files)
    (root / "data" / "ingest").symlink_to(small_disk)
    ingest.run(load_params(), "b", root)
    whole = content(small_disk)
    shutil.rmtree(small_disk / "b")
    disk = os.statvfs(small_disk)
    for room in range(0, disk.f_blocks * disk.f_frsize, 8192):
        (small_disk / "filler").write_bytes(b"x" * (disk.f_blocks * disk.f_frsize - room))
        try:
            ingest.run(load_params(), "b", root)
        except PleatError as error:
            sentence = str(error)
        else:
            break
        assert sentence.startswith(f"Could not write {root / 'data' / 'ingest' / 'b'}")
        assert "No space left on device. Free some space" in sentence
        assert names(small_disk) == ["filler"], room
    assert room > 40_000, "too much room from the start"
    assert content(small_disk / "b") == {name.removeprefix("b/"): data for name, data in whole.items()}


def test_an_output_folder_that_cannot_be_written(read_only: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_batch(root, "b", {"a": "Hat"}, {"a.jpg": JPEGS[0]})
    (root / "data" / "ingest").symlink_to(read_only)
    write_params(root)
    done = pleat(root, "ingest", "b")
    assert done.returncode == 1
    assert done.stderr == (
        "pleat: Could not write data/ingest/b: Read-only file system. Free some space or make the folder writable, "
        "then run the same command again; nothing was left behind.\n"
    )


def test_a_log_gets_plain_lines(tmp_path: Path) -> None:
    write_batch(tmp_path, "b", {"a": "Hat", "b": "Hat"}, {"a.jpg": JPEGS[0]})
    write_params(tmp_path)
    done = pleat(tmp_path, "ingest", "b")
    assert done.returncode == 0
    assert done.stdout == "ingest b: 1 images in the manifest, quarantine: 1 missing file\n"
    assert done.stderr == ""


def test_the_real_clothing_set(real_data: Path, clothing: Path) -> None:
    table = pd.read_csv(real_data / "data" / "clothing" / "images.csv", dtype=str, keep_default_na=False)
    on_disk = {path.stem for path in (real_data / "data" / "clothing" / "images").iterdir()}
    manifest, _, counts = read(clothing, "clothing")
    assert len(manifest) == len(set(table["image"]) & on_disk) == 5398
    assert counts["quarantine"] == {
        "no label": len(on_disk - set(table["image"])),
        "missing file": len(set(table["image"]) - on_disk),
    }
    assert counts["quarantine"] == {"no label": 358, "missing file": 5}
    labels = dict(zip(table["image"], table["label"], strict=True))
    assert [labels[Path(path).stem] for path in manifest["source_path"]] == list(manifest["label"])
    assert manifest["phash"].str.fullmatch("[0-9a-f]{16}").all()
    for sample_id, (encoded, plain) in list(packed(clothing, "clothing").items())[::100]:
        assert hashlib.sha256(encoded).hexdigest() == sample_id
        assert plain
