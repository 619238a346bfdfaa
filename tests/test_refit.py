"""Stage `refit`: what it trains on and how long, that it can be interrupted, what it writes, and the model card."""

import html
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import content
from refit_workspace import BATCH, BEST_EPOCHS, CLASSES, EPOCHS, MODEL, QUARANTINED, drawn, folds, make, write_folds
from refit_workspace import settings as params
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support, roc_auc_score

from pipeline_steps import package, refit
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json, write_json
from pipeline_steps.metrics import HEADLINES
from pipeline_steps.train import CHECKPOINTS
from pipeline_steps.vision.engine import Epoch, Lesson

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = ("data/refit", "reports/model_card")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace before `refit`."""
    return make(tmp_path_factory.mktemp("prepared"), params(), drawn())


@pytest.fixture(scope="module")
def done(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `refit`; tests only read it."""
    root = copy(prepared, tmp_path_factory.mktemp("done"))
    refit.run(params(), root)
    return root


@pytest.fixture
def fresh(prepared: Path, tmp_path: Path) -> Path:
    """A workspace of one's own before `refit`."""
    return copy(prepared, tmp_path)


def copy(prepared: Path, folder: Path) -> Path:
    return Path(shutil.copytree(prepared, folder / "workspace"))


def outputs(root: Path) -> dict[str, bytes]:
    return {f"{place}/{name}": data for place in OUTPUTS for name, data in content(root / place).items()}


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "data" / "refit" / "package" / "state.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def holdout(root: Path) -> pd.DataFrame:
    return pd.read_parquet(root / "data" / "refit" / "holdout" / "label.parquet")


def metrics(root: Path) -> dict[str, Any]:
    return dict(read_json(root / "data" / "refit" / "metrics.json"))


