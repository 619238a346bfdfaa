"""A fresh clone to run the real commands in, watched from outside: seconds, stages, memory."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from measure import REPOSITORY

SAMPLE_EVERY_S = 0.4
STAGE_LINES = {
    "ran": re.compile(r"Running stage '(.+)':$"),
    "unchanged": re.compile(r"Stage '(.+)' didn't change, skipping$"),
    "from the cache": re.compile(r"Stage '(.+)' is cached - skipping run"),
}


@dataclass
class Watched:
    """A finished command: wall-clock time, lines with the second each came at, peak memory of the process tree."""

    seconds: float = 0.0
    peak_bytes: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Workspace:
    """A folder to run commands in, and their environment."""

    root: Path
    env: dict[str, str]

    def run(self, *command: str) -> Watched:
        """Runs a command in the folder; see `watch`."""
        return watch(command, self.root, self.env)


@contextmanager
def fresh_clone() -> Iterator[Workspace]:
    """Clones the last commit into a temporary folder, which is removed afterwards with all that was written."""
    with tempfile.TemporaryDirectory(prefix="pleat-benchmark-") as folder:
        root = Path(folder) / "pleat"
        if subprocess.run(["git", "clone", "--quiet", REPOSITORY, root], check=False).returncode:
            sys.exit(f"{REPOSITORY} could not be cloned; this benchmark measures a clone of the git repository.")
        changed = subprocess.check_output(["git", "status", "--short"], cwd=REPOSITORY, text=True)
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=root, text=True).strip()
        print(f"In a fresh clone of {commit}{'; changes not committed are left out' if changed else ''}", flush=True)
        yield Workspace(root, users_environment(root, code=root))


def users_environment(root: Path, code: Path = REPOSITORY) -> dict[str, str]:
    """The environment of a user in the folder `root`: this interpreter's commands, DVC and MLflow as they come.

    Args:
        root: the folder to work in; DVC keeps its own records beside it.
        code: the clone whose `pipeline_steps` the commands run, wherever `pleat` was installed from.
    """
    own_settings = ("MLFLOW_", "DVC_", "PYTHON", "PLEAT_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own_settings)}
    return env | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        "PYTHONPATH": str(code),
        "PYTHONUNBUFFERED": "1",  # each line comes when it is written, so that stages can be timed
        "DVC_SITE_CACHE_DIR": str(root.parent / "dvc-site"),
        "DVC_GLOBAL_CONFIG_DIR": str(root.parent / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(root.parent / "dvc-system"),
    }


def watch(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Watched:
    """Runs a command to its end; ends the script with the command's last lines if it fails."""
    watched, done = Watched(), threading.Event()
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:

        def sample() -> None:
            while not done.wait(SAMPLE_EVERY_S):
                watched.peak_bytes = max(watched.peak_bytes, tree_bytes(process.pid, watched.peak_bytes))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            for line in process.stdout or ():
                watched.lines.append((time.monotonic() - started, line.rstrip()))
                if any(pattern.match(line.rstrip()) for pattern in STAGE_LINES.values()):
                    print(f"{watched.lines[-1][0]:7.1f} s  {line.rstrip()}", file=sys.stderr, flush=True)
            process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            done.set()
            sampler.join()
    watched.seconds = time.monotonic() - started
    if process.returncode:
        tail = "\n".join(line for _, line in watched.lines[-30:])
        sys.exit(f"`{' '.join(command)}` failed with status {process.returncode}:\n{tail}")
    return watched


def tree_bytes(pid: int, at_least: int = 0) -> int:
    """Memory of a process and of all below it; 0 once they are gone, or if it cannot be more than `at_least`.

    The sum of their proportional set sizes (a page that n processes share counts 1/n for each), or of their resident
    sets where the system does not tell, as on macOS. The resident sets are never smaller, and quick to read, whereas
    reading the proportional ones holds the processes up.
    """
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    resident = _total(processes, lambda process: process.memory_info().rss)
    if resident <= at_least or sys.platform != "linux":
        return resident if resident > at_least else 0
    return _total(processes, lambda process: process.memory_full_info().pss)


def _total(processes: list[psutil.Process], of: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.Error):  # it may have just ended
            total += of(process)
    return total


def stages(watched: Watched) -> dict[str, tuple[str, float]]:
    """What `dvc repro` did with each stage ("ran", "unchanged" or "from the cache") and the seconds that took.

    A stage lasts until the next one begins, so DVC's own work on its outputs is included.
    """
    seen = [
        (found[1], what, at)
        for at, line in watched.lines
        for what, pattern in STAGE_LINES.items()
        if (found := pattern.match(line))
    ]
    ends = [at for _, _, at in seen[1:]] + [watched.seconds]
    return {name: (what, end - at) for (name, what, at), end in zip(seen, ends, strict=True)}


def ran(watched: Watched) -> list[str]:
    """The names of the stages that ran, in order."""
    return [name for name, (what, _) in stages(watched).items() if what == "ran"]


def print_stages(watched: Watched) -> None:
    """Prints seconds by stage; the items of a matrix are summed up."""
    groups: dict[str, list[float]] = {}
    for name, (what, seconds) in stages(watched).items():
        title = name.split("@")[0] + ("" if what == "ran" else f", {what}")
        groups.setdefault(title, []).append(seconds)
    for title, times in groups.items():
        print(f"  {title:20} {sum(times):6.1f} s{f'   ({len(times)} items)' if len(times) > 1 else ''}")
