"""How long a network takes, in all and layer by layer, and what the machine could do at best."""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pipeline_steps.complexity.operations import N_BYTES

BATCHES = (1, 32)
BUDGET_S = 4.0  # for the runs of one batch size; as often again for its layers
MIN_RUNS, MIN_LAYER_RUNS, MAX_RUNS = 3, 2, 50
PEAK_RUNS = 3


@dataclass(frozen=True)
class Timing:
    """Times of a batch in milliseconds: medians, and quartiles of the whole.

    Attributes:
        device: cpu, or the accelerator's name.
        threads: that torch uses on the CPU; None on an accelerator.
        batch: images at once.
        layers_ms: of each layer's own work, without the modules in it, by name.
    """

    device: str
    threads: int | None
    batch: int
    runs: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    layers_ms: dict[str, float]

    @property
    def place(self) -> str:
        """Where it ran, in words."""
        return self.device if self.threads is None else f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Peak:
    """The best that the device was measured to do in float32: a large matrix product, and a large copy."""

    flops_per_s: float
    bytes_per_s: float


def measure(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> tuple[list[Timing], dict[str, Peak]]:
    """Times torch's eager forward pass in float32 at batch 1 and 32, on the CPU and on an accelerator if there is one.

    Each batch size is warmed up, then runs 3 to 50 times, as often as fits in about 4 seconds; then the same with every
    module timed. TF32 is switched off meanwhile, so that an accelerator computes what the CPU does.

    Returns:
        The timings, and each device's peak.
    """
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    timings, peaks = [], {}
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for device in devices:
            network.to(device)
            before_s = _peak_s(device)
            found = [_of_batch(network, torch.rand(batch, *shape, device=device)) for batch in BATCHES]
            timings += found
            # Before and after, as other work of the machine may have slowed one of them.
            product_s, copy_s = (min(both) for both in zip(before_s, _peak_s(device), strict=True))
            side, n_values = _sizes(device)
            peaks[found[0].place] = Peak(2 * side**3 / product_s, 2 * N_BYTES * n_values / copy_s)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    return timings, peaks


@torch.inference_mode()
def _of_batch(network: nn.Module, images: torch.Tensor) -> Timing:
    first_ms = _once(network, images)
    while first_ms < 1000 and (again_ms := _once(network, images)) < 0.9 * first_ms:  # until it is warm
        first_ms = again_ms
    runs = int(min(max(BUDGET_S * 1000 / first_ms, MIN_RUNS), MAX_RUNS))
    times = [_once(network, images) for _ in range(runs)]
    layers: dict[str, list[float]] = {}
    for _ in range(max(runs // 2, MIN_LAYER_RUNS)):
        with _timed_modules(network, images.device.type == "cuda") as own:
            network(images)
        for name, ms in own().items():
            layers.setdefault(name, []).append(ms)
    quartiles = statistics.quantiles(times, n=4)
    on_cpu = images.device.type == "cpu"
    return Timing(
        "cpu" if on_cpu else torch.cuda.get_device_name(images.device),
        torch.get_num_threads() if on_cpu else None,
        len(images),
        runs,
        statistics.median(times),
        (quartiles[0], quartiles[2]),
        {name: statistics.median(values) for name, values in layers.items()},
    )


def _once(network: nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    network(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


@contextmanager
def _timed_modules(network: nn.Module, on_gpu: bool) -> Any:
    """Yields a function that gives milliseconds of each module's own work, once the run is over."""
    names = {id(module): name for name, module in network.named_modules()}
    stack: list[tuple[str, Any]] = []
    spans: list[tuple[str, str | None, Any, Any]] = []  # module, the one around it, start, end

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(module: nn.Module, _inputs: Any) -> None:
        around = stack[-1][0] if stack else ""  # of a module that was made while the network ran
        stack.append((names.get(id(module), around), now()))

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        name, started = stack.pop()
        spans.append((name, stack[-1][0] if stack else None, started, now()))

    def own() -> dict[str, float]:
        if on_gpu:
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for name, around, started, ended in spans:
            ms = started.elapsed_time(ended) if on_gpu else (ended - started) * 1000
            times[name] = times.get(name, 0.0) + ms
            if around is not None:
                times[around] = times.get(around, 0.0) - ms
        return times

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield own
    finally:
        for hook in hooks:
            hook.remove()


def _sizes(device: torch.device) -> tuple[int, int]:
    """Side of the matrices and number of values of the copy that the peak is measured with."""
    return (8192, 2**28) if device.type == "cuda" else (1536, 2**25)


def _peak_s(device: torch.device) -> tuple[float, float]:
    """Seconds of a matrix product and of a copy, which reads and writes each byte: the best of several runs."""
    side, n_values = _sizes(device)
    left, right = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    source = torch.rand(n_values, device=device)
    target = torch.empty_like(source)
    return _best_s(lambda: torch.mm(left, right), device), _best_s(lambda: target.copy_(source), device)


def _best_s(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(PEAK_RUNS + 1):  # the first one warms up
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
