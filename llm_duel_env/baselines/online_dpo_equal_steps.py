"""Online DPO that takes as many gradient steps per query as SEA does.

SEA trains its policy on free labels too: with a share gamma of labels bought, a budget of queries lasts for 1 / gamma
times as many policy updates. Curves over queries hide that; this control has it without SEA's labels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llm_duel_env.agents.online_dpo import OnlineDPO, OnlineDPOConfig
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Metrics, Preferences

SUMMED = {"gradient_steps", "pairs"}


@dataclass(frozen=True)
class EqualStepsConfig(OnlineDPOConfig):
    """Online DPO's settings, and SEA's that set its number of updates."""

    oracle_share: float = 0.7
    """gamma of the SEA that is matched: an update for every gamma M queries, M being the prompts of a round
    (SEA's: 0.7)."""
    burn_in: float = 0.02
    """Share of the query budget in which SEA, and so this agent, takes an update for every M queries (SEA's: 0.02)."""


class OnlineDPOEqualSteps(OnlineDPO):
    """Online DPO that learns from some rounds' pairs more than once."""

    Config = EqualStepsConfig
    provenance = "ours"
    config: EqualStepsConfig

    def __init__(self, task: TaskView, config: EqualStepsConfig, *, seed: int, budget: int) -> None:
        if not 0 < config.oracle_share <= 1:
            raise ValueError(f"oracle_share: expected a share in (0, 1], got {config.oracle_share}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.owed = 0.0
        """Updates that SEA would have taken for the queries so far, less those taken."""

    def learn(self, preferences: Preferences) -> Metrics:
        """One update on the round's labelled pairs, and as many more, each with a shuffle of its own, as are owed.

        Metrics are the last update's; ``gradient_steps`` and ``pairs`` are summed.
        """
        first, second = preferences.pair.responses.T
        asked = (preferences.from_oracle & (first != second)).mean()
        share = self.config.oracle_share if self.queries >= self.config.burn_in * self.budget else 1.0
        self.owed += float(asked) / share  # SEA's update costs share * M queries, this round asked * M
        updates = max(int(self.owed), 1)
        self.owed -= updates
        metrics: Metrics = {}
        for repeat in range(updates):
            key: tuple[int | str, ...] = ("update", self.round) if repeat == 0 else ("update", self.round, repeat)
            learnt = self.policy.update(self.optimizer, preferences, progress=self.progress, key=key)
            summed = {name: learnt[name] + metrics.get(name, 0.0) for name in SUMMED & set(learnt)}
            metrics = learnt | summed
        return metrics

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the updates owed."""
        super().save(folder)
        (folder / "owed.json").write_text(json.dumps(self.owed))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.owed = json.loads((folder / "owed.json").read_text())
