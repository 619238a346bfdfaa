"""What a network is trained on: arrays prepared once, read by row, plain or mirrored, in batches on its device."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
# Of a GPU's free memory. What the network, its optimizer and its activations will take is not known before the first
# step, and the batch size is chosen to fill a GPU; the values that do not fit come over the bus, which costs little.
DEVICE_SHARE = 0.5
AHEAD = 3  # batches that are read and copied while one is trained on
ROWS_A_COPY = 1024


@dataclass(frozen=True)
class Arrays:
    """Rows of one or several arrays of the host, memory maps among them, as if they were one array of n rows.

    Attributes:
        parts: arrays (n_part, ...), the same dtype and shape of a row in all. Whole .npy files that are memory-mapped
            go to another process by their paths.
        part: int64 (n,), which of them holds each row.
        row: int64 (n,), and where in it.
    """

    parts: tuple[np.ndarray, ...]
    part: np.ndarray
    row: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ...)."""
        return len(self.row), *self.parts[0].shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it."""
        return torch.from_numpy(np.empty(0, self.parts[0].dtype)).dtype

    @property
    def nbytes(self) -> int:
        """Size of the n rows."""
        return int(np.prod(self.shape)) * self.parts[0].itemsize

    def __reduce__(self) -> tuple[Any, ...]:
        parts = [Path(one.filename) if isinstance(one, np.memmap) and one.filename else one for one in self.parts]
        return _opened, (parts, self.part, self.row)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows int64 (m,) to a tensor (m, ...) in memory."""
        picked = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        self.read(rows, picked.numpy())
        return picked

    def read(self, rows: Tensor, out: np.ndarray) -> None:
        """Copies rows int64 (m,) into `out` (m, ...). By numpy: torch takes ten times as long for uint8."""
        part, row = self.part[rows.numpy()], self.row[rows.numpy()]
        for number, array in enumerate(self.parts):
            here = np.flatnonzero(part == number)
            if len(here) == len(row):  # straight into `out`, which only "clip" allows
                np.take(array, row, axis=0, out=out, mode="clip")
            elif len(here):
                out[here] = array[row[here]]

    def to(self, device: torch.device) -> Tensor:
        """All rows (n, ...) in the device's memory, read in the order in which they lie on disk."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=device)
        for rows in torch.from_numpy(np.lexsort([self.row, self.part])).split(ROWS_A_COPY):
            if device.type == "cpu":
                whole.numpy()[rows.numpy()] = self[rows].numpy()
            else:
                whole[rows.to(device)] = self[rows].to(device)
        return whole


@dataclass(frozen=True)
class Inputs(ABC):
    """Prepared values of n samples.

    Attributes:
        values: (n, ...), in the memory of the device or of the host.
        device: where batches are wanted; the values are on the host or there.
    """

    values: Tensor | Arrays
    device: torch.device = CPU

    def to(self, device: torch.device) -> Self:
        """The same for training on `device`: its memory holds the values where they fit into a share of what is free.

        Elsewhere they stay on the host, and `batches` copies each batch ahead.
        """
        there = isinstance(self.values, Tensor) and self.values.device == device
        if there or device.type == "cpu" or self.values.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return replace(self, device=device)
        return replace(self, values=self.values.to(device), device=device)

    def batches(self, rows: Tensor, mirrored: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches in order, on the device; the last one may be smaller.

        Args:
            rows: int64 (m,), on the CPU.
            mirrored: bool (m,), on the CPU; which rows are wanted mirrored.
            batch_size: at least 1.
        """
        on_host = isinstance(self.values, Arrays) or self.values.device.type == "cpu"
        if on_host and self.device.type != "cpu":
            values = self.values if isinstance(self.values, Arrays) else _arrays(self.values)
            yield from streamed(values, self.view, rows, mirrored, batch_size, self.device)
        else:
            parts = (part.to(self.device).split(batch_size) for part in (rows, mirrored))
            for part, turned in zip(*parts, strict=True):
                yield self.batch(part, turned)

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """One batch, of rows (batch,) and mirrored (batch,) where the values are."""
        if isinstance(self.values, Tensor) and self.values.device.type == "cpu":
            return self.view(torch.from_numpy(np.take(self.values.numpy(), rows.numpy(), axis=0)), mirrored)
        return self.view(self.values[rows], mirrored)

    @staticmethod
    @abstractmethod
    def view(picked: Tensor, mirrored: Tensor) -> Tensor:
        """Values (batch, ...) and mirrored (batch,) to a new tensor, plain or mirrored row by row."""


