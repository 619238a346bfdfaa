"""The real clothing set from raw files to the leaderboard, as the README tells a user to do it."""

from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import f1_score
from workspace import check, copy_checkout


@pytest.fixture(scope="module")
def clothing(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_checkout(tmp_path_factory.mktemp("clothing"))
    weights = real_data.resolve() / "weights" / "mobilenetv2_100.safetensors"
    check(folder, "pleat", "data", "add", str(real_data.resolve() / "data" / "clothing"), "--name", "clothing")
    settings = [f"models.mobilenetv2_100.weights={weights}", "split.holdout.fraction=0"]
    check(folder, "pleat", "use", "clothing", *(word for setting in settings for word in ("--set", setting)))
    check(folder, "dvc", "repro", "compare")
    return folder


def test_out_of_fold_score_is_at_least_that_of_the_study(clothing: Path) -> None:
    files = (clothing / "data" / "train" / "mobilenetv2_100").glob("fold_*/predictions/label.parquet")
    rows = pd.concat([pd.read_parquet(file) for file in files])
    assert len(rows) == 5096
    assert rows["label"].nunique() == 17
    guess = rows.filter(like="p:").idxmax(axis=1).str.removeprefix("p:")
    assert f1_score(rows["label"], guess, average="weighted") >= 0.78
    board = pd.read_csv(clothing / "reports" / "leaderboard.csv")
    assert board["model"].tolist() == ["mobilenetv2_100"]
    assert board["f1_weighted"].item() >= 0.78


def test_the_page_shows_the_counts(clothing: Path) -> None:
    page = (clothing / "reports" / "index.html").read_text()
    for text in ("5,096", "Not sure", "228", "358"):
        assert text in page
