"""Pools on disk: prompts with K recorded, scored responses each, and their embeddings. Read, checked, cleaned, written.

pool.json                what it is: sizes, encoder, share of ties, what was left out and why, hashes of the files below
pool.jsonl               a prompt per line: prompt, responses (K), utilities (K), sources (K) where they are known
embeddings.safetensors   prompt (P, D), response (P, K, D)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import logit

from llm_duel_env.randomness import generator
from llm_duel_env.spaces import is_utf8
from llm_duel_env.tasks.fingerprint import digest
from llm_duel_env.tasks.prompt_files import MalformedRow, json_lines

VERSION = 1
CLIP = 1e-4
"""Probabilities are held this far from 0 and 1 before they become logits."""
LARGEST = 1e30
"""Scores and utilities are below this, so that what is computed of them stays finite in single precision."""
TIE = 1e-6
"""Utilities closer than this are a tie."""
FILES = ("pool.jsonl", "embeddings.safetensors", "pool.json")
"""Of a pool, in the order that they are put in place: pool.json is last, as it tells of the others."""
FOLDS = 5
"""Parts that a pool's prompts are dealt into, unless the user says otherwise."""
WHERE = "LLM_DUEL_POOL"
"""Environment variable with the folder of the pool to play on, where the task is told none."""
Scale = Literal["utility", "probability", "rank"]


@dataclass(frozen=True)
class Columns:
    """Where in a row what stands: names, or paths such as ``completions[].response`` into a list of objects."""

    prompt: str = "prompt"
    responses: str = "responses"
    scores: str = "scores"
    sources: str | None = None
    scale: Scale = "utility"
    """What a score is: a utility in logits, a probability of beating something fixed, or a rank (1 is the best)."""
    logits: float = 1.0
    """How many logits one unit of a utility or a rank is worth."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.logits):
            raise ValueError(f"logits: expected a finite number, got {self.logits!r}")


PRESETS = {
    "ultrafeedback": Columns(
        "instruction", "completions[].response", "completions[].overall_score", "completions[].model"
    ),
    "nectar": Columns("prompt", "answers[].answer", "answers[].rank", "answers[].model", "rank"),
    "alpaca_eval": Columns("prompt", "responses", "win_prob", "sources", "probability"),
}
"""By name: openbmb/UltraFeedback, berkeley-nest/Nectar, and AlpacaEval's outputs with a judge's win probabilities, one
prompt a row."""


@dataclass(frozen=True)
class PoolRow:
    """One prompt of a pool."""

    prompt: str
    responses: tuple[str, ...]
    """K texts, all different."""
    utilities: np.ndarray
    """(K,) float64, in logits."""
    sources: tuple[str, ...] | None
    """(K,) who wrote them."""
    place: np.ndarray
    """(K,) which of the row's responses these are, as they came."""
    number: int
    """Its row in the data, from 1."""


@dataclass(frozen=True)
class Left:
    """What was left out, in numbers."""

    repeated_prompts: int = 0
    repeated_responses: int = 0
    short_prompts: int = 0
    """Prompts with fewer than K different responses."""
    spare_responses: int = 0
    """Responses beyond K."""


def read_rows(rows: Iterable[Mapping[str, Any]], columns: Columns, source: str) -> tuple[list[PoolRow], Left]:
    """Prompts with the different responses that each has. A text that occurs twice stands once, with its mean utility.

    Raises:
        MalformedRow: a row without what the columns name, texts that are no UTF-8, counts that differ, scores that are
            missing or not finite; names source and row.
        ValueError: no rows.
    """
    found: dict[str, PoolRow] = {}
    left: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            read = _read(row, columns, number)
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedRow(f"{source}, row {number}: {error.args[0]}") from None
        left["repeated_responses"] += len(read.responses) - len(set(read.responses))
        left["repeated_prompts"] += read.prompt in found
        found.setdefault(read.prompt, _distinct(read))
    if not found:
        raise ValueError(f"{source}: expected at least one row, got none")
    return list(found.values()), Left(**left)


