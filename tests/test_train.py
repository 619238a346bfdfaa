"""Stage `train`: which rows may do what, and what is written."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import content, load_params, pleat, write_params
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit

from pipeline_steps import fitting, targets, train
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_json
from pipeline_steps.params import Params
from pipeline_steps.targets import Target
from pipeline_steps.vision.losses import Asymmetric, CrossEntropy, Focal, Loss
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.objective import Objective, Output

N_FEATURES, N_FOLDS, CLASSES = 6, 3, ["Hat", "Pants", "Shoes"]
OVERRIDES = {
    "experiment.models": ["frozen"],
    "experiment.folds": [0, 1, 2],
    "experiment.batches": ["one", "two"],
    "models": {"frozen": {"kind": "frozen", "backbone": "mobilenetv2_100", "weights": None}},
    "training": {
        "frozen": {
            "head": {"hidden": 0, "dropout": 0.0}, "max_epochs": 12, "patience": 12, "inner_fraction": 0.2,
            "batch_size": 16, "learning_rate": 0.05, "weight_decay": 0.0,
            "loss": {"kind": "cross_entropy"}, "label_smoothing": 0.0, "class_weights": "none", "weight_average": 0.5,
            "mirror": True,
        }
    },
}  # fmt: skip
LABEL = [Target("label", multilabel=False, columns=["label"], classes=CLASSES)]
SEVERAL = {
    "colour": {"kind": "multiclass"},
    "tags": {"kind": "multilabel", "of": ["label", "colour"]},
    "label": {"kind": "multiclass"},
}


def samples() -> pd.DataFrame:
    rows = pd.DataFrame({"number": range(150)})
    rows["sample_id"] = [f"{number * 7919 % 1000:064x}" for number in rows["number"]]
    rows["batch"] = np.where(rows["number"] < 90, "one", "two")
    rows["label"] = [CLASSES[number % 3] for number in rows["number"]]
    rows["colour"] = [("black", "red")[number // 9 % 2] for number in rows["number"]]
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
    noise[:, :, 3] += np.where(rows["colour"] == "red", 2.0, 0.0)[:, None]
    return noise.astype(np.float32)


@pytest.fixture
def settings() -> Params:
    return load_params(OVERRIDES)


def test_rows_are_divided_without_overlap() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    for fold in range(N_FOLDS):
        learn, inner, scored = (set(part.tolist()) for part in train.divide(rows, LABEL, fold, 0.2, seed=5))
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
    learn, inner, _ = train.divide(rows, LABEL, 0, 0.2, seed=5)
    assert alone in learn.tolist()
    assert alone not in inner.tolist()


def several() -> list[Target]:
    return targets.of(load_params({"targets": SEVERAL}).targets, samples())


def test_the_inner_part_of_one_target_is_scikit_learns_stratified_share() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    others = rows[(rows["fold"] != 0) & (rows["fold"] >= 0)].drop_duplicates("group")
    splitter = StratifiedShuffleSplit(1, test_size=round(0.2 * len(others)), random_state=5)
    _, chosen = next(splitter.split(others, others["label"]))
    inner = rows.loc[train.divide(rows, LABEL, 0, 0.2, seed=5)[1].tolist()]
    assert set(inner["group"]) == set(others["group"].iloc[chosen])


def test_the_inner_part_of_several_targets_has_its_share_of_each_combination() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    learn, inner, scored = train.divide(rows, several(), 0, 0.2, seed=5)
    assert sorted(torch.cat([learn, inner, scored]).tolist()) == rows.index[rows["fold"] >= 0].tolist()
    of_all = rows[(rows["fold"] > 0)].value_counts(["label", "colour"])
    of_inner = rows.loc[inner.tolist()].value_counts(["label", "colour"])
    assert (of_all * 0.2 - of_inner).abs().max() <= 1
    assert not set(rows.loc[learn.tolist(), "group"]) & set(rows.loc[inner.tolist(), "group"])


def test_rare_combinations_neither_fill_the_inner_part_nor_are_kept_out_of_it() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    rows["colour"] = [f"colour {number // 6}" for number in rows["number"]]  # each combination twice
    found = targets.of(load_params({"targets": SEVERAL}).targets, rows)
    sizes = set()
    for seed in range(20):
        learn, inner, _ = train.divide(rows, found, 0, 0.1, seed=seed)
        assert len(inner) == pytest.approx(0.1 * (len(learn) + len(inner)), abs=2)
        sizes |= set(rows.loc[inner.tolist()].value_counts(["label", "colour"]))
    assert sizes == {1, 2}  # by chance both of a pair at times, as without strata


def test_lists_of_the_data_set_make_one_fold_to_score_and_one_to_learn_from() -> None:
    rows = samples().sort_values("sample_id").reset_index(drop=True)
    rows["fold"] = np.where(rows["number"] < 30, 0, 1)  # val, train
    learn, inner, scored = train.divide(rows, LABEL, 0, 0.2, seed=5)
    assert set(scored.tolist()) == set(rows.index[rows["number"] < 30])
    assert len(inner) == 24
    assert len(learn) == 96


def test_a_fold_without_samples_is_an_error() -> None:
    with pytest.raises(PleatError, match=r"Fold 7 holds no sample"):
        train.divide(samples(), LABEL, 7, 0.2, seed=5)


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
    predictions = pd.read_parquet(folder / "predictions" / "label.parquet").set_index("sample_id")
    assert list(predictions) == ["fold", "label", *(f"p:{name}" for name in CLASSES)]
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
        about = json.loads(file.metadata()["pleat"])
    assert about == {"classes": {"label": CLASSES}, "model": "frozen", "fold": 1}
    assert not (tmp_path / train.CHECKPOINTS / "frozen" / "fold_1.pt").exists()


def test_each_of_several_targets_has_predictions_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, tags = samples(), ["Hat", "Pants", "Shoes", "black", "red"]
    write_inputs(tmp_path, rows, separable(rows))
    train.run(load_params(OVERRIDES | {"targets": SEVERAL}), "frozen", 1, tmp_path)
    folder = tmp_path / "data" / "train" / "frozen" / "fold_1"
    expected = rows[rows["fold"] == 1].set_index("sample_id")
    found = {path.stem: pd.read_parquet(path).set_index("sample_id") for path in (folder / "predictions").iterdir()}
    assert set(found) == set(SEVERAL)
    for name, classes in {"colour": ["black", "red"], "label": CLASSES, "tags": tags}.items():
        frame = found[name]
        assert set(frame.index) == set(expected.index)
        assert list(frame) == ["fold", "label", *(f"p:{one}" for one in classes)]

    scores = []
    for name in ("colour", "label"):
        frame = found[name]
        assert (frame["label"] == expected.loc[frame.index, name]).all()
        probabilities = frame.filter(like="p:")
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
        scores.append(f1_score(frame["label"], probabilities.idxmax(axis=1).str[2:], average="weighted"))
    frame = found["tags"]
    of_rows = expected.loc[frame.index, ["label", "colour"]].to_numpy()
    assert [list(labels) for labels in frame["label"]] == [sorted(labels) for labels in of_rows]
    truth = np.array([[name in labels for name in tags] for labels in of_rows])
    scores.append(f1_score(truth, frame.filter(like="p:") >= 0.5, average="weighted"))
    assert min(scores) > 0.8
    assert f"weighted F1 {np.mean(scores):.4f}" in capsys.readouterr().out

    # One layer gives all of it, in the order of params.yaml, classes sorted.
    network = Head(N_FEATURES, 10, 0, 0.0)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    views = torch.from_numpy(separable(rows)[expected["number"]])
    with torch.no_grad():
        mean = sum(
            torch.cat([part[:, :2].softmax(1), part[:, 2:7].sigmoid(), part[:, 7:].softmax(1)], dim=1)
            for part in (network(views[:, 0]), network(views[:, 1]))
        )
    together = pd.concat([found[name].loc[expected.index].filter(like="p:") for name in SEVERAL], axis=1)
    np.testing.assert_allclose(together, mean / 2, atol=1e-5)
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert list(json.loads(file.metadata()["pleat"])["classes"].items()) == [
            ("colour", ["black", "red"]), ("tags", tags), ("label", CLASSES),
        ]  # fmt: skip


ASYMMETRIC = {"kind": "asymmetric", "gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05}


@pytest.mark.parametrize(
    ("loss", "smoothing", "criterion"),
    [
        ({"kind": "cross_entropy"}, 0.1, CrossEntropy(0.1)),
        ({"kind": "focal", "gamma": 2.0}, 0.0, Focal(2.0)),
        (ASYMMETRIC, 0.0, Asymmetric(gamma_positive=1.0, gamma_negative=4.0, margin=0.05)),
    ],
    ids=["cross_entropy", "focal", "asymmetric"],
)
def test_the_loss_of_params_yaml_is_the_one_that_is_trained(
    tmp_path: Path, loss: dict, smoothing: float, criterion: Loss
) -> None:
    more = {"loss": loss, "label_smoothing": smoothing, "class_weights": "inverse"}
    tags = {"tags": SEVERAL["tags"]}
    chosen = load_params(OVERRIDES | {"targets": tags, "training": {"frozen": OVERRIDES["training"]["frozen"] | more}})
    rows = samples()
    found = fitting.build_objective(chosen.training["frozen"], targets.of(chosen.targets, rows))
    assert found == Objective((Output(multilabel=True, n_classes=5),), criterion, "inverse")

    write_inputs(tmp_path, rows, separable(rows))
    train.run(chosen, "frozen", 1, tmp_path)
    frame = pd.read_parquet(tmp_path / "data/train/frozen/fold_1/predictions/tags.parquet")
    truth = [[name in labels for name in [*CLASSES, "black", "red"]] for labels in frame["label"]]
    assert roc_auc_score(truth, frame.filter(like="p:")) > 0.95


def test_a_class_that_no_sample_teaches_is_told_and_the_others_are_learned(
    tmp_path: Path, settings: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples()
    rows = rows[(rows["label"] != "Pants") | (rows["fold"] == 1)]
    write_inputs(tmp_path, rows, separable(samples()))
    train.run(settings, "frozen", 1, tmp_path)
    warning = "train frozen fold 1: warning: target label has no sample to learn Pants from"
    assert warning in capsys.readouterr().out
    found = pd.read_parquet(tmp_path / "data/train/frozen/fold_1/predictions/label.parquet")
    assert list(found.filter(like="p:")) == [f"p:{name}" for name in CLASSES]
    others = found[found["label"] != "Pants"]
    assert (others.filter(like="p:").idxmax(axis=1).str[2:] == others["label"]).mean() > 0.9
    assert found["p:Pants"].max() < 0.5


def test_the_history_has_a_line_of_losses_and_scores_for_each_epoch(tmp_path: Path, settings: Params) -> None:
    rows = samples()
    write_inputs(tmp_path, rows, separable(rows))
    train.run(settings, "frozen", 1, tmp_path)
    history = pd.read_csv(tmp_path / "data/train/frozen/fold_1/history.csv")
    assert list(history) == [
        "epoch", "train_loss", "train_accuracy", "inner_loss", "inner_accuracy", "inner_f1_weighted",
    ]  # fmt: skip
    assert history["epoch"].tolist() == list(range(1, 13))
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert history["train_accuracy"].iloc[-1] > history["train_accuracy"].iloc[0]
    assert history.filter(like="accuracy").stack().between(0, 1).all()


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
        written.append(content(folder))
    assert written[0] == written[1]
    assert set(written[0]) == {"weights.safetensors", "predictions/label.parquet", "history.csv", "metrics.json"}


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    write_params(tmp_path)
    done = pleat(tmp_path, "train", "resnet", "0")
    assert done.returncode == 1
    assert done.stderr == "pleat: params.yaml defines no model 'resnet'; it has cnn_small, cnn_tiny.\n"
