"""Tasks that run a step of the pipeline in a child process of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

ROOT = Path(__file__).resolve().parents[1]
APPROVE, DECLINE = "Approve", "Decline"
ADVICE = "Use `dvc push` to send your updates to remote storage."  # meant for a person at a terminal


class PageLink(BaseOperatorLink):
    """A button on the task's page that opens what the step named under this title."""

    def __init__(self, title: str) -> None:
        self.title = title

    @property
    def name(self) -> str:
        """The button's text."""
        return self.title

    @property
    def xcom_key(self) -> str:
        """Where Airflow keeps the address; its own default is one name for all links of a class."""
        return f"_link_{self.title}"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:  # noqa: ARG002
        """The page, or nothing where the step named none."""
        return getattr(operator, "links", {}).get(self.title, "")


class StepOperator(BaseOperator):
    """Runs `pipeline_steps.step` under a guard that ends the whole process tree with the task.

    A step that failed for good (bad data, a wrong setting) fails the task at once; anything else is tried again.
    """

    process: subprocess.Popen[str] | None = None

    def step(self, context: Context, order: dict[str, Any]) -> Any:
        """Runs one step and passes its lines on to the task's log.

        Raises:
            AirflowFailException: trying again cannot help; the message is the step's own sentence.
            AirflowException: the step died or failed for a reason that may pass.
        """
        ids = {"root": str(ROOT), "dag_id": self.dag_id, "run_id": context["run_id"]}
        with tempfile.TemporaryDirectory(prefix="pleat-") as folder:
            result = Path(folder) / "result.json"
            for line in self._lines(result, json.dumps({**order, **ids})):
                if line.rstrip() != ADVICE:
                    self.log.info("%s", line.rstrip())
            status = self.process.wait()
            outcome = json.loads(result.read_text()) if result.exists() else {}
        if "done" in outcome:
            self.links = outcome["done"].get("links", {})
            return outcome["done"]
        if outcome.get("retry", True):
            raise AirflowException(outcome.get("failed", f"The step was ended (exit status {status})."))
        raise AirflowFailException(outcome["failed"])

    def on_kill(self) -> None:
        """Called when the task is stopped from outside."""
        if self.process is not None:
            self.process.terminate()  # the guard ends everything below it

    def _lines(self, result: Path, order: str) -> Iterator[str]:
        # Neither must the step outlive Airflow's supervisor, this process's parent, which nobody else would notice.
        guard = [sys.executable, "-m", "pipeline_steps.guard", "--while", str(os.getppid()), "--"]
        self.process = subprocess.Popen(
            [*guard, sys.executable, "-u", "-m", "pipeline_steps.step", str(result)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self.process.stdin.write(order)
        self.process.stdin.close()
        yield from self.process.stdout


class SetupOperator(StepOperator):
    """Makes the run's workspace and says what the run is."""

    operator_extra_links = (PageLink("MLflow"),)

    def execute(self, context: Context) -> dict[str, Any]:
        """Returns the run's description, which every later task gets.

        Raises:
            AirflowSkipException: nobody triggered the run, and its data was trained on before.
        """
        run_type = context["dag_run"].run_type
        by_hand = getattr(run_type, "value", run_type) == "manual"
        run = self.step(context, {"do": "setup", "conf": dict(context["params"]), "by_hand": by_hand})
        if "skip" in run:
            raise AirflowSkipException(run["skip"])
        return run


def description(context: Context) -> dict[str, Any]:
    """What the task `setup` returned; given as an argument, it would draw an edge from `setup` to every task."""
    return context["ti"].xcom_pull(task_ids="setup", map_indexes=None)


class StageOperator(StepOperator):
    """Brings one stage of dvc.yaml up to date in the run's workspace.

    Args:
        address: DVC's name of the stage and item.
        title: the item in words, shown in the UI.
        before: what the tasks of the stages before returned, lists of mapped tasks included.
    """

    template_fields = ("address", "title", "before")

    def __init__(self, *, address: str, title: str, before: Any, **more: Any) -> None:
        super().__init__(**more)
        self.address, self.title, self.before = address, title, before

    def execute(self, context: Context) -> dict[str, Any]:
        """Returns the stage's entry of dvc.lock, for the stages that come after."""
        locks: dict[str, Any] = {}
        for returned in self.before:
            for one in [returned] if isinstance(returned, dict) else returned:
                locks |= one["lock"]
        run = description(context)
        done = self.step(context, {"do": "stage", "run": run, "address": self.address, "locks": locks})
        return {"lock": {self.address: done["lock"]}, "waiting": done.get("waiting")}


class LastStageOperator(StageOperator):
    """The stage that nothing else builds on: its page leads to the results."""

    operator_extra_links = (PageLink("Report"), PageLink("MLflow"))


class DecideOperator(StepOperator):
    """Makes champion, or declines, what a person was asked about.

    Args:
        version: of the model that waits.
        answer: what the person answered: `chosen_options`, `params_input`, `responded_by_user`.
    """

    template_fields = ("version", "answer")

    def __init__(self, *, version: Any, answer: Any, **more: Any) -> None:
        super().__init__(**more)
        self.version, self.answer = version, answer

    def execute(self, context: Context) -> dict[str, Any]:
        """Returns the event in the history."""
        person = self.answer.get("responded_by_user") or {}
        answer = {
            "version": self.version,
            "decline": self.answer["chosen_options"] != [APPROVE],
            "by": person.get("name") or "somebody",
            "comment": self.answer["params_input"].get("comment") or "",
        }
        return self.step(context, {"do": "decide", "run": description(context), "answer": answer})


class OrderOperator(StepOperator):
    """Runs one step with the arguments given.

    Args:
        order: the step's name.
        arguments: what it is called with; may hold outputs of other tasks.
    """

    template_fields = ("arguments",)

    def __init__(self, *, order: str, arguments: Any = None, **more: Any) -> None:
        super().__init__(**more)
        self.order, self.arguments = order, arguments or {}

    def execute(self, context: Context) -> Any:
        """Returns what the step returned."""
        return self.step(context, {"do": self.order, **self.arguments})


class ScoreOperator(StepOperator):
    """Classifies the images that the run's form names."""

    def execute(self, context: Context) -> Any:
        """Returns nothing: the answers are in the file that the form names."""
        self.step(context, {"do": "score", "conf": dict(context["params"])})


# Its events carry the data version. For a scheme without "x-" Airflow would import every provider that knows one.
DATA = Asset(name="pleat_data", uri="x-pleat://data")
RETRIES = {
    "owner": "pleat",
    "retries": 4,  # for what may pass: a killed process, a full disk, a remote that is away
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
}
