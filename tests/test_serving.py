"""A packaged model: every form of input, every kind of image, what is refused, and whose probabilities it gives."""

import base64
import io
import os
import pickle
import pickletools
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import content, draw, encode
from PIL import Image
from refit_workspace import CLASSES, CNN, EPOCHS, encoded_images, holdout, probabilities
from refit_workspace import settings as params
from safetensors.torch import load_file
from test_images import CLEAR_FIRST, ORIENTATION, PALETTE, STORED, hand_made_png, png_chunk

from pipeline_steps import package
from pipeline_steps.registry import Registry
from pipeline_steps.serving.classifier import Classifier, UnreadableError
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.serving.pyfunc import ImageModel
from pipeline_steps.serving.upright import is_plain_jpeg, open_image
from pipeline_steps.vision.networks import CustomCnn

CLOSE = 1e-4
COLUMNS = ["label", "label_probability", "label_top_k", "error"]


@pytest.fixture(scope="module")
def packaged(refitted: Path) -> Path:
    return refitted / "data" / "refit" / "package"


@pytest.fixture(scope="module")
def model(packaged: Path) -> ImageModel:
    return load(packaged)


@pytest.fixture
def own(packaged: Path, tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    return Path(shutil.copytree(packaged, tmp_path / "package"))


def load(folder: Path) -> ImageModel:
    loaded = ImageModel()
    loaded.load_context(SimpleNamespace(artifacts={"package": str(folder)}))
    return loaded


def ask(model: ImageModel, *images: Any, **more: Any) -> list[dict[str, Any]]:
    """The model's rows."""
    answers = model.predict(None, pd.DataFrame({"image": pd.Series(images, dtype=object)}), more or None)
    assert list(answers) == COLUMNS
    return answers.to_dict("records")


def vector(row: dict[str, Any], classes: list[str] = CLASSES) -> np.ndarray:
    """A row's probabilities in the order of the classes."""
    assert row["error"] is None
    listed = {entry["label"]: entry["probability"] for entry in row["label_top_k"]}
    assert sorted(listed) == sorted(classes)
    return np.array([listed[name] for name in classes])


def check_row(row: dict[str, Any]) -> None:
    """An answer is consistent in itself."""
    ranked = [entry["probability"] for entry in row["label_top_k"]]
    assert ranked == sorted(ranked, reverse=True)
    assert sum(ranked) == pytest.approx(1, abs=1e-5)
    assert (row["label"], row["label_probability"]) == tuple(row["label_top_k"][0].values())


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


def rebuilt(packaged: Path) -> package.Answering:
    """The network from the code that trained it and the package's weights."""
    blocks = [tuple(block.values()) for block in CNN["blocks"]]
    network = package.Answering(CustomCnn(blocks, len(CLASSES), hidden=0, dropout=0.1), mirror=True)
    network.load_state_dict(load_file(packaged / "state.safetensors"), strict=True)
    return network


def test_answers_are_those_of_torch_and_of_the_pipelines_own_evaluation(
    refitted: Path, packaged: Path, model: ImageModel
) -> None:
    rows = holdout(refitted)
    images = encoded_images(refitted, rows["sample_id"])
    answered = ask(model, *images)
    served = np.array([vector(row) for row in answered])
    assert np.abs(served - probabilities(rows)).max() <= CLOSE
    assert [row["label"] for row in answered] == [CLASSES[code] for code in probabilities(rows).argmax(1)]
    assert served.std(axis=0).min() > 0.01, "answers differ from image to image"
    pixels = torch.stack([resize_crop(decode(image, True), 32, 32) for image in images])
    with torch.inference_mode():
        np.testing.assert_allclose(served, rebuilt(packaged)(pixels), atol=1e-5)
        plain = rebuilt(packaged).network(pixels).softmax(1)
    assert np.abs(served - plain.numpy()).max() > CLOSE, "both views count"


def test_batches_of_any_size_give_the_same_answers(refitted: Path, packaged: Path) -> None:
    session = onnxruntime.InferenceSession(packaged / "network.onnx", providers=["CPUExecutionProvider"])
    pixels = np.load(refitted / "data/prepare/chosen/batch/inputs.npy")
    alone = np.concatenate([session.run(None, {"pixels": row[None]})[0] for row in pixels])
    for size in (2, 7, 32, 48):
        together = [session.run(None, {"pixels": pixels[at : at + size]})[0] for at in range(0, len(pixels), size)]
        np.testing.assert_allclose(np.concatenate(together), alone, atol=1e-6)


def test_weights_lie_in_safetensors_and_nowhere_else(packaged: Path, own: Path) -> None:
    state = rebuilt(packaged).state_dict()  # strict: exactly the network's names and shapes
    assert sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()) > 1000
    graph = onnx.load(str(packaged / "network.onnx"), load_external_data=False).graph
    weights = {item.name: item for item in graph.initializer if item.name in state}
    assert {name for name in weights if "weight" in name} == {name for name in state if "weight" in name}
    for item in graph.initializer:
        assert item.name in weights
        assert not item.raw_data
        assert not item.float_data
        assert {entry.key: entry.value for entry in item.external_data}["location"] == "state.safetensors"
    embedded = (packaged / "network.onnx").read_bytes()
    for name, tensor in state.items():
        if tensor.numel() > 4:
            assert tensor.numpy().tobytes() not in embedded, name
    image, before = encode(draw(1)), vector(ask(load(own), encode(draw(1)))[0])
    original = (own / "state.safetensors").read_bytes()
    for name in weights:
        start, n_bytes = package._places(own / "state.safetensors")[name]
        changed = bytearray(original)
        changed[start : start + n_bytes] = (2 * state[name] + 1).numpy().tobytes()
        (own / "state.safetensors").write_bytes(changed)
        assert np.abs(vector(ask(load(own), image)[0]) - before).max() > 1e-7, name


