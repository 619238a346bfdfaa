"""The DAG `pleat_train`: dvc.yaml as Airflow runs it."""

import os
from datetime import timedelta
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseOperator, Param, task
from pleat_operators import LastStageOperator, SetupOperator, StageOperator
from ruamel.yaml import YAML

from pipeline_steps import definition, trigger_form

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = YAML(typ="safe").load(ROOT / "params.yaml")
STAGES = definition.read(ROOT, SETTINGS)
EDGES = definition.edges(STAGES)

ABOUT = """\
### Trains and compares image classifiers

The tasks are the stages of `dvc.yaml`, run by DVC in a workspace of the run's own. A stage whose inputs and settings
were seen before comes from DVC's cache; a fold that was stopped goes on from its last epoch.

**Trigger** opens a form; what it leaves alone is as in `params.yaml`. The log of the task `setup` shows the run's
settings and the versions of data and code. On its tab **Details** a button leads to the run in MLflow, on that of
`compare` another one to the report.
"""


def place_of(pool: str) -> dict[str, Any]:
    """Where stages that need a device run: a Celery queue (PLEAT_GPU_QUEUE), a Kubernetes pod (PLEAT_GPU_POD)."""
    queue, pod = os.environ.get("PLEAT_GPU_QUEUE"), os.environ.get("PLEAT_GPU_POD")
    if pool != "gpu":
        return {}
    return ({"queue": queue} if queue else {}) | ({"executor_config": {"pod_template_file": pod}} if pod else {})


with DAG(
    "pleat_train",
    description="Train and compare image classifiers: the stages of dvc.yaml",
    doc_md=ABOUT,
    schedule=None,
    catchup=False,
    max_active_runs=4,
    params={name: Param(**field) for name, field in trigger_form.fields(ROOT).items()},
    default_args={
        "owner": "pleat",
        "retries": 4,  # for what may pass: a killed process, a full disk, a remote that is away
        "retry_delay": timedelta(seconds=5),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=5),
    },
    tags=["pleat"],
) as dag:
    setup = SetupOperator(task_id="setup", doc_md="Makes the run's workspace; shows settings, versions and links.")
    tasks: dict[str, BaseOperator] = {}
    before = {stage: {source for source, target in EDGES if target == stage} for stage in STAGES}
    for name in TopologicalSorter(before).static_order():
        stage, pool = STAGES[name], STAGES[name].meta.get("pool", "default_pool")
        operator = StageOperator if any(name in sources for sources in before.values()) else LastStageOperator
        common = {
            "task_id": name,
            "doc_md": f"{stage.text}\n\n`{stage.command}`",
            "pool": pool,
            **place_of(pool),
        }
        given = {"described": setup.output, "before": [tasks[source].output for source in sorted(before[name])]}
        if not stage.matrix:
            tasks[name] = operator(address=name, title=name, **given, **common)
            continue

        @task(task_id=f"list_{name}", doc_md=f"What `{name}` runs for: the matrix of dvc.yaml.")
        def items(run: dict, stage: str = name) -> list[dict[str, str]]:  # noqa: D103
            return run["items"][stage]

        each = operator.partial(map_index_template="{{ task.title }}", **given, **common)
        tasks[name] = each.expand_kwargs(items(setup.output))
