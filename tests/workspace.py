"""A copy of this checkout to run the real pipeline in: git, DVC and MLflow as a user has them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from ruamel.yaml import YAML

# Small enough to be quick, large enough for every class to be learnt a little.
QUICK = [
    "experiment.folds=2",
    "training.cnn_small.max_epochs=4",
    "training.cnn_tiny.max_epochs=4",
    "models.cnn_small.input_size=32",
    "models.cnn_small.blocks=[{filters: 16, kernel: 5, pool: 2}, {filters: 32, kernel: 3, pool: 2}]",
]


def environment() -> dict[str, str]:
    """Commands of this environment first on PATH; no tracking server of the person who runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"PATH": path, "GIT_CONFIG_GLOBAL": os.devnull, "PYTHONUNBUFFERED": "1"}


def run(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment() | more, check=False
    )


def check(folder: Path, *command: str, **more: str) -> str:
    """Runs a command that must succeed; gives back all that it printed."""
    done = run(folder, *command, **more)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def copy_checkout(folder: Path) -> Path:
    """What a clone of this checkout would hold, uncommitted changes included, as a git repository of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    check(folder, "git", "init", "--quiet")
    check(folder, "git", "add", "--all")
    check(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "copy")
    return folder


def use_quick(folder: Path, *more: str) -> None:
    """Puts the sample recipe in place with settings that train quickly."""
    check(folder, "pleat", "use", "sample", *(word for setting in (*QUICK, *more) for word in ("--set", setting)))


def stages_run(output: str) -> set[str]:
    """Names of the stages that DVC really ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def lock(folder: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    return dict(YAML(typ="safe").load(folder / "dvc.lock")["stages"])
