"""The device lease, with real processes: who gets in, who waits, what a dead holder leaves."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_train
import timm
import torch
from conftest import PLEAT, content, draw, encode, load_params, names, pleat, write_batch, write_params
from safetensors.torch import save_file

from pipeline_steps import ingest, prepare
from pipeline_steps.errors import PleatError
from pipeline_steps.vision.lease import lease, slots

# Takes the lease in turns, as fast as it can; prints when it got in and out.
TURNS = """
import sys, time
from pipeline_steps.vision import lease
lease.POLL_S = 0.005
print("ready", flush=True)
sys.stdin.readline()
for turn in range(8):
    with lease.lease(f"turn {turn}"):
        entered = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        time.sleep(0.02)
        print("held", entered, time.clock_gettime_ns(time.CLOCK_MONOTONIC), flush=True)
"""
# Holds the lease for ever, while an exec'd and a forked child of it live on.
HOLDER = """
import os, subprocess, sys, time
from pipeline_steps.vision.lease import lease
with lease("first"):
    execed = subprocess.Popen(["sleep", "60"], close_fds=False)
    forked = os.fork()
    if forked:
        print(execed.pid, forked, flush=True)
    time.sleep(60)
"""
WAITER = """
import torch
from pipeline_steps.vision.lease import lease
torch.set_num_threads(5)
with lease("second") as device:
    print("in", device, torch.get_num_threads(), flush=True)
