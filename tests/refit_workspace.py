"""A workspace in which all that `refit` reads exists: images ingested and prepared, folds and their scores made up.

Every fourth image is of the holdout; the folds chose `BEST_EPOCHS`. With `TARGETS` a label such as red_hat stands for
the columns colour and garment.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conftest import draw, encode, load_params, write_batch
from PIL import Image

from pipeline_steps import ingest, prepare, profile, targets
from pipeline_steps.files import write_json, write_parquet
from pipeline_steps.metrics import HEADLINES, MULTILABEL_SCORES
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params
from pipeline_steps.targets import label_columns
from pipeline_steps.train import answers

MODEL, BATCH = "chosen", "batch"
BEST_EPOCHS = [2, 6, 3]  # of the folds; the median is neither the mean nor the last
EPOCHS = 3
CLASSES = ["<script>alert(1)</script>", "Hat|Cap", "Pants"]
TINTS = dict(zip(CLASSES, [(220, 30, 30), (30, 200, 40), (40, 40, 230)], strict=True))
TRAINING = {
    "head": {"hidden": 0, "dropout": 0.1}, "max_epochs": 8, "patience": 8, "inner_fraction": 0.2, "batch_size": 8,
    "learning_rate": 0.02, "weight_decay": 0.01, "loss": {"kind": "cross_entropy"}, "label_smoothing": 0.0,
    "class_weights": "balanced", "weight_average": 0.5, "mirror": True,
}  # fmt: skip
CNN = {
    "kind": "custom_cnn", "input_size": 32,
    "blocks": [{"filters": 8, "kernel": 3, "pool": 2}, {"filters": 12, "kernel": 3, "pool": 2}],
}  # fmt: skip
# In another order than that of their names, and the multilabel one in the middle.
TARGETS: dict[str, Any] = {
    "garment": {"kind": "multiclass"},
    "tags": {"kind": "multilabel", "of": ["garment", "colour"]},
    "colour": {"kind": "multiclass"},
}
COLOURS = {"blue": (40, 40, 230), "green": (30, 200, 40), "red": (220, 30, 30)}
GARMENTS = {"hat": (0, 32), "shoe": (32, 64)}  # which rows of the picture are bright
TAGS = sorted([*COLOURS, *GARMENTS])
QUARANTINED = {"undecodable": 3, "dropped label": 1307}


def settings(model: Mapping[str, Any] = CNN, **overrides: Any) -> Params:
    experiment = {"experiment.models": [MODEL], "experiment.batches": [BATCH], "experiment.folds": [0, 1, 2]}
    return load_params({**experiment, "models": {MODEL: model}, "training": {MODEL: TRAINING}, **overrides})


def drawn(n: int = 48) -> dict[str, tuple[str, bytes]]:
    """Images that a small network learns in a few epochs: blobs under the colour of their class."""
    images = {}
    for number in range(n):
        label = CLASSES[(0, 1, 2, 0)[number % 4]]  # so that weighted and macro scores differ
        tinted = Image.blend(draw(number), Image.new("RGB", (48, 64), TINTS[label]), 0.25)
        images[f"{number:03d}"] = (label, encode(tinted, quality=90))
    return images


def drawn_with_targets(n: int = 72) -> dict[str, tuple[str, bytes]]:
    """Images of a colour that are bright above or below."""
    images = {}
    for number in range(n):
        colour, garment = list(COLOURS)[number % 3], list(GARMENTS)[number // 3 % 2]
        tinted = Image.blend(draw(number), Image.new("RGB", (48, 64), COLOURS[colour]), 0.35)
        first, last = GARMENTS[garment]
        tinted.paste(
            Image.blend(tinted, Image.new("RGB", (48, 64), "white"), 0.6).crop((0, first, 48, last)), (0, first)
        )
        images[f"{number:03d}"] = (f"{colour}_{garment}", encode(tinted, quality=90))
    return images


def photos(real_data: Path, n: int = 60) -> dict[str, tuple[str, bytes]]:
    """As many photos of shoes, of pants and of dresses, from the real clothing images."""
    folder, images, left = real_data / "data" / "clothing", {}, dict.fromkeys(("Shoes", "Pants", "Dress"), n // 3)
    with (folder / "images.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            path = folder / "images" / f"{row['image']}.jpg"
            if left.get(row["label"], 0) and path.exists():
                left[row["label"]] -= 1
                images[row["image"]] = (row["label"], path.read_bytes())
    return images


def frozen(real_data: Path) -> dict[str, Any]:
    weights = real_data / "weights" / "mobilenetv2_100.safetensors"
    return {"kind": "frozen", "backbone": "mobilenetv2_100", "weights": str(weights)}


def make(root: Path, params: Params, images: Mapping[str, tuple[str, bytes]]) -> Path:
    """Writes the workspace; `images` are label and encoded bytes by id."""
    write_batch(
        root, BATCH, {name: label for name, (label, _) in images.items()},
        {f"{name}.jpg": encoded for name, (_, encoded) in images.items()},
    )  # fmt: skip
    ingest.run(params, BATCH, root)
    prepare.run(params, MODEL, BATCH, root)
    rows = pd.read_parquet(root / "data" / "ingest" / BATCH / "manifest.parquet")[["sample_id", "batch", "label"]]
    assert len(rows) == len(images)
    rows["group"] = rows["sample_id"]
    place = rows.groupby("label").cumcount()
    if "colour" in label_columns(params.targets):
        rows[["colour", "garment"]] = rows.pop("label").str.split("_", expand=True)
    rows["side"] = np.where(place % 4 == 3, "holdout", "train")
    rows["fold"] = np.where(rows["side"] == "train", place % 3, -1)
    (root / "data" / "split").mkdir(parents=True)
    write_folds(root, lambda _: rows)
    for fold, best in enumerate(BEST_EPOCHS):
        about = {"best_epoch": best, "epochs": 8, "key": f"key of fold {fold}"}
        write_json(root / "data" / "train" / MODEL / f"fold_{fold}" / "metrics.json", about)
    spread = {"mean": 0.8, "std": 0.04, "ci95_low": 0.7, "ci95_high": 0.9, "folds": [0.76, 0.8, 0.84], "pooled": 0.8}
    scores = dict.fromkeys(HEADLINES, spread) | {"n_samples": 36, "n_classes": 3, "epochs": BEST_EPOCHS}
    scores["targets"] = {name: dict.fromkeys(MULTILABEL_SCORES, spread) for name in params.targets}
    write_json(root / "data" / "evaluate" / MODEL / "metrics.json", scores)
    write_json(root / "data" / "validate" / "counts.json", {"quarantine": QUARANTINED})
    write_json(root / "data" / "compare" / "chosen.json", {"model": MODEL})
    profile.run(params, MODEL, root)
    write_predictions(root, params)
    return root


def write_predictions(root: Path, params: Params) -> None:
    """Writes out-of-fold predictions of multilabel targets, made up so that each class has another best threshold."""
    samples = folds(root).reset_index()
    for target in [target for target in targets.of(params.targets, samples) if target.multilabel]:
        for fold in params.experiment.folds:
            rows = samples[samples["fold"] == fold]
            shift = np.linspace(-1, 1, len(target.classes))
            shape = (len(rows), len(target.classes))
            logits = 2 * target.codes(rows) - 1 + shift + np.random.default_rng(fold).normal(0, 1, shape)
            path = root / "data" / "train" / MODEL / f"fold_{fold}" / "predictions" / f"{target.name}.parquet"
            probability = (1 / (1 + np.exp(-logits))).astype(np.float32)
            write_parquet(path, answers(rows, ["sample_id", "fold"], target, probability))


def write_folds(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Writes folds.parquet anew, as `change` makes it of what it is."""
    path = root / "data" / "split" / "folds.parquet"
    change(pd.read_parquet(path) if path.exists() else pd.DataFrame()).to_parquet(path, index=False)


def folds(root: Path) -> pd.DataFrame:
    """The samples, by id."""
    return pd.read_parquet(root / "data" / "split" / "folds.parquet").set_index("sample_id")


def encoded_images(root: Path, sample_ids: Sequence[str]) -> list[bytes]:
    """The images as they were ingested, in this order."""
    found = read_images(root / "data" / "ingest" / BATCH / "images.arrow", list(sample_ids))
    return [found[sample_id] for sample_id in sample_ids]


def holdout(root: Path, target: str = "label") -> pd.DataFrame:
    """What refit answered on the holdout."""
    return pd.read_parquet(root / "data" / "refit" / "holdout" / f"{target}.parquet")


def probabilities(rows: pd.DataFrame) -> np.ndarray:
    """The columns p:CLASS of `holdout`, (n, c)."""
    return rows[[name for name in rows if name.startswith("p:")]].to_numpy()
