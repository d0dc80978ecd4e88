"""The folder of one run: what lies in it, and how it is written so that a kill at any moment loses nothing.

config.json    everything needed to run it again        metrics.jsonl   one line per round and per evaluation
command.txt    the commands of its sittings, in order   tensorboard/    the same scalars
versions.json  what it ran on                           checkpoint/     the latest state, replaced whole
ledger.jsonl   every label bought (the environment's)   result.json     the outcome, once the run is over
samples.jsonl  a few duels of each evaluation mark, for people to read
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.machine import versions


class RunFolder:
    """Paths of a run's files, and the few operations on them that must be done with care."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.ledger = self.path / "ledger.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.result = self.path / "result.json"
        self.checkpoint = self.path / "checkpoint"
        self._spare = self.path / "checkpoint.old"

    def create(self, config: dict[str, Any], fingerprint: str) -> None:
        """Makes the folder, and writes the configuration, the versions and the task's fingerprint."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "versions.json", versions() | {"fingerprint": fingerprint})
        write_json(self.config, config)  # last: where it stands, the run has begun

    def add_command(self, command: str) -> None:
        """Notes the command of one more sitting of the run."""
        with (self.path / "command.txt").open("a") as file:
            file.write(command + "\n")

    def check_fingerprint(self, now: str) -> None:
        """Checks that the run was, or is being, played on what the task is made of now.

        Raises:
            ValueError: its weights or stored responses have changed since.
        """
        path = self.result if self.result.exists() else self.path / "versions.json"
        was = read_object(path).get("fingerprint") if path.exists() else None
        if was not in (None, now):  # None: begun by a version that wrote none
            told = f"fingerprint {str(was)[:12]}, now {now[:12]}"
            raise ValueError(f"{self.path}: the task's model weights or stored responses have changed since ({told})")

    @property
    def begun(self) -> bool:
        """True once a run was started here."""
        return self.config.exists()

    def saved(self) -> Path | None:
        """The latest complete checkpoint, or None."""
        # A kill between the two renames of `save` leaves only the previous one.
        return next((path for path in (self.checkpoint, self._spare) if path.exists()), None)

    def save(self, write: Callable[[Path], None]) -> None:
        """Replaces the checkpoint by what `write` puts into a folder; the last one is kept until the new is whole."""
        fresh = self.path / "checkpoint.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        write(fresh)
        _sync_tree(fresh)
        if self.checkpoint.exists():
            shutil.rmtree(self._spare, ignore_errors=True)
            self.checkpoint.rename(self._spare)
        fresh.rename(self.checkpoint)
        _sync(self.path)
        shutil.rmtree(self._spare, ignore_errors=True)


class MetricsFile:
    """Appends one JSON object per line; `bytes` says how much was written, so that a resumed run can cut the rest."""

    def __init__(self, path: Path, *, keep: int) -> None:
        self._file = path.open("ab")
        self._file.truncate(keep)
        self._file.seek(keep)

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line and hands it to the system, so that whoever watches the file sees it."""
        self._file.write(json.dumps(finite(record)).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a metrics file, in order."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def last_queries(path: Path) -> int:
    """Queries in the last complete line of a metrics file; 0 where there is none. Reads the end of the file only."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16_384))
        lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["queries"])
    return 0


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, which JSON can say."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: Any, digits: int = 5) -> Any:
    """The same structure with floats at `digits` significant digits.

    >>> rounded({"a": [0.123456789, 3]})
    {'a': [0.12346, 3]}
    """
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(json.dumps(finite(value), indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: the file holds no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file holds something else; the message names it.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(found)[:80]!r}")
    return found


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex; that of nothing where the file is missing."""
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
