"""`pleat airflow`: what keeps it from starting, and the settings that it gives to Airflow."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from pleat_airflow import Running, free_ports
from workspace import environment as plain_environment
from workspace import run

from pipeline_steps import standalone
from pipeline_steps.components import Components
from pipeline_steps.errors import PleatError


def project(folder: Path) -> Path:
    (folder / "dags").mkdir()
    return folder


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        free = str(free_ports()[0])
        for option, ports in (("--port", [str(port), free]), ("--mlflow-port", [free, str(port)])):
            done = run(project(tmp_path), "pleat", "airflow", "--port", ports[0], "--mlflow-port", ports[1])
            assert done.returncode == 1
            assert done.stderr.startswith(f"pleat: Port {port} of 127.0.0.1 cannot be used (Address already in use)")
            assert f"`pleat airflow {option} {port + 1}`" in done.stderr
            assert done.stderr.count("\n") == 1
            assert not done.stdout
            shutil.rmtree(tmp_path / "dags")


@pytest.mark.parametrize(
    ("ports", "sentence"),
    [
        ((8080, 8080), "--port and --mlflow-port are the same; Airflow and MLflow need a port each."),
        ((0, 5000), "--port 0 is no port; expected a number from 1 to 65535."),
        ((8080, 65536), "--mlflow-port 65536 is no port; expected a number from 1 to 65535."),
    ],
)
def test_ports_that_cannot_be(tmp_path: Path, ports: tuple[int, int], sentence: str) -> None:
    with pytest.raises(PleatError) as error:
        standalone.run(project(tmp_path), *ports)
    assert str(error.value) == sentence


def test_a_folder_without_dags_is_no_project(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match=r"has no folder dags/; run `pleat airflow` in the project's folder"):
        standalone.run(tmp_path, 8080, 5000)
    assert not list(tmp_path.iterdir())


def test_an_installation_without_airflow_says_how_to_get_it(tmp_path: Path) -> None:
    installed = Path(sysconfig.get_path("purelib"))
    core = tmp_path / "core"
    core.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith(("airflow", "apache_airflow")):
            (core / path.name).symlink_to(path)
    code = "import sys; sys.path += sys.argv.pop().split(':'); from pipeline_steps.cli import main; main()"
    done = run(project(tmp_path), sys.executable, "-I", "-S", "-c", code, "airflow", f"{core}:{REPOSITORY}")
    assert done.returncode == 1
    assert done.stderr.startswith("pleat: Airflow is not installed in ")
    assert "`make setup` installs it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_cannot_start_ends_everything_and_is_shown(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.home.mkdir(parents=True)
    (running.home / "airflow.db").write_text("no database")
    with pytest.raises(AssertionError, match="file is not a database"):
        running.start()
    assert running.process.wait(30) == 1
    assert (
        f"pleat: `airflow db migrate` failed; the last lines of {running.home / 'output'}/migrate.log:"
        in running.printed
    )
    assert "Traceback" not in running.printed.partition("pleat: ")[0]
    assert not running.everything()


def test_a_component_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    every = Components(tmp_path, plain_environment(), tmp_path / "output")
    every.start("scheduler", "python", "-c", "print('why it died'); raise SystemExit(3)")

    def watch() -> None:
        while True:
            every.restart_dead()
            time.sleep(0.05)

    with pytest.raises(PleatError, match=r"(?s)scheduler died 3 times, the last time it ended with status 3; .*why it"):
        watch()
    assert (tmp_path / "output" / "scheduler.log").read_text() == "why it died\n" * 3


def test_airflow_reads_the_environment_as_it_is_meant(tmp_path: Path) -> None:
    theirs = {
        "AIRFLOW_HOME": str(tmp_path / "theirs"),
        "AIRFLOW_CONFIG": str(tmp_path / "theirs" / "airflow.cfg"),
        "AIRFLOW__CORE__PARALLELISM": "7",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": "echo postgresql://elsewhere/airflow",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": "postgresql+asyncpg://elsewhere/airflow",
        "AIRFLOW__API__SSL_CERT": "/etc/cert.pem",
        "AIRFLOW__LOGGING__REMOTE_LOGGING": "True",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in theirs.items():
            patch.setenv(name, value)
        environment = standalone.environment(tmp_path / "ours", 8123, 5123, 9123)
    (tmp_path / "ours").mkdir()
    code = """
import json
from airflow.configuration import conf
from airflow.sdk.api.client import get_hostname
known = {f"AIRFLOW__{s}__{o}".upper() for s, about in conf.configuration_description.items() for o in about["options"]}
print(json.dumps({"known": sorted(known), "set": conf.as_dict(display_sensitive=True), "hostname": get_hostname()}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    read = json.loads(done.stdout.splitlines()[-1])
    home = tmp_path / "ours" / ".pleat" / "airflow"
    expected = {
        "core.parallelism": "7",  # theirs
        "core.executor": "LocalExecutor",
        "core.dags_folder": str(tmp_path / "ours" / "dags"),
        "core.simple_auth_manager_all_admins": "False",
        "core.execution_api_server_url": "http://127.0.0.1:9123/execution/",
        "database.sql_alchemy_conn": f"sqlite:///{home}/airflow.db?timeout=20",
        "database.sql_alchemy_conn_async": "",
        "logging.base_log_folder": f"{home}/logs",
        "logging.remote_logging": "False",
        "api.host": "127.0.0.1",
        "api.port": "8123",
        "api.base_url": "http://127.0.0.1:8123",
        "api.ssl_cert": "",
        "scheduler.task_instance_heartbeat_timeout": "120",
    }
    found = {key: read["set"][key.split(".")[0]].get(key.split(".")[1]) or "" for key in expected}
    assert found == expected
    assert read["hostname"] == "localhost"
    ours = {name for name in environment if name.startswith("AIRFLOW__")} - theirs.keys() - set(os.environ)
    # Airflow takes no notice of a name that it does not know.
    assert ours - set(read["known"]) == {"AIRFLOW__USAGE_DATA_COLLECTION__ENABLED"}
    assert not (tmp_path / "theirs").exists()
