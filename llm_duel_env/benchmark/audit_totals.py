"""Whether the figures at the top of a result are what its run's ledger and metrics add up to: a part of the audit.

What earlier versions did not write, into the result or into the metrics, is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_duel_env.benchmark.labels import label_counts
from llm_duel_env.benchmark.outcome import LENGTH_CONTROLLED, TOLD_MORE
from llm_duel_env.benchmark.result_fields import is_number
from llm_duel_env.benchmark.results import BELIEFS, Result
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import finite, rounded
from llm_duel_env.ledger import Record

Line = Mapping[str, Any]
"""Of a metrics file."""
SLACK = 0.99
"""Seconds of a run are at least this share of those that its metrics tell: they are taken from two clocks."""


class Denied(ValueError):  # noqa: N818  says what is so
    """A figure of a result is another than the ledger or the metrics say."""


def check_totals(result: Result, config: RunConfig, metrics: Sequence[Line], records: Sequence[Record]) -> None:
    """Checks what is neither on the curve nor said by the last round.

    Args:
        result: its fields are of the right shape.
        config: of the run.
        metrics: whose rounds agree with the ledger, and whose evaluations with the curve.
        records: the ledger.

    Raises:
        Denied: a figure does not follow from the files.
    """
    rounds = [line for line in metrics if line.get("kind") == "round"]
    evaluations = [line for line in metrics if line.get("kind") == "eval"]
    shown = sum(line["shown"] for line in rounds)
    _same(result, LENGTH_CONTROLLED, finite(rounded(evaluations[-1].get(LENGTH_CONTROLLED))), "the last evaluation")
    _same(result, "beliefs", _beliefs(evaluations), "the evaluations of metrics.jsonl")
    _same(result, "labels", _labels(records, shown), "the ledger")
    _check_steps(result, config, metrics, evaluations)
    if not TOLD_MORE & set(result["needs"]):
        _same(result, "evaluations", 0, "an agent that is told of none")
    else:
        _check_sum(result, "evaluations", rounds)
    if result["kind"] == "finite":
        _same(result, "generated_tokens", None, "a finite task")
    else:
        _check_sum(result, "generated_tokens", rounds)
    spent = sum(_seconds(line) for line in metrics)
    if result["seconds"] < SLACK * spent:
        raise Denied(f"seconds: expected at least {spent:.5g}, as metrics.jsonl adds up to, got {result['seconds']}")


def _same(result: Result, name: str, told: Any, who: str) -> None:
    if name in result and result[name] != told:
        raise Denied(f"{name}: expected {str(told)[:300]}, as of {who}, got {str(result[name])[:300]}")


def _check_sum(result: Result, name: str, lines: Sequence[Line]) -> None:
    """A total over lines, where all of them tell their part; elsewhere it is no smaller than what some tell."""
    parts = [line[name] for line in lines if is_number(line.get(name), 0)]
    total = int(sum(parts))
    if len(parts) == len(lines):
        _same(result, name, total, "metrics.jsonl, added up")
    elif (result.get(name) or 0) < total:
        raise Denied(f"{name}: expected at least {total}, as metrics.jsonl adds up to, got {result.get(name)}")


def _check_steps(result: Result, config: RunConfig, metrics: Sequence[Line], evaluations: Sequence[Line]) -> None:
    name = "agent/gradient_steps"
    total = int(sum(line[name] for line in metrics if is_number(line.get(name), 0)))
    if config.overrides.get("policy.asynchronous") and name not in evaluations[-1]:
        # Earlier versions did not log the lesson that the last evaluation waited for.
        if result["gradient_steps"] < total:
            got = result["gradient_steps"]
            raise Denied(f"gradient_steps: expected at least {total}, as metrics.jsonl adds up to, got {got}")
        return
    _same(result, "gradient_steps", total, "metrics.jsonl, added up")


def _beliefs(evaluations: Sequence[Line]) -> dict[str, list[Any]] | None:
    """The curves of beliefs as `beliefs.Examiner` makes them for a result."""
    examined = [line for line in evaluations if any(f"belief/{name}" in line for name in BELIEFS)]
    if not examined:
        return None
    known = [name for name in BELIEFS if any(line.get(f"belief/{name}") is not None for line in examined)]
    found = {"queries": [line.get("queries") for line in examined]}
    return found | {name: finite(rounded([line.get(f"belief/{name}") for line in examined])) for name in known}


def _labels(records: Sequence[Record], shown: int) -> dict[str, int]:
    """The counts of labels by kind; what was shown and not bought is a response against itself."""
    told = label_counts({
        "charged": [True] * len(records),
        "preference": [record["label"] for record in records],
        "metrics/probability": [record["probability"] for record in records],
    })  # fmt: skip
    return told | {"identical": shown - len(records)}


def _seconds(line: Line) -> float:
    """Seconds on one line, by kind of work; stages within those (``time/act/...``) are not counted again."""
    told = [value for name, value in line.items() if name.startswith("time/") and name.count("/") == 1]
    return sum(value for value in told if is_number(value, 0))
