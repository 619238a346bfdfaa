"""A model of two multiclass targets and a multilabel one, refitted and packaged, and its answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from refit_workspace import COLOURS, GARMENTS, TAGS, TARGETS, drawn_with_targets, make
from refit_workspace import settings as params

from pipeline_steps import refit
from pipeline_steps.serving.pyfunc import ImageModel

CLASSES = {"garment": sorted(GARMENTS), "tags": TAGS, "colour": sorted(COLOURS)}
SETTINGS = params(targets=TARGETS)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `refit`; tests only read it."""
    root = make(tmp_path_factory.mktemp("with_targets"), SETTINGS, drawn_with_targets())
    refit.run(SETTINGS, root)
    return root


def answers(model: ImageModel, images: list[bytes], **more: Any) -> list[dict[str, Any]]:
    """The model's rows."""
    frame = pd.DataFrame({"image": pd.Series(images, dtype=object)})
    return model.predict(None, frame, more or None).to_dict("records")


def served(rows: list[dict[str, Any]], target: str) -> np.ndarray:
    """Probabilities in the order of the classes, from rows that list all labels."""
    found = [{entry["label"]: entry["probability"] for entry in row[f"{target}_top_k"]} for row in rows]
    return np.array([[row[name] for name in CLASSES[target]] for row in found])


def reaching(row: np.ndarray, names: list[str], limits: list[float]) -> list[str]:
    return [name for name, value, limit in zip(names, row, limits, strict=True) if value >= limit]
