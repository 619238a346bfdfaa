"""A packaged model and its answers."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from refit_workspace import CLASSES

from pipeline_steps.serving.pyfunc import ImageModel

CLOSE = 1e-4
COLUMNS = ["label", "label_probability", "label_top_k", "error"]


@pytest.fixture(scope="session")
def packaged(refitted: Path) -> Path:
    return refitted / "data" / "refit" / "package"


@pytest.fixture(scope="session")
def model(packaged: Path) -> ImageModel:
    return load(packaged)


@pytest.fixture
def own(packaged: Path, tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    return Path(shutil.copytree(packaged, tmp_path / "package"))


def load(folder: Path) -> ImageModel:
    loaded = ImageModel()
    loaded.load_context(SimpleNamespace(artifacts={"package": str(folder)}))
    return loaded


def ask(model: ImageModel, *images: Any, **more: Any) -> list[dict[str, Any]]:
    """The model's rows."""
    answers = model.predict(None, pd.DataFrame({"image": pd.Series(images, dtype=object)}), more or None)
    assert list(answers) == COLUMNS
    return answers.to_dict("records")


def vector(row: dict[str, Any], classes: list[str] = CLASSES) -> np.ndarray:
    """A row's probabilities in the order of the classes."""
    assert row["error"] is None
    listed = {entry["label"]: entry["probability"] for entry in row["label_top_k"]}
    assert sorted(listed) == sorted(classes)
    return np.array([listed[name] for name in classes])


def check_row(row: dict[str, Any]) -> None:
    """An answer is consistent in itself."""
    ranked = [entry["probability"] for entry in row["label_top_k"]]
    assert ranked == sorted(ranked, reverse=True)
    assert sum(ranked) == pytest.approx(1, abs=1e-5)
    assert (row["label"], row["label_probability"]) == tuple(row["label_top_k"][0].values())
