"""Stage evaluate with several targets, a multilabel target and a given split, on small made-up runs."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_run as synthetic
from evaluated_run import MODEL, check_spread, fold_file, multiclass_scores, out_of_fold, report, summary_of
from sklearn import metrics as oracle

from pipeline_steps import evaluate, mistakes
from pipeline_steps.errors import PleatError


def evaluated(root: Path, columns: Mapping[str, Sequence[str]], targets: Mapping[str, Any]) -> Path:
    folds = synthetic.make_data(root, columns, n=180)
    synthetic.make_model(root, MODEL, folds, columns, targets)
    evaluate.run(synthetic.params([MODEL], targets=targets), MODEL, root)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two multiclass targets that share a class name, after `evaluate`."""
    return evaluated(tmp_path_factory.mktemp("two"), synthetic.APPAREL, synthetic.TWO)


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one multilabel target, after `evaluate`."""
    return evaluated(tmp_path_factory.mktemp("tags"), synthetic.TAGS, synthetic.MANY)


def test_headline_scores_are_the_means_of_the_targets_fold_by_fold(two: Path) -> None:
    summary = summary_of(two)
    assert (summary["n_samples"], summary["n_classes"]) == (144, 10)
    frames = {target: out_of_fold(two, target=target) for target in synthetic.TWO}
    by_fold = {
        target: [multiclass_scores(rows) for _, rows in frame.groupby("fold")] for target, frame in frames.items()
    }
    pooled = {target: multiclass_scores(frame) for target, frame in frames.items()}
    assert list(summary["targets"]) == ["colour", "garment"]
    for name in ("f1_weighted", "f1_macro", "accuracy", "roc_auc_macro"):
        for target, found in summary["targets"].items():
            check_spread(found[name], [fold[name] for fold in by_fold[target]], pooled[target][name])
        means = [np.mean([by_fold[target][fold][name] for target in frames]) for fold in range(3)]
        check_spread(summary[name], means, float(np.mean([pooled[target][name] for target in frames])))


def test_every_target_has_a_folder_with_its_own_page(two: Path) -> None:
    out = report(two)
    index = (out / "index.html").read_text()
    links = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', index)
    assert links == ["colour/index.html", "garment/index.html"]
    assert all((out / link).exists() for link in links)
    summary = summary_of(two)
    for target in synthetic.TWO:
        row = re.search(rf'<a href="{target}/index.html">(.*?)</tr>', index, re.DOTALL)
        assert row is not None
        assert f"{summary['targets'][target]['f1_weighted']['mean']:.3f}" in row[1]
        page = (out / target / "index.html").read_text()
        assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == ["../index.html"]
        assert f"<h1>{MODEL}: {target}</h1>" in page
        classes = pd.read_csv(out / target / "per_class.csv")
        assert classes["class"].tolist() == synthetic.APPAREL[target]
        assert classes["support"].sum() == 144
    assert {path.name for path in out.iterdir()} == {
        "index.html", "folds.csv", "folds.png", "curves.png", "keys.json", "colour", "garment",
    }  # fmt: skip
    means = pd.read_csv(out / "folds.csv")
    np.testing.assert_allclose(means["accuracy"], summary["accuracy"]["folds"], rtol=1e-5)


def test_confusions_of_several_targets_stay_apart(two: Path) -> None:
    confusion = pd.read_csv(two / "data" / "evaluate" / MODEL / "confusion.csv")
    assert len(confusion) == 2 * 144
    colour = confusion[confusion["actual"].str.startswith("colour: ")]
    frame = out_of_fold(two, target="colour").sort_values(["fold", "sample_id"])
    assert colour["actual"].tolist() == ("colour: " + frame["label"]).tolist()
    assert colour["predicted"].str.startswith("colour: ").all()
    assert {"colour: other", "garment: other"} <= set(confusion["actual"])


def decided(frame: pd.DataFrame, classes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What applies, what is decided with thresholds of the other folds, and each row's thresholds, by brute force."""
    actual = np.array([[name in labels for name in classes] for labels in frame["label"]])
    probability = frame[[f"p:{name}" for name in classes]].to_numpy()
    thresholds = np.empty(probability.shape)
    for fold in frame["fold"].unique():
        inside = (frame["fold"] == fold).to_numpy()
        for number in range(len(classes)):
            score, positive = probability[~inside, number], actual[~inside, number]
            tried = np.unique(score)
            hits = np.array([(positive & (score >= one)).sum() for one in tried])
            best = tried[np.argmax(2 * hits / ([(score >= one).sum() for one in tried] + positive.sum()))]
            below = score[score < best].max(initial=0)
            thresholds[inside, number] = (float(best) + float(below)) / 2
    return actual, probability >= thresholds, thresholds


