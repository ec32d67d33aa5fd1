"""The most memory that a piece of work held, from the kernel's own count."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str = "VmRSS") -> int | None:
    """Bytes of this process in memory now, or at most (`VmHWM`); None where there is no /proc."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


@contextmanager
def capped(limit: float) -> Iterator[None]:
    """Inside, no allocation takes this process above `limit` bytes: it raises instead (`out_of_memory`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, as Python and torch say it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


class Peak:
    """`bytes`: how far memory rose above where it stood at the start; None where it cannot be told."""

    bytes: int | None = None


@contextmanager
def peak() -> Iterator[Peak]:
    """Watch the block. The high-water mark is set back first, so that earlier work does not count (Linux)."""
    with suppress(OSError, AttributeError):
        # What was freed before and not given back would be used again, and not be seen to rise (glibc).
        ctypes.CDLL(None).malloc_trim(0)
    found, start = Peak(), resident()
    reset = False
    with suppress(OSError):
        _CLEAR.write_text("5")
        reset = True
    yield found
    most = resident("VmHWM")
    if reset and start is not None and most is not None:
        found.bytes = max(0, most - start)
