"""OPTune: efficient online preference tuning (arXiv 2406.07657): regenerate where there is most room, keep the rest.

Reconstructed from the abstract and notes. When a prompt comes round again, its pair is generated and labelled anew only
if it is among the share rho of the round's known prompts with the least reward; the others train on the pair and the
label that they have, which costs neither tokens nor a query. Pairs are learnt with DPO whose weight grows with the
reward gap.

A prompt must come twice for anything to be kept: where the budget ends before the training prompts come round again,
all pairs are new and this is weighted online DPO. The off-policy share grows as rho falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.stored import load_candidates, save_candidates
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences, rows_of


@dataclass(frozen=True)
class OPTuneConfig(AgentConfig):
    """The paper's constants could not be confirmed."""

    regenerated: float = 0.5
    """rho, the share of the known prompts of a round that are generated and labelled anew, in (0, 1] (notes: the
    results depend on it little)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (as online DPO's)."""
    beta2: float = 1.0
    """How fast a pair's weight, sigmoid(beta2 * (r_w - r_l)), grows with its reward gap (ours)."""


class OPTune(Agent):
    """Online DPO that spends generations and queries on the prompts it does worst on."""

    Config = OPTuneConfig
    paper = "https://arxiv.org/abs/2406.07657"
    provenance = "reconstructed"
    needs = frozenset({"scores"})
    config: OPTuneConfig

    def __init__(self, task: TaskView, config: OPTuneConfig, *, seed: int, budget: int) -> None:
        if not 0 < config.regenerated <= 1:
            raise ValueError(f"regenerated: expected a share in (0, 1], got {config.regenerated}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer("optune", config.beta, {"beta2": config.beta2}, gives=self.needs)
        self.memory: dict[int, Preferences] = {}
        """The pair, label and scores of each prompt that was labelled, one row each."""
        self._fresh = np.empty(0, bool)  # which pairs of the last `act` are new

    def act(self, observation: Observation) -> Duels:
        """New pairs, sent to the oracle, for unknown prompts and for the known ones with the least reward; the others
        abstain with the pair and the label that they have."""
        ids = observation["prompt_id"].tolist()
        fresh = self.choose(np.array([self.reward(i) for i in ids]))
        parts = [self.policy.sample(rows_of(observation, fresh), 2, ("act", self.round))]
        kept = [self.memory[i] for i, new in zip(ids, fresh) if not new]
        parts += [known.pair for known in kept]
        place = np.empty(len(ids), np.int64)
        place[np.concatenate([np.flatnonzero(fresh), np.flatnonzero(~fresh)])] = np.arange(len(ids))
        labels = np.full(len(ids), np.nan, np.float32)
        labels[~fresh] = [known.first_wins[0] for known in kept]
        self._fresh = fresh
        return Duels(Candidates.stack(parts).rows(place), fresh, labels)

    def reward(self, prompt_id: int) -> float:
        """The mean score of a prompt's present pair; NaN where it has none."""
        known = self.memory.get(prompt_id)
        return math.nan if known is None or known.scores is None else float(known.scores.mean())

    def choose(self, rewards: np.ndarray) -> np.ndarray:
        """Which of M prompts get a new pair, (M,) bool: the unknown (NaN), and of the others the share `regenerated`,
        rounded up, with the least reward."""
        known = ~np.isnan(rewards)
        fresh = ~known
        count = math.ceil(self.config.regenerated * int(known.sum()) - 1e-9)
        fresh[np.argsort(rewards, kind="stable")[:count]] = True  # NaN is sorted last
        return fresh

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of weighted DPO over new and kept pairs; the new ones are remembered."""
        if preferences.scores is None:
            raise ValueError("OPTune learns from scores, and got none")
        scores = preferences.scores.copy()
        for row in np.flatnonzero(~self._fresh):
            scores[row] = self.memory[int(preferences.pair.observation["prompt_id"][row])].scores
        for row in np.flatnonzero(preferences.from_oracle & np.isfinite(preferences.scores).all(axis=1)):
            prompt = int(preferences.pair.observation["prompt_id"][row])
            self.memory[prompt] = preferences.rows(np.array([row]))
        learnt = self.policy.update(
            self.optimizer, preferences, progress=self.progress, key=("update", self.round), scores=scores
        )
        return {"regenerated_share": float(self._fresh.mean()), "known_prompts": float(len(self.memory))} | learnt

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the pairs."""
        super().save(folder)
        if self.memory:
            known = Preferences.stack(list(self.memory.values()))
            assert known.scores is not None
            save_candidates(known.pair, folder / "memory", first_wins=known.first_wins, scores=known.scores)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.memory = {}
        if not (folder / "memory.json").exists():
            return
        pairs, arrays = load_candidates(folder / "memory", self.task.observe)
        labelled = np.ones(len(pairs.responses), bool)
        known = Preferences(pairs, arrays["first_wins"], labelled, scores=arrays["scores"])
        for row, prompt in enumerate(pairs.observation["prompt_id"].tolist()):
            self.memory[prompt] = known.rows(np.array([row]))
