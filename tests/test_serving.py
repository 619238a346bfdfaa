"""A packaged model: every form of input, every kind of image, and what is refused."""

import base64
import io
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import draw, encode
from PIL import Image
from refit_workspace import CLASSES
from served_model import COLUMNS, ask, check_row, load, vector
from test_images import CLEAR_FIRST, ORIENTATION, PALETTE, STORED, hand_made_png, png_chunk

from pipeline_steps import package
from pipeline_steps.serving.classifier import Classifier, UnreadableError
from pipeline_steps.serving.pyfunc import ImageModel

pytest_plugins = ["served_model"]


def forms(image: Image.Image, folder: Path) -> list[Any]:
    """One picture in every form that a cell may have."""
    encoded, pixels = encode(image, "PNG"), np.array(image)
    path = folder / "picture.png"
    path.write_bytes(encoded)
    text = base64.b64encode(encoded).decode()
    return [
        encoded, bytearray(encoded), memoryview(encoded), text, f"{text}\n", base64.encodebytes(encoded).decode(),
        str(path), pixels, pixels.astype(np.int64), pixels.astype(np.uint16), np.asfortranarray(pixels),
        pixels.tolist(), list(pixels),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(48, 64), (32, 32), (7, 300), (1, 1)])
def test_every_form_of_one_picture_gives_one_answer(
    mode: str, size: tuple[int, int], model: ImageModel, tmp_path: Path
) -> None:
    picture = draw(3, *size).convert(mode)
    first, *rest = ask(model, *forms(picture, tmp_path))
    check_row(first)
    assert rest == [first] * len(rest)
    assert ask(model, np.array(picture.convert("RGB"))) == [first], "grey is three equal colours"
    other, _ = ask(model, encode(draw(4, 48, 64), "PNG"), encode(draw(5, 48, 64), "PNG"))
    assert vector(other) != pytest.approx(vector(first))


