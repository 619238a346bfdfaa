"""A run in production shape: PostgreSQL, Celery over Redis, two workers that share a DVC remote and no folder of work.

One run serves all tests. The leases of the workers' devices decide what happens, without a race: as long as the test
holds one, the fold that came to this worker waits, so that every other fold goes to the other worker. The first worker
is killed while it trains its second fold.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import pytest
from airflow_rest import Airflow, bundled_logs
from airflow_services import Services, need_servers, plain
from conftest import content
from filelock import FileLock
from mlflow.tracking import MlflowClient
from workspace import check, copy_checkout, lock

CONF = {"models": ["cnn_tiny"], "folds": 3, "epochs": 15}
SAME = ["experiment.models=[cnn_tiny]", "experiment.folds=3", "training.cnn_tiny.max_epochs=15"]
TRAINED = "data/train/cnn_tiny"
CHECKPOINT = ".pleat/checkpoints/cnn_tiny/fold_2.pt"
WORKERS = ("red", "blue")
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # each worker has one device of its own, and it is called cpu-0
# In production a worker that does not answer may be gone for a quarter of an hour; here nobody waits for a dead one.
IMPATIENT = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
}


@dataclass
class Run:
    """What the run left, and what was seen on the way."""

    airflow: Airflow
    id: str
    state: str
    first: Path  # workspace on the worker that trained fold 0 and was killed as it trained fold 2
    second: Path  # workspace on the other worker
    at_death: dict[Path, dict[str, bytes]] = field(repr=False)  # `outputs` of both when the first worker was killed
    survivors: list[psutil.Process]  # of what the killed worker had begun

    @cached_property
    def logs(self) -> dict[tuple[str, int, int], str]:
        """Every log by task, map index and attempt."""
        return {
            (task["task_id"], task["map_index"], attempt): self.airflow.log(
                self.id, task["task_id"], task["map_index"], attempt
            )
            for task in self.airflow.tasks(self.id)
            for attempt in range(1, task["try_number"] + 1)
        }

    def ran(self) -> dict[Path, set[str]]:
        """The stages that DVC brought up to date by running them, for each workspace."""
        found: dict[Path, set[str]] = {self.first: set(), self.second: set()}
        for log in self.logs.values():
            for address in re.findall(r"^Running stage '(\S+)':$", log, re.MULTILINE):
                found[place(log, address)].add(address)
        return found


def place(log: str, address: str) -> Path:
    """The workspace in which a task worked."""
    found = re.search(rf"^{re.escape(address)} in (\S+)$", log, re.MULTILINE)
    assert found, log
    return Path(found[1])


def worker_of(workspace: Path) -> str:
    return workspace.parent.name.removesuffix("-runs")


def outputs(workspace: Path) -> dict[str, bytes]:
    """Every file of data/ and reports/ but the raw images."""
    files = content(workspace / "data") | {
        f"reports/{name}": data for name, data in content(workspace / "reports").items()
    }
    return {name: data for name, data in files.items() if not name.startswith("raw/")}


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of equal checkouts: `control` for Airflow itself, one for each worker, one for `dvc repro`."""
    need_servers()
    folder = tmp_path_factory.mktemp("celery")
    (folder / "control").mkdir()
    copy_checkout(folder / "control")
    for name in (*WORKERS, "new", "oracle"):
        shutil.copytree(folder / "control", folder / name, symlinks=True)
    for name in (*WORKERS, "new"):
        check(folder / name, "dvc", "remote", "add", "--local", "store", str(folder / "store"))
    return folder


@pytest.fixture(scope="module")
def oracle(checkouts: Path) -> Iterator[Future[str]]:
    """`dvc repro` with the same settings, in a checkout of its own, while Airflow starts and works."""
    folder = checkouts / "oracle"
    check(folder, "pleat", "use", "sample", *(word for setting in SAME for word in ("--set", setting)))
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(partial(check, folder, "dvc", "repro", PYTHONPATH=str(folder), **ON_CPU))


@pytest.fixture(scope="module")
def services(checkouts: Path, oracle: Future[str]) -> Iterator[Services]:
    for name in ("services", "mlflow"):
        (checkouts / name).mkdir()
    services = Services(checkouts / "services", checkouts / "control")
    for_steps = {
        "PLEAT_STAGE_REMOTE": "store",
        "MLFLOW_TRACKING_URI": f"sqlite:///{checkouts}/mlflow/mlflow.db",
        **ON_CPU,
    }
    try:
        services.start_redis()
        services.start_postgres()
        for name in WORKERS:
            services.start_worker(name, checkouts / name, for_steps | IMPATIENT)
        services.start_airflow(gpu_slots=len(WORKERS), more=IMPATIENT)
        yield services
    finally:
        services.kill_rest()


