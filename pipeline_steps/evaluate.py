"""Stage `evaluate`: out-of-fold predictions of one model become scores, tables, pictures and a page."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import confusion_matrix

from pipeline_steps import metrics, pages, plots
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_json, read_parquet, write_csv, write_json, write_text
from pipeline_steps.metrics import Ints
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params
from pipeline_steps.progress import say

CLASS_PREFIX = "p:"
N_MISTAKES = 24
N_CONFUSED_PAIRS = 10
MEND = "The files are of different runs of the pipeline; run `dvc repro`."


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions of one model: n rows by fold and sample_id, c classes in sorted order."""

    samples: pd.DataFrame  # n rows: sample_id, batch, label, fold
    classes: list[str]
    actual: Ints  # (n,) class numbers
    probability: npt.NDArray[np.float32]  # (n, c)

    @property
    def predicted(self) -> Ints:
        """The most probable class of each sample, shape (n,); the first of equals."""
        numbers: Ints = self.probability.argmax(axis=1).astype(np.int64)
        return numbers

    def folds(self) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """Each fold's number with the mask of its rows."""
        fold = self.samples["fold"].to_numpy()
        for number in np.unique(fold):
            yield int(number), fold == number


def run(params: Params, model: str, root: Path = Path()) -> dict[str, Any]:
    """Writes data/evaluate/MODEL and reports/models/MODEL/; the same input gives the same bytes.

    data/evaluate/MODEL holds metrics.json, and curves.csv and confusion.csv for `dvc plots`.

    Returns:
        What metrics.json holds: each headline score's mean, std, 95% interval, pooled value and folds, then n_samples,
        n_classes and epochs, the best epoch of each fold. An undefined number is None.

    Raises:
        PleatError: a fold is missing, or predictions, folds and images do not belong together.
    """
    predictions = read_predictions(params, model, root)
    train = root / "data" / "train" / model
    folds = fold_table(predictions)
    numbers = folds["fold"].tolist()
    curves = read_curves(train, numbers)
    trained = {fold: read_json(train / f"fold_{fold}" / "metrics.json") for fold in numbers}
    folds["best_epoch"] = [int(trained[fold]["best_epoch"]) for fold in numbers]
    summary = summarize(predictions, folds)

    with atomic_folder(root / "reports" / "models" / model) as out:
        write_report(out, model, predictions, summary, folds, curves, mistakes(predictions, root))
        write_json(out / "keys.json", {str(fold): about["key"] for fold, about in trained.items()})
    data = root / "data" / "evaluate" / model
    write_json(data / "metrics.json", summary)
    write_csv(data / "curves.csv", curves)
    names = np.array(predictions.classes, dtype=object)
    rows = {"actual": names[predictions.actual], "predicted": names[predictions.predicted]}
    write_csv(data / "confusion.csv", pd.DataFrame(rows))
    headline = summary["f1_weighted"]
    say(f"{model}: weighted F1 {plots.with_spread(headline['mean'], headline['std'])} over {len(folds)} folds")
    return summary


def read_predictions(params: Params, model: str, root: Path) -> Predictions:
    """Joins every fold's predictions to folds.parquet and checks that they cover each other exactly.

    Raises:
        PleatError: with one sentence that names the model, the fold and what does not fit.
    """
    frames = [_read_fold(root / "data" / "train" / model / f"fold_{fold}", fold) for fold in params.experiment.folds]
    columns = list(frames[0].columns)
    for fold, frame in zip(params.experiment.folds, frames, strict=True):
        if list(frame.columns) != columns:
            odd = sorted(set(frame.columns) ^ set(columns)) or ["their order"]
            raise PleatError(f"Classes of {model} differ between fold 0 and fold {fold}: {', '.join(odd)}. {MEND}")
    found = pd.concat(frames, ignore_index=True)
    wanted = read_parquet(root / "data" / "split" / "folds.parquet").query("side == 'train'")
    _check_rows(model, found, wanted)

    samples = wanted[["sample_id", "batch", "label", "fold"]].sort_values(["fold", "sample_id"], ignore_index=True)
    found = found.set_index("sample_id").loc[samples["sample_id"]]
    for column in ("label", "fold"):
        differs = found[column].to_numpy() != samples[column].to_numpy()
        if differs.any():
            raise PleatError(
                f"{differs.sum():,} predictions of {model} name another {column} than data/split/folds.parquet, "
                f"first sample {samples['sample_id'][differs.argmax()]}. {MEND}"
            )
    class_columns = [column for column in columns if column.startswith(CLASS_PREFIX)]
    classes = [column.removeprefix(CLASS_PREFIX) for column in class_columns]
    strange = sorted(set(samples["label"]) - set(classes))
    if strange:
        raise PleatError(f"{model} was not trained on the label(s) {', '.join(strange)}. {MEND}")
    probability = found[class_columns].to_numpy(dtype=np.float32)
    _check_probability(model, samples, probability)
    number = {name: place for place, name in enumerate(classes)}
    actual: Ints = np.array([number[label] for label in samples["label"]], dtype=np.int64)
    return Predictions(samples, classes, actual, probability)


