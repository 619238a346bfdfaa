"""`pleat predict`: which images it finds, what it writes of each, and what it leaves when it is stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PLEAT, draw, encode, load_params, names, write_params
from PIL import Image
from s3_store import objects, put
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from pipeline_steps import buckets, package, predict
from pipeline_steps.errors import PleatError
from pipeline_steps.registry import Registry
from pipeline_steps.serving.classifier import Classifier
from pipeline_steps.serving.images import resize_crop
from pipeline_steps.vision.networks import CustomCnn

pytest_plugins = ["s3_store"]

CLASSES = ["Hat", "Hose", "Röcke"]
SETTINGS = load_params()
COLUMNS = ["path", "label", "label_probability", "label_top_k", "error", "model_version"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two versions in a registry of their own, the first one champion: their packages by version."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        registry = Registry(SETTINGS.promotion.model)
        run = registry.client.create_run(mlflow.create_experiment("pleat", (folder / "mlruns").as_uri()))
        made: dict[str, Path] = {}
        for seed in (1, 2):
            made[str(seed)] = folder / str(seed) / "package"
            write_package(made[str(seed)], seed)
            version = registry.register(made[str(seed)], package.digest(made[str(seed)]), run.info.run_id, {})
            assert version == str(seed)
        registry.record("promoted", "1", "", "1", ["the first"], {})
        yield made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nested folders of good and broken images, and what is no image."""
    good = encode(draw(1))
    files = {
        "b.jpg": good, "a.PNG": encode(draw(2), "PNG"), "copy.jpg": good, "in/deep/c.jpg": encode(draw(3)),
        "in/empty.jpg": b"", "in/text.png": b"no image", "z.jpg": good[: len(good) // 2],
        "notes.txt": b"x", ".hidden.jpg": good,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    return tmp_path / "photos"


def write_package(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    network = CustomCnn([(4, 3, 2), (8, 3, 2)], len(CLASSES), hidden=0, dropout=0.0)
    about = {
        "classes": {"label": CLASSES},
        "preprocessing": {"resize": 32, "crop": 32, "interpolation": "bilinear"},
        "max_pixels": 1_000_000,
    }
    folder.mkdir(parents=True)
    package.write(folder, package.Answering(network, mirror=True), 32, about, encode(draw(0)))


def answers(folder: Path, files: list[Path]) -> list[np.ndarray]:
    """Probabilities as the package's own classifier answers them."""
    found = list(Classifier(folder).probabilities(files))
    assert all(isinstance(answer, dict) for answer in found)
    return [answer["label"] for answer in found if isinstance(answer, dict)]


def test_a_row_for_each_image(
    packages: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks of three and row groups of four rows, so that both end in the middle of the other."""
    monkeypatch.setattr(predict, "ANSWERED_AT_ONCE", 3)
    monkeypatch.setattr(predict, "ROWS_A_GROUP", 4)
    given = ["photos/b.jpg", "photos/", "photos/b.jpg", str(photos / "in")]
    scored = predict.predict(SETTINGS, given, "out/scores.parquet", top_k=2, root=photos.parent)

    inner = ["a.PNG", "b.jpg", "copy.jpg", "in/deep/c.jpg", "in/empty.jpg", "in/text.png", "z.jpg"]
    below = [f"{photos}/in/{name}" for name in ("deep/c.jpg", "empty.jpg", "text.png")]
    expected = ["photos/b.jpg", *(f"photos/{name}" for name in inner), "photos/b.jpg", *below]
    table = pd.read_parquet(photos.parent / "out" / "scores.parquet")
    assert list(table) == COLUMNS
    assert list(table["path"]) == expected
    assert pq.ParquetFile(photos.parent / "out" / "scores.parquet").num_row_groups == 3
    assert names(photos.parent / "out") == ["scores.parquet"]
    assert (scored.version, scored.n_images, scored.n_unreadable) == ("1", 12, 5)
    assert set(table["model_version"]) == {"1"}

    good = table[table["error"].isna()]
    own = answers(packages["1"], [photos.parent / path for path in good["path"]])
    for (_, row), probabilities in zip(good.iterrows(), own, strict=True):
        best = probabilities.argsort()[::-1][:2]
        assert row["label"] == CLASSES[best[0]]
        assert row["label_probability"] == pytest.approx(probabilities[best[0]], abs=1e-6)
        assert [item["label"] for item in row["label_top_k"]] == [CLASSES[code] for code in best]
        assert [item["probability"] for item in row["label_top_k"]] == pytest.approx(probabilities[best], abs=1e-6)
    bad = table[table["error"].notna()].set_index("path")
    assert bad[["label", "label_probability", "label_top_k"]].isna().all(axis=None)
    assert bad.loc["photos/in/empty.jpg", "error"] == "the image is empty"
    assert bad.loc["photos/in/text.png", "error"] == "it is no image of a known format"
    assert str(bad.loc["photos/z.jpg", "error"]).startswith("it cannot be decoded: ")
    said = capsys.readouterr().out
    assert "predict: version 1 of" in said
    assert "predict: 12 images, 5 of them unreadable, in " in said
    assert "images/s once the model was loaded; out/scores.parquet" in said


def test_another_version_with_all_its_labels(packages: dict[str, Path], photos: Path) -> None:
    predict.predict(SETTINGS, ["photos/b.jpg"], "s.parquet", version="2", top_k=9, root=photos.parent)
    (row,) = pd.read_parquet(photos.parent / "s.parquet").to_dict("records")
    (own,), (champion,) = (answers(packages[version], [photos / "b.jpg"]) for version in "21")
    listed = {item["label"]: item["probability"] for item in row["label_top_k"]}
    assert [listed[name] for name in CLASSES] == pytest.approx(own, abs=1e-6)
    assert own != pytest.approx(champion, abs=1e-3)
    assert row["model_version"] == "2"


def test_nothing_readable_leaves_the_reasons_and_an_error(packages: dict[str, Path], photos: Path) -> None:
    with pytest.raises(PleatError, match=r"None of the 2 images can be read; the column `error` of s\.parquet says"):
        predict.predict(SETTINGS, ["photos/z.jpg", "photos/notes.txt"], "s.parquet", root=photos.parent)
    table = pd.read_parquet(photos.parent / "s.parquet")
    assert list(table) == COLUMNS
    assert table["error"].notna().all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"images": ["photos/none.jpg"]}, r"photos/none\.jpg does not exist; name image files, folders or"),
        ({"images": ["empty"]}, r"No image was found in empty; files end in \.jpg"),
        ({"top_k": 0}, "Expected --top-k to be at least 1, but got 0"),
        ({"out": "photos"}, r"photos is a folder; name a file, such as photos/scores\.parquet"),
        ({"out": "s3://bucket/"}, r"Expected the address of a file such as s3://bucket/folder/a, but got 's3://buc"),
        ({"version": "7"}, "has no version 7; `pleat history` lists those there are"),
        ({"version": "best"}, "has no version best; `pleat history`"),
        ({"params": load_params({"promotion.model": "nobody"})}, "nobody has no champion yet; `dvc repro` trains and"),
    ],
)
def test_errors_are_sentences(
    packages: dict[str, Path], photos: Path, arguments: dict[str, Any], sentence: str
) -> None:
    (photos.parent / "empty").mkdir()
    usual = {"params": SETTINGS, "images": ["photos"], "out": "s.parquet", "root": photos.parent}
    with pytest.raises(PleatError, match=sentence):
        predict.predict(**(usual | arguments))
    assert names(photos.parent) == ["empty", "photos"]


def test_a_model_that_pleat_did_not_make(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(predict, "_fetch", lambda *_: ("3", tmp_path / "model"))
    with pytest.raises(PleatError, match=r"^Version 3 of \w+ cannot be used: it was not made by Pleat\.$"):
        predict.predict(SETTINGS, ["photos"], "s.parquet", root=tmp_path)
    assert names(tmp_path) == ["model", "photos"]


def test_a_name_that_is_not_utf8(packages: dict[str, Path], tmp_path: Path) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")
    Path(path).write_bytes(b"x")
    with pytest.raises(PleatError, match=r"is not valid UTF-8; rename the file"):
        predict.predict(SETTINGS, [path], "s.parquet", root=tmp_path)


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (lambda process: process.send_signal(signal.SIGINT), 130, "pleat: interrupted; nothing half-written"),
        (lambda process: psutil.Process(process.pid).children()[0].kill(), 1, "cannot be used: its process ended"),
    ],
    ids=["Ctrl-C", "its model is killed"],
)
def test_stopped_in_the_middle(
    packages: dict[str, Path], photos: Path, stop: Callable[[subprocess.Popen], None], status: int, said: str
) -> None:
    """Large images keep it at work for much longer than the test takes."""
    root = photos.parent
    write_params(root)
    large = photos / "zz.png"
    Image.new("RGB", (7000, 7000)).save(large)
    for number in range(60):
        (photos / f"zz{number}.png").symlink_to(large)
    (root / "out").mkdir()
    command = [*PLEAT, "predict", "photos", "--out", "out/s.parquet"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not names(root / "out"):
        assert process.poll() is None
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    assert names(root / "out")[0].startswith(".partial-")
    stop(process)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert said in stderr
    assert "Traceback" not in stderr
    assert names(root / "out") == []


def test_from_a_bucket_into_a_bucket(packages: dict[str, Path], client: Any, tmp_path: Path) -> None:
    put(client, {"in/sub/b.jpg": encode(draw(1)), "in/a.jpg": b"", "in-old/c.jpg": encode(draw(1))})
    predict.predict(SETTINGS, ["s3://photos/in"], "s3://photos/out/s.parquet", root=tmp_path)
    client.download_file("photos", "out/s.parquet", str(tmp_path / "s.parquet"))
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert list(table["path"]) == ["s3://photos/in/a.jpg", "s3://photos/in/sub/b.jpg"]
    assert list(table["error"].isna()) == [False, True]
    assert names(tmp_path) == ["s.parquet"]


def test_upload(client: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    buckets.upload(tmp_path / "file", "s3://photos/some/key")
    assert objects(client) == {"some/key": b"content"}
    with pytest.raises(PleatError, match="Could not upload to s3://absent/key: the bucket does not exist; check its"):
        buckets.upload(tmp_path / "file", "s3://absent/key")
    for address in ("s3://photos", "s3://photos/folder/"):
        with pytest.raises(PleatError, match="Expected the address of a file such as s3://bucket/folder/a"):
            buckets.upload(tmp_path / "file", address)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_as_torchvision_does(mode: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        height, width, resize = (int(side) for side in random.integers(1, 300, 3))
        crop = int(random.integers(1, resize + 1))
        drawn = torch.from_numpy(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)
        for pixels in (drawn, drawn.contiguous()):
            longest = 2 * min(height, width)
            cut = transforms.center_crop(pixels, [min(height, longest), min(width, longest)])
            whole = transforms.resize(cut, [resize], InterpolationMode(mode), antialias=True)
            assert torch.equal(resize_crop(pixels, resize, crop, mode), transforms.center_crop(whole, [crop]))