@pytest.fixture(scope="module")
def run(services: Services, checkouts: Path) -> Run:
    leases = {name: FileLock(checkouts / f"{name}-leases" / "cpu-0.lock") for name in WORKERS}
    for lease in leases.values():
        Path(lease.lock_file).parent.mkdir()
        lease.acquire(timeout=0)
    airflow = services.log_in("pleat_train")
    run_id = airflow.trigger(CONF)

    def waiting(fold: int) -> bool:
        assert airflow.state(run_id) != "failed", bundled_logs(services.folder)
        logs = services.folder.glob(f"logs/*/*/task_id=train/map_index={fold}/attempt=1.log")
        return any("waiting for a device" in log.read_text() for log in logs)

    airflow.until(lambda: waiting(0) and waiting(1), 400, "two folds to wait for their devices")
    first, second = (place(airflow.log(run_id, "train", fold), f"train@cnn_tiny-{fold}") for fold in (0, 1))
    # The first worker goes on with fold 0; fold 2 can only follow it there.
    leases[worker_of(first)].release()
    deadline = time.monotonic() + 400
    while not (first / CHECKPOINT).exists():
        assert time.monotonic() < deadline, bundled_logs(services.folder)
        time.sleep(0.02)
    begun = kill_worker(services, worker_of(first))
    _, survivors = psutil.wait_procs(begun, timeout=30)
    at_death = {workspace: outputs(workspace) for workspace in (first, second)}
    leases[worker_of(first)].acquire(timeout=0)  # nobody trains on this device any more
    leases[worker_of(second)].release()
    state = airflow.wait(run_id)
    return Run(airflow, run_id, state, first, second, at_death, survivors)


def kill_worker(services: Services, name: str) -> list[psutil.Process]:
    """SIGKILL to all of Celery, Airflow's supervisor included; gives back what these processes had begun."""
    tree = services.tree(name)
    guard = next(process for process in tree if "--while" in process.cmdline())
    task = guard.parent()
    assert task is not None
    begun = [task, *task.children(recursive=True)]
    assert any("train" in process.cmdline() for process in begun)
    for process in tree:
        if process not in begun:
            process.kill()
    return begun


def test_a_run_survives_the_death_of_a_worker(run: Run, services: Services) -> None:
    assert run.state == "success", bundled_logs(services.folder)
    again = [(task["task_id"], task["map_index"]) for task in run.airflow.tasks(run.id) if task["try_number"] > 1]
    assert again == [("train", 2)]  # nothing else was repeated
    assert run.airflow.task(run.id, "train", 2)["try_number"] == 2


def test_folds_were_trained_on_two_workers(run: Run) -> None:
    assert {worker_of(run.first), worker_of(run.second)} == set(WORKERS)
    for fold, attempt, workspace in ((0, 1, run.first), (1, 1, run.second), (2, 1, run.first), (2, 2, run.second)):
        log = run.logs["train", fold, attempt]
        assert place(log, f"train@cnn_tiny-{fold}") == workspace
        assert f"> pleat train cnn_tiny {fold}" in log
        assert (f"train cnn_tiny fold {fold}: weighted F1" in log) == ((fold, attempt) != (2, 1))
    # On the second worker nothing is left of the training that was killed on the first one, so it began anew.
    assert "checkpoint" not in run.logs["train", 2, 2]


def test_a_killed_worker_takes_its_training_with_it(run: Run) -> None:
    assert run.survivors == []
    assert not (run.first / TRAINED / "fold_2").exists()


def test_a_worker_evaluates_folds_that_another_one_trained(run: Run) -> None:
    ran = run.ran()
    assert {"evaluate@cnn_tiny", "compare", "train@cnn_tiny-1", "train@cnn_tiny-2"} <= ran[run.second]
    assert "train@cnn_tiny-0" in ran[run.first] - ran[run.second]
    trained = {
        name: data for name, data in run.at_death[run.first].items() if name.startswith("train/cnn_tiny/fold_0/")
    }
    assert {PurePosixPath(name).name for name in trained} >= {"label.parquet", "weights.safetensors"}
    used = {name: data for name, data in outputs(run.second).items() if name.startswith("train/cnn_tiny/fold_0/")}
    assert used == trained
    # The entries of dvc.lock came with them.
    here, there = lock(run.first), lock(run.second)
    made = ran[run.first] & here.keys() & there.keys() - {"train@cnn_tiny-2"}
    assert "train@cnn_tiny-0" in made
    assert {address: there[address] for address in made} == {address: here[address] for address in made}


