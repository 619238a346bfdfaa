"""timm networks as a whole: against timm itself, files that fit and that do not, sizes, training, the package."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refit_workspace import BATCH, MODEL, drawn, encoded_images, holdout, make, probabilities, settings
from safetensors.torch import load_file, save_file
from served_model import CLOSE, ask, load, vector

from pipeline_steps import prepare, refit
from pipeline_steps.errors import PleatError
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.vision.backbones import load_backbone
from pipeline_steps.vision.timm_networks import create, load_network, n_features, preprocessing

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="session")
def whole_file(real_data: Path) -> Path:
    """MobileNetV2 1.0 with the classifier of ImageNet."""
    return real_data / "weights" / "mobilenetv2_100.safetensors"


@pytest.fixture(scope="session")
def headless(real_data: Path) -> Path:
    """MobileNetV2 0.35 without a classifier."""
    return real_data / "weights" / "mobilenetv2_035.nohead.safetensors"


def pixels(n: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def saved(network: torch.nn.Module, path: Path, **changed: torch.Tensor | None) -> Path:
    """The network's tensors as a file; a change is named with __ for a dot, None takes the tensor out."""
    state = network.state_dict() | {name.replace("__", "."): value for name, value in changed.items()}
    save_file({name: value.contiguous().clone() for name, value in state.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("head_on", ["pooled", "logits"])
def test_a_network_is_timms_own_and_a_head(whole_file: Path, head_on: Any) -> None:
    network = load_network("mobilenetv2_100", whole_file, True, 96, head_on, n_outputs=4, hidden=3, dropout=0.5).eval()
    theirs = timm.create_model("mobilenetv2_100", num_classes=1000 if head_on == "logits" else 0).eval()
    theirs.load_state_dict(load_file(whole_file), strict=False)
    linear = [layer for layer in network.head.layers if isinstance(layer, torch.nn.Linear)]
    assert linear[0].weight.shape == (3, 1000 if head_on == "logits" else 1280)
    images = pixels(3, 96)
    with torch.inference_mode():
        features = theirs((images / 255 - MEAN) / STD)
        expected = linear[1](torch.nn.functional.gelu(linear[0](features)))
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(network(images.float()), network(images))


def test_frozen_features_on_logits_are_the_classifiers_answers(whole_file: Path) -> None:
    backbone, seen = load_backbone("mobilenetv2_100", whole_file, "logits")
    theirs = timm.create_model("mobilenetv2_100").eval()
    theirs.load_state_dict(load_file(whole_file), strict=False)
    images = pixels(2, 64)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), theirs((images / 255 - MEAN) / STD), rtol=1e-3, atol=1e-3)
    assert (seen.resize, seen.crop, seen.interpolation) == (256, 224, "bicubic")


def test_another_size_keeps_the_share_that_is_cut_off() -> None:
    seen = preprocessing("mobilenetv2_100", 96)
    assert (seen.resize, seen.crop, seen.interpolation) == (int(96 / 0.875), 96, "bicubic")


@pytest.mark.parametrize("crop_pct", [0.5, 0.9, 1.0])
def test_with_a_share_of_our_own_the_network_sees_what_timm_shows_it(crop_pct: float) -> None:
    """A gradient from left to right; timm's transformation is torchvision's on PIL images, which rounds otherwise."""
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (120, 1, 3))
    image = Image.fromarray(ramp)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    ours = preprocessing("mobilenetv2_100", 64, crop_pct)((encoded.getvalue(), False)).float() / 255
    transformed = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1)
    )(image)
    assert (ours - transformed).abs().max() < 2 / 255


def test_only_the_classifier_of_a_file_may_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = timm.create_model("test_resnet")
    with_26 = saved(
        timm.create_model("test_resnet", num_classes=26), tmp_path / "26.safetensors", **trained_body(trained)
    )
    without = saved(trained, tmp_path / "none.safetensors", fc__weight=None, fc__bias=None)
    with caplog.at_level(logging.WARNING):
        for path in (saved(trained, tmp_path / "whole.safetensors"), with_26, without):
            state = create("test_resnet", path, True, None, "pooled").state_dict()
            assert state.keys() == timm.create_model("test_resnet", num_classes=0).state_dict().keys()
            assert all(torch.equal(value, trained.state_dict()[name]) for name, value in state.items())
    assert not caplog.records
    with pytest.raises(PleatError, match=r"hold no classifier \(fc.weight, fc.bias\), which `head_on: logits` needs"):
        create("test_resnet", without, True, None, "logits")
    with pytest.raises(PleatError, match=r"in another shape fc.weight \(26 x 96 instead of 1000 x 96\), fc.bias \(26 "):
        create("test_resnet", with_26, True, None, "logits")


