"""New data from the inbox to a new champion and back, on real images, in a running Airflow."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from airflow_served import Served, served_in
from mlflow import MlflowClient
from ruamel.yaml import YAML
from workspace import check

CLASSES = ["Dress", "Longsleeve", "Pants", "Shirt", "Shoes", "T-Shirt"]
FIRST, LATER = 18, 75  # images of each class, of different senders
DELIVERY = "spring"
DOWNLOAD = """
import sys
from pathlib import Path
from pipeline_steps.registry import Registry
Registry("pleat").download(sys.argv[1], Path(sys.argv[2]) / sys.argv[1])
"""


@pytest.fixture(scope="module")
def table(real_data: Path) -> pd.DataFrame:
    """Rows of the real set with whether they come later; no sender is on both sides."""
    rows = pd.read_csv(real_data / "data" / "clothing" / "images.csv")
    rows = rows[rows["label"].isin(CLASSES)]
    later = rows["sender_id"].map(lambda sender: hash_of(sender) % 5 != 0)
    parts = [
        part.groupby("label").head(count).assign(later=side)
        for side, part, count in ((False, rows[~later], FIRST), (True, rows[later], LATER))
    ]
    return pd.concat(parts)


def hash_of(sender: object) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(str(sender), 1))


def write_delivery(rows: pd.DataFrame, real_data: Path, folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in rows["image"]:
        shutil.copy(real_data / "data" / "clothing" / "images" / f"{name}.jpg", folder / "images")
    rows.drop(columns="later").to_csv(folder / "images.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def shop(real_data: Path, table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Airflow on a project whose only batch are the first senders' images."""

    def prepare(project: Path) -> None:
        source = write_delivery(table[~table["later"]], real_data, tmp_path_factory.mktemp("source") / "first")
        weights = real_data / "weights" / "mobilenetv2_100.safetensors"
        chosen = [
            "experiment.batches=[sample]", "experiment.folds=2", f"models.mobilenetv2_100.weights={weights}",
            "training.mobilenetv2_100.max_epochs=8", "split.group_by=sender_id", "inbox.settle_s=0",
            "promotion.floors.f1_weighted=0.3", "promotion.floors.f1_macro=0.3", "promotion.confidence=0.8",
            "promotion.max_cost.latency=20",  # both are the same network, on a busy machine
        ]  # fmt: skip
        check(project, "pleat", "use", "clothing", *(word for setting in chosen for word in ("--set", setting)))
        check(project, "dvc", "remote", "add", "--default", "storage", str(tmp_path_factory.mktemp("remote")))
        check(project, "pleat", "data", "add", str(source), "--name", "first")
        settings = YAML().load(project / "params.yaml")
        settings["experiment"]["batches"] = ["first"]
        YAML().dump(settings, project / "params.yaml")
        check(project, "git", "add", "--all")
        check(project, "git", "-c", "user.name=me", "-c", "user.email=me@localhost", "commit", "--quiet", "-m", "first")

    with served_in(tmp_path_factory.mktemp("shop"), prepare) as running:
        yield running


@pytest.fixture(scope="module")
def first_run(shop: Served) -> str:
    """The run that makes the first champion."""
    run = shop.airflow.trigger({})
    assert shop.airflow.wait(run) == "success", [task for task in shop.airflow.tasks(run) if task["state"] == "failed"]
    return run


@pytest.fixture(scope="module")
def looked(shop: Served, first_run: str, table: pd.DataFrame, real_data: Path) -> str:
    """The run of `pleat_new_data` that finds the later senders' images."""
    write_delivery(table[table["later"]], real_data, shop.project / "data" / "inbox" / DELIVERY)
    run = shop.airflow.trigger({}, dag="pleat_new_data")
    assert shop.airflow.wait(run, dag="pleat_new_data") == "success", shop.airflow.log(
        run, "look", dag="pleat_new_data"
    )
    return run


@pytest.fixture(scope="module")
def second_run(shop: Served, looked: str) -> str:
    """The run that the event began."""
    [run] = shop.airflow.until(lambda: by_event(shop), 120, "a run for the new batch")
    assert shop.airflow.wait(run) == "success", [task for task in shop.airflow.tasks(run) if task["state"] == "failed"]
    return run


def by_event(shop: Served) -> list[str]:
    runs = shop.airflow.get("dags/pleat_train/dagRuns", order_by="run_after")["dag_runs"]
    return [str(run["dag_run_id"]) for run in runs if run["run_type"] == "asset_triggered"]


