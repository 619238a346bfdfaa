"""What the tasks of Airflow's DAGs for new data and for scoring do, each in a process of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline_steps import params
from pipeline_steps.errors import PleatError


def look(root: str, dag_id: str, run_id: str) -> dict[str, Any]:  # noqa: ARG001
    """Takes what has arrived in the inbox.

    Returns:
        `taken`: what became of each delivery, as `inbox.Taken`.

    Raises:
        PleatError: the inbox, a remote or the disk fails.
    """
    from pipeline_steps import inbox

    taken = inbox.take(params.load(Path(root) / "params.yaml"), Path(root))
    return {"taken": [asdict(one) | {"report": str(one.report) if one.report else None} for one in taken]}


def acknowledge(root: str, dag_id: str, run_id: str, taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # noqa: ARG001
    """Forgets what was announced, so that it is announced once."""
    from pipeline_steps import inbox

    inbox.acknowledge([inbox.Taken(**one) for one in taken if one["outcome"] != "waiting"], Path(root))
    return {}


def score(root: str, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Classifies images with the champion.

    Args:
        root: the project's folder.
        dag_id: Airflow's name of the DAG.
        run_id: Airflow's name of the run.
        conf: `images` (a folder, file or s3 address), `out` (a .parquet file or s3 address), `version` or None.

    Raises:
        PleatError: as `predict.predict`.
    """
    from pipeline_steps import predict
    from pipeline_steps.step import use_mlflow_of

    if not conf["images"] or not conf["out"]:
        raise PleatError("Say which `images` to classify and where to write the answers (`out`).")
    use_mlflow_of(Path(root))
    settings = params.load(Path(root) / "params.yaml")
    predict.predict(settings, [conf["images"]], conf["out"], conf["version"] or None)
    return {}
