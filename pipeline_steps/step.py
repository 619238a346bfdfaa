"""`python -m pipeline_steps.step RESULT`: the child process of an Airflow task, told on stdin what to do.

Airflow's own process imports none of what stages need, and a stage that dies takes nothing with it. What came of it is
written to the file RESULT as JSON: `{"done": ...}`, or `{"failed": sentence, "retry": whether trying again can help}`.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from ruamel.yaml import YAML

from pipeline_steps import definition, workspaces
from pipeline_steps.errors import FAILURE_FILE, PleatError
from pipeline_steps.guard import end_with_guard
from pipeline_steps.progress import say
from pipeline_steps.versions import EXPERIMENT, EXPERIMENT_TAGS, RUN, code_version, data_version_of_files
from pipeline_steps.yaml_text import text_of, unshared

FROM_ELSEWHERE = Path(".pleat") / "from-elsewhere"  # in a workspace that stages of other workers had a part in
SHORT_BLOCK = 4  # settings
TRAINING = "workflowType=machine_learning"  # else MLflow shows a new browser its pages for language models


def main() -> None:
    """Does what stdin says and writes the result."""
    end_with_guard()
    gc.set_threshold(50_000, 20, 100)  # as `pleat` does
    order = json.load(sys.stdin)
    steps: dict[str, Callable[..., dict[str, Any]]] = {"setup": set_up, "stage": run_stage, "decide": decide}
    result: dict[str, Any]
    try:
        name = order.pop("do")
        step = steps[name] if name in steps else getattr(_new_data(), name)
        result = {"done": step(**order)}
    except PleatError as error:
        result = {"failed": str(error), "retry": error.temporary}
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
    gc.freeze()


def _new_data() -> ModuleType:
    """Late, as whatever reads params.yaml: these imports are a fifth of what a stage from DVC's cache takes."""
    from pipeline_steps import new_data

    return new_data


def set_up(root: str, dag_id: str, run_id: str, conf: Mapping[str, Any], by_hand: bool) -> dict[str, Any]:
    """Makes the workspace of a new run and says what the run is.

    A run that nobody triggered uses params.yaml as it is now; where its data was trained on, it has nothing to do.

    Returns:
        `{"skip": sentence}` where there is nothing to do, else
        The run's description, from which any worker makes the same workspace: `name`, `params` (text), `code` and
        `code_version`, `data_version`, `batches`, `links` to MLflow by title, and `items`: for each stage what its
        instances are, with `address` and `title`.

    Raises:
        PleatError: a setting is wrong or a batch is missing.
    """
    from pipeline_steps import trigger_form

    project = Path(root)
    use_mlflow_of(project)
    text = trigger_form.document(project, conf if by_hand else {})
    params = YAML(typ="safe").load(text)
    stages = definition.read(project, params)
    run: dict[str, Any] = {
        "name": workspaces.name_of(dag_id, run_id),
        "params": text,
        "code": workspaces.code_digest(project),
        "batches": workspaces.raw_batches(project, params["experiment"]["batches"]),
        "items": {
            stage.name: [{"address": instance.address, "title": instance.title} for instance in stage.instances]
            for stage in stages.values()
        },
    }
    with workspaces.in_use(project, run) as workspace:
        run["code_version"] = code_version(project)
        run["data_version"] = data_version_of_files(list(run["batches"]), workspace)
        if not by_hand and _is_trained(run["data_version"], params["experiment"]["recipe"]):
            say(f"Data version {run['data_version']} was trained on before.")
            return {"skip": f"The pipeline has run on data version {run['data_version']} before."}
        run["links"] = _mlflow_page(run["name"])
        _write_about(workspace, dag_id, run_id, run)
    workspaces.remove_old(project, run["name"])
    say(f"Settings of this run:\n{_of_this_run(params)}")  # first, because Airflow opens a log at its end
    say(f"Run {run_id}\n  workspace     {workspace}\n  data version  {run['data_version']}")
    say(f"  code version  {run['code_version']}")
    for title, page in run["links"].items():
        say(f"  {title:12}  {page}")
    return run


def _of_this_run(params: Mapping[str, Any]) -> str:
    """Settings without those of models that are not trained, and of the inbox, which is not looked at.

    Small blocks take one line, so that the page of a log shows the most of them without scrolling.
    """
    shown = {key: value for key, value in params.items() if key != "inbox"}
    for block in ("models", "training"):
        shown[block] = {name: params[block][name] for name in params["experiment"]["models"]}
    document = unshared(shown)
    _close_up(document)
    return text_of(document)


