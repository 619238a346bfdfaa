"""The card that travels with a model: what it is, what it was trained on, how well it answers, and its limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from pipeline_steps import metrics, pages, plots
from pipeline_steps.bootstrap import Holdout, f1_weighted_interval
from pipeline_steps.files import read_json, write_text
from pipeline_steps.params import Params, flat

CONFIDENCE = 0.95
FEW_IMAGES = 50  # of training: fewer are told as a limit
WEAK_RECALL = 0.5


def collect(
    params: Params,
    root: Path,
    about: dict[str, Any],
    samples: pd.DataFrame,
    classes: list[str],
    holdout: pd.DataFrame,
    travels: dict[str, Any],
) -> dict[str, Any]:
    """All that the card says.

    Args:
        about: what refit measured, as in its metrics.json.
        samples: of both sides, with label and side.
        classes: in the order of the probabilities.
        holdout: predictions on the holdout, as in holdout.parquet.
        travels: the package's about.json.
    """
    data, model = root / "data", about["model"]
    counts = read_json(data / "validate" / "counts.json")
    scored = _scores(classes, holdout)
    trained = samples[samples["side"] == "train"]["label"].value_counts()
    table = scored["classes"].assign(trained=trained.reindex(classes, fill_value=0))  # undefined scores stay NaN
    folds = read_json(data / "evaluate" / model / "metrics.json")
    return {
        "model": model,
        "data_version": travels["data_version"],
        "batches": params.experiment.batches,
        "n_train": about["n_train"],
        "n_holdout": about["n_holdout"],
        "left_out": counts["quarantine"],
        "classes": table.reset_index(names="class").to_dict("records"),
        "scores": {
            name: {
                "title": plots.LABELS[name],
                "holdout": about.get(name),
                "interval": scored["interval"] if name == "f1_weighted" else None,
                "folds": folds[name],
            }
            for name in metrics.HEADLINES
        },
        "confusion": scored["confusion"],
        "cost": read_json(data / "profile" / f"{model}.json"),
        "settings": {
            "epochs": about["epochs"],
            **flat("model", params.models[model].model_dump()),
            **flat("training", params.training[model].model_dump()),
        },
        "limits": _limits(params, table, about),
    }


def write(reports: Path, packaged: Path, card: dict[str, Any]) -> None:
    """Writes index.html and confusion.png into `reports`, and README.md into the package."""
    if card["n_holdout"]:
        plots.confusion(reports / "confusion.png", card["confusion"], [row["class"] for row in card["classes"]])
    write_text(reports / "index.html", pages.render("card.html.j2", card=card, picture=pages.pictures_of(reports)))
    write_text(packaged / "README.md", pages.render("card.md.j2", card=card))


def _scores(classes: list[str], holdout: pd.DataFrame) -> dict[str, Any]:
    size = len(classes)
    actual = np.array([classes.index(label) for label in holdout["label"]], dtype=np.int64)
    probability = holdout[[f"p:{name}" for name in classes]].to_numpy()
    predicted = probability.argmax(axis=1).astype(np.int64) if len(holdout) else actual
    scores = metrics.class_scores(actual, predicted, size)
    columns = {name: getattr(scores, name) for name in ("support", "precision", "recall", "f1")}
    interval, confusion = None, np.zeros((size, size), dtype=np.int64)
    if len(holdout):
        confusion = confusion_matrix(actual, predicted, labels=range(size))
        rows = Holdout(holdout["label"].tolist(), holdout["group"].tolist())
        found = f1_weighted_interval(rows, [classes[code] for code in predicted], CONFIDENCE)
        interval = [found.low, found.high]
    return {"classes": pd.DataFrame(columns, index=classes), "interval": interval, "confusion": confusion}


def _limits(params: Params, table: pd.DataFrame, about: dict[str, Any]) -> list[str]:
    limits = []
    few = table[table["trained"] < FEW_IMAGES]
    if len(few):
        listed = ", ".join(f"{name} ({int(n)})" for name, n in few["trained"].items())
        limits.append(f"Trained on fewer than {FEW_IMAGES} images: {listed}.")
    weak = table[(table["recall"] < WEAK_RECALL) & (table["support"] > 0)]
    if len(weak):
        found = {name: f"{round(row.recall * row.support)} of {row.support:.0f}" for name, row in weak.iterrows()}
        listed = ", ".join(f"{name} ({share})" for name, share in found.items())
        limits.append(f"Finds less than half of the holdout's images of: {listed}.")
    if not about["n_holdout"]:
        limits.append("Without a holdout (split.holdout.fraction is 0) its scores on unseen images are not known.")
    if params.split.group_by is None:
        limits.append(
            "Images of one sender may lie on both sides of the holdout, so scores on senders never seen may be lower."
        )
    limits.append(
        f"Every image gets one of the {len(table)} classes, also one that shows none of them; a low probability is the "
        "only sign. Probabilities are not calibrated."
    )
    return limits
