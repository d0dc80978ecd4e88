"""The leaderboard: from the results of finished runs to one table per environment and budget."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.results import (
    BELIEFS,
    SELF_REPORTED,
    Result,
    bought,
    checked,
    differences_to,
    has_win_rate,
    last,
    paired_enough,
    queries_reached,
    regret,
    win_curve,
)
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, Interval

BASELINE = "online_dpo"
"""The agent that others are measured against."""
RICHER = {"scores", "ranking", "reward", "editor", "degrader", "contrast_prompts", "goal_prompts"}
"""Needs that put an agent into a table of its own: they tell more than labels, or (editor, degrader, prompts that the
supervised policy was taught to obey) come from somebody who knows what the oracle likes."""
APART = {"eval_every": "evaluated every {} of the budget", "fingerprint": "task {:.12}"}
TOLD_LATER = tuple(APART)
"""What results tell of their evaluation and task, and older ones do not."""


@dataclass(frozen=True)
class Row:
    """One agent in one table. Means over its seeds; None where a figure does not exist."""

    label: str
    provenance: str
    seeds: int
    stalled: int
    """Seeds that ended without spending their budget."""
    win_rate: float
    """Final offline win rate."""
    win_interval: tuple[float, float] | None
    """95% bootstrap interval of `win_rate`."""
    iqm: float
    """Interquartile mean over seeds of the final offline win rate: what a few lucky or broken seeds cannot move."""
    interval_over: str | None
    """What that interval resamples: "seeds", or, for a single seed, "prompts"."""
    area: float
    """Mean height of the learning curve (offline win rate), over seeds."""
    rank: Interval | None
    differences: dict[str, Interval]
    """What this agent has more than the baseline, paired by seed, of each of `COMPARED` that both know."""
    improvement: float | None
    """Probability that a seed of this agent ends above one of the baseline."""
    online_win_rate: float | None
    queries_to_target: float | None
    """Mean over seeds; a seed that never got there counts with the budget, so that this is then a lower bound."""
    censored: int
    """Seeds that never got to the target."""
    ratio: Interval | None
    """Queries to target over the baseline's, paired by seed."""
    ratio_bound: str
    """ "" exact; ">" at least this (the agent is censored), "<" at most this (the baseline is), "?" both are."""
    cumulative_regret: float | None
    """None where a seed bought no query."""
    utility: float | None
    kl: float | None
    length: float | None
    gradient_steps: float | None
    evaluations: float | None
    """Oracle evaluations beyond labels that the agent was told of; None for those that were told of none."""
    seconds: float
    queries: float = float("nan")
    """Oracle queries really bought; below the budget where seeds stalled."""
    checked: str = SELF_REPORTED
    """Whether some of its runs were played again and came out the same; see `results.checked`."""
    place: int | None = None
    """1 + the ranked agents that end above it and are told from it; see `statistics.places`."""
    tied: tuple[str, ...] = ()
    """The ranked agents that it is not told from: the paired interval of the final win rates includes 0."""
    improvement_interval: tuple[float, float] | None = None
    """95% bootstrap interval of `improvement`."""
    simple_regret: float | None = None
    """Of the deployed responses at the end: the best response's utility less theirs."""
    length_controlled: float | None = None
    """Final offline win rate had the responses been as long as the reference; see `metrics.length_controlled`."""
    true_win_rate: float | None = None
    """Final offline win rate as the task's truth has it, where labels come from a learned proxy."""
    beliefs: dict[str, float] = field(default_factory=dict)
    """What its reward models believe at the end and whether it holds, by the names of `results.BELIEFS`."""


@dataclass(frozen=True)
class Table:
    """Agents compared on one environment under one budget."""

    env: str
    env_kwargs: dict[str, Any]
    kind: str
    budget: int
    feedback: str
    batch: int
    """Prompts per round."""
    eval_prompts: int
    """Held-out prompts that win rates are measured on."""
    eval_every: float | None
    """Share of the budget between two evaluations; None where no result tells."""
    fingerprint: str | None
    """Of the task; None where no result tells."""
    asks: tuple[str, ...]
    """What these agents are told beyond duels; agents that are told more stand in a table of their own."""
    target: float | None
    """The offline win rate that "queries to target" counts to."""
    rows: list[Row] = field(default_factory=list)
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    """Label -> seed -> result."""
    against: tuple[str, ...] = ()
    """Labels that the others are compared with, beside the baseline."""
    apart: tuple[str, ...] = ()
    """Which of `TOLD_LATER` tell this table from another one, alike in all else."""

    @property
    def title(self) -> str:
        """Environment, its settings and the budget."""
        told = f" {json.dumps(self.env_kwargs, sort_keys=True)}" if self.env_kwargs else ""
        asks = f", agents that are told {', '.join(self.asks)}" if self.asks else ""
        apart = "".join(f", {APART[name].format(getattr(self, name))}" for name in self.apart)
        return (
            f"{self.env}{told}, {self.budget} queries in rounds of {self.batch}, {self.feedback} feedback{asks}{apart}"
        )

    @property
    def few_seeds(self) -> list[str]:
        """Labels of the agents without the seeds that an interval and a rank need."""
        return [row.label for row in self.rows if row.seeds < SEEDS_NEEDED[self.kind]]


