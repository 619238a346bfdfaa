"""`pleat airflow`: one start serves all tests; the last one stops it and starts it again."""

import json
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from pleat_airflow import Running, eventually, free_ports, gone
from workspace import run


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("project"))
    try:
        running.start()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)
        for process in running.everything():
            process.kill()


def test_everything_is_healthy_and_listens_on_the_loopback_interface_only(airflow: Running) -> None:
    health = requests.get(f"http://127.0.0.1:{airflow.port}/api/v2/monitor/health", timeout=30).json()
    assert {name: part["status"] for name, part in health.items()} == dict.fromkeys(
        ("metadatabase", "scheduler", "triggerer", "dag_processor"), "healthy"
    )
    listening = {
        tuple(connection.laddr)
        for process in airflow.everything()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {host for host, _ in listening} == {"127.0.0.1"}
    ports = {port for _, port in listening}
    assert {airflow.port, airflow.mlflow_port} < ports
    # Tasks report to a process of their own: in one with the UI's, a person's request and a task's would wait for each
    # other's turn at the database.
    [for_tasks] = ports - {airflow.port, airflow.mlflow_port}
    assert requests.get(f"http://127.0.0.1:{for_tasks}/execution/health", timeout=30).json() == {"status": "healthy"}
    of_people = requests.get(f"http://127.0.0.1:{airflow.port}/execution/health", timeout=30)
    assert of_people.headers["content-type"].startswith("text/html"), "the UI's page for unknown addresses"


def test_only_the_printed_password_opens_it(airflow: Running) -> None:
    assert airflow.login(airflow.password()).status_code == 201
    assert airflow.login(airflow.password() + "x").status_code == 401
    assert requests.get(f"http://127.0.0.1:{airflow.port}/api/v2/dags", timeout=30).status_code == 401


def test_secrets_are_in_no_log_and_in_files_of_the_user_only(airflow: Running) -> None:
    for path, mode in (("", 0o700), ("airflow.cfg", 0o600), ("simple_auth_manager_passwords.json.generated", 0o600)):
        assert stat.S_IMODE((airflow.home / path).stat().st_mode) == mode, path
    settings = (airflow.home / "airflow.cfg").read_text().splitlines()
    hidden = [line.partition(" = ")[2] for line in settings if line.startswith(("jwt_secret", "fernet_key"))]
    assert len(hidden) == 2
    written = [path for folder in ("output", "logs") for path in (airflow.home / folder).rglob("*") if path.is_file()]
    assert {"mlflow.log", "scheduler.log", "api-server.log", "execution-api.log"} <= {path.name for path in written}
    for path in written:
        assert not [secret for secret in [airflow.password(), *hidden] if secret in path.read_text()], path


def test_the_pool_has_a_slot_for_each_device(airflow: Running) -> None:
    import torch

    assert airflow.api("pools/gpu")["slots"] == (torch.cuda.device_count() or int(airflow.more["PLEAT_CPU_SLOTS"]))


def test_a_task_runs_in_the_environment_of_the_project(airflow: Running) -> None:
    run_id = airflow.trigger("quick")
    assert eventually("end of the run", lambda: {"success", "failed"} & {airflow.state("quick", run_id)}) == {"success"}
    seen = json.loads((airflow.root / "seen.json").read_text())
    assert seen["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{airflow.mlflow_port}"
    assert seen["AIRFLOW_HOME"] == str(airflow.home)
    assert Path(seen["dvc"]).parent == Path(sys.executable).parent
    log = airflow.api(f"dags/quick/dagRuns/{run_id}/taskInstances/show/logs/1")
    assert "the task's own line" in json.dumps(log)
    assert not list((airflow.root / "home").iterdir())  # ~/airflow of somebody who has it stays as it is


def test_artifacts_lie_where_the_local_store_finds_them(airflow: Running, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "report.txt").write_text("a report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(airflow.root)  # as `dvc repro` does
        local, server = MlflowClient("sqlite:///mlflow.db"), MlflowClient(f"http://127.0.0.1:{airflow.mlflow_port}")
        made = {"local": local.create_experiment("local"), "server": server.create_experiment("server")}
    for who, experiment in made.items():
        run_id = server.create_run(experiment).info.run_id
        server.log_artifact(run_id, str(tmp_path / "report.txt"), "report")
        copy = local.download_artifacts(run_id, "report/report.txt", str(tmp_path))
        assert Path(copy).read_text() == "a report", who
        kept = airflow.root / "mlruns" / experiment / run_id / "artifacts" / "report" / "report.txt"
        assert kept.read_text() == "a report", who


def test_an_edit_beside_the_dags_shows_in_the_form(airflow: Running) -> None:
    def shown() -> str:
        return str(airflow.api("dags/quick/details")["params"]["recipe"]["value"])

    eventually("first value", lambda: shown() == "first")
    (airflow.root / "recipe.txt").write_text("second")
    eventually("second value", lambda: shown() == "second", 45)


def test_a_second_start_is_refused(airflow: Running) -> None:
    port, mlflow_port = free_ports()
    done = run(airflow.root, "pleat", "airflow", "--port", str(port), "--mlflow-port", str(mlflow_port))
    assert done.returncode == 1
    assert f"already runs for this project, at http://127.0.0.1:{airflow.port} (process" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_scheduler_that_dies_takes_its_tasks_along_and_is_started_again(airflow: Running) -> None:
    shell = airflow.shell_of(airflow.trigger("long"))
    airflow.component("scheduler").kill()
    eventually("end of the task's process", lambda: gone(shell), 15)
    eventually("line on the terminal", lambda: "scheduler was ended by SIGKILL and is started again" in airflow.printed)
    assert airflow.component("scheduler").is_running()


def test_stop_ends_all_of_it_and_the_next_start_goes_on(airflow: Running) -> None:
    run_id = airflow.trigger("long")
    shell = airflow.shell_of(run_id)
    password, port = airflow.password(), airflow.port
    assert len(airflow.everything()) > 10
    started = time.monotonic()
    airflow.process.send_signal(signal.SIGINT)
    assert airflow.process.wait(60) == 0
    assert not airflow.everything()
    assert gone(shell)
    assert time.monotonic() - started < 30  # promised are about 10 s on a machine that has nothing else to do
    assert "Stopped." in airflow.printed
    (airflow.root / "go").touch()
    airflow.start()
    assert airflow.password() == password
    assert airflow.port == port
    eventually("the interrupted run's end", lambda: airflow.state("long", run_id) == "success", 120)