def trained_body(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".", "__"): value for name, value in network.state_dict().items() if not name.startswith("fc")}


def test_what_does_not_fit_is_named_and_counted(tmp_path: Path, whole_file: Path, headless: Path) -> None:
    changed = {"bn1__weight": None, "bn1__bias": None, "layer1__0__bn1__bias": torch.zeros(3), "more": torch.zeros(2)}
    path = saved(timm.create_model("test_resnet"), tmp_path / "file.safetensors", **changed)
    with pytest.raises(PleatError) as told:
        create("test_resnet", path, True, None, "pooled")
    assert str(told.value) == (
        f"The weights {path} do not fit test_resnet: of the network's tensors the file lacks bn1.weight, bn1.bias; "
        "has in another shape layer1.0.bn1.bias (3 instead of 32); has beyond them more. "
        "Give the file of this network, or name the network that the file is of."
    )
    with pytest.raises(PleatError, match=r"conv_stem.weight \(32 x 3 x 3 x 3 instead of 16 x 3 x 3 x 3\), .* 253 more"):
        create("mobilenetv2_035", whole_file, True, None, "pooled")
    with pytest.raises(PleatError, match=r"lacks cls_token, pos_embed, .* and \d+ more; has beyond them blocks"):
        create("test_vit", headless, True, None, "pooled")


def test_a_file_that_lacks_one_tensor_does_not_leave_random_weights(tmp_path: Path) -> None:
    path = saved(timm.create_model("test_resnet"), tmp_path / "file.safetensors", layer1__0__conv1__weight=None)
    with pytest.raises(PleatError, match=r"the file lacks layer1.0.conv1.weight. Give"):
        create("test_resnet", path, True, None, "pooled")


def test_a_vit_learns_at_another_size_from_the_weights_of_its_own(tmp_path: Path) -> None:
    """Its 10 x 10 positions become 4 x 4; everything else stays."""
    own = timm.create_model("test_vit")
    path = saved(own, tmp_path / "vit.safetensors")
    network = create("test_vit", path, True, 64, "pooled")
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    for name, value in network.state_dict().items():
        if name == "pos_embed":
            assert value.shape == (1, 1 + 4 * 4, 64)
        else:
            assert torch.equal(value, own.state_dict()[name]), name


def test_weights_that_cannot_be_changed_to_another_size_are_told(tmp_path: Path) -> None:
    path = saved(timm.create_model("levit_128s"), tmp_path / "levit.safetensors")
    with pytest.raises(PleatError, match=r"weights of levit_128s are for images of 224 pixels a side and cannot be"):
        create("levit_128s", path, True, 160, "pooled")


@pytest.mark.parametrize(
    ("name", "size", "own"),
    [("vgg11", 16, 224), ("convnext_atto", 8, 224), ("test_vit", 8, 160), ("nest_tiny", 100, 224)],
)
def test_sizes_that_networks_cannot_take(name: str, size: int, own: int) -> None:
    with pytest.raises(PleatError, match=rf"{name} cannot take images of {size} pixels .* Its own size is {own}; set"):
        n_features(name, size, "pooled")


def test_a_vit_does_not_leave_out_the_last_pixels_in_silence() -> None:
    with pytest.raises(PleatError, match=r"65 pixels a side: .* no multiple of the patches of 16"):
        n_features("vit_tiny_patch16_224", 65, "pooled")


def test_networks_that_give_no_vector_or_have_no_classifier() -> None:
    with pytest.raises(PleatError, match=r"mobilenetv5_300m_enc does not give one vector"):
        n_features("mobilenetv5_300m_enc", 64, "pooled")
    with pytest.raises(PleatError, match=r"vit_small_patch14_dinov2 has no classifier of its own, which `head_on: log"):
        n_features("vit_small_patch14_dinov2", None, "logits")


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenetv2_100", 33), ("convnext_atto", 64), ("test_vit", 48), ("test_nfnet", None)]
)
def test_a_scratch_network_has_timms_shape_and_follows_the_seed(name: str, size: int | None) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return load_network(name, None, False, size, "pooled", n_outputs=3, hidden=0, dropout=0.0).state_dict()

    one, same, other = made(1), made(1), made(2)
    body = timm.create_model(name, num_classes=0).state_dict()
    assert {key for key in one if key.startswith("body.")} == {f"body.{key}" for key in body}
    assert all(torch.equal(one[key], same[key]) for key in one)
    weights = [key for key in one if key.endswith("weight") and one[key].std() > 0]
    assert weights
    assert not any(torch.equal(one[key], other[key]) for key in weights)


