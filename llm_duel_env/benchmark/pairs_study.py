"""What the suite paper-real shows: `python -m llm_duel_env.benchmark.pairs_study --results benchmark/results`.

Two tables. The first, for each environment: of the labels that each rule bought the share of ties and of flipped ones,
its final win rate, and how much more that is than random pairs', paired by seed. The second, for each correlation of
dissimilarity and utility gap: where dissimilar pairs end with 350 labels, less where random pairs end with all of them,
and the share of their labels that dissimilar pairs need to get as far, read off one learning curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.report.table import markdown_table
from llm_duel_env.benchmark.results import win_curve
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.benchmark.study import BySeed, World, difference, ends, gathered, heading, told_interval
from llm_duel_env.benchmark.suite import load_suite

SUITE = "paper-real"
DISSIMILAR, RANDOM, FEWER = "real", "real-random", "real-350"


def correlation(env_kwargs: Mapping[str, Any]) -> float:
    """The correlation of dissimilarity and utility gap that Synthetic is asked for."""
    return float((env_kwargs.get("task_kwargs") or {}).get("dissimilarity_correlation", 0.0))


def share_of(by_seed: BySeed, kind: str) -> float | None:
    """The share of the labels that were bought that are even, tied or flipped; None where a result does not tell."""
    counts = [(result.get("labels") or {}).get(kind) for result in by_seed.values()]
    bought = sum(int(result["queries"]) for result in by_seed.values())
    return None if None in counts or not bought else sum(count for count in counts if count is not None) / bought


def share_needed(ours: BySeed, theirs: BySeed) -> float | None:
    """The share of their labels after which our mean learning curve stays where their mean curve ends, two marks
    running; None where it never does."""
    some = next(iter(theirs.values()))
    grid = statistics.marks(some["budget"], some["batch"], some.get("eval_every"))
    target = statistics.mean_curve([win_curve(result) for result in theirs.values()], grid)[1][-1]
    ours_mean = statistics.mean_curve([win_curve(result) for result in ours.values()], grid)
    reached = statistics.queries_to_target(*ours_mean, float(target))
    return None if reached is None else reached / some["budget"]


def pairs_table(world: World, by_label: Mapping[str, BySeed]) -> list[str]:
    """The first table, for one environment."""
    rows = []
    for label, by_seed in by_label.items():
        if next(iter(by_seed.values()))["budget"] != _budget(by_label):
            continue
        more = difference(by_seed, by_label[RANDOM]) if RANDOM in by_label and label != RANDOM else None
        shares = [_told(share_of(by_seed, kind), "{:.1%}") for kind in ("even", "flipped")]
        rows.append(
            [label, *shares, f"{np.mean(list(ends(by_seed).values())):.3f}", told_interval(more), str(len(by_seed))]
        )
    headings = ["pairs", "ties", "flipped labels", "final win rate", "less random pairs", "seeds"]
    return [f"## {heading(world)}", "", *markdown_table(headings, rows), ""]


def labels_table(found: Sequence[tuple[World, Mapping[str, BySeed]]]) -> list[str]:
    """The second table, over the environments in which random pairs and few dissimilar ones were played."""
    rows = []
    for (_, env_kwargs), by_label in sorted(found, key=lambda one: correlation(one[0][1])):
        if not {DISSIMILAR, RANDOM, FEWER} <= set(by_label):
            continue
        few = difference(by_label[FEWER], by_label[RANDOM])
        needed = _told(share_needed(by_label[DISSIMILAR], by_label[RANDOM]), "{:.2f}")
        rows.append([f"{correlation(env_kwargs):.1f}", told_interval(few), needed])
    headings = [
        "correlation",
        "350 dissimilar pairs less all random ones",
        "share of labels that dissimilar pairs need",
    ]
    return ["## With 65% fewer labels", "", *markdown_table(headings, rows), ""] if rows else []


def report(runs: Sequence[RunConfig], kept: Kept) -> list[str]:
    """Both tables as Markdown; environments that nothing is kept of are left out."""
    found = [(world, by_label) for world, by_label in gathered(runs, kept) if by_label]
    return [line for world, by_label in found for line in pairs_table(world, by_label)] + labels_table(found)


def _budget(by_label: Mapping[str, BySeed]) -> int:
    """The full budget of an environment."""
    return max(result["budget"] for by_seed in by_label.values() for result in by_seed.values())


def _told(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def main(results: Path = Path("benchmark/results")) -> None:
    """Prints what is kept of the suite paper-real.

    Args:
        results: folder of kept results.
    """
    print("\n".join(report(load_suite(SUITE, "runs"), Kept(results))))


if __name__ == "__main__":
    tyro.cli(main)
