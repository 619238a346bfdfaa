"""A workspace as `refit` leaves it, with models whose answers are known: they look at an image's colour."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from conftest import encode, load_params, write_params
from mlflow.tracking import MlflowClient
from PIL import Image
from torch import nn

from pipeline_steps import package
from pipeline_steps.ingest import PACK_SCHEMA
from pipeline_steps.params import Params
from pipeline_steps.serving import TRAINED_ON
from pipeline_steps.targets import Target

CLASSES = ["blue", "green", "red"]
COLOURS = {"blue": (20, 20, 220), "green": (20, 220, 20), "red": (220, 20, 20)}
CHANNEL = {"red": 0, "green": 1, "blue": 2}
LABEL = Target("label", False, ["label"], CLASSES)
# What else the models can be asked for, by the same three outputs.
TAGS = Target("tags", True, ["label"], CLASSES)
# A busy machine makes equal models differ in time, but not by that much.
SETTINGS = {"experiment.models": ["cnn_tiny"], "experiment.folds": [0, 1], "promotion.max_cost.latency": 5.0}


class Colour(nn.Module):
    """Names the class of the strongest channel; `says` gives other names to the channels red, green and blue.

    Args:
        says: for each channel the class that it stands for.
        unsure: images whose strongest channel is weaker than this are called by the first class.
        work: matrix products done on the way, to be slow.
    """

    def __init__(self, says: Sequence[str] = ("red", "green", "blue"), unsure: float = 0.0, work: int = 0) -> None:
        super().__init__()
        table = torch.zeros(3, len(CLASSES))
        for channel, name in enumerate(says):
            table[channel, CLASSES.index(name)] = 1.0
        self.table = nn.Parameter(table)
        self.unsure, self.work = unsure, work
        self.load = nn.Parameter(torch.eye(512))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        means = pixels.float().mean(dim=(2, 3)) / 255
        logits = 10 * (means @ self.table)
        weak = (means.max(dim=1, keepdim=True).values < self.unsure).float()
        first = torch.nn.functional.one_hot(torch.tensor([0]), len(CLASSES)).float() * 10
        logits = logits * (1 - weak) + first * weak
        extra = means.mean() * self.load
        for _ in range(self.work):
            extra = extra @ self.load
        return logits + 0.0 * extra.mean()


class Beside(nn.Module):
    """One of them for each target; logits of wrong classes are negative, so that their sigmoids are near 0."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(part) for part in parts)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(pixels) - 4 for part in self.parts], dim=1)


def image(label: str, number: int, strength: float = 1.0) -> bytes:
    """A nearly plain picture, each a little different."""
    noise = np.random.default_rng(number).integers(-15, 16, (24, 24, 3))
    colour = np.array(COLOURS[label]) * strength
    return encode(Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)))


def settings(**overrides: Any) -> Params:
    return load_params(SETTINGS | overrides)


def make(root: Path, a_class: int = 20, weak: int = 0) -> pd.DataFrame:
    """Writes what `register` reads beside the package: images, folds, keys. Returns the holdout's rows.

    Args:
        a_class: images of each class in the holdout.
        weak: how many of those, in each class, are dark.
    """
    write_params(root, SETTINGS)
    rows, encoded = [], []
    for label in CLASSES:
        for number in range(a_class):
            encoded.append(image(label, len(encoded), 0.5 if number < weak else 1.0))
            rows.append({"sample_id": hashlib.sha256(encoded[-1]).hexdigest(), "batch": "sample", "label": label})
    frame = pd.DataFrame(rows)
    frame["group"] = frame["sample_id"]
    (root / "data" / "ingest" / "sample").mkdir(parents=True)
    table = pa.table(
        [frame["sample_id"], pa.array(encoded, pa.large_binary()), [True] * len(frame)], schema=PACK_SCHEMA
    )
    with (
        pa.OSFile(str(root / "data/ingest/sample/images.arrow"), "wb") as file,
        pa.ipc.new_file(file, PACK_SCHEMA) as out,
    ):
        out.write_table(table)
    (root / "data" / "split").mkdir()
    frame.assign(side="holdout", fold=-1).to_parquet(root / "data" / "split" / "folds.parquet")
    (root / "reports" / "models" / "cnn_tiny").mkdir(parents=True)
    (root / "reports" / "models" / "cnn_tiny" / "keys.json").write_text(json.dumps({"0": "a", "1": "b"}))
    (root / "reports" / "model_card").mkdir()
    (root / "reports" / "model_card" / "index.html").write_text("<p>card")
    return frame


def put_model(
    root: Path,
    rows: pd.DataFrame,
    network: nn.Module,
    trained_on: Sequence[str] = (),
    targets: Sequence[Target] = (LABEL,),
    threshold: float = 0.5,
) -> str:
    """Makes `network` the refitted model, with three outputs for each target; returns its package's digest.

    Every class of a multilabel target has the same threshold.
    """
    folder = root / "data" / "refit" / "package"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": "cnn_tiny", "max_pixels": 10**7, "data_version": "sample=1.dir",
        "preprocessing": {"resize": 16, "crop": 16, "interpolation": "bilinear"},
        "thresholds": {target.name: [threshold] * len(CLASSES) for target in targets if target.multilabel},
    }  # fmt: skip
    package.write(folder, package.Answering(network, targets, mirror=False), 16, about, image("red", 1000))
    (folder / TRAINED_ON).write_text("".join(f"{name}\n" for name in trained_on))
    digest = package.digest(folder)
    metrics = {"model": "cnn_tiny", "epochs": 3, "n_train": 100, "n_holdout": len(rows), "package": digest}
    metrics["holdout"] = hashlib.sha256("".join(rows["sample_id"] + rows["label"]).encode()).hexdigest()
    (root / "data" / "refit" / "metrics.json").write_text(json.dumps(metrics))
    (root / "data" / "refit" / "holdout").mkdir(exist_ok=True)
    for target in targets:
        table = rows.assign(label=target.labels(rows))
        table.to_parquet(root / "data" / "refit" / "holdout" / f"{target.name}.parquet")
    return digest


def aliases(uri: str, name: str = "pleat") -> dict[str, str]:
    """Alias to version, as MLflow itself says."""
    return {alias: str(version) for alias, version in MlflowClient(uri).get_registered_model(name).aliases.items()}


def versions(uri: str, name: str = "pleat") -> list[str]:
    return sorted((str(item.version) for item in MlflowClient(uri).search_model_versions(f"name='{name}'")), key=int)
