"""Reward-augmented DPO (arXiv 2410.08067): prompts say how good a response is wanted; each pair teaches two goals.

Reconstructed from notes and the released code. Under the goal that the winner's score is, the winner is better; under
the loser's, the *loser* is: N pairs become 2 N, and the policy learns what a score means instead of unlearning decent
responses that lost. It deploys under the highest goal. (One variant of the release sets the loser's goal without
swapping the pair; here pairs are swapped.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

HIGHEST = 10
"""Goals are 0 to this."""


@dataclass(frozen=True)
class RewardAugmentedDPOConfig(AgentConfig):
    """Defaults are the released configuration's (Qwen2-7B)."""

    scores: tuple[float, float] = (0.0, 10.0)
    """The scores that are goal 0 and goal 10; those between are rounded, those beyond are cut off (the paper's data has
    scores of 1 to 10)."""
    loss: str = "cdpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo; release: with smoothing)."""
    beta: float = 0.01
    """Strength of the pull to the reference policy, under the same goal (release: 0.01)."""
    loss_options: dict = field(default_factory=lambda: {"smoothing": 0.3})
    """The loss's own settings by name (release: label smoothing 0.3)."""


class RewardAugmentedDPO(Agent):
    """Two samples under the highest goal duel; the pair is learnt under the goal of each side's score."""

    Config = RewardAugmentedDPOConfig
    paper = "https://arxiv.org/abs/2410.08067"
    provenance = "reconstructed"
    needs = frozenset({"scores", "goal_prompts"})
    kinds = frozenset({"text"})
    config: RewardAugmentedDPOConfig

    def __init__(self, task: TaskView, config: RewardAugmentedDPOConfig, *, seed: int, budget: int) -> None:
        if not config.scores[0] < config.scores[1]:
            raise ValueError(f"scores: expected that of goal 0 below that of goal {HIGHEST}, got {config.scores}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)

    def act(self, observation: Observation) -> Duels:
        """Two independent samples of the policy as it is deployed."""
        pairs = self.policy.sample(self.best(observation), 2, ("act", self.round))
        return replace(pairs, observation=observation).first_two()

    def respond(self, observation: Observation) -> np.ndarray:
        """The policy's response under the highest goal, (M,)."""
        return super().respond(self.best(observation))

    def diagnose(self, observation: Observation) -> Metrics:
        """See `Agent.diagnose`, under the highest goal."""
        return super().diagnose(self.best(observation))

    def best(self, observation: Observation) -> Observation:
        """The prompts under the highest goal."""
        return self.under(observation, np.full(len(observation["prompt_id"]), HIGHEST))

    def under(self, observation: Observation, goals: np.ndarray) -> Observation:
        """The prompts, each under its goal (M,)."""
        assert self.task.condition is not None  # the task provides goal_prompts
        return self.task.condition(observation, [f"goal_{goal}" for goal in goals])

    def goals(self, scores: np.ndarray) -> np.ndarray:
        """The goal that each score is, int64 in 0 .. 10, of any shape."""
        low, high = self.config.scores
        return np.clip(np.rint(HIGHEST * (scores - low) / (high - low)), 0, HIGHEST).astype(np.int64)

    def augmented(self, preferences: Preferences) -> Candidates:
        """The decided pairs under their goals, (B, 2), the one to prefer first.

        A label that contradicts the scores is left out (as in the release), and the swapped pair where both sides are
        of one goal, which would contradict the other.
        """
        decided = preferences.decided()
        if decided.scores is None:
            raise ValueError("reward-augmented DPO learns from scores, and got none")
        scores = np.where(decided.first_wins[:, None] == 1, decided.scores, decided.scores[:, ::-1])
        agree = scores[:, 0] >= scores[:, 1]
        pairs, goals = decided.ordered().rows(agree), self.goals(scores[agree])
        apart = goals[:, 0] != goals[:, 1]
        swapped = pairs.rows(apart).take(np.tile([1, 0], (int(apart.sum()), 1)))
        return Candidates.stack(
            [
                replace(pairs, observation=self.under(pairs.observation, goals[:, 0])),
                replace(swapped, observation=self.under(swapped.observation, goals[apart, 1])),
            ]
        )

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer over the augmented pairs, shuffled together."""
        ranked = self.augmented(preferences)
        if not ranked.shape[0]:
            return {}
        return self.policy.learn(self.optimizer, ranked, progress=self.progress, key=("update", self.round))
