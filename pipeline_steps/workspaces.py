"""One workspace for each Airflow run: what the stages need of the project, with the run's own params.yaml.

A workspace shares DVC's cache with the project, so unchanged stages cost nothing; everything else in it is its own.
Any worker makes the same workspace from the run's description, which is what the task `setup` hands on.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from pipeline_steps import definition
from pipeline_steps.errors import PleatError
from pipeline_steps.versions import RUN

RAW = "data/raw/"
IN_USE = Path(".pleat/in_use")  # locked, shared, by every step that works in the workspace
REMOVED = ".removed-"


def folder_of(root: Path) -> Path:
    """Where the workspaces lie: PLEAT_RUNS, or .pleat/runs of the project."""
    return Path(os.environ.get("PLEAT_RUNS") or root / ".pleat" / "runs").absolute()


def name_of(dag_id: str, run_id: str) -> str:
    """A folder name for a run; runs that differ only in characters that are left out still get different names."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", run_id)[:80]
    return f"{dag_id}-{plain}-{hashlib.sha256(f'{dag_id} {run_id}'.encode()).hexdigest()[:8]}"


def code_digest(root: Path) -> str:
    """Names the code that a run's stages use: dvc.yaml and the package."""
    digest = hashlib.sha256((root / "dvc.yaml").read_bytes())
    package = root / "pipeline_steps"
    for path in sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def raw_batches(root: Path, batches: list[str]) -> dict[str, str | None]:
    """The contents of each batch's .dvc file; None for a batch that lies in the project itself.

    Raises:
        PleatError: a batch is neither.
    """
    found: dict[str, str | None] = {}
    for batch in batches:
        tracked = root / RAW / f"{batch}.dvc"
        if not tracked.is_file() and not (root / RAW / batch).is_dir():
            raise PleatError(
                f"Batch '{batch}' is not in {root / RAW}; bring it with `pleat data add SOURCE --name {batch}`."
            )
        found[batch] = tracked.read_text(encoding="utf-8") if tracked.is_file() else None
    return found


def ensure(root: Path, run: Mapping[str, Any]) -> Path:
    """Makes the workspace of a run unless it is there already, completely or not at all.

    Args:
        root: the project's folder.
        run: the run's description: `name`, `params` (text of params.yaml), `code` (digest), `batches`.

    Raises:
        PleatError: this project's code is not the code that the run was started with.
    """
    runs = folder_of(root)
    workspace = runs / run["name"]
    if workspace.is_dir():
        return workspace
    here = code_digest(root)
    if here != run["code"]:
        raise PleatError(
            f"{root} holds other code (digest {here}) than this run was started with ({run['code']}). Give all workers "
            "the same version and clear the task, or start a new run."
        )
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(runs / f".{run['name']}.lock"):
        if not workspace.is_dir():
            partial = runs / f".partial-{run['name']}"  # whoever left one is dead, or the lock would be held
            shutil.rmtree(partial, ignore_errors=True)
            _fill(partial, root, run)
            _configure_dvc(partial, root, workspace)
            partial.replace(workspace)
    return workspace


@contextmanager
def in_use(root: Path, run: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the run's workspace, made where it is not there; nobody removes it meanwhile.

    Raises:
        PleatError: as `ensure`.
    """
    workspace, file = ensure(root, run), None
    while file is None:
        file = _share(workspace)
        if file is None:  # removed just now
            workspace = ensure(root, run)
    with file:
        yield workspace


def _share(workspace: Path) -> BinaryIO | None:
    """The opened and locked file that says that the workspace is in use; None where it is gone."""
    try:
        file = (workspace / IN_USE).open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(workspace / IN_USE)  # fails where it was removed between these lines
    except FileNotFoundError:
        return None
    return file


def remove_old(root: Path, current: str) -> None:
    """Removes all but the newest PLEAT_KEEP_RUNS workspaces (5); the current one and those in use stay.

    A run that is cleared later makes its workspace anew and finds its results in DVC's cache.

    Raises:
        PleatError: PLEAT_KEEP_RUNS is no whole number of at least 1.
    """
    text = os.environ.get("PLEAT_KEEP_RUNS") or "5"
    if not text.isdecimal() or int(text) < 1:
        raise PleatError(f"PLEAT_KEEP_RUNS must be a whole number of at least 1, but is '{text}'.")
    used = [(path.stat().st_mtime, path) for path in folder_of(root).glob(f"*/{IN_USE}")]
    for _, path in sorted(used, reverse=True)[int(text) :]:
        workspace = path.parents[1]
        if workspace.name == current or workspace.name.startswith("."):
            continue
        with path.open("rb") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = workspace.with_name(REMOVED + workspace.name)
            workspace.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
            workspace.with_name(f".{workspace.name}.lock").unlink(missing_ok=True)


def write_about(workspace: Path, about: Mapping[str, Any]) -> None:
    """Writes run.json, atomically."""
    path = workspace / RUN
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _fill(workspace: Path, root: Path, run: Mapping[str, Any]) -> None:
    from ruamel.yaml import YAML

    (workspace / IN_USE).parent.mkdir(parents=True)
    (workspace / IN_USE).touch()
    (workspace / "params.yaml").write_text(run["params"], encoding="utf-8")
    params = YAML(typ="safe").load(run["params"])
    for name in ("dvc.yaml", "dvc.lock", ".dvcignore"):
        if (root / name).is_file():
            shutil.copy2(root / name, workspace / name)
    # The whole package, so that a change of the project's code does not reach a run that has begun.
    shutil.copytree(root / "pipeline_steps", workspace / "pipeline_steps")
    for source in definition.sources(definition.read(root, params)):
        if not source.startswith((RAW, "pipeline_steps/")):
            _copy(root / source, workspace / source)
    for batch, tracked in run["batches"].items():
        (workspace / RAW).mkdir(parents=True, exist_ok=True)
        if tracked is None:
            _copy(root / RAW / batch, workspace / RAW / batch)
        else:
            (workspace / RAW / f"{batch}.dvc").write_text(tracked, encoding="utf-8")
    for model in params["models"].values():
        weights = model.get("weights")
        if weights and not Path(weights).is_absolute() and (root / weights).is_file():
            (workspace / weights).parent.mkdir(parents=True, exist_ok=True)
            (workspace / weights).symlink_to((root / weights).resolve())


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise PleatError(f"{source} is missing, but dvc.yaml reads it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        shutil.copy2(source, target)


def _link(source: str, target: str) -> None:
    """A second name for a file where the file system allows it: raw images are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _configure_dvc(workspace: Path, root: Path, final: Path) -> None:
    """The project's settings and cache, with absolute paths; no git, since a workspace is no part of the history."""
    from dvc.config import Config, merge

    project = Config(str(root / ".dvc"))
    settings: dict[str, Any] = {}
    for level in ("repo", "local"):
        merge(settings, project.load_one(level))
    merge(settings, {"core": {"no_scm": True, "site_cache_dir": str(final / ".dvc" / "site")}})
    if os.environ.get("PLEAT_STAGE_REMOTE"):  # the only remote in which `repro --pull` looks for results of others
        merge(settings, {"core": {"remote": os.environ["PLEAT_STAGE_REMOTE"]}})
    settings.setdefault("cache", {}).setdefault("dir", str(root.absolute() / ".dvc" / "cache"))
    (workspace / ".dvc").mkdir()
    (workspace / ".dvc" / "config.local").touch(mode=0o600)  # it may hold a remote's credentials
    with Config(str(workspace / ".dvc")).edit("local") as local:
        merge(local, settings)
