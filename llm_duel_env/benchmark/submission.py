"""Finished runs as one archive that can be handed on and checked: what `llm-duel submit` writes.

A zip of ``manifest.json`` and, for every run, ``runs/LABEL/seed-N/`` with its result, configuration, commands,
versions, ledger and metrics, and no checkpoint. The manifest tells the size and SHA-256 of every file and what the runs
are. An archive is read whole (`llm_duel_env.benchmark.archive`) before a figure of it is used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.archive import (
    LARGEST_FILE,
    MANIFEST,
    MOST_RUNS,
    OPTIONAL,
    SubmissionError,
    content_of,
    members_of,
    opened,
    write,
)
from llm_duel_env.benchmark.audit import REQUIRED, audit, parse
from llm_duel_env.benchmark.machine import versions
from llm_duel_env.benchmark.result_fields import is_count
from llm_duel_env.benchmark.results import Result, find_results

FORMAT = 1
ALIKE = ("budget", "batch", "eval_every", "eval_prompts", "feedback")
"""What all runs on one environment must have in common; those of one seed also what its task is made of."""


@dataclass(frozen=True)
class Submission:
    """An archive that was checked whole."""

    path: Path
    by: str
    description: str
    results: list[Result] = field(default_factory=list)
    """One per run; ``folder`` says where in the archive it is, ``archive`` and ``member`` the same in parts."""


def pack(
    folders: Iterable[str | Path], out: Path, *, by: str, description: str, seeds: Sequence[int] = ()
) -> dict[str, Any]:
    """Writes the finished runs below `folders` as an archive and returns its manifest.

    The same runs give the same bytes (where zlib is the same): names are sorted, and times are left out.

    Args:
        folders: folders of runs, or with runs below them.
        out: the archive; it appears whole or not at all.
        by: who made the runs.
        description: what they are, in a line or two.
        seeds: which seeds every agent must have; none takes 0 to the highest that any has.

    Raises:
        SubmissionError: nothing to submit, an unfinished run, or runs that do not belong together. Nothing is written.
        AuditError: the files of a run do not fit together. Nothing is written.
    """
    if out.suffix != ".zip":
        raise SubmissionError(f"--out: expected a name that ends in .zip, got {out}")
    given = [Path(folder) for folder in folders]
    if wrong := [str(path) for path in given if not path.is_dir()]:
        raise SubmissionError(f"submit: expected folders of runs, got {', '.join(wrong)}")
    results, unfinished = find_results(given)
    if unfinished:
        raise SubmissionError(
            f"submit: expected finished runs, got {len(unfinished)} that are not, e.g. {unfinished[0]}: finish it with "
            f"llm-duel run --resume {unfinished[0]}, or name the runs to submit"
        )
    runs: dict[str, dict[str, bytes]] = {}
    checked: dict[str, Result] = {}
    for folder in sorted({str(result["folder"]) for result in results}):
        files = {name: (Path(folder) / name).read_bytes() for name in (*REQUIRED, *OPTIONAL) if _there(folder, name)}
        result = audit(folder, files)
        name = _name(result)
        if name in runs:
            raise SubmissionError(f"submit: {result['label']}, seed {result['seed']} is there twice, e.g. {folder}")
        runs[name], checked[name] = files, result
    if len(runs) > MOST_RUNS:
        raise SubmissionError(f"submit: expected at most {MOST_RUNS} runs in one archive, got {len(runs)}")
    check_together(checked.values(), seeds)
    sizes = {name: {file: _facts(content) for file, content in files.items()} for name, files in runs.items()}
    made = manifest(checked, sizes, by=by, description=description, seeds=seeds, packed_with=_packed_with())
    contents = {f"runs/{name}/{file}": content for name, files in runs.items() for file, content in files.items()}
    write(out, {MANIFEST: json.dumps(made, indent=1).encode() + b"\n", **contents})
    return made


def manifest(
    results: Mapping[str, Result], files: Mapping[str, Mapping[str, Any]], *, by: str, description: str,
    seeds: Sequence[int], packed_with: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What an archive says of itself: who made it, what entries it has, and every run with its files.

    Args:
        results: by the run's name in the archive.
        files: of each run, by name, the size and hash of every file.
        by: who made the runs.
        description: what they are.
        seeds: those that were asked for; none says 0 to the highest.
        packed_with: version, commit and source of the package that packs.

    Raises:
        SubmissionError: `by` or `description` is empty, too long, or not printable.
    """
    for name, value, most in (("by", by, 200), ("description", description, 2000)):
        if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
            raise SubmissionError(f"--{name}: expected 1 to {most} printable characters, got {str(value)[:80]!r}")
    told = ("label", "agent", "env", "env_kwargs", "budget", "batch", "eval_prompts", "feedback")
    held = ("env_spec", "agent_config", "agent_source")
    entries: dict[str, dict[str, Any]] = {}
    for _, result in sorted(results.items()):
        entry = entries.setdefault(_entry(result), {name: result.get(name) for name in told + held} | {"seeds": []})
        entry["seeds"] = sorted([*entry["seeds"], result["seed"]])
    return {
        "format": FORMAT,
        "by": by,
        "description": description,
        "packed_with": dict(packed_with),
        "seeds": sorted(seeds),
        "entries": [entries[key] for key in sorted(entries)],
        "runs": {
            name: {
                **{about: results[name][about] for about in ("agent", "label", "seed", "budget", "queries", "status")},
                "ledger_sha256": results[name]["ledger_sha256"],
                "commit": (results[name].get("versions") or {}).get("commit"),
                "files": {file: dict(files[name][file]) for file in sorted(files[name])},
            }
            for name in sorted(results)
        },
    }


