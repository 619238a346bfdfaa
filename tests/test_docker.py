"""docker/: what Docker would read is checked against its specification and run as far as it runs without Docker."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import pytest
import yaml
from conftest import REPOSITORY
from cryptography.fernet import Fernet
from docker.utils.build import exclude_paths
from moto.server import ThreadedMotoServer
from workspace import copy_checkout

from pipeline_steps import definition

DOCKER = REPOSITORY / "docker"
DEPLOY = (REPOSITORY / "docs" / "deploy.md").read_text()
COMPOSE_FILES = ["compose.yaml", "worker-base.yaml", "compose.cluster.yaml", "compose.worker.yaml"]
BIN = Path(sys.executable).parent
SECRET = re.compile(r"PASSWORD|SECRET|_KEY")
ONE_SHOT = {"store-init", "mlflow-init", "airflow-init"}
WORKER_SECRETS = {
    "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "REDIS_PASSWORD", "CELERY_DB_PASSWORD", "AIRFLOW_SECRET_KEY",
}  # fmt: skip
MACHINES = {"PLEAT_PRIVATE_ADDRESS": "10.9.8.7", "PLEAT_WORKER_NAME": "gpu-1", "PLEAT_WORKER_ADDRESS": "10.9.8.6"}


# Reading compose files as Docker Compose does: interpolation, then `extends`.


class MissingError(Exception):
    """A required variable has no value."""


VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:-|:\?)((?:[^{}]|\{[^{}]*\})*))?\})")


def interpolate(value: Any, env: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: interpolate(item, env) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, env) for item in value]
    if not isinstance(value, str):
        return value

    def one(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        if name is None:
            return "$"
        if env.get(name):
            return env[name]
        if operator == ":?":
            raise MissingError(f"{name}: {rest}")
        return str(interpolate(rest, env)) if operator else ""

    return VARIABLE.sub(one, value)


def services(name: str, env: Mapping[str, str]) -> dict[str, Any]:
    document = interpolate(yaml.safe_load((DOCKER / name).read_text()), env)
    found = {}
    for service, settings in document["services"].items():
        base = settings.pop("extends", None)
        found[service] = settings
        if base:
            found[service] = services(base["file"], env)[base["service"]] | settings
    return found


def environment(service: Mapping[str, Any]) -> dict[str, str]:
    files = service.get("env_file", [])
    settings = [line for name in ([files] if isinstance(files, str) else files) for line in lines(DOCKER / name)]
    return dict(line.split("=", 1) for line in settings) | service.get("environment", {})


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A docker/.env as new-env.sh writes it."""
    return new_env(tmp_path_factory.mktemp("env"))


def new_env(folder: Path) -> dict[str, str]:
    for name in ("new-env.sh", "env.example"):
        shutil.copy2(DOCKER / name, folder)
    subprocess.run([folder / "new-env.sh"], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in lines(folder / ".env"))


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / name)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Secrets


