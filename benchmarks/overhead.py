"""What Airflow adds to `dvc repro`: the sample's whole pipeline both ways, each in a fresh clone with an empty cache.

Run with `python benchmarks/overhead.py`; takes five to eight minutes.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from clone import Workspace, fresh_clone
from measure import on_this_machine, verdict

MOST_TIMES = 1.5  # the first run, against `dvc repro`
MOST_SECONDS = 60  # a second run with nothing changed
START = [sys.executable, "-c", "from pipeline_steps.cli import main; main()", "airflow"]


class Airflow:
    """The REST API of a running Airflow."""

    def __init__(self, port: int, password: str) -> None:
        self.address = f"http://127.0.0.1:{port}"
        login = {"username": "admin", "password": password}
        token = requests.post(f"{self.address}/auth/token", json=login, timeout=60).json()["access_token"]
        self.header = {"Authorization": f"Bearer {token}"}

    def ask(self, method: str, path: str, **more: object) -> requests.Response:
        """One request with the login's token."""
        return requests.request(method, f"{self.address}/api/v2/{path}", headers=self.header, timeout=60, **more)

    def run(self) -> float:
        """Triggers `pleat_train` as it stands and waits for its end; gives back the seconds from trigger to end."""
        started = time.monotonic()
        body = {"logical_date": None, "conf": {}}
        run = self.ask("POST", "dags/pleat_train/dagRuns", json=body).json()["dag_run_id"]
        while (state := self.ask("GET", f"dags/pleat_train/dagRuns/{run}").json()["state"]) not in (
            "success",
            "failed",
        ):
            time.sleep(0.5)
        if state == "failed":
            sys.exit(f"The run {run} failed.")
        return time.monotonic() - started


def main() -> None:
    with on_this_machine("Overhead: the sample by `dvc repro` and by Airflow"):
        with fresh_clone() as clone:
            plain = clone.run("dvc", "repro").seconds
            print(f"dvc repro                      {plain:6.1f} s", flush=True)
        with fresh_clone() as clone, _airflow(clone) as airflow:
            first = airflow.run()
            print(f"Airflow, empty cache           {first:6.1f} s", flush=True)
            second = airflow.run()
            print(f"Airflow again, nothing changed {second:6.1f} s")
        print("\nTargets on 2 cores:")
        print(verdict("Airflow, times dvc repro", first / plain, "<=", MOST_TIMES, ""))
        print(verdict("seconds with nothing changed", second, "<=", MOST_SECONDS, " s"))


@contextmanager
def _airflow(clone: Workspace) -> Iterator[Airflow]:
    """`pleat airflow` on free ports."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, mlflow_port = one.getsockname()[1], two.getsockname()[1]
    output = clone.root.parent / "airflow.txt"
    with output.open("wb") as file:
        command = [*START, "--port", str(port), "--mlflow-port", str(mlflow_port)]
        environment = {**clone.env, "PLEAT_LEASES": str(clone.root.parent / "leases")}
        process = subprocess.Popen(command, cwd=clone.root, env=environment, stdout=file, stderr=file)
    try:
        while b"Ctrl-C stops" not in output.read_bytes():
            if process.poll() is not None:
                sys.exit(output.read_text())
            time.sleep(0.5)
        secret = clone.root / ".pleat" / "airflow" / "simple_auth_manager_passwords.json.generated"
        airflow = Airflow(port, json.loads(secret.read_text())["admin"])
        while not airflow.ask("GET", "dags/pleat_train").ok:  # not parsed yet
            time.sleep(0.5)
        time.sleep(5)  # start-up is over, nothing else is measured
        yield airflow
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


if __name__ == "__main__":
    main()