def _close_up(block: Any) -> None:
    values = list(block.values())
    if len(values) <= SHORT_BLOCK and not any(isinstance(value, dict | list) for value in values):
        block.fa.set_flow_style()
    for value in values:
        if isinstance(value, dict):
            _close_up(value)


def run_stage(
    root: str, dag_id: str, run_id: str, run: Mapping[str, Any], address: str, locks: Mapping[str, Any]
) -> dict[str, Any]:
    """Brings one stage up to date in the run's workspace, with DVC; made on another worker, its inputs are fetched.

    Args:
        root: the project's folder on this worker.
        dag_id: Airflow's name of the DAG.
        run_id: Airflow's name of the run.
        run: what `set_up` returned.
        address: DVC's name of the stage, such as `train@cnn_small-0`.
        locks: the entries of dvc.lock of the stages that come before, by address.

    Returns:
        `lock`, the stage's own entry of dvc.lock; `links` to MLflow by title; of `register` also `waiting`: the
        `version` that waits for approval and the `text` to decide by, or None.

    Raises:
        PleatError: the stage failed.
    """
    with workspaces.in_use(Path(root), run) as workspace:
        if not (workspace / RUN).is_file():  # made on this worker just now
            _write_about(workspace, dag_id, run_id, run)
            workspaces.remove_old(Path(root), run["name"])
        os.chdir(workspace)
        os.environ["PYTHONPATH"] = str(workspace)  # the stage runs the code that the run began with
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        use_mlflow_of(Path(root))
        say(f"{address} in {workspace}")
        stages = definition.read(workspace, YAML(typ="safe").load(run["params"]))
        _bring_up_to_date(workspace, stages, address, locks)
        name = address.partition("@")[0]
        last = all(source != name for source, _ in definition.edges(stages))
        done = {"lock": _lock(workspace)[address], "links": _log_the_rest(workspace, run) if last else {}}
        return done | ({"waiting": _waiting(workspace)} if name == "register" else {})