def test_new_env_writes_every_secret_and_keeps_an_existing_file(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    first, second = new_env(tmp_path / "one"), new_env(tmp_path / "two")
    file = tmp_path / "one" / ".env"
    secrets = {name for name in first if SECRET.search(name)}
    assert len(secrets) == 12
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len({first[name] for name in secrets} | {second[name] for name in secrets}) == 2 * len(secrets)
    for name in secrets:
        assert len(first[name]) >= 24
        assert re.fullmatch(r"[\w=-]+", first[name]), f"{name} would need quoting in an address or a .env file"
    Fernet(first["AIRFLOW_FERNET_KEY"])
    assert re.fullmatch(r"GK[0-9a-f]{24}", first["S3_ACCESS_KEY_ID"])
    assert re.fullmatch(r"[0-9a-f]{64}", first["GARAGE_RPC_SECRET"])

    before = file.read_text()
    again = subprocess.run([tmp_path / "one" / "new-env.sh"], capture_output=True, text=True)
    assert again.returncode == 1
    assert "left as it is" in again.stderr
    assert file.read_text() == before
    assert sorted(path.name for path in file.parent.iterdir()) == [".env", "env.example", "new-env.sh"]


def test_every_secret_is_required_and_none_has_a_default(env: dict[str, str]) -> None:
    secrets = {name for name in env if SECRET.search(name)}
    services("compose.yaml", env)
    for name in secrets:
        with pytest.raises(MissingError, match=rf"{name}: docker/\.env must give {name}; \./new-env\.sh writes one"):
            services("compose.yaml", env | {name: ""})
    for file in COMPOSE_FILES:
        for name, operator, _ in VARIABLE.findall((DOCKER / file).read_text()):
            assert operator != ":-" or not SECRET.search(name), f"{file} has a default for {name}"
    worker = {name: value for name, value in env.items() if name in WORKER_SECRETS} | MACHINES
    services("compose.worker.yaml", worker)
    for name in worker:
        with pytest.raises(MissingError, match=f"^{name}: "):
            services("compose.worker.yaml", worker | {name: ""})


def test_env_example_names_every_setting_of_the_main_machine() -> None:
    used = {name for name, _, _ in VARIABLE.findall((DOCKER / "compose.yaml").read_text()) if name}
    used |= {name for name, _, _ in VARIABLE.findall((DOCKER / "worker-base.yaml").read_text()) if name}
    offered = set(re.findall(r"^#?([A-Z0-9_]+)=", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert used - offered == {"PLEAT_CODE_VERSION"}  # of one build, given on its command line
    assert offered - used == {"COMPOSE_PROFILES"}  # Compose's own


def test_secrets_reach_only_the_services_that_need_them(env: dict[str, str]) -> None:
    holders: dict[str, set[str]] = {name: set() for name in env if SECRET.search(name)}
    for service, settings in services("compose.yaml", env).items():
        given = json.dumps(environment(settings))
        for name, found in holders.items():
            assert env[name] not in json.dumps([settings.get("command"), settings.get("healthcheck")])
            if env[name] in given:
                found.add(service)
    airflow = {f"airflow-{part}" for part in ("init", "api-server", "scheduler", "dag-processor", "triggerer")}
    workers = {"airflow-worker", "airflow-worker-gpu"}
    s3 = airflow | workers | {"store", "mlflow", "mlflow-init"}
    celery = airflow | workers
    assert holders == {
        "AIRFLOW_ADMIN_PASSWORD": {"airflow-api-server"},
        "AIRFLOW_FERNET_KEY": airflow,
        "AIRFLOW_JWT_SECRET": airflow,
        "AIRFLOW_SECRET_KEY": celery,
        "POSTGRES_PASSWORD": {"postgres"},
        "AIRFLOW_DB_PASSWORD": airflow | {"postgres"},
        "CELERY_DB_PASSWORD": celery | {"postgres"},
        "MLFLOW_DB_PASSWORD": {"postgres", "mlflow", "mlflow-init"},
        "REDIS_PASSWORD": celery | {"redis"},
        "S3_ACCESS_KEY_ID": s3,
        "S3_SECRET_ACCESS_KEY": s3,
        "GARAGE_RPC_SECRET": {"store"},
    }


# Hardening


def test_every_service_runs_without_root_and_is_watched(env: dict[str, str]) -> None:
    main = services("compose.yaml", env)
    assert set(main) > ONE_SHOT
    for name, service in (main | services("compose.worker.yaml", env | MACHINES)).items():
        assert service["user"] not in ("root", "0", "0:0"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert not {"privileged", "cap_add", "pid", "network_mode"} & set(service), name
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("latest", service["image"]), f"{name} has no fixed tag"
        if name in ONE_SHOT:
            assert service["restart"] == "no"
        else:
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"], name
    for name, service in main.items():
        for other, wait in service.get("depends_on", {}).items():
            done = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert wait == {"condition": done}, f"{name} waits for {other}"


def test_only_the_two_pages_are_published_and_only_on_this_machine(env: dict[str, str]) -> None:
    def published(found: Mapping[str, Any]) -> dict[str, list[str]]:
        return {name: service["ports"] for name, service in found.items() if "ports" in service}

    assert published(services("compose.yaml", env)) == {
        "mlflow": ["127.0.0.1:5000:5000"],
        "airflow-api-server": ["127.0.0.1:8080:8080"],
    }
    elsewhere = env | {"PLEAT_BIND": "10.1.2.3", "PLEAT_AIRFLOW_PORT": "80"}
    assert published(services("compose.yaml", elsewhere))["airflow-api-server"] == ["10.1.2.3:80:8080"]
    for file in ("compose.cluster.yaml", "compose.worker.yaml"):
        ports = [port for ports in published(services(file, env | MACHINES)).values() for port in ports]
        assert ports
        assert all(re.match(r"10\.9\.8\.[67]:", port) for port in ports)
    inside = yaml.safe_load((DOCKER / "compose.yaml").read_text())["networks"]["inside"]
    assert inside == {"internal": True}
    for name in ("postgres", "redis", "store"):
        assert services("compose.yaml", env)[name]["networks"] == ["inside"]


def test_gpu_work_goes_where_a_worker_listens(env: dict[str, str]) -> None:
    def queues(file: str, more: Mapping[str, str]) -> dict[str, str]:
        found = services(file, env | MACHINES | more).items()
        return {name: value["command"][-1] for name, value in found if name.startswith("airflow-worker")}

    default = services("compose.yaml", env)
    assert environment(default["airflow-dag-processor"])["PLEAT_GPU_QUEUE"] == ""
    assert queues("compose.yaml", {})["airflow-worker"] == "--queues=default"
    assert "profiles" not in default["airflow-worker"]
    gpu = services("compose.yaml", env | {"PLEAT_GPU_QUEUE": "cards", "PLEAT_GPU_SLOTS": "3"})
    assert environment(gpu["airflow-dag-processor"])["PLEAT_GPU_QUEUE"] == "cards"
    for file in ("compose.yaml", "compose.worker.yaml"):
        assert queues(file, {"PLEAT_GPU_QUEUE": "cards"})["airflow-worker-gpu"] == "--queues=cards"
    assert gpu["airflow-worker-gpu"]["profiles"] == ["gpu"]
    assert environment(gpu["airflow-worker-gpu"])["AIRFLOW__CELERY__WORKER_CONCURRENCY"] == "3"
    assert gpu["airflow-worker-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    workspaces = [gpu[name]["volumes"][0] for name in ("airflow-worker", "airflow-worker-gpu")]
    assert len(set(workspaces)) == 2  # DVC's locks name process ids, which differ from container to container


# Settings and commands of this version of Airflow, Celery and MLflow


def airflow_options() -> dict[str, dict[str, Any]]:
    import airflow
    from airflow.providers.celery.get_provider_info import get_provider_info

    core = yaml.safe_load((Path(airflow.__file__).parent / "config_templates" / "config.yml").read_text())
    return {section: found["options"] for section, found in {**core, **get_provider_info()["config"]}.items()}


def test_airflow_knows_every_setting(env: dict[str, str]) -> None:
    options = airflow_options()
    everything = dict(line.split("=", 1) for line in lines(DOCKER / "airflow.env"))
    for service in services("compose.yaml", env).values():
        everything |= environment(service)
    everything |= {item["name"]: item.get("value", "") for item in pod()["env"]}
    names = [name for name in everything if name.startswith("AIRFLOW__")]
    assert len(names) > 25
    for name in names:
        section, key = name.removeprefix("AIRFLOW__").lower().split("__")
        option = options.get(section, {}).get(key)
        assert option is not None, f"{name} is no setting of this Airflow"
        read = {"integer": int, "float": float, "boolean": {"True": 1, "False": 0}.__getitem__}.get(option["type"], str)
        read(everything[name])


def test_a_long_training_outlives_tokens_restarts_and_redelivery(env: dict[str, str]) -> None:
    given = environment(services("compose.yaml", env)["airflow-worker"])
    day = 24 * 3600
    assert int(given["AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"]) >= 7 * day
    assert int(given["AIRFLOW__EXECUTION_API__JWT_EXPIRATION_TIME"]) >= day
    # Heartbeats are at least 5 s apart and each is tried for longer, so a server may be away for more than 2.5 minutes.
    assert int(given["AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS"]) * 5 >= 150
    assert int(given["AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT"]) >= 600


def airflow_commands(env: Mapping[str, str]) -> Iterator[list[str]]:
    for service in services("compose.yaml", env).values():
        for command in (service.get("command", []), service.get("healthcheck", {}).get("test", [])[1:]):
            if command and command[0] == "airflow":
                yield command[1:]
    for script in ("airflow-init.sh", "api-server.sh"):
        for words in map(shlex.split, lines(DOCKER / script)):
            if "airflow" in words[:2]:
                yield [word.replace("$PLEAT_GPU_SLOTS", "1") for word in words[words.index("airflow") + 1 :]]


def test_airflows_command_line_understands_every_command(env: dict[str, str]) -> None:
    from airflow.cli.cli_parser import get_parser

    commands = list(airflow_commands(env))
    assert len(commands) == 10
    for command in commands:
        arguments = get_parser().parse_args(command)
        assert callable(arguments.func)


def test_the_workers_health_check_asks_the_celery_app_that_the_worker_runs(env: dict[str, str]) -> None:
    from celery.bin.celery import celery

    check = services("compose.yaml", env)["airflow-worker"]["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    program, _, app, *rest = shlex.split(check[1])
    assert program == "celery"
    assert app == "airflow.providers.celery.executors.celery_executor.app"
    command, *options = rest
    context = celery.commands[command].make_context(command, options, resilient_parsing=True)
    assert context.params["destination"] == ["celery@$HOSTNAME"]
    assert context.params["timeout"] < int(
        services("compose.yaml", env)["airflow-worker"]["healthcheck"]["timeout"][:-1]
    )


# What can run here, runs


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


def clean() -> dict[str, str]:
    """The environment of a container: nothing of the person who runs the tests."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "SSL_CERT_FILE") if name in os.environ}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


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


# The image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line]


def test_image_holds_a_fixed_python_the_lock_and_no_root() -> None:
    found = instructions()
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", found[0][1])
    assert {words for kind, words in found if kind == "FROM"} == {"${PYTHON_IMAGE} AS environment", "${PYTHON_IMAGE}"}
    assert found[-1] == ("USER", "10001:10001")
    installs = [line for kind, line in found if kind == "RUN" and "pip" in line]
    assert "--require-hashes -r requirements/bootstrap.lock" in installs[0]
    assert "pip sync" in installs[0]
    assert "--require-hashes --compile-bytecode requirements/all.lock" in installs[0]
    assert "--no-deps" in installs[1]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `COPY . .` of the image would copy of this checkout, which also holds what must stay out."""
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    for name in ("docker/.env", ".dvc/config.local", "mlflow.db", ".venv/bin/python", ".pleat/runs/x", "dvc.lock",
                 "data/raw/clothing/images/1.jpg", "data/ingest/sample/manifest.parquet", "reports/index.html",
                 "pipeline_steps/__pycache__/cli.pyc", ".dvc/cache/files/md5/00/x"):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    (checkout / "data/raw/clothing.dvc").write_text("outs: []\n")
    (checkout / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    folder = tmp_path_factory.mktemp("context")
    for name in exclude_paths(str(checkout), lines(REPOSITORY / ".dockerignore")) - {".dockerignore"}:
        if (checkout / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, folder / name)
    return folder


def test_context_holds_the_project_and_nothing_private(context: Path) -> None:
    files = {path.relative_to(context) for path in context.rglob("*") if path.is_file()}
    assert {str(path) for path in files if path.parts[0] not in ("dags", "pipeline_steps", "data", "recipes")} == {
        ".dvc/config", ".dvcignore", "LICENSE", "README.md", "docker/airflow-init.sh", "docker/api-server.sh",
        "docker/dvc.config", "dvc.lock", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements/all.lock",
        "requirements/bootstrap.lock",
    }  # fmt: skip
    data = {"/".join(path.parts[1:3]) for path in files if path.parts[0] == "data" and path.parts[1] == "raw"}
    assert data == {"raw/clothing.dvc", "raw/sample"}
    assert {path.parts[1] for path in files if path.parts[0] == "data"} == {"expectations", "raw"}
    assert not [path for path in files if "__pycache__" in path.parts]


def test_the_projects_copy_in_the_image_has_all_that_the_stages_read(context: Path) -> None:
    settings = yaml.safe_load((context / "params.yaml").read_text())
    sources = definition.sources(definition.read(context, settings))
    assert len(sources) > 20
    assert [source for source in sources if not (context / source).exists()] == []


def test_the_images_install_command_installs_the_whole_package_without_a_network(context: Path, tmp_path: Path) -> None:
    uv = REPOSITORY / ".venv-uv" / "bin" / "uv"
    if not uv.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no .venv-uv: run make setup")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    line = next(line for kind, line in instructions() if kind == "RUN" and "--no-deps" in line)
    line = line.replace("uv/bin/uv", str(uv)).replace("/opt/venv", str(tmp_path / "venv"))
    sources = ("LICENSE", "README.md", "pyproject.toml", "pipeline_steps")
    (tmp_path / "build").mkdir()
    for name in sources:
        copy = shutil.copytree if (context / name).is_dir() else shutil.copy2
        copy(context / name, tmp_path / "build" / name)
    offline = clean() | {"UV_OFFLINE": "1", "UV_NO_CACHE": "1"}
    subprocess.run(line, shell=True, cwd=tmp_path / "build", env=offline, check=True, capture_output=True)
    (installed,) = (tmp_path / "venv").glob("lib/python*/site-packages/pipeline_steps")

    def content(folder: Path) -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    assert content(installed) == content(context / "pipeline_steps")


def test_the_image_is_not_built_without_a_code_version() -> None:
    (check,) = [line for kind, line in instructions() if kind == "RUN" and "PLEAT_CODE_VERSION" in line]
    for version, expected in (("", 1), ("0123abc", 0)):
        done = subprocess.run(["sh", "-c", check], env={"PLEAT_CODE_VERSION": version}, capture_output=True, text=True)
        assert done.returncode == expected
        assert ("build with the commit" in done.stderr) == bool(expected)


# Kubernetes


def pod() -> dict[str, Any]:
    document = yaml.safe_load((DOCKER / "kubernetes" / "pod_template.yaml").read_text())
    (container,) = document["spec"]["containers"]
    return dict(container)


def test_pod_runs_the_task_on_one_gpu_without_root(env: dict[str, str]) -> None:
    document = yaml.safe_load((DOCKER / "kubernetes" / "pod_template.yaml").read_text())
    spec, container = document["spec"], pod()
    assert (document["apiVersion"], document["kind"], container["name"]) == ("v1", "Pod", "base")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["restartPolicy"] == "Never"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == instructions()[-1][1]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not container["image"].endswith(":latest")
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes

    given = {item["name"]: item for item in container["env"]}
    worker = services("compose.yaml", env)["airflow-worker"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {
        volume.split(":")[1] for volume in worker["volumes"]
    } | set(worker["tmpfs"])
    for name, item in given.items():
        assert ("valueFrom" in item) == bool(SECRET.search(name)), f"{name}: secrets come from Secret objects"
    # What a worker of Celery has, less what only Celery, its log server and another machine's devices need.
    left_out = {"AIRFLOW__CELERY__BROKER_URL", "AIRFLOW__CELERY__RESULT_BACKEND", "AIRFLOW__API__SECRET_KEY",
                "PLEAT_GPU_QUEUE", "PLEAT_CPU_SLOTS"}  # fmt: skip
    assert set(worker["environment"]) - left_out == set(given) - {"AIRFLOW__CORE__EXECUTOR"}


# The guide


def test_the_guide_names_every_variable_and_file() -> None:
    words = set(re.findall(r"\w+", DEPLOY))
    code = "".join(
        path.read_text() for folder in ("dags", "pipeline_steps") for path in (REPOSITORY / folder).rglob("*.py")
    )
    variables = set(re.findall(r"\"(PLEAT_[A-Z_]+)\"", code)) - {"PLEAT_GUARD", "PLEAT_FAILURE_FILE"}
    offered = set(re.findall(r"^#?([A-Z0-9_]+)=", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert {name for name in variables | offered if name not in words} == set()
    for path in DOCKER.rglob("*"):
        if path.is_file() and path.name not in (".gitignore", ".env"):
            assert path.name in DEPLOY, f"docs/deploy.md does not say what {path.name} is"
