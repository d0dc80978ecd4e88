"""Prompts and reference responses from JSONL files and hub data sets, in the schemas of the usual preference data."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm_duel_env.extras import require
from llm_duel_env.spaces import is_utf8

Row = Mapping[str, Any]


class PromptRow(NamedTuple):
    """One prompt, and a response to measure win rates against where there is one."""

    prompt: str
    reference: str | None
    responses: tuple[str, ...] = ()
    """Recorded responses: what a method that labels given pairs chooses from."""


class MalformedRow(ValueError):  # noqa: N818
    """A row of a data set lacks what its schema promises; the message names source and row."""


@dataclass(frozen=True)
class Preset:
    """How to read one data set."""

    hub: str
    """Its name on the hub."""
    split: str
    """The split that prompts are taken from."""
    read: Callable[[Row], PromptRow]
    """From a row to its prompt and reference. KeyError, TypeError or ValueError where the row is malformed."""


def columns(
    prompt: str, references: Iterable[str], template: str = "{prompt}", responses: str | Iterable[str] = ()
) -> Callable[[Row], PromptRow]:
    """Reads a prompt's column into a template, the first of the reference columns that the row has, and its recorded
    responses: columns of one each, or the name of a column that may hold a list of them."""
    references = tuple(references)
    several = responses if isinstance(responses, str) else tuple(responses)

    def read(row: Row) -> PromptRow:
        text = template.replace("{prompt}", _text(row, prompt))
        reference = next((_text(row, name) for name in references if row.get(name) is not None), None)
        if isinstance(several, str):
            return PromptRow(text, reference, _texts(row, several))
        return PromptRow(text, reference, tuple(_text(row, name) for name in several))

    return read


def _texts(row: Row, column: str) -> tuple[str, ...]:
    values = row.get(column)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"column {column!r}: expected a list of texts, got {values!r:.80}")
    return tuple(values)


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise KeyError(f"no column {column!r}; it has {sorted(row)}")
    value = row[column]
    if isinstance(value, list):  # a conversation: what was said last
        if not value or not isinstance(value[-1], Mapping) or "content" not in value[-1]:
            raise TypeError(f"column {column!r}: expected a text or a list of messages with content")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise TypeError(f"column {column!r}: expected a text, got {type(value).__name__}")
    return value


def _hh_rlhf(row: Row) -> PromptRow:
    """A transcript: all turns up to the last "Assistant:" are the prompt, what follows is the chosen answer. The other
    answer is recorded where the transcripts differ in their last turn alone."""
    turn = "\n\nAssistant:"
    head, found, answer = _text(row, "chosen").rpartition(turn)
    if not found or "\n\nHuman:" not in head:
        raise ValueError("column 'chosen': expected turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:'")
    other, _, worse = _text(row, "rejected").rpartition(turn) if "rejected" in row else ("", "", "")
    return PromptRow(head + turn, answer.strip(), (answer.strip(), worse.strip()) if other == head else ())


def _shp(row: Row) -> PromptRow:
    """A post and two comments; label 1 says that comment A is preferred."""
    if row.get("labels") not in (0, 1):
        raise ValueError(f"column 'labels': expected 0 or 1, got {row.get('labels')!r}")
    both = _text(row, "human_ref_A"), _text(row, "human_ref_B")
    return PromptRow(_text(row, "history"), both[0 if row["labels"] == 1 else 1], both)


PRESETS = {
    "tldr": Preset("trl-lib/tldr", "train", columns("prompt", ("pythia-1b-reference", "label", "completion"))),
    "ultrafeedback": Preset(
        "HuggingFaceH4/ultrafeedback_binarized",
        "train_prefs",
        columns("prompt", ("chosen",), responses=("chosen", "rejected")),
    ),
    "hh_rlhf": Preset("Anthropic/hh-rlhf", "train", _hh_rlhf),
    "shp2": Preset("stanfordnlp/SHP-2", "train", _shp),
}
"""By name. The reference is the data's preferred response; on TL;DR the supervised policy's where a column holds it."""


def json_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, gzipped or not; blank lines and a byte order mark are skipped.

    Raises:
        MalformedRow: a line that is no JSON object, or a gzipped file that is damaged.
    """
    with (
        gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file
    ):  # decoded line by line, so that the row with the wrong bytes is known
        for number, line in enumerate(_undamaged(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise MalformedRow(f"{path}, row {number}: expected UTF-8, got other bytes: {error}") from None
            except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
                raise MalformedRow(f"{path}, row {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise MalformedRow(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def _undamaged(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file; one that breaks off inside its compression is an error that says where."""
    number = 0
    try:
        for number, line in enumerate(file, 1):  # noqa: B007 (used below, where there is no next line)
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MalformedRow(f"{path}: damaged after row {number}: {error}") from None


def load_rows(source: str, split: str) -> Iterable[Row]:
    """Rows of a JSONL or parquet file, or, where no such file exists, of a data set on the hub (``owner/name``).

    Raises:
        FileNotFoundError: the source looks like a file, and there is none.
        ValueError: a parquet file that cannot be read.
        MissingExtraError: a hub data set, or parquet, without the extra ``hub``.
    """
    path = Path(source).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        datasets = require("datasets", f"the parquet file {source}")
        try:
            return datasets.Dataset.from_parquet(str(path))
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{source}: no parquet file, or a damaged one: {error}") from None
    if path.is_file():
        return json_lines(path)
    if (
        path.suffix in (".jsonl", ".json", ".gz", ".parquet")
        or source.count("/") != 1
        or source.startswith((".", "/", "~"))
    ):
        raise FileNotFoundError(f"{source}: no such file, and a data set on the hub is named owner/name")
    return require("datasets", f"the hub data set {source}").load_dataset(source, split=split)


def read_prompts(
    rows: Iterable[Row], read: Callable[[Row], PromptRow], source: str, limit: int | None = None
) -> list[PromptRow]:
    """Distinct prompts in order, the first row of each; at most `limit`.

    A prompt that occurs again is left out, so that no held-out prompt is trained on.

    Raises:
        MalformedRow: a row without a non-empty prompt; the message says which (the first row is 1).
        ValueError: no rows at all.
    """
    found: dict[str, PromptRow] = {}
    for number, row in enumerate(rows, 1):
        if limit is not None and len(found) >= limit:
            break
        try:
            result = read(row)
            if not result.prompt.strip():
                raise ValueError("expected a prompt that is not empty")
            for text in (result.prompt, result.reference, *result.responses):
                if text is not None and not is_utf8(text):
                    raise ValueError(f"expected text without lone surrogates, got {text[:80]!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedRow(f"{source}, row {number}: {error.args[0]}") from None
        found.setdefault(result.prompt, result)
    if not found:
        raise ValueError(f"{source}: expected at least one row, got none")
    return list(found.values())
