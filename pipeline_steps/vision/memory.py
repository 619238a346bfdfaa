"""How glibc hands out memory to trainings on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets this process use again what it freed, in place of handing it back to the kernel and asking anew.

    A network's activations are freed and asked for in every step; by default glibc maps each large one afresh, and the
    kernel clears it page by page (docs/decisions.md has figures). Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries, such as musl
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
