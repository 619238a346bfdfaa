"""A real git and DVC project to add batches to, for the tests of `pleat data add`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=path, check=True)
    (path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    shutil.copy(Path(__file__).parent.parent / "recipes" / "sample.yaml", path / "params.yaml")
    (path / "data" / "raw").mkdir(parents=True)
    return path


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    """A project with nothing in data/raw, as a DVC project of its own."""
    return Path(shutil.copytree(template, tmp_path / "project"))


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """A clothing set: three labelled images, one row without a file, one without a label, one file without a row."""
    folder = tmp_path / "clothes"
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b", "c d", "é", "extra"):
        (folder / "images" / f"{name}.jpg").write_bytes(os.urandom(1000))
    rows = "a,1,Hat,False\nb,1,T-Shirt,False\nc d,2,Hat,True\né,2,,True\ngone,3,Skip,False\n"
    (folder / "images.csv").write_text(f"image,sender_id,label,kids\n{rows}")
    (folder / "LICENSE").write_text("CC0")
    (folder / ".DS_Store").touch()
    return folder


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A set that takes seconds to copy and no room here: one file with a hole of gigabytes."""
    folder = tmp_path / "endless"
    (folder / "Hat").mkdir(parents=True)
    with (folder / "Hat" / "a.jpg").open("wb") as file:
        file.truncate(8 * 2**30)
    return folder


@pytest.fixture
def snapshot(project: Path) -> Callable[[], dict[str, bytes | None]]:
    """Gives back everything in the project but git's and DVC's own records."""
    return lambda: {
        path.relative_to(project).as_posix(): path.read_bytes() if path.is_file() else None
        for path in project.rglob("*")
        if path.relative_to(project).parts[0] not in (".git", ".dvc")
    }
