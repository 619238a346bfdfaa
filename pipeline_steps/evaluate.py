"""Stage `evaluate`: out-of-fold predictions of one model become scores, tables, pictures and pages."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from pipeline_steps import metrics, out_of_fold, pages, plots, plots_multilabel
from pipeline_steps.class_tables import class_table, confused_pairs, confusions
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_json, write_csv, write_json, write_text
from pipeline_steps.mistakes import worst_mistakes
from pipeline_steps.out_of_fold import Predictions
from pipeline_steps.params import Params
from pipeline_steps.progress import say

LOSS = ["train_loss", "inner_loss"]
ACCURACY = ["train_accuracy", "inner_accuracy", "inner_f1_weighted"]


def run(params: Params, model: str, root: Path = Path()) -> dict[str, Any]:
    """Writes data/evaluate/MODEL and reports/models/MODEL/; the same input gives the same bytes.

    data/evaluate/MODEL holds metrics.json and, for `dvc plots`, confusion.csv; beside it, loss-curves/MODEL.csv and
    accuracy-curves/MODEL.csv are the means over folds. With one target the report's pages, tables and pictures lie in
    reports/models/MODEL; with several, those of each lie in a folder of its name, and above them what is common.

    Returns:
        What metrics.json holds: of each headline score, averaged over the targets fold by fold, the mean, std, 95%
        interval, pooled value and folds; n_samples; n_classes, the sum over the targets; epochs, the best one of each
        fold; and `targets`, by name the target's kind and its own n_samples, n_classes and scores. An undefined number
        is None.

    Raises:
        PleatError: a fold is missing, or predictions, folds and images do not belong together.
    """
    targets = {name: out_of_fold.read(params, model, name, root) for name in params.targets}
    train, numbers = root / "data" / "train" / model, params.experiment.folds
    curves = read_curves(train, numbers)
    trained = {fold: read_json(train / f"fold_{fold}" / "metrics.json") for fold in numbers}
    epochs = [int(trained[fold]["best_epoch"]) for fold in numbers]

    tables = {name: fold_table(predictions) for name, predictions in targets.items()}
    pooled = {name: _all_folds(predictions) for name, predictions in targets.items()}
    summaries = {
        name: {"kind": params.targets[name].kind, "n_classes": len(predictions.target.classes)}
        | summarize(tables[name], pooled[name])
        for name, predictions in targets.items()
    }
    folds = mean_table(list(tables.values())).assign(best_epoch=epochs)
    summary = summarize(folds, metrics.mean_of_targets(list(pooled.values()))) | {
        "n_classes": sum(one["n_classes"] for one in summaries.values()),
        "epochs": epochs,
        "targets": summaries,
    }
    with atomic_folder(root / "reports" / "models" / model) as out:
        plots.curves(out / "curves.png", curves, dict(zip(numbers, epochs, strict=True)))
        if len(targets) > 1:
            _write_overview(out, model, summary, folds)
        for name, predictions in targets.items():
            folder = out / name if len(targets) > 1 else out
            table = tables[name].assign(best_epoch=epochs)
            _write_target(folder, model, predictions, summaries[name], table, len(targets) > 1, root)
        write_json(out / "keys.json", {str(fold): about["key"] for fold, about in trained.items()})

    data = root / "data" / "evaluate"
    write_json(data / model / "metrics.json", summary)
    write_csv(data / model / "confusion.csv", confusions(list(targets.values())))
    write_csv(data / "loss-curves" / f"{model}.csv", mean_curves(curves, LOSS))
    write_csv(data / "accuracy-curves" / f"{model}.csv", mean_curves(curves, ACCURACY))
    headline = plots.with_spread(summary["f1_weighted"]["mean"], summary["f1_weighted"]["std"])
    over = f" and {len(targets)} targets" if len(targets) > 1 else ""
    say(f"{model}: weighted F1 {headline} over {len(folds)} fold{'s' if len(folds) > 1 else ''}{over}")
    return summary


def read_curves(train: Path, folds: list[int]) -> pd.DataFrame:
    """Joins the folds' history.csv: columns fold, epoch, then loss and accuracy of the training and the inner part."""
    frames = []
    for fold in folds:
        path = train / f"fold_{fold}" / "history.csv"
        if not path.exists():
            raise PleatError(f"{path} is missing: fold {fold} of this model is not trained; run `dvc repro`.")
        frames.append(pd.read_csv(path).assign(fold=fold))
    return pd.concat(frames, ignore_index=True)[["fold", "epoch", *LOSS, *ACCURACY]]


