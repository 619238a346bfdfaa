"""The compose files: their specification, secrets, hardening; settings and commands that this Airflow knows."""

import json
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet
from docker_files import (
    COMPOSE_FILES,
    DOCKER,
    MACHINES,
    ONE_SHOT,
    SECRET,
    VARIABLE,
    WORKER_SECRETS,
    MissingError,
    environment,
    lines,
    new_env,
    pod,
    services,
)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A docker/.env as new-env.sh writes it."""
    return new_env(tmp_path_factory.mktemp("env"))


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


def test_mlflow_knows_every_setting(env: dict[str, str]) -> None:
    from mlflow import environment_variables

    names = {name for service in services("compose.yaml", env).values() for name in environment(service)}
    found = {name for name in names if name.startswith("MLFLOW_")} - {"MLFLOW_DB_PASSWORD"}
    assert len(found) > 4
    known = {"MLFLOW_BACKEND_STORE_URI", *vars(environment_variables)}  # the first is an option of `mlflow server`
    assert found - known == set()


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
