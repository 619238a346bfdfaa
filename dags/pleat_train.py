"""The DAG `pleat_train`: dvc.yaml as Airflow runs it."""

import os
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import DAG, AssetOrTimeSchedule, BaseOperator, CronTriggerTimetable, Param, task
from pleat_operators import (
    APPROVE,
    DATA,
    DECLINE,
    RETRIES,
    DecideOperator,
    LastStageOperator,
    SetupOperator,
    StageOperator,
)
from ruamel.yaml import YAML

from pipeline_steps import definition, trigger_form

ROOT = Path(__file__).resolve().parents[1]
WEEKLY = "0 3 * * 0"  # for what no event told of: a batch that somebody added by hand
SETTINGS = YAML(typ="safe").load(ROOT / "params.yaml")
STAGES = definition.read(ROOT, SETTINGS)
EDGES = definition.edges(STAGES)

ABOUT = """\
### Trains and compares image classifiers

The tasks are the stages of `dvc.yaml`, run by DVC in a workspace of the run's own. A stage whose inputs and settings
were seen before comes from DVC's cache; a fold that was stopped goes on from its last epoch.

**Trigger** opens a form; what it leaves alone is as in `params.yaml`. The log of the task `setup` shows the run's
settings and the versions of data and code. On its tab **Details** a button leads to the run in MLflow, on that of
`register` another one to the report.

Without anybody's doing it runs when `pleat_new_data` has added a batch, and weekly; then it uses `params.yaml` as it is
and does nothing for data that it was trained on before.
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
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable(WEEKLY, timezone="UTC"), assets=[DATA]),
    catchup=False,
    max_active_runs=4,
    default_args=RETRIES,
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
        given = {"before": [tasks[source].output for source in sorted(before[name])]}
        if not stage.matrix:
            tasks[name] = operator(address=name, title=name, **given, **common)
            if not before[name]:
                setup >> tasks[name]
            continue

        @task(task_id=f"list_{name}", doc_md=f"What `{name}` runs for: the matrix of dvc.yaml.")
        def items(run: dict, stage: str = name) -> list[dict[str, str]]:  # noqa: D103
            return run["items"][stage]

        each = operator.partial(map_index_template="{{ task.title }}", **given, **common)
        tasks[name] = each.expand_kwargs(items(setup.output))

    @task.short_circuit(task_id="needs_approval", doc_md="Goes on where a model waits for a person.")
    def needs_approval(registered: dict) -> bool:  # noqa: D103
        return registered["waiting"] is not None

    approve = HITLOperator(
        task_id="approve",
        subject="Shall version {{ ti.xcom_pull(task_ids='register')['waiting']['version'] }} become the champion?",
        body="{{ ti.xcom_pull(task_ids='register')['waiting']['text'] }}",
        options=[APPROVE, DECLINE],
        params={"comment": Param("", type=["string", "null"], title="Comment", description="For the history.")},
        doc_md="Waits for a person: *Required Actions* in the UI.",
    )
    decide = DecideOperator(
        task_id="decide",
        version="{{ ti.xcom_pull(task_ids='register')['waiting']['version'] }}",
        answer=approve.output,
        doc_md="Carries out the answer.",
    )
    needs_approval(tasks["register"].output) >> approve >> decide
    # Last, else every task above would carry a copy, which Airflow checks whenever it reads this file.
    dag.params = {name: Param(**field) for name, field in trigger_form.fields(ROOT).items()}  # type: ignore[assignment]
