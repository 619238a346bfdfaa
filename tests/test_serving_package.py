"""A packaged model: whose probabilities it gives, and what is in it."""

import base64
import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
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
from served_model import CLOSE, COLUMNS, ask, load, vector

from pipeline_steps import package
from pipeline_steps.registry import Registry
from pipeline_steps.serving.classifier import Classifier
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.serving.pyfunc import ImageModel
from pipeline_steps.serving.upright import is_plain_jpeg, open_image
from pipeline_steps.targets import Target
from pipeline_steps.vision.networks import CustomCnn

pytest_plugins = ["served_model"]

LABEL = Target("label", False, ["label"], CLASSES)


def rebuilt(packaged: Path) -> package.Answering:
    """The network from the code that trained it and the package's weights."""
    blocks = [tuple(block.values()) for block in CNN["blocks"]]
    network = package.Answering(CustomCnn(blocks, len(CLASSES), hidden=0, dropout=0.1), [LABEL], mirror=True)
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
        np.testing.assert_allclose(served, rebuilt(packaged)(pixels)[0], atol=1e-5)
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
    network = package.Answering(CustomCnn([(8, 3, 2)], 3, hidden=0, dropout=0.0), [LABEL], mirror=False)
    original = package._exported

    def exported(*arguments: Any) -> bytes:
        graph = original(*arguments)
        with torch.no_grad():
            network.network.head.layers[1].bias += 1
        return graph

    monkeypatch.setattr(package, "_exported", exported)
    with pytest.raises(RuntimeError, match=r"other values than the network for network.head.layers.1.bias"):
        package.write(tmp_path, network, 32, {"preprocessing": {}, "max_pixels": 1}, b"")


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
    assert about.keys() == {"classes", "data_version", "max_pixels", "model", "preprocessing"}
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
