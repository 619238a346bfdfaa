"""The refitted model as what the techniques start from, and what they have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline_steps import model_card, targets
from pipeline_steps.files import read_json, read_parquet
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params
from pipeline_steps.params_models import CustomCnn, Model, ScratchModel, Training
from pipeline_steps.prepare import IMAGES_A_CHUNK, sha256
from pipeline_steps.targets import Target
from pipeline_steps.versions import digest
from pipeline_steps.vision.weights import check_weights


class NotPossibleError(Exception):
    """The technique cannot be used on this model; the message is a sentence without its full stop."""


@dataclass(frozen=True)
class Made:
    """What a technique gave beside the package.

    Attributes:
        params: of the network; `macs` and `input_size` (pixels a side) of one image.
        told: what was done, a phrase.
        epochs: of the last training that the weights come from; `settings`: those of it, by dotted key.
    """

    params: int
    macs: int
    input_size: int
    told: str
    epochs: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Refitted:
    """What `refit` left in the workspace `root`; `scratch` is a folder for what only this stage needs."""

    settings_of_all: Params
    root: Path
    scratch: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """data/refit/metrics.json."""
        return dict(read_json(self.root / "data" / "refit" / "metrics.json"))

    @property
    def package(self) -> Path:
        """Its package's folder."""
        return self.root / "data" / "refit" / "package"

    @property
    def model(self) -> str:
        """Its name in params.yaml."""
        return str(self.about["model"])

    @property
    def settings(self) -> Model:
        """Its block of `models`."""
        return self.settings_of_all.models[self.model]

    @property
    def training(self) -> Training:
        """Its block of `training`."""
        return self.settings_of_all.training[self.model]

    @cached_property
    def travels(self) -> dict[str, Any]:
        """Its package's about.json."""
        return dict(read_json(self.package / "about.json"))

    @cached_property
    def samples(self) -> pd.DataFrame:
        """All samples, in the order of their ids, as `train.load_inputs` puts them."""
        found = read_parquet(self.root / "data" / "split" / "folds.parquet")
        return found.sort_values("sample_id").reset_index(drop=True)

    @cached_property
    def targets(self) -> list[Target]:
        """What is learned."""
        return targets.of(self.settings_of_all.targets, self.samples)

    @property
    def cost(self) -> dict[str, int]:
        """`params`, `macs` and `input_size`, as the stage profile counted them."""
        found = read_json(self.root / "data" / "profile" / f"{self.model}.json")
        return {name: int(found[name]) for name in ("params", "macs", "input_size")}

    @property
    def made(self) -> Made:
        """The same of the refitted model itself."""
        settings = model_card.settings_of(self.settings, self.training)
        return Made(**self.cost, told="", epochs=int(self.about["epochs"]), settings=settings)

    @property
    def key(self) -> str:
        """Names the model and the samples of both sides: by it what lies in `scratch` is found again."""
        return digest(self.about["package"], self.about["holdout"])[:16]

    def weights_of(self, settings: Model) -> str:
        """Names the contents of a model's weights file; empty where it has none.

        Raises:
            PleatError: the file does not exist, or is none of safetensors.
        """
        if isinstance(settings, CustomCnn | ScratchModel) or settings.weights is None:
            return ""
        file = self.root / settings.weights
        check_weights(settings.backbone, file)
        return sha256(file)

    def encoded(self, rows: pd.DataFrame) -> Iterator[bytes]:
        """The images of these samples as they were ingested, in their order, a few of them in memory at a time."""
        for start in range(0, len(rows), IMAGES_A_CHUNK):
            chunk = rows.iloc[start : start + IMAGES_A_CHUNK]
            found: dict[str, bytes] = {}
            for batch, part in chunk.groupby("batch"):
                pack = self.root / "data" / "ingest" / str(batch) / "images.arrow"
                found |= read_images(pack, part["sample_id"].tolist())
            yield from (found[sample_id] for sample_id in chunk["sample_id"])

    def training_pixels(self, n: int, preprocessing: dict[str, Any]) -> npt.NDArray[np.uint8]:
        """Up to `n` images of the training side as a network sees them, uint8 (n, 3, size, size), always the same."""
        from pipeline_steps.serving.images import decode, resize_crop

        rows = self.samples[self.samples["side"] == "train"]
        seed = self.settings_of_all.experiment.seed
        rows = rows.sample(min(n, len(rows)), random_state=seed)
        pixels = [resize_crop(decode(image, _plain_jpeg(image)), **preprocessing) for image in self.encoded(rows)]
        return np.stack([one.numpy() for one in pixels])


def _plain_jpeg(encoded: bytes) -> bool:
    from pipeline_steps.serving.upright import is_plain_jpeg, open_image

    with open_image(encoded) as opened:
        return is_plain_jpeg(opened)
