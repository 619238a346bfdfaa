"""One training on one device at a time, whoever started it: DVC, Airflow or a person.

A lease is an flock on a file named after the device, so the kernel ends it together with the process that holds it,
after SIGKILL too. All who share a device must share the folder of these files (PLEAT_LEASES), also across containers.
"""

import errno
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout

from pipeline_steps.errors import PleatError
from pipeline_steps.progress import say

POLL_S = 0.5
REPORT_EVERY_S = 60.0
HOLDER_BYTES = 200


def slots() -> int:
    """How many devices `lease` hands out: the GPUs that CUDA shows; where there is none, PLEAT_CPU_SLOTS (default 1).

    Raises:
        PleatError: PLEAT_CPU_SLOTS is no whole number from 1 on.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else _cpu_slots()


@contextmanager
def lease(purpose: str) -> Iterator[torch.device]:
    """Takes any free device for the time of the `with` block; where none is free, says who holds them and waits.

    A GPU becomes torch's current device. Where PLEAT_CPU_SLOTS is above 1, the block has an equal share of torch's
    threads; scores may differ in the last digits between different numbers of threads.

    Args:
        purpose: what the device is for, such as `train cnn_small fold 0`; shown to those who wait.

    Yields:
        `cuda:INDEX` or `cpu`.

    Raises:
        PleatError: PLEAT_CPU_SLOTS or PLEAT_LEASES is wrong, or a lock file cannot be used.
    """
    devices = _devices()
    lock, device = _take(purpose, devices)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else _share_of_threads(len(devices)):
            yield device
    finally:
        lock.release()


@contextmanager
def lease_several(purpose: str, n: int) -> Iterator[list[torch.device]]:
    """As `lease`, for `n` GPUs at once; without GPUs the CPU, `n` times.

    Raises:
        PleatError: as `lease`, or there are fewer GPUs.
    """
    if not torch.cuda.is_available():
        with lease(purpose) as device:
            yield [device] * n
        return
    if n > torch.cuda.device_count():
        raise PleatError(
            f"{purpose}: `devices` is {n}, but this machine shows {torch.cuda.device_count()} GPUs; "
            "lower it, or let CUDA_VISIBLE_DEVICES show more."
        )
    with ExitStack() as held:
        # One at a time gathers, so that no two of them wait for a device that the other has.
        with FileLock(_folder() / "several.lock", mode=0o666, fallback_to_soft=False) if n > 1 else nullcontext():
            devices = [held.enter_context(lease(purpose)) for _ in range(n)]
        yield devices


def _devices() -> dict[str, torch.device]:
    """Devices by a name that is the same in every process, whatever CUDA_VISIBLE_DEVICES numbers them."""
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count())
        return {f"GPU-{torch.cuda.get_device_properties(i).uuid}": torch.device("cuda", i) for i in indices}
    return {f"cpu-{slot}": torch.device("cpu") for slot in range(_cpu_slots())}


def _cpu_slots() -> int:
    text = os.environ.get("PLEAT_CPU_SLOTS") or "1"
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise PleatError(
            f"The environment variable PLEAT_CPU_SLOTS is {text!r}; "
            "expected the number of trainings that may share the CPU: a whole number, at least 1."
        )
    return int(text)


def _take(purpose: str, devices: dict[str, torch.device]) -> tuple[BaseFileLock, torch.device]:
    folder = _folder()
    locks = {
        # Everybody may lock the file, whoever made it. filelock's fallback without flock would outlive its holder.
        name: FileLock(folder / f"{name}.lock", mode=0o666, fallback_to_soft=False, on_acquired=partial(_sign, purpose))
        for name in devices
    }
    report_at = time.monotonic()
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            except OSError as error:
                raise PleatError(
                    f"The lock file {lock.lock_file} cannot be used: {error.strerror}. Expected is a plain file, in a "
                    "folder that all who train here may write to; mend that, or name another folder in PLEAT_LEASES."
                ) from error
            return lock, devices[name]
        if time.monotonic() >= report_at:
            report_at += REPORT_EVERY_S
            held = (
                f"{device if device.type == 'cuda' else name} is held by {_holder(locks[name].lock_file)}"
                for name, device in devices.items()
            )
            say(f"{purpose}: waiting for a device; {', '.join(held)}")
        time.sleep(POLL_S)


def _folder() -> Path:
    folder = Path(os.environ.get("PLEAT_LEASES") or Path(tempfile.gettempdir()) / "pleat-leases")
    if not folder.is_absolute():  # it would be another folder in every workspace, and nobody would wait for anybody
        raise PleatError(f"The environment variable PLEAT_LEASES is '{folder}'; expected an absolute path.")
    try:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            folder.chmod(0o1777)  # as /tmp: all users lock the same files, none removes another's
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise PleatError(
            f"The folder of device leases {folder} cannot be used: {error.strerror}. Expected is a folder, not a link; "
            "make it with mode 1777, or name another folder in PLEAT_LEASES."
        ) from error
    return folder


def _sign(purpose: str, descriptor: int) -> None:
    """Writes into the locked file who holds it; for people only, nothing depends on it."""
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:  # it may be another file of this user under this name
        raise OSError(errno.EMLINK, "it is a link or no plain file")
    with suppress(OSError):  # such as a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} ({purpose}) since {datetime.now():%Y-%m-%d %H:%M}".encode(), 0)


def _holder(path: str) -> str:
    """What the holder wrote, as far as it can be shown; anybody may have written anything."""
    line = b""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            line = os.read(descriptor, HOLDER_BYTES)
        finally:
            os.close(descriptor)
    return "".join(filter(str.isprintable, line.decode(errors="replace"))) or "another process"


@contextmanager
def _share_of_threads(n_slots: int) -> Iterator[None]:
    if n_slots == 1:
        yield
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads // n_slots))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
