"""The stage `register` with several targets, and a champion that answers other ones; models whose answers are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from promotion_project import LABEL, TAGS, Beside, Colour, aliases, make, put_model, settings
from sklearn.metrics import f1_score

from pipeline_steps import promotion, register
from pipeline_steps.errors import PleatError
from pipeline_steps.register import Outcome

RIGHT = Colour()
SWAPPED = Colour(("green", "red", "blue"))  # right for blue alone
BLIND = Colour(("red", "green", "red"))  # blue is never said


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is a workspace to make; each test has a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def rows(tmp_path: Path, store: None) -> pd.DataFrame:
    """The holdout of a workspace, which is the current folder."""
    return make(tmp_path)


def run(**overrides: object) -> Outcome:
    return register.run(settings(**overrides))


def test_several_targets_are_judged_together(tmp_path: Path, rows: pd.DataFrame) -> None:
    """The second model is wrong in one target only, where it misses all of blue and takes it for red."""
    put_model(tmp_path, rows, Beside(RIGHT, RIGHT), targets=[TAGS, LABEL])
    first = run()
    assert (first.event, first.evidence["candidate"]["f1_weighted"]) == ("promoted", 1.0)
    put_model(tmp_path, rows, Beside(RIGHT, BLIND), targets=[TAGS, LABEL])
    second = run(**{"promotion.max_class_drop": 1})
    assert (second.event, second.champion) == ("rejected", "1")
    f1 = (2 / 3 + 1 + 0) / 3  # by hand
    assert second.evidence["candidate"]["f1_weighted"] == pytest.approx((1 + f1) / 2)
    targets = second.evidence["targets"]
    assert {name: target["candidate"]["f1_weighted"] for name, target in targets.items()} == {
        "label": pytest.approx(f1), "tags": 1.0,
    }  # fmt: skip
    assert second.evidence["gain"]["value"] == pytest.approx((f1 - 1) / 2)
    assert targets["label"]["classes"]["blue"]["recall_gain"]["value"] == -1
    page = Path("reports/registration/index.html").read_text()
    for heading in (
        "Weighted F1, mean over the targets",
        "Recall of each class of label",
        "Recall of each class of tags",
    ):
        assert heading in page
    assert "Class 'blue' of label collapses" in run().reasons[1]


def test_each_model_is_judged_with_its_own_thresholds(tmp_path: Path, store: None) -> None:
    """The same network twice: the first misses what is dark."""
    rows = make(tmp_path, weak=8)
    put_model(tmp_path, rows, Beside(RIGHT), targets=[TAGS], threshold=0.9)
    first = run()
    bright = np.tile(np.arange(20) >= 8, 3)
    actual = pd.get_dummies(rows["label"]).to_numpy()
    f1 = f1_score(actual, actual & bright[:, np.newaxis], average="weighted")
    assert 0.5 < f1 < 0.9
    assert (first.event, first.evidence["candidate"]["f1_weighted"]) == ("promoted", pytest.approx(f1))
    put_model(tmp_path, rows, Beside(RIGHT), targets=[TAGS], threshold=0.5)
    second = run()
    assert (second.event, second.champion) == ("promoted", "2")
    assert second.evidence["candidate"]["f1_weighted"] == 1
    assert second.evidence["champion"]["f1_weighted"] == pytest.approx(f1)
    assert second.evidence["gain"]["value"] == pytest.approx(1 - f1)
    assert second.evidence["gain"]["low"] < 1 - f1 < second.evidence["gain"]["high"]
    recalls = second.evidence["targets"]["tags"]["classes"].values()
    assert [(row["candidate_recall"], row["champion_recall"]) for row in recalls] == [(1, pytest.approx(0.6))] * 3


def test_a_model_of_other_targets_than_the_champions_waits_for_a_person(
    tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture
) -> None:
    """It has learned from all of the holdout, which does not matter: it is not asked."""
    put_model(tmp_path, rows, RIGHT)
    assert run().champion == "1"
    for listed in (tmp_path / "mlruns").rglob("trained_on.txt"):
        listed.write_text("\n".join(rows["sample_id"]))
    put_model(tmp_path, rows, Beside(RIGHT, SWAPPED), targets=[TAGS, LABEL])
    asked = run(**{"promotion.mode": "auto"})
    assert (asked.event, asked.champion, asked.decision) == ("approval requested", "1", "challenger")
    assert asked.reasons[0] == (
        "Champion version 1 answers other targets (label) than are asked for now (label, tags (multilabel)), so the "
        "two cannot be compared, and only a person can promote it: with `pleat approve 2`."
    )
    assert "`pleat approve 2` makes it the champion" in capsys.readouterr().out
    assert aliases(f"sqlite:///{tmp_path}/mlflow.db") == {"champion": "1", "challenger": "2"}
    assert run(**{"promotion.mode": "auto"}).event == "approval requested", "the same again is not promoted either"
    assert asked.evidence["n_rows"] == len(rows)
    page = Path("reports/registration/index.html").read_text()
    assert "answers other targets (label)" in page
    assert "Version 1, champion" in page
    promotion.approve(settings(), "2", False, "two targets from now on")
    assert aliases(f"sqlite:///{tmp_path}/mlflow.db") == {"champion": "2"}
    assert run(**{"promotion.mode": "auto"}).event == "promoted"
    # The floors hold as ever, and the way back is open.
    put_model(tmp_path, rows, SWAPPED)
    poor = run()
    assert (poor.event, poor.champion) == ("rejected", "2")
    assert "below the floor of 0.5" in poor.reasons[0]
    assert "answers other targets (label, tags (multilabel)) than are asked for now (label)" in " ".join(poor.reasons)
    with pytest.raises(PleatError, match="Version 3 of pleat waits for approval"):
        promotion.approve(settings(), "3", False, "")
    promotion.rollback(settings(), None, "")
    assert aliases(f"sqlite:///{tmp_path}/mlflow.db") == {"champion": "1"}


def test_a_target_of_the_same_name_but_another_kind_is_another_target(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, RIGHT)
    run()
    several = replace(LABEL, multilabel=True)
    put_model(tmp_path, rows, Beside(RIGHT), targets=[several])
    outcome = run(**{"promotion.mode": "approve"})
    assert (outcome.event, outcome.champion) == ("approval requested", "1")
    assert "answers other targets (label) than are asked for now (label (multilabel))" in outcome.reasons[0]
    promotion.approve(settings(), None, True, "one label is enough")
    assert run(**{"promotion.mode": "approve"}).event == "declined"
    assert aliases(f"sqlite:///{tmp_path}/mlflow.db") == {"champion": "1"}


def test_merged_labels_of_several_targets_are_no_mistake_of_an_older_champion(
    tmp_path: Path, rows: pd.DataFrame
) -> None:
    put_model(tmp_path, rows, Beside(RIGHT, RIGHT), targets=[TAGS, LABEL])
    run()
    renamed = rows.assign(label=rows["label"].replace("blue", "green"))
    put_model(tmp_path, renamed, Beside(RIGHT, Colour(unsure=0.01)), targets=[TAGS, LABEL])
    champion = run(**{"labels.merge": {"Blue": "green"}}).evidence["targets"]
    assert {name: target["champion"]["f1_weighted"] for name, target in champion.items()} == {"label": 1.0, "tags": 1.0}
