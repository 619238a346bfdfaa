"""Two multiclass targets and a multilabel one from refit to the gate: each is scored, packaged, served and judged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from refit_workspace import (
    COLOURS,
    GARMENTS,
    TAGS,
    TARGETS,
    drawn_with_targets,
    encoded_images,
    folds,
    holdout,
    make,
    probabilities,
    write_folds,
)
from refit_workspace import settings as params
from served_model import CLOSE, load
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from sklearn.preprocessing import MultiLabelBinarizer
from test_refit import Page

from pipeline_steps import isolated, predict, refit, register
from pipeline_steps.files import read_json, write_json
from pipeline_steps.registry import Registry
from pipeline_steps.serving.pyfunc import ImageModel

CLASSES = {"garment": sorted(GARMENTS), "tags": TAGS, "colour": sorted(COLOURS)}
SETTINGS = params(targets=TARGETS)
HEADLINES = ["f1_weighted", "f1_macro", "accuracy", "roc_auc_macro"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace before `refit`."""
    return make(tmp_path_factory.mktemp("prepared"), SETTINGS, drawn_with_targets())


@pytest.fixture(scope="module")
def done(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `refit`; tests only read it."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("done") / "workspace"))
    refit.run(SETTINGS, root)
    return root


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


def answers(model: ImageModel, images: list[bytes], **more: Any) -> list[dict[str, Any]]:
    """The model's rows."""
    frame = pd.DataFrame({"image": pd.Series(images, dtype=object)})
    return model.predict(None, frame, more or None).to_dict("records")


def served(rows: list[dict[str, Any]], target: str) -> np.ndarray:
    """Probabilities in the order of the classes, from rows that list all labels."""
    found = [{entry["label"]: entry["probability"] for entry in row[f"{target}_top_k"]} for row in rows]
    return np.array([[row[name] for name in CLASSES[target]] for row in found])


def reaching(row: np.ndarray, names: list[str], limits: list[float]) -> list[str]:
    return [name for name, value, limit in zip(names, row, limits, strict=True) if value >= limit]


def indicator(labels: pd.Series) -> np.ndarray:
    return MultiLabelBinarizer(classes=TAGS).fit_transform(labels)


def test_the_holdout_has_a_table_for_each_target(done: Path) -> None:
    samples = folds(done)
    rows = {target: holdout(done, target) for target in TARGETS}
    for target, table in rows.items():
        assert list(table) == ["sample_id", "batch", "label", "group", *(f"p:{name}" for name in CLASSES[target])]
        assert set(table["sample_id"]) == set(samples.index[samples["side"] == "holdout"])
        assert (table["sample_id"] == rows["tags"]["sample_id"]).all()
        assert (table["group"] == samples.loc[table["sample_id"], "group"].to_numpy()).all()
    for target in ("garment", "colour"):
        assert (rows[target]["label"].to_numpy() == samples.loc[rows[target]["sample_id"], target].to_numpy()).all()
        np.testing.assert_allclose(probabilities(rows[target]).sum(axis=1), 1, rtol=1e-5)
    expected = samples.loc[rows["tags"]["sample_id"]].apply(lambda row: sorted([row["colour"], row["garment"]]), axis=1)
    assert [list(labels) for labels in rows["tags"]["label"]] == expected.tolist()
    sums = probabilities(rows["tags"]).sum(axis=1)
    assert np.abs(sums - 1).min() > 0.01, "sigmoids do not sum to 1"


def by_scikit_learn(done: Path, target: str) -> dict[str, float]:
    table, names = holdout(done, target), CLASSES[target]
    probability = probabilities(table)
    if target == "tags":
        actual, predicted = indicator(table["label"]), (probability >= 0.5).astype(int)
    else:
        actual = np.array([names.index(label) for label in table["label"]])
        predicted = probability.argmax(axis=1)
    applies = actual if target == "tags" else np.eye(len(names), dtype=int)[actual]
    found = {
        "f1_weighted": f1_score(actual, predicted, average="weighted"),
        "f1_macro": f1_score(actual, predicted, average="macro"),
        "accuracy": accuracy_score(actual, predicted),
        "roc_auc_macro": roc_auc_score(applies, probability, average="macro"),
    }
    if target == "tags":
        found["f1_micro"] = f1_score(actual, predicted, average="micro")
        found["map_macro"] = average_precision_score(actual, probability, average="macro")
    return found


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_scores_are_those_of_scikit_learn_and_their_means(done: Path) -> None:
    found = read_json(done / "data" / "refit" / "metrics.json")
    expected = {target: by_scikit_learn(done, target) for target in TARGETS}
    assert found["targets"] == {target: pytest.approx(scores) for target, scores in expected.items()}
    for name in HEADLINES:
        assert found[name] == pytest.approx(np.mean([scores[name] for scores in expected.values()]))
    assert 0.3 < found["f1_weighted"] < 1, "else the numbers above show little"
    assert (found["n_train"], found["n_holdout"]) == (54, 18)


def change(root: Path, side: str, column: str, values: dict[str, str]) -> None:
    """Changes a label of the first sample of a side."""

    def changed(rows: pd.DataFrame) -> pd.DataFrame:
        first = rows.index[rows["side"] == side][0]
        rows.loc[first, column] = values[rows.loc[first, column]]
        return rows

    write_folds(root, changed)


@pytest.mark.parametrize(
    ("side", "column", "same"), [("holdout", "colour", False), ("holdout", "garment", False), ("train", "colour", True)]
)
def test_the_holdouts_name_covers_every_label(
    side: str, column: str, same: bool, done: Path, prepared: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(prepared, tmp_path / "workspace"))
    others = {"colour": {"red": "blue", "green": "blue", "blue": "red"}, "garment": {"hat": "shoe", "shoe": "hat"}}
    change(root, side, column, others[column])
    found = refit.run(SETTINGS, root)["holdout"]
    assert (found == read_json(done / "data" / "refit" / "metrics.json")["holdout"]) == same


def test_about_names_the_classes_and_thresholds(packaged: Path) -> None:
    about = json.loads((packaged / "about.json").read_text())
    assert about["classes"] == CLASSES
    assert about["multilabel"] == ["tags"]
    assert about["thresholds"] == {"tags": [0.5] * 5}


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
    expected = [reaching(row, TAGS, [0.5] * 5) for row in probabilities(holdout(done, "tags"))]
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
    for row, values in zip(good, probabilities(holdout(done, "tags")), strict=True):
        assert row["tags"] == reaching(values, TAGS, [0.5] * 5)
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


def sections(source: str, mark: Callable[[str], str]) -> dict[str, str]:
    """The part of a page below each target's heading."""
    starts = {target: source.index(mark(target)) for target in TARGETS}
    ends = sorted([*starts.values(), len(source)])
    return {target: source[start : ends[ends.index(start) + 1]] for target, start in starts.items()}


def test_the_card_has_a_section_for_each_target(done: Path) -> None:
    page, found = Page(done), read_json(done / "data" / "refit" / "metrics.json")
    assert (
        "Tells garment (one of 2 classes), tags (any of 5 labels), colour (one of 3 classes) of an image." in page.text
    )
    assert "Scores, means over 3 targets" in page.text
    means = page.table("Score")
    assert means["Weighted F1"][0] == f"{found['f1_weighted']:.3f}"
    low, high = (float(end) for end in means["Weighted F1"][1].split(" to "))
    assert low < found["f1_weighted"] < high
    parts = sections(page.source, lambda target: f"<h2>{target}</h2>")
    for target, scores in found["targets"].items():
        part = Page(done)
        part.rows = []
        part.feed(parts[target])
        shown = part.table("Score")
        names = [*HEADLINES, *sorted(scores.keys() - set(HEADLINES))]
        assert [cells[0] for cells in shown.values()] == [f"{scores[name]:.3f}" for name in names]
        low, high = (float(end) for end in shown["Weighted F1"][1].split(" to "))
        assert low <= round(scores["f1_weighted"], 3) <= high
        classes = part.table("Class")
        assert list(classes) == CLASSES[target]
        assert ("data:image/png" in parts[target]) == (target != "tags")
    table = holdout(done, "tags")
    areas = average_precision_score(indicator(table["label"]), probabilities(table), average=None)
    assert [cells[-1] for cells in tags_of(done).values()] == [f"{area:.3f}" for area in areas]
    assert [cells[:2] for cells in tags_of(done).values()] == [
        [str(count(done, "train", name)), str(count(done, "holdout", name))] for name in TAGS
    ]
    assert "An image gets every label of tags whose probability reaches 0.5" in page.text
    assert "Every image gets one class of garment, colour, also one that shows none of them" in page.text
    assert "colour red (18)" in page.text, "few images to learn from"


def tags_of(done: Path) -> dict[str, list[str]]:
    page = Page(done)
    source = sections(page.source, lambda target: f"<h2>{target}</h2>")["tags"]
    page.rows = []
    page.feed(source)
    return page.table("Class")


def count(done: Path, side: str, name: str) -> int:
    rows = folds(done).query("side == @side")
    return int((rows[["colour", "garment"]] == name).any(axis=1).sum())


def test_the_package_says_the_same_in_markdown(done: Path, packaged: Path) -> None:
    parts = sections((packaged / "README.md").read_text(), lambda target: f"\n## {target}\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts["tags"].splitlines() if "|" in line]
    table = {row[0]: row[1:] for row in rows}
    for name, cells in tags_of(done).items():
        assert table[name] == cells
    scores = read_json(done / "data" / "refit" / "metrics.json")["targets"]["tags"]
    assert table["Mean average precision"][0] == f"{scores['map_macro']:.3f}"
