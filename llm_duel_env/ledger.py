"""The ledger: every label bought, on disk before anybody uses it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

Record = dict[str, Any]
"""One query: query (its number, from 0), round, prompt_id, prompt (text, or None on finite tasks), first, second
(text or index), label (1, 0 or 0.5) and probability."""

_FIELDS = ("query", "round", "prompt_id", "prompt", "first", "second", "label", "probability")
_COMPARED = ("prompt_id", "first", "second")
_BEGINNING = b'{"header": '
"""How the first line of every ledger begins."""


class LedgerError(RuntimeError):
    """The ledger's file is damaged, or another run holds it."""


class LedgerMismatch(LedgerError):  # noqa: N818 (an exception that says what happened)
    """The ledger belongs to a different run, or this run does not repeat what it did when the ledger was written."""


class Ledger:
    """A JSON-lines file: one line for the header, then one per query, only ever appended to.

    A run that is resumed from an older state, or from the start, meets records that it has not made yet: these it
    replays instead of buying them again. The file is locked while the ledger is open.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ledger.jsonl"
        >>> with Ledger(path, {"seed": 3}) as ledger:
        ...     ledger.append([{"query": 0, "round": 0, "prompt_id": 7, "prompt": "Hi", "first": "Hey", "second": "?",
        ...                     "label": 1.0, "probability": 0.9}])
        ...     len(ledger)
        1
        >>> with Ledger(path) as ledger:
        ...     ledger.header, ledger.record(0)["first"]
        ({'seed': 3}, 'Hey')
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any] | None = None) -> None:
        """Opens or creates a ledger; a last line that a crash has torn is cut off.

        Args:
            path: The file. Its folder is created.
            header: What identifies the run: written to a new ledger, compared with an old one's. A ledger that has a
                header and no records takes the new header. None takes what the file says.

        Raises:
            LedgerError: another run holds the file, a whole line in it is damaged, or it is no ledger. It is left as it
                is.
            LedgerMismatch: the file holds labels bought under another header.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that what a failed write leaves is in the file, to be cut off, and nowhere else.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open for as long as the ledger is)
        try:
            self._lock()
            self.header, self._offsets, end = _scan(self.path)
            if self._file.seek(0, os.SEEK_END) > end:
                self._file.truncate(end)
                os.fsync(self._file.fileno())
            if header is not None:
                self._agree(header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(f"{self.path}: another run has this ledger open; give each run its own") from error

    def _agree(self, header: dict[str, Any]) -> None:
        header = json.loads(json.dumps(header))
        if self.header == header:
            return
        # A name that the file lacks was not written yet by the version that began it.
        if self.header and all(header.get(name) == value for name, value in self.header.items()):
            return
        if self._offsets:
            old = self.header or {}
            names = sorted(name for name in old.keys() | header.keys() if old.get(name) != header.get(name))
            differs = ", ".join(f"{name} was {old.get(name)!r}, now {header.get(name)!r}" for name in names)
            raise LedgerMismatch(
                f"{self.path} holds {len(self)} labels of a different run ({differs}). Resume that run as it was, or "
                "give this one another path."
            )
        self._file.truncate(0)
        self._write([{"header": header}])
        self._sync_folder()
        self.header = header

    def __len__(self) -> int:
        return len(self._offsets)

    def record(self, number: int) -> Record:
        """The record of query `number`, from 0."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: expected a query from 0 to {len(self) - 1}, got {number}")
        with open(self.path, "rb") as file:
            file.seek(self._offsets[number])
            return json.loads(file.readline())

    def replay(self, number: int, expected: Record) -> Record:
        """The record of query `number`, which must be of the prompt and responses of `expected`.

        Raises:
            LedgerMismatch: it is of others.
        """
        record = self.record(number)
        for name in _COMPARED:
            if record[name] != expected[name]:
                raise LedgerMismatch(
                    f"{self.path}: query {number} was about {name} {record[name]!r}, and is now about "
                    f"{expected[name]!r}: the run does not repeat itself, so its labels cannot be replayed"
                )
        return record

    def skipped(self, number: int, asked: Record) -> bool:
        """Whether the record of query `number` is about another duel than `asked`, of its round or a later one."""
        record = self.record(number)
        return record["round"] >= asked["round"] and any(record[name] != asked[name] for name in ("round", *_COMPARED))

    def append(self, records: Sequence[Record]) -> None:
        """Writes the records of a round, numbered on from the last, and returns when they are on the disk.

        Raises:
            ValueError: a record with missing or unknown fields, or out of order. Nothing is written.
        """
        for number, record in enumerate(records, start=len(self)):
            if tuple(sorted(record)) != tuple(sorted(_FIELDS)) or record["query"] != number:
                raise ValueError(f"expected query {number} with fields {_FIELDS}, got {record}")
        if records:
            self._offsets += self._write(records)

    def _write(self, lines: Sequence[dict[str, Any]]) -> list[int]:
        encoded = [json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n" for line in lines]
        offset = start = self._file.seek(0, os.SEEK_END)
        offsets = []
        for line in encoded:
            offsets.append(offset)
            offset += len(line)
        try:
            rest = memoryview(b"".join(encoded))
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:  # a full disk: what was half written must not stay in front of the next round
            self._file.truncate(start)
            raise
        return offsets

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def export_preferences(self, path: str | os.PathLike[str]) -> int:
        """Writes the decided duels as JSON lines with ``prompt``, ``chosen`` and ``rejected``; returns how many.

        Ties are left out. On finite tasks there is no text: ``prompt`` is the prompt's id and ``chosen`` and
        ``rejected`` are the indices of the recorded responses, as strings of digits.

        The file appears whole or not at all.

        Raises:
            ValueError: `path` is the ledger itself.
        """
        path = Path(path).resolve()
        if path.exists() and path.samefile(self.path):
            raise ValueError(f"{path} is the ledger itself: expected another file to export to")
        if path.exists() and not path.is_file():  # a pipe, which nothing can be put in the place of
            with open(path, "w", encoding="utf-8") as out:
                return self._write_preferences(out)
        fresh = path.with_name(path.name + ".new")
        with open(fresh, "w", encoding="utf-8") as out:
            count = self._write_preferences(out)
        os.replace(fresh, path)
        return count

    def _write_preferences(self, out: TextIO) -> int:
        count = 0
        for record in map(self.record, range(len(self))):
            if record["label"] == 0.5:
                continue
            pair = (record["first"], record["second"])
            chosen, rejected = pair if record["label"] == 1 else pair[::-1]
            prompt = record["prompt_id"] if record["prompt"] is None else record["prompt"]
            row = {"prompt": str(prompt), "chosen": str(chosen), "rejected": str(rejected)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        return count

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _scan(path: Path) -> tuple[dict[str, Any] | None, list[int], int]:
    """The header, the offset of each record, and the length of the sound part of the file."""
    with open(path, "rb") as file:
        return scan(path, file)


def scan(path: Path, file: BinaryIO) -> tuple[dict[str, Any] | None, list[int], int]:
    """The header of a ledger that is read from `file`, the offset of each record, and the length of its sound part.

    Raises:
        LedgerError: a damaged line, or no ledger; `path` is what it is called.
    """
    header: dict[str, Any] | None = None
    offsets: list[int] = []
    offset = 0
    for number, line in enumerate(iter(file.readline, b""), start=1):
        if not line.endswith(b"\n"):  # what a crash while appending leaves, unless this was never a ledger
            if number == 1 and not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                raise LedgerError(f"{path}, line 1: expected the header of a ledger, got {line[:80]!r}")
            break
        if (record := _parse(line)) is None:
            raise LedgerError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
        if number == 1:
            if not isinstance(header := record.get("header"), dict):
                raise LedgerError(f"{path}, line 1: expected the header of a ledger, got {line[:80]!r}")
        elif record.get("query") != len(offsets) or any(name not in record for name in _FIELDS):
            raise LedgerError(f"{path}, line {number}: expected the record of query {len(offsets)}, got {line[:80]!r}")
        else:
            offsets.append(offset)
        offset += len(line)
    return header, offsets, offset


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for a damaged one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
