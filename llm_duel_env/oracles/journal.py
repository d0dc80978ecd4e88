"""What an oracle was told at a price, in a file, so that it is never asked again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llm_duel_env.oracles.base import OracleError

Entry = dict[str, Any]


def content_key(*content: Any) -> str:
    """SHA-256, in hex, of some plain data: equal for equal content.

    >>> content_key({"a": 1, "b": "x"}) == content_key({"b": "x", "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Journal:
    """Entries, JSON objects, in memory and, once it is opened, in a file of JSON lines that is only appended to.

    Several processes may share a file: each line is written whole, under a lock, and is on the disk before `append`
    returns. A last line that a crash has torn is cut off.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        """All that is known, in order."""
        self.path: Path | None = None

    def open(self, path: str | os.PathLike[str]) -> None:
        """Reads what a file holds already, and appends to it from now on.

        Entries of before, in memory alone, are kept and written too; those of another file are let go.

        Raises:
            OracleError: a whole line of the file is damaged.
        """
        path = Path(path).expanduser()
        unwritten = self.entries if self.path is None else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                file.truncate(whole)
        self.entries = [_entry(path, number, line) for number, line in enumerate(text[:whole].split(b"\n")[:-1], 1)]
        self.path = path
        for entry in unwritten:
            self.append(entry)

    def append(self, entry: Entry) -> None:
        """Adds an entry; where there is a file it is on the disk when this returns.

        Raises:
            OSError: it could not be written, e.g. because the disk is full; it is then not known either.
        """
        line = json.dumps(entry, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        if self.path is not None:
            with open(self.path, "ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                begin = file.seek(0, os.SEEK_END)
                try:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(begin)
                    raise
        self.entries.append(entry)


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise OracleError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
    return entry