print("out", torch.get_num_threads(), flush=True)
"""


@pytest.fixture(autouse=True)
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of leases of its own, on a machine without a GPU."""
    folder = tmp_path / "leases"
    monkeypatch.setenv("PLEAT_LEASES", str(folder))
    monkeypatch.delenv("PLEAT_CPU_SLOTS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for this one, which may have asked CUDA before
    return folder


@contextmanager
def held(path: Path, text: bytes = b"") -> Iterator[None]:
    """The kernel's own lock on a file, as any other program would take it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def started(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process with pipes; killed at the end, and after a minute, so that no test hangs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def python(code: str, **variables: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return started(sys.executable, "-c", code, env=os.environ | variables)


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """The next line of output that holds `text`."""
    for line in process.stdout:
        if text in line:
            return line.rstrip("\n")
    raise AssertionError(f"ended without '{text}': {process.stderr.read()}")


def flock_is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize(("n_slots", "n_processes"), [(1, 2), (2, 3)])
def test_no_more_processes_than_slots_are_in_at_a_time(n_slots: int, n_processes: int) -> None:
    with ExitStack() as stack:
        start = [python(TURNS, PLEAT_CPU_SLOTS=str(n_slots)) for _ in range(n_processes)]
        processes = [stack.enter_context(process) for process in start]
        for process in processes:
            line_with(process, "ready")
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        turns = [line.split()[1:] for process in processes for line in process.stdout if line.startswith("held")]
    assert len(turns) == 8 * n_processes
    events = [(int(entered), 1) for entered, _ in turns] + [(int(left), -1) for _, left in turns]
    assert max(np.cumsum([step for _, step in sorted(events)])) == n_slots


def test_a_killed_holder_is_named_and_then_replaced_although_its_children_live() -> None:
    with python(HOLDER) as holder:
        children = [int(pid) for pid in line_with(holder, "").split()]
        try:
            with python(WAITER) as waiter:
                line = line_with(waiter, "waiting")
                named = rf"second: waiting for a device; cpu-0 is held by process {holder.pid} \(first\) since (.*)"
                found = re.fullmatch(named, line)
                assert found, line
                assert abs(datetime.now() - datetime.fromisoformat(found[1])) < timedelta(minutes=3)
                holder.kill()
                assert line_with(waiter, "in ").startswith("in cpu")
                for child in children:
                    os.kill(child, 0)  # still there
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_what_stands_in_the_lock_files_does_no_harm(leases: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(held(leases / "cpu-0.lock"))
        with held(leases / "cpu-1.lock", b"\xff\0\x1b[2J\nlong" + b"g" * 10_000):
            waiter = stack.enter_context(python(WAITER, PLEAT_CPU_SLOTS="2"))
            line = line_with(waiter, "waiting")
            assert re.fullmatch(r".*cpu-0 is held by another process, cpu-1 is held by .\[2Jlongg{189}", line), line
        # Half of five threads inside, all of them again outside.
        assert waiter.stdout.read().splitlines() == ["in cpu 2", "out 5"]
    assert re.fullmatch(rf"process {waiter.pid} \(second\) since [-0-9: ]{{16}}", (leases / "cpu-1.lock").read_text())


def test_one_slot_leaves_the_threads_alone() -> None:
    with python(WAITER) as waiter:
        assert waiter.stdout.read().splitlines() == ["in cpu 5", "out 5"]


def test_a_failing_block_gives_the_device_back(leases: Path) -> None:
    def fail() -> None:
        assert not flock_is_free(leases / "cpu-0.lock")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lease("fails"):
        fail()
    assert flock_is_free(leases / "cpu-0.lock")


@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard"])
def test_a_linked_lock_file_is_refused(tmp_path: Path, leases: Path, link: str) -> None:
    other, path = tmp_path / "precious", leases / "cpu-0.lock"
    leases.mkdir()
    if link != "dangling":
        other.write_text("precious")
        other.chmod(0o600)
    if link == "hard":
        path.hardlink_to(other)
    else:
        path.symlink_to(other)
    with pytest.raises(PleatError, match=rf"^The lock file {path} cannot be used: .* PLEAT_LEASES\.$"), lease("x"):
        pass
    if link == "dangling":
        assert not other.exists()
    else:
        assert other.read_text() == "precious"
        assert other.stat().st_mode & 0o777 == 0o600
        assert flock_is_free(other)


@pytest.mark.parametrize("kind", ["link", "file", "read_only"])
def test_a_folder_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, leases: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str
) -> None:
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        leases.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        leases.write_text("")
    else:
        monkeypatch.setenv("PLEAT_LEASES", str(request.getfixturevalue("read_only") / "leases"))
    with pytest.raises(PleatError, match=r"^The folder of device leases .* cannot be used: .*PLEAT_LEASES\.$"):
        lease("x").__enter__()
    assert not (tmp_path / "elsewhere").exists() or names(tmp_path / "elsewhere") == []


def test_a_relative_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLEAT_LEASES", "leases")
    with pytest.raises(PleatError, match=r"^The environment variable PLEAT_LEASES is 'leases'; .*absolute path\.$"):
        lease("x").__enter__()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as two users")
def test_several_users_share_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second user can lock what the first one made, cannot remove it, and is kept out while it is held."""
    folder = Path(tempfile.mkdtemp(dir="/tmp")) / "leases"  # pytest's folders are closed to other users
    folder.parent.chmod(0o755)
    monkeypatch.setenv("PLEAT_LEASES", str(folder))
    file = folder / "cpu-0.lock"

    def lock_and_try_to_remove() -> bool:
        with lease("nobody's"):
            pass
        try:
            file.unlink()
        except PermissionError:
            return True
        return False

    before = os.umask(0o077)
    try:
        with lease("root's"):
            assert as_nobody(lambda: flock_is_free(file)) is False
        assert folder.stat().st_mode & 0o7777 == 0o1777
        assert as_nobody(lock_and_try_to_remove) is True
        assert "(nobody's)" in file.read_text()
    finally:
        os.umask(before)
        shutil.rmtree(folder.parent)


def as_nobody(act: Callable[[], bool]) -> bool | None:
    """What `act` gives in a child process of the user nobody; None where it raises."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            status = int(act())
        finally:
            os._exit(status)
    return {0: False, 1: True}.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.parametrize(("text", "expected"), [("", 1), ("1", 1), ("12", 12)])
def test_cpu_slots(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv("PLEAT_CPU_SLOTS", text)
    assert slots() == expected


@pytest.mark.parametrize("text", ["0", "-1", "2.0", "two", "1e3", " ", "²"])
def test_cpu_slots_that_are_no_count_are_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PLEAT_CPU_SLOTS", text)
    message = f"The environment variable PLEAT_CPU_SLOTS is {text!r}; "
    for ask in (slots, lease("x").__enter__):
        with pytest.raises(PleatError, match=f"^{re.escape(message)}.*whole number, at least 1\\.$"):
            ask()


def test_gpus_are_known_by_their_uuid(leases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is played here, since most machines of the tests have none: two GPUs, and their numbers swapped."""
    uuids, current = ["aaa", "bbb"], []

    @contextmanager
    def make_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    monkeypatch.setattr(torch.cuda, "device", make_current)
    assert slots() == 2
    with lease("one") as one:
        assert current == [one] == [torch.device("cuda", 0)]
        assert not flock_is_free(leases / "GPU-aaa.lock")
        uuids.reverse()  # as another process sees them with CUDA_VISIBLE_DEVICES=1,0
        with lease("two") as two:
            assert current == [one, two] == [torch.device("cuda", 0)] * 2
            assert not flock_is_free(leases / "GPU-bbb.lock")
    assert names(leases) == ["GPU-aaa.lock", "GPU-bbb.lock"]


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    """A workspace in which `pleat train frozen 0` takes a moment."""
    root = tmp_path / "workspace"
    rows = test_train.samples()
    test_train.write_inputs(root, rows, test_train.separable(rows))
    write_params(root, test_train.OVERRIDES)
    return root


def test_a_fold_that_waited_is_the_same_to_the_bit(fold: Path, leases: Path) -> None:
    assert pleat(fold, "train", "frozen", "0").returncode == 0
    folder = fold / "data/train/frozen"
    undisturbed = content(folder / "fold_0")
    shutil.rmtree(folder)
    with ExitStack() as stack:
        with held(leases / "cpu-0.lock"):
            process = stack.enter_context(started(*PLEAT, "train", "frozen", "0", cwd=fold))
            line = line_with(process, "waiting")
            assert line == "train frozen fold 0: waiting for a device; cpu-0 is held by another process"
            assert not folder.exists()
        process.stdout.read()
        assert process.wait() == 0, process.stderr.read()
    assert content(folder / "fold_0") == undisturbed
    assert "(train frozen fold 0)" in (leases / "cpu-0.lock").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_waiting_ends_at_once(fold: Path, leases: Path, number: signal.Signals) -> None:
    with held(leases / "cpu-0.lock"), started(*PLEAT, "train", "frozen", "0", cwd=fold) as process:
        line_with(process, "waiting")
        process.send_signal(number)
        assert process.wait() == 130
        sentence = "pleat: interrupted; nothing half-written was kept. Run the same command to go on.\n"
        assert process.stderr.read() == sentence
    assert not (fold / "data/train").exists()


def test_features_need_a_device_and_pixels_do_not(root: Path, leases: Path) -> None:
    weights = root / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    frozen = {"kind": "frozen", "backbone": "test_efficientnet", "weights": str(weights)}
    overrides = {"experiment.batches": ["batch"], "models.cnn_small": frozen}
    write_params(root, overrides)
    write_batch(root, "batch", {"a": "Hat", "b": "Hat"}, {f"{name}.jpg": encode(draw(ord(name))) for name in "ab"})
    ingest.run(load_params(overrides), "batch", root)
    with ExitStack() as stack:
        with held(leases / "cpu-0.lock"):
            prepare.run(load_params(overrides), "cnn_tiny", "batch", root)
            process = stack.enter_context(started(*PLEAT, "prepare", "cnn_small", "batch", cwd=root))
            assert line_with(process, "waiting").startswith("prepare cnn_small on batch: waiting for a device; cpu-0")
        process.stdout.read()
        assert process.wait() == 0, process.stderr.read()
    assert "(prepare cnn_small on batch)" in (leases / "cpu-0.lock").read_text()
    assert np.load(root / "data/prepare/cnn_small/batch/inputs.npy").shape[:2] == (2, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what torch uses on Linux")
@pytest.mark.parametrize(("set_to", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_threads_spin_shortly(fold: Path, set_to: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    with started(
        *PLEAT, "train", "frozen", "99", cwd=fold, env=environment | {"OMP_DISPLAY_ENV": "verbose"} | set_to
    ) as process:
        assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", process.stderr.read())) == {expected}
