"""Whether the files of a finished run fit together: result, configuration, ledger and metrics.

What `result.json` says is compared with what the ledger and the metrics say of the same, and labels are drawn again
from the ledger's probabilities. This finds damage, mistakes and careless edits; whoever makes up all files alike is
found by playing rounds again (`llm_duel_env.benchmark.rerun`).
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llm_duel_env.benchmark.audit_totals import Denied, check_totals
from llm_duel_env.benchmark.outcome import CURVE_POINTS
from llm_duel_env.benchmark.result_fields import NEEDED, Check, is_count, is_number, wrong
from llm_duel_env.benchmark.results import Result
from llm_duel_env.benchmark.run_config import RunConfig, env_kwargs_at
from llm_duel_env.benchmark.run_folder import finite, rounded
from llm_duel_env.ledger import LedgerError, Record, scan
from llm_duel_env.oracles.feedback import Feedback

REQUIRED = ("result.json", "config.json", "command.txt", "versions.json", "ledger.jsonl", "metrics.jsonl")
"""What `llm-duel run` leaves in the folder of a finished run, and what is looked at."""


class AuditError(ValueError):
    """A run's files do not fit together; says where, what was expected and what came."""


def audit(where: str, files: Mapping[str, bytes]) -> Result:
    """Checks one run and returns its result, which says how often the run was evaluated in results of all versions.

    Args:
        where: what the run is called in errors.
        files: content by name, `REQUIRED` among them.

    Raises:
        AuditError: something is missing, damaged, unfinished or contradicts the rest.
    """
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise AuditError(f"{where}: expected {', '.join(REQUIRED)} as a finished run leaves them, got no {missing[0]}")
    result = parse(f"{where}/result.json", files["result.json"])
    _check_result(f"{where}/result.json", result)
    config = _check_config(where, result, parse(f"{where}/config.json", files["config.json"]))
    records = _check_ledger(where, result, config, files["ledger.jsonl"])
    metrics = [parse(f"{where}/metrics.jsonl", line) for line in files["metrics.jsonl"].split(b"\n")[:-1]]
    _check_rounds(where, result, metrics, records)
    _check_curve(where, result, metrics)
    try:
        check_totals(result, config, metrics, records)
    except Denied as error:
        raise AuditError(f"{where}: {error}") from None
    return {**result, "eval_every": config.eval_every}


