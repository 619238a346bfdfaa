"""Scores as MLflow gets them: flat names, with those of each target beside their means where there are several.

Imports of scikit-learn and scipy are late: they take a second, and most of what is logged needs none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

SUMMARY_METRICS = ("f1_weighted", "f1_macro", "accuracy", "roc_auc_macro", "f1_micro", "map_macro")
SUMMARY_PARTS = {"mean": "", "std": "_std", "ci95_low": "_ci95_low", "ci95_high": "_ci95_high", "pooled": "_pooled"}


def scores_of(predictions: pd.DataFrame, multilabel: bool) -> dict[str, float]:
    """The scores of one target's predictions in one fold (columns label and `p:CLASS`).

    A label of a multilabel target counts from `metrics.THRESHOLD` on, since one fold cannot choose a better threshold.
    """
    from sklearn.preprocessing import MultiLabelBinarizer

    from pipeline_steps.metrics import headlines  # late: brings scipy, which takes a second

    classes = [column.removeprefix("p:") for column in map(str, predictions) if column.startswith("p:")]
    if multilabel:
        actual = MultiLabelBinarizer(classes=classes).fit_transform(predictions["label"])
    else:
        number = {name: code for code, name in enumerate(classes)}
        actual = np.array([number[label] for label in predictions["label"]], dtype=np.int64)
    return headlines(actual, predictions[[f"p:{name}" for name in classes]].to_numpy())


def by_target(
    means: Mapping[str, float | None], targets: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float | None]:
    """The means over several targets with each target's own scores beside them, as SCORE.TARGET; of one its scores."""
    if len(targets) == 1:
        return {**next(iter(targets.values())), **means}
    own = {f"{name}.{target}": score for target, scores in targets.items() for name, score in scores.items()}
    return {**means, **own}


def mean_scores(targets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The means of the headline scores over the targets."""
    from pipeline_steps.metrics import mean_of_targets

    return mean_of_targets(list(targets.values()))


def spreads_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What `evaluate` says of each score: the mean under its own name, its spread with a suffix."""
    return {
        name + suffix: summary[name][part]
        for name in SUMMARY_METRICS
        if name in summary
        for part, suffix in SUMMARY_PARTS.items()
    }


def holdout_scores(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """What `refit` says of each score on the holdout."""
    return {f"holdout_{name}": scores[name] for name in SUMMARY_METRICS if name in scores}
