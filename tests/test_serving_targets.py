"""A package of two multiclass targets and a multilabel one: served, in a fresh process, by `predict`, in the gate."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from refit_workspace import TAGS, TARGETS, encoded_images, frozen, holdout, make, probabilities
from refit_workspace import settings as params
from served_model import CLOSE, load
from targets_model import CLASSES, SETTINGS, answers, reaching, served

from pipeline_steps import isolated, predict, refit, register
from pipeline_steps.files import read_json, write_json
from pipeline_steps.registry import Registry

pytest_plugins = ["targets_model"]


@pytest.fixture(scope="module")
def packaged(done: Path) -> Path:
    return done / "data" / "refit" / "package"


@pytest.fixture(scope="module")
def images(done: Path) -> list[bytes]:
    """Of the holdout."""
    return encoded_images(done, holdout(done, "tags")["sample_id"])


@pytest.fixture(scope="module")
def saved(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLflow model of the package."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        return Registry("model").save(packaged, folder / "model")


def test_served_probabilities_are_the_pipelines(done: Path, packaged: Path, images: list[bytes]) -> None:
    rows = answers(load(packaged), images, top_k=9)
    for target, names in CLASSES.items():
        expected = probabilities(holdout(done, target))
        assert np.abs(served(rows, target) - expected).max() <= CLOSE
        assert expected.std(axis=0).min() > 0.01, "answers differ from image to image"
        if target == "tags":
            continue
        assert [row[target] for row in rows] == [names[code] for code in expected.argmax(axis=1)]
        assert [row[f"{target}_probability"] for row in rows] == pytest.approx(expected.max(axis=1), abs=CLOSE)


def test_a_frozen_backbone_answers_real_photos_in_every_target(real_data: Path, tmp_path: Path) -> None:
    """Dresses and shoes in three colours, 16 photos of each."""
    photos = {
        f"{colour} {garment} {path.stem}": (f"{colour}_{garment}", path.read_bytes())
        for colour in ("black", "red", "white")
        for garment in ("dress", "shoes")
        for path in sorted((real_data / "data" / "apparel" / f"{colour}_{garment}").iterdir())[:16]
    }
    settings = params(frozen(real_data) | {"input_size": 160, "crop_pct": 1.0}, targets=TARGETS)
    make(tmp_path, settings, photos)
    refit.run(settings, tmp_path)
    tables = {target: holdout(tmp_path, target) for target in TARGETS}
    model = load(tmp_path / "data" / "refit" / "package")
    assert model.classifier.about["preprocessing"] == {"resize": 160, "crop": 160, "interpolation": "bicubic"}
    rows = answers(model, encoded_images(tmp_path, tables["tags"]["sample_id"]), top_k=9)
    for target, table in tables.items():
        listed = [{entry["label"]: entry["probability"] for entry in row[f"{target}_top_k"]} for row in rows]
        found = pd.DataFrame(listed)[model.classifier.classes[target]].to_numpy()
        assert np.abs(found - probabilities(table)).max() <= CLOSE
    for target in ("garment", "colour"):
        assert np.mean([row[target] for row in rows] == tables[target]["label"]) > 0.7, "easy classes"
    both = np.mean([row["tags"] == list(labels) for row, labels in zip(rows, tables["tags"]["label"], strict=True)])
    assert both > 0.4, "both labels and no other"


def test_a_multilabel_target_lists_every_label_that_reaches_its_threshold(
    packaged: Path, images: list[bytes], tmp_path: Path
) -> None:
    """With limits amid the probabilities, one for each class, and with those that give all labels or none."""
    own = Path(shutil.copytree(packaged, tmp_path / "package"))
    found = served(answers(load(own), images, top_k=9), "tags")
    chosen = np.median(found, axis=0).tolist()
    for limits in ([0.5] * 5, chosen, [2.0] * 5, [0.0] * 5):
        about = json.loads((own / "about.json").read_text())
        write_json(own / "about.json", about | {"thresholds": {"tags": limits}})
        rows = answers(load(own), images, top_k=1)
        expected = [reaching(row, TAGS, limits) for row in found]
        assert [row["tags"] for row in rows] == expected
        for row, values in zip(rows, found, strict=True):
            listed = dict(zip(row["tags"], row["tags_probability"], strict=True))
            assert listed == {name: pytest.approx(values[TAGS.index(name)]) for name in row["tags"]}
            assert row["tags_top_k"] == [{"label": TAGS[values.argmax()], "probability": pytest.approx(values.max())}]
    assert len({tuple(reaching(row, TAGS, chosen)) for row in found}) > 3, "else the limits show little"


def test_what_cannot_be_read_has_no_answer_in_any_target(packaged: Path, images: list[bytes]) -> None:
    good, bad = answers(load(packaged), [images[0], b"no image"])
    columns = [f"{target}{end}" for target in sorted(TARGETS) for end in ("", "_probability", "_top_k")]
    assert list(good) == list(bad) == [*columns, "error"]
    assert {name for name, cell in bad.items() if cell is not None} == {"error"}


def test_in_a_fresh_process_the_answers_are_the_same(
    done: Path, saved: Path, images: list[bytes], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    with isolated.start(isolated.requirements_of(saved)) as model:
        model.load(saved)
        rows = model.answers(paths, top_k=9)
    for target in TARGETS:
        assert np.abs(served(rows, target) - probabilities(holdout(done, target))).max() <= CLOSE
    limits = read_json(done / "data" / "refit" / "package" / "about.json")["thresholds"]["tags"]
    expected = [reaching(row, TAGS, limits) for row in probabilities(holdout(done, "tags"))]
    assert [row["tags"] for row in rows] == expected


def test_the_signature_says_what_is_a_list(saved: Path) -> None:
    outputs = {column["name"]: column for column in mlflow.models.Model.load(saved).signature.outputs.to_dict()}
    one = {"colour": "string", "colour_probability": "double", "garment": "string", "garment_probability": "double"}
    assert {name: outputs[name]["type"] for name in one} == one
    for name, kind in (("tags", "string"), ("tags_probability", "double")):
        assert (outputs[name]["type"], outputs[name]["items"]["type"]) == ("array", kind)
    for target in TARGETS:
        assert outputs[f"{target}_top_k"]["items"]["properties"].keys() == {"label", "probability"}


def test_predict_writes_a_column_for_each_target_with_lists_as_lists(
    done: Path, saved: Path, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_fetch", lambda *_: ("3", saved))
    (tmp_path / "in").mkdir()
    for number, image in enumerate([*images, b"no image"]):
        (tmp_path / "in" / f"{number:02}.jpg").write_bytes(image)
    predict.predict(SETTINGS, ["in"], "out.parquet", top_k=9, root=tmp_path)
    schema = pq.read_schema(tmp_path / "out.parquet")
    ranked = "list<element: struct<label: string, probability: double>>"
    kinds = {"": "string", "_probability": "double", "_top_k": ranked}
    lists = {"": "list<element: string>", "_probability": "list<element: double>", "_top_k": ranked}
    expected = {
        f"{target}{end}": kind
        for target in sorted(TARGETS)
        for end, kind in (lists if target == "tags" else kinds).items()
    }
    own = dict.fromkeys(("error", "model_version"), "string")
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {"path": "string", **expected, **own}
    *good, bad = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {name for name, cell in bad.items() if cell is not None} == {"path", "error", "model_version"}
    for target in TARGETS:
        assert np.abs(served(good, target) - probabilities(holdout(done, target))).max() <= CLOSE
    limits = read_json(done / "data" / "refit" / "package" / "about.json")["thresholds"]["tags"]
    for row, values in zip(good, probabilities(holdout(done, "tags")), strict=True):
        assert row["tags"] == reaching(values, TAGS, limits)
        assert len(row["tags_probability"]) == len(row["tags"])


def test_the_gate_scores_the_package_as_refit_did(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    root = Path(shutil.copytree(done, tmp_path / "workspace"))
    floors = {"promotion.floors.f1_weighted": 0.0, "promotion.floors.f1_macro": 0.0}
    settings = params(targets=TARGETS, **floors, **{"promotion.mode": "dry_run"})
    outcome = register.run(settings, root)
    found = read_json(done / "data" / "refit" / "metrics.json")
    assert outcome.decision == "promoted"
    assert outcome.evidence["candidate"]["f1_weighted"] == pytest.approx(found["f1_weighted"])
    assert outcome.evidence["candidate"]["f1_macro"] == pytest.approx(found["f1_macro"])
    for target, scores in found["targets"].items():
        judged = outcome.evidence["targets"][target]
        assert judged["candidate"]["f1_weighted"] == pytest.approx(scores["f1_weighted"])
        assert list(judged["classes"]) == CLASSES[target]
    assert outcome.evidence["targets"]["tags"]["classes"]["hat"]["support"] == 9
    page = (root / "reports" / "registration" / "index.html").read_text()
    for heading in ("Targets", *(f"Recall of each class of {target}" for target in TARGETS)):
        assert f"<h2>{heading}</h2>" in page
