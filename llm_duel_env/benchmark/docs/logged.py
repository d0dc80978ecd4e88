"""Which metrics an agent logs: found by letting it play a few rounds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.run_config import task_of
from llm_duel_env.benchmark.session import within_budget
from llm_duel_env.envs.vector_env import DuelVectorEnv

FINITE, TEXT = "duel/Synthetic-v0", "duel/TinyTLDR-v0"
TASKS: dict[str, dict[str, Any]] = {
    FINITE: {"task_kwargs": {"candidates": 6, "train_prompts": 16, "heldout_prompts": 4}},
    TEXT: {},
}
"""The environments that pages speak of, in a small form."""
KINDS = {FINITE: "finite", TEXT: "text"}
SMALL = {
    "candidates": 3,
    "best_of": 2,
    "burn_in": 0.0,
    "epochs": 1,
    "entropy_samples": 2,
    "reward_model": {"start": 2, "members": 2, "hidden": 4, "steps": 1},
}
"""Settings that make rounds cheap, for the agents that have them."""
ROUNDS, BATCH = 3, 2
"""SELM learns in every third round, and a ranking of three takes two."""
BUDGET = 8


def envs_of(name: str) -> list[str]:
    """The environments of `TASKS` that an agent plays: it knows the kind, and the task provides what it needs."""
    agent = load_agent(name)
    return [e for e in TASKS if KINDS[e] in agent.kinds and agent.needs - {"reward"} <= _task(e).view().provides]


def logged(name: str, env: str, **overrides: Any) -> set[str]:
    """The names of the metrics of a few rounds and of an evaluation.

    Raises:
        MissingExtraError: the agent needs a package that is not installed.
    """
    agent_class, task = load_agent(name), _task(env)
    known = {field.name for field in dataclasses.fields(agent_class.Config)}
    small = {key: value for key, value in SMALL.items() if key in known}
    told = {**recipe_of(env, name, {}), **small, "policy.passes": 1, "policy.encoder": "policy", **overrides}
    played = DuelVectorEnv(BATCH, task=task, budget=BUDGET, scores="scores" in agent_class.needs)
    agent = agent_class(task.view(), agent_class.configure(told), seed=0, budget=BUDGET)
    observation, _ = played.reset(seed=0)
    agent.prepare(task.view())
    found: set[str] = set()
    for _ in range(ROUNDS):
        duels = within_budget(agent.act(observation), BUDGET - int(played.query_count))
        observation, reward, _, _, info = played.step(duels.action())
        found |= set(agent.update(duels.judged(info["preference"], **agent.told(reward, info))))
    return found | set(agent.diagnose(task.observe(task.heldout_ids[:BATCH])))


@functools.cache
def _task(env: str) -> Any:
    """One task for all agents: tasks do not change."""
    return task_of(env, TASKS[env])
