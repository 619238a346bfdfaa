"""The image's instructions and context, the Kubernetes pod, and the guide to all of docker/."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from docker.utils.build import exclude_paths
from docker_files import DEPLOY, DOCKER, SECRET, clean, instructions, lines, new_env, pod, services
from workspace import copy_checkout

from pipeline_steps import definition


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A docker/.env as new-env.sh writes it."""
    return new_env(tmp_path_factory.mktemp("env"))


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