def cut(rows: Sequence[PoolRow], candidates: int | None, left: Left, seed: int = 0) -> tuple[list[PoolRow], Left]:
    """The prompts that have K different responses, with K of them each, drawn by `seed` and in the data's order.

    `candidates` is K; None takes the K for which most responses are kept.

    Raises:
        ValueError: K is below 2, or no prompt has so many.
    """
    counts = np.array([len(row.responses) for row in rows])
    if counts.max() < 2:
        raise ValueError("expected prompts with two different responses or more, got none")
    if candidates is None:
        candidates = int(max(range(2, int(counts.max()) + 1), key=lambda k: k * (counts >= k).sum(), default=0))
    if candidates < 2 or not (counts >= candidates).any():
        raise ValueError(f"candidates: expected 2 to {counts.max()}, what some prompt has, got {candidates}")
    kept = []
    for row in rows:
        if len(row.responses) < candidates:
            continue
        chosen = np.sort(generator(seed, "pool", row.number).permutation(len(row.responses))[:candidates])
        kept.append(_take(row, chosen))
    spare = int((counts[counts >= candidates] - candidates).sum())
    return kept, replace(left, short_prompts=int((counts < candidates).sum()), spare_responses=spare)


def share_of_ties(utilities: np.ndarray) -> float:
    """The share of pairs of a prompt's different responses whose utilities are a tie; utilities (P, K)."""
    i, j = np.triu_indices(utilities.shape[1], 1)
    return float((np.abs(utilities[:, i] - utilities[:, j]) < TIE).mean())


class NoPoolError(ValueError):
    """The pool that a run needs is not at hand."""


@dataclass(frozen=True)
class Pool:
    """P prompts with K responses each."""

    prompts: tuple[str, ...]
    responses: np.ndarray
    """(P, K) str in dtype object."""
    utilities: np.ndarray
    """(P, K) float64, in logits."""
    prompt_embeddings: np.ndarray
    """(P, D) float32."""
    response_embeddings: np.ndarray
    """(P, K, D) float32."""
    facts: dict[str, Any]
    """What pool.json tells."""


