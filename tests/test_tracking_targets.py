"""MLflow with several targets: means under their usual names, each target's own scores beside them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import load_params
from mlflow.tracking import MlflowClient
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from pipeline_steps import tracking
from pipeline_steps.files import write_json
from pipeline_steps.tracked_scores import by_target, scores_of
from pipeline_steps.tracking import Tracker

MODEL = "cnn_tiny"
SETTINGS: dict[str, Any] = {
    "experiment.models": [MODEL], "experiment.folds": [0, 1],
    "targets": {"colour": {"kind": "multiclass"}, "tags": {"kind": "multilabel", "of": ["colour", "garment"]}},
}  # fmt: skip
COLOURS, TAGS = ["blue", "green", "red"], ["blue", "green", "hat", "red", "shoe"]
HEADLINES = ["f1_weighted", "f1_macro", "accuracy", "roc_auc_macro"]


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """Of a workspace with one trained fold."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"sample_id": [f"{number:02}" for number in range(30)], "fold": 0, "side": "train"})
    rows["colour"], rows["garment"] = random.choice(COLOURS, 30), random.choice(["hat", "shoe"], 30)
    (tmp_path / "data" / "split").mkdir(parents=True)
    rows.to_parquet(tmp_path / "data" / "split" / "folds.parquet")
    for fold in (0, 1):
        folder = tmp_path / "data" / "train" / MODEL / f"fold_{fold}"
        (folder / "predictions").mkdir(parents=True)
        write_json(folder / "metrics.json", {"best_epoch": 2, "epochs": 2, "key": f"key of {fold}"})
    folder = tmp_path / "data" / "train" / MODEL / "fold_0"
    history = {"epoch": [1, 2], "train_loss": [0.5, 0.25], "train_accuracy": [0.5, 0.75], "inner_loss": [0.5, 0.375]}
    history |= {"inner_accuracy": [0.25, 0.625], "inner_f1_weighted": [0.25, 0.5]}
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    softmax = random.dirichlet([1.0] * 3, 30)
    colour = rows[["sample_id", "fold"]].assign(label=rows["colour"])
    tags = rows[["sample_id", "fold"]].assign(label=[sorted(row) for row in rows[["colour", "garment"]].to_numpy()])
    colour[[f"p:{name}" for name in COLOURS]] = softmax
    tags[[f"p:{name}" for name in TAGS]] = random.random((30, 5))
    colour.to_parquet(folder / "predictions" / "colour.parquet")
    tags.to_parquet(folder / "predictions" / "tags.parquet")
    return Tracker(load_params(SETTINGS), tmp_path)


def predictions(tracker: Tracker, target: str) -> pd.DataFrame:
    folder = tracker.root / "data" / "train" / MODEL / "fold_0" / "predictions"
    return pd.read_parquet(folder / f"{target}.parquet")


def expected(tracker: Tracker) -> dict[str, dict[str, float]]:
    """By scikit-learn, from the tables as they are read back."""
    colour, tags = predictions(tracker, "colour"), predictions(tracker, "tags")
    codes = np.array([COLOURS.index(label) for label in colour["label"]])
    one, several = colour[[f"p:{name}" for name in COLOURS]].to_numpy(), tags[[f"p:{name}" for name in TAGS]].to_numpy()
    applies = np.array([[int(name in labels) for name in TAGS] for labels in tags["label"]])
    answered = (several >= 0.5).astype(int)
    return {
        "colour": {
            "f1_weighted": f1_score(codes, one.argmax(axis=1), average="weighted"),
            "f1_macro": f1_score(codes, one.argmax(axis=1), average="macro"),
            "accuracy": accuracy_score(codes, one.argmax(axis=1)),
            "roc_auc_macro": roc_auc_score(np.eye(3)[codes], one, average="macro"),
        },
        "tags": {
            "f1_weighted": f1_score(applies, answered, average="weighted"),
            "f1_macro": f1_score(applies, answered, average="macro"),
            "accuracy": accuracy_score(applies, answered),
            "roc_auc_macro": roc_auc_score(applies, several, average="macro"),
            "f1_micro": f1_score(applies, answered, average="micro"),
            "map_macro": average_precision_score(applies, several, average="macro"),
        },
    }


def test_the_scores_of_each_target_are_those_of_scikit_learn(tracker: Tracker) -> None:
    for target, scores in expected(tracker).items():
        assert scores_of(predictions(tracker, target), multilabel=target == "tags") == pytest.approx(scores)


def test_a_fold_has_means_and_the_scores_of_each_target(tracker: Tracker) -> None:
    tracker.fold(MODEL, 0)
    client, scores = MlflowClient(tracking.tracking_uri()), expected(tracker)
    (run,) = client.search_runs([tracker.experiment], "tags.`pleat.kind` = 'fold'")
    means = {name: np.mean([scores[target][name] for target in scores]) for name in HEADLINES}
    own = {f"{name}.{target}": score for target, of in scores.items() for name, score in of.items()}
    epochs = {"train_loss": 0.25, "train_accuracy": 0.75, "inner_loss": 0.375, "inner_accuracy": 0.625}
    epochs |= {"inner_f1_weighted": 0.5, "best_epoch": 2, "epochs": 2}
    assert run.data.metrics == pytest.approx({**means, **own, **epochs})
    history = client.get_metric_history(run.info.run_id, "train_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.75)]


def test_a_models_summary_has_the_spread_of_each_target(tracker: Tracker) -> None:
    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 0.1, "ci95_low": 0.2, "ci95_high": None, "pooled": 0.3, "folds": [mean, mean]}

    targets = {
        "colour": {"kind": "multiclass", "n_classes": 3, **dict.fromkeys(HEADLINES, spread(0.5))},
        "tags": {"kind": "multilabel", "n_classes": 5, **dict.fromkeys([*HEADLINES, "map_macro"], spread(0.75))},
    }
    summary = dict.fromkeys(HEADLINES, spread(0.625)) | {"n_samples": 30, "n_classes": 8, "targets": targets}
    write_json(tracker.root / "data" / "evaluate" / MODEL / "metrics.json", summary)
    (tracker.root / "reports" / "models" / MODEL).mkdir(parents=True)
    first = tracker.root / "data" / "train" / MODEL / "fold_0"
    for path in (path for path in first.rglob("*") if path.is_file() and path.name != "metrics.json"):
        (first.parent / "fold_1" / path.relative_to(first)).write_bytes(path.read_bytes())
    tracker.model(MODEL)
    (run,) = MlflowClient(tracking.tracking_uri()).search_runs([tracker.experiment], "tags.`pleat.kind` = 'model'")
    found = run.data.metrics
    assert (found["f1_macro"], found["f1_macro.colour"], found["f1_macro.tags"]) == (0.625, 0.5, 0.75)
    assert (found["accuracy_std"], found["accuracy_std.colour"]) == (0.1, 0.1)
    assert found["map_macro_pooled.tags"] == 0.3
    assert "map_macro" not in found
    assert "f1_macro_ci95_high" not in found, "what is undefined is not logged"


def test_one_target_has_its_scores_under_their_plain_names() -> None:
    assert by_target({"f1_weighted": 0.5}, {"tags": {"f1_weighted": 0.5, "map_macro": 0.25}}) == {
        "f1_weighted": 0.5, "map_macro": 0.25,
    }  # fmt: skip
    assert by_target({}, {}) == {}
