"""What a sweep chooses: `python -m llm_duel_env.benchmark.tuned tune-pool --results benchmark/results`.

For each agent (and variant) that a tuning suite plays with several values of one setting: the mean over its seeds of
the mean of the learning curve at each value, and the best of them, for the task's recipe. Nothing is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.results import has_win_rate, win_curve
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.benchmark.suite import load_suite
from llm_duel_env.benchmark.suite_entries import slug


@dataclass(frozen=True)
class Choice:
    """What the sweep says of one agent on one task."""

    task: str
    """Environment with its settings, as a folder's name."""
    label: str
    """The agent, or AGENT+VARIANT: the entry of the recipe."""
    means: dict[str, float]
    """By value, as labels have it: mean over seeds of the mean of the learning curve; NaN where a seed is missing."""

    @property
    def best(self) -> str | None:
        """The value with the highest mean; None while one of them is missing."""
        return None if np.isnan(list(self.means.values())).any() else max(self.means, key=self.means.__getitem__)


def choices(runs: Sequence[RunConfig], kept: Kept) -> list[Choice]:
    """What is chosen for each agent of a tuning suite, whose labels end in @VALUE.

    Raises:
        ValueError: a run that sweeps nothing.
    """
    areas: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        label, at, value = run.label.rpartition("@")
        if not at:
            raise ValueError(f"{run.label}: expected a run of a sweep, whose label ends in @VALUE")
        result = kept.result(run)
        known = result is not None and has_win_rate(result)
        area = statistics.area_under(*win_curve(result)) if result is not None and known else float("nan")
        areas[slug(run.env, run.env_kwargs), label][value].append(area)
    return [
        Choice(task, label, {value: float(np.mean(found)) for value, found in by_value.items()})
        for (task, label), by_value in areas.items()
    ]


def lines(found: Sequence[Choice]) -> list[str]:
    """The choices as text: a line for each agent, by task."""
    text: list[str] = []
    for task in dict.fromkeys(one.task for one in found):
        text += ["", f"# {task}"]
        for one in [one for one in found if one.task == task]:
            means = ", ".join(f"{value}: {mean:.3f}" for value, mean in one.means.items())
            values = list(one.means)
            edge = " (at an end of the grid)" if one.best in (values[0], values[-1]) else ""
            text.append(f"{one.label}: {one.best or 'not played yet'}{edge}  # {means}")
    return text[1:]


def main(suite: tyro.conf.Positional[str], results: Path = Path("benchmark/results")) -> None:
    """Prints what a tuning suite chooses for each agent.

    Args:
        suite: a suite that sweeps one setting, e.g. tune-pool.
        results: folder of kept results.
    """
    print("\n".join(lines(choices(load_suite(suite, "runs"), Kept(results)))))


if __name__ == "__main__":
    tyro.cli(main)
