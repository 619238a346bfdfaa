"""Airflow's REST API as a person's script uses it."""

import time
from pathlib import Path
from typing import Any

import requests

FINISHED = ("success", "failed")


class Airflow:
    """One logged-in user of one Airflow."""

    def __init__(self, address: str, user: str, password: str) -> None:
        self.address = address
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy
        answer = self.session.post(f"{address}/auth/token", json={"username": user, "password": password}, timeout=30)
        answer.raise_for_status()
        self.session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        return self.session.request(method, f"{self.address}/api/v2/{path}", timeout=60, **more)

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.ask("GET", path, params=parameters)
        assert answer.ok, answer.text
        return answer.json()

    def trigger(self, conf: dict[str, Any], dag: str = "pleat_train") -> str:
        """Starts a run; gives back its id."""
        answer = self.ask("POST", f"dags/{dag}/dagRuns", json={"logical_date": None, "conf": conf})
        assert answer.ok, answer.text
        return str(answer.json()["dag_run_id"])

    def state(self, run: str, dag: str = "pleat_train") -> str:
        return str(self.get(f"dags/{dag}/dagRuns/{run}")["state"])

    def wait(self, run: str, dag: str = "pleat_train", timeout_s: float = 600) -> str:
        """The run's final state."""
        self.until(lambda: self.state(run, dag) in FINISHED, timeout_s, f"run {run} to end")
        return self.state(run, dag)

    def tasks(self, run: str, dag: str = "pleat_train") -> list[dict[str, Any]]:
        """Every task instance: task_id, map_index, rendered_map_index, state, try_number, hostname, pid, ..."""
        return list(self.get(f"dags/{dag}/dagRuns/{run}/taskInstances", limit=200)["task_instances"])

    def task(self, run: str, task: str, index: int = -1, dag: str = "pleat_train") -> dict[str, Any]:
        return next(one for one in self.tasks(run, dag) if (one["task_id"], one["map_index"]) == (task, index))

    def log(self, run: str, task: str, index: int = -1, attempt: int = 1, dag: str = "pleat_train") -> str:
        """A task's log as text."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        content = self.get(path, map_index=index, full_content="true")["content"]
        return "\n".join(line if isinstance(line, str) else str(line.get("event", line)) for line in content)

    def returned(self, run: str, task: str, index: int = -1, dag: str = "pleat_train") -> Any:
        """What a task returned."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/return_value"
        return self.get(path, map_index=index, deserialize="true")["value"]

    def mark(self, run: str, task: str, state: str, index: int = -1, dag: str = "pleat_train") -> None:
        """Marks a task instance as the UI's button does."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        answer = self.ask("PATCH", path, params={"map_index": index}, json={"new_state": state})
        assert answer.ok, answer.text

    def end(self, run: str, dag: str = "pleat_train") -> None:
        """Marks a run failed, which ends its tasks."""
        answer = self.ask("PATCH", f"dags/{dag}/dagRuns/{run}", json={"state": "failed"})
        assert answer.ok, answer.text

    def clear(self, run: str, task: str, dag: str = "pleat_train", **options: Any) -> None:
        """Clears a task as the UI's button does."""
        order = {"dag_run_id": run, "task_ids": [task], "dry_run": False, "only_failed": False, **options}
        answer = self.ask("POST", f"dags/{dag}/clearTaskInstances", json=order)
        assert answer.ok, answer.text

    @staticmethod
    def until(met: Any, timeout_s: float, what: str) -> Any:
        """Polls until `met` gives something true."""
        deadline = time.monotonic() + timeout_s
        while not (found := met()):
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
            time.sleep(0.5)
        return found


def bundled_logs(folder: Path) -> str:
    """The end of every component's log, for the message of a failed test."""
    parts = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.rglob("*.log"))]
    return "\n".join(parts)
