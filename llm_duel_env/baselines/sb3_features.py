"""A finite task as Stable-Baselines3 wants it: one Box of features, one plain action, the environment's reward.

Needs no Stable-Baselines3 itself, so that other libraries of that interface can use it too.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from llm_duel_env.envs.duel_env import DuelEnv
from llm_duel_env.randomness import uniforms, visits
from llm_duel_env.types import Observation

MOST_CANDIDATES = 32
"""K^2 pairs, each an action that must be tried: beyond this the comparison would only show that this is hopeless."""


def feature_space(observation_space: spaces.Dict) -> spaces.Box:
    """The Box of `features` for one prompt of a finite task, (C + K D,) float32.

    Raises:
        ValueError: not a finite task's observations, or more candidates than `MOST_CANDIDATES`.
    """
    if not {"context", "candidates"} <= set(observation_space):
        raise ValueError(
            f"expected a finite task, with context and candidates, got observations of {observation_space}"
        )
    context, candidates = observation_space["context"].shape, observation_space["candidates"].shape
    assert context is not None
    assert candidates is not None
    if candidates[0] > MOST_CANDIDATES:
        raise ValueError(f"expected at most {MOST_CANDIDATES} candidates for Stable-Baselines3, got {candidates[0]}")
    return spaces.Box(-np.inf, np.inf, (context[0] + candidates[0] * candidates[1],), np.float32)


def features(observation: Observation) -> np.ndarray:
    """Context and all candidates in one row per prompt: (M, C) and (M, K, D) -> (M, C + K D) float32."""
    context, candidates = observation["context"], observation["candidates"]
    return np.concatenate([context, candidates.reshape(len(candidates), -1)], axis=1).astype(np.float32)


def action_space(candidates: int, random_opponent: bool) -> spaces.Space:
    """MultiDiscrete([K, K]), both responses, or Discrete(K), one response that meets a random opponent."""
    return spaces.Discrete(candidates) if random_opponent else spaces.MultiDiscrete([candidates, candidates])


def random_opponents(
    seed: int, round_: int, prompt_ids: np.ndarray, actions: np.ndarray, candidates: int
) -> np.ndarray:
    """One of the other K - 1 candidates for each prompt, uniformly: (M,), (M,) -> (M,).

    Drawn by (seed, round, prompt id, visit in this batch) alone.
    """
    ids = np.asarray(prompt_ids, np.int64)
    draws = uniforms(seed, ("sb3", "opponent", round_), (ids << 32) + visits(ids))
    return (actions + 1 + (draws * (candidates - 1)).astype(np.int64)) % candidates


class DuelFeatures(gymnasium.Wrapper):
    """`DuelEnv` on a finite task, with `features` for observations and indices for actions.

    An episode is a run: it is truncated when the budget is spent, and the `reset` with which Stable-Baselines3 answers
    begins another run, so ``learn`` for no more time steps than the budget has queries.

    Args:
        env: a `DuelEnv`; ``gymnasium.make`` puts wrappers around it, which may stay.
        random_opponent: actions are Discrete(K), and the opponent is drawn; else MultiDiscrete([K, K]). An identical
            pair of the latter is a tie that costs no query and has its reward.

    Raises:
        ValueError: the task is not finite, or has more than `MOST_CANDIDATES` candidates.
    """

    def __init__(self, env: gymnasium.Env, *, random_opponent: bool) -> None:
        super().__init__(env)
        if not isinstance(env.unwrapped, DuelEnv) or not isinstance(env.observation_space, spaces.Dict):
            raise ValueError(f"expected a DuelEnv, got {env}")
        self.core = env.unwrapped.core
        self.observation_space = feature_space(env.observation_space)
        responses = self.core.task.response_space
        assert isinstance(responses, spaces.Discrete)  # as on every finite task
        self.candidates = int(responses.n)
        self.random_opponent = random_opponent
        self.action_space = action_space(self.candidates, random_opponent)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts a run."""
        observation, info = self.env.reset(seed=seed, options=options)
        return _row(observation), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Shows a pair: an array of two indices, or one index."""
        core = self.core
        if self.random_opponent:
            assert core.seed is not None, "call reset() first"
            first = np.asarray(action, np.int64).reshape(1)
            second = random_opponents(core.seed, core.round, core.prompt_ids(1), first, self.candidates)
            pair = {"first": first[0], "second": second[0]}
        else:
            pair = {"first": np.int64(action[0]), "second": np.int64(action[1])}
        observation, reward, terminated, truncated, info = self.env.step({**pair, "query": np.int64(1)})
        return _row(observation), float(reward), terminated, truncated, info


def _row(observation: Observation) -> np.ndarray:
    return features({name: np.asarray(observation[name])[None] for name in ("context", "candidates")})[0]
