"""A zip from somebody else, read with care: names and sizes within limits, nothing unpacked to disk."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm_duel_env.benchmark.audit import REQUIRED

MANIFEST = "manifest.json"
OPTIONAL = ("samples.jsonl",)
NAME = re.compile(r"runs/([A-Za-z0-9][A-Za-z0-9_.@+=-]{0,99}/seed-[0-9]{1,12})/([a-z]+\.(?:json|jsonl|txt))")
"""Names that an archive may hold, beside the manifest: no absolute path, and none that leads out of its folder."""
MOST_RUNS, LARGEST_MANIFEST, LARGEST_FILE, LARGEST = 2000, 8 << 20, 128 << 20, 2 << 30
"""Limits on an archive: runs, and bytes of the manifest, of a file and of all files once they are unpacked."""
DAMAGES = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, UnicodeDecodeError)
"""What `zipfile` raises where a file is damaged."""


class SubmissionError(ValueError):
    """Runs cannot be submitted, or an archive is not what it says; says what was expected and what came."""


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`.

    Raises:
        SubmissionError: it is no zip, or the block meets a damage in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGES as error:
        raise SubmissionError(f"{path}: no archive of llm-duel submit, or truncated or altered: {error}") from None


def members_of(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files by name; all names and sizes are looked at before anything is unpacked."""
    infos = archive.infolist()
    if len(infos) > 1 + MOST_RUNS * (len(REQUIRED) + len(OPTIONAL)):
        raise SubmissionError(f"{path}: expected at most {MOST_RUNS} runs, got {len(infos)} files")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        match = NAME.fullmatch(info.filename)
        if info.filename != MANIFEST and not (match and match.group(2) in (*REQUIRED, *OPTIONAL)):
            raise SubmissionError(f"{path}: expected files of runs alone, got {info.filename[:200]!r}")
        if info.filename in found:
            raise SubmissionError(f"{path}: expected each file once, got {info.filename} twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise SubmissionError(f"{path}: {info.filename}: expected stored or deflated files, without a password")
        most = LARGEST_MANIFEST if info.filename == MANIFEST else LARGEST_FILE
        if info.file_size > most:
            raise SubmissionError(f"{path}: {info.filename}: expected at most {most} bytes, got {info.file_size}")
        found[info.filename] = info
    if (total := sum(info.file_size for info in infos)) > LARGEST:
        raise SubmissionError(f"{path}: expected at most {LARGEST} bytes in all, got {total}")
    if MANIFEST not in found:
        raise SubmissionError(f"{path}: expected an archive of llm-duel submit, got a zip without {MANIFEST}")
    return found


def content_of(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A file's content: never more than its entry says, whatever it would unpack to; its checksum is looked at."""
    with archive.open(info) as file:
        content = file.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise SubmissionError(f"{path}: {info.filename}: expected {info.file_size} bytes, got {len(content)}")
    return content


def write(out: Path, contents: Mapping[str, bytes]) -> None:
    """Writes a zip of files by name, whole or not at all: the same contents give the same bytes (of the same zlib)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, 0o100644 << 16
            archive.writestr(info, contents[name])
    fresh.replace(out)
