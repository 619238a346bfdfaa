"""MLflow: what is logged, that nothing is logged twice, and that a server that is away costs nothing."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from workspace import check, environment, lock, run

from pipeline_steps import live, params, tracking
from pipeline_steps.vision.engine import Epoch

MODEL, FOLDS = "cnn_tiny", [0, 1]


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, without its MLflow store, as the current folder."""
    folder = tmp_path / "workspace"
    leave = shutil.ignore_patterns("mlflow.db*", "mlruns", ".dvc", ".pleat")
    shutil.copytree(finished, folder, ignore=leave)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def runs(uri: str) -> dict[str, Run]:
    """All runs by name; a name that occurs twice is an error."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real tracking server on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, cwd=folder, env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            with contextlib.suppress(URLError, ConnectionError), urllib.request.urlopen(f"{uri}/health", timeout=5):
                break
            time.sleep(0.2)
        assert server.poll() is None, "the MLflow server did not start"
        yield uri
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def test_the_first_run_is_in_the_default_store(finished: Path) -> None:
    found = runs(f"sqlite:///{finished}/mlflow.db")
    pipeline, parent = found["pipeline sample"], found[MODEL]
    assert all(item.info.status == "FINISHED" for item in found.values())
    assert len(found) == 1 + 2 * (1 + len(FOLDS)) + 1  # the last for the refitted model
    summary = pd.read_csv(finished / "reports" / "leaderboard.csv").set_index("model").loc[MODEL]
    assert parent.data.metrics["f1_weighted"] == pytest.approx(summary["f1_weighted"], abs=1e-5)
    assert parent.data.metrics["macs"] == summary["macs"]
    assert parent.data.tags["pleat.pipeline_run"] == pipeline.info.run_id
    version = lock(finished)["ingest@sample"]["deps"][0]["md5"]
    commit = check(finished, "git", "rev-parse", "HEAD").strip()
    for item in found.values():
        assert item.data.tags["pleat.data_version"] == f"sample={version}"
        assert item.data.tags["pleat.code_version"].removesuffix("-dirty") == commit
        assert item.data.tags["pleat.recipe"] == "sample"
        assert [entry.dataset.name for entry in item.inputs.dataset_inputs] == ["sample"]
    for fold in FOLDS:
        child = found[f"{MODEL} fold {fold}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["training.learning_rate"] == "0.005"
        assert child.data.params["fold"] == str(fold)


def test_every_epoch_of_a_fold_is_logged_once(finished: Path) -> None:
    uri = f"sqlite:///{finished}/mlflow.db"
    child = runs(uri)[f"{MODEL} fold 1"]
    history = pd.read_csv(finished / "data" / "train" / MODEL / "fold_1" / "history.csv")
    for name in ("train_loss", "train_accuracy", "inner_loss", "inner_accuracy", "inner_f1_weighted"):
        logged = MlflowClient(uri).get_metric_history(child.info.run_id, name)
        assert [metric.step for metric in logged] == history["epoch"].tolist()
        assert [metric.value for metric in logged] == pytest.approx(history[name].tolist())


def test_pages_and_tables_are_artifacts(finished: Path) -> None:
    uri = f"sqlite:///{finished}/mlflow.db"
    client, found = MlflowClient(uri), runs(uri)
    report = {Path(item.path).name for item in client.list_artifacts(found[MODEL].info.run_id, "report")}
    assert {"index.html", "per_class.csv", "confusion.png", "curves.png"} <= report
    costs = {Path(item.path).name for item in client.list_artifacts(found[MODEL].info.run_id, "complexity")}
    assert costs == {"index.html", "layers.csv", "totals.json"}
    layers = pd.read_csv(finished / "reports" / "complexity" / MODEL / "layers.csv")
    logged = found[MODEL].data.metrics
    assert (logged["flops"], logged["bytes_moved"]) == (2 * layers["macs"].sum(), layers["bytes_moved"].sum())
    assert logged["receptive_field_px"] > 1
    assert f"complexity/{MODEL}/index.html" in (finished / "reports" / "index.html").read_text()
    landing = {Path(item.path).name for item in client.list_artifacts(found["pipeline sample"].info.run_id, "report")}
    assert {"index.html", "leaderboard.csv", "quality_against_macs.png", "split"} <= landing


def test_an_unreachable_server_costs_no_result_and_sync_catches_up(workspace: Path) -> None:
    shutil.rmtree(workspace / "reports" / "models" / MODEL)
    away = "http://user:secret@127.0.0.1:1"
    done = run(workspace, "pleat", "evaluate", MODEL, MLFLOW_TRACKING_URI=away)
    assert done.returncode == 0, done.stderr
    assert (workspace / "reports" / "models" / MODEL / "index.html").exists()
    assert "MLflow at http://***@127.0.0.1:1 cannot be used" in done.stdout
    assert "pleat sync" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    failed = run(workspace, "pleat", "sync", MLFLOW_TRACKING_URI=away)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr

    with mlflow_server(workspace.parent) as uri:
        check(workspace, "pleat", "sync", MLFLOW_TRACKING_URI=uri)
        first = {name: item.info.run_id for name, item in runs(uri).items()}
        assert len(first) == 1 + 2 * (1 + len(FOLDS))
        check(workspace, "pleat", "sync", MLFLOW_TRACKING_URI=uri)  # nothing is logged twice
        assert {name: item.info.run_id for name, item in runs(uri).items()} == first
        pages = MlflowClient(uri).list_artifacts(first[MODEL], "report")
        assert "report/index.html" in {item.path for item in pages}


def test_what_is_evaluated_again_keeps_its_duration(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{workspace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # MLflow keeps stores by address, and a relative one is every test's
    tracker = tracking.Tracker(params.load())
    tracker.model(MODEL)
    tracker.pipeline()
    before = runs(uri)
    tracker.model(MODEL)
    tracker.pipeline()
    after = runs(uri)
    assert len(MlflowClient(uri).get_metric_history(before[MODEL].info.run_id, "accuracy")) == 2
    assert {name: run.info.end_time for name, run in after.items()} == {
        name: run.info.end_time for name, run in before.items()
    }


def test_processes_that_start_together_share_one_store_and_one_parent(workspace: Path) -> None:
    code = (
        "import sys; from pipeline_steps import params, tracking;"
        "tracking.Tracker(params.load()).fold(sys.argv[1], int(sys.argv[2]))"
    )
    python = shutil.which("python") or "python"
    together = [
        subprocess.Popen([python, "-c", code, model, fold], cwd=workspace, env=environment())
        for model, fold in ((MODEL, "0"), (MODEL, "1"), ("cnn_small", "0"))
    ]
    assert [process.wait() for process in together] == [0, 0, 0]
    found = runs(f"sqlite:///{workspace}/mlflow.db")
    assert set(found) == {MODEL, f"{MODEL} fold 0", f"{MODEL} fold 1", "cnn_small", "cnn_small fold 0"}


def test_long_trainings_are_seen_while_they_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LIVE_AFTER_S", 0.0)
    monkeypatch.setattr(live, "LOG_EVERY_S", 0.0)
    settings = params.load()
    log = live.LiveLog(settings, MODEL, 0)
    history = pd.read_csv(workspace / "data" / "train" / MODEL / "fold_0" / "history.csv")
    lines = [Epoch(**line) for line in history.to_dict("records")]
    lines = [replace(line, train_loss=line.train_loss * (1 + 1e-8)) for line in lines]  # digits that the file lacks
    for line in lines[:2]:
        log(line)
    uri = f"sqlite:///{workspace}/mlflow.db"
    seen = runs(uri)[f"{MODEL} fold 0"]
    assert seen.info.status == "RUNNING"
    assert seen.data.metrics["train_loss"] == history["train_loss"][1] != lines[1].train_loss

    tracking.Tracker(settings).fold(MODEL, 0)  # as `evaluate` does once the fold is done
    finished_run = runs(uri)[f"{MODEL} fold 0"]
    assert finished_run.info.run_id == seen.info.run_id
    assert finished_run.info.status == "FINISHED"
    logged = MlflowClient(uri).get_metric_history(seen.info.run_id, "train_loss")
    assert [metric.step for metric in logged] == history["epoch"].tolist()
    assert [metric.value for metric in logged] == history["train_loss"].tolist()


def test_a_store_that_fails_later_is_said_once(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(live, "LIVE_AFTER_S", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    log = live.LiveLog(params.load(), MODEL, 0)
    for number in (1, 2, 3):
        log(Epoch(number, 1.0, 0.5, 1.0, 0.5, 0.5))
    assert capsys.readouterr().out.count("cannot be used") == 1
