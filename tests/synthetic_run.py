"""What `evaluate` and `compare` read, made up: drawn images, folds and predictions of any skill."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from pipeline_steps.params import Experiment, Params, Target

CLASSES = ["Dress", "Hat", "Longsleeve with a rather long name", "Pants", "Shoes", "T-Shirt"]
LABEL = {"label": CLASSES}  # label columns with their classes
# Of "grey" there are trousers only, and both columns have a class "other".
APPAREL = {
    "colour": ["black", "blue", "green", "grey", "other", "red"],
    "garment": ["dress", "other", "shirt", "shoes"],
}
TAGS = {
    "colour": ["black", "blue", "green", "red"],
    "garment": ["dress", "shirt", "shoes"],
    "season": ["summer", "winter"],
}
ONE = {"label": {"kind": "multiclass"}}
TWO = {"colour": {"kind": "multiclass"}, "garment": {"kind": "multiclass"}}
MANY = {"tags": {"kind": "multilabel", "of": ["colour", "garment", "season"]}}
BATCHES = ("first", "second")
EXIF_ORIENTATION = 0x0112


def params(models: Sequence[str], n_folds: int = 3, targets: Mapping[str, Any] = ONE) -> Params:
    """Params that hold only what the stages evaluate and compare read."""
    experiment = Experiment.model_construct(models=list(models), folds=list(range(n_folds)))
    return Params.model_construct(
        experiment=experiment, targets=TypeAdapter(dict[str, Target]).validate_python(dict(targets))
    )


def draw(number: int, rng: np.random.Generator) -> bytes:
    """A small JPEG, now and then lying on its side with an EXIF note that says so."""
    image = Image.new("RGB", (48, 64), tuple(int(value) for value in rng.integers(150, 256, 3)))
    box = sorted(rng.integers(4, 44, 2)), sorted(rng.integers(4, 60, 2))
    colour = tuple(int(value) for value in rng.integers(0, 150, 3))
    ImageDraw.Draw(image).ellipse([box[0][0], box[1][0], box[0][1] + 4, box[1][1] + 4], fill=colour)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6 if number % 7 == 0 else 1
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    return out.getvalue()


def make_data(
    root: Path,
    columns: Mapping[str, Sequence[str]] = LABEL,
    n: int = 120,
    n_folds: int = 3,
    source_path: str = "images/{}.jpg",
) -> pd.DataFrame:
    """Writes data/ingest and data/split; every fifth sample is of the holdout. Returns folds.parquet."""
    rng = np.random.default_rng(0)
    images = [draw(number, rng) for number in range(n)]
    frame = pd.DataFrame({"sample_id": [hashlib.sha256(encoded).hexdigest() for encoded in images]})
    frame["batch"] = [BATCHES[number % 2] for number in range(n)]
    for place, (column, classes) in enumerate(columns.items()):
        # Each class of the first column in turn; the further ones at random, but each class often enough.
        numbers = np.arange(n) % len(classes)
        frame[column] = [classes[number] for number in (rng.permutation(numbers) if place else numbers)]
    frame["group"] = frame["sample_id"]
    frame["side"] = np.where(np.arange(n) % 5 == 4, "holdout", "train")
    frame["fold"] = np.where(frame["side"] == "train", rng.permutation(n) % n_folds, -1)
    for batch in BATCHES:
        folder = root / "data" / "ingest" / batch
        folder.mkdir(parents=True)
        rows = np.flatnonzero(frame["batch"] == batch)
        manifest = frame.loc[rows, ["sample_id", "batch"]]
        manifest.assign(source_path=[source_path.format(row) for row in rows]).to_parquet(folder / "manifest.parquet")
        table = pa.table(
            {
                "sample_id": pa.array(frame["sample_id"][rows].tolist(), pa.string()),
                "bytes": pa.array([images[row] for row in rows], pa.large_binary()),
            }
        )
        with pa.OSFile(str(folder / "images.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=16)
    (root / "data" / "split").mkdir(parents=True)
    frame.to_parquet(root / "data" / "split" / "folds.parquet")
    return frame


def make_model(
    root: Path,
    model: str,
    folds: pd.DataFrame,
    columns: Mapping[str, Sequence[str]] = LABEL,
    targets: Mapping[str, Any] = ONE,
    skill: float = 1.5,
    macs: int = 10**6,
) -> None:
    """Writes data/train/MODEL and data/profile/MODEL.json; the higher the skill, the more predictions are right."""
    rng = np.random.default_rng(len(model) + sum(map(ord, model)))
    for fold, rows in folds[folds["side"] == "train"].groupby("fold"):
        folder = root / "data" / "train" / model / f"fold_{fold}"
        (folder / "predictions").mkdir(parents=True)
        for name, target in targets.items():
            read_from = target.get("of", [name])
            classes = sorted(label for column in read_from for label in columns[column])
            labels = [set(row) for row in rows[read_from].to_numpy()]
            applies = np.array([[label in row for label in classes] for row in labels])
            logits = rng.normal(size=applies.shape) + skill * applies
            if target["kind"] == "multilabel":
                logits = 2 * logits - skill - 1  # so low that 0.5 is a poor threshold
                odds, label = 1 / (1 + np.exp(-logits)), [sorted(row) for row in labels]
            else:
                odds, label = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rows[name].to_list()
            probability = pd.DataFrame(odds.astype(np.float32), columns=[f"p:{one}" for one in classes])
            keys = rows[["sample_id", "fold"]].reset_index(drop=True).assign(label=label)
            pd.concat([keys, probability], axis=1).to_parquet(folder / "predictions" / f"{name}.parquet")
        epochs = np.arange(1, 7 + int(fold) % 2)  # the folds differ in how long they were trained
        history = {
            "epoch": epochs,
            "train_loss": 2 / epochs,
            "train_accuracy": 1 - 0.5 / epochs,
            "inner_loss": 2 / epochs + 0.1 * epochs + 0.02 * int(fold),
            "inner_accuracy": 1 - 0.6 / epochs - 0.01 * int(fold),
            "inner_f1_weighted": 1 - 0.7 / epochs - 0.01 * int(fold),
        }
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        about = {"best_epoch": 5, "epochs": len(epochs), "key": f"key of fold {fold}"}
        (folder / "metrics.json").write_text(json.dumps(about))
    (root / "data" / "profile").mkdir(parents=True, exist_ok=True)
    profile = {"params": 1234, "macs": macs, "input_size": 64}
    (root / "data" / "profile" / f"{model}.json").write_text(json.dumps(profile))
