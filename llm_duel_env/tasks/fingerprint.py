"""A short name for what a task is made of, so that results on other weights or other references are told apart."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def digest(*parts: str | Path) -> str:
    """SHA-256 in hex of the parts in order: of a text itself, of a file its bytes, of a folder all files in it.

    A path that does not exist counts as absent, and does not collide with an empty file.
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            whole.update(f"text {len(part.encode())} {part}".encode())
        elif part.is_dir():
            files = sorted(file for file in part.rglob("*") if file.is_file())
            whole.update(f"folder {len(files)}".encode())
            for file in files:
                whole.update(f"{file.relative_to(part).as_posix()} {_of_file(file)}".encode())
        else:
            whole.update(f"file {_of_file(part) if part.exists() else None}".encode())
    return whole.hexdigest()


def once(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """A method that reads an object's files when it is first called, and then remembers what it found."""
    name = f"_{method.__qualname__}"

    @functools.wraps(method)
    def remembered(self: Any) -> str:
        if name not in self.__dict__:
            self.__dict__[name] = method(self)
        return self.__dict__[name]

    return remembered


def _of_file(path: Path) -> str:
    state = path.stat()
    return _read(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _read(path: Path, *_state: int) -> str:
    """SHA-256 of a file's bytes; once per process while size and times stay, as every run of a sweep asks for it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
