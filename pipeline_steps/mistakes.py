"""The wrong predictions that a model was surest of, with their images."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_parquet
from pipeline_steps.out_of_fold import MEND, Predictions
from pipeline_steps.packed import read_images

N_MISTAKES = 24


def worst_mistakes(predictions: Predictions, root: Path) -> pd.DataFrame:
    """The images with the surest wrong predictions, at most `N_MISTAKES`, the surest first.

    Of a multilabel target an image's surest wrong decision counts: a class that it does not have, with its probability,
    or `not CLASS` for one that was missed, with 1 - probability.

    Returns:
        Columns sample_id, batch, label (in words), predicted, probability, source_path, encoded (the image's original
        bytes).

    Raises:
        PleatError: data/ingest does not hold an image.
    """
    wrong = predictions.wrong()
    worst = predictions.samples[wrong].assign(**_surest(predictions))
    if predictions.target.multilabel:
        worst["label"] = worst["label"].str.join(", ")
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


def _surest(predictions: Predictions) -> dict[str, np.ndarray]:
    """Of each wrong sample the wrong prediction and its probability."""
    wrong = predictions.wrong()
    names = np.array(predictions.target.classes, dtype=object)
    predicted, probability = predictions.predicted[wrong], predictions.probability[wrong]
    if not predictions.target.multilabel:
        return {"predicted": names[predicted], "probability": probability.max(axis=1)}
    confidence = np.where(predicted, probability, 1 - probability)
    confidence[predictions.actual[wrong] == predicted] = -1  # decisions that are right
    worst, row = confidence.argmax(axis=1), np.arange(len(confidence))
    named = np.where(predicted[row, worst], names[worst], "not " + names[worst])
    return {"predicted": named, "probability": confidence[row, worst]}
