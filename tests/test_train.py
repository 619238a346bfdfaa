"""Stage `train`: which rows may do what, and what is written."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_params, pleat, write_params
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline_steps import train
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_json
from pipeline_steps.params import Params
from pipeline_steps.vision.networks import Head

N_FEATURES, N_FOLDS, CLASSES = 6, 3, ["Hat", "Pants", "Shoes"]
OVERRIDES = {
    "experiment.models": ["frozen"],
    "experiment.folds": [0, 1, 2],
    "experiment.batches": ["one", "two"],
    "models": {"frozen": {"kind": "frozen", "backbone": "mobilenetv2_100", "weights": None}},
    "training": {
        "frozen": {
            "head": {"hidden": 0, "dropout": 0.0}, "max_epochs": 12, "patience": 12, "inner_fraction": 0.2,
            "batch_size": 16, "learning_rate": 0.05, "weight_decay": 0.0, "label_smoothing": 0.0,
            "class_weights": "none", "weight_average": 0.5, "mirror": True,
        }
    },
}  # fmt: skip


def samples() -> pd.DataFrame:
    rows = pd.DataFrame({"number": range(150)})
    rows["sample_id"] = [f"{number * 7919 % 1000:064x}" for number in rows["number"]]
    rows["batch"] = np.where(rows["number"] < 90, "one", "two")
    rows["label"] = [CLASSES[number % 3] for number in rows["number"]]
    rows["group"] = rows["sample_id"]
    rows.loc[[10, 13], "group"] = "near copies"  # same label
    rows["fold"] = rows["number"] // 3 % N_FOLDS
    rows.loc[[10, 13], "fold"] = 1
    rows.loc[rows["number"] >= 138, "fold"] = -1
    rows["side"] = np.where(rows["fold"] < 0, "holdout", "train")
    return rows


def write_inputs(root: Path, rows: pd.DataFrame, values: np.ndarray) -> None:
    """Prepared features of both batches, in another order than the folds."""
    for batch in ("one", "two"):
        part = rows[rows["batch"] == batch].iloc[::-1]
        folder = root / "data" / "prepare" / "frozen" / batch
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "inputs.npy", values[part["number"]])
        write_json(folder / "sample_ids.json", part["sample_id"].tolist())
        write_json(folder / "inputs.json", {"kind": "features", "sha256": f"{hash(values.tobytes())}-{batch}"})
    (root / "data" / "split").mkdir(parents=True, exist_ok=True)
    rows.drop(columns="number").to_parquet(root / "data" / "split" / "folds.parquet")


def separable(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.5, (len(rows), 2, N_FEATURES))
    noise[np.arange(len(rows)), :, rows["label"].map(CLASSES.index)] += 1.5
    return noise.astype(np.float32)


@pytest.fixture
def settings() -> Params:
    return load_params(OVERRIDES)


def test_rows_are_divided_without_overlap() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    for fold in range(N_FOLDS):
        learn, inner, scored = (set(part.tolist()) for part in train.divide(rows, fold, 0.2, seed=5))
        assert not learn & inner | learn & scored | inner & scored
        assert scored == set(rows.index[rows["fold"] == fold])
        assert learn | inner == set(rows.index[(rows["fold"] != fold) & (rows["fold"] >= 0)])
        assert not set(rows.loc[list(learn), "group"]) & set(rows.loc[list(inner), "group"])
        shares = rows.loc[list(inner), "label"].value_counts()
        assert shares.max() - shares.min() <= 1  # stratified: the classes are equally frequent here


def test_a_class_with_one_sample_stays_in_the_learning_part() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    rows.loc[(rows["label"] == "Shoes") & (rows["fold"] != 0), "fold"] = -1
    alone = rows.index[(rows["label"] == "Shoes")][-1]
    rows.loc[alone, "fold"] = 1
    learn, inner, _ = train.divide(rows, 0, 0.2, seed=5)
    assert alone in learn.tolist()
    assert alone not in inner.tolist()


def test_a_fold_without_samples_is_an_error() -> None:
    with pytest.raises(PleatError, match=r"Fold 7 holds no sample"):
        train.divide(samples(), 7, 0.2, seed=5)


def test_inputs_are_joined_to_samples_by_id(tmp_path: Path) -> None:
    rows = samples()
    values = np.broadcast_to(rows["number"].to_numpy(np.float32)[:, None, None], (150, 2, N_FEATURES)).copy()
    write_inputs(tmp_path, rows, values)
    inputs, ordered, _ = train.load_inputs(tmp_path, "frozen", ["one", "two"], rows)
    assert inputs.values[:, 1, 3].tolist() == ordered["number"].tolist()
    assert sorted(ordered["number"]) == list(range(150))


def test_a_sample_without_inputs_is_an_error(tmp_path: Path) -> None:
    rows = samples()
    write_inputs(tmp_path, rows, separable(rows))
    with pytest.raises(PleatError, match=r"data/prepare/frozen lacks 60 samples .*`dvc repro`"):
        train.load_inputs(tmp_path, "frozen", ["one"], rows)


def test_outputs_fit_together(tmp_path: Path, settings: Params) -> None:
    rows = samples()
    write_inputs(tmp_path, rows, separable(rows))
    train.run(settings, "frozen", 1, tmp_path)
    folder = tmp_path / "data" / "train" / "frozen" / "fold_1"
    predictions = pd.read_parquet(folder / "predictions.parquet").set_index("sample_id")
    expected = rows[rows["fold"] == 1].set_index("sample_id")
    assert set(predictions.index) == set(expected.index)
    assert (predictions["label"] == expected.loc[predictions.index, "label"]).all()
    probabilities = predictions[[f"p:{name}" for name in CLASSES]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (probabilities.idxmax(axis=1).str[2:] == predictions["label"]).mean() > 0.9

    # The saved weights, loaded by hand, give the saved probabilities: the mean over both views.
    network = Head(N_FEATURES, 3, 0, 0.0)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    views = torch.from_numpy(separable(rows)[expected.loc[predictions.index, "number"]])
    with torch.no_grad():
        mean = (network(views[:, 0]).softmax(1) + network(views[:, 1]).softmax(1)) / 2
    np.testing.assert_allclose(probabilities, mean, atol=1e-5)
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert '"classes": ["Hat", "Pants", "Shoes"]' in file.metadata()["pleat"]
    assert not (tmp_path / train.CHECKPOINTS / "frozen" / "fold_1.pt").exists()


@pytest.mark.parametrize("others", ["the scored fold", "the holdout"])
def test_rows_that_may_not_teach_do_not_change_the_weights(tmp_path: Path, settings: Params, others: str) -> None:
    rows, weights = samples(), []
    for attempt in range(2):
        root = tmp_path / str(attempt)
        values = separable(rows)
        if attempt:
            values[(rows["fold"] == (1 if others == "the scored fold" else -1)).to_numpy()] *= -20
        write_inputs(root, rows, values)
        train.run(settings, "frozen", 1, root)
        weights.append((root / "data/train/frozen/fold_1/weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_two_runs_write_the_same_bytes(tmp_path: Path, settings: Params) -> None:
    rows, written = samples(), []
    for attempt in range(2):
        root = tmp_path / str(attempt)
        write_inputs(root, rows, separable(rows))
        train.run(settings, "frozen", 0, root)
        folder = root / "data/train/frozen/fold_0"
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"weights.safetensors", "predictions.parquet", "history.csv", "metrics.json"}


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    write_params(tmp_path)
    done = pleat(tmp_path, "train", "resnet", "0")
    assert done.returncode == 1
    assert done.stderr == "pleat: params.yaml defines no model 'resnet'; it has cnn_small, cnn_tiny.\n"
