"""A git and DVC project with an ingested batch of drawn images, a remote and an inbox."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_params
from inbox_help import N_TRAINING, SETTINGS, dvc, git, images, put, settings

from pipeline_steps import ingest


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is before anything arrives: one commit, one batch, ingested, a remote."""
    root = tmp_path_factory.mktemp("stocked")
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    shutil.copytree(REPOSITORY / "data" / "expectations", root / "data" / "expectations")
    shutil.copy(REPOSITORY / ".gitignore", root)
    with (root / ".gitignore").open("a") as file:
        file.write("/remote/\n/other.txt\n")
    write_params(root, SETTINGS)
    put(root / "data" / "raw" / "old", images(0, N_TRAINING))
    dvc(root, "add", "--quiet", "data/raw/old")
    dvc(root, "remote", "add", "--quiet", "--default", "storage", "remote")
    ingest.run(settings(root), "old", root)
    (root / "data" / "inbox").mkdir()
    git(root, "add", "--all")
    git(root, "-c", "user.name=me", "-c", "user.email=me@localhost", "commit", "--quiet", "-m", "start")
    return root


@pytest.fixture
def shop(stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with a git that knows nobody."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    return Path(shutil.copytree(stocked, tmp_path / "shop"))
