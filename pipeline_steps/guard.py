"""`python -m pipeline_steps.guard [--while PID] -- COMMAND...`: a command whose whole process tree ends with it.

The tree ends when the command ends, when this process gets SIGTERM, SIGINT or SIGHUP, and when the process that
started this one, or PID, is gone, however it went. The command itself can see to the one case that is left, the
guard's own sudden death, with `end_with_guard`.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

import psutil

GUARD = "PLEAT_GUARD"  # the guard's process id, for the commands below it
GRACE_S = 3.0  # between SIGTERM and SIGKILL
POLL_S = 0.05
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Runs the command; exits with its status, or with 128 + the number of the signal that ended it."""
    end = sys.argv.index("--")
    options, command = sys.argv[1:end], sys.argv[end + 1 :]
    parent = os.getppid()
    needed = int(options[1]) if options[:1] == ["--while"] else parent
    stop: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    if sys.platform == "linux":  # orphans of the tree become children of this process, so that none gets away
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    environment = os.environ | {GUARD: str(os.getpid())}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    status = None
    while status is None and not stop and os.getppid() == parent and _alive(needed):
        pid, ended = os.waitpid(-1, os.WNOHANG)  # orphans are collected too
        if pid == child.pid:
            status = os.waitstatus_to_exitcode(ended)
        elif pid == 0:
            time.sleep(POLL_S)
    _end_tree()
    if status is None:
        status = -(stop[0] if stop else signal.SIGTERM)
    sys.exit(status if status >= 0 else 128 - status)


def end_with_guard() -> None:
    """Ends this process's group at once when its guard has died; does nothing where no guard started it."""
    guard = os.environ.get(GUARD)
    if guard is None:
        return

    def watch() -> None:
        while _alive(int(guard)):
            time.sleep(POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="end with guard", daemon=True).start()


def _end_tree() -> None:
    _signal_all(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while _left() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    # A process can start another one between the look and the signal, so look until none is left.
    while _left():
        _signal_all(signal.SIGKILL)
        time.sleep(POLL_S)


def _left() -> list[psutil.Process]:
    """What of the tree still runs; what has ended is collected."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
            elif process.ppid() == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return left


def _signal_all(number: signal.Signals) -> None:
    for process in _left():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main()
