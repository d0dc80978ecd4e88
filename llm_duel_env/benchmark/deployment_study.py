"""What a run of SEA knows and does not deploy: `python -m llm_duel_env.benchmark.deployment_study RUN_FOLDER ...`.

The policy is deployed greedily. Beside the win rate of its greedy responses stand those of its samples, of the best of
ten samples in the eyes of its own ensemble, and of the best of twenty by the oracle's. Where the ensemble's choice wins
much more often than the greedy response, what is missing is not knowledge: it has not reached the policy's mode. And
how often the mode is in the pairs that teach: duels for the oracle, and those that the ensemble labels itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from llm_duel_env.benchmark.report.table import markdown_table
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.session import Session
from llm_duel_env.metrics import beats_reference, hard

PROMPTS, SAMPLES, BEST_OF = 256, 20, 10
COLUMNS = {
    "greedy": "the deployed response",
    "samples": f"{SAMPLES} samples, their mean",
    "ensemble's choice": f"the best of {BEST_OF} samples by the ensemble's mean",
    "best sample": f"the best of the {SAMPLES} samples by the oracle",
    "mode's share": "samples that are the greedy response",
    "better samples": "samples that the oracle finds better than the greedy response",
    "mode in bought": "next duels for the oracle that hold the greedy response",
    "mode in synthetic": "next duels for the ensemble that hold it",
}


def examine(folder: Path) -> dict[str, float]:
    """The figures of `COLUMNS` for the last checkpoint of a run of SEA or its kin.

    Raises:
        ValueError: no run, no checkpoint, or an agent of another kind.
    """
    checkpoint = RunFolder(folder).saved()
    if checkpoint is None:
        raise ValueError(f"{folder}: expected a run with a checkpoint, found none")
    with contextlib.ExitStack() as stack:
        elsewhere = stack.enter_context(tempfile.TemporaryDirectory())  # nothing is written to the run
        config = dataclasses.replace(RunConfig.read(folder), folder=elsewhere)
        session = stack.enter_context(Session(config, RunFolder(elsewhere)))
        agent: Any = session.agent
        if not hasattr(agent.config, "best_of_n"):
            raise ValueError(f"{folder}: expected an agent with best_of_n (sea and its kin), got {config.agent}")
        agent.load(checkpoint / "agent")
        return _measure(agent, session.core.task)


def _measure(agent: Any, task: Any) -> dict[str, float]:
    observation = task.observe(task.heldout_ids[:PROMPTS])

    def wins(responses: np.ndarray) -> np.ndarray:
        return hard(beats_reference(task, observation, responses))

    agent.config = dataclasses.replace(agent.config, best_of_n=0)
    greedy = agent.respond(observation)
    duels = agent.act(observation)
    holds = (duels.pair.responses == greedy[:, None]).any(axis=1)
    agent.config = dataclasses.replace(agent.config, best_of_n=BEST_OF)
    chosen = agent.respond(observation)
    samples = agent.policy.sample(observation, SAMPLES, ("deployment study",)).responses  # (M, N)
    utility = np.column_stack([task.oracle.utility(observation, column) for column in samples.T])
    best = samples[np.arange(len(samples)), utility.argmax(axis=1)]
    return {
        "greedy": float(wins(greedy).mean()),
        "samples": float(np.mean([wins(column).mean() for column in samples.T])),
        "ensemble's choice": float(wins(chosen).mean()),
        "best sample": float(wins(best).mean()),
        "mode's share": float((samples == greedy[:, None]).mean()),
        "better samples": float((utility > task.oracle.utility(observation, greedy)[:, None]).mean()),
        "mode in bought": float(holds[duels.query].mean()) if duels.query.any() else float("nan"),
        "mode in synthetic": float(holds[~duels.query].mean()) if (~duels.query).any() else float("nan"),
    }


def table(found: Sequence[tuple[str, dict[str, float]]]) -> list[str]:
    """Lines of Markdown: a row for each run, in the order of its greedy win rate, and what the columns are."""
    ordered = sorted(found, key=lambda item: item[1]["greedy"])
    rows = [[name, *(f"{figures[column]:.3f}" for column in COLUMNS)] for name, figures in ordered]
    told = "; ".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items())
    return [*markdown_table(["run", *COLUMNS], rows), "", f"On {PROMPTS} held-out prompts. {told}."]


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Prints the table.

    Args:
        runs: folders of finished runs.
    """
    print("\n".join(table([(f"{path.parent.name}/{path.name}", examine(path)) for path in runs])))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
