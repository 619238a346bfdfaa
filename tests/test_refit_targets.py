"""`refit` with two multiclass targets and a multilabel one: what it writes of each, and the model card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refit_workspace import MODEL, TAGS, TARGETS, folds, holdout, probabilities, write_folds, write_predictions
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score, roc_auc_score
from sklearn.preprocessing import MultiLabelBinarizer
from targets_model import CLASSES, SETTINGS
from test_refit import Page

from pipeline_steps import refit
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json

pytest_plugins = ["targets_model"]

HEADLINES = ["f1_weighted", "f1_macro", "accuracy", "roc_auc_macro"]


@pytest.fixture(scope="module")
def packaged(done: Path) -> Path:
    return done / "data" / "refit" / "package"


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


def thresholds(done: Path) -> list[float]:
    """Those that the package serves with."""
    return read_json(done / "data" / "refit" / "package" / "about.json")["thresholds"]["tags"]


def test_thresholds_are_the_best_for_all_out_of_fold_predictions(done: Path) -> None:
    """Against a search through every value that gives another answer."""
    tables = [
        pd.read_parquet(done / "data" / "train" / MODEL / f"fold_{fold}" / "predictions" / "tags.parquet")
        for fold in range(3)
    ]
    table = pd.concat(tables)
    assert sorted(table["sample_id"]) == sorted(folds(done).query("side == 'train'").index)
    actual, probability = indicator(table["label"]), probabilities(table).astype(float)
    for name, column, scores, found in zip(TAGS, actual.T, probability.T, thresholds(done), strict=True):
        ascending = np.unique(scores)
        candidates = (ascending + np.concatenate([[0.0], ascending[:-1]])) / 2
        reached = [f1_score(column, scores >= candidate) for candidate in candidates]
        assert found == candidates[np.argmax(np.round(reached, 9))], name
        assert 0.5 < max(reached) < 1
    assert np.ptp(thresholds(done)) > 0.2, "classes differ"


def by_scikit_learn(done: Path, target: str) -> dict[str, float]:
    table, names = holdout(done, target), CLASSES[target]
    probability = probabilities(table)
    if target == "tags":
        actual, predicted = indicator(table["label"]), (probability >= thresholds(done)).astype(int)
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
    table = holdout(done, "tags")
    halves = f1_score(indicator(table["label"]), probabilities(table) >= 0.5, average="weighted")
    assert halves != pytest.approx(expected["tags"]["f1_weighted"]), "0.5 gives other scores"
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
def test_the_holdouts_name_covers_every_label(side: str, column: str, same: bool, done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "workspace"))
    others = {"colour": {"red": "blue", "green": "blue", "blue": "red"}, "garment": {"hat": "shoe", "shoe": "hat"}}
    change(root, side, column, others[column])
    write_predictions(root, SETTINGS)
    found = refit.run(SETTINGS, root)["holdout"]
    assert (found == read_json(done / "data" / "refit" / "metrics.json")["holdout"]) == same
    if side == "holdout":
        assert thresholds(root) == thresholds(done), "no label of the holdout takes part"


def test_about_names_the_classes_and_thresholds(packaged: Path) -> None:
    about = json.loads((packaged / "about.json").read_text())
    assert about["classes"] == CLASSES
    assert about["multilabel"] == ["tags"]
    assert about["thresholds"].keys() == {"tags"}
    assert len(about["thresholds"]["tags"]) == 5


def test_predictions_with_other_classes_are_refused(done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "workspace"))
    for path in (root / "data" / "train" / MODEL).rglob("tags.parquet"):
        pd.read_parquet(path).assign(**{"p:scarf": np.float32(0.1)}).to_parquet(path)
    with pytest.raises(PleatError, match=r"Classes of chosen \(tags\) differ .*: scarf\. .*run `dvc repro`"):
        refit.run(SETTINGS, root)


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
    assert [cells[-2] for cells in tags_of(done).values()] == [f"{area:.3f}" for area in areas]
    assert [cells[-1] for cells in tags_of(done).values()] == [f"{limit:.3f}" for limit in thresholds(done)]
    recalls = recall_score(indicator(table["label"]), probabilities(table) >= thresholds(done), average=None)
    assert [cells[3] for cells in tags_of(done).values()] == [f"{recall:.3f}" for recall in recalls]
    assert [cells[:2] for cells in tags_of(done).values()] == [
        [str(count(done, "train", name)), str(count(done, "holdout", name))] for name in TAGS
    ]
    assert "An image gets every label of tags whose probability reaches the label's threshold" in page.text
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
