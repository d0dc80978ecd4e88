"""DLMA: direct large language model alignment through self-rewarding contrastive prompts (arXiv 2402.11907).

Reconstructed from the released code. The supervised policy answers each prompt under a good and under a bad instruction,
takes the first answer for the better one, and grades the pair itself: R = [log pi(a1 | good) - log pi(a1 | bad)] - [the
same of a2] is the margin that DPO, under the plain prompt, is asked for. The policy that trains neither answers nor
grades: the release makes all data before it trains (here the same answers are drawn round by round). Where it does both,
it drifts from what the instructions meant until both answers are alike.

No human, and no oracle, says anything: every duel abstains, and no query is ever bought. A run has no budget to spend,
so it ends as *stalled*, after `max_stalled_rounds` rounds (100 unless the run says otherwise), and is scored like that,
at 0 queries; `rounds` should be told the same number. How far training is, which the learning rate follows, is counted
in rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class DLMAConfig(AgentConfig):
    """Defaults are the released code's."""

    beta: float = 0.1
    """Strength of the pull to the reference policy (release: 0.1)."""
    margin_weight: float = 0.2
    """w, how much of the self-reward margin the pair must gain (release: 0.2); 0 is DPO on the policy's own labels."""
    clip: float = 40.0
    """The margin counts up to this, on either side (release: 40)."""
    rounds: int = 100
    """Rounds over which the learning rate falls (ours: those after which a run without a query ends)."""


class DLMA(Agent):
    """Labels its own pairs by the prompts that it wrote them under."""

    Config = DLMAConfig
    paper = "https://arxiv.org/abs/2402.11907"
    provenance = "reconstructed"
    needs = frozenset({"contrast_prompts"})
    kinds = frozenset({"text"})
    config: DLMAConfig

    def __init__(self, task: TaskView, config: DLMAConfig, *, seed: int, budget: int) -> None:
        if config.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {config.rounds}")
        super().__init__(task, config, seed=seed, budget=budget)
        options = {"margin_weight": config.margin_weight, "clip": config.clip}
        self.optimizer = direct_optimizer("dlma", config.beta, options, gives=frozenset({"scores"}))

    @property
    def progress(self) -> float:
        """Share of the rounds played, in [0, 1]."""
        return min(self.round / self.config.rounds, 1.0)

    def under(self, observation: Observation, name: str) -> Observation:
        """The prompts under one of the two instructions, good or bad."""
        assert self.task.condition is not None  # the task provides contrast_prompts
        return self.task.condition(observation, [name] * len(observation["prompt_id"]))

    def act(self, observation: Observation) -> Duels:
        """The start's answer under the good instruction and its answer under the bad; none is sent to the oracle, the
        first is taken to win, and there is no label where both are the same."""
        better = self.policy.sample(self.under(observation, "good"), 1, ("good", self.round), reference=True)
        worse = self.policy.sample(self.under(observation, "bad"), 1, ("bad", self.round), reference=True)
        pair = replace(Candidates.beside(better, worse), observation=observation)
        same = pair.responses[:, 0] == pair.responses[:, 1]
        return Duels(pair, np.zeros(len(same), bool), np.where(same, np.nan, 1).astype(np.float32))

    def self_rewards(self, pair: Candidates) -> np.ndarray:
        """log pi(y | good) - log pi(y | bad) of each response under the start, (M, 2) float32, sums over tokens."""
        plain = replace(pair, reference_log_prob=None)  # what may be stored belongs to the plain prompt
        good, bad = (
            self.policy.reference_log_prob(replace(plain, observation=self.under(pair.observation, name)))
            for name in ("good", "bad")
        )
        return (good - bad).numpy().astype(np.float32)

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of DPO with target margins over the round's pairs, under the plain prompt."""
        scores = self.self_rewards(preferences.pair)
        return self.policy.update(
            self.optimizer, preferences, progress=self.progress, key=("update", self.round), scores=scores
        )