def decide(root: str, dag_id: str, run_id: str, run: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """Carries out what a person answered to the question whether a version becomes champion.

    Args:
        root: the project's folder on this worker.
        dag_id: Airflow's name of the DAG.
        run_id: Airflow's name of the run.
        run: what `set_up` returned.
        answer: `version`, `decline` (bool), `by` (who answered) and `comment`.

    Raises:
        PleatError: another model became champion since it was judged, or MLflow cannot be reached.
    """
    from pipeline_steps import params, promotion

    use_mlflow_of(Path(root))
    settings = params.check(YAML(typ="safe").load(run["params"]), "params.yaml")
    by = f"{answer['by']} in Airflow, {dag_id} {run_id}"
    event = promotion.approve(settings, answer["version"], answer["decline"], answer["comment"], by)
    return {"event": event.kind, "version": event.version}


def _is_trained(data_version: str, recipe: str) -> bool:
    """Whether a whole run on this data is in MLflow; where MLflow is away, it is not known, so the pipeline runs."""
    from pipeline_steps.tracking import is_trained, tolerant

    with tolerant():
        return is_trained(data_version, recipe)
    return False


def use_mlflow_of(root: Path) -> None:
    """The project's own store, where no tracking server is named."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root.absolute() / 'mlflow.db'}")


def _waiting(workspace: Path) -> dict[str, str] | None:
    verdict = json.loads((workspace / "reports" / "registration" / "verdict.json").read_text(encoding="utf-8"))
    if verdict["event"] != "approval requested":
        return None
    return {"version": verdict["version"], "text": "\n\n".join([f"**{verdict['title']}**", *verdict["reasons"]])}


def _bring_up_to_date(
    workspace: Path, stages: Mapping[str, definition.Stage], address: str, locks: Mapping[str, Any]
) -> None:
    remote = os.environ.get("PLEAT_STAGE_REMOTE")
    _add_locks(workspace, locks)
    before = _batches(workspace, stages, address)
    if remote or (workspace / FROM_ELSEWHERE).exists():  # else every stage before has left its outputs here
        before += definition.predecessors(stages, address)
    if before:
        fetch = ["pull", "--remote", remote] if remote else ["checkout"]
        _dvc(*fetch, "--force", *before)
    _repro(address, ["--pull"] if remote else [])
    if remote:
        _dvc("push", "--remote", remote, "--run-cache", address)


def _write_about(workspace: Path, dag_id: str, run_id: str, run: Mapping[str, Any]) -> None:
    about = {key: run[key] for key in ("name", "code_version", "data_version")}
    workspaces.write_about(workspace, {**about, "dag_id": dag_id, "run_id": run_id})


def _repro(address: str, options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        failure = Path(folder) / "failure.json"
        os.environ[FAILURE_FILE] = str(failure)
        status = _status("repro", *options, "--single-item", address)
        if status and failure.exists():  # the stage's own words
            told = json.loads(failure.read_text(encoding="utf-8"))
            raise PleatError(told["message"], temporary=told["temporary"])
    if status:
        raise PleatError(f"The stage {address} ended before it was done; the lines above say how.", temporary=True)


def _dvc(*arguments: str) -> None:
    if _status(*arguments):
        raise PleatError(f"`dvc {' '.join(arguments)}` failed; the lines above say why.", temporary=True)


def _status(*arguments: str) -> int:
    from dvc.cli import main as dvc

    sys.stdout.flush()
    return int(dvc(["--wait-for-lock", *arguments]))


def _batches(workspace: Path, stages: Mapping[str, definition.Stage], address: str) -> list[str]:
    """The tracked batches that a stage reads, by their .dvc files."""
    every = (instance for stage in stages.values() for instance in stage.instances)
    deps = next(instance.deps for instance in every if instance.address == address)
    tracked = [f"{dep}.dvc" for dep in deps if dep.startswith(workspaces.RAW)]
    return [name for name in tracked if (workspace / name).is_file()]


def _lock(workspace: Path) -> dict[str, Any]:
    path = workspace / "dvc.lock"
    return dict(YAML(typ="safe").load(path)["stages"]) if path.is_file() else {}


def _add_locks(workspace: Path, locks: Mapping[str, Any]) -> None:
    """Puts the entries of other workers' stages into dvc.lock."""
    known = _lock(workspace)
    if all(known.get(address) == entry for address, entry in locks.items()):
        return
    from dvc.repo import Repo

    (workspace / FROM_ELSEWHERE).touch()
    with Repo(str(workspace), _wait_for_lock=True) as repo, repo.lock:
        document = {"schema": "2.0", "stages": _lock(workspace) | dict(locks)}
        partial = workspace / f".partial-{os.getpid()}-dvc.lock"
        YAML(typ="safe").dump(document, partial)
        partial.replace(workspace / "dvc.lock")


def _log_the_rest(workspace: Path, run: Mapping[str, Any]) -> dict[str, str]:
    """Ties what this run used to it in MLflow, logs what MLflow missed, and gives the addresses to look at."""
    from pipeline_steps import params
    from pipeline_steps.tracking import Tracker, tolerant

    address = _mlflow_address()
    with tolerant():
        tracker = Tracker(params.check(YAML(typ="safe").load(run["params"]), "params.yaml"), workspace)
        run_id = tracker.sync()
        if address and run_id:
            page = f"{address}/#/experiments/{tracker.experiment}/runs/{run_id}"
            return {"MLflow": f"{page}?{TRAINING}", "Report": f"{page}/artifacts/report/index.html?{TRAINING}"}
    return {}


def _mlflow_page(name: str) -> dict[str, str]:
    """The page of MLflow that lists what a run used, as far as MLflow can be asked now."""
    import requests

    address = _mlflow_address()
    if address is None:
        return {}
    api = f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api/2.0/mlflow/experiments"
    try:
        answer = requests.get(f"{api}/get-by-name", params={"experiment_name": EXPERIMENT}, timeout=5)
        if answer.status_code == requests.codes.not_found:  # nothing was ever logged
            tags = [{"key": key, "value": value} for key, value in EXPERIMENT_TAGS.items()]
            requests.post(f"{api}/create", json={"name": EXPERIMENT, "tags": tags}, timeout=5)
            answer = requests.get(f"{api}/get-by-name", params={"experiment_name": EXPERIMENT}, timeout=5)
        experiment = answer.json()["experiment"]["experiment_id"]
    except (requests.RequestException, KeyError):  # away
        return {"MLflow": address}
    used = quote(f"tags.`pleat.run.{name}` = 'yes'")
    return {"MLflow": f"{address}/#/experiments/{experiment}/runs?searchFilter={used}&{TRAINING}"}


def _mlflow_address() -> str | None:
    """MLflow's address as a browser sees it: PLEAT_MLFLOW_UI, or the tracking server."""
    address = os.environ.get("PLEAT_MLFLOW_UI") or os.environ.get("MLFLOW_TRACKING_URI", "")
    return address.rstrip("/") if address.startswith("http") else None


if __name__ == "__main__":
    main()
