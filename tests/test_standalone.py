"""`pleat airflow`: one start serves most tests; the last test stops it and starts it again."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from conftest import REPOSITORY
from workspace import environment as plain_environment
from workspace import run

from pipeline_steps import standalone
from pipeline_steps.errors import PleatError

READY = "Ctrl-C stops all of it"
DAGS = """
import json, os, shutil, subprocess
from pathlib import Path
from airflow.sdk import Param, dag, task

ROOT = Path(__file__).parent.parent

@dag(params={"recipe": Param((ROOT / "recipe.txt").read_text(), type="string")})
def quick():
    @task
    def show():
        (ROOT / "seen.json").write_text(json.dumps(dict(os.environ) | {"dvc": shutil.which("dvc")}))
        print("the task's own line")
    show()

@dag()
def long():
    @task
    def wait(run_id=None):
        if not (ROOT / "go").exists():
            file = ROOT / (run_id + ".pid")
            subprocess.run(["sh", "-c", f"echo $$ > {file}.new; mv {file}.new {file}; sleep 600"])
            raise RuntimeError("somebody ended the command, but not this task")
    wait()

quick()
long()
"""


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def eventually(what: str, found: Callable[[], Any], within_s: float = 90) -> Any:
    """The first true value of `found`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"not within {within_s} s: {what}")


class Running:
    """`pleat airflow` on a terminal of its own, in a project with two small DAGs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port, self.mlflow_port = free_ports()
        self.home = root / ".pleat" / "airflow"
        # As on the machine of somebody who also uses another Airflow.
        self.more = {
            "HOME": str(root / "home"),
            "AIRFLOW_HOME": str(root / "home" / "airflow"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://elsewhere/airflow",
            "AIRFLOW__API__HOST": "0.0.0.0",
            "AIRFLOW__CORE__DAGS_FOLDER": str(root / "home"),
            "PLEAT_CPU_SLOTS": "3",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        }
        (root / "dags").mkdir()
        (root / "home").mkdir()
        (root / "dags" / "small.py").write_text(DAGS)
        (root / "recipe.txt").write_text("first")
        self.printed = ""

    def command(self) -> list[str]:
        return ["pleat", "airflow", "--port", str(self.port), "--mlflow-port", str(self.mlflow_port)]

    def start(self) -> None:
        self.printed = ""
        master, terminal = os.openpty()
        self.process = subprocess.Popen(
            self.command(),
            cwd=self.root,
            env=plain_environment() | self.more,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        threading.Thread(target=self._read, args=(master,), daemon=True).start()
        eventually("ready or ended", lambda: READY in self.printed or self.process.poll() is not None, 320)
        assert READY in self.printed, self.printed

    def _read(self, master: int) -> None:
        try:
            while part := os.read(master, 4096):
                self.printed += part.decode()
        except OSError:  # the terminal's other end is closed
            os.close(master)

    def password(self) -> str:
        return self.printed.partition("user admin, password ")[2].split()[0]

    def login(self, password: str) -> requests.Response:
        return requests.post(
            f"http://127.0.0.1:{self.port}/auth/token", json={"username": "admin", "password": password}, timeout=30
        )

    def api(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
        header = {"Authorization": f"Bearer {self.login(self.password()).json()['access_token']}"}
        address = f"http://127.0.0.1:{self.port}/api/v2/{path}"
        answer = requests.request(
            method or ("GET" if body is None else "POST"), address, json=body, headers=header, timeout=30
        )
        assert answer.ok, f"{address}: {answer.status_code} {answer.text}"
        return answer.json()

    def trigger(self, dag: str) -> str:
        def known() -> bool:
            return dag in {entry["dag_id"] for entry in self.api("dags")["dags"]}

        eventually(f"DAG {dag}", known)
        return str(self.api(f"dags/{dag}/dagRuns", {"logical_date": None})["dag_run_id"])

    def state(self, dag: str, run_id: str) -> str:
        return str(self.api(f"dags/{dag}/dagRuns/{run_id}")["state"])

    def shell_of(self, run_id: str) -> psutil.Process:
        """The process that a task of DAG `long` has started."""
        file = self.root / f"{run_id}.pid"
        return psutil.Process(int(eventually(f"task of {run_id}", lambda: file.exists() and file.read_text())))

    def everything(self) -> list[psutil.Process]:
        """Every process that works in the project's folder, also one that has lost its parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != self.process.pid and Path(process.cwd()).is_relative_to(self.root):
                    found.append(process)
        return found

    def component(self, name: str) -> psutil.Process:
        """The first process of a component, the one below its guard."""
        guards = [process for process in self.everything() if {"pipeline_steps.guard", name} <= set(process.cmdline())]
        assert len(guards) == 1
        return min(guards[0].children(), key=psutil.Process.create_time)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


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
    assert listening == {("127.0.0.1", airflow.port), ("127.0.0.1", airflow.mlflow_port)}


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
    assert {"mlflow.log", "scheduler.log", "api-server.log"} <= {path.name for path in written}
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
    every = standalone._Components(tmp_path, plain_environment(), tmp_path / "output")
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
        environment = standalone.environment(tmp_path / "ours", 8123, 5123)
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
        "core.execution_api_server_url": "http://127.0.0.1:8123/execution/",
        "database.sql_alchemy_conn": f"sqlite:///{home}/airflow.db",
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