def pleat(shop: Served, *words: str) -> str:
    return check(shop.project, "pleat", *words, MLFLOW_TRACKING_URI=store(shop))


def store(shop: Served) -> str:
    return f"sqlite:///{shop.project / 'mlflow.db'}"


def aliases(shop: Served) -> dict[str, str]:
    found = MlflowClient(store(shop)).get_registered_model("pleat").aliases
    return {alias: str(version) for alias, version in found.items()}


def git(shop: Served, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=shop.project, capture_output=True, text=True, check=True).stdout


def test_the_first_model_is_champion(shop: Served, first_run: str) -> None:
    assert aliases(shop)["champion"] == "1"
    assert shop.airflow.task(first_run, "approve")["state"] == "skipped"


def test_the_delivery_is_one_batch_everywhere(shop: Served, looked: str) -> None:
    [taken] = shop.airflow.returned(looked, "look", dag="pleat_new_data")["taken"]
    assert (taken["delivery"], taken["outcome"]) == (DELIVERY, "added")
    batch = taken["batch"]
    assert YAML(typ="safe").load(shop.project / "params.yaml")["experiment"]["batches"] == ["first", batch]
    assert git(shop, "tag", "--list").split() == [f"data/{batch}"]
    assert f"data/raw/{batch}.dvc" in git(shop, "show", "--name-only", f"data/{batch}")
    assert git(shop, "status", "--porcelain", "params.yaml", "data/raw") == ""
    assert "Everything is up to date" in check(shop.project, "dvc", "push", f"data/raw/{batch}.dvc")
    [event] = shop.airflow.get("assets/events")["asset_events"]
    assert event["extra"]["batches"] == [batch]
    assert event["extra"]["data_version"] == taken["data_version"]
    assert taken["data_version"].startswith("first=")
    assert f",{batch}=" in taken["data_version"]
    assert list((shop.project / "data" / "inbox").iterdir()) == []
    assert (shop.project / taken["report"]).is_file()


def test_retraining_uses_the_new_data_and_the_same_holdout(shop: Served, first_run: str, second_run: str) -> None:
    [taken] = [shop.airflow.returned(second_run, "setup")]
    [event] = shop.airflow.get("assets/events")["asset_events"]
    assert taken["data_version"] == event["extra"]["data_version"]
    before, after = (
        pd.read_parquet(shop.workspace(run) / "data" / "split" / "folds.parquet").set_index("sample_id")["side"]
        for run in (first_run, second_run)
    )
    assert len(after) > 4 * len(before)
    assert after.loc[before.index].tolist() == before.tolist()  # nobody changes sides


def test_the_gate_judged_both_on_rows_that_neither_learned_from(shop: Served, second_run: str, tmp_path: Path) -> None:
    verdict = pd.read_json(shop.workspace(second_run) / "reports" / "registration" / "verdict.json", typ="series")
    holdout = pd.read_parquet(shop.workspace(second_run) / "data" / "refit" / "holdout" / "label.parquet")
    assert verdict["evidence"]["n_rows"] == len(holdout)
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        check(shop.project, sys.executable, "-c", DOWNLOAD, version, str(tmp_path), MLFLOW_TRACKING_URI=store(shop))
        package = tmp_path / version / "artifacts" / "package" / "trained_on.txt"
        learned = set(package.read_text().split())
        assert learned
        assert not learned & set(holdout["sample_id"])
    assert verdict["event"] == "promoted", verdict["reasons"]
    assert aliases(shop) == {"champion": "2"}


def test_the_same_images_again_are_nothing_new(
    shop: Served, second_run: str, table: pd.DataFrame, real_data: Path
) -> None:
    write_delivery(table[table["later"]], real_data, shop.project / "data" / "inbox" / "again")
    run = shop.airflow.trigger({}, dag="pleat_new_data")
    assert shop.airflow.wait(run, dag="pleat_new_data") == "success"
    [taken] = shop.airflow.returned(run, "look", dag="pleat_new_data")["taken"]
    assert (taken["delivery"], taken["outcome"]) == ("again", "nothing new")
    assert shop.airflow.task(run, "announce", dag="pleat_new_data")["state"] == "skipped"
    assert len(shop.airflow.get("assets/events")["asset_events"]) == 1


