"""What `evaluate` and `compare` read, made up: drawn images, folds and predictions of any skill."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline_steps.params import Experiment, Params

CLASSES = ["Dress", "Hat", "Longsleeve with a rather long name", "Pants", "Shoes", "T-Shirt"]
BATCHES = ("first", "second")
EXIF_ORIENTATION = 0x0112


def params(models: Sequence[str], n_folds: int = 3) -> Params:
    """Params that hold only what the two stages read."""
    experiment = Experiment.model_construct(models=list(models), folds=list(range(n_folds)))
    return Params.model_construct(experiment=experiment)


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
    root: Path, classes: Sequence[str] = CLASSES, n: int = 120, n_folds: int = 3, source_path: str = "images/{}.jpg"
) -> pd.DataFrame:
    """Writes data/ingest and data/split; every fifth sample is of the holdout. Returns folds.parquet."""
    rng = np.random.default_rng(0)
    images = [draw(number, rng) for number in range(n)]
    frame = pd.DataFrame({"sample_id": [hashlib.sha256(encoded).hexdigest() for encoded in images]})
    frame["batch"] = [BATCHES[number % 2] for number in range(n)]
    frame["label"] = [classes[number % len(classes)] for number in range(n)]
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
    root: Path, model: str, folds: pd.DataFrame, classes: Sequence[str] = CLASSES, skill: float = 1.5, macs: int = 10**6
) -> None:
    """Writes data/train/MODEL and data/profile/MODEL.json; the higher the skill, the more predictions are right."""
    rng = np.random.default_rng(len(model) + sum(map(ord, model)))
    names = sorted(classes)
    for fold, rows in folds[folds["side"] == "train"].groupby("fold"):
        logits = rng.normal(size=(len(rows), len(names)))
        logits[np.arange(len(rows)), [names.index(label) for label in rows["label"]]] += skill
        odds = np.exp(logits)
        probability = pd.DataFrame(odds / odds.sum(axis=1, keepdims=True), columns=[f"p:{name}" for name in names])
        folder = root / "data" / "train" / model / f"fold_{fold}"
        folder.mkdir(parents=True)
        predictions = rows[["sample_id", "fold", "label"]].reset_index(drop=True)
        pd.concat([predictions, probability.astype(np.float32)], axis=1).to_parquet(folder / "predictions.parquet")
        epochs = np.arange(1, 7)
        history = {"epoch": epochs, "train_loss": 2 / epochs, "inner_loss": 2 / epochs + 0.1 * epochs}
        pd.DataFrame(history | {"inner_f1_weighted": 1 - 0.7 / epochs}).to_csv(folder / "history.csv", index=False)
        (folder / "metrics.json").write_text(json.dumps({"best_epoch": 5, "epochs": 6, "key": f"key of fold {fold}"}))
    (root / "data" / "profile").mkdir(parents=True, exist_ok=True)
    profile = {"params": 1234, "macs": macs, "input_size": 64}
    (root / "data" / "profile" / f"{model}.json").write_text(json.dumps(profile))
