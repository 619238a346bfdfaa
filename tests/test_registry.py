"""The registry: order of events, who is champion, races, crashes, changes by hand, a server that is away."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from promotion_project import aliases
from workspace import environment

from pipeline_steps import registry as module
from pipeline_steps.errors import PleatError
from pipeline_steps.registry import Event, Registry, challenger_of, champion_of, former_champions, reachable


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite store with a model of nine versions that hold nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    client.create_registered_model("pleat")
    for _ in range(9):
        client.create_model_version("pleat", "s3://bucket/model")
    return path


@pytest.fixture
def uri(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def promote(registry: Registry, version: str, before: str, kind: str = "promoted") -> Event:
    return registry.record(kind, version, before, version, [f"Reason of {version}."], {"figure": 1.5})


def test_an_event_keeps_all_that_was_said(uri: str) -> None:
    registry = Registry("pleat")
    event = registry.record("rejected", "2", "", "", ["One.", "Two: “ü”."], {"f1": 0.25, "none": None})
    assert event == registry.history()[0]
    assert (event.kind, event.version, event.before, event.after) == ("rejected", "2", "", "")
    assert event.reasons == ["One.", "Two: “ü”."]
    assert event.evidence == {"f1": 0.25, "none": None}
    assert event.at.endswith("+00:00")
    assert "@" in event.actor
    assert aliases(uri) == {}


def test_an_event_counts_only_against_the_champion_of_its_time(uri: str) -> None:
    registry = Registry("pleat")
    first = promote(registry, "1", before="")
    late = promote(registry, "2", before="")  # judged before 1 was there
    again = promote(registry, "2", before="1")
    assert [first.counts, late.counts, again.counts] == [True, False, True]
    assert registry.champion() == "2"
    assert aliases(uri) == {"champion": "2"}
    assert [event.counts for event in registry.history()] == [True, False, True]


def test_any_interleaving_is_one_order(uri: str) -> None:
    """Against a second method: a plain loop that keeps the champion in a variable."""
    rng, registry, champion, stack = random.Random(5), Registry("pleat"), "", []
    for _ in range(25):
        version, before = str(rng.randint(1, 9)), rng.choice([champion, champion, "", str(rng.randint(1, 9))])
        kind = rng.choice(["promoted", "rejected", "challenger", "approved", "approval requested"])
        changes = kind in ("promoted", "approved")
        registry.record(kind, version, before, version if changes else before, [], {})
        if before == champion and changes:
            champion = version
            stack.append(version)
        assert registry.champion() == champion
        assert aliases(uri).get("champion", "") == champion
    assert former_champions(registry.history()) == stack[-2::-1]


def test_processes_that_race_all_get_their_turn(uri: str) -> None:
    """Each judges against the champion it sees, and judges again where another one was quicker."""
    code = """
import sys, time
from pipeline_steps.registry import Registry
registry, tries = Registry("pleat"), 0
while True:
    before = registry.champion()
    tries += 1
    if registry.record("promoted", sys.argv[1], before, sys.argv[1], [], {}).counts:
        break
print(tries)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(version)], env=environment() | {"MLFLOW_TRACKING_URI": uri},
                         stdout=subprocess.PIPE, text=True)
        for version in range(1, 5)
    ]  # fmt: skip
    tries = [int(child.communicate(timeout=120)[0]) for child in children]
    events = Registry("pleat").history()
    assert len(events) == sum(tries)  # nothing is lost
    assert sorted(event.version for event in events if event.counts) == ["1", "2", "3", "4"]  # each once in effect
    chain = [(event.before, event.after) for event in events if event.counts]
    assert [before for before, _ in chain] == ["", *(after for _, after in chain[:-1])]
    assert aliases(uri) == {"champion": chain[-1][1]}


def test_what_a_killed_process_left_is_finished(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("pleat")
    promote(registry, "1", before="")
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "_followed", Registry.history)  # killed after the event, before the alias
        promote(registry, "2", before="1")
    assert aliases(uri) == {"champion": "1"}
    assert registry.champion() == "2"
    assert aliases(uri) == {"champion": "2"}
    assert [event.kind for event in registry.history()] == ["promoted", "promoted"]  # not taken for a change by hand


def test_a_change_by_hand_is_recorded_once(uri: str) -> None:
    registry, client = Registry("pleat"), MlflowClient(uri)
    promote(registry, "1", before="")
    promote(registry, "2", before="1")
    client.set_registered_model_alias("pleat", "champion", "7")
    assert registry.champion() == registry.champion() == "7"
    event = registry.history()[-1]
    assert (event.number, event.kind, event.before, event.after) == (3, "changed outside", "2", "7")
    client.delete_registered_model_alias("pleat", "champion")
    assert registry.champion() == ""
    assert [event.kind for event in registry.history()] == ["promoted"] * 2 + ["changed outside"] * 2


def test_a_champion_from_before_pleat_is_kept(uri: str) -> None:
    MlflowClient(uri).set_registered_model_alias("pleat", "champion", "3")
    registry = Registry("pleat")
    assert registry.champion() == "3"
    assert [(event.kind, event.after) for event in registry.history()] == [("changed outside", "3")]


def test_a_deleted_champion_is_none(uri: str) -> None:
    registry = Registry("pleat")
    promote(registry, "1", before="")
    MlflowClient(uri).delete_model_version("pleat", "1")
    assert registry.champion() == ""
    assert not registry.exists("1")


def test_no_model_yet(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert Registry("another").champion() == ""
    assert Registry("another").history() == []


def event(kind: str, version: str, after: str = "", counts: bool = True) -> Event:
    return Event(0, kind, "", "", version, "", after, [], {}, counts)


def test_challenger_and_former_champions_by_hand() -> None:
    history = [
        event("promoted", "1", "1"),
        event("challenger", "2", "1"),
        event("promoted", "3", "3"),
        event("promoted", "9", "9", counts=False),
        event("approved", "4", "4"),
        event("rolled back", "3", "3"),
    ]
    assert champion_of(history) == "3"
    assert former_champions(history) == ["1"]
    assert former_champions(history[:5]) == ["3", "1"]
    assert challenger_of(history[:2]) == "2"
    assert challenger_of(history) == ""
    waits = [*history, event("approval requested", "5", "3"), event("challenger", "6", "3", counts=False)]
    assert challenger_of(waits) == "5"
    assert challenger_of([*waits, event("declined", "5", "3")]) == ""
    # Down twice and up again.
    assert former_champions([*history, event("rolled back", "1", "1"), event("promoted", "7", "7")]) == ["1"]
    assert former_champions([]) == []


def test_a_server_that_is_away_is_a_sentence_and_no_change_by_hand(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(Registry("pleat"), "1", before="")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@127.0.0.1:1")
    with (
        pytest.raises(PleatError, match=r"registry in MLflow at http://\*\*\*@127\.0\.0\.1:1 cannot") as caught,
        reachable(),
    ):
        Registry("pleat").champion()
    assert caught.value.temporary
    assert "secret" not in str(caught.value)


def test_a_store_that_fails_is_never_taken_for_a_missing_alias(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("pleat")
    promote(registry, "1", before="")

    def locked(*_: object) -> None:
        raise MlflowException("database is locked")

    monkeypatch.setattr(registry.client, "get_registered_model", locked)
    with pytest.raises(MlflowException):
        registry.champion()
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert [event.kind for event in Registry("pleat").history()] == ["promoted"]
