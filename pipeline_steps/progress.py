"""Progress: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LOG_EVERY_S = 5.0


def say(line: str) -> None:
    """Prints one line at once, so that logs of a child process stay in order."""
    print(line, flush=True)


def track(items: Iterable[Item], title: str, total: int, unit: str) -> Iterator[Item]:
    """Yields `items` while it shows how many of `total` are done and how many `unit` a second."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=f"{title} ({unit})")
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= LOG_EVERY_S and done < total:
            shown = now
            say(f"{title}: {done:,} of {total:,} {unit} ({done / (now - started):,.0f}/s)")
