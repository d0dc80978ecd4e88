"""Plays a run's first rounds in a folder that is thrown away, and counts what a round asks of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.session import Session

ROUNDS = 2
"""At least: the second one acts by what the first has learnt."""


@dataclass
class Counts:
    """What was seen."""

    kind: str = ""
    """Of the task: finite or text."""
    view: Any = None
    """What the agent may know of the task."""
    prompts: int = 1
    """Of a round."""
    candidates: int = 0
    """Most responses drawn at a time for a prompt."""
    own: float = 0.0
    """Responses drawn from the policy for a prompt of a round, in the mean."""
    reference: float = 0.0
    """Those drawn from the reference."""
    ranked: int = 2
    """Most responses of a prompt that were learnt from together."""
    rounds: int = 0
    """Rounds played."""
    gradient_steps: int = 0
    """In all of them."""
    longest_prompt: int = 0
    """Tokens of the longest prompt that was learnt from; 0 on finite tasks."""
    longest_response: int = 0
    """Tokens of the longest response that was."""


def rehearse(config: RunConfig) -> Counts:
    """Evaluates, plays rounds and saves; then loads what was saved, and compares.

    Raises:
        ValueError, RuntimeError: whatever of it fails; or the loaded run answers differently.
    """
    folder = RunFolder(config.folder)
    folder.path.mkdir(parents=True)
    counts = Counts(prompts=config.batch)
    with Session(config, folder) as session:
        counts.kind, counts.view = session.core.task.kind, session.core.task.view()
        session.start()
        _watch(session.agent.policy, counts)
        # Some agents learn at the end of an iteration only: the budget has several.
        while counts.rounds < ROUNDS or not (session.over or session.sums["gradient_steps"]):
            session.play_round()
            counts.rounds += 1
        late = session.agent.policy.settle().get("gradient_steps", 0)
        counts.own, counts.reference = counts.own / counts.rounds, counts.reference / counts.rounds
        counts.gradient_steps = int(session.sums["gradient_steps"] + late)
        session.save()
        observation = session.core.task.observe(session.heldout)
        answers, queries = session.agent.respond(observation), session.queries
    with Session(config, folder) as session:
        session.start()
        again = session.agent.respond(observation)
        if session.queries != queries or not np.array_equal(answers, again):
            raise RuntimeError("a saved run was loaded and answers differently from the one that was saved")
    return counts


def _watch(policy: Any, counts: Counts) -> None:
    """Has the policy's own methods count on their way."""
    sample, learn = policy.sample, policy.learn

    def counting_sample(observation: Any, n: int, key: Any, **how: Any) -> Any:
        drawn = sample(observation, n, key, **how)
        each = n * drawn.shape[0] / counts.prompts
        counts.candidates = max(counts.candidates, n)
        if how.get("reference"):
            counts.reference += each
        else:
            counts.own += each
        return drawn

    def counting_learn(loss: Any, ranked: Any, **how: Any) -> Any:
        extra = 1 if how.get("bonus") is not None else 0
        counts.ranked = max(counts.ranked, ranked.shape[1] + extra)
        if ranked.lengths is not None:
            counts.longest_response = max(counts.longest_response, int(ranked.lengths.max()))
            prompts = policy.tokens.prompts(ranked.observation["prompt"])
            counts.longest_prompt = max(counts.longest_prompt, *map(len, prompts))
        return learn(loss, ranked, **how)

    policy.sample, policy.learn = counting_sample, counting_learn
