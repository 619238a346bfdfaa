"""What tests of `evaluate` share: where things of a made-up run lie, and its scores by scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

from pipeline_steps.files import read_json

MODEL = "net"


def fold_file(root: Path, fold: int, name: str = "predictions/label.parquet") -> Path:
    return root / "data" / "train" / MODEL / f"fold_{fold}" / name


def out_of_fold(root: Path, n_folds: int = 3, target: str = "label") -> pd.DataFrame:
    files = [fold_file(root, fold, f"predictions/{target}.parquet") for fold in range(n_folds)]
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def summary_of(root: Path) -> dict[str, Any]:
    return dict(read_json(root / "data" / "evaluate" / MODEL / "metrics.json"))


def multiclass_scores(rows: pd.DataFrame) -> dict[str, float]:
    """The headline scores from the most probable classes, by scikit-learn."""
    classes = [column[2:] for column in rows if column.startswith("p:")]
    predicted = np.array(classes)[rows[[f"p:{name}" for name in classes]].to_numpy().argmax(axis=1)]
    return {
        "f1_weighted": oracle.f1_score(rows["label"], predicted, labels=classes, average="weighted"),
        "f1_macro": oracle.f1_score(rows["label"], predicted, labels=classes, average="macro"),
        "accuracy": oracle.accuracy_score(rows["label"], predicted),
        "roc_auc_macro": np.mean([oracle.roc_auc_score(rows["label"] == name, rows[f"p:{name}"]) for name in classes]),
    }


def check_spread(found: dict[str, Any], by_fold: list[float], pooled: float) -> None:
    assert found["folds"] == pytest.approx(by_fold)
    assert found["pooled"] == pytest.approx(pooled)
    assert found["mean"] == pytest.approx(np.mean(by_fold))
    assert found["std"] == pytest.approx(np.std(by_fold, ddof=1))
    assert found["ci95_low"] < found["mean"] < found["ci95_high"]


def report(root: Path) -> Path:
    return root / "reports" / "models" / MODEL
