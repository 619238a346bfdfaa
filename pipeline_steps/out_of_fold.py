"""The out-of-fold predictions of one model on one target, joined to folds.parquet and checked."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline_steps import metrics
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_parquet
from pipeline_steps.metrics import Bools, Floats, Ints
from pipeline_steps.params import Params
from pipeline_steps.targets import Target

CLASS_PREFIX = "p:"
MEND = "The files are of different runs of the pipeline; run `dvc repro`."


@dataclass(frozen=True)
class Predictions:
    """n samples by fold and sample_id, c classes in sorted order.

    Attributes:
        target: with the classes that the model was trained on.
        samples: columns sample_id, batch, fold and `label`: a class, or the list of a multilabel target's classes.
        actual: class numbers (n,), or 0 and 1 (n, c) of a multilabel target.
        probability: (n, c).
        predicted: shaped like `actual`: the most probable class, or the classes whose probability reaches the fold's
            threshold.
        thresholds: (k, c), one row a fold, chosen on the other folds; None where the target is no multilabel one.
    """

    target: Target
    samples: pd.DataFrame
    actual: Ints
    probability: npt.NDArray[np.float32]
    predicted: Ints
    thresholds: Floats | None

    def folds(self) -> Iterator[tuple[int, Bools]]:
        """Each fold's number with the mask of its rows."""
        fold = self.samples["fold"].to_numpy()
        for number in np.unique(fold):
            yield int(number), fold == number

    def headlines(self, rows: Bools) -> dict[str, float]:
        """`metrics.headlines` of the rows of a mask."""
        return metrics.headlines(self.actual[rows], self.probability[rows], self.predicted[rows])

    def wrong(self) -> Bools:
        """Of each sample whether anything is predicted wrong, shape (n,)."""
        wrong: Bools = self.actual != self.predicted
        return np.asarray(wrong.any(axis=1)) if self.target.multilabel else wrong


def read(params: Params, model: str, name: str, root: Path) -> Predictions:
    """Joins every fold's predictions of the target `name` to folds.parquet and checks that they cover each other.

    Only the folds of `params.experiment.folds` are scored; folds.parquet may hold samples of others.

    Raises:
        PleatError: with one sentence that names the model, the target, the fold and what does not fit.
    """
    folds, what = params.experiment.folds, f"{model} ({name})"
    frames = [_read_fold(root / "data" / "train" / model / f"fold_{fold}", name, fold) for fold in folds]
    columns = list(frames[0].columns)
    for fold, frame in zip(folds, frames, strict=True):
        if list(frame.columns) != columns:
            odd = sorted(set(frame.columns) ^ set(columns)) or ["their order"]
            raise PleatError(
                f"Classes of {what} differ between fold {folds[0]} and fold {fold}: {', '.join(odd)}. {MEND}"
            )
    found = pd.concat(frames, ignore_index=True)
    wanted = read_parquet(root / "data" / "split" / "folds.parquet")
    wanted = wanted[(wanted["side"] == "train") & wanted["fold"].isin(folds)]
    _check_rows(what, found, wanted)

    settings = params.targets[name]
    classes = [column.removeprefix(CLASS_PREFIX) for column in columns if column.startswith(CLASS_PREFIX)]
    target = Target(name, settings.kind == "multilabel", settings.columns(name), classes)
    wanted = wanted.sort_values(["fold", "sample_id"], ignore_index=True)
    samples = wanted[["sample_id", "batch", "fold"]].assign(label=target.labels(wanted))
    found = found.set_index("sample_id").loc[samples["sample_id"]]
    for column in ("label", "fold"):
        differs = _comparable(found[column]) != _comparable(samples[column])
        if differs.any():
            raise PleatError(
                f"{differs.sum():,} predictions of {what} name another {column} than data/split/folds.parquet, "
                f"first sample {samples['sample_id'][differs.argmax()]}. {MEND}"
            )
    strange = sorted(set(wanted[target.columns].to_numpy(dtype=object).ravel()) - set(classes))
    if strange:
        raise PleatError(f"{what} was not trained on the label(s) {', '.join(strange)}. {MEND}")
    probability = found[[CLASS_PREFIX + one for one in classes]].to_numpy(dtype=np.float32)
    _check_probability(model, target, samples, probability)
    actual = target.codes(wanted)
    if not target.multilabel:
        return Predictions(target, samples, actual, probability, metrics.answered(probability, None), None)
    fold_numbers = samples["fold"].to_numpy()
    thresholds = metrics.cross_fitted_thresholds(actual, probability, fold_numbers)
    of_row = thresholds[np.unique(fold_numbers, return_inverse=True)[1]]
    return Predictions(target, samples, actual, probability, metrics.answered(probability, of_row), thresholds)


def _read_fold(folder: Path, name: str, fold: int) -> pd.DataFrame:
    path = folder / "predictions" / f"{name}.parquet"
    if not path.exists():
        raise PleatError(f"{path} is missing: fold {fold} of this model is not trained; run `dvc repro`.")
    return read_parquet(path)


def _comparable(column: pd.Series) -> npt.NDArray[np.object_]:
    """Values that compare as a whole: Parquet gives lists back as arrays."""
    values = np.empty(len(column), dtype=object)
    values[:] = [tuple(value) if isinstance(value, list | np.ndarray) else value for value in column]
    return values


def _check_rows(what: str, found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    twice = found["sample_id"][found["sample_id"].duplicated()]
    if len(twice):
        raise PleatError(f"{what} predicts {len(twice):,} sample(s) more than once, first {twice.iloc[0]}. {MEND}")
    for left, right, sentence in (
        (wanted, found, f"sample(s) of data/split/folds.parquet have no prediction by {what}"),
        (found, wanted, f"prediction(s) by {what} are of samples outside the folds of data/split/folds.parquet"),
    ):
        only_left = left["sample_id"][~left["sample_id"].isin(right["sample_id"])]
        if len(only_left):
            raise PleatError(f"{len(only_left):,} {sentence}, first {only_left.iloc[0]}. {MEND}")


def _check_probability(model: str, target: Target, samples: pd.DataFrame, probability: npt.NDArray[np.float32]) -> None:
    """Both conditions are so written that NaN is wrong too."""
    if target.multilabel:
        wrong, rule = ~((probability >= 0) & (probability <= 1)).all(axis=1), "lie outside 0 to 1"
    else:
        wrong, rule = ~(np.abs(probability.sum(axis=1) - 1) < 1e-3), "do not sum to 1"
    if wrong.any():
        raise PleatError(
            f"Fold {samples['fold'][wrong.argmax()]} of {model} ({target.name}) holds {wrong.sum():,} rows whose "
            f"probabilities are no numbers or {rule}: the training diverged. Lower training.{model}.learning_rate and "
            "run `dvc repro`."
        )
