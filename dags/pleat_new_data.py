"""The DAG `pleat_new_data`: what arrived in the inbox becomes a batch, which is announced to `pleat_train`."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Metadata, TriggerRule, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from pleat_operators import DATA, RETRIES, OrderOperator
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
EVERY_MINUTES = YAML(typ="safe").load(ROOT / "params.yaml")["inbox"]["every_minutes"]

ABOUT = """\
### Looks into the inbox

A delivery (a folder or an archive in `inbox.source` of `params.yaml`) that has stopped growing is checked as the
pipeline would check it, and against the training data. A good one becomes a batch: tracked by DVC, pushed, committed,
and announced to `pleat_train`. A bad one is set aside with its reasons, and this run fails to say so; the pipeline
stays as it was.
"""

with DAG(
    "pleat_new_data",
    description="Make a batch of what arrived in the inbox",
    doc_md=ABOUT,
    schedule=timedelta(minutes=EVERY_MINUTES),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=None if os.access(ROOT, os.W_OK) else True,  # in the image the project is read-only
    default_args=RETRIES,
    tags=["pleat"],
) as dag:
    look = OrderOperator(task_id="look", order="look", doc_md="Takes what has arrived; its log says what became of it.")

    @task(outlets=[DATA], doc_md="One event with the new data version, where a batch was added.")
    def announce(looked: dict) -> Iterator[Metadata]:  # noqa: D103
        added = [one for one in looked["taken"] if one["outcome"] == "added"]
        if not added:
            raise AirflowSkipException("No batch was added.")
        batches = [one["batch"] for one in added]
        yield Metadata(DATA, {"data_version": added[-1]["data_version"], "batches": batches})

    acknowledge = OrderOperator(
        task_id="acknowledge",
        order="acknowledge",
        arguments=look.output,
        trigger_rule=TriggerRule.NONE_FAILED,
        doc_md="Notes that it was announced, so that it is announced once.",
    )

    @task(
        retries=0,
        trigger_rule=TriggerRule.NONE_FAILED,
        doc_md="Fails where a delivery was set aside, with the reasons.",
    )
    def set_aside(looked: dict) -> None:  # noqa: D103
        bad = [one for one in looked["taken"] if one["outcome"] == "set aside"]
        for one in bad:
            print(f"{one['delivery']} was set aside: {' '.join(one['reasons'])} See {one['report']}.")
        if bad:
            raise AirflowFailException(
                f"{', '.join(one['delivery'] for one in bad)}: set aside; the lines above say why."
            )

    announce(look.output) >> acknowledge >> set_aside(look.output)