def change_pixels(root: Path, side: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the prepared inputs of one side."""
    folder = root / "data" / "prepare" / MODEL / BATCH
    values, ids = np.load(folder / "inputs.npy"), read_json(folder / "sample_ids.json")
    rows = (folds(root)["side"].loc[ids] == side).to_numpy()
    values[rows] = change(values[rows])
    np.save(folder / "inputs.npy", values)
    write_json(folder / "inputs.json", read_json(folder / "inputs.json") | {"sha256": f"changed {side}"})


def rotate_labels(root: Path, side: str) -> None:
    following = dict(zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True))
    write_folds(
        root, lambda rows: rows.assign(label=rows["label"].where(rows["side"] != side, rows["label"].map(following)))
    )


def test_it_learns_from_every_sample_of_the_train_side_and_from_no_other(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[Lesson] = []
    original = refit.fit_on

    def spy(devices: Any, network: Any, lesson: Lesson, *rest: Any) -> Any:
        lessons.append(lesson)
        return original(devices, network, lesson, *rest)

    monkeypatch.setattr(refit, "fit_on", spy)
    refit.run(params(), fresh)
    [seen] = lessons
    samples = folds(fresh).sort_index()  # the order of `load_inputs`
    train = set(samples.index[samples["side"] == "train"])
    assert set(samples.index[seen.train_rows.tolist()]) == train
    assert len(seen.train_rows) == len(train) == 36
    assert seen.inner_rows is None
    assert [sorted(CLASSES)[code] for (code,) in seen.codes.tolist()] == samples["label"].tolist()
    assert seen.schedule.n_epochs == EPOCHS == statistics.median(BEST_EPOCHS)
    assert seen.schedule.seed not in {params().experiment.seed * 1000 + fold for fold in range(3)}
    listed = (fresh / "data" / "refit" / "package" / refit.TRAINED_ON).read_text().splitlines()
    assert listed == sorted(train)
    assert set(holdout(fresh)["sample_id"]) == set(samples.index) - train


@pytest.mark.parametrize("side", ["holdout", "train"])
@pytest.mark.parametrize("what", ["pixels", "labels"])
def test_only_the_train_side_changes_the_weights(side: str, what: str, done: Path, fresh: Path) -> None:
    if what == "pixels":
        change_pixels(fresh, side, lambda values: 255 - values)
    else:
        rotate_labels(fresh, side)
    refit.run(params(), fresh)
    assert same(weights(fresh), weights(done)) == (side == "holdout")
    assert metrics(fresh)["f1_weighted"] != metrics(done)["f1_weighted"]


@pytest.mark.parametrize(("chosen", "expected"), [([2, 6, 3], 3), ([1, 1, 8], 1), ([7, 2, 5], 5)])
def test_epochs_are_the_median_of_what_the_folds_chose(chosen: list[int], expected: int, fresh: Path) -> None:
    for fold, best in enumerate(chosen):
        write_json(fresh / "data" / "train" / MODEL / f"fold_{fold}" / "metrics.json", {"best_epoch": best})
    epochs: list[Epoch] = []
    summary = refit.run(params(), fresh, epochs.append)
    assert summary["epochs"] == len(epochs) == expected
    history = pd.read_csv(fresh / "data" / "refit" / "history.csv")
    assert history["epoch"].tolist() == list(range(1, expected + 1))
    assert list(history) == ["epoch", "train_loss", "train_accuracy"]


def test_of_an_even_number_of_folds_the_later_of_the_two_middle_epochs_is_taken(fresh: Path) -> None:
    write_json(fresh / "data" / "train" / MODEL / "fold_3" / "metrics.json", {"best_epoch": 8})
    assert refit.run(params(**{"experiment.folds": [0, 1, 2, 3]}), fresh)["epochs"] == 6  # of 2, 3, 6, 8


def test_with_lists_of_the_data_set_it_learns_from_both(fresh: Path) -> None:
    """Fold 0 is the val list, and the only one that was scored; fold 1 is the train list."""
    write_folds(fresh, lambda rows: rows.assign(fold=rows["fold"].clip(upper=1)))
    found = refit.run(params(**{"experiment.folds": [0], "split.given": True}), fresh)
    samples = folds(fresh)
    assert set(samples["fold"][samples["side"] == "train"]) == {0, 1}
    listed = (fresh / "data" / "refit" / "package" / refit.TRAINED_ON).read_text().splitlines()
    assert listed == sorted(samples.index[samples["side"] == "train"])
    assert (found["n_train"], found["epochs"]) == (36, BEST_EPOCHS[0])
    assert "over 1 fold" in Page(fresh).text


def test_the_same_inputs_give_the_same_bytes(done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLEAT_CODE_VERSION", "another commit")  # which DVC does not know of
    refit.run(params(), fresh)
    assert outputs(fresh) == outputs(done)
    assert {name for name in outputs(done) if "/code/" not in name} == {
        "data/refit/history.csv", "data/refit/holdout/label.parquet", "data/refit/metrics.json",
        *(f"data/refit/package/{name}" for name in (
            "README.md", "about.json", "example.jpg", "model.py", "network.onnx", "requirements.txt",
            "state.safetensors", "trained_on.txt",
        )),
        "reports/model_card/confusion.png", "reports/model_card/index.html",
    }  # fmt: skip


def test_the_package_is_named_after_its_contents(done: Path, tmp_path: Path) -> None:
    packaged = Path(shutil.copytree(done / "data" / "refit" / "package", tmp_path / "package"))
    assert package.digest(packaged) == metrics(done)["package"]
    for path in sorted(path for path in packaged.rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert package.digest(packaged) != metrics(done)["package"], path
        path.write_bytes(before)
    path.rename(path.with_name("renamed"))
    assert package.digest(packaged) != metrics(done)["package"]


def test_a_killed_refit_goes_on_and_ends_with_the_same_bytes(done: Path, fresh: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; import test_refit as t; t.torch.set_num_threads(1);"
        "stop = lambda epoch: epoch.epoch == 2 and os.kill(os.getpid(), signal.SIGKILL);"
        "t.refit.run(t.params(), Path(sys.argv[1]), stop)"
    )
    killed = subprocess.run([sys.executable, "-c", code, fresh], cwd=Path(__file__).parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (fresh / "data" / "refit").exists()
    checkpoint = fresh / CHECKPOINTS / MODEL / "refit.pt"
    assert checkpoint.exists()
    epochs: list[Epoch] = []
    refit.run(params(), fresh, epochs.append)
    assert [epoch.epoch for epoch in epochs] == [3]
    assert outputs(fresh) == outputs(done)
    assert not checkpoint.exists()


def test_scores_are_those_of_scikit_learn(done: Path) -> None:
    rows, found = holdout(done), metrics(done)
    probability = rows[[f"p:{name}" for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-5)
    predicted = [CLASSES[code] for code in probability.argmax(axis=1)]
    assert found["f1_weighted"] == pytest.approx(f1_score(rows["label"], predicted, average="weighted"))
    assert found["f1_macro"] == pytest.approx(f1_score(rows["label"], predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(rows["label"], predicted))
    areas = [roc_auc_score(rows["label"] == name, rows[f"p:{name}"]) for name in CLASSES]
    assert found["roc_auc_macro"] == pytest.approx(np.mean(areas))
    assert 0 < found["f1_weighted"] < 1, "else the numbers above show little"
    assert found["f1_weighted"] != pytest.approx(found["f1_macro"])
    samples = folds(done)
    assert (rows["label"].to_numpy() == samples.loc[rows["sample_id"], "label"].to_numpy()).all()
    assert (rows["group"].to_numpy() == samples.loc[rows["sample_id"], "group"].to_numpy()).all()
    assert (found["n_train"], found["n_holdout"], found["model"]) == (36, 12, MODEL)
    assert found["targets"] == {"label": {name: found[name] for name in HEADLINES}}


def test_without_a_holdout_it_trains_on_all_and_says_what_is_not_known(fresh: Path) -> None:
    write_folds(fresh, lambda rows: rows.assign(side="train", fold=rows["fold"].clip(lower=0)))
    found = refit.run(params(**{"split.holdout.fraction": 0}), fresh)
    assert found == metrics(fresh)
    assert found.keys() == {"model", "epochs", "n_train", "n_holdout", "holdout", "package"}
    assert (found["n_train"], found["n_holdout"]) == (48, 0)
    rows = holdout(fresh)
    assert len(rows) == 0
    assert list(rows) == ["sample_id", "batch", "label", "group", *(f"p:{name}" for name in CLASSES)]
    assert len((fresh / "data" / "refit" / "package" / refit.TRAINED_ON).read_text().splitlines()) == 48
    page = Page(fresh)
    assert "Without a holdout" in page.text
    assert page.table("Class")["Pants"] == ["12", "0", "—", "—", "—"]
    assert not (fresh / "reports" / "model_card" / "confusion.png").exists()
    assert "nan" not in page.text.lower()


def test_scores_that_a_holdout_does_not_define_are_null(fresh: Path) -> None:
    """A holdout of one class has no ROC-AUC."""
    write_folds(fresh, lambda rows: rows.assign(label=rows["label"].where(rows["side"] == "train", "Pants")))
    found = refit.run(params(), fresh)
    assert metrics(fresh)["roc_auc_macro"] is found["roc_auc_macro"] is None
    assert 0 <= found["f1_weighted"] <= 1
    page = Page(fresh)
    assert page.table("Class")["Hat|Cap"][1] == "0"
    assert page.table("Class")["Hat|Cap"][3] == "—", "recall of a class that never occurs"


def test_what_is_missing_is_one_sentence(fresh: Path) -> None:
    (fresh / "data" / "compare" / "chosen.json").unlink()
    with pytest.raises(PleatError, match=r"chosen.json is missing: the stage that writes it has not run"):
        refit.run(params(), fresh)


class Page(HTMLParser):
    """The model card as a browser reads it: its text, its tags, its tables' rows."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.source = (root / "reports" / "model_card" / "index.html").read_text()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self._parts: list[str] = []
        self._open = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        if tag == "table":
            self.rows.append([""])

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            return
        self._parts.append(data)
        if self._open in ("td", "th"):
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()

    def table(self, first: str) -> dict[str, list[str]]:
        """The rows of the table whose first heading is `first`, by their first cell."""
        start = next(place for place, row in enumerate(self.rows) if row[0] == first) + 1
        width = len(self.rows[start - 1])
        rows = self.rows[start:]
        stop = next(place for place, row in enumerate(rows) if len(row) != width)
        return {row[0]: row[1:] for row in rows[:stop]}


def expected_classes(root: Path) -> dict[str, list[str]]:
    rows, train = holdout(root), folds(root).query("side == 'train'")["label"]
    predicted = [CLASSES[code] for code in rows[[f"p:{name}" for name in CLASSES]].to_numpy().argmax(axis=1)]
    scores = precision_recall_fscore_support(rows["label"], predicted, labels=CLASSES, zero_division=math.nan)
    shown = {}
    for name, precision, recall, f1, support in zip(CLASSES, *scores, strict=True):
        numbers = ["—" if math.isnan(value) else f"{value:.3f}" for value in (precision, recall, f1)]
        shown[name] = [str((train == name).sum()), str(support), *numbers]
    return shown


def test_the_card_shows_all_that_a_reader_must_know(done: Path) -> None:
    page, found = Page(done), metrics(done)
    assert page.table("Class") == expected_classes(done)
    scores = page.table("Score")
    assert list(scores) == ["Weighted F1", "Macro F1", "Accuracy", "ROC-AUC (macro)"]
    for title, name in zip(scores, ("f1_weighted", "f1_macro", "accuracy", "roc_auc_macro"), strict=True):
        assert scores[title][0] == f"{found[name]:.3f}"
        assert scores[title][2:] == ["0.800", "0.040", "0.700 to 0.900"]
    low, high = (float(end) for end in scores["Weighted F1"][1].split(" to "))
    assert 0 <= low < found["f1_weighted"] < high <= 1
    cost = read_json(done / "data" / "profile" / f"{MODEL}.json")
    about = read_json(done / "data" / "refit" / "package" / "about.json")
    for expected in (
        f"Data version {about['data_version']}", "Batches batch",
        "36 to train on, 12 in the holdout", "1,307 dropped label, 3 undecodable", "for 3 epochs", "Intended use",
        f"{cost['macs'] / 1e3:.0f} k multiply-accumulates", f"{cost['params'] / 1e3:.2f} k parameters",
        "32 pixels a side", "Trained on fewer than 50 images", "Images of one sender may lie on both sides",
        "Probabilities are not calibrated", "training.learning_rate 0.02", "model.kind custom_cnn",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert sum(QUARANTINED.values()) == 1310  # as the page says above


def test_the_page_holds_no_script_and_fetches_nothing(done: Path) -> None:
    page = Page(done)
    assert CLASSES[0] == "<script>alert(1)</script>"
    assert page.table("Class").keys() == set(CLASSES)
    assert "script" not in page.tags
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.source)
    assert page.tags.count("img") == 1


def test_the_package_says_the_same_in_markdown(done: Path) -> None:
    text = (done / "data" / "refit" / "package" / "README.md").read_text()
    assert "<" not in text, "Markdown may hold HTML"
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    table = {html.unescape(row[0]).strip().replace("\\|", "|"): [cell.strip() for cell in row[1:]] for row in lines}
    page = Page(done)
    for row in (*page.table("Class").items(), *page.table("Score").items()):
        assert table[row[0]] == row[1]
    about = json.loads((done / "data" / "refit" / "package" / "about.json").read_text())
    cost = read_json(done / "data" / "profile" / f"{MODEL}.json")
    for expected in (
        "## Intended use", "## Limits", f"data version: {about['data_version']}", "12 images", "1,307 dropped label",
        f"{cost['macs'] / 1e3:.0f} k multiply-accumulates", "Probabilities are not calibrated", "36 images of batch",
        "training.learning_rate: 0.02",
    ):  # fmt: skip
        assert expected in text, expected
