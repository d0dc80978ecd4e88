"""XPO: exploratory preference optimization (arXiv 2405.21046, Algorithm 1).

A sample of the policy duels with one of the reference, and the direct loss gets + alpha mean log pi(y_ref): responses
that the reference draws become less likely, won or lost, which is optimism about all others. Reconstructed: the rule
rests on the released code of two libraries and on notes, which agree. The paper optimises over all data of an iteration
and returns its best iterate; here, as in both libraries, a round's pairs are learnt once and the last iterate is taken.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer, xpo
from llm_duel_env.randomness import visits
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences, join, rows_of


@dataclass(frozen=True)
class XPOConfig(AgentConfig):
    """Defaults are those that SEA's comparison used (arXiv 2411.01493), as far as its released code tells them."""

    alpha: float = 5e-6
    """Weight of the exploration term, a sum of token log-probabilities, not times beta (oat: 5e-6; TRL: 1e-5; the paper
    probably 1e-5, 5e-6 and 0 over its three iterations). 0 is iterative DPO with asymmetric duels."""
    ahead: int = 0
    """Prompts for which reference responses are drawn at once beyond those that are needed: larger batches, the same
    responses. Pays where the budget visits most training prompts."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (both libraries: 0.1)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class XPO(Agent):
    """Asymmetric duels, policy against reference, and a loss that pushes the reference's responses down."""

    Config = XPOConfig
    paper = "https://arxiv.org/abs/2405.21046"
    provenance = "reconstructed"
    config: XPOConfig

    def __init__(self, task: TaskView, config: XPOConfig, *, seed: int, budget: int) -> None:
        if config.ahead < 0:
            raise ValueError(f"ahead: expected a number of prompts of at least 0, got {config.ahead}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.loss = xpo(direct_optimizer(config.loss, config.beta, config.loss_options), config.alpha)
        self.visited: Counter[int] = Counter()
        """How often each prompt was acted on."""
        self._stock: dict[tuple[int, int], Candidates] = {}  # reference responses by (prompt, visit), not used yet

    def act(self, observation: Observation) -> Duels:
        """One sample of the policy, shown first, and one of the reference, tagged so."""
        own = self.policy.sample(observation, 1, ("act", self.round))
        pair = Candidates.beside(own, self.references(observation))
        return pair.first_two().noted("a sample of the present policy against one of the reference")

    def references(self, observation: Observation) -> Candidates:
        """A response of the reference to each prompt, (M, 1): another one at every visit to a prompt, and a function of
        (seed, prompt, visit) alone."""
        prompts = [int(prompt) for prompt in observation["prompt_id"]]
        visit = [self.visited[prompt] + earlier for prompt, earlier in zip(prompts, visits(np.array(prompts)).tolist())]
        wanted = list(zip(prompts, visit))
        for number in sorted(set(visit)):
            rows = [row for row, key in enumerate(wanted) if key[1] == number and key not in self._stock]
            if rows:
                self.restock(rows_of(observation, np.array(rows)), number)
        self.visited.update(prompts)
        drawn = Candidates.stack([self._stock.pop(key) for key in wanted])
        return replace(drawn, observation=observation)

    def restock(self, observation: Observation, visit: int) -> None:
        """Draws the reference's responses to these prompts, and to `ahead` others, at their visit number `visit`."""
        named = {int(prompt) for prompt in observation["prompt_id"]}
        others = (
            prompt
            for prompt in range(self.task.train_prompts if self.config.ahead else 0)
            if self.visited[prompt] == visit and prompt not in named and (prompt, visit) not in self._stock
        )
        extra = np.array(list(islice(others, self.config.ahead)), np.int64)
        if len(extra):
            observation = join([observation, self.task.observe(extra)])
        drawn = self.policy.sample(observation, 1, ("reference", visit), reference=True)
        for row, prompt in enumerate(observation["prompt_id"]):
            self._stock[int(prompt), visit] = drawn.rows(np.array([row]))

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer with the exploration term over the round's labelled pairs."""
        return self.policy.update(self.loss, preferences, progress=self.progress, key=("update", self.round))

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the visits. What was drawn ahead is drawn again, and counted again."""
        super().save(folder)
        (folder / "visited.json").write_text(json.dumps(sorted(self.visited.items())))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.visited = Counter({prompt: count for prompt, count in json.loads((folder / "visited.json").read_text())})
        self._stock = {}
