"""What every benchmark needs: the machine it ran on, the real data, alternating rounds, targets."""

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
BUSY_SHARE = 0.1  # of all cores, used by others: above it the figures are not to be trusted
Rounds = Mapping[str, list[float]]


def data_folder() -> Path:
    """The folder of real inputs, PLEAT_TEST_DATA; ends the script with a sentence where it is absent."""
    folder = (REPOSITORY / os.environ.get("PLEAT_TEST_DATA", "../shared")).resolve()
    for needed in ("data/clothing/images.csv", "weights/mobilenetv2_100.safetensors"):
        if not (folder / needed).is_file():
            sys.exit(
                f"{folder} holds no {needed}, so there is nothing to measure with; "
                "name the folder of real inputs with PLEAT_TEST_DATA."
            )
    return folder


@contextmanager
def on_this_machine(title: str) -> Iterator[None]:
    """Prints the machine before the measurement, and after it whether anything else used its processors."""
    cores = os.cpu_count() or 1
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "dvc"))
    print(f"{title}\n{cores} cores, {_cpu_model()}, {psutil.virtual_memory().total / 2**30:.0f} GiB memory")
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"load average before: {os.getloadavg()[0]:.2f}", flush=True)
    before = psutil.cpu_percent(interval=1.0) / 100
    started, busy, own = time.monotonic(), _busy_s(), _own_s()
    yield
    seconds = time.monotonic() - started
    others = max(0.0, (_busy_s() - busy) - (_own_s() - own)) / seconds
    print(f"\nload average after: {os.getloadavg()[0]:.2f}; others used {others:.2f} of {cores} cores meanwhile")
    if warning := busy_warning(before, others / cores):
        print(warning)


def busy_warning(before: float, meanwhile: float) -> str:
    """A warning if others used much of the machine (shares of all cores), otherwise nothing."""
    if max(before, meanwhile) <= BUSY_SHARE:
        return ""
    return (
        f"WARNING: this machine was busy: others used {before:.0%} of it before the measurement and {meanwhile:.0%} "
        "during it. Run this again on a quiet machine before quoting a figure."
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or "unknown processor"


def _busy_s() -> float:
    """Processor seconds that all processes have used, time stolen by other virtual machines included."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(kind, 0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")))


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def alternate(rates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each function once a round, A B A B ..., so that noise hits all of them; gives each one's results."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        for name, rate in rates.items():
            found[name].append(rate())
    return found


def print_rates(found: Rounds, unit: str, compared_with: str) -> None:
    """Prints each one's median, its range over the rounds, and the ratio of its median to that of `compared_with`."""
    width = max(map(len, found))
    for name, rates in found.items():
        print(
            f"  {name:{width}}  {statistics.median(rates):8,.1f} {unit}  x {ratio(found, name, compared_with):5.2f}"
            f"   (rounds {min(rates):,.0f} to {max(rates):,.0f})"
        )


def ratio(found: Rounds, name: str, to: str) -> float:
    """The median of `name` divided by the median of `to`."""
    return statistics.median(found[name]) / statistics.median(found[to])


def verdict(what: str, value: float, comparison: str, target: float, unit: str = "") -> str:
    """One line that says whether a target holds; `comparison` is "<=" or ">="."""
    holds = value <= target if comparison == "<=" else value >= target
    return f"  {'holds' if holds else 'FAILS'}  {what}: {value:,.4g}{unit} (target {comparison} {target:,g}{unit})"
