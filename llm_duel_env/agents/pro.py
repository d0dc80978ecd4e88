"""PRO: preference ranking optimization (arXiv 2306.17492): learn from a whole ranking, list-wise.

Reconstructed from the released code. A ranking of n responses to a prompt comes from n - 1 duels, each charged: the
prompt is kept for n - 1 rounds, in which each response meets the next one. The loss needs the responses' scores (their
gaps are its temperatures), and so the ranking is by score too, as in the released data; the duels are how the scores are
bought, and their labels are not looked at. The policy learns when all rankings of a round are complete.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.stored import load_candidates, save_candidates
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class PROConfig(AgentConfig):
    """Defaults are the released code's."""

    length: int = 3
    """n, responses per ranking (release: 2 and 3, and longer ones)."""
    sft_weight: float = 0.05
    """Weight of the supervised term on the best response, times (n - 1)^2 (release: 0.05)."""


class PRO(Agent):
    """Ranks n samples of the present policy for each prompt; each is to beat all below it. There is no reference."""

    Config = PROConfig
    paper = "https://arxiv.org/abs/2306.17492"
    provenance = "reconstructed"
    needs = frozenset({"scores"})
    config: PROConfig

    def __init__(self, task: TaskView, config: PROConfig, *, seed: int, budget: int) -> None:
        if config.length < 2:
            raise ValueError(f"length: expected a ranking of at least 2 responses, got {config.length}")
        super().__init__(task, config, seed=seed, budget=budget)
        gives = frozenset({"scores", "ranking"})
        self.optimizer = direct_optimizer("pro", 1.0, {"sft_weight": config.sft_weight}, gives=gives)
        self.candidates: Candidates | None = None
        """(M, n) of the rankings under way; None between them."""
        self.scores = np.empty((0, config.length), np.float32)
        """(M, n) of what is known of their scores, NaN elsewhere."""

    @property
    def stage(self) -> int:
        """How many of the n - 1 duels of each ranking are done."""
        return self.round % (self.config.length - 1)

    def act(self, observation: Observation) -> Duels:
        """The duel of the next two responses of each ranking; the prompts are kept until the last one.

        Raises:
            ValueError: the environment did not keep the prompts.
        """
        n = self.config.length
        if self.stage == 0:
            self.candidates = self.policy.sample(observation, n, ("act", self.round))
            self.scores = np.full(self.candidates.shape, np.nan, np.float32)
        assert self.candidates is not None
        kept = self.candidates.observation["prompt_id"]
        if not np.array_equal(kept, observation["prompt_id"]):
            raise ValueError(f"expected the prompts {kept.tolist()} again, got {observation['prompt_id'].tolist()}")
        place = np.full(len(self.scores), self.stage)
        duels = self.candidates.duel(place, place + 1)
        return replace(duels, again=np.full(len(place), self.stage < n - 2))

    def learn(self, preferences: Preferences) -> Metrics:
        """Notes the scores; after the last duel, one pass of the ranking loss over the complete rankings."""
        if preferences.scores is None or self.candidates is None:
            lacks = "scores" if preferences.scores is None else "act before"
            raise ValueError(f"PRO: expected scores of the duels of its last act, got no {lacks}")
        columns = slice(self.stage, self.stage + 2)
        known = np.isfinite(preferences.scores)
        self.scores[:, columns] = np.where(known, preferences.scores, self.scores[:, columns])
        if self.stage < self.config.length - 2:
            return {}
        ranked, scores = self.rankings()
        self.candidates = None
        if not ranked.shape[0]:
            return {}
        gap = {"score_gap": float((scores[:, 0] - scores[:, -1]).mean())}
        key = ("update", self.round)
        return gap | self.policy.learn(self.optimizer, ranked, progress=self.progress, key=key, scores=scores)

    def rankings(self) -> tuple[Candidates, np.ndarray]:
        """The complete rankings, (B, n) best first, and their scores. A response has its twins' score, as the oracle is
        not asked about a response against itself; a ranking that the end of the budget has cut is left out."""
        assert self.candidates is not None
        responses, scores = self.candidates.responses, self.scores.copy()
        same = responses[:, :, None] == responses[:, None, :]
        for column in range(scores.shape[1]):
            scores = np.where(same[:, column] & np.isnan(scores), scores[:, [column]], scores)
        complete = np.asarray(np.isfinite(scores).all(axis=1))
        order = np.argsort(-scores[complete], axis=1, kind="stable")
        return self.candidates.rows(complete).take(order), np.take_along_axis(scores[complete], order, axis=1)

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the rankings under way."""
        super().save(folder)
        if self.candidates is not None:
            save_candidates(self.candidates, folder / "rankings", scores=self.scores)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.candidates = None
        if (folder / "rankings.json").exists():
            self.candidates, arrays = load_candidates(folder / "rankings", self.task.observe)
            self.scores = arrays["scores"]
