"""What a result depends on, as short names: data, code, and the key by which a fold's MLflow run is found again."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from pipeline_steps.errors import PleatError

if TYPE_CHECKING:  # what only runs DVC is quicker without pydantic
    from pipeline_steps.params import Params

EXPERIMENT = "pleat"  # in MLflow
LOCAL_STORE = "sqlite:///mlflow.db"  # where MLFLOW_TRACKING_URI is not set
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's page for training runs
RUN = Path(".pleat/run.json")  # in the workspace of an Airflow run: what the run is
TRAINING_CODE = (
    "fitting.py", "targets.py", "train.py", "vision/augment.py", "vision/distributed.py", "vision/engine.py",
    "vision/inputs.py", "vision/losses.py", "vision/memory.py", "vision/networks.py", "vision/objective.py",
    "vision/optimizer.py", "vision/timm_networks.py",
)  # fmt: skip
CODE = Path(__file__).parent


def airflow_run(root: Path = Path()) -> dict[str, Any]:
    """What the workspace's run.json says: `name`, `dag_id`, `run_id`, `data_version`, `code_version`; else empty."""
    return dict(json.loads((root / RUN).read_text())) if (root / RUN).is_file() else {}


def data_version(batches: list[str], root: Path = Path()) -> str:
    """DVC's hash of each batch's raw folder, as dvc.lock (or the batch's .dvc file) records it."""
    found = airflow_run(root).get("data_version")
    if found:
        return str(found)
    lock = _yaml(root / "dvc.lock").get("stages", {})
    versions = []
    for batch in batches:
        deps = lock.get(f"ingest@{batch}", {}).get("deps", [])
        outs = _yaml(root / "data" / "raw" / f"{batch}.dvc").get("outs", [])
        hashes = [item["md5"] for item in (*deps, *outs) if item["path"] in (f"data/raw/{batch}", batch)]
        versions.append(f"{batch}={hashes[0] if hashes else 'unversioned'}")
    return ",".join(versions)


def data_version_of_files(batches: list[str], root: Path = Path()) -> str:
    """As `data_version`, of the batches as they are now; also before DVC has written a dvc.lock.

    Raises:
        PleatError: `root` is no DVC project.
    """
    from dvc.repo import Repo

    if not (root / ".dvc").is_dir():
        raise PleatError(
            f"{root.absolute()} is no DVC project (it has no .dvc folder); change to the project's folder."
        )
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        deps = {dep.def_path: dep for stage in repo.index.stages for dep in stage.deps}
        found = []
        for batch in batches:
            outs = _yaml(root / "data" / "raw" / f"{batch}.dvc").get("outs")
            raw = deps.get(f"data/raw/{batch}")
            value = outs[0]["md5"] if outs else raw.get_hash().value if raw else "unversioned"
            found.append(f"{batch}={value}")
    return ",".join(found)


def code_version(root: Path = Path()) -> str:
    """The commit of the checkout, with `-dirty` where tracked files differ from it; PLEAT_CODE_VERSION in an image."""
    known = airflow_run(root).get("code_version") or os.environ.get("PLEAT_CODE_VERSION")
    if known:
        return str(known)
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git"


def fold_key(params: "Params", model: str, fold: int, root: Path = Path()) -> str:
    """Names everything that a fold's result depends on: settings, code, folds and prepared inputs.

    Needs the inputs of the fold's training; a trained fold carries its key with it, in metrics.json.
    """
    experiment, data = params.experiment, root / "data"
    targets = {name: target.model_dump() for name, target in params.targets.items()}
    settings = (targets, params.models[model].model_dump(), params.training[model].model_dump())
    code = [(CODE / name).read_bytes() for name in TRAINING_CODE]
    inputs = [(data / "prepare" / model / batch / "inputs.json").read_bytes() for batch in experiment.batches]
    folds = (data / "split" / "folds.parquet").read_bytes()
    return digest(json.dumps([settings, model, experiment.seed, fold]), *code, *inputs, folds)


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts' own hashes, so that no two lists of parts run together."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()


def _yaml(path: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(path)) if path.is_file() else {}
