"""The number of torch's threads, which much of the pipeline sets to one and leaves so when its stage ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads_restored() -> Iterator[None]:
    """Sets the number back at the end: on it depend the last digits of whatever is trained after."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
