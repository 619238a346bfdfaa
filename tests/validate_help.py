"""Running the stage `validate` on hand-made manifests of one or two label columns."""

from pathlib import Path
from typing import Any

import pandas as pd
from conftest import load_params, names

from pipeline_steps import validate
from pipeline_steps.files import read_json


def run(root: Path, targets: Any = None, **overrides: Any) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    keys = {f"labels.{key}": value for key, value in overrides.items()}
    keys |= {"experiment.batches": names(root / "data" / "ingest"), "targets": targets or {"label": MULTICLASS}}
    validate.run(load_params({"labels.drop": [], "labels.merge": {}} | keys), root)
    folder = root / "data" / "validate"
    return (
        pd.read_parquet(folder / "manifest.parquet"),
        pd.read_parquet(folder / "quarantine.parquet"),
        read_json(folder / "counts.json"),
    )


def labelled(*labels: str) -> list[dict[str, Any]]:
    return [{"label": label} for label in labels]


def coloured(*labels: tuple[str, str], **values: Any) -> list[dict[str, Any]]:
    return [{"colour": colour, "garment": garment, "given": "train"} | values for colour, garment in labels]


def suite(root: Path, text: str) -> None:
    (root / validate.SUITE).write_text(text)


def entry(expect: str = "expect_column_values_to_be_between", **values: Any) -> str:
    values = {"expect": expect, "severity": "critical", "why": "so it is", "advice": "Mend it."} | values
    return "- " + "\n  ".join(f"{key}: {value}" for key, value in values.items() if value is not None)


MULTICLASS = {"kind": "multiclass"}
BOTH = {"colour": MULTICLASS, "garment": MULTICLASS}
ENOUGH = labelled(*["Hat"] * 6, *["Pants"] * 6)
TWELVE = coloured(*[("red", "dress")] * 6, *[("blue", "shirt")] * 6)
