"""`pleat_train` in a running Airflow (LocalExecutor) with MLflow's server, through the REST API; with faults."""

import json
import re
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow_served import Served
from conftest import content
from workspace import check, copy_checkout, use_quick

WITHIN_S = 10  # in which a stopped task's processes are gone
CONF = {
    "models": ["cnn_tiny"],
    "folds": 2,
    "epochs": 2,
    "overrides": {"training.cnn_tiny.learning_rate": 0.01},
}
# Long enough that something can happen to it.
LONG = {"models": ["cnn_tiny"], "folds": 2, "epochs": 24, "overrides": {"training.cnn_tiny.patience": 24}}


@pytest.fixture(scope="module")
def first(served: Served) -> str:
    """A run that has ended well."""
    started = served.airflow.trigger(CONF)
    state = served.airflow.wait(started)
    states = {(task["task_id"], task["map_index"]): task["state"] for task in served.airflow.tasks(started)}
    assert state == "success", states
    return started


def test_a_writer_waits_for_another_one(served: Served) -> None:
    """Airflow's database is one file; whoever triggers while the scheduler writes for long waits, and gets no error."""
    database = sqlite3.connect(served.project / ".pleat" / "airflow" / "airflow.db", isolation_level=None, timeout=60)
    with closing(database), ThreadPoolExecutor() as beside:
        database.execute("BEGIN IMMEDIATE")
        answer = beside.submit(served.airflow.ask, "POST", "variables", json={"key": "waited", "value": "yes"})
        time.sleep(7)  # SQLite itself gives up after 5
        assert not answer.done()
        database.execute("ROLLBACK")
        assert answer.result().ok, answer.result().text


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def training(workspace: Path, fold: int) -> list[psutil.Process]:
    """The processes of `pleat train cnn_tiny FOLD` in a workspace."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):  # what cannot be read is None
        here = process.info["cwd"] == str(workspace)
        if here and (process.info["cmdline"] or [])[-2:] == ["cnn_tiny", str(fold)] and alive(process):
            found.append(process)
    return found


def wait_for_epoch(served: Served, workspace: Path, fold: int) -> list[psutil.Process]:
    """Waits until a fold has finished at least an epoch; gives back the processes that train it."""
    checkpoint = workspace / ".pleat" / "checkpoints" / "cnn_tiny" / f"fold_{fold}.pt"
    served.airflow.until(lambda: checkpoint.exists() and training(workspace, fold), 180, f"an epoch of fold {fold}")
    return training(workspace, fold)


def test_a_run_with_overrides_ends_in_mlflow(served: Served, first: str) -> None:
    name = served.airflow.returned(first, "setup")["name"]
    [experiment] = [item for item in served.mlflow.search_experiments() if item.name == "pleat"]
    runs = served.mlflow.search_runs([experiment.experiment_id], f"tags.`pleat.run.{name}` = 'yes'")
    kinds = sorted((item.data.tags["pleat.kind"], item.data.params.get("model")) for item in runs)
    folds = [("fold", "cnn_tiny"), ("fold", "cnn_tiny")]
    assert kinds == [*folds, ("model", "cnn_tiny"), ("pipeline", None), ("refit", "cnn_tiny")]
    assert {item.info.status for item in runs} == {"FINISHED"}
    described = served.airflow.returned(first, "setup")
    assert {item.data.tags["pleat.data_version"] for item in runs} == {described["data_version"]}
    assert {item.data.tags["pleat.code_version"] for item in runs} == {described["code_version"]}
    fold = next(item for item in runs if item.data.tags["pleat.kind"] == "fold")
    assert fold.data.params["training.learning_rate"] == "0.01"
    assert fold.data.params["training.max_epochs"] == "2"
    # The scores in MLflow are those in the workspace.
    leaderboard = json.loads((served.workspace(first) / "reports" / "leaderboard.json").read_text())
    for item in runs:
        if item.data.tags["pleat.kind"] == "model":
            shown = leaderboard[item.data.params["model"]]["f1_weighted"]
            assert item.data.metrics["f1_weighted"] == pytest.approx(shown, abs=1e-6)
    pipeline = next(item for item in runs if item.data.tags["pleat.kind"] == "pipeline")
    files = {artifact.path for artifact in served.mlflow.list_artifacts(pipeline.info.run_id, "report")}
    assert "report/index.html" in files
    assert served.airflow.returned(first, "compare")["lock"]


def test_mapped_tasks_have_names_and_logs_have_the_stages_lines(served: Served, first: str) -> None:
    tasks = served.airflow.tasks(first)
    names = {task["rendered_map_index"] for task in tasks if task["task_id"] == "train"}
    assert names == {"cnn_tiny · fold 0", "cnn_tiny · fold 1"}
    log = served.airflow.log(first, "train", 0)
    assert "epoch 1/2 train loss" in log
    shown = served.airflow.log(first, "setup")
    assert "learning_rate: 0.01" in shown
    assert "data version  sample=" in shown
    assert "MLflow" in shown


def test_folds_train_side_by_side(served: Served, first: str) -> None:
    spans = [
        (datetime.fromisoformat(task["start_date"]), datetime.fromisoformat(task["end_date"]))
        for task in served.airflow.tasks(first)
        if task["task_id"] == "train"
    ]
    pairs = [(one, other) for one in spans for other in spans if one < other]
    assert any(one[0] < other[1] and other[0] < one[1] for one, other in pairs)


def test_an_unchanged_run_trains_nothing_beside_one_with_other_settings(served: Served, first: str) -> None:
    [experiment] = [item for item in served.mlflow.search_experiments() if item.name == "pleat"]
    before = {item.info.run_id for item in served.mlflow.search_runs([experiment.experiment_id])}
    again = served.airflow.trigger(CONF)
    # At the same time, in a workspace of its own.
    other = served.airflow.trigger({**CONF, "overrides": {"experiment.seed": 3}})
    assert [served.airflow.wait(run) for run in (again, other)] == ["success", "success"]
    assert "seed: 3" in (served.workspace(other) / "params.yaml").read_text()
    assert "seed: 17" in (served.workspace(again) / "params.yaml").read_text()
    assert "seed: 17" in (served.project / "params.yaml").read_text()
    scores = [json.loads((served.workspace(run) / "reports/leaderboard.json").read_text()) for run in (again, other)]
    assert scores[0]["cnn_tiny"] != scores[1]["cnn_tiny"]
    for index in range(2):
        log = served.airflow.log(again, "train", index)
        assert "is cached - skipping run" in log
        assert "epoch 1/" not in log
    name = served.airflow.returned(again, "setup")["name"]
    tagged = served.mlflow.search_runs([experiment.experiment_id], f"tags.`pleat.run.{name}` = 'yes'")
    assert {item.info.run_id for item in tagged} == before  # what was there already is tied to this run too
    reports = [content(served.workspace(each) / "reports") for each in (first, again)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("conf", "reason"),
    [
        ({"recipe": "nothing"}, "'nothing' is not one of"),
        ({"models": ["vgg99"]}, "vgg99"),
        ({"folds": 1}, "1 is less than the minimum of 2"),
        ({"folds": "three"}, "'three' is not of type"),
        ({"epochs": 0}, "0 is less than the minimum of 1"),
        ({"batches": ["elsewhere"]}, "'elsewhere' is not one of"),
        ({"promote": "always"}, "'always' is not one of"),
        ({"overrides": {"training.cnn_tiny.learning_rat": 0.1}}, "learning_rat"),
        ({"overrides": {"training.cnn_tiny.learning_rate": -1}}, "-1 is less than or equal to the minimum of 0"),
        ({"overrides": {"training.cnn_tiny.mirror": "perhaps"}}, "'perhaps' is not of type 'boolean'"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(served: Served, conf: dict[str, Any], reason: str) -> None:
    before = served.airflow.get("dags/pleat_train/dagRuns")["total_entries"]
    answer = served.airflow.ask("POST", "dags/pleat_train/dagRuns", json={"logical_date": None, "conf": conf})
    assert answer.status_code == 400
    assert reason in answer.json()["detail"]
    assert served.airflow.get("dags/pleat_train/dagRuns")["total_entries"] == before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of LONG by `dvc repro`, in a project with a cache of its own."""
    folder = copy_checkout(tmp_path_factory.mktemp("undisturbed"))
    use_quick(folder)
    text = "from pathlib import Path; from pipeline_steps.trigger_form import document as d; "
    check(folder, sys.executable, "-c", text + f"t = d(Path(), {LONG!r}); Path('params.yaml').write_text(t)")
    check(folder, "dvc", "repro", "train", PLEAT_CPU_SLOTS="2", PLEAT_LEASES=str(folder / "leases"))
    return folder


