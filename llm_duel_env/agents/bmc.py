"""BMC: bridging and modeling correlations in pairwise data (arXiv 2408.07471).

Reconstructed from the released code. Bridging: an editor changes the loser as little as it can towards the winner, and
the edited loser stands in the winner's place, so that the pair differs where it matters. Modeling: tokens in which the
two differ weigh more, the more the less likely the policy finds them (`llm_duel_env.agents.losses.bmc`).

The editor is the task's (the paper's is GPT-4). One that knows the annotators' taste, as TinyTLDR's does, tells more
than labels do, so the agent stands in a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

if TYPE_CHECKING:  # it brings transformers with it
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy


@dataclass(frozen=True)
class BMCConfig(AgentConfig):
    """Defaults are the released code's (question answering)."""

    bridge: bool = True
    """Whether the edited loser stands for the winner (paper: it does)."""
    delta: float = 3.0
    """Bounds what a differing token weighs more, 1 / pi (release: 3.0; 1.5 for Llama-3-8B); 0 is DPO."""
    beta: float = 0.05
    """Strength of the pull to the reference policy (release: 0.05; 0.01 for Llama-3-8B)."""


class BMC(Agent):
    """Two samples of the present policy duel; the policy learns from the bridge between them."""

    Config = BMCConfig
    paper = "https://arxiv.org/abs/2408.07471"
    provenance = "reconstructed"
    needs = frozenset({"editor"})
    kinds = frozenset({"text"})
    config: BMCConfig

    def __init__(self, task: TaskView, config: BMCConfig, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer("bmc", config.beta, {"delta": config.delta})

    def act(self, observation: Observation) -> Duels:
        """Two independent samples for each prompt."""
        return self.policy.sample(observation, 2, ("act", self.round)).first_two()

    def bridged(self, ranked: Candidates) -> Candidates:
        """Pairs (B, 2) with the winner replaced by the loser as the editor changes it; those it leaves as they are, for
        which there is nothing to learn, are left out."""
        assert self.task.edit is not None  # the task provides an editor
        policy = cast("LanguageModelPolicy", self.policy)  # as on every text task
        texts = np.empty((ranked.shape[0], 1), object)
        for row, (prompt, (winner, loser)) in enumerate(zip(ranked.observation["prompt"], ranked.responses)):
            texts[row, 0] = self.task.edit(prompt, loser, winner)
        changed = texts[:, 0] != ranked.responses[:, 1]
        kept = ranked.rows(changed)
        if not changed.any():
            return kept
        losers = kept.take(np.ones((int(changed.sum()), 1), np.int64))
        return Candidates.beside(policy.from_text(kept.observation, texts[changed]), losers)

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of token-weighted DPO over the round's bridged pairs."""
        ranked = preferences.decided().ordered()
        count = ranked.shape[0]
        if self.config.bridge and count:
            ranked = self.bridged(ranked)
        if not ranked.shape[0]:
            return {}
        learnt = self.policy.learn(self.optimizer, ranked, progress=self.progress, key=("update", self.round))
        return {"edited": ranked.shape[0] / count} | learnt
