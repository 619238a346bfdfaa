"""Stage `compress` beyond a small CNN with one target: frozen features, several targets, no holdout."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from refit_workspace import CNN, TRAINING, drawn, encoded_images, folds, make, write_folds
from refit_workspace import settings as refit_settings
from safetensors.torch import save_file
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer
from targets_model import CLASSES as CLASSES_OF_TARGETS
from targets_model import TARGETS

from pipeline_steps import compress, refit
from pipeline_steps.complexity.compress import smaller_input
from pipeline_steps.complexity.compress.refitted import NotPossibleError, Refitted
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json
from pipeline_steps.params import Params
from pipeline_steps.params_compress import SmallerInput
from pipeline_steps.serving.images import decode, resize_crop

pytest_plugins = ["targets_model"]
pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT = {"student": CNN | {"input_size": 16}}
TAUGHT = {"kind": "distilled", "student": "student", "soft_share": 0.5}
BRIEF = {"student": TRAINING | {"max_epochs": 2}}


def compressed(settings: Params, techniques: dict[str, Any], more: dict[str, Any] | None = None) -> Params:
    """The settings with these techniques and a student."""
    document = settings.model_dump()
    document["models"] |= STUDENT | (more or {})
    document["training"] |= BRIEF
    document["compress"] = {"techniques": techniques, "candidate": None}
    return Params.model_validate(document)


def table_of(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "reports" / "compression" / "table.csv").set_index("name")


def answered(root: Path, name: str, side: str = "holdout") -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Rows of a side, and probabilities of each target from the graph of a version alone."""
    rows = folds(root).query("side == @side")
    package = root / "data" / ("refit/package" if name == "refitted" else f"compress/models/{name}/package")
    seen = read_json(package / "about.json")["preprocessing"]
    pixels = np.stack([resize_crop(decode(image, True), **seen).numpy() for image in encoded_images(root, rows.index)])
    session = onnxruntime.InferenceSession(package / "network.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return rows, dict(zip(names, session.run(None, {"pixels": pixels}), strict=True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones of a small timm network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def frozen_settings(weights: Path) -> Params:
    techniques = {
        "int8": {"kind": "int8", "calibration_images": 8},
        "small": {"kind": "smaller_input", "input_size": 48},
        "pruned": {"kind": "pruned", "share": 0.25, "epochs": 1, "batch_size": 8},
        "taught": TAUGHT | {"student": "same"},
        "narrow": {"kind": "fewer_filters", "width": 0.5},
    }
    model = {"kind": "frozen", "backbone": "test_resnet", "weights": str(weights), "input_size": 64}
    document = compressed(refit_settings(model), {}).model_dump()
    document["models"]["same"] = model | {"input_size": 40}
    document["training"]["same"] = TRAINING | {"max_epochs": 2}
    document["compress"]["techniques"] = techniques
    return Params.model_validate(document)


@pytest.fixture(scope="module")
def frozen(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `compress` of a frozen network; tests only read it."""
    params = frozen_settings(weights)
    root = make(tmp_path_factory.mktemp("frozen"), params, drawn())
    refit.run(params, root)
    compress.run(params, root)
    return root


def test_versions_of_a_frozen_network_are_scored_as_they_answer(frozen: Path) -> None:
    table = table_of(frozen)
    for name in ("refitted", "int8", "small", "pruned", "taught"):
        rows, probability = answered(frozen, name)
        classes = read_json(frozen / "data/refit/package/about.json")["classes"]["label"]
        predicted = np.array(classes)[probability["label"].argmax(1)]
        expected = f1_score(rows["label"], predicted, average="weighted", zero_division=0.0)
        assert table["f1_weighted"][name] == pytest.approx(expected, abs=1e-5)
    assert table["not_possible"]["narrow"].startswith("chosen is a timm network, whose narrower versions")
    assert table["input_size"].dropna().to_dict() == {
        "refitted": 64, "int8": 64, "small": 48, "pruned": 64, "taught": 40,
    }  # fmt: skip
    assert table["macs"]["small"] == pytest.approx(table["macs"]["refitted"] * (48 / 64) ** 2, rel=0.1)
    # A quarter of both sides of most layers.
    assert table["macs"]["pruned"] == pytest.approx(table["macs"]["refitted"] * 0.75**2, rel=0.15)


def test_missing_weights_end_the_stage_and_are_no_matter_of_the_size(frozen: Path, tmp_path: Path) -> None:
    smaller = SmallerInput(kind="smaller_input", input_size=48)
    params = frozen_settings(tmp_path / "absent.safetensors")
    with pytest.raises(PleatError, match=r"absent.safetensors of test_resnet does not exist"):
        smaller_input.make(Refitted(params, frozen, tmp_path), "small", smaller, tmp_path)
    root = Path(shutil.copytree(frozen, tmp_path / "workspace"))
    with pytest.raises(PleatError, match=r"absent.safetensors of test_resnet does not exist"):
        compress.run(params, root)


def test_a_version_depends_on_the_bytes_of_its_weights(frozen: Path, weights: Path, tmp_path: Path) -> None:
    """`same` and the refitted model start from them; int8 takes the package alone."""
    copied = Path(shutil.copy(weights, tmp_path / "weights.safetensors"))
    params = frozen_settings(copied)
    refitted, techniques = Refitted(params, frozen, tmp_path), params.compress.techniques

    def keys() -> dict[str, str]:
        return {name: compress._key(refitted, techniques[name], refitted.package) for name in techniques}

    before = keys()
    copied.write_bytes(copied.read_bytes()[:-1] + b"x")
    assert {name for name, key in keys().items() if key != before[name]} == {"small", "taught"}


def test_a_size_that_the_network_cannot_take_is_not_possible(frozen: Path, tmp_path: Path) -> None:
    path = tmp_path / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    model = {"kind": "frozen", "backbone": "test_vit", "weights": str(path)}
    params = refit_settings(model)
    with pytest.raises(NotPossibleError, match="test_vit cannot take images of 49 pixels a side"):
        smaller_input.make(
            Refitted(params, frozen, tmp_path), "odd", SmallerInput(kind="smaller_input", input_size=49), tmp_path
        )


def test_versions_of_several_targets_keep_thresholds_and_are_scored_by_each(done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "workspace"))
    techniques = {"int8": {"kind": "int8", "calibration_images": 16}, "taught": TAUGHT}
    params = compressed(refit_settings(targets=TARGETS), techniques)
    compress.run(params, root)
    table, refitted = table_of(root), read_json(root / "data/refit/package/about.json")
    for name in ("refitted", *techniques):
        rows, probability = answered(root, name)
        scores = {}
        for target in ("garment", "colour"):
            predicted = np.array(CLASSES_OF_TARGETS[target])[probability[target].argmax(1)]
            scores[target] = f1_score(rows[target], predicted, average="weighted", zero_division=0.0)
        truth = MultiLabelBinarizer(classes=CLASSES_OF_TARGETS["tags"]).fit_transform(
            rows[["colour", "garment"]].to_numpy()
        )
        reached = probability["tags"] >= np.array(refitted["thresholds"]["tags"])
        scores["tags"] = f1_score(truth, reached, average="weighted", zero_division=0.0)
        assert table["f1_weighted"][name] == pytest.approx(np.mean(list(scores.values())), abs=1e-5)
        if name == "refitted":
            continue
        about = read_json(root / "data/compress/models" / name / "metrics.json")
        assert {target: one["f1_weighted"] for target, one in about["targets"].items()} == pytest.approx(scores)
        travels = read_json(root / "data/compress/models" / name / "package" / "about.json")
        assert travels["thresholds"] == refitted["thresholds"]
        assert travels["classes"] == refitted["classes"]


def test_without_a_holdout_versions_are_made_and_timed_but_not_scored(tmp_path: Path) -> None:
    techniques = {"int8": {"kind": "int8", "calibration_images": 8}, "narrow": {"kind": "fewer_filters", "width": 0.5}}
    params = compressed(refit_settings(**{"split.holdout.fraction": 0.0}), techniques)
    root = make(tmp_path, params, drawn(24))
    write_folds(root, lambda rows: rows.assign(side="train", fold=np.arange(len(rows)) % 3))
    refit.run(params, root)
    compress.run(params, root)
    table = table_of(root)
    assert table[["f1_weighted", "f1_change"]].isna().all(axis=None)
    assert (table["latency_1_ms"] > 0).all()
    page = (root / "reports/compression/index.html").read_text()
    assert "There is no holdout" in page
    assert "images of the holdout, with" not in page
    assert not (root / "reports/compression/quality_against_cost.png").exists()
    assert "f1_weighted" not in read_json(root / "data/compress/models/int8/metrics.json")
