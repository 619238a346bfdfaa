"""The services of docker/ run as far as they run without Docker."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import pytest
from docker_files import (
    BIN,
    DOCKER,
    clean,
    environment,
    new_env,
    services,
)
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A docker/.env as new-env.sh writes it."""
    return new_env(tmp_path_factory.mktemp("env"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts servers and ends them, children included."""
    running: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], more: Mapping[str, str], url: str) -> None:
        with (tmp_path / "server.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=clean() | more, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
            )
        running.append(process)
        deadline = time.monotonic() + 180
        while status(url) != 200:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.3)

    yield start
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def status(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
    try:
        with urlopen(Request(url, body, headers, method=method), timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


def post(url: str, content: Mapping[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def health(service: Mapping[str, Any], port: str, actual: int) -> int:
    """Exit status of a service's health check, asked at another port than the container's."""
    kind, *command = [word.replace(f":{port}/", f":{actual}/") for word in service["healthcheck"]["test"]]
    assert kind == "CMD"
    return subprocess.run(command, env=clean(), capture_output=True).returncode


def test_airflow_starts_with_pool_and_password_and_its_health_check_tells(
    tmp_path: Path, env: dict[str, str], started: Any
) -> None:
    env = env | {"PLEAT_GPU_SLOTS": "3"}
    found = services("compose.yaml", env)
    port = free_port()
    here = {
        "AIRFLOW_HOME": str(tmp_path / "home"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(tmp_path / "new" / "passwords.json"),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
    }
    init, server = found["airflow-init"], found["airflow-api-server"]
    assert [init["command"], server["command"]] == [
        ["/opt/pleat/docker/airflow-init.sh"], ["/opt/pleat/docker/api-server.sh"],
    ]  # fmt: skip
    settings = clean() | environment(init) | here
    subprocess.run([DOCKER / "airflow-init.sh"], env=settings, cwd=tmp_path, check=True, capture_output=True)
    assert health(server, "8080", port) != 0
    url = f"http://127.0.0.1:{port}"
    started([str(DOCKER / "api-server.sh")], environment(server) | here, f"{url}/api/v2/monitor/health")
    assert health(server, "8080", port) == 0
    assert stat.S_IMODE((tmp_path / "new" / "passwords.json").stat().st_mode) == 0o600

    login = {"username": "admin", "password": env["AIRFLOW_ADMIN_PASSWORD"]}
    token = post(f"{url}/auth/token", login)["access_token"]
    with pytest.raises(HTTPError, match="401"):
        post(f"{url}/auth/token", login | {"password": "admin"})
    request = Request(f"{url}/api/v2/pools/gpu", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request) as answer:
        assert json.load(answer)["slots"] == 3

    with sqlite3.connect(tmp_path / "airflow.db") as database:
        database.execute("ALTER TABLE job RENAME TO gone")
    assert health(server, "8080", port) != 0  # the server answers, but cannot use its database


def test_mlflow_serves_artifacts_from_the_store_and_refuses_other_host_names(
    tmp_path: Path, env: dict[str, str], started: Any
) -> None:
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    port = free_port()
    found = services("compose.yaml", env)
    service, settings = found["mlflow"], environment(found["mlflow"])
    settings |= {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*store.get_host_and_port()),
    }
    bucket = found["store"]["environment"]["GARAGE_DEFAULT_BUCKET"]
    client = boto3.client(
        "s3", endpoint_url=settings["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="x",
        aws_secret_access_key="x",
    )  # fmt: skip
    client.create_bucket(Bucket=bucket)
    try:
        shell, option, line = found["mlflow-init"]["command"]
        subprocess.run([shell, option, line], env=clean() | settings, check=True, capture_output=True)
        assert (tmp_path / "mlflow.db").is_file()
        address = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
        command = [address.get(word, word) for word in service["command"]]
        assert command != service["command"]
        assert health(service, "5000", port) != 0
        url = f"http://127.0.0.1:{port}"
        started(command, settings, f"{url}/health")
        assert health(service, "5000", port) == 0

        api = f"{url}/api/2.0/mlflow"
        assert [status(f"{api}/experiments/get?experiment_id=0", Host=host) for host in (
            "mlflow:5000", "127.0.0.1:5000", "localhost:5000", "mlflow.example.org", "mlflow:5001",
        )] == [200, 200, 200, 403, 403]  # fmt: skip
        artifacts = f"{url}/api/2.0/mlflow-artifacts/artifacts/1/page.html"
        assert status(artifacts, "PUT", b"<p>hello", Host="mlflow:5000") == 200
        written = client.list_objects_v2(Bucket=bucket)["Contents"]
        assert [item["Key"] for item in written] == ["mlflow/1/page.html"]
    finally:
        store.stop()


def test_dvc_reaches_the_store_with_nothing_but_the_environment(tmp_path: Path, env: dict[str, str]) -> None:
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    endpoint = "http://{}:{}".format(*store.get_host_and_port())
    given = environment(services("compose.yaml", env)["airflow-worker"]) | {"AWS_ENDPOINT_URL": endpoint}
    settings = clean() | {name: value for name, value in given.items() if name.startswith("AWS_")}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x",
                 aws_secret_access_key="x").create_bucket(Bucket="pleat")  # fmt: skip

    def dvc(*words: str) -> None:
        subprocess.run([BIN / "dvc", *words], cwd=tmp_path, env=settings, check=True, capture_output=True)

    dvc("init", "--no-scm")
    local = (DOCKER / "dvc.config").read_text().replace("/var/lib/pleat/cache", str(tmp_path / "cache"))
    (tmp_path / ".dvc" / "config.local").write_text(local)
    (tmp_path / "file").write_text("content")
    try:
        dvc("add", "file")
        dvc("push", "--remote", given["PLEAT_STAGE_REMOTE"])
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "file").unlink()
        dvc("pull")
    finally:
        store.stop()
    assert (tmp_path / "file").read_text() == "content"


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder that PostgreSQL, which refuses to run as root, can use; pytest's own folders are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="pleat-docker-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_postgres_gives_each_service_a_database_of_its_own(readable_by_all: Path, env: dict[str, str]) -> None:
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not tools:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no PostgreSQL server (Debian's package postgresql)")
    folder, programs, port = readable_by_all, tools[-1].parent, free_port()
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    postgres = services("compose.yaml", env)["postgres"]
    settings = clean() | environment(postgres) | {"POSTGRES_USER": "postgres", "PGHOST": str(folder)}
    settings |= {"PGPORT": str(port), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=settings | more, user=user, cwd=folder, capture_output=True, text=True)

    def use(database: str, role: str, password: str) -> subprocess.CompletedProcess[str]:
        statements = "CREATE TABLE t (label varchar); DROP TABLE t; SHOW server_encoding"
        words = ["psql", "--no-psqlrc", "-h", "127.0.0.1", "-U", role, "-d", database, "-c", statements]
        return run(*words, PGPASSWORD=password)

    data = f"{folder}/data"
    made = run("initdb", "-D", data, "-U", "postgres", "--auth-local=trust", "--auth-host=scram-sha-256", LANG="C")
    assert made.returncode == 0, made.stderr
    server = ["postgres", "-D", data, "-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
    check = postgres["healthcheck"]["test"]
    assert check[:2] == ["CMD", "pg_isready"]
    assert run(*check[1:]).returncode != 0
    process = subprocess.Popen(server, env=settings, user=user, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while run(*check[1:]).returncode != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        done = run("bash", "-c", (DOCKER / "postgres-init.sh").read_text())
        assert done.returncode == 0, done.stderr
        for name in ("airflow", "celery", "mlflow"):
            password = env[f"{name.upper()}_DB_PASSWORD"]
            allowed = use(name, name, password)
            assert "UTF8" in allowed.stdout, allowed.stderr  # whatever the server's locale is
            assert "password authentication failed" in use(name, name, "guessed").stderr
            for other in {"airflow", "celery", "mlflow"} - {name}:
                assert "does not have CONNECT privilege" in use(other, name, password).stderr
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