def check_together(results: Iterable[Result], seeds: Sequence[int] = ()) -> None:
    """Checks that runs belong into one submission: on each environment one budget, and the same seeds for every agent.

    Raises:
        SubmissionError: says which run differs in what.
    """
    worlds: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        worlds[json.dumps([result["env"], result["env_kwargs"]], sort_keys=True)].append(result)
    for world in worlds.values():
        first = world[0]
        for result in world:
            _check_alike(result, first, ALIKE)
            _check_alike(result, next(one for one in world if one["seed"] == result["seed"]), ("fingerprint",))
        wanted = set(seeds) or set(range(1 + max(result["seed"] for result in world)))
        by_entry: dict[str, list[Result]] = defaultdict(list)
        for result in world:
            by_entry[_entry(result)].append(result)
        for entry in by_entry.values():
            got = {result["seed"] for result in entry}
            if got != wanted:
                told = (
                    f"seeds {_listed(wanted - got)} are missing"
                    if wanted - got
                    else f"{_listed(got - wanted)} are more"
                )
                raise SubmissionError(
                    f"{entry[0]['label']} on {first['env']}: expected the seeds {_listed(wanted)}, got {_listed(got)}: "
                    f"{told}. All agents must have the same, from 0 on, or those that --seeds names"
                )


def _check_alike(result: Result, other: Result, names: Iterable[str]) -> None:
    for name in names:
        if result[name] != other[name]:
            run = f"{result['label']}, seed {result['seed']} on {result['env']}"
            wanted = f"expected {other[name]!r} as {other['label']}, seed {other['seed']} has it"
            raise SubmissionError(f"{run}: {name}: {wanted}, got {result[name]!r}; submit them apart")