def tables(results: Sequence[Result], against: Sequence[str] = ()) -> list[Table]:
    """One table per environment, settings, task, budget, feedback, batch and evaluation, agents by falling offline win
    rate. What results do not tell of their task and evaluation, as older ones do not, is taken as that of the others.

    Results without an offline win rate (`has_win_rate`) cannot be compared and are left out. Beside the baseline, the
    others are compared with each label of `against`, in the tables that have it.

    Raises:
        ValueError: two runs of the same label and seed, with their folders; a label of `against` that no table has.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in filter(has_win_rate, results):
        groups[json.dumps([_group(result)], sort_keys=True)].append(result)
    made = [
        replace(_table(part), against=tuple(against), apart=apart)
        for _, group in sorted(groups.items())
        for part, apart in _parts(group)
    ]
    labels = {label for table in made for label in table.results}
    for label in against:
        if label not in labels:
            raise ValueError(f"against: expected one of {sorted(labels)}, got {label!r}")
    return made


def _group(result: Result) -> dict[str, Any]:
    asks = sorted(set(result["needs"]) & RICHER)
    names = ("env", "env_kwargs", "kind", "budget", "feedback", "batch", "eval_prompts")
    return {"asks": asks} | {name: result[name] for name in names}


def _parts(group: Sequence[Result]) -> list[tuple[list[Result], tuple[str, ...]]]:
    """A group without results that were played on different tasks (a pool and another pool, assets and newer ones) or
    evaluated at different marks, and what tells the parts apart."""
    known = {name: {result.get(name) for result in group} - {None} for name in TOLD_LATER}
    apart = tuple(name for name in TOLD_LATER if len(known[name]) > 1)
    parts: dict[str, list[Result]] = defaultdict(list)
    for result in group:
        parts[json.dumps([result.get(name) for name in apart])].append(result)
    return [(part, apart) for _, part in sorted(parts.items())]


def _table(group: Sequence[Result]) -> Table:
    by_label = _by_label(group)
    told = {name: next((r[name] for r in group if r.get(name) is not None), None) for name in TOLD_LATER}
    baseline = baseline_of(by_label)
    target = None
    if baseline:
        grid = statistics.marks(group[0]["budget"], group[0]["batch"], told["eval_every"])
        target = statistics.target_of([win_curve(result) for result in by_label[baseline].values()], grid)
    described = _group(group[0]) | told
    described["asks"] = tuple(described["asks"])
    table = Table(**described, target=target, results=by_label)
    for label, by_seed in by_label.items():
        table.rows.append(_row(label, by_seed, by_label.get(baseline or ""), target))
    table.rows.sort(key=lambda row: -row.win_rate)
    return replace(table, rows=ranked(table.rows, table.results))


def baseline_of(by_label: Mapping[str, Mapping[int, Result]]) -> str | None:
    """The label of the agent that the others of a table are measured against; None where it is not among them."""
    if BASELINE in by_label:
        return BASELINE
    return next((label for label, by_seed in by_label.items() if _plays(by_seed, BASELINE)), None)


def _by_label(group: Sequence[Result]) -> dict[str, dict[int, Result]]:
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    settings = defaultdict(set)
    for result in group:
        settings[result["label"]].add(json.dumps(result["overrides"], sort_keys=True))
    for result in group:
        label = result["label"]
        if len(settings[label]) > 1:  # one name, several settings: the settings tell them apart
            told = ", ".join(f"{name}={value}" for name, value in sorted(result["overrides"].items()))
            label = f"{label} ({told or 'defaults'})"
        other = found[label].get(result["seed"])
        if other is not None and not _copy_of(other, result):
            where = f"{other.get('folder')} and {result.get('folder')}"
            raise ValueError(f"{label}, seed {result['seed']} on {result['env']} is there twice: {where}")
        found[label][result["seed"]] = result
    return dict(found)


def _copy_of(one: Result, other: Result) -> bool:
    """Whether two results are of one run, kept in two places."""
    names = ("overrides", "curve", "seconds", "ledger_sha256")
    return all(one.get(name) == other.get(name) for name in names)


def _plays(by_seed: Mapping[int, Result], agent: str) -> bool:
    return next(iter(by_seed.values()))["agent"] == agent


def _row(label: str, by_seed: dict[int, Result], baseline: dict[int, Result] | None, target: float | None) -> Row:
    results = list(by_seed.values())
    wins = {s: win_curve(r)[1][-1] for s, r in by_seed.items()}
    enough = len(results) >= SEEDS_NEEDED[results[0]["kind"]]
    interval, over = None, None
    if enough:
        found = statistics.bootstrap_interval(list(wins.values()))
        interval, over = (found.low, found.high), "seeds"
    elif len(results) == 1 and last(results[0], "win_low") is not None:
        interval, over = (results[0]["curve"]["win_low"][-1], results[0]["curve"]["win_high"][-1]), "prompts"
    reached, censored = queries_reached(by_seed, target)
    ratio, bound = None, ""
    improvement: Interval | None = None
    differences: dict[str, Interval] = {}
    if baseline and baseline is not by_seed and set(baseline) & set(by_seed):
        theirs, their_censored = queries_reached(baseline, target)
        if reached and all(value > 0 for value in theirs.values()):
            ratio = statistics.paired_ratio(reached, theirs)
            ratio = ratio if paired_enough(by_seed, baseline) else ratio.bare()
            bound = {(0, 0): "", (1, 0): ">", (0, 1): "<", (1, 1): "?"}[(int(censored > 0), int(their_censored > 0))]
        their_wins = {s: win_curve(r)[1][-1] for s, r in baseline.items()}
        differences = differences_to(by_seed, baseline, target)
        if differences:
            improvement = statistics.improvement_interval(list(wins.values()), list(their_wins.values()))
    return Row(
        label=label,
        provenance=results[0]["provenance"],
        seeds=len(results),
        stalled=sum(result["status"] == "stalled" for result in results),
        win_rate=float(np.mean(list(wins.values()))),
        win_interval=interval,
        iqm=statistics.iqm(list(wins.values())),
        interval_over=over,
        area=float(np.mean([statistics.area_under(*win_curve(r)) for r in results])),
        rank=None,
        differences=differences,
        improvement=improvement.estimate if improvement else None,
        improvement_interval=(improvement.low, improvement.high) if improvement else None,
        online_win_rate=_mean([result["online_win_rate"] for result in results]),
        queries_to_target=_mean(list(reached.values())) if reached else None,
        censored=censored,
        ratio=ratio,
        ratio_bound=bound,
        cumulative_regret=_mean([regret(result) for result in results]),
        utility=_mean([last(result, "true_utility") for result in results]),
        kl=_mean([last(result, "kl") for result in results]),
        length=_mean([last(result, "length") for result in results]),
        gradient_steps=_mean([result.get("gradient_steps") for result in results]),
        evaluations=_mean([result.get("evaluations") or None for result in results]),
        seconds=float(np.mean([result["seconds"] for result in results])),
        queries=float(np.mean([bought(result) for result in results])),
        checked=checked(results),
        simple_regret=_mean([last(result, "simple_regret") for result in results]),
        length_controlled=_mean([result.get("length_controlled_win_rate") for result in results]),
        true_win_rate=_mean([last(result, "true_win_rate") for result in results]),
        beliefs=_last_beliefs(results),
    )


def ranked(rows: Sequence[Row], results: Mapping[str, Mapping[int, Result]]) -> list[Row]:
    """The rows with ranks for the agents that have seeds enough and follow a paper or are ours; methods rebuilt from
    notes or code are not ranked as the paper's. Without ranks where there is nobody to compare, and without ranks by
    mean where too few seeds are common to all."""
    wins: dict[str, dict[int, float]] = {}
    needed = 0
    for row in rows:
        by_seed = results[row.label]
        needed = SEEDS_NEEDED[next(iter(by_seed.values()))["kind"]]
        if row.provenance != "reconstructed" and row.seeds >= needed:
            wins[row.label] = {seed: float(win_curve(result)[1][-1]) for seed, result in by_seed.items()}
    if len(wins) < 2:
        return list(rows)
    common = set.intersection(*(set(by_seed) for by_seed in wins.values()))
    by_mean = statistics.ranks(wins) if len(common) >= needed else {}
    places = statistics.places(wins, needed=needed)
    return [
        replace(row, rank=by_mean.get(row.label), place=places[row.label].place, tied=places[row.label].tied)
        if row.label in places
        else row
        for row in rows
    ]


def _last_beliefs(results: Sequence[Result]) -> dict[str, float]:
    """Means over seeds of what was found at the last examination, of the names that all seeds know."""
    ends = [{name: values[-1] for name, values in (result.get("beliefs") or {}).items()} for result in results]
    means = {name: _mean([end.get(name) for end in ends]) for name in BELIEFS}
    return {name: value for name, value in means.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
