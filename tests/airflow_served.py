"""`pleat airflow` in a copy of the checkout, as `make airflow` starts it; one start for all tests that use it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from airflow_rest import Airflow, bundled_logs
from mlflow import MlflowClient
from workspace import copy_checkout, environment, use_quick

from pipeline_steps import standalone

# Two trainings side by side, on one core each; what lost its supervisor is taken up again after seconds. DAG files are
# read again when they change, and not every half a minute.
SETTINGS = {
    "PLEAT_CPU_SLOTS": "2",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
}


@dataclass
class Served:
    """What a test needs of the running servers."""

    project: Path
    airflow: Airflow
    mlflow: MlflowClient
    password: str = field(repr=False)
    environment: dict[str, str] = field(repr=False)
    process: subprocess.Popen[bytes]

    def workspace(self, run: str) -> Path:
        """The workspace of a run."""
        return self.project / ".pleat" / "runs" / str(self.airflow.returned(run, "setup")["name"])


@contextmanager
def served_in(folder: Path, prepare: Callable[[Path], object] = use_quick) -> Iterator[Served]:
    project = copy_checkout(folder)
    prepare(project)
    port, mlflow_port = free_port(), free_port()
    # The copy's own code, and leases that no other test holds.
    more = {"PYTHONPATH": str(project), "PLEAT_LEASES": str(project / "leases"), **SETTINGS}
    # Below a guard, so that the servers end when the tests are killed.
    guard = [sys.executable, "-m", "pipeline_steps.guard", "--"]
    start = [*guard, sys.executable, "-c", "from pipeline_steps.cli import main; main()", "airflow"]
    output = folder / "pleat_airflow.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*start, "--port", str(port), "--mlflow-port", str(mlflow_port)],
            cwd=project, env=environment() | more, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        Airflow.until(lambda: b"Ctrl-C stops" in output.read_bytes() or process.poll() is not None, 300, "Airflow")
        assert process.poll() is None, output.read_text() + bundled_logs(project / ".pleat" / "airflow" / "output")
        secret = project / ".pleat" / "airflow" / "simple_auth_manager_passwords.json.generated"
        password = str(json.loads(secret.read_text())["admin"])
        airflow = Airflow(f"http://127.0.0.1:{port}", "admin", password)
        # Which DAGs there are is known only when they have been parsed.
        airflow.until(lambda: airflow.ask("GET", "dags/pleat_train").ok, 60, "the DAG")
        mlflow = MlflowClient(f"http://127.0.0.1:{mlflow_port}")
        ours = os.environ.copy()
        os.environ.update(environment() | more)
        inside = standalone.environment(project, port, mlflow_port, free_port())
        os.environ.clear()
        os.environ.update(ours)
        yield Served(project, airflow, mlflow, password, inside, process)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
