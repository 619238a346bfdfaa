"""Stage `prepare`: frozen features and pixels, against torch and Pillow; weights that cannot be had."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import timm
import torch
from conftest import draw, encode, load_params, names, pleat, write_batch, write_params
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline_steps import ingest, prepare
from pipeline_steps.errors import PleatError
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.vision.backbones import extract, load_backbone
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.weights import check_weights

N_IMAGES = 12


def frozen(weights: Path | str | None) -> dict:
    return {
        "experiment.batches": ["batch"],
        "models.cnn_small": {"kind": "frozen", "backbone": "mobilenetv2_100", "weights": weights and str(weights)},
    }


@pytest.fixture
def ingested(root: Path) -> Path:
    """A workspace with one ingested batch of differently shaped images, one of them a PNG."""
    sizes = [(60 + 7 * number, 90 - 3 * number) for number in range(N_IMAGES)]
    files = {f"{number}.jpg": encode(draw(number, *size), quality=90) for number, size in enumerate(sizes)}
    files["3.jpg"] = encode(draw(3, 70, 80), "PNG")
    write_batch(root, "batch", {str(number): f"class {number % 2}" for number in range(N_IMAGES)}, files)
    ingest.run(load_params({"experiment.batches": ["batch"]}), "batch", root)
    return root


def packed(root: Path) -> pd.DataFrame:
    with pa.memory_map(str(root / "data/ingest/batch/images.arrow")) as source:
        return pa.ipc.open_file(source).read_pandas()


@pytest.fixture(scope="session")
def weights_file(real_data: Path) -> Path:
    return real_data / "weights" / "mobilenetv2_100.safetensors"


@pytest.mark.parametrize(
    ("own", "resize", "crop"),
    [({}, 256, 224), ({"input_size": 96}, 109, 96), ({"input_size": 96, "crop_pct": 1.0}, 96, 96)],
)
def test_features_are_those_of_timm_for_both_views(
    own: dict, resize: int, crop: int, ingested: Path, weights_file: Path
) -> None:
    wanted = frozen(weights_file)
    wanted["models.cnn_small"] |= own
    prepare.run(load_params(wanted), "cnn_small", "batch", ingested)
    folder = ingested / "data/prepare/cnn_small/batch"
    features = np.load(folder / "inputs.npy")
    rows = packed(ingested)
    assert json.loads((folder / "sample_ids.json").read_text()) == rows["sample_id"].tolist()
    assert features.shape == (N_IMAGES, 2, 1280)
    assert features.dtype == np.float32

    network = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    state = {name: value for name, value in load_file(weights_file).items() if not name.startswith("classifier")}
    network.load_state_dict(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for row, (encoded, plain) in enumerate(zip(rows["bytes"], rows["plain_jpeg"], strict=True)):
        pixels = resize_crop(decode(encoded, plain), resize, crop, "bicubic").float() / 255
        normal = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        with torch.inference_mode():
            expected = network(torch.stack([normal, normal.flip(2)]))
        np.testing.assert_allclose(features[row], expected, rtol=1e-3, atol=1e-4)


def test_resizing_agrees_with_pillow() -> None:
    for seed, size in enumerate([(300, 400), (533, 300), (224, 224), (90, 700)]):
        image = draw(seed, *size)
        ours = resize_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1), 256, 224, "bicubic")
        scale = 256 / min(size)
        width, height = (round(side * scale) for side in size)
        left, top = (width - 224) // 2, (height - 224) // 2
        theirs = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.array(theirs).astype(int))
        assert difference.mean() < 1.5, size


def test_a_very_long_image_is_not_blown_up() -> None:
    """16 x 200,000 pixels resized whole to a shorter side of 256 would be 2.5 GB."""
    assert resize_crop(torch.zeros(3, 16, 200_000, dtype=torch.uint8), 256, 224).shape == (3, 224, 224)


def test_a_frozen_backbone_does_not_change_by_one_bit(ingested: Path, weights_file: Path) -> None:
    """Neither by extraction nor when a head is trained on it; buffers too, running means and counts of batches."""
    backbone, preprocessing = load_backbone("mobilenetv2_100", weights_file)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert sum("running_mean" in name or "num_batches_tracked" in name for name in before) == 2 * 52
    assert all(
        torch.equal(before[f"network.{name}"], tensor)
        for name, tensor in load_file(weights_file).items()
        if not name.startswith("classifier")
    )
    rows = packed(ingested)
    features = np.stack(list(extract(backbone, preprocessing, zip(rows["bytes"], rows["plain_jpeg"], strict=True))))
    head = Head(1280, 2, hidden=0, dropout=0.0)
    whole = torch.nn.Sequential(backbone, head)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for inputs, network in ((torch.from_numpy(features[:, 0]), head), (torch.zeros(2, 3, 32, 32), whole)):
        start = head.layers[1].weight.detach().clone()
        optimizer.zero_grad()
        network(inputs)[:, 0].sum().backward()
        optimizer.step()
        assert not torch.equal(head.layers[1].weight, start)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_pixels_are_the_resized_images(ingested: Path) -> None:
    prepare.run(load_params({"experiment.batches": ["batch"]}), "cnn_tiny", "batch", ingested)
    folder = ingested / "data/prepare/cnn_tiny/batch"
    pixels, rows = np.load(folder / "inputs.npy"), packed(ingested)
    assert pixels.shape == (N_IMAGES, 3, 32, 32)
    assert pixels.dtype == np.uint8
    for row, (encoded, plain) in enumerate(zip(rows["bytes"], rows["plain_jpeg"], strict=True)):
        np.testing.assert_array_equal(pixels[row], resize_crop(decode(encoded, plain), 32, 32))
    about = json.loads((folder / "inputs.json").read_text())
    assert about["sha256"] == hashlib.sha256((folder / "inputs.npy").read_bytes()).hexdigest()


def test_every_image_arrives_however_many_there_are(ingested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "IMAGES_A_CHUNK", 5)  # 12 images: two full chunks and a part
    prepare.run(load_params({"experiment.batches": ["batch"]}), "cnn_tiny", "batch", ingested)
    pixels, rows = np.load(ingested / "data/prepare/cnn_tiny/batch/inputs.npy"), packed(ingested)
    expected = [resize_crop(decode(*row), 32, 32) for row in zip(rows["bytes"], rows["plain_jpeg"], strict=True)]
    np.testing.assert_array_equal(pixels, torch.stack(expected))


def test_a_full_disk_leaves_nothing_behind(ingested: Path, small_disk: Path) -> None:
    shutil.copytree(ingested / "data" / "ingest", small_disk / "data" / "ingest")
    settings = load_params({"experiment.batches": ["batch"], "models.cnn_small.input_size": 224})
    with pytest.raises(PleatError, match=r"Could not write .*No space left on device.*nothing was left behind"):
        prepare.run(settings, "cnn_small", "batch", small_disk)
    assert names(small_disk / "data" / "prepare" / "cnn_small") == []


def test_without_network_and_file_the_error_names_both_ways(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(root / "no cache"))
    write_params(root, frozen(None))
    write_batch(root, "batch", {"a": "Hat"}, {"a.jpg": encode(draw(0))})
    done = pleat(root, "ingest", "batch")  # the first stage already says so, before any long work
    assert done.returncode == 1
    assert done.stderr.startswith("pleat: The weights of mobilenetv2_100 are not on this machine")
    assert "connect to the network" in done.stderr
    assert "weights: FILE" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (root / "data" / "ingest").exists()


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match=r"weights file .*absent.safetensors of mobilenetv2_100 does not exist"):
        check_weights("mobilenetv2_100", tmp_path / "absent.safetensors")
    (tmp_path / "pickled.pth").write_bytes(b"")
    with pytest.raises(PleatError, match=r"not a .safetensors file; other kinds can run code"):
        check_weights("mobilenetv2_100", tmp_path / "pickled.pth")
    save_file({"conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(PleatError, match=r"do not fit mobilenetv2_100: .*conv_stem.weight"):
        load_backbone("mobilenetv2_100", tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(PleatError, match=r"cannot be read as safetensors"):
        load_backbone("mobilenetv2_100", tmp_path / "broken.safetensors")
    with pytest.raises(PleatError, match=r"no model named 'mobilnetv2_100'; near names: .*mobilenetv2_100"):
        load_backbone("mobilnetv2_100", tmp_path / "other.safetensors")