def test_a_worker_has_only_what_its_stages_read_and_write(run: Run, oracle: Future[str], checkouts: Path) -> None:
    oracle.result()
    stages = lock(checkouts / "oracle")
    outs = {address: [PurePosixPath(out["path"]) for out in stage["outs"]] for address, stage in stages.items()}
    deps = {address: [PurePosixPath(dep["path"]) for dep in stage["deps"]] for address, stage in stages.items()}

    def feeds(source: str, target: str) -> bool:
        return any(out.is_relative_to(dep) or dep.is_relative_to(out) for out in outs[source] for dep in deps[target])

    for workspace, ran in run.ran().items():
        needed = {source for source in stages for target in ran if feeds(source, target)}
        present = {address for address in stages if any((workspace / out).exists() for out in outs[address])}
        assert present == (needed | ran) - ({"train@cnn_tiny-2"} if workspace == run.first else set())
    # As each of them trained, neither had the other's fold.
    assert folds(run.at_death[run.first]) == {"fold_0"}
    assert folds(run.at_death[run.second]) <= {"fold_1"}
    assert folds(outputs(run.first)) == {"fold_0"}
    assert not any(name.startswith(("evaluate/", "compare/")) for name in outputs(run.first))


def folds(files: dict[str, bytes]) -> set[str]:
    return {PurePosixPath(name).parts[2] for name in files if name.startswith("train/")}


def test_the_results_are_those_of_dvc_repro(run: Run, oracle: Future[str], checkouts: Path) -> None:
    assert "Running stage 'train@cnn_tiny-0'" in oracle.result()
    for name in (
        "reports/leaderboard.json",
        *(f"{TRAINED}/fold_{fold}/predictions/label.parquet" for fold in range(3)),
    ):
        assert (run.second / name).read_bytes() == (checkouts / "oracle" / name).read_bytes(), name
    expected, found = lock(checkouts / "oracle"), lock(run.second)
    assert {"train@cnn_tiny-0", "evaluate@cnn_tiny", "compare"} <= found.keys()
    assert hashes(found) == hashes({address: stage for address, stage in expected.items() if address in found})


def hashes(stages: dict[str, Any]) -> dict[str, str]:
    """DVC's hash of every output; Data Docs and registrations hold times."""
    outs = [out for stage in stages.values() for out in stage["outs"]]
    return {
        out["path"]: out["md5"] for out in outs if out["path"] not in ("reports/validation", "reports/registration")
    }


def test_mlflow_has_the_run_complete_and_once(run: Run, oracle: Future[str], checkouts: Path) -> None:
    oracle.result()
    used = {"pleat.run." + run.second.name: "yes"}
    assert logged(checkouts / "mlflow") == {
        name: {**one, "used": used} for name, one in logged(checkouts / "oracle").items()
    }


def logged(folder: Path) -> dict[str, Any]:
    """All of a store but times and ids; runs by name, of which there must be one each."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("pleat")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert sorted(names.values()) == [
        "cnn_tiny", "cnn_tiny fold 0", "cnn_tiny fold 1", "cnn_tiny fold 2", "cnn_tiny refit",
        "pipeline sample",
    ]  # fmt: skip
    return {
        run.info.run_name: {
            "status": run.info.status,
            "params": run.data.params,
            "metrics": run.data.metrics,
            "losses": [metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")],
            "pages": sorted(item.path for item in client.list_artifacts(run.info.run_id, "report")),
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "tags": {key: run.data.tags[key] for key in ("pleat.key", "pleat.kind", "pleat.data_version")},
            "used": {key: value for key, value in run.data.tags.items() if key.startswith("pleat.run.")},
        }
        for run in runs
    }


def test_a_new_worker_takes_a_trained_fold_from_the_store(run: Run, checkouts: Path, tmp_path: Path) -> None:
    root, stages = checkouts / "new", lock(run.second)
    order = {
        "do": "stage", "root": str(root), "dag_id": "pleat_train", "run_id": run.id, "address": "train@cnn_tiny-0",
        "run": run.airflow.returned(run.id, "setup"),
        "locks": {address: stages[address] for address in ("split", "prepare@cnn_tiny-sample")},
    }  # fmt: skip
    more = {"PYTHONPATH": str(root), "PLEAT_STAGE_REMOTE": "store", "PLEAT_LEASES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline_steps.step", str(tmp_path / "result.json")],
        input=json.dumps(order), env=plain() | more, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["done"]["lock"] == stages["train@cnn_tiny-0"], done.stdout + done.stderr
    assert "Stage 'train@cnn_tiny-0' is cached - skipping run" in done.stdout
    assert "Running stage" not in done.stdout
    fold = Path(TRAINED) / "fold_0"
    assert content(root / ".pleat" / "runs" / run.second.name / fold) == content(run.second / fold)


def test_no_log_shows_a_secret(run: Run, services: Services) -> None:
    logs = {path: path.read_text(errors="replace") for path in services.folder.rglob("*.log")}
    assert {"scheduler.log", "red.log", "attempt=2.log"} <= {path.name for path in logs}
    secrets = [*services.password.values(), *services.secret.values()]
    assert [path for path, text in logs.items() for secret in secrets if secret in text] == []


def test_nothing_is_left_running(run: Run, services: Services) -> None:
    assert services.stop() == []