def test_multilabel_summary_and_tables_agree_with_scikit_learn(tags: Path) -> None:
    summary = summary_of(tags)
    frame = out_of_fold(tags, target="tags").sort_values(["fold", "sample_id"], ignore_index=True)
    classes = [column[2:] for column in frame if column.startswith("p:")]
    assert classes == sorted(chain.from_iterable(synthetic.TAGS.values()))
    actual, predicted, thresholds = decided(frame, classes)
    probability = frame[[f"p:{name}" for name in classes]].to_numpy()

    def scores(rows: np.ndarray) -> dict[str, float]:
        truth, guess, chance = actual[rows], predicted[rows], probability[rows]
        f1 = {
            f"f1_{average}": oracle.f1_score(truth, guess, average=average)
            for average in ("weighted", "macro", "micro")
        }
        return f1 | {
            "accuracy": (truth == guess).all(axis=1).mean(),
            "roc_auc_macro": oracle.roc_auc_score(truth, chance, average="macro"),
            "map_macro": oracle.average_precision_score(truth, chance, average="macro"),
        }

    folds = [np.flatnonzero(frame["fold"] == fold) for fold in range(3)]
    own = summary["targets"]["tags"]
    assert (own["kind"], own["n_classes"], summary["n_classes"]) == ("multilabel", 9, 9)
    for name, pooled in scores(np.arange(len(frame))).items():
        check_spread(own[name], [scores(rows)[name] for rows in folds], pooled)
    assert summary["f1_weighted"] == own["f1_weighted"]
    assert "map_macro" not in summary

    table = pd.read_csv(report(tags) / "per_class.csv")
    assert table["class"].tolist() == classes
    assert table["support"].tolist() == actual.sum(axis=0).tolist()
    precision = [oracle.precision_score(actual[rows], predicted[rows], average=None) for rows in folds]
    np.testing.assert_allclose(table["precision_mean"], np.mean(precision, axis=0), rtol=1e-5)
    ap = [oracle.average_precision_score(actual[rows], probability[rows], average=None) for rows in folds]
    np.testing.assert_allclose(table["ap_mean"], np.mean(ap, axis=0), rtol=1e-5)
    by_fold = np.array([thresholds[rows[0]] for rows in folds])
    np.testing.assert_allclose(table["threshold_mean"], by_fold.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["threshold_std"], by_fold.std(axis=0, ddof=1), rtol=1e-5)


