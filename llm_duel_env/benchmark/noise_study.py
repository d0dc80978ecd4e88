"""What the suite noise shows: `python -m llm_duel_env.benchmark.noise_study --results benchmark/results`.

Three tables over its worlds, which are one task under different noise of the labels: every agent's final win rate; what
that is less online DPO's in the same world; and what it is less the agent's own without the noise. Differences are
paired by seed. A last row of the first tells how much of the agents' order is left: Spearman's rank correlation
with the first world's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import spearmanr

from llm_duel_env.benchmark.report.table import markdown_table
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.benchmark.study import World, difference, ends, gathered, heading, told_interval
from llm_duel_env.benchmark.suite import load_suite

SUITE = "noise"
BASE = "online_dpo"
NOT_LEARNING = "uniform"
"""Left out of the comparison of orders, where it would be last whatever happens."""


def name_of(world: World) -> str:
    """A world in two words, by the setting that makes its noise; other settings as they stand."""
    _, env_kwargs = world
    match env_kwargs:
        case {"flip_rate": rate, **rest} if not rest:
            return f"{rate:.0%} flipped"
        case {"feedback": feedback, **rest} if not rest:
            return str(feedback)
        case {"task_kwargs": {"preferences": preferences, **others}, **rest} if not rest and not others:
            return str(preferences)
    return heading(world) if env_kwargs else "no flips"


def same_order(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """Spearman's rank correlation of two worlds' final win rates, over the agents that both have and that learn.

    None for fewer than three of them.
    """
    common = sorted((set(ours) & set(theirs)) - {NOT_LEARNING})
    if len(common) < 3:
        return None
    return float(spearmanr([ours[label] for label in common], [theirs[label] for label in common]).statistic)


def report(runs: Sequence[RunConfig], kept: Kept) -> list[str]:
    """The three tables as Markdown, the worlds in the suite's order; those that nothing is kept of are left out."""
    found = [(name_of(world), by_label) for world, by_label in gathered(runs, kept) if by_label]
    if not found:
        return [f"nothing is kept of the suite {SUITE}"]
    means = [
        {label: float(np.mean(list(ends(by).values()))) for label, by in by_label.items()} for _, by_label in found
    ]
    most = max(len(by_seed) for _, by_label in found for by_seed in by_label.values())
    labels = sorted({label for mean in means for label in mean}, key=lambda label: -means[0].get(label, 0.0))

    def table(title: str, cell: Callable[[int, str], str], *more: list[str]) -> list[str]:
        rows = [[label, *(cell(place, label) for place in range(len(found)))] for label in labels]
        return [f"## {title}", "", *markdown_table(["agent", *(name for name, _ in found)], [*rows, *more]), ""]

    def mean_of(place: int, label: str) -> str:
        seeds = len(found[place][1].get(label, ()))
        few = f" ({seeds} of {most})" if 0 < seeds < most else ""
        return _number(means[place].get(label)) + few

    def less(place: int, label: str, theirs: tuple[int, str]) -> str:
        ours, other = found[place][1].get(label), found[theirs[0]][1].get(theirs[1])
        return told_interval(difference(ours, other)) if ours and other and (place, label) != theirs else "–"

    order = ["the same order", *(_number(same_order(mean, means[0])) for mean in means)]
    return [
        *table("Final offline win rate", mean_of, order),
        *table("Less online DPO in the same world", lambda place, label: less(place, label, (place, BASE))),
        *table(f"Less the agent's own under: {found[0][0]}", lambda place, label: less(place, label, (0, label))),
        f"Means over {most} seeds, where no fewer are said; brackets are 95% bootstrap intervals of differences, "
        "paired by seed.",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(results: Path = Path("benchmark/results")) -> None:
    """Prints what is kept of the suite noise.

    Args:
        results: folder of kept results.
    """
    print("\n".join(report(load_suite(SUITE, "runs"), Kept(results))))


if __name__ == "__main__":
    tyro.cli(main)
