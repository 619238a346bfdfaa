"""The stage `register` with real packages, processes and a real registry; models whose answers are known."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from promotion_project import Colour, aliases, make, put_model, settings, versions

from pipeline_steps import judging, promotion, register
from pipeline_steps.errors import PleatError
from pipeline_steps.register import Outcome
from pipeline_steps.registry import Registry

RIGHT = Colour()
SWAPPED = Colour(("green", "red", "blue"))  # right for blue alone
BLIND = Colour(("red", "green", "red"))  # blue is never said
SLOW = Colour(work=150)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """The holdout of a workspace, which is the current folder; each test has a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path))
    return make(tmp_path)


def uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def run(**overrides: object) -> Outcome:
    return register.run(settings(**overrides))


def verdict_file() -> dict:
    return json.loads(Path("reports/registration/verdict.json").read_text())


def test_from_first_to_better_and_back(tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture) -> None:
    put_model(tmp_path, rows, BLIND)
    low = {"promotion.floors.f1_weighted": 0.3, "promotion.floors.f1_macro": 0.3}
    first = run(**low)
    assert (first.version, first.champion, first.event) == ("1", "1", "promoted")
    assert "this is the first model" in first.reasons[0]
    assert first.evidence["candidate"]["f1_weighted"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # by hand

    put_model(tmp_path, rows, RIGHT)
    second = run(**low)
    assert (second.version, second.champion, second.event) == ("2", "2", "promoted")
    assert second.evidence["gain"]["value"] == pytest.approx(1 - (2 / 3 + 1) / 3)
    assert aliases(uri(tmp_path)) == {"champion": "2"}
    version = MlflowClient(uri(tmp_path)).get_model_version("pleat", "2")
    assert version.description.startswith("Promoted. Version 2 scores")
    assert version.tags["pleat.verdict"] == "promoted"
    assert version.tags["pleat.judged_against"] == "1"
    assert version.tags["pleat.data_version"] == "sample=1.dir"
    assert "Version 2 is the champion" in Path("reports/registration/index.html").read_text()
    assert verdict_file()["event"] == "promoted"
    assert "Version 2 is the champion." in capsys.readouterr().out

    # The same again is judged no second time, and says the same.
    again = run(**low)
    assert (again.version, again.event, again.reasons) == ("2", "promoted", second.reasons)
    assert versions(uri(tmp_path)) == ["1", "2"]
    assert len(Registry("pleat").history()) == 2

    event = promotion.rollback(settings(), None, "blue is back in fashion")
    assert (event.kind, event.before, event.after) == ("rolled back", "2", "1")
    assert aliases(uri(tmp_path)) == {"champion": "1"}
    rolled = run(**low)  # the person's word stands
    assert (rolled.version, rolled.champion, rolled.event) == ("2", "1", "rolled back")
    assert verdict_file()["title"] == "Version 2 was rolled back; version 1 is the champion"
    with pytest.raises(PleatError, match="pleat had no champion before version 1"):
        promotion.rollback(settings(), None, "")
    promotion.rollback(settings(), "2", "")
    assert aliases(uri(tmp_path)) == {"champion": "2"}

    # Nothing of it hangs on the runs in MLflow.
    client = MlflowClient(uri(tmp_path))
    for item in client.search_runs(["1"]):
        client.delete_run(item.info.run_id)
    capsys.readouterr()
    promotion.history(settings())
    printed = capsys.readouterr().out
    assert [word for word in printed.split() if word in ("promoted", "rolled")] == ["promoted"] * 2 + ["rolled"] * 2
    assert "blue is back in fashion" in printed.replace("\n", " ")
    assert "Champion: version 2" in printed


@pytest.mark.parametrize(
    ("champion", "candidate", "event", "words"),
    [
        (RIGHT, SWAPPED, "rejected", "scores lower than champion version 1"),
        (RIGHT, BLIND, "rejected", "Class 'blue' collapses"),
        (RIGHT, SLOW, "challenger", "times the champion's"),
    ],
)
def test_what_is_not_better_stays_behind(
    champion: Colour, candidate: Colour, event: str, words: str, tmp_path: Path, rows: pd.DataFrame
) -> None:
    put_model(tmp_path, rows, champion)
    assert run().event == "promoted"
    put_model(tmp_path, rows, candidate)
    outcome = run()
    assert (outcome.version, outcome.champion, outcome.event) == ("2", "1", event)
    assert words in " ".join(outcome.reasons)
    assert aliases(uri(tmp_path)) == {"champion": "1"} | ({"challenger": "2"} if event == "challenger" else {})
    assert MlflowClient(uri(tmp_path)).get_model_version("pleat", "2").tags["pleat.verdict"] == event


def test_the_first_model_must_reach_the_floors(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, SWAPPED)
    outcome = run()
    assert (outcome.event, outcome.champion) == ("rejected", "")
    assert aliases(uri(tmp_path)) == {}


def test_a_broken_champion_gives_way(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, RIGHT)
    run()
    for graph in (tmp_path / "mlruns").rglob("network.onnx"):
        graph.unlink()
    put_model(tmp_path, rows, Colour(unsure=0.01))
    outcome = run()
    assert (outcome.event, outcome.champion) == ("promoted", "2")
    assert "Champion version 1 is broken" in " ".join(outcome.reasons)
    with pytest.raises(PleatError, match=r"Version 1 is broken: .*The champion stays as it was"):
        promotion.rollback(settings(), None, "")
    assert aliases(uri(tmp_path)) == {"champion": "2"}


def test_a_broken_candidate_is_rejected(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, RIGHT)
    requirements = tmp_path / "data" / "refit" / "package" / "requirements.txt"
    requirements.write_text(requirements.read_text() + "a-package-that-is-nowhere==1.0\n")
    outcome = run()
    assert (outcome.event, outcome.champion) == ("rejected", "")
    assert "its requirement a-package-that-is-nowhere==1.0 is not installed here" in outcome.reasons[0]


def test_no_model_is_judged_on_what_it_was_trained_on(
    tmp_path: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion once learned from ten rows of today's holdout, as when the salt was changed."""
    learned = rows["sample_id"].iloc[5:15].tolist()
    put_model(tmp_path, rows, RIGHT, trained_on=learned)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "_trained_on", lambda _: set())
        run()
    asked: list[set[str]] = []
    measure = judging.measure

    def watched(models: Sequence[tuple[str, Path]], images: Sequence[Path], targets: Sequence[str]) -> list:
        asked.append({path.name for path in images})
        return measure(models, images, targets)

    monkeypatch.setattr(judging, "measure", watched)
    put_model(tmp_path, rows, Colour(unsure=0.01))
    outcome = run()
    assert asked == [set(rows["sample_id"]) - set(learned)]
    assert outcome.evidence["n_rows"] == len(rows) - 10
    # A candidate that has seen them all cannot be judged at all.
    put_model(tmp_path, rows, Colour(unsure=0.02), trained_on=rows["sample_id"])
    outcome = run()
    assert outcome.event == "rejected"
    assert outcome.reasons[0].startswith("One of the models was trained on every row of the holdout")


def test_approval(tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture) -> None:
    ask = {"promotion.mode": "approve"}
    put_model(tmp_path, rows, RIGHT)
    first = run(**ask)
    assert (first.event, first.champion) == ("approval requested", "")
    assert "`pleat approve 1`" in capsys.readouterr().out
    assert aliases(uri(tmp_path)) == {"challenger": "1"}
    event = promotion.approve(settings(), None, False, "fine", by="Ada in Airflow")
    assert (event.kind, event.actor, event.reasons) == ("approved", "Ada in Airflow", ["fine"])
    assert aliases(uri(tmp_path)) == {"champion": "1"}
    assert run(**ask).event == "promoted"  # asked and answered
    with pytest.raises(PleatError, match="No version of pleat waits for approval"):
        promotion.approve(settings(), None, False, "")

    MlflowClient(uri(tmp_path)).delete_registered_model_alias("pleat", "champion")  # so that the next is a first model
    put_model(tmp_path, rows, Colour(unsure=0.01))
    assert run(**ask).event == "approval requested"
    promotion.approve(settings(), "2", True, "too dark")
    assert run(**ask).event == "declined"
    assert aliases(uri(tmp_path)) == {}
    assert [event.kind for event in Registry("pleat").history()][-2:] == ["approval requested", "declined"]


def test_an_approval_of_yesterday_does_not_beat_todays_champion(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, RIGHT)
    run(**{"promotion.mode": "approve"})
    put_model(tmp_path, rows, Colour(unsure=0.01))
    assert run().champion == "2"
    with pytest.raises(PleatError, match="Version 1 was judged against none, but now version 2 is the champion"):
        promotion.approve(settings(), "1", False, "")
    assert aliases(uri(tmp_path)) == {"champion": "2"}


def test_a_dry_run_changes_nothing(tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture) -> None:
    put_model(tmp_path, rows, RIGHT)
    outcome = run(**{"promotion.mode": "dry_run"})
    assert (outcome.version, outcome.event, outcome.decision) == ("candidate", None, "promoted")
    assert "The candidate would be promoted (dry run)." in capsys.readouterr().out
    assert MlflowClient(uri(tmp_path)).search_registered_models() == []


def test_a_registry_that_goes_away_in_the_middle_loses_nothing(
    tmp_path: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_model(tmp_path, rows, RIGHT)

    def away(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "record", away)
        with pytest.raises(PleatError, match="The champion stays as it was") as caught:
            run()
    assert caught.value.temporary
    assert aliases(uri(tmp_path)) == {}
    assert not Path("reports/registration").exists()
    outcome = run()
    assert (outcome.version, outcome.champion) == ("1", "1")
    assert versions(uri(tmp_path)) == ["1"]


def test_the_loser_of_a_race_is_judged_again(
    tmp_path: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    put_model(tmp_path, rows, RIGHT)
    run()
    put_model(tmp_path, rows, Colour(unsure=0.01))
    judge, raced = judging.gate.judge, []

    def slow(*arguments: object) -> object:
        if not raced:  # while this one is judged as if there were no champion, another process promotes version 1
            raced.append(True)
            registry = Registry("pleat")
            registry.record("promoted", "1", "", "1", ["It was first."], {})
        return judge(*arguments)

    registry = Registry("pleat")
    registry.record("rolled back", "1", "1", "", [], {})  # no champion now
    monkeypatch.setattr(judging.gate, "judge", slow)
    outcome = run()
    assert "version 1 became champion meanwhile; version 2 is judged again, against it" in capsys.readouterr().out
    assert (outcome.event, outcome.champion) == ("challenger", "1")  # equal answers: it gains nothing
    found = [(event.kind, event.version, event.before, event.counts) for event in registry.history()][2:]
    assert found == [
        ("promoted", "1", "", True), ("promoted", "2", "", False), ("challenger", "2", "1", True),
    ]  # fmt: skip


def test_other_settings_judge_again(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, SWAPPED)
    assert run().event == "rejected"
    low = {"promotion.floors.f1_weighted": 0.1, "promotion.floors.f1_macro": 0.1}
    assert run(**low).event == "promoted"
    assert versions(uri(tmp_path)) == ["1"]


def test_without_a_holdout_nothing_is_promoted(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows.iloc[:0], RIGHT)
    outcome = run()
    assert outcome.event == "rejected"
    assert "`split.holdout.fraction` in params.yaml is 0" in outcome.reasons[0]


def test_merged_labels_are_no_mistake_of_an_older_champion(tmp_path: Path, rows: pd.DataFrame) -> None:
    put_model(tmp_path, rows, RIGHT)
    run()
    renamed = rows.assign(label=rows["label"].replace("blue", "green"))
    put_model(tmp_path, renamed, Colour(unsure=0.01))
    outcome = run(**{"labels.merge": {"Blue": "green"}})
    assert outcome.evidence["champion"]["f1_weighted"] == 1.0


def test_refit_has_not_run(tmp_path: Path, rows: pd.DataFrame) -> None:
    shutil.rmtree(tmp_path / "data" / "refit", ignore_errors=True)
    with pytest.raises(PleatError, match=r"data/refit/metrics\.json is missing"):
        run()