def _read_fold(folder: Path, fold: int) -> pd.DataFrame:
    path = folder / "predictions.parquet"
    if not path.exists():
        raise PleatError(f"{path} is missing: fold {fold} of this model is not trained; run `dvc repro`.")
    return read_parquet(path)


def _check_rows(model: str, found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    twice = found["sample_id"][found["sample_id"].duplicated()]
    if len(twice):
        raise PleatError(f"{model} predicts {len(twice):,} sample(s) more than once, first {twice.iloc[0]}. {MEND}")
    for left, right, sentence in (
        (wanted, found, f"sample(s) of data/split/folds.parquet have no prediction by {model}"),
        (found, wanted, f"prediction(s) by {model} are of samples outside the folds of data/split/folds.parquet"),
    ):
        only_left = left["sample_id"][~left["sample_id"].isin(right["sample_id"])]
        if len(only_left):
            raise PleatError(f"{len(only_left):,} {sentence}, first {only_left.iloc[0]}. {MEND}")


def _check_probability(model: str, samples: pd.DataFrame, probability: npt.NDArray[np.float32]) -> None:
    wrong = ~(np.abs(probability.sum(axis=1) - 1) < 1e-3)  # so written that NaN is wrong too
    if wrong.any():
        raise PleatError(
            f"Fold {samples['fold'][wrong.argmax()]} of {model} holds {wrong.sum():,} rows whose probabilities are no "
            f"numbers or do not sum to 1: the training diverged. Lower training.{model}.learning_rate and run "
            "`dvc repro`."
        )


def read_curves(train: Path, folds: list[int]) -> pd.DataFrame:
    """Joins the folds' history.csv: columns fold, epoch, train_loss, inner_loss, inner_f1_weighted."""
    frames = []
    for fold in folds:
        path = train / f"fold_{fold}" / "history.csv"
        if not path.exists():
            raise PleatError(f"{path} is missing: fold {fold} of this model is not trained; run `dvc repro`.")
        frames.append(pd.read_csv(path).assign(fold=fold))
    return pd.concat(frames, ignore_index=True)[["fold", "epoch", "train_loss", "inner_loss", "inner_f1_weighted"]]


def fold_table(predictions: Predictions) -> pd.DataFrame:
    """One row a fold: fold, n_samples and the headline scores."""
    rows = [
        {"fold": fold, "n_samples": int(mask.sum())}
        | metrics.headlines(predictions.actual[mask], predictions.probability[mask])
        for fold, mask in predictions.folds()
    ]
    return pd.DataFrame(rows)


def summarize(predictions: Predictions, folds: pd.DataFrame) -> dict[str, Any]:
    """The content of metrics.json."""
    pooled = metrics.headlines(predictions.actual, predictions.probability)
    summary: dict[str, Any] = {
        "n_samples": len(predictions.samples),
        "n_classes": len(predictions.classes),
        "epochs": folds["best_epoch"].tolist(),
    }
    for name in metrics.HEADLINES:
        numbers = asdict(metrics.spread(folds[name].to_numpy())) | {"pooled": pooled[name]}
        summary[name] = {key: number_or_none(value) for key, value in numbers.items()}
        summary[name]["folds"] = [number_or_none(value) for value in folds[name]]
    return summary


def number_or_none(value: float) -> float | None:
    """JSON knows no NaN: an undefined number is null there."""
    return None if np.isnan(value) else float(value)


def class_table(predictions: Predictions) -> pd.DataFrame:
    """One row a class: class, support, then mean and std over folds of precision, recall, F1 and ROC-AUC.

    F1 has its 95% interval too. A fold in which a number is undefined does not count; NaN where all are undefined.
    """
    size = len(predictions.classes)
    scores, areas = [], []
    for _, mask in predictions.folds():
        actual, predicted = predictions.actual[mask], predictions.predicted[mask]
        scores.append(metrics.class_scores(actual, predicted, size))
        areas.append(metrics.roc_auc_by_class(actual, predictions.probability[mask]))
    columns: dict[str, Any] = {
        "class": predictions.classes,
        "support": np.sum([score.support for score in scores], axis=0),
    }
    for name, by_fold, keys in (
        ("precision", [score.precision for score in scores], ["mean", "std"]),
        ("recall", [score.recall for score in scores], ["mean", "std"]),
        ("f1", [score.f1 for score in scores], ["mean", "std", "ci95_low", "ci95_high"]),
        ("roc_auc", areas, ["mean", "std"]),
    ):
        spreads = [metrics.spread(one_class) for one_class in np.transpose(by_fold)]
        columns |= {f"{name}_{key}": [getattr(item, key) for item in spreads] for key in keys}
    return pd.DataFrame(columns)


def confused_pairs(predictions: Predictions) -> pd.DataFrame:
    """The most frequent mistakes: columns actual, predicted, count, share (of the actual class)."""
    wrong = predictions.actual != predictions.predicted
    names = np.array(predictions.classes, dtype=object)
    pairs = pd.DataFrame({"actual": names[predictions.actual[wrong]], "predicted": names[predictions.predicted[wrong]]})
    counts = pairs.value_counts().rename("count").reset_index()
    counts = counts.sort_values(["count", "actual", "predicted"], ascending=[False, True, True], ignore_index=True)
    support = predictions.samples["label"].value_counts()
    counts["share"] = counts["count"] / counts["actual"].map(support)
    return counts.head(N_CONFUSED_PAIRS)


def mistakes(predictions: Predictions, root: Path) -> pd.DataFrame:
    """The wrong predictions with the highest probability on the wrong class, at most `N_MISTAKES`.

    Returns:
        Columns sample_id, batch, label, predicted, probability, source_path, encoded (the image's original bytes).
    """
    wrong = predictions.actual != predictions.predicted
    names = np.array(predictions.classes, dtype=object)
    worst = predictions.samples[wrong].assign(
        predicted=names[predictions.predicted[wrong]], probability=predictions.probability[wrong].max(axis=1)
    )
    worst = worst.sort_values(["probability", "sample_id"], ascending=[False, True], ignore_index=True).head(N_MISTAKES)
    path_of: dict[str, str] = {}
    image_of: dict[str, bytes] = {}
    for batch, rows in worst.groupby("batch"):
        folder = root / "data" / "ingest" / str(batch)
        manifest = read_parquet(folder / "manifest.parquet")
        path_of |= dict(zip(manifest["sample_id"], manifest["source_path"], strict=True))
        image_of |= read_images(folder / "images.arrow", list(rows["sample_id"]))
    lost = worst["sample_id"][~worst["sample_id"].isin(path_of.keys() & image_of.keys())]
    if len(lost):
        raise PleatError(f"data/ingest does not hold the sample {lost.iloc[0]} of data/split/folds.parquet. {MEND}")
    return worst.assign(source_path=worst["sample_id"].map(path_of), encoded=worst["sample_id"].map(image_of))


def write_report(
    out: Path,
    model: str,
    predictions: Predictions,
    summary: dict[str, Any],
    folds: pd.DataFrame,
    curves: pd.DataFrame,
    worst: pd.DataFrame,
) -> None:
    """Writes the tables, the pictures and index.html into the folder `out`."""
    classes = class_table(predictions)
    n_classes = len(predictions.classes)
    confusion = confusion_matrix(predictions.actual, predictions.predicted, labels=range(n_classes))
    write_csv(out / "per_class.csv", classes)
    write_csv(out / "folds.csv", folds)

    plots.confusion(out / "confusion.png", confusion, predictions.classes)
    plots.per_class(out / "per_class.png", classes)
    by_fold = [(predictions.actual[mask], predictions.probability[mask]) for _, mask in predictions.folds()]
    plots.roc(out / "roc.png", classes, by_fold)
    plots.curves(out / "curves.png", curves, dict(zip(folds["fold"], folds["best_epoch"], strict=True)))
    plots.folds(out / "folds.png", folds, summary)
    page = pages.model_page(model, summary, folds, classes, confused_pairs(predictions), worst, pictures=out)
    write_text(out / "index.html", page)