def test_a_bad_delivery_is_set_aside_and_the_dag_says_so(shop: Served, second_run: str) -> None:
    before = (shop.project / "params.yaml").read_bytes()
    folder = shop.project / "data" / "inbox" / "broken"
    (folder / "Pants").mkdir(parents=True)
    for number in range(5):
        (folder / "Pants" / f"{number}.jpg").write_bytes(b"no image")
    run = shop.airflow.trigger({}, dag="pleat_new_data")
    assert shop.airflow.wait(run, dag="pleat_new_data") == "failed"
    assert shop.airflow.task(run, "set_aside", dag="pleat_new_data")["state"] == "failed"
    assert "broken was set aside: " in shop.airflow.log(run, "set_aside", dag="pleat_new_data")
    assert not folder.exists()
    assert (shop.project / "params.yaml").read_bytes() == before


def test_a_second_event_for_the_same_data_trains_nothing(shop: Served, second_run: str) -> None:
    [asset] = [item for item in shop.airflow.get("assets")["assets"] if item["name"] == "pleat_data"]
    order = {"asset_id": asset["id"], "extra": {"data_version": "the same"}}
    assert shop.airflow.ask("POST", "assets/events", json=order).ok
    runs = shop.airflow.until(lambda: [run for run in by_event(shop) if run != second_run], 120, "another run")
    assert shop.airflow.wait(runs[0]) == "success"
    assert {task["state"] for task in shop.airflow.tasks(runs[0])} == {"skipped"}
    assert "was trained on before" in shop.airflow.log(runs[0], "setup")


def test_rollback_and_history(shop: Served, second_run: str) -> None:
    assert "Version 1 is the champion again, instead of version 2" in pleat(shop, "rollback", "--comment", "as a test")
    assert aliases(shop) == {"champion": "1"}
    lines = [line.split() for line in pleat(shop, "history").splitlines()]
    events = [(line[0], line[3]) for line in lines if line and line[0].isdigit() and len(line) > 4]
    assert events == [("1", "promoted"), ("2", "promoted"), ("3", "rolled")], lines
    status = pleat(shop, "status")
    assert "version 1 of pleat (mobilenetv2_100), rolled back" in status
    assert "data/inbox is empty" in status


def test_a_person_approves_in_airflow(shop: Served, second_run: str) -> None:
    """After the rollback the second model is better than the champion again; this time somebody is asked."""
    run = shop.airflow.trigger({"promote": "approve"})
    shop.airflow.until(lambda: shop.airflow.task(run, "approve")["state"] == "awaiting_input", 240, "the question")
    assert aliases(shop) == {"champion": "1", "challenger": "2"}
    question = f"dags/pleat_train/dagRuns/{run}/taskInstances/approve/-1/hitlDetails"
    log = shop.project / ".pleat" / "airflow" / "output" / "scheduler.log"
    ended = re.compile(rf"Received executor event .* task_id='approve', run_id='{re.escape(run)}'")
    # Airflow 3.3 asks again where it is answered while the task that asks has not ended.
    shop.airflow.until(lambda: ended.search(log.read_text()), 60, "the end of the task that asks")
    asked = shop.airflow.get(question)
    assert asked["subject"] == "Shall version 2 become the champion?"
    assert "Version 2 scores better than champion version 1" in asked["body"]
    answer = {"chosen_options": ["Approve"], "params_input": {"comment": "seen by a person"}}
    answered = shop.airflow.ask("PATCH", question, json=answer)
    assert answered.ok, answered.text
    assert shop.airflow.wait(run) == "success"
    assert aliases(shop) == {"champion": "2"}
    printed = " ".join(pleat(shop, "history").split())
    assert "approved 2 1 → 2 admin in Airflow" in printed
    assert "seen by a person" in printed


def test_scoring_a_folder_with_the_champion(shop: Served, first_run: str, table: pd.DataFrame) -> None:
    images = shop.project / "data" / "raw" / "first" / "images"
    out = shop.project / "scores.parquet"
    run = shop.airflow.trigger({"images": str(images), "out": str(out)}, dag="pleat_score")
    assert shop.airflow.wait(run, dag="pleat_score") == "success", shop.airflow.log(run, "score", dag="pleat_score")
    scores = pd.read_parquet(out)
    assert len(scores) == FIRST * len(CLASSES)
    truth = dict(zip(table["image"], table["label"], strict=True))
    right = [truth[Path(path).stem] == label for path, label in zip(scores["path"], scores["label"], strict=True)]
    assert sum(right) > 0.6 * len(right)  # most of these it was trained on
    answer = shop.airflow.ask("POST", "dags/pleat_score/dagRuns", json={"logical_date": None, "conf": {"images": "x"}})
    assert answer.status_code == 400
