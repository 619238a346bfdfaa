"""The guard, with real processes that die in every order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

GUARD = [sys.executable, "-m", "pipeline_steps.guard"]
WITHIN_S = 10  # what users are promised
# A tree: a child in a session of its own, an orphan of a parent that has gone, and one that ignores SIGTERM.
TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pipeline_steps.guard import end_with_guard
end_with_guard()
sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
start = f"subprocess.Popen({sleeper!r}, start_new_session=True, stdout=subprocess.DEVNULL)"
middle = f"import subprocess; print({start}.pid)"
orphan = subprocess.run([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True).stdout
last = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
last.stdout.readline()
pids = [os.getpid(), subprocess.Popen(sleeper).pid, int(orphan), last.pid]
Path(sys.argv[1] + ".new").write_text(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(300)
"""

ORPHAN = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
        os._exit(0)
    os._exit(0)
os.wait()
print(os.read(read, 20).decode(), flush=True)
time.sleep(300)
"""


def wait_for(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, "the tree did not start"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while alive(pids):
        assert time.monotonic() < deadline, f"still alive: {[psutil.Process(pid).cmdline() for pid in alive(pids)]}"
        time.sleep(0.05)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has started a guard with the tree below it."""
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    command = [*GUARD, "--", sys.executable, str(script), str(tmp_path / "pids")]
    start = f"import subprocess; guard = subprocess.Popen({command!r}); print(guard.pid, flush=True); guard.wait()"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    for pid in wait_for(tmp_path / "pids"):
        if alive([pid]):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_or_killed_guard_takes_its_tree_along(
    parent: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    assert parent.stdout
    guard, pids = int(parent.stdout.readline()), wait_for(tmp_path / "pids")
    assert alive(pids) == pids
    os.kill(guard, number)
    # Nobody can collect orphans in other sessions once the guard itself was killed; its group still ends.
    assert_gone([guard, *(pids if number != signal.SIGKILL else [pids[0], pids[1], pids[3]])])


def test_the_tree_ends_when_the_guards_parent_is_killed(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    assert parent.stdout
    guard, pids = int(parent.stdout.readline()), wait_for(tmp_path / "pids")
    parent.kill()
    assert_gone([guard, *pids])


def test_the_tree_ends_when_the_named_process_is_gone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    command = [*GUARD, "--while", str(other.pid), "--", sys.executable, str(script), str(tmp_path / "pids")]
    guard = subprocess.Popen(command)
    pids = wait_for(tmp_path / "pids")
    other.kill()
    other.wait()
    assert_gone(pids)
    assert guard.wait(WITHIN_S) == 128 + signal.SIGTERM


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    left = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], \
start_new_session=True); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    assert subprocess.run([*GUARD, "--", sys.executable, "-c", left], timeout=30).returncode == 0
    assert_gone([int((tmp_path / "pid").read_text())])


def test_orphans_do_not_stay_as_zombies(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    guard = subprocess.Popen([*GUARD, "--", sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert guard.stdout
    orphan = int(guard.stdout.readline())
    deadline = time.monotonic() + WITHIN_S
    while psutil.pid_exists(orphan):
        assert time.monotonic() < deadline, psutil.Process(orphan).status()
        time.sleep(0.05)
    assert guard.poll() is None  # the command itself goes on
    guard.terminate()
    guard.wait()


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9)])
def test_status_and_output_pass_through(command: str, status: int) -> None:
    done = subprocess.run(
        [*GUARD, "--", "sh", "-c", f"cat; echo error >&2; {command}"],
        input="given\n", capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (status, "given\n", "error\n")
