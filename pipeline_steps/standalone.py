"""`pleat airflow`: Airflow and MLflow in the foreground, for one person on their own machine.

Airflow's own `standalone` command starts four components, but neither restarts nor reports one that dies, and ends only
the components themselves. Here each runs below a guard (`pipeline_steps.guard`), so that nothing of it outlives it, and
writes to a file of its own in .pleat/airflow/output.
"""

import fcntl
import importlib.metadata
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import requests

from pipeline_steps.components import BIN, POLL_S, Components
from pipeline_steps.errors import PleatError
from pipeline_steps.progress import say

LOOPBACK = "127.0.0.1"
USER = "admin"
HEALTHY_WITHIN_S = 300
LOCK_TIMEOUT_S = 20  # for which a writer waits for another; SQLite's 5 s are too few on a machine that trains
NO_PROXY = ("NO_PROXY", "no_proxy")
SLOTS = "from pipeline_steps.vision.lease import slots; print(slots())"
# What names a database, certificates or other DAGs belongs to another installation of Airflow.
NOT_INHERITED = ("AIRFLOW__DATABASE__", "AIRFLOW__API__SSL_", "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST")


def run(root: Path, port: int, mlflow_port: int) -> None:
    """Starts MLflow and Airflow for a project and keeps them running until Ctrl-C or SIGTERM; then ends all of it.

    A component that dies is started again with one line on the terminal; after three deaths in ten minutes everything
    ends. Runs, users and the password stay in .pleat/airflow for the next start.

    Args:
        root: the project, with the folder dags/.
        port: of Airflow's UI and API, on the loopback interface.
        mlflow_port: of MLflow, likewise.

    Raises:
        PleatError: Airflow is not installed or already runs for this project, a port is taken, the project has no
            dags/, or a component does not start or keeps dying.
    """
    root = root.resolve()
    home = _home(root)
    _check_installed()
    if not (root / "dags").is_dir():
        raise PleatError(f"{root} has no folder dags/; run `pleat airflow` in the project's folder.")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(home, port):
        _check_ports({"--port": port, "--mlflow-port": mlflow_port})
        if os.environ.get("MLFLOW_TRACKING_URI"):
            say("MLFLOW_TRACKING_URI is set, but runs of this Airflow go to the MLflow that is started here.")
        password = _password(home / "simple_auth_manager_passwords.json.generated")
        execution_port = _free_port()
        every = Components(root, environment(root, port, mlflow_port, execution_port), home / "output")
        try:
            started = time.monotonic()
            _start(every, root, port, mlflow_port, execution_port)
            say(f"Healthy after {time.monotonic() - started:.0f} s.")
            # Where the output goes to a file, the password must not.
            shown = password if sys.stdout.isatty() else f"in {home / 'simple_auth_manager_passwords.json.generated'}"
            say(f"\n  Airflow  http://{LOOPBACK}:{port}  user {USER}, password {shown}")
            say(f"  MLflow   http://{LOOPBACK}:{mlflow_port}")
            say(f"  output   {every.output}\n\nCtrl-C stops all of it; runs and password stay for the next start.")
            while True:
                time.sleep(POLL_S)
                every.restart_dead()
        except KeyboardInterrupt:
            say("Stopping Airflow and MLflow, running tasks included.")
        finally:
            every.stop()
        say("Stopped. Runs that were under way go on after the next start.")


