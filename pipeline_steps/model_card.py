"""The card that travels with a model: what it is, what it was trained on, how well it answers, and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import confusion_matrix

from pipeline_steps import metrics, pages, plots
from pipeline_steps.bootstrap import Estimate, Holdout, Labels, f1_weighted_interval, labels_of
from pipeline_steps.files import read_json, write_text
from pipeline_steps.metrics import Floats, Ints
from pipeline_steps.params import Params, flat
from pipeline_steps.params_models import Model, Training
from pipeline_steps.targets import Target

CONFIDENCE = 0.95
FEW_IMAGES = 50  # of training: fewer are told as a limit
WEAK_RECALL = 0.5


@dataclass(frozen=True)
class Held:
    """What the model answers in one target about the n samples of the holdout, c classes.

    Attributes:
        target: with the classes that the model knows.
        probability: (n, c).
        predicted: class numbers (n,), or 0 and 1 (n, c) of a multilabel target.
        thresholds: (c,), of a multilabel target from which probability on a class counts as predicted; else None.
    """

    target: Target
    probability: npt.NDArray[np.float32]
    predicted: Ints
    thresholds: Floats | None


def collect(
    params: Params,
    root: Path,
    about: dict[str, Any],
    samples: pd.DataFrame,
    held: Sequence[Held],
    data_version: str,
) -> dict[str, Any]:
    """All that the card says.

    Args:
        about: what refit measured, as in its metrics.json.
        samples: of both sides, with the label columns and side.
        held: of each target, in the order of the samples of the holdout.
        data_version: of the batches.
    """
    data, model = root / "data", about["model"]
    counts = read_json(data / "validate" / "counts.json")
    folds = read_json(data / "evaluate" / model / "metrics.json")
    rows, trained = (samples[samples["side"] == side] for side in ("holdout", "train"))
    targets = [one.target for one in held]
    mean, intervals = None, dict[str, Estimate]()
    if len(rows):
        actual = {target.name: list(map(labels_of, target.labels(rows))) for target in targets}
        answers = {one.target.name: labels_answered(one) for one in held}
        found = f1_weighted_interval(Holdout(actual, rows["group"].tolist()), answers, CONFIDENCE)
        mean, intervals = found.mean, found.targets
    sections = []
    for one in held:
        target = one.target
        scores = metrics.MULTILABEL_SCORES if target.multilabel else metrics.HEADLINES
        holdout, of_folds = about.get("targets", {}).get(target.name, {}), folds["targets"][target.name]
        section = {
            "name": target.name,
            "multilabel": target.multilabel,
            "classes": _classes(one, rows, trained).to_dict("records"),
            "scores": _scores(scores, holdout, of_folds, intervals.get(target.name)),
            "confusion": None,
            "picture": f"confusion_{target.name}" if len(targets) > 1 else "confusion",
        }
        if len(rows) and not target.multilabel:
            section["confusion"] = confusion_matrix(
                target.codes(rows), one.predicted, labels=range(len(target.classes))
            )
        sections.append(section)
    return {
        "model": model,
        "compression": None,
        "told": _told(targets),
        "data_version": data_version,
        "batches": params.experiment.batches,
        "n_train": about["n_train"],
        "n_holdout": about["n_holdout"],
        "left_out": counts["quarantine"],
        "targets": sections,
        "scores": _scores(metrics.HEADLINES, about, folds, mean),
        "n_folds": len(params.experiment.folds),
        "cost": read_json(data / "profile" / f"{model}.json"),
        "settings": {
            "epochs": about["epochs"],
            **settings_of(params.models[model], params.training[model]),
        },
        "limits": _limits(params, sections, about),
    }


def settings_of(model: Model, training: Training) -> dict[str, Any]:
    """What a model was trained with, by dotted key."""
    return flat("model", model.model_dump()) | flat("training", training.model_dump())


def write(reports: Path, packaged: Path, card: dict[str, Any]) -> None:
    """Writes index.html and pictures of confusion matrices into `reports`, and README.md into the package."""
    for target in card["targets"]:
        if target["confusion"] is not None:
            names = [row["class"] for row in target["classes"]]
            plots.confusion(reports / f"{target['picture']}.png", target["confusion"], names)
    write_text(reports / "index.html", pages.render("card.html.j2", card=card, picture=pages.pictures_of(reports)))
    write_text(packaged / "README.md", pages.render("card.md.j2", card=card))


def _told(targets: Sequence[Target]) -> str:
    """What the model tells of an image."""
    if len(targets) == 1:
        n_classes = len(targets[0].classes)
        if targets[0].multilabel:
            return f"Tells which of {n_classes} labels an image has."
        return f"Tells which of {n_classes} classes an image shows."
    listed = [
        f"{target.name} ({f'any of {n} labels' if target.multilabel else f'one of {n} classes'})"
        for target in targets
        for n in [len(target.classes)]
    ]
    return f"Tells {', '.join(listed)} of an image."


def labels_answered(held: Held) -> list[Labels]:
    """The labels that the model answers each of the n samples with."""
    applies = metrics.indicator(held.predicted, len(held.target.classes))
    return [tuple(held.target.classes[code] for code in np.flatnonzero(row)) for row in applies]


def _scores(names: Sequence[str], holdout: dict[str, Any], folds: dict[str, Any], weighted: Estimate | None) -> Any:
    """Of each score, its title, value on the holdout with an interval where there is one, and spread over folds."""
    interval = [weighted.low, weighted.high] if weighted else None
    return {
        name: {
            "title": plots.LABELS[name],
            "holdout": holdout.get(name),
            "interval": interval if name == "f1_weighted" else None,
            "folds": folds[name],
        }
        for name in names
    }


def _classes(held: Held, rows: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """One row a class; undefined scores are NaN."""
    target, size = held.target, len(held.target.classes)
    actual = target.codes(rows)
    scores = metrics.class_scores(actual, held.predicted, size)
    columns = {name: getattr(scores, name) for name in ("support", "precision", "recall", "f1")}
    if held.thresholds is not None:
        columns["ap"] = metrics.average_precision_by_class(actual, held.probability)
        columns["threshold"] = held.thresholds
    number = metrics.indicator(target.codes(trained), size).sum(axis=0)
    return pd.DataFrame({"class": target.classes, "trained": number, **columns})


def _limits(params: Params, targets: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    limits = []
    several = len(targets) > 1
    every = [
        (f"{target['name']} {row['class']}" if several else row["class"], row)
        for target in targets
        for row in target["classes"]
    ]
    few = [f"{name} ({row['trained']})" for name, row in every if row["trained"] < FEW_IMAGES]
    if few:
        limits.append(f"Trained on fewer than {FEW_IMAGES} images: {', '.join(few)}.")
    weak = [
        f"{name} ({round(row['recall'] * row['support'])} of {row['support']})"
        for name, row in every
        if row["support"] and row["recall"] < WEAK_RECALL
    ]
    if weak:
        limits.append(f"Finds less than half of the holdout's images of: {', '.join(weak)}.")
    if not about["n_holdout"]:
        limits.append("Without a holdout (split.holdout.fraction is 0) its scores on unseen images are not known.")
    if params.split.group_by is None:
        limits.append(
            "Images of one sender may lie on both sides of the holdout, so scores on senders never seen may be lower."
        )
    one, any_number = ([t for t in targets if t["multilabel"] is multilabel] for multilabel in (False, True))
    if one:
        of = f"class of {_listed(one)}" if several else f"of the {len(one[0]['classes'])} classes"
        limits.append(
            f"Every image gets one {of}, also one that shows none of them; a low probability is the only sign."
        )
    if any_number:
        of = f"label of {_listed(any_number)}" if several else f"one of the {len(any_number[0]['classes'])} labels"
        limits.append(
            f"An image gets every {of} whose probability reaches the label's threshold; that may be none, and labels "
            "that exclude each other."
        )
    limits[-1] += " Probabilities are not calibrated."
    return limits


def _listed(targets: Sequence[dict[str, Any]]) -> str:
    return ", ".join(target["name"] for target in targets)