@dataclass(frozen=True)
class Features(Inputs):
    """Frozen features, float32 (n, 2, n_features): view 0 plain, view 1 of the mirrored image."""

    values: Tensor

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Rows (batch,) and mirrored (batch,) bool to float32 (batch, n_features)."""
        return self.values[rows, mirrored.long()]

    @staticmethod
    def view(picked: Tensor, mirrored: Tensor) -> Tensor:
        """Both views (batch, 2, n_features) and mirrored (batch,) bool to float32 (batch, n_features)."""
        return torch.where(mirrored[:, None], picked[:, 1], picked[:, 0])


@dataclass(frozen=True)
class Pixels(Inputs):
    """Pixels, uint8 (n, 3, size, size)."""

    @staticmethod
    def view(picked: Tensor, mirrored: Tensor) -> Tensor:
        """Pixels and mirrored (batch,) bool to uint8 (batch, 3, size, size)."""
        return torch.where(mirrored.view(-1, 1, 1, 1), picked.flip(-1), picked)


def streamed(
    values: Arrays,
    view: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    mirrored: Tensor,
    batch_size: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """As `Inputs.batches`, of values on the host: threads read and copy `AHEAD` batches while one is trained on.

    On a GPU nothing here lets the CPU wait for a step: the stream of the copies and the stream of the steps wait for
    each other by events. What a thread raises is raised here; when the iteration ends, so have the threads.
    """
    streams = torch.get_device_module(device)  # those of torch.cpu do nothing
    steps, copies = streams.current_stream(device), streams.Stream(device)
    parts = list(zip(rows.split(batch_size), mirrored.to(device).split(batch_size), strict=True))
    slots = [_Slot(values, len(parts[0][0]), device, copies) for _ in parts[:AHEAD]]
    copies.wait_stream(steps)  # which may still use the memory that the slots were given
    pool = ThreadPoolExecutor(len(slots), thread_name_prefix="inputs")
    try:
        waiting: deque[Future[None]] = deque()
        for slot, (part, _) in zip(slots, parts, strict=False):
            waiting.append(pool.submit(slot.fill, part))
        for number, (part, turned) in enumerate(parts):
            slot = slots[number % len(slots)]
            waiting.popleft().result()
            steps.wait_event(slot.copied)
            batch = view(slot.there[: len(part)], turned)
            slot.used.record(steps)
            if number + len(slots) < len(parts):
                waiting.append(pool.submit(slot.fill, parts[number + len(slots)][0]))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
        steps.wait_stream(copies)  # before others are given the slots' memory


class _Slot:
    """Room for one batch on the host and on the device; `copied` and `used` say when either may be written again."""

    def __init__(self, values: Arrays, batch_size: int, device: torch.device, copies: torch.cuda.Stream) -> None:
        shape, on_gpu = (batch_size, *values.shape[1:]), device.type == "cuda"
        self.values, self.copies = values, copies
        self.host = torch.empty(shape, dtype=values.dtype, pin_memory=on_gpu)
        self.there = torch.empty(shape, dtype=values.dtype, device=device)
        event: Any = partial(torch.cuda.Event, blocking=True) if on_gpu else torch.cpu.Event  # blocking: no busy wait
        self.copied, self.used = event(), event()

    @torch.inference_mode()  # the caller may be in it, and its tensors can then be written in no other mode
    def fill(self, rows: Tensor) -> None:
        """Reads rows int64 (m,) and has them copied; returns before the copy is done."""
        self.copied.synchronize()
        self.values.read(rows, self.host[: len(rows)].numpy())
        with torch.get_device_module(self.there.device).stream(self.copies):
            self.copies.wait_event(self.used)
            self.there[: len(rows)].copy_(self.host[: len(rows)], non_blocking=True)
            self.copied.record(self.copies)


def _opened(parts: list[Path | np.ndarray], part: np.ndarray, row: np.ndarray) -> Arrays:
    return Arrays(tuple(np.load(one, mmap_mode="r") if isinstance(one, Path) else one for one in parts), part, row)


def _arrays(values: Tensor) -> Arrays:
    return Arrays((values.numpy(),), np.zeros(len(values), np.int64), np.arange(len(values)))
