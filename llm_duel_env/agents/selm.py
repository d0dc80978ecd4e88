"""SELM: self-exploring language models (arXiv 2405.19332, Algorithm 1 and eq. 4.2).

Of the policy's greedy response and two others the best and the worst are the pair to learn from, and the direct loss
gets + alpha beta mean (log pi - log ref)(greedy response), whatever its rank. The reference is the previous iterate.

The paper ranks {greedy response, chosen, rejected}, the latter two of an offline data set, by a reward model. Online
there is neither: the two others are samples of the policy, and the ranking costs duels. The samples meet first, then
the greedy response and the winner; only where both others lost to the same response do they meet too. So two or three
queries buy one pair, in three rounds about the same prompts (`Duels.again`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer, selm
from llm_duel_env.agents.stored import load_candidates, save_candidates
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

STAGES = 3
"""Duels about one prompt, at most, and so the rounds it is shown in."""
MEETINGS = (
    "the two samples of the policy meet first",
    "the greedy response against the winner of the two samples",
    "both others lost to the same response: which of them is the worst?",
)
"""Why two of a prompt's three responses meet, by the round it is shown in."""


@dataclass(frozen=True)
class SELMConfig(AgentConfig):
    """Defaults are the paper's for Zephyr-7B-SFT."""

    alpha: float = 0.001
    """Weight of the exploration term, times beta (paper: 0.001, and 0.0001 for Llama-3-8B-Instruct; its authors advise
    0.005 or 0.001 for other models)."""
    iterations: int = 3
    """Equal shares of the query budget; the reference is the policy at the end of the share before, and the supervised
    policy in the first (paper: 3, for Zephyr after one of plain DPO). One learning-rate schedule runs over all of them
    (paper: one each)."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo)."""
    beta: float = 0.01
    """Strength of the pull to the reference policy (paper: 0.01)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class SELM(Agent):
    """Best against worst of {greedy, two samples}, optimism about the greedy response, and a reference that moves."""

    Config = SELMConfig
    paper = "https://arxiv.org/abs/2405.19332"
    provenance = "paper"
    config: SELMConfig

    def __init__(self, task: TaskView, config: SELMConfig, *, seed: int, budget: int) -> None:
        if config.iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {config.iterations}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.loss = selm(direct_optimizer(config.loss, config.beta, config.loss_options), config.alpha, config.beta)
        self.stage = 0
        """Rounds that the present prompts were shown in."""
        self._candidates: Candidates | None = None  # (M, 3) of the present prompts, the greedy response in column 0
        self._points = np.zeros((0, STAGES))  # (M, 3): +1/2 for each duel won, -1/2 for each lost
        self._paid = 0

    def act(self, observation: Observation) -> Duels:
        """The next duel about each prompt; in the first of three rounds they are new, in the others those before.

        Raises:
            ValueError: the environment did not keep the prompts.
        """
        if self.stage == 0:
            self._candidates = self.propose(observation)
            self._points, self._paid = np.zeros((len(observation["prompt_id"]), STAGES)), 0
        assert self._candidates is not None
        kept = self._candidates.observation["prompt_id"]
        if not np.array_equal(kept, observation["prompt_id"]):
            raise ValueError(f"expected the prompts {kept.tolist()} again, got {observation['prompt_id'].tolist()}")
        first, second, query = self.meeting()
        duels = self._candidates.duel(first, second)
        duels = duels.noted(MEETINGS[self.stage])
        return replace(duels, query=query, again=np.full(len(query), self.stage + 1 < STAGES))

    def propose(self, observation: Observation) -> Candidates:
        """The greedy response, then two samples: (M, 3)."""
        greedy = self.policy.greedy(observation)
        if greedy.lengths is not None:  # a proposal, so its tokens count
            self.policy.generated_tokens += int(greedy.lengths.sum())
        return Candidates.beside(greedy, self.policy.sample(observation, 2, ("act", self.round)))

    def meeting(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which two of the three meet now, (M,) and (M,) candidate numbers, and whether they need to, (M,) bool."""
        points = self._points
        greedy, everywhere = np.zeros(len(points), np.int64), np.ones(len(points), bool)
        if self.stage == 0:
            return greedy + 1, greedy + 2, everywhere
        winner = 1 + points[:, 1:].argmax(axis=1)  # of the samples; the first after a tie
        if self.stage == 1:
            return greedy, winner, everywhere
        return greedy, STAGES - winner, points.max(axis=1) == 1  # the winner won twice: who is the worst?

    def learn(self, preferences: Preferences) -> Metrics:
        """Notes who won; after the last duel, or with the budget spent, learns from best and worst, and moves the
        reference where an iteration ends."""
        first, second, _ = self.meeting()
        rows, gain = np.arange(len(first)), np.nan_to_num(preferences.first_wins - 0.5)
        self._points[rows, first] += gain
        self._points[rows, second] -= gain
        self._paid += self.paid(preferences)
        spent = self.queries + self.paid(preferences)
        self.stage += 1
        if self.stage < STAGES and spent < self.budget:
            return {}
        self.stage = 0
        metrics = self.train()
        iteration = min(int(spent / self.budget * self.config.iterations), self.config.iterations - 1)
        if self.policy.reference_version < iteration:
            self.policy.move_reference()
        return metrics | {"reference_version": float(self.policy.reference_version)}

    def train(self) -> Metrics:
        """One pass of the direct optimizer with the exploration term over best and worst of each prompt's three."""
        assert self._candidates is not None
        best, worst = self._points.argmax(axis=1), self._points.argmin(axis=1)
        rows, responses = np.arange(len(best)), self._candidates.responses
        # Noise can put one text first and last: then nothing was learnt about it.
        decided = (self._points[rows, best] > self._points[rows, worst]) & (
            responses[rows, best] != responses[rows, worst]
        )
        pairs = Preferences(
            self._candidates.take(np.stack([best, worst], axis=1)),
            np.where(decided, 1.0, 0.5).astype(np.float32),
            np.ones(len(best), bool),
        )
        greedy = self._candidates.take(np.zeros((len(best), 1), np.int64)) if self.loss.weight else None
        key = ("update", self.round)
        learnt = self.policy.update(self.loss, pairs, progress=self.progress, key=key, bonus=greedy)
        return learnt | {
            "greedy_best": float((decided & (responses[rows, best] == responses[:, 0])).mean()),
            "greedy_worst": float((decided & (responses[rows, worst] == responses[:, 0])).mean()),
            "queries_per_pair": self._paid / max(int(decided.sum()), 1),
        }

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and how far the ranking of the present prompts has come."""
        super().save(folder)
        state = {"stage": self.stage, "points": self._points.tolist(), "paid": self._paid}
        (folder / "ranking.json").write_text(json.dumps(state))
        if self.stage and self._candidates is not None:
            save_candidates(self._candidates, folder / "candidates")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        state = json.loads((folder / "ranking.json").read_text())
        self.stage, self._paid = state["stage"], state["paid"]
        self._points = np.array(state["points"], float).reshape(-1, STAGES)
        self._candidates = load_candidates(folder / "candidates", self.task.observe)[0] if self.stage else None
