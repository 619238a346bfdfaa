"""docker/ as its readers understand it: compose files as Docker Compose reads them, the Dockerfile, the pod."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY

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


def new_env(folder: Path) -> dict[str, str]:
    for name in ("new-env.sh", "env.example"):
        shutil.copy2(DOCKER / name, folder)
    subprocess.run([folder / "new-env.sh"], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in lines(folder / ".env"))


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line]


def pod() -> dict[str, Any]:
    document = yaml.safe_load((DOCKER / "kubernetes" / "pod_template.yaml").read_text())
    (container,) = document["spec"]["containers"]
    return dict(container)


def clean() -> dict[str, str]:
    """The environment of a container: nothing of the person who runs the tests."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "SSL_CERT_FILE") if name in os.environ}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