def parse(where: str, content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AuditError: it is not one, or holds a number that JSON does not know.
    """

    def refuse(number: str) -> None:
        raise ValueError(f"expected finite numbers, got {number}")

    try:
        found = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AuditError(f"{where}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise AuditError(f"{where}: expected a JSON object, got {str(found)[:80]!r}")
    return found


def ledger_records(where: str, content: bytes) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of a whole ledger.

    Raises:
        AuditError: a damaged or torn line, or no ledger.
    """
    try:
        header, offsets, end = scan(Path(where) / "ledger.jsonl", io.BytesIO(content))
    except LedgerError as error:
        raise AuditError(str(error)) from None
    if header is None or end != len(content):
        raise AuditError(f"{where}/ledger.jsonl: expected whole lines, got {len(content) - end} bytes of a torn one")
    records = [json.loads(content[begin:stop]) for begin, stop in zip(offsets, [*offsets[1:], end])]
    return header, records


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


FIELDS: dict[str, Check] = {
    **dict.fromkeys(("agent", "label", "env"), (lambda v: _text(v) and 0 < len(v) <= 200, "a short printable text")),
    **dict.fromkeys(("fingerprint", "ledger_sha256"), (lambda v: _text(v) and len(v) == 64, "a SHA-256 in hex")),
    "provenance": (lambda v: v in ("paper", "reconstructed", "ours"), "paper, reconstructed or ours"),
    "needs": (lambda v: isinstance(v, list) and all(map(_text, v)), "a list of names"),
    "feedback": (lambda v: v in ("bernoulli", "threshold"), "bernoulli or threshold"),
    "status": (lambda v: v in ("finished", "stalled"), "finished or stalled"),
}  # fmt: skip
"""What of somebody else's result must be more than of the right type (`result_fields`)."""
PRESENT = (*NEEDED, *FIELDS, "queries", "rounds", "gradient_steps")
"""What a result must hold: every version wrote these."""


def _check_result(where: str, result: dict[str, Any]) -> None:
    if missing := [name for name in PRESENT if name not in result]:
        raise AuditError(f"{where}: expected {', '.join(dict.fromkeys(PRESENT))}, got no {missing[0]}")
    if said := wrong(result):
        raise AuditError(f"{where}: {said}")
    for name, (fits, words) in FIELDS.items():
        if not fits(result[name]):
            raise AuditError(f"{where}: {name}: expected {words}, got {str(result[name])[:80]!r}")
    if any(mark in result["label"] for mark in "[]<>|\\`"):  # tables and reports would take them for markup
        raise AuditError(f"{where}: label: expected a name without []<>|\\`, got {result['label']!r}")
    points = result["curve"].get("queries") or []
    if not 1 <= len(points) <= CURVE_POINTS or not all(map(is_count, points)):
        raise AuditError(f"{where}: curve: expected queries at 1 to {CURVE_POINTS} evaluations, got {str(points)[:80]}")
    if points != sorted(points) or points[-1] != result["queries"]:
        raise AuditError(f"{where}: curve: expected rising queries that end at {result['queries']}, got {points[-3:]}")
    queries, budget = result["queries"], result["budget"]
    if queries > budget or (result["status"] == "finished" and queries != budget):
        raise AuditError(f"{where}: a {result['status']} run: expected {budget} queries, its budget, got {queries}")


def _check_config(where: str, result: Result, config: dict[str, Any]) -> RunConfig:
    try:
        told = RunConfig(**config)
    except (TypeError, ValueError) as error:
        raise AuditError(f"{where}/config.json: expected a run's configuration: {error}") from None
    for name in ("agent", "env", "seed", "budget", "batch", "overrides", "env_kwargs", "eval_every"):
        if name not in result and name == "eval_every":  # results of earlier versions do not say
            continue
        if result[name] != rounded(value := getattr(told, name)):
            raise AuditError(f"{where}: {name}: expected {value!r} as config.json has it, got {result[name]!r}")
    if result["eval_prompts"] > told.eval_prompts:
        raise AuditError(f"{where}: eval_prompts: expected at most {told.eval_prompts}, got {result['eval_prompts']}")
    return told


def _check_ledger(where: str, result: Result, config: RunConfig, content: bytes) -> list[Record]:
    header, records = ledger_records(where, content)
    where = f"{where}/ledger.jsonl"
    if (found := sha256(content).hexdigest()) != result["ledger_sha256"]:
        raise AuditError(
            f"{where}: expected the hash {result['ledger_sha256'][:16]}… of result.json, got {found[:16]}…"
        )
    if len(records) != result["queries"]:
        raise AuditError(
            f"{where}: expected {result['queries']} labels, the queries of result.json, got {len(records)}"
        )
    kwargs = env_kwargs_at(config.env_kwargs, config.seed)
    wanted: dict[str, Any] = {name: result[name] for name in ("seed", "fingerprint", "feedback")}
    wanted["task_kwargs"] = kwargs.get("task_kwargs") or {}
    wanted |= {name: float(kwargs.get(name, 0.0)) for name in ("flip_rate", "tie_margin")}
    for name, value in wanted.items():
        if header.get(name, value) != value:
            raise AuditError(f"{where}: header: {name}: expected {value!r}, got {header[name]!r}")
    kind = int if result["kind"] == "finite" else str
    before = 0
    for number, record in enumerate(records):
        sound = (
            is_count(record["round"]) and before <= record["round"] < result["rounds"] and is_count(record["prompt_id"])
            and all(isinstance(record[name], kind) for name in ("first", "second"))
            and record["first"] != record["second"] and is_number(record["probability"])
            and 0 <= record["probability"] <= 1 and record["label"] in (0, 0.5, 1)
        )  # fmt: skip
        if not sound:
            raise AuditError(f"{where}: query {number}: expected a label of a duel, got {str(record)[:200]}")
        before = record["round"]
    _check_labels(where, result, Feedback(result["feedback"], wanted["flip_rate"], wanted["tie_margin"]), records)
    return records


def _check_labels(where: str, result: Result, feedback: Feedback, records: list[Record]) -> None:
    """Draws the labels again: they follow from the probabilities, the seed and the queries' numbers."""
    probability = np.array([record["probability"] for record in records])
    labels = feedback.label(probability, result["seed"], np.arange(len(records)))
    differing = np.flatnonzero(labels != [record["label"] for record in records])
    if len(differing):
        number = int(differing[0])
        got = f"{records[number]['label']} (and {len(differing) - 1} more differ)"
        raise AuditError(
            f"{where}: query {number}: expected the label {labels[number]}, as {feedback.kind} feedback of this seed "
            f"draws it from probability {probability[number]:.6g}, got {got}"
        )


def _check_rounds(where: str, result: Result, metrics: list[dict[str, Any]], records: list[Record]) -> None:
    rounds = [line for line in metrics if line.get("kind") == "round"]
    if len(rounds) != result["rounds"]:
        raise AuditError(f"{where}/metrics.jsonl: expected {result['rounds']} rounds, got {len(rounds)}")
    charged = Counter(record["round"] for record in records)
    ties = Counter(record["round"] for record in records if record["label"] == 0.5)
    for number, line in enumerate(rounds):
        told: list[Any] = [line.get(name) for name in ("charged", "shown", "ties")]
        if not all(map(is_count, told)):
            raise AuditError(f"{where}/metrics.jsonl: round {number + 1}: expected three counts, got {told}")
        identical = told[1] - told[0]  # a pair of equal responses is shown, is a tie, and costs nothing
        wanted = [charged[number], told[1], ties[number] + identical]
        if told != wanted or not 0 <= identical <= told[1] <= result["batch"]:
            raise AuditError(
                f"{where}/metrics.jsonl: round {number + 1}: expected charged, shown, ties {wanted} by the ledger, "
                f"in a round of at most {result['batch']}, got {told}"
            )
    if not rounds:
        return
    for name, logged in (("online_win_rate", "mean_online_win_rate"), ("cumulative_regret", "cumulative_regret")):
        if result[name] != (told := rounded(rounds[-1].get(logged))):
            raise AuditError(
                f"{where}: {name}: expected {told}, as the last round of metrics.jsonl says, got {result[name]}"
            )
    _check_sum(where, result, rounds)


def _check_sum(where: str, result: Result, rounds: list[dict[str, Any]]) -> None:
    """Adds up the regret of the rounds."""
    told = [(line["shown"], line.get("regret")) for line in rounds if line["shown"]]
    if result["cumulative_regret"] is None or any(not is_number(regret) for _, regret in told):
        return
    total = sum(shown * regret for shown, regret in told)
    if not math.isclose(total, result["cumulative_regret"], rel_tol=1e-4, abs_tol=1e-6):
        got = result["cumulative_regret"]
        raise AuditError(f"{where}: cumulative_regret: expected {total:.5g}, the sum over rounds, got {got}")


def _check_curve(where: str, result: Result, metrics: list[dict[str, Any]]) -> None:
    """Finds the curve's points, in order, among the evaluations of the metrics; the first and last must be theirs."""
    evaluations = [finite(rounded(line)) for line in metrics if line.get("kind") == "eval"]
    curve = result["curve"]
    points = [{name: values[i] for name, values in curve.items()} for i in range(len(curve["queries"]))]
    if len(points) != min(len(evaluations), CURVE_POINTS):
        raise AuditError(
            f"{where}: curve: expected {min(len(evaluations), CURVE_POINTS)} evaluations, got {len(points)}"
        )
    at = 0
    for number, point in enumerate(points):
        if number == len(points) - 1:
            at = len(evaluations) - 1  # the last is the last, and the first the first
        while number and at < len(evaluations) - 1 and not _agrees(point, evaluations[at]):
            at += 1
        if not _agrees(point, evaluations[at]):
            nearest: dict[str, Any] = next((e for e in evaluations if e.get("queries") == point["queries"]), {})
            told = {name: (nearest.get(name), value) for name, value in point.items() if nearest.get(name) != value}
            raise AuditError(
                f"{where}: curve: metrics.jsonl has no such evaluation as that after {point['queries']} queries; what "
                f"differs (expected, got): {told}"
            )
        at = min(at + 1, len(evaluations) - 1)


def _agrees(point: dict[str, Any], evaluation: dict[str, Any]) -> bool:
    return all(evaluation.get(name) == value for name, value in point.items())
