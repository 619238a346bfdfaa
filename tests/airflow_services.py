"""PostgreSQL, Redis and the components of Airflow in production shape, without containers.

Each runs below a guard, on loopback ports of its own. Settings are those of docker/airflow.env, start-up is that of the
scripts in docker/, as far as a test's own folders, ports and passwords do not take their place.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import requests
from airflow_rest import Airflow, bundled_logs
from conftest import REPOSITORY
from workspace import environment

LOOPBACK = "127.0.0.1"
DATABASES = ("airflow", "celery", "mlflow")
HEALTHY_WITHIN_S = 240


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres: Debian keeps it off PATH."""
    on_path = shutil.which("initdb")
    found = [Path(on_path)] if on_path else Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.resolve().parent for path in found), default=None)


def need_servers() -> None:
    """Skips where PostgreSQL or Redis is not installed; where CI is set, that is an error."""
    present = {"postgresql": postgres_programs(), "redis-server": shutil.which("redis-server")}
    missing = [name for name, found in present.items() if found is None]
    if missing:
        reason = f"needs {' and '.join(missing)}, which this machine lacks: apt-get install {' '.join(missing)}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


class Services:
    """What a test started, and the settings with which it did."""

    def __init__(self, folder: Path, control: Path) -> None:
        """Starts nothing yet.

        Args:
            folder: for logs, Airflow's homes and Redis.
            control: the checkout whose DAGs the dag-processor reads.
        """
        self.folder, self.control = folder, control
        self.postgres_port, self.redis_port, self.api_port = free_ports(3)
        self.password = {name: secrets.token_urlsafe(16) for name in ("postgres", *DATABASES, "redis", "admin")}
        self.secret = {name: secrets.token_hex(32) for name in ("api", "jwt")}
        # A server that root starts as another user cannot see into pytest's folders.
        self.postgres_folder = Path(tempfile.mkdtemp(prefix="pleat-postgres-"))
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.seen: set[psutil.Process] = set()

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.api_port}"

    def start(self, name: str, *command: str, cwd: Path, more: dict[str, str] | None = None) -> None:
        """Starts a command below a guard; it writes to NAME.log."""
        guard = [sys.executable, "-m", "pipeline_steps.guard", "--", *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                guard, cwd=cwd, env=plain() | (more or {}), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, name: str, met: object, within_s: float = 60) -> None:
        """Polls until `met` is true; the component must not end before."""
        deadline = time.monotonic() + within_s
        while not met():
            assert self.running[name].poll() is None, f"{name} ended\n{bundled_logs(self.folder)}"
            assert time.monotonic() < deadline, f"{name} is not ready after {within_s} s\n{bundled_logs(self.folder)}"
            time.sleep(0.1)

    def tree(self, name: str) -> list[psutil.Process]:
        """A component's guard and everything below it, parents first."""
        guard = psutil.Process(self.running[name].pid)
        return [guard, *guard.children(recursive=True)]

    def start_postgres(self) -> None:
        """A server with the databases and roles that docker/postgres-init.sh makes."""
        folder, programs = self.postgres_folder, postgres_programs()
        assert programs is not None
        as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        (folder / "password").write_text(self.password["postgres"])
        if as_user:
            shutil.chown(folder / "password", "postgres")
        initdb = [
            programs / "initdb", "--pgdata", folder / "data", "--username=postgres", f"--pwfile={folder / 'password'}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions",
        ]  # fmt: skip
        finish([*as_user, *map(str, initdb)], cwd=folder)
        settings = {
            "listen_addresses": LOOPBACK, "port": self.postgres_port, "unix_socket_directories": folder,
            "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.start("postgres", *as_user, str(programs / "postgres"), "-D", str(folder / "data"), *options, cwd=folder)
        ready = [str(programs / "pg_isready"), "--quiet", "--host", str(folder), "--port", str(self.postgres_port)]
        self.wait_for("postgres", lambda: subprocess.run(ready).returncode == 0)
        more = {f"{name.upper()}_DB_PASSWORD": self.password[name] for name in DATABASES}
        more |= {"PGHOST": str(folder), "PGPORT": str(self.postgres_port), "POSTGRES_USER": "postgres"}
        more |= {"PGPASSWORD": self.password["postgres"], "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        finish(["bash", str(REPOSITORY / "docker" / "postgres-init.sh")], cwd=folder, more=more)

    def start_redis(self) -> None:
        folder = self.folder / "redis"
        folder.mkdir(mode=0o700)
        lines = {
            "bind": LOOPBACK, "port": self.redis_port, "requirepass": self.password["redis"], "dir": folder,
            "appendonly": "yes", "maxmemory-policy": "noeviction",
        }  # fmt: skip
        (folder / "redis.conf").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        self.start("redis", "redis-server", str(folder / "redis.conf"), cwd=folder)
        self.wait_for("redis", lambda: _answers(self.redis_port))

    def shared(self, home: str) -> dict[str, str]:
        """What every process of Airflow gets: docker/airflow.env, with this test's own places."""
        celery = f"db+postgresql+psycopg2://{self._login('celery')}"
        return airflow_env() | {
            "AIRFLOW_HOME": str(self.folder / home),
            "AIRFLOW__API__HOST": LOOPBACK,
            "AIRFLOW__API__PORT": str(self.api_port),
            "AIRFLOW__API__SECRET_KEY": self.secret["api"],
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CELERY__BROKER_URL": f"redis://:{self.password['redis']}@{LOOPBACK}:{self.redis_port}/0",
            "AIRFLOW__CELERY__RESULT_BACKEND": celery,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.address}/execution/",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(self.folder / "logs"),  # in place of the bucket
            "AIRFLOW__LOGGING__REMOTE_LOGGING": "False",
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",  # a server on all interfaces
        }

    def central(self) -> dict[str, str]:
        """What Airflow's own processes get, and workers do not: the database and the secrets."""
        return self.shared("central") | {
            "AIRFLOW__API__BASE_URL": self.address,
            "AIRFLOW__API_AUTH__JWT_SECRET": self.secret["jwt"],
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.control / "dags"),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.folder / "central" / "passwords.json"),
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",  # the files stay as they are
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{self._login('airflow')}",
            "PYTHONPATH": str(self.control),
        }

    def start_airflow(self, gpu_slots: int, more: dict[str, str]) -> None:
        """The api-server, scheduler and dag-processor; returns when they have started, not when they are healthy."""
        docker, settings = self.control / "docker", self.central() | more
        init = {"PLEAT_GPU_SLOTS": str(gpu_slots)}
        finish(["sh", str(docker / "airflow-init.sh")], cwd=self.control, more=settings | init)
        admin = {"AIRFLOW_ADMIN_PASSWORD": self.password["admin"]}
        self.start("api-server", "sh", str(docker / "api-server.sh"), cwd=self.control, more=settings | admin)
        for name in ("dag-processor", "scheduler"):
            self.start(name, "airflow", name, cwd=self.control, more=settings)

    def start_worker(self, name: str, root: Path, more: dict[str, str]) -> None:
        """A Celery worker that trains one thing at a time with the code of its own checkout.

        It gets neither the database of Airflow nor the secrets that sign tokens. Its log server would listen on all
        interfaces; here the api-server reads the files.
        """
        settings = self.shared(name) | {
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "1",
            "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
            "PLEAT_LEASES": str(root.parent / f"{root.name}-leases"),
            "PLEAT_RUNS": str(root.parent / f"{root.name}-runs"),
            "PYTHONPATH": str(root),
        }
        command = ["airflow", "celery", "worker", "--celery-hostname", f"{name}@%h", "--skip-serve-logs"]
        self.start(name, *command, cwd=root, more=settings | more)

    def log_in(self, dag: str) -> Airflow:
        """Waits until all of Airflow is healthy and has the DAG; gives back a logged-in user."""
        with requests.Session() as session:
            session.trust_env = False  # no proxy

            def healthy() -> bool:
                for name, process in self.running.items():
                    assert process.poll() is None, f"{name} ended\n{bundled_logs(self.folder)}"
                try:
                    parts = session.get(f"{self.address}/api/v2/monitor/health", timeout=5).json()
                except (requests.RequestException, ValueError):
                    return False
                needed = ("metadatabase", "scheduler", "dag_processor")
                return all(parts[name]["status"] == "healthy" for name in needed)

            self.wait_for("api-server", healthy, HEALTHY_WITHIN_S)
        airflow = Airflow(self.address, "admin", self.password["admin"])
        self.wait_for("dag-processor", lambda: airflow.ask("GET", f"dags/{dag}").ok, HEALTHY_WITHIN_S)
        return airflow

    def stop(self) -> list[psutil.Process]:
        """Ends everything, servers last; gives back what of it still runs."""
        for name in self.running:
            with suppress(psutil.NoSuchProcess):
                self.seen.update(self.tree(name))
        servers = [name for name in ("postgres", "redis") if name in self.running]
        for group in ([name for name in self.running if name not in servers], servers):
            for name in group:
                self.running[name].terminate()
            for name in group:
                self.running[name].wait(30)
        shutil.rmtree(self.postgres_folder, ignore_errors=True)
        return [process for process in self.seen | set(self._everything()) if not gone(process)]

    def kill_rest(self) -> None:
        """For the end of a test that failed: whatever `stop` left."""
        for process in self.stop():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _everything(self) -> list[psutil.Process]:
        """Every process that works in the test's folders, also one that has lost its parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self.folder.parent) and process.pid != os.getpid():
                    found.append(process)
        return found

    def _login(self, database: str) -> str:
        return f"{database}:{self.password[database]}@{LOOPBACK}:{self.postgres_port}/{database}"


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def airflow_env() -> dict[str, str]:
    """The settings of docker/airflow.env."""
    lines = (REPOSITORY / "docker" / "airflow.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def plain() -> dict[str, str]:
    """The environment without anything of Airflow, Pleat, PostgreSQL or a proxy of the person who runs the tests."""
    others = ("AIRFLOW", "PLEAT_", "PG", "POSTGRES", "REDIS")
    kept = {name: value for name, value in environment().items() if not name.startswith(others)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}


def finish(command: list[str], cwd: Path, more: dict[str, str] | None = None) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=plain() | (more or {}), capture_output=True, text=True, errors="replace", timeout=240
    )
    assert done.returncode == 0, f"{command[:3]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return True
    return False
