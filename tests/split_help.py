"""What the tests of `split` share: the tables of the stages before, and one run of the stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conftest import load_params, names

from pipeline_steps import split
from pipeline_steps.params import Holdout

LABEL = {"label": {"kind": "multiclass"}}


def side_of(name: str, fraction: float = 0.5) -> str:
    return "holdout" if split.in_holdout(name, Holdout(fraction=fraction, salt="pleat")) else "train"


def two_sides() -> tuple[str, str]:
    """A sample of the training part and one of the holdout."""
    ids = [f"{number:064x}" for number in range(20)]
    return next(name for name in ids if side_of(name) == "train"), next(
        name for name in ids if side_of(name) == "holdout"
    )


def write_data(root: Path, batches: dict[str, list[dict[str, Any]]], dropped: tuple[str, ...] = ()) -> None:
    """What `ingest` and `validate` leave; rows without phash get one far from all others."""
    validated = []
    rng = np.random.default_rng(0)
    for batch, rows in batches.items():
        filled = [
            {
                "sample_id": f"{batch}{number}".encode().hex().rjust(64, "0"),
                "batch": batch,
                "source_path": f"images/{number}.jpg",
                "sender_id": "",
                "given": "",
                "phash": rng.bytes(8).hex(),
                **row,
            }
            for number, row in enumerate(rows)
        ]
        (root / "data" / "ingest" / batch).mkdir(parents=True)
        validated.append(pd.DataFrame(filled))
        validated[-1].to_parquet(root / "data" / "ingest" / batch / "manifest.parquet", index=False)
    (root / "data" / "validate").mkdir(parents=True, exist_ok=True)
    manifest = pd.concat(validated)
    if dropped:
        manifest = manifest[~manifest["label"].isin(dropped)]
    manifest.to_parquet(root / "data" / "validate" / "manifest.parquet", index=False)


def run(root: Path, targets: dict[str, Any] | None = None, **overrides: Any) -> pd.DataFrame:
    keys = {
        f"split.{key.replace('__', '.')}": value for key, value in overrides.items() if key not in ("folds", "seed")
    }
    keys |= {f"experiment.{key}": overrides[key] for key in ("folds", "seed") if key in overrides}
    keys |= {"experiment.batches": names(root / "data" / "ingest"), "targets": targets or LABEL}
    split.run(load_params(keys), root)
    return pd.read_parquet(root / "data" / "split" / "folds.parquet")


def labelled(**counts: int) -> list[dict[str, Any]]:
    return [{"label": label} for label, n in counts.items() for _ in range(n)]
