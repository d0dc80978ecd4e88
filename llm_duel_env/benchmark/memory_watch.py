"""Whether there is memory for one more worker, by what the largest one so far has used. Linux only: elsewhere the
system does not tell, and there is always room."""

from __future__ import annotations

import re
from pathlib import Path


class MemoryWatch:
    """Remembers how much the largest worker has held."""

    def __init__(self) -> None:
        self.largest = 0
        """Bytes."""

    def look(self, pid: int | None) -> None:
        """Reads the peak of a worker that is alive."""
        self.largest = max(self.largest, peak(pid) if pid else 0)

    def short(self, pid: int | None = None) -> str:
        """Why there is no room for a worker as large as the largest so far, or "" where there is.

        Args:
            pid: of the worker that would play, whose memory counts as free; None for a new one.
        """
        free = available()
        if free is None or free + (resident(pid) if pid else 0) >= self.largest:
            return ""
        return f"{free / 1e9:.2f} GB of memory available, a worker has used up to {self.largest / 1e9:.2f} GB"


def available() -> int | None:
    """Bytes that new processes of this machine can have without swapping; None where the system does not tell.

    What a container may use of them is not looked at.
    """
    return _bytes(Path("/proc/meminfo"), "MemAvailable")


def peak(pid: int) -> int:
    """The most bytes that a process has held; 0 where it is gone or the system does not tell."""
    return _bytes(Path(f"/proc/{pid}/status"), "VmHWM") or 0


def resident(pid: int) -> int:
    """Bytes that a process holds; 0 where it is gone or the system does not tell."""
    return _bytes(Path(f"/proc/{pid}/status"), "VmRSS") or 0


def _bytes(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