def mean_curves(curves: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Means over folds by epoch, as far as every fold was trained: further on they would be of other folds."""
    last = curves.groupby("fold")["epoch"].max().min()
    return curves[curves["epoch"] <= last].groupby("epoch", as_index=False)[columns].mean()


def fold_table(predictions: Predictions) -> pd.DataFrame:
    """One row a fold: fold, n_samples and the target's scores."""
    rows = [
        {"fold": fold, "n_samples": int(mask.sum())} | predictions.headlines(mask) for fold, mask in predictions.folds()
    ]
    return pd.DataFrame(rows)


def mean_table(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One row a fold: fold, n_samples and the means of the headline scores over the targets."""
    by_fold = zip(*(table.to_dict("records") for table in tables), strict=True)
    means = pd.DataFrame([metrics.mean_of_targets(rows) for rows in by_fold])
    return pd.concat([tables[0][["fold", "n_samples"]], means], axis=1)


def summarize(folds: pd.DataFrame, pooled: Mapping[str, float]) -> dict[str, Any]:
    """The number of samples, and of each score in `pooled` its spread over folds, as metrics.json holds it."""
    summary: dict[str, Any] = {"n_samples": int(folds["n_samples"].sum())}
    for name, score in pooled.items():
        numbers = asdict(metrics.spread(folds[name].to_numpy())) | {"pooled": score}
        summary[name] = {key: number_or_none(value) for key, value in numbers.items()}
        summary[name]["folds"] = [number_or_none(value) for value in folds[name]]
    return summary


def number_or_none(value: float) -> float | None:
    """JSON knows no NaN: an undefined number is null there."""
    return None if np.isnan(value) else float(value)


def _all_folds(predictions: Predictions) -> dict[str, float]:
    return predictions.headlines(np.ones(len(predictions.samples), dtype=np.bool_))


def _write_overview(out: Path, model: str, summary: dict[str, Any], folds: pd.DataFrame) -> None:
    """What is common to several targets."""
    write_csv(out / "folds.csv", folds)
    if len(folds) > 1:
        plots.folds(out / "folds.png", folds, summary)
    write_text(out / "index.html", pages.targets_page(model, summary, folds, pictures=out))


def _write_target(
    out: Path,
    model: str,
    predictions: Predictions,
    summary: dict[str, Any],
    folds: pd.DataFrame,
    is_part: bool,
    root: Path,
) -> None:
    """The tables, the pictures and the page of one target; `is_part`: one of several."""
    classes, by_fold = class_table(predictions), [mask for _, mask in predictions.folds()]
    write_csv(out / "per_class.csv", classes)
    write_csv(out / "folds.csv", folds)
    plots.per_class(out / "per_class.png", classes, len(by_fold))
    plots.roc(out / "roc.png", classes, [(predictions.actual[mask], predictions.probability[mask]) for mask in by_fold])
    if len(folds) > 1:
        plots.folds(out / "folds.png", folds, summary)
    if predictions.target.multilabel:
        plots_multilabel.precision_recall(out / "precision_recall.png", classes, predictions)
        pairs = None
    else:
        size = len(predictions.target.classes)
        counts = confusion_matrix(predictions.actual, predictions.predicted, labels=range(size))
        plots.confusion(out / "confusion.png", counts, predictions.target.classes)
        pairs = confused_pairs(predictions)
    page = pages.model_page(
        model,
        predictions.target.name if is_part else None,
        summary,
        folds,
        classes,
        pairs=pairs,
        worst=worst_mistakes(predictions, root),
        n_wrong=int(predictions.wrong().sum()),
        pictures=out,
    )
    write_text(out / "index.html", page)