def write_pool(
    folder: Path, rows: Sequence[PoolRow], prompt: np.ndarray, response: np.ndarray, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a pool; returns what pool.json tells. Embeddings (P, D) and (P, K, D) are kept in half precision."""
    utilities = np.stack([row.utilities for row in rows])
    (p, k), d = utilities.shape, prompt.shape[-1]
    if prompt.shape != (p, d) or response.shape != (p, k, d):
        raise ValueError(f"embeddings: expected {(p, d)} and {(p, k, d)}, got {prompt.shape} and {response.shape}")
    if not (np.isfinite(prompt).all() and np.isfinite(response).all()):
        raise ValueError("embeddings: expected finite numbers, got others")
    lines = [
        {"prompt": row.prompt, "responses": row.responses, "utilities": row.utilities.tolist()}
        | ({"sources": row.sources} if row.sources else {})
        for row in rows
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused
        halves = {"prompt": prompt.astype(np.float16), "response": response.astype(np.float16)}
    if not all(np.isfinite(half).all() for half in halves.values()):
        largest = max(np.abs(prompt).max(), np.abs(response).max())
        raise ValueError(f"embeddings: expected numbers that half precision holds (to 65504), got {largest:g}")
    folder.mkdir(parents=True, exist_ok=True)
    new = {name: folder / f"{name}.new" for name in FILES}  # a pool that is there stays whole until this one is
    new["pool.jsonl"].write_text(text, encoding="utf-8")
    save_file(halves, new["embeddings.safetensors"])
    told = {
        "version": VERSION,
        "prompts": p,
        "candidates": k,
        "dimension": d,
        "ties": share_of_ties(utilities),
        **facts,
        "digest": digest(new["pool.jsonl"], new["embeddings.safetensors"]),
    }
    new["pool.json"].write_text(json.dumps(told, indent=1) + "\n")
    (folder / "pool.json").unlink(missing_ok=True)  # so that no pool.json ever tells of other files than its own
    for name, path in new.items():
        path.replace(folder / name)
    return told


def whole(folder: Path) -> bool:
    """Whether there is a pool, and its files are those that its pool.json tells of."""
    *files, path = (folder / name for name in FILES)
    if not all(file.is_file() for file in (*files, path)):
        return False
    try:
        return _facts(path).get("digest") == digest(*files)
    except ValueError:
        return False


def read_pool(folder: str | Path) -> Pool:
    """Reads a pool.

    Raises:
        ValueError: there is none, it is of another version, or its files are not those that were written; says how to
            make one. A broken line is named.
    """
    folder = Path(folder).expanduser()
    path = folder / "pool.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a pool (pool.json, pool.jsonl, embeddings.safetensors); make one with "
                         "llm-duel pool build")  # fmt: skip
    facts = _facts(path)
    if facts.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {facts.get('version')!r}; build the pool again")
    lines = folder / "pool.jsonl"
    rows = list(json_lines(lines)) if lines.is_file() else []  # before the digest, which would not say what line broke
    if not whole(folder):
        raise ValueError(f"{folder}: its files are not those that pool.json tells of; build the pool again")
    arrays = load_file(folder / "embeddings.safetensors")
    p, k, _ = arrays["response"].shape
    if len(rows) != p:
        raise ValueError(f"{lines}: expected {p} prompts, as many as have embeddings, got {len(rows)}")
    responses = np.empty((p, k), object)
    for number, row in enumerate(rows):
        listed = [row.get(name) for name in ("responses", "utilities")]
        if "prompt" not in row or not all(isinstance(values, list) and len(values) == k for values in listed):
            raise MalformedRow(f"{lines}, row {number + 1}: expected prompt, and {k} responses and utilities")
        responses[number] = row["responses"]
    return Pool(
        tuple(row["prompt"] for row in rows),
        responses,
        np.array([row["utilities"] for row in rows], np.float64),
        arrays["prompt"].astype(np.float32),
        arrays["response"].astype(np.float32),
        facts,
    )


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; build the pool again") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected a JSON object, got {facts!r:.80}; build the pool again")
    return facts


def _read(row: Mapping[str, Any], columns: Columns, number: int) -> PoolRow:
    prompt, responses, scores = (_at(row, name) for name in (columns.prompt, columns.responses, columns.scores))
    sources = _at(row, columns.sources) if columns.sources else None
    if not isinstance(prompt, str) or not prompt.strip() or not is_utf8(prompt):
        raise ValueError(f"{columns.prompt}: expected a text that is not empty, got {prompt!r:.80}")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or not len(responses):
        raise ValueError(f"{columns.responses}: expected a list of texts, got {responses!r:.80}")
    for place, text in enumerate(responses, 1):
        if not isinstance(text, str) or not is_utf8(text):
            raise ValueError(f"{columns.responses}, number {place}: expected a text, got {text!r:.80}")
    for name, values in ((columns.scores, scores), (columns.sources, sources)):
        if values is not None and (not isinstance(values, Sequence) or len(values) != len(responses)):
            got = len(values) if isinstance(values, Sequence) else repr(values)
            raise ValueError(f"{name}: expected {len(responses)}, one for each response, got {got}")
    utilities = np.array([_utility(score, columns, place) for place, score in enumerate(scores or (), 1)])
    if len(utilities) != len(responses):
        raise ValueError(f"{columns.scores}: expected {len(responses)} scores, got none")
    told = tuple(map(str, sources)) if sources is not None else None
    return PoolRow(prompt, tuple(responses), utilities, told, np.arange(len(responses)), number)


def _utility(score: Any, columns: Columns, place: int) -> float:
    where = f"{columns.scores}, number {place}"
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not -LARGEST < score < LARGEST:
        raise ValueError(f"{where}: expected a number between -{LARGEST:g} and {LARGEST:g}, got {score!r:.80}")
    if columns.scale != "probability":
        utility = (-columns.logits if columns.scale == "rank" else columns.logits) * float(score)
        if not -LARGEST < utility < LARGEST:
            raise ValueError(f"{where}: expected at most {LARGEST:g} logits, got {score!r} times {columns.logits:g}")
        return utility
    if not 0 <= score <= 1:
        raise ValueError(f"{where}: expected a probability, got {score!r}")
    return float(logit(np.clip(score, CLIP, 1 - CLIP)))


def _at(row: Mapping[str, Any], path: str) -> Any:
    """What stands at ``name`` or ``name[].field``."""
    name, listed, field = path.partition("[].")
    if name not in row:
        raise KeyError(f"no column {name!r}; it has {sorted(row)}")
    if not listed:
        return row[name]
    if not isinstance(row[name], Sequence) or isinstance(row[name], str):
        raise ValueError(f"{name}: expected a list, got {row[name]!r:.80}")
    return [part[field] if isinstance(part, Mapping) and field in part else None for part in row[name]]


def _distinct(row: PoolRow) -> PoolRow:
    firsts = {text: place for place, text in reversed(list(enumerate(row.responses)))}
    places = np.array(sorted(firsts.values()))
    means = [row.utilities[[text == row.responses[p] for text in row.responses]].mean() for p in places]
    return replace(_take(row, places), utilities=np.array(means))


def _take(row: PoolRow, places: np.ndarray) -> PoolRow:
    return PoolRow(
        row.prompt,
        tuple(row.responses[p] for p in places),
        row.utilities[places],
        tuple(row.sources[p] for p in places) if row.sources else None,
        row.place[places],
        row.number,
    )