def read(path: str | Path) -> Submission:
    """Reads an archive and checks all of it: names, sizes, hashes, every run (see `audit`) and the manifest.

    Raises:
        SubmissionError: it is truncated, altered, too large, or no archive of this format.
        AuditError: the files of a run do not fit together.
    """
    path = Path(path)
    with opened(path) as archive:
        members = members_of(path, archive)
        told = parse(f"{path}/{MANIFEST}", content_of(path, archive, members[MANIFEST]))
        if told.get("format") != FORMAT or not isinstance(told.get("runs"), dict):
            raise SubmissionError(f"{path}: expected a manifest of format {FORMAT}, got {str(told.get('format'))[:20]}")
        seeds = told.get("seeds") or []
        if not isinstance(seeds, list) or not all(map(is_count, seeds)):
            raise SubmissionError(f"{path}: manifest: seeds: expected a list of counts, got {str(seeds)[:80]}")
        results: dict[str, Result] = {}
        sizes: dict[str, dict[str, Any]] = {}
        for name, run in told["runs"].items():
            wanted = run.get("files") if isinstance(run, dict) else None
            if not isinstance(wanted, dict) or not wanted:
                raise SubmissionError(f"{path}: {str(name)[:100]}: expected the files of a run, got {str(wanted)[:80]}")
            files = {}
            for file, facts in wanted.items():
                if (full := f"runs/{name}/{file}") not in members:
                    raise SubmissionError(f"{path}: expected {full[:200]}, which the manifest names, got no such file")
                files[file] = content_of(path, archive, members.pop(full))
                if (found := _facts(files[file])) != facts:
                    raise SubmissionError(f"{path}: {full}: altered: expected {facts}, got {found}")
            results[name], sizes[name] = audit(f"{path}/{name}", files), {f: _facts(c) for f, c in files.items()}
            if name != _name(results[name]):
                raise SubmissionError(f"{path}: expected the run {_name(results[name])}, got it as {name[:100]}")
    if extra := sorted(set(members) - {MANIFEST}):
        raise SubmissionError(f"{path}: expected the files that the manifest names, got {extra[0]} too")
    check_together(results.values(), seeds)
    _check_manifest(path, told, results, sizes)
    gathered: list[Result] = [
        {**result, "folder": f"{path}/{name}", "archive": str(path), "member": name, "by": told["by"]}
        for name, result in results.items()
    ]
    return Submission(path, told["by"], told["description"], gathered)


def ledger_of(result: Result) -> bytes:
    """The ledger of a run of an archive that `read` has checked.

    Raises:
        SubmissionError: the archive has changed since.
    """
    path, name = Path(result["archive"]), f"runs/{result['member']}/ledger.jsonl"
    with opened(path) as archive:
        members = members_of(path, archive)
        content = content_of(path, archive, members[name]) if name in members else b""
    if sha256(content).hexdigest() != result["ledger_sha256"]:
        raise SubmissionError(f"{path}: {name} has changed since it was read")
    return content


def _check_manifest(path: Path, told: dict[str, Any], results: Any, sizes: Any) -> None:
    packed_with = told.get("packed_with")
    made = manifest(
        results, sizes, by=told.get("by", ""), description=told.get("description", ""), seeds=told.get("seeds") or (),
        packed_with=packed_with if isinstance(packed_with, dict) else {},
    )  # fmt: skip
    for name in sorted(made.keys() | told.keys()):
        if made.get(name) != told.get(name):
            raise SubmissionError(
                f"{path}: manifest: {name}: altered: expected {str(made.get(name))[:300]} as the runs say, got "
                f"{str(told.get(name))[:300]}"
            )


def _there(folder: str, name: str) -> bool:
    path = Path(folder) / name
    return path.is_file() and path.stat().st_size <= LARGEST_FILE


def _facts(content: bytes) -> dict[str, Any]:
    return {"sha256": sha256(content).hexdigest(), "bytes": len(content)}


def _entry(result: Result) -> str:
    names = ("env", "env_kwargs", "label", "overrides")
    return json.dumps([result[name] for name in names], sort_keys=True)


def _name(result: Result) -> str:
    """Where in an archive a run stands; a digest of its settings tells runs of one label apart."""
    label = re.sub(r"[^A-Za-z0-9_.@+=-]", "_", result["label"]).lstrip("_.@+=-")[:80] or "agent"
    return f"{label}-{sha256(_entry(result).encode()).hexdigest()[:8]}/seed-{result['seed']}"


def _listed(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered[:20]))


def _packed_with() -> dict[str, Any]:
    known = versions()
    return {name: known[name] for name in ("llm-duel-env", "commit", "source_sha256") if name in known}