def test_killed_training_and_a_killed_scheduler_cost_nothing(served: Served, undisturbed: Path) -> None:
    started = served.airflow.trigger(LONG)
    served.airflow.until(lambda: served.airflow.task(started, "setup")["state"] == "success", 120, "the workspace")
    workspace = served.workspace(started)
    # The training itself, then Airflow's process that runs the other fold's task, then the scheduler.
    for process in wait_for_epoch(served, workspace, 0):
        process.kill()
    wait_for_epoch(served, workspace, 1)
    before = training(workspace, 1)
    _supervisor(before[0]).kill()
    served.airflow.until(lambda: not any(map(alive, before)), WITHIN_S, "the orphaned training to end")
    below = filter(alive, psutil.Process(served.process.pid).children(recursive=True))
    schedulers = [process for process in below if "scheduler" in process.cmdline()[2:3]]
    assert schedulers
    for process in schedulers:
        process.kill()
    state = served.airflow.wait(started, timeout_s=300)
    tasks = {(task["task_id"], task["map_index"]): task for task in served.airflow.tasks(started)}
    assert state == "success", {key: task["state"] for key, task in tasks.items()}
    for fold in range(2):
        attempts = range(1, tasks["train", fold]["try_number"] + 1)
        assert len(attempts) > 1
        log = "".join(served.airflow.log(started, "train", fold, attempt) for attempt in attempts)
        assert f"fold {fold}: going on after epoch " in log
        epochs = re.findall(r"epoch (\d+)/24", log)
        assert len(set(epochs)) == len(epochs)  # none was trained twice
        # Bit for bit what an undisturbed run gives.
        place = Path("data") / "train" / "cnn_tiny" / f"fold_{fold}"
        assert content(workspace / place) == content(undisturbed / place)


