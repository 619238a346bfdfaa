"""`pleat airflow` on a terminal, in a project with two small DAGs."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests
from workspace import environment as plain_environment

READY = "Ctrl-C stops all of it"
DAGS = """
import json, os, shutil, subprocess
from pathlib import Path
from airflow.sdk import Param, dag, task

ROOT = Path(__file__).parent.parent

@dag(params={"recipe": Param((ROOT / "recipe.txt").read_text(), type="string")})
def quick():
    @task
    def show():
        (ROOT / "seen.json").write_text(json.dumps(dict(os.environ) | {"dvc": shutil.which("dvc")}))
        print("the task's own line")
    show()

@dag()
def long():
    @task
    def wait(run_id=None):
        if not (ROOT / "go").exists():
            file = ROOT / (run_id + ".pid")
            subprocess.run(["sh", "-c", f"echo $$ > {file}.new; mv {file}.new {file}; sleep 600"])
            raise RuntimeError("somebody ended the command, but not this task")
    wait()

quick()
long()
"""


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def eventually(what: str, found: Callable[[], Any], within_s: float = 90) -> Any:
    """The first true value of `found`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"not within {within_s} s: {what}")


class Running:
    """`pleat airflow` on a terminal of its own, in a project with two small DAGs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port, self.mlflow_port = free_ports()
        self.home = root / ".pleat" / "airflow"
        # As on the machine of somebody who also uses another Airflow.
        self.more = {
            "HOME": str(root / "home"),
            "AIRFLOW_HOME": str(root / "home" / "airflow"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://elsewhere/airflow",
            "AIRFLOW__API__HOST": "0.0.0.0",
            "AIRFLOW__CORE__DAGS_FOLDER": str(root / "home"),
            "PLEAT_CPU_SLOTS": "3",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        }
        (root / "dags").mkdir()
        (root / "home").mkdir()
        (root / "dags" / "small.py").write_text(DAGS)
        (root / "recipe.txt").write_text("first")
        self.printed = ""

    def command(self) -> list[str]:
        return ["pleat", "airflow", "--port", str(self.port), "--mlflow-port", str(self.mlflow_port)]

    def start(self) -> None:
        self.printed = ""
        master, terminal = os.openpty()
        self.process = subprocess.Popen(
            self.command(),
            cwd=self.root,
            env=plain_environment() | self.more,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        threading.Thread(target=self._read, args=(master,), daemon=True).start()
        eventually("ready or ended", lambda: READY in self.printed or self.process.poll() is not None, 320)
        assert READY in self.printed, self.printed

    def _read(self, master: int) -> None:
        try:
            while part := os.read(master, 4096):
                self.printed += part.decode()
        except OSError:  # the terminal's other end is closed
            os.close(master)

    def password(self) -> str:
        return self.printed.partition("user admin, password ")[2].split()[0]

    def login(self, password: str) -> requests.Response:
        return requests.post(
            f"http://127.0.0.1:{self.port}/auth/token", json={"username": "admin", "password": password}, timeout=30
        )

    def api(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
        header = {"Authorization": f"Bearer {self.login(self.password()).json()['access_token']}"}
        address = f"http://127.0.0.1:{self.port}/api/v2/{path}"
        answer = requests.request(
            method or ("GET" if body is None else "POST"), address, json=body, headers=header, timeout=30
        )
        assert answer.ok, f"{address}: {answer.status_code} {answer.text}"
        return answer.json()

    def trigger(self, dag: str) -> str:
        def known() -> bool:
            return dag in {entry["dag_id"] for entry in self.api("dags")["dags"]}

        eventually(f"DAG {dag}", known)
        return str(self.api(f"dags/{dag}/dagRuns", {"logical_date": None})["dag_run_id"])

    def state(self, dag: str, run_id: str) -> str:
        return str(self.api(f"dags/{dag}/dagRuns/{run_id}")["state"])

    def shell_of(self, run_id: str) -> psutil.Process:
        """The process that a task of DAG `long` has started."""
        file = self.root / f"{run_id}.pid"
        return psutil.Process(int(eventually(f"task of {run_id}", lambda: file.exists() and file.read_text())))

    def everything(self) -> list[psutil.Process]:
        """Every process that works in the project's folder, also one that has lost its parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != self.process.pid and Path(process.cwd()).is_relative_to(self.root):
                    found.append(process)
        return found

    def component(self, name: str) -> psutil.Process:
        """The first process of a component, the one below its guard, which starts it."""

        def below() -> list[psutil.Process]:
            command = {"pipeline_steps.guard", name}
            with suppress(psutil.Error):  # one that ends while it is asked
                guards = [process for process in self.everything() if command <= set(process.cmdline())]
                assert len(guards) <= 1
                return guards[0].children() if guards else []
            return []

        return min(eventually(f"{name} below its guard", below), key=psutil.Process.create_time)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