def test_a_graph_that_differs_from_the_network_is_not_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = package.Answering(CustomCnn([(8, 3, 2)], 3, hidden=0, dropout=0.0), mirror=False)
    original = package._exported

    def exported(*arguments: Any) -> bytes:
        graph = original(*arguments)
        with torch.no_grad():
            network.network.head.layers[1].bias += 1
        return graph

    monkeypatch.setattr(package, "_exported", exported)
    about = {"classes": {"label": list("abc")}, "preprocessing": {}, "max_pixels": 1}
    with pytest.raises(RuntimeError, match=r"other values than the network for network.head.layers.1.bias"):
        package.write(tmp_path, network, 32, about, b"")


def is_pickle(data: bytes) -> bool:
    """Whether these bytes are a pickle of any protocol, or an archive that holds one, as torch.save writes."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(is_pickle(archive.read(name)) for name in archive.namelist())
    try:
        return bool(list(pickletools.genops(data)))
    except Exception:  # whatever a parser says of other files
        return False


def test_no_pickle_is_in_the_package_nor_in_what_mlflow_saves(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: dict[str, Callable[[Any], bytes]] = {"pickle": pickle.dumps, "old": lambda item: pickle.dumps(item, 0)}
    for dumps in checks.values():
        assert is_pickle(dumps({"weights": [1.0]}))
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    assert is_pickle(buffer.getvalue())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as it is where nobody says otherwise
    for name in [name for name in sys.modules if name.startswith("pleat_model_")]:
        monkeypatch.delitem(sys.modules, name)
    before = content(packaged)
    saved = Registry("model").save(packaged, tmp_path / "model")
    assert content(packaged) == before, "a stage must not change another one's output"
    files = content(saved)
    assert {f"artifacts/package/{name}" for name in before} <= files.keys()
    for name, data in (before | files).items():
        assert not is_pickle(data), name
        assert Path(name).suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib", ".pyc"), name


def test_what_travels_in_the_mlflow_model(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    saved = Registry("model").save(packaged, tmp_path / "model")
    assert (saved / "requirements.txt").read_text().split() == (packaged / "requirements.txt").read_text().split()
    for line in (packaged / "requirements.txt").read_text().split():
        assert "==" in line
        assert "+" not in line, "no index has a local version"
    flavor = mlflow.models.Model.load(saved).flavors["python_function"]
    assert Path(flavor["model_code_path"]).name == "model.py"
    assert "python_model" not in flavor
    signature = mlflow.models.Model.load(saved).signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == COLUMNS
    assert [param.name for param in signature.params] == ["top_k"]
    assert (saved / "input_example.json").stat().st_size < 100_000
    loaded = mlflow.pyfunc.load_model(str(saved))
    example = loaded.input_example
    expected = ask(load(packaged), (packaged / "example.jpg").read_bytes(), top_k=2)
    (found,) = loaded.predict(example, params={"top_k": 2}).to_dict("records")
    assert found == expected[0]
    numpy_column = pd.DataFrame({"image": [np.array(draw(1)), encode(draw(1), "PNG"), np.array(draw(1)).tolist()]})
    one, two, three = (vector(row) for row in loaded.predict(numpy_column).to_dict("records"))
    assert one.tolist() == two.tolist() == three.tolist()


def test_about_names_what_the_model_needs_to_be_used_right(refitted: Path, packaged: Path) -> None:
    about = Classifier(packaged).about
    assert about["classes"] == {"label": CLASSES}
    assert about["preprocessing"] == {"resize": 32, "crop": 32, "interpolation": "bilinear"}
    assert about["max_pixels"] == params().ingest.max_pixels
    assert about["model"] == "chosen"
    assert about["data_version"] == "batch=unversioned"
    state = load_file(packaged / "state.safetensors")
    np.testing.assert_allclose(state["network.pixel_mean"].flatten() / 255, [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(state["network.pixel_std"].flatten() / 255, [0.229, 0.224, 0.225], rtol=1e-6)
    assert (packaged / "example.jpg").read_bytes() in encoded_images(refitted, holdout(refitted)["sample_id"])
    assert EPOCHS == 3


def test_a_frozen_backbone_answers_real_photos_as_the_pipeline_does(refitted_on_photos: Path, tmp_path: Path) -> None:
    packaged, rows = refitted_on_photos / "data" / "refit" / "package", holdout(refitted_on_photos)
    model, images = load(packaged), encoded_images(refitted_on_photos, rows["sample_id"])
    classes = model.classifier.classes["label"]
    assert classes == ["Dress", "Pants", "Shoes"]
    answered = ask(model, *images)
    served = np.array([vector(row, classes) for row in answered])
    assert np.abs(served - probabilities(rows)).max() <= CLOSE
    assert served.std(axis=0).min() > 0.1
    assert np.mean([row["label"] for row in answered] == rows["label"]) > 0.6, "three easy classes"
    assert model.classifier.about["preprocessing"] == {"resize": 256, "crop": 224, "interpolation": "bicubic"}

    encoded = images[0]
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded)
    with open_image(encoded) as image:
        pixels = decode(encoded, is_plain_jpeg(image)).permute(1, 2, 0).numpy()
    same = ask(model, encoded, base64.b64encode(encoded).decode(), str(path), pixels, pixels.tolist())
    assert same == [answered[0]] * 5
    grey = np.array(Image.open(path).convert("L"))
    one, two = ask(model, grey, encode(Image.fromarray(grey), "PNG"))
    assert one == two
    assert vector(one, classes) != pytest.approx(vector(answered[0], classes))


def test_a_frozen_package_holds_backbone_and_head(real_data: Path, refitted_on_photos: Path) -> None:
    packaged = refitted_on_photos / "data" / "refit" / "package"
    state = load_file(packaged / "state.safetensors")
    weights = load_file(real_data / "weights" / "mobilenetv2_100.safetensors")
    named = {f"network.backbone.network.{name}": tensor for name, tensor in weights.items()}
    inside = {name: tensor for name, tensor in named.items() if "classifier" not in name}
    assert all(torch.equal(state[name], tensor) for name, tensor in inside.items())
    rest = state.keys() - inside.keys() - {name for name in state if name.endswith("num_batches_tracked")}
    head = [f"network.head.{name}" for name in ("mean", "std", "layers.1.weight", "layers.1.bias")]
    assert rest == {"network.backbone.mean", "network.backbone.std", *head}
    assert (packaged / "network.onnx").stat().st_size < 0.03 * (packaged / "state.safetensors").stat().st_size


def test_an_error_is_no_reason_to_hide_a_fault(own: Path) -> None:
    """What is wrong with the model, not with an image, is raised."""
    classifier = Classifier(own)
    classifier.about["preprocessing"] = {"resize": 10, "crop": 10}
    with pytest.raises(Exception, match="pixels"):
        list(classifier.probabilities([encode(draw(1))]))
    assert isinstance(next(Classifier(own).probabilities([b""])), UnreadableError)