def models(headless: Path) -> dict[str, dict[str, Any]]:
    return {
        "finetuned": {
            "kind": "finetuned", "backbone": "mobilenetv2_035", "weights": str(headless), "input_size": 48,
            "crop_pct": 0.8,
        },
        "scratch": {"kind": "scratch", "backbone": "test_vit", "input_size": 32},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["finetuned", "scratch"])
def test_a_whole_network_is_prepared_trained_and_packaged(kind: str, headless: Path, tmp_path: Path) -> None:
    """From images to the package, whose answers are those of the pipeline; the whole network has learned."""
    model = models(headless)[kind]
    params = settings(model, **{f"training.{MODEL}.learning_rate": 0.002})
    root = make(tmp_path, params, drawn(24))
    folder = root / "data" / "prepare" / MODEL / BATCH
    about, ids = (json.loads((folder / name).read_text()) for name in ("inputs.json", "sample_ids.json"))
    assert about["kind"] == "pixels"
    assert ("weights_sha256" in about) == (kind == "finetuned")
    size = model["input_size"]
    prepared, crop_pct = np.load(folder / "inputs.npy"), model.get("crop_pct", 0.95)
    assert prepared.shape == (24, 3, size, size)
    assert prepared.dtype == np.uint8
    for row, encoded in enumerate(encoded_images(root, ids)):
        np.testing.assert_array_equal(
            prepared[row], resize_crop(decode(encoded, True), int(size / crop_pct), size, "bicubic")
        )

    refit.run(params, root)
    packaged, rows = root / "data" / "refit" / "package", holdout(root)
    served = np.array([vector(row) for row in ask(load(packaged), *encoded_images(root, rows["sample_id"]))])
    assert np.abs(served - probabilities(rows)).max() <= CLOSE
    assert served.std(axis=0).max() > 0.01, "answers differ from image to image"
    if kind == "finetuned":
        state, start = load_file(packaged / "state.safetensors"), load_file(headless)
        assert not any(torch.equal(state[f"network.body.{key}"], start[key]) for key in start if "conv" in key)


def test_the_inputs_name_what_the_weights_hold(headless: Path, tmp_path: Path) -> None:
    """So that a fold's key changes with the content of the file, not only with its name."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes(headless.read_bytes())
    params = settings(models(file)["finetuned"])
    root = make(tmp_path / "root", params, drawn(12))
    about = root / "data" / "prepare" / MODEL / BATCH / "inputs.json"
    before = json.loads(about.read_text())
    state = load_file(file)
    save_file(state | {"conv_stem.weight": state["conv_stem.weight"] * 2}, file)
    prepare.run(params, MODEL, BATCH, root)
    after = json.loads(about.read_text())
    assert before["sha256"] == after["sha256"]
    assert before["weights_sha256"] != after["weights_sha256"]


def test_a_wrong_model_ends_prepare_with_one_sentence_and_leaves_nothing(
    headless: Path, whole_file: Path, tmp_path: Path
) -> None:
    root = make(tmp_path, settings(), drawn(12))
    for model, sentence in [
        (
            {"kind": "scratch", "backbone": "mobilnetv2_100"},
            r"no model named 'mobilnetv2_100'; near names: .*mobilenetv2",
        ),
        ({"kind": "scratch", "backbone": "vgg11", "input_size": 8}, "vgg11 cannot take images of 8 pixels"),
        (models(whole_file)["finetuned"], "do not fit mobilenetv2_035"),
        (models(headless)["finetuned"] | {"head_on": "logits"}, "hold no classifier"),
        (
            {"kind": "frozen", "backbone": "mobilenetv2_035", "weights": str(headless), "head_on": "logits"},
            "hold no cl",
        ),
    ]:
        before = (root / "data" / "prepare" / MODEL / BATCH / "inputs.npy").stat().st_mtime_ns
        with pytest.raises(PleatError, match=sentence):
            prepare.run(settings(model), MODEL, BATCH, root)
        assert (root / "data" / "prepare" / MODEL / BATCH / "inputs.npy").stat().st_mtime_ns == before
        assert [path.name for path in (root / "data" / "prepare" / MODEL).iterdir()] == [BATCH]