def meant(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def kinds_of_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of each kind with the pixels that they show, worked out here or by Pillow."""
    picture = draw(11, 48, 32)
    pixels, found = np.array(picture), {}
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(pixels)))
        found[f"PNG turned {orientation}"] = encode(stored, "PNG", exif=exif), pixels
    exif[ORIENTATION] = 3
    lying = encode(picture, exif=exif)
    found["JPEG turned"] = lying, meant(Image.open(io.BytesIO(lying)))[::-1, ::-1]
    cmyk = encode(picture.convert("CMYK"), quality=90)
    found["CMYK"] = cmyk, meant(Image.open(io.BytesIO(cmyk)))
    clear = np.zeros((32, 48), dtype=np.uint8)
    clear[8:20, 5:40] = 255
    found["transparent"] = (
        encode(Image.fromarray(np.dstack([pixels, clear])), "PNG"),
        np.where(clear[:, :, None] == 255, pixels, 255),
    )
    found["transparent palette"] = (
        hand_made_png([bytes([0, 1, 2])], 3, 8, 3, PALETTE, CLEAR_FIRST),
        np.array([[[255] * 3, [0, 255, 0], [0, 0, 255]]]),
    )
    deep = np.random.default_rng(0).integers(0, 2**16, (32, 48))
    rows = [struct.pack(">48H", *row) for row in deep.tolist()]
    found["16-bit grey"] = hand_made_png(rows, 48, 16, 0), np.repeat((deep >> 8)[:, :, None], 3, axis=2)
    flag = np.zeros((30, 40, 3), dtype=np.uint8)
    flag[:, :13], flag[:, 13:] = [255, 0, 0], [0, 0, 255]
    frames = [Image.fromarray(flag), Image.new("RGB", (40, 30), "white")]
    found["GIF of two frames"] = encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), flag
    found["WebP"] = encode(picture, "WEBP", lossless=True), pixels
    found["BMP"] = encode(picture, "BMP"), pixels
    found["TIFF"] = encode(picture, "TIFF"), pixels
    return found


FILES = kinds_of_files()


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_is_seen_as_it_is_meant(kind: str, model: ImageModel) -> None:
    encoded, shown = FILES[kind]
    as_file, as_pixels = ask(model, encoded, shown.astype(np.uint8))
    assert as_file == as_pixels
    if "turned" in kind and kind not in ("PNG turned 1", "PNG turned 2"):  # 2 is mirrored: both views count anyway
        with Image.open(io.BytesIO(encoded)) as stored:
            assert vector(ask(model, np.array(stored))[0]) != pytest.approx(vector(as_file), abs=1e-6)


def test_a_plain_jpeg_is_what_pillow_makes_of_it_but_for_rounding(model: ImageModel) -> None:
    encoded = encode(draw(5, 333, 250), quality=90)
    by_us, by_pillow = ask(model, encoded, meant(Image.open(io.BytesIO(encoded))))
    np.testing.assert_allclose(vector(by_us), vector(by_pillow), atol=0.01)


def bomb() -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


JPEG, PNG = encode(draw(1, 300, 400)), encode(draw(2, 300, 400), "PNG")
PIXELS = np.zeros((20, 30, 3), dtype=np.uint8)
# What is given, what the reason must say.
REFUSED: dict[str, tuple[Any, str]] = {
    "half a JPEG": (JPEG[: len(JPEG) // 2], "it cannot be decoded: .*(truncated|incomplete)"),
    "half a PNG": (PNG[: len(PNG) // 2], "it cannot be decoded: .*truncated"),
    "half a progressive JPEG": (encode(draw(3, 300, 400), progressive=True)[:-2000], "it cannot be decoded"),
    "half a PNG in base64": (base64.b64encode(PNG[: len(PNG) // 2]).decode(), "it cannot be decoded: .*truncated"),
    "a bomb": (bomb(), "30000x30000 are more than 50,000,000 pixels"),
    "nothing": (b"", "the image is empty"),
    "text": (b"<html>404 Not Found</html>", "it is no image of a known format"),
    "a PDF": (b"%PDF-1.4", "it is no image of a known format"),
    "no text": (" ", "the text is empty"),
    "a missing file": ("no/such/picture.jpg", "the file cannot be read: No such file"),
    "a folder": ("/", "the file cannot be read: it is no regular file"),
    "a device": ("/dev/zero", "the file cannot be read: it is no regular file"),
    "a path with a zero byte": ("picture\0.jpg", "the file cannot be read"),
    "base64 of no image": (
        base64.b64encode(b"no image at all" * 300).decode(),
        "the base64 holds no image of a known format",
    ),
    "a very long path": ("a-b/" * 2000, "the file cannot be read: File name too long"),
    "two numbers": (np.zeros(2, dtype=np.uint8), r"shape \(height, width, 3\) .*, but got \(2,\)"),
    "colours first": (np.zeros((3, 20, 30), dtype=np.uint8), r"but got \(3, 20, 30\)"),
    "four channels": (np.zeros((20, 30, 4), dtype=np.uint8), r"but got \(20, 30, 4\)"),
    "a batch": (PIXELS[None], r"but got \(1, 20, 30, 3\)"),
    "no pixels": (PIXELS[:0], r"but got \(0, 30, 3\)"),
    "an empty list": ([], r"but got \(0,\)"),
    "rows of two lengths": ([[1, 2], [3]], "the rows of the pixels differ in length"),
    "floats": (PIXELS / 255, "whole numbers from 0 to 255, but got float64"),
    "not a number": (np.full((20, 30, 3), np.nan), "whole numbers from 0 to 255, but got float64"),
    "negative": (PIXELS.astype(int) - 1, "whole numbers from 0 to 255"),
    "above 255": (PIXELS.astype(int) + 256, "whole numbers from 0 to 255"),
    "texts as pixels": ([["a", "b"], ["c", "d"]], "whole numbers from 0 to 255"),
    "holes": ([[1, None], [2, 3]], "whole numbers from 0 to 255"),
    "none": (None, "expected bytes, base64, a path or an array of pixels, but got NoneType"),
    "a number": (7.5, "but got float"),
    "an object": ({"b64": "AAAA"}, "but got dict"),
}


def test_what_cannot_be_read_has_a_reason_and_harms_no_other_row(model: ImageModel) -> None:
    good = [encode(draw(number)) for number in range(len(REFUSED) + 1)]
    images: list[Any] = [good[0]]
    for (image, _), following in zip(REFUSED.values(), good[1:], strict=True):
        images += [image, following]
    rows = ask(model, *images)
    assert rows[::2] == [ask(model, image)[0] for image in good]
    for name, row in zip(REFUSED, rows[1::2], strict=True):
        assert {column for column, cell in row.items() if cell is not None} == {"error"}, name
        assert re.search(REFUSED[name][1], row["error"]), (name, row["error"])
        assert " 0x" not in row["error"], "an address in memory"
        assert len(row["error"]) < 300


def test_where_nothing_can_be_read_every_row_still_has_its_reason(model: ImageModel) -> None:
    frame = pd.DataFrame({"image": [b"", b"x"]}, index=[7, 3])
    answers = model.predict(None, frame)
    assert list(answers.index) == [7, 3]
    assert answers["error"].tolist() == ["the image is empty", "it is no image of a known format"]
    assert answers[["label", "label_probability", "label_top_k"]].isna().all(axis=None)
    assert list(model.predict(None, frame[:0])) == COLUMNS


def test_a_fifo_does_not_hang(model: ImageModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (row,) = ask(model, str(tmp_path / "pipe"))
    assert row["error"] == "the file cannot be read: it is no regular file"


def test_top_k_lists_as_many_labels(model: ImageModel) -> None:
    image = encode(draw(1))
    (every,) = ask(model, image)
    for top_k in (1, 2, 3, 99):
        (row,) = ask(model, image, top_k=top_k)
        assert row["label_top_k"] == every["label_top_k"][:top_k]
        assert row["label"] == every["label"]
    with pytest.raises(ValueError, match="Expected `top_k` to be at least 1, but got 0"):
        ask(model, image, top_k=0)


def test_a_frame_without_the_column_is_an_error(model: ImageModel) -> None:
    with pytest.raises(ValueError, match="Expected a column `image`, but got picture, 3"):
        model.predict(None, pd.DataFrame({"picture": [b""], 3: [1]}))


@pytest.mark.parametrize("name", ["photo123", "abcd", "iVBORw0KGgo="])
def test_a_path_may_look_like_base64(
    name: str, model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base64.b64decode(name, validate=True)
    (tmp_path / name).write_bytes(encode(draw(1), "PNG"))
    monkeypatch.chdir(tmp_path)
    assert ask(model, name) == ask(model, np.array(draw(1)))


def test_rows_keep_their_order_however_many_threads_there_are(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures between small ones: whatever is done first, answers come as the questions did."""
    images = [encode(draw(number, *((900, 700) if number % 5 == 0 else (20, 20)))) for number in range(40)] * 3
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = load(packaged)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    many = load(packaged)
    assert many.classifier._n_threads == 16
    expected = [ask(alone, image)[0] for image in images[:40]]
    assert len({row["label_probability"] for row in expected}) > 30
    assert ask(many, *images) == expected * 3


def test_equally_probable_labels_are_taken_in_the_order_of_the_classes(own: Path) -> None:
    """As everywhere in the pipeline (`metrics.headlines`). Weights of zero make all classes equal."""
    path = own / "state.safetensors"
    places = package._places(path)
    data = bytearray(path.read_bytes())
    for name in ("network.head.layers.1.weight", "network.head.layers.1.bias"):
        start, n_bytes = places[name]
        data[start : start + n_bytes] = bytes(n_bytes)
    path.write_bytes(data)
    (row,) = ask(load(own), encode(draw(1)))
    assert vector(row).tolist() == [pytest.approx(1 / 3)] * 3
    assert [entry["label"] for entry in row["label_top_k"]] == CLASSES
    assert row["label"] == CLASSES[0]


def test_an_error_is_no_reason_to_hide_a_fault(own: Path) -> None:
    """What is wrong with the model, not with an image, is raised."""
    classifier = Classifier(own)
    classifier.about["preprocessing"] = {"resize": 10, "crop": 10}
    with pytest.raises(Exception, match="pixels"):
        list(classifier.probabilities([encode(draw(1))]))
    assert isinstance(next(Classifier(own).probabilities([b""])), UnreadableError)
