"""VPO: value-incentivized preference optimization (arXiv 2405.19320): optimism online, pessimism offline, by one sign.

The paper regularises the reward's likelihood by the value of its best policy, times a sign; with the reward written
as a log-ratio, and its free shift fixed by a calibration policy, that is the direct loss plus
    sign alpha beta mean (log pi - log ref)(y_cal),    sign + online, - offline.
Reconstructed: the principle is the abstract's, the direct loss is recalled, and the constants are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer, vpo
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class VPOConfig(AgentConfig):
    """The paper's constants could not be confirmed; beta is DPO's usual one."""

    mode: str = "online"
    """online: samples of the policy duel, and the calibration responses, samples of the reference, become less likely
    (optimism). offline: samples of the reference duel, whatever the policy has learnt, and the calibration responses,
    the duels' winners, become more likely (pessimism)."""
    alpha: float = 1e-4
    """Weight of the term, times beta (paper: unconfirmed; alpha beta is 1e-5 here, as in XPO and SELM)."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class VPO(Agent):
    """Online or offline DPO with a term on calibration responses that is optimistic or pessimistic."""

    Config = VPOConfig
    paper = "https://arxiv.org/abs/2405.19320"
    provenance = "reconstructed"
    config: VPOConfig

    def __init__(self, task: TaskView, config: VPOConfig, *, seed: int, budget: int) -> None:
        if config.mode not in ("online", "offline"):
            raise ValueError(f"mode: expected online or offline, got {config.mode!r}")
        super().__init__(task, config, seed=seed, budget=budget)
        mode: Literal["online", "offline"] = "online" if config.mode == "online" else "offline"
        plain = direct_optimizer(config.loss, config.beta, config.loss_options)
        self.loss = vpo(plain, config.alpha, config.beta, mode)
        self._calibration: Candidates | None = None  # of the last `act`, online

    def act(self, observation: Observation) -> Duels:
        """Two samples of the policy, with a calibration sample of the reference that is not shown; offline two samples
        of the reference."""
        key = ("act", self.round)
        if self.config.mode == "offline":
            pair = self.policy.sample(observation, 2, key, reference=True)
            return pair.first_two().noted("two samples of the reference policy")
        if self.loss.weight:
            self._calibration = self.policy.sample(observation, 1, ("calibration", self.round), reference=True)
        return self.policy.sample(observation, 2, key).first_two().noted("two samples of the present policy")

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer with the calibration term over the round's labelled pairs."""
        bonus = self._calibration
        if self.config.mode == "offline" and self.loss.weight:
            winner = np.where(preferences.first_wins == 0, 1, 0)  # where nobody won the row is left out
            bonus = preferences.pair.take(winner[:, None])
        key = ("update", self.round)
        return self.policy.update(self.loss, preferences, progress=self.progress, key=key, bonus=bonus)
