"""Workspaces of Airflow's runs: complete, separate, shared between workers, removed in time."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import content, document
from ruamel.yaml import YAML
from workspace import check, copy_checkout

from pipeline_steps import workspaces
from pipeline_steps.errors import PleatError


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLEAT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def describe(project: Path, name: str = "a", settings: dict[str, Any] | None = None) -> dict[str, Any]:
    text = project / f"{name}.yaml"
    YAML().dump(document(settings), text)
    run = {"name": name, "params": text.read_text(), "code": workspaces.code_digest(project)}
    text.unlink()
    return {**run, "batches": workspaces.raw_batches(project, ["sample"])}


def test_a_workspace_holds_what_the_stages_read_and_changes_nothing_of_the_project(project: Path, runs: Path) -> None:
    before = content(project)
    workspace = workspaces.ensure(project, describe(project, settings={"experiment.seed": 99}))
    assert content(project) == before
    assert YAML(typ="safe").load(workspace / "params.yaml")["experiment"]["seed"] == 99
    for folder in ("data/raw/sample", "data/expectations", "pipeline_steps"):
        theirs = {name: data for name, data in content(project / folder).items() if "__pycache__" not in name}
        ours = {name: data for name, data in content(workspace / folder).items() if "__pycache__" not in name}
        assert ours == theirs
    # DVC itself says that nothing is missing: every stage could run, and nothing outside the pipeline is wanted.
    status = json.loads(check(workspace, "dvc", "status", "--json"))
    missing = [item for causes in status.values() for cause in causes for item in _deps(cause).items()]
    assert {state for path, state in missing if not path.startswith(("data/", "reports/"))} <= {"new", "modified"}
    assert dict(missing)["data/raw/sample"] in ("new", "modified")


def _deps(cause: Any) -> dict[str, str]:
    return dict(cause.get("changed deps", {})) if isinstance(cause, dict) else {}


def test_the_cache_is_the_projects(project: Path) -> None:
    workspace = workspaces.ensure(project, describe(project))
    assert check(workspace, "dvc", "cache", "dir").strip() == str(project / ".dvc" / "cache")


def test_dvc_leaves_nothing_outside_the_workspace(project: Path, runs: Path) -> None:
    workspace = workspaces.ensure(project, describe(project))
    check(workspace, "dvc", "repro", "--single-item", "ingest@sample")
    assert sorted(path.name for path in runs.iterdir()) == [".a.lock", "a"]


def test_remotes_with_relative_addresses_still_lead_to_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    project = copy_checkout(tmp_path / "project")
    check(project, "dvc", "remote", "add", "--local", "store", "../store")
    workspace = workspaces.ensure(project, describe(project))
    assert check(workspace, "dvc", "remote", "list").split() == ["store", str(tmp_path / "store")]
    assert oct((workspace / ".dvc" / "config.local").stat().st_mode)[-3:] == "600"


def test_many_at_once_make_one_workspace(project: Path, runs: Path) -> None:
    run = describe(project)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = pool.starmap(workspaces.ensure, [(project, run)] * 8)
    assert set(made) == {runs / "a"}
    assert sorted(path.name for path in runs.iterdir() if not path.name.endswith(".lock")) == ["a"]


def test_a_workspace_half_made_is_never_taken_for_one(project: Path, runs: Path) -> None:
    (runs / ".partial-a" / ".pleat").mkdir(parents=True)
    (runs / ".partial-a" / "params.yaml").write_text("half")
    workspace = workspaces.ensure(project, describe(project))
    assert (workspace / "dvc.yaml").is_file()
    assert not (runs / ".partial-a").exists()


def test_a_worker_with_other_code_refuses(project: Path) -> None:
    run = {**describe(project), "code": "0123456789abcdef"}
    with pytest.raises(PleatError, match="other code"):
        workspaces.ensure(project, run)


def test_runs_in_characters_that_no_folder_has_get_different_names() -> None:
    names = {
        workspaces.name_of("d", run) for run in ("manual__2026-01-01T00:00:00+00:00", "a/../b", "a:..:b", "a" * 300)
    }
    assert len(names) == 4
    assert all("/" not in name and len(name) < 120 for name in names)


def test_a_missing_batch_is_named(project: Path) -> None:
    with pytest.raises(PleatError, match=r"Batch 'nothing' is not in .*pleat data add"):
        workspaces.raw_batches(project, ["sample", "nothing"])


def test_a_relative_weights_file_is_at_the_same_place(project: Path) -> None:
    (project / "weights").mkdir(exist_ok=True)
    (project / "weights" / "w.safetensors").write_bytes(b"w")
    model = {"kind": "frozen", "backbone": "x", "weights": "weights/w.safetensors"}
    workspace = workspaces.ensure(project, describe(project, settings={"models.cnn_tiny": model}))
    assert (workspace / "weights" / "w.safetensors").read_bytes() == b"w"


def make(project: Path, runs: Path, count: int) -> list[dict[str, Any]]:
    made = [{**describe(project), "name": f"run{number}"} for number in range(count)]
    for number, run in enumerate(made):
        workspaces.ensure(project, run)
        os.utime(runs / run["name"] / workspaces.IN_USE, (number, number))
    return made


def test_old_workspaces_go_and_the_newest_stay(project: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(project, runs, 5)
    monkeypatch.setenv("PLEAT_KEEP_RUNS", "2")
    with workspaces.in_use(project, made[1]):
        os.utime(runs / "run1" / workspaces.IN_USE, (1, 1))  # a step that has been at work for long
        workspaces.remove_old(project, current="run0")
    left = sorted(path.name for path in runs.iterdir() if not path.name.startswith("."))
    assert left == ["run0", "run1", "run3", "run4"]  # the current one, the one in use, the two newest
    workspaces.remove_old(project, current="run4")
    assert sorted(path.name for path in runs.iterdir()) == [".run3.lock", ".run4.lock", "run3", "run4"]


def test_the_cache_survives_a_removed_workspace(project: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(project, runs, 2)
    check(runs / "run0", "dvc", "repro", "--single-item", "ingest@sample")
    cached = content(project / ".dvc" / "cache")
    assert cached
    monkeypatch.setenv("PLEAT_KEEP_RUNS", "1")
    workspaces.remove_old(project, current="run1")
    assert not (runs / "run0").exists()
    assert content(project / ".dvc" / "cache") == cached
    again = workspaces.ensure(project, made[0])
    assert "cached - skipping run" in check(again, "dvc", "repro", "--single-item", "ingest@sample")
    shutil.rmtree(project / ".dvc" / "cache")


def test_a_workspace_removed_under_ones_feet_is_made_again(project: Path, runs: Path) -> None:
    run = describe(project)
    workspaces.ensure(project, run)
    shutil.rmtree(runs / "a")
    with workspaces.in_use(project, run) as workspace:
        assert (workspace / "dvc.yaml").is_file()


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_of_runs_to_keep_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PLEAT_KEEP_RUNS", value)
    with pytest.raises(PleatError, match="PLEAT_KEEP_RUNS must be a whole number"):
        workspaces.remove_old(project, "x")


def test_an_error_of_the_step_comes_through(project: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of the step"), workspaces.in_use(project, describe(project)):
        raise FileNotFoundError("of the step")


def test_newer_means_used_last(project: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(project, runs, 3)
    monkeypatch.setenv("PLEAT_KEEP_RUNS", "1")
    with workspaces.in_use(project, made[0]):
        time.sleep(0.01)
    workspaces.remove_old(project, current="")
    assert sorted(path.name for path in runs.iterdir() if not path.name.startswith(".")) == ["run0"]