def _supervisor(process: psutil.Process) -> psutil.Process:
    """Airflow's process above the task's own: the one that sends heartbeats."""
    names = {parent.pid: " ".join(parent.cmdline()) for parent in process.parents()}
    above = [parent for parent in process.parents() if "pipeline_steps.guard --while" in names[parent.pid]]
    return above[0].parent().parent()  # type: ignore[union-attr, return-value]


def test_a_task_marked_failed_or_cleared_ends_its_processes_and_can_run_again(served: Served) -> None:
    # So long that no fold ends by itself while Airflow is asked.
    conf = {**LONG, "epochs": 1000, "overrides": {"experiment.seed": 5, "training.cnn_tiny.patience": 1000}}
    started = served.airflow.trigger(conf)
    served.airflow.until(lambda: served.airflow.task(started, "setup")["state"] == "success", 120, "the workspace")
    workspace = served.workspace(started)
    marked = wait_for_epoch(served, workspace, 0)
    cleared = wait_for_epoch(served, workspace, 1)
    served.airflow.mark(started, "train", "failed", index=0)
    served.airflow.until(lambda: not any(map(alive, marked)), WITHIN_S, "the marked task to end")
    assert all(map(alive, cleared))  # the other fold trains on
    served.airflow.clear(started, "train", include_downstream=True)
    served.airflow.until(lambda: not any(map(alive, cleared)), WITHIN_S, "the cleared task to end")
    again = []
    for fold in range(2):
        served.airflow.until(partial(training, workspace, fold), 180, f"fold {fold} to train again")
        resumed = partial(_says, served, started, fold, f"fold {fold}: going on after epoch ")
        served.airflow.until(resumed, 180, f"fold {fold} to go on")
        again += training(workspace, fold)
    served.airflow.end(started)  # what follows a fold is tested elsewhere
    served.airflow.until(lambda: not any(map(alive, again)), WITHIN_S, "the tasks of the ended run to end")


def _says(served: Served, run: str, fold: int, words: str) -> bool:
    """Whether the second attempt of a fold has written these words to its log."""
    return served.airflow.task(run, "train", fold)["try_number"] == 2 and words in served.airflow.log(
        run, "train", fold, 2
    )