def environment(root: Path, port: int, mlflow_port: int, execution_port: int) -> dict[str, str]:
    """The environment of each component, and of any `airflow` command for the project's own Airflow.

    Variables of the caller that set Airflow's pace or size (AIRFLOW__...) win over the ones here. Those that say where
    Airflow keeps its things, who may log in and where it listens do not: they belong to another installation, whose
    database must not be migrated by accident. AIRFLOW_CONN_... and AIRFLOW_VAR_... are passed on.

    Args:
        root: the project.
        port: of Airflow's UI and API.
        mlflow_port: of MLflow.
        execution_port: of the API that tasks report to.
    """
    home, address = _home(root.resolve()), f"http://{LOOPBACK}:{port}"
    usual = {
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__MAX_MAP_LENGTH": "100000",  # folds times models
        "AIRFLOW__CORE__PARALLELISM": str(min(32, max(2, os.cpu_count() or 1))),
        # An edit of dvc.yaml or params.yaml shows in the form after at most the sum of these two and of a parse.
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "5",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "15",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "15",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__PRINT_STATS_INTERVAL": "0",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",  # folds that wait for one device start without a pause
        "AIRFLOW__API__WORKERS": "1",
        # A task whose supervisor or scheduler is gone is taken up again soon; one whose api-server is started again
        # goes on.
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
        "AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS": "10",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "120",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
        "AIRFLOW__EXECUTION_API__JWT_EXPIRATION_TIME": str(7 * 24 * 3600),  # seconds; a task may train for days
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",  # of Airflow before 3.3
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_ASSISTANT_SANDBOX": "true",  # what MLflow's assistant runs, it runs in a container or not at all
    }
    own = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_CONFIG": str(home / "airflow.cfg"),  # Airflow writes it once, with secrets of its own, for nobody else
        "AIRFLOW__CORE__DAGS_FOLDER": str(root.resolve() / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "pipeline_steps.standalone.hostname",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{LOOPBACK}:{execution_port}/execution/",
        "AIRFLOW__CORE__AUTH_MANAGER": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "simple_auth_manager_passwords.json.generated"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout={LOCK_TIMEOUT_S}",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": str(home / "bundles"),
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(home / "logs" / "dag_processor"),
        "AIRFLOW__LOGGING__REMOTE_LOGGING": "False",
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{mlflow_port}",
        # Tasks call `dvc` and `pleat`.
        "PATH": os.pathsep.join([str(BIN), *filter(None, [os.environ.get("PATH")])]),
        # A proxy would be asked for the loopback interface, too.
        **{name: ",".join(filter(None, [os.environ.get(name), LOOPBACK, "localhost"])) for name in NO_PROXY},
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return usual | inherited | own


def hostname() -> str:
    """This machine's name for Airflow: one that stays, as a task whose machine changes its name is ended."""
    return "localhost"


def _airflow(execution_port: int) -> dict[str, list[str]]:
    """Airflow's components in the order in which they start; the scheduler comes last, once the pool is there.

    The API for people and the one for tasks are two processes: Airflow notes each request of a person in its database
    while it handles nothing else, so a task's request of the same process that is in the middle of writing would never
    end, and SQLite lets only one write. Airflow's servers of task logs would listen on all interfaces; on one machine
    the api-server reads the files themselves.
    """
    return {
        "execution-api": ["api-server", "--apps", "execution", "--port", str(execution_port)],
        "api-server": ["api-server", "--apps", "core"],
        "dag-processor": ["dag-processor"],
        "triggerer": ["triggerer", "--skip-serve-logs"],
        "scheduler": ["scheduler", "--skip-serve-logs"],
    }


def _start(every: Components, root: Path, port: int, mlflow_port: int, execution_port: int) -> None:
    since = datetime.now(UTC)
    with ThreadPoolExecutor() as beside:
        devices = beside.submit(_devices)
        every.start("mlflow", *_mlflow(root, mlflow_port))
        say("Bringing Airflow's database up to date.")
        every.finish("migrate", "airflow", "db", "migrate")
        say("Starting Airflow and MLflow.")
        slots = str(devices.result())
    for name, command in _airflow(execution_port).items():
        if name == "scheduler":
            every.finish("pool", "airflow", "pools", "set", "gpu", slots, "One slot for each device that trains")
        every.start(name, "airflow", *command)
    while waiting := _not_healthy(port, mlflow_port, execution_port, since):
        every.check()
        if datetime.now(UTC).timestamp() - since.timestamp() > HEALTHY_WITHIN_S:
            raise PleatError(
                f"Not healthy after {HEALTHY_WITHIN_S} s: {', '.join(waiting)}; see the files in {every.output}."
            )
        time.sleep(POLL_S)


def _devices() -> int:
    """Devices that train, at least 1; asked in a child process, as it takes torch to count them."""
    done = subprocess.run([sys.executable, "-c", SLOTS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PleatError(done.stderr.strip().rpartition("PleatError: ")[2])
    return max(1, int(done.stdout))


def _mlflow(root: Path, port: int) -> list[str]:
    """MLflow's server over the store and the folder of artifacts that `dvc repro` without a server uses.

    Artifacts of new experiments get a path on this machine, as the store itself gives them, so that both ways stay
    open. Experiments that a server with proxied artifacts made keep them in mlartifacts/.
    """
    stores = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--default-artifact-root", str(root / "mlruns")]
    proxied = ["--artifacts-destination", str(root / "mlartifacts")]
    return ["mlflow", "server", *stores, *proxied, "--host", LOOPBACK, "--port", str(port), "--workers", "1"]


def _not_healthy(port: int, mlflow_port: int, execution_port: int, since: datetime) -> list[str]:
    """Names of what does not answer yet; a heartbeat from before `since` is that of an earlier start."""
    waiting = []
    with requests.Session() as session:
        session.trust_env = False  # no proxy
        for name, address in (
            ("mlflow", f"{mlflow_port}/health"),
            ("execution-api", f"{execution_port}/execution/health"),
        ):
            try:
                session.get(f"http://{LOOPBACK}:{address}", timeout=5).raise_for_status()
            except requests.RequestException:
                waiting.append(name)
        try:
            answer = session.get(f"http://{LOOPBACK}:{port}/api/v2/monitor/health", timeout=5)
            answer.raise_for_status()
            health = answer.json()
        except requests.RequestException:
            return [*waiting, "api-server"]
    if health["metadatabase"]["status"] != "healthy":
        waiting.append("Airflow's database")
    for name in ("scheduler", "dag_processor", "triggerer"):
        beat = health[name][f"latest_{name}_heartbeat"]
        if health[name]["status"] != "healthy" or beat is None or datetime.fromisoformat(beat) < since:
            waiting.append(name.replace("_", "-"))
    return waiting


def _home(root: Path) -> Path:
    return root / ".pleat" / "airflow"


def _check_installed() -> None:
    try:
        importlib.metadata.version("apache-airflow-core")  # importing it would write to ~/airflow
    except importlib.metadata.PackageNotFoundError:
        raise PleatError(
            f"Airflow is not installed in {sys.prefix}; `make setup` installs it, "
            "or `pip install --editable '.[airflow]'` in the project's folder."
        ) from None


@contextmanager
def _only_one(home: Path, port: int) -> Iterator[None]:
    with (home / "running").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise PleatError(
                f"Airflow already runs for this project, at {file.read()}; "
                "use that one, or stop it with Ctrl-C in its terminal."
            ) from None
        file.truncate(0)
        file.write(f"http://{LOOPBACK}:{port} (process {os.getpid()})")
        file.flush()
        yield


def _check_ports(ports: Mapping[str, int]) -> None:
    if len(set(ports.values())) < len(ports):
        raise PleatError(f"{' and '.join(ports)} are the same; Airflow and MLflow need a port each.")
    for option, port in ports.items():
        if not 1 <= port <= 65535:
            raise PleatError(f"{option} {port} is no port; expected a number from 1 to 65535.")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            try:
                listener.bind((LOOPBACK, port))
            except OSError as error:
                raise PleatError(
                    f"Port {port} of {LOOPBACK} cannot be used ({error.strerror}); "
                    f"choose another, such as `pleat airflow {option} {port + 1}`."
                ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _password(path: Path) -> str:
    """The user's password; made at the first start, before Airflow would make one and print it to a log."""
    passwords = {}
    if path.exists():
        path.chmod(0o600)
        try:
            passwords = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise PleatError(f"{path} is no JSON; remove it, and the next start makes a new password.") from None
    if USER not in passwords:
        passwords[USER] = secrets.token_urlsafe(12)
        path.touch(mode=0o600)
        path.write_text(json.dumps(passwords), encoding="utf-8")
    return str(passwords[USER])