def test_multilabel_page_shows_the_surest_wrong_decisions_first(tags: Path) -> None:
    page = (report(tags) / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert "Confusion" not in page
    frame = out_of_fold(tags, target="tags").sort_values(["fold", "sample_id"], ignore_index=True)
    classes = [column[2:] for column in frame if column.startswith("p:")]
    actual, predicted, _ = decided(frame, classes)
    probability = frame[[f"p:{name}" for name in classes]].to_numpy()
    wrong = []
    for row in np.flatnonzero((actual != predicted).any(axis=1)):
        decisions = [
            (probability[row, number], name)
            if predicted[row, number]
            else (1 - probability[row, number], f"not {name}")
            for number, name in enumerate(classes)
            if actual[row, number] != predicted[row, number]
        ]
        confidence, name = max(decisions)
        wrong.append((confidence, ", ".join(sorted(frame["label"][row])), name))
    wrong.sort(reverse=True)
    assert f"{len(wrong)} images were predicted wrong in at least one class" in page
    shown = re.findall(r'<figcaption>(.*?) → <span class="wrong">(.*?)</span> (.*?)%', page)
    assert shown == [(label, name, f"{100 * confidence:.1f}") for confidence, label, name in wrong[: len(shown)]]
    assert len(shown) == mistakes.N_MISTAKES


def test_a_multilabel_target_has_no_confusions(tags: Path) -> None:
    confusion = (tags / "data" / "evaluate" / MODEL / "confusion.csv").read_text()
    assert confusion == "actual,predicted\n"
    assert not (report(tags) / "confusion.png").exists()
    assert (report(tags) / "precision_recall.png").exists()


@pytest.mark.parametrize(
    ("columns", "targets"), [(synthetic.APPAREL, synthetic.TWO), (synthetic.TAGS, synthetic.MANY)], ids=["two", "tags"]
)
def test_a_given_split_is_one_fold_without_spread(tmp_path: Path, columns: dict, targets: dict) -> None:
    """Fold 1 holds the training list, which is never scored."""
    folds = synthetic.make_data(tmp_path, columns, n_folds=2)
    synthetic.make_model(tmp_path, MODEL, folds, columns, targets)
    shutil.rmtree(fold_file(tmp_path, 1, ""))
    summary = evaluate.run(synthetic.params([MODEL], n_folds=1, targets=targets), MODEL, tmp_path)
    assert summary["n_samples"] == (folds["fold"] == 0).sum()
    for name in ("f1_weighted", "accuracy"):
        only = summary[name]
        assert only["mean"] == only["pooled"] == only["folds"][0]
        assert only["std"] is only["ci95_low"] is only["ci95_high"] is None
    for page in report(tmp_path).rglob("*.html"):
        text = page.read_text()
        assert "One fold alone was scored" in text
        assert re.search(r"in\s1 fold:", text)
        assert not re.search(r"\bnan\b|None", re.sub(r'"data:[^"]*"', "", text))
    if targets == synthetic.MANY:
        table = pd.read_csv(report(tmp_path) / "per_class.csv")
        assert (table["threshold_mean"] == 0.5).all()
        assert "from a probability of 0.5 on" in (report(tmp_path) / "index.html").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda frame: frame.assign(label=[["red"]] * len(frame)), r"predictions of net \(tags\) name another label"),
        (
            lambda frame: frame.assign(**{"p:red": 1.5}),
            r"probabilities are no numbers or lie outside 0 to 1: the train",
        ),
        (lambda frame: frame.assign(**{"p:red": np.nan}), r"rows whose probabilities are no numbers or lie outside"),
        (lambda frame: frame.drop(columns="p:red"), r"Classes of net \(tags\) differ between fold 0 and fold 2: p:red"),
    ],
)
def test_multilabel_rows_that_do_not_belong_together(
    tags: Path, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], sentence: str
) -> None:
    shutil.copytree(tags / "data", tmp_path / "data")
    path = fold_file(tmp_path, 2, "predictions/tags.parquet")
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(PleatError, match=sentence):
        evaluate.run(synthetic.params([MODEL], targets=synthetic.MANY), MODEL, tmp_path)


def test_a_class_that_the_model_does_not_know(tags: Path, tmp_path: Path) -> None:
    shutil.copytree(tags / "data", tmp_path / "data")
    for fold in range(3):
        path = fold_file(tmp_path, fold, "predictions/tags.parquet")
        pd.read_parquet(path).drop(columns="p:red").to_parquet(path)
    with pytest.raises(PleatError, match=r"net \(tags\) was not trained on the label\(s\) red\. .* run `dvc repro`"):
        evaluate.run(synthetic.params([MODEL], targets=synthetic.MANY), MODEL, tmp_path)
