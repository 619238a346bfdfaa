"""Tables of one model's classes: scores of each, and what is taken for what."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline_steps import metrics
from pipeline_steps.out_of_fold import Predictions

N_CONFUSED_PAIRS = 10


def class_table(predictions: Predictions) -> pd.DataFrame:
    """One row a class: class, support, then mean and std over folds of precision, recall, F1 and ROC-AUC.

    A multilabel target has average precision (`ap`) and the threshold from which a class counts as predicted too. F1
    has its 95% interval. A fold in which a number is undefined does not count; NaN where all are undefined.
    """
    size = len(predictions.target.classes)
    masks = [mask for _, mask in predictions.folds()]
    scores = [metrics.class_scores(predictions.actual[mask], predictions.predicted[mask], size) for mask in masks]
    pairs = [(predictions.actual[mask], predictions.probability[mask]) for mask in masks]
    columns: dict[str, Any] = {
        "class": predictions.target.classes,
        "support": np.sum([score.support for score in scores], axis=0),
    }
    by_fold: list[tuple[str, Any]] = [
        ("precision", [score.precision for score in scores]),
        ("recall", [score.recall for score in scores]),
        ("f1", [score.f1 for score in scores]),
        ("roc_auc", [metrics.roc_auc_by_class(*pair) for pair in pairs]),
    ]
    if predictions.thresholds is not None:
        by_fold += [
            ("ap", [metrics.average_precision_by_class(*pair) for pair in pairs]),
            ("threshold", predictions.thresholds),
        ]
    for name, values in by_fold:
        spreads = [metrics.spread(one_class) for one_class in np.transpose(values)]
        keys = ["mean", "std", "ci95_low", "ci95_high"] if name == "f1" else ["mean", "std"]
        columns |= {f"{name}_{key}": [getattr(item, key) for item in spreads] for key in keys}
    return pd.DataFrame(columns)


def confused_pairs(predictions: Predictions) -> pd.DataFrame:
    """The most frequent mistakes: columns actual, predicted, count, share (of the actual class)."""
    pairs = _named(predictions)[predictions.wrong()]
    counts = pairs.value_counts().rename("count").reset_index()
    counts = counts.sort_values(["count", "actual", "predicted"], ascending=[False, True, True], ignore_index=True)
    support = predictions.samples["label"].value_counts()
    counts["share"] = counts["count"] / support.reindex(counts["actual"]).to_numpy()
    return counts.head(N_CONFUSED_PAIRS)


def confusions(targets: Sequence[Predictions]) -> pd.DataFrame:
    """One row a sample and multiclass target: columns actual and predicted; `colour: red` where there are several."""
    frames = [pd.DataFrame({"actual": [], "predicted": []}, dtype=object)]
    for predictions in targets:
        if not predictions.target.multilabel:
            prefix = f"{predictions.target.name}: " if len(targets) > 1 else ""
            frames.append(prefix + _named(predictions))
    return pd.concat(frames, ignore_index=True)


def _named(predictions: Predictions) -> pd.DataFrame:
    names = np.array(predictions.target.classes, dtype=object)
    return pd.DataFrame({"actual": names[predictions.actual], "predicted": names[predictions.predicted]})
