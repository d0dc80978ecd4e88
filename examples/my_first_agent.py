"""An agent in one file: it keeps a score per feature, and shows the two candidates that it likes best.

Run it with ``python examples/my_first_agent.py``. An agent sees observations and preferences, nothing else. To play it
with `llm-duel run --agent my_agent`, register the class in your package's ``pyproject.toml``:
``[project.entry-points."llm_duel_env.agents"]``.
"""

import gymnasium
import numpy as np

from llm_duel_env.agents.base import Agent  # any import of the package registers the duel/ environments
from llm_duel_env.randomness import generator
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

QUERIES, BATCH, WORLD = 300, 10, {"candidates": 16, "train_prompts": 500, "heldout_prompts": 200}


class LinearDuelist(Agent):
    """Logistic regression on the difference of the two candidates' (prompt x candidate) features."""

    def __init__(self, task, config, *, seed, budget):
        super().__init__(task, config, seed=seed, budget=budget)
        self.weights = np.zeros(self.features(task.observe(np.arange(1))).shape[2])

    @staticmethod
    def features(observation: Observation) -> np.ndarray:
        """(M, K, C * D + D): each candidate, and its products with the prompt's context."""
        context, candidates = observation["context"], observation["candidates"]
        products = np.einsum("mc,mkd->mkcd", context, candidates).reshape(*candidates.shape[:2], -1)
        return np.concatenate([candidates, products], axis=2) / np.sqrt(products.shape[2])

    def act(self, observation: Observation) -> Duels:
        """The best two by a slightly shaken score, so that the agent explores."""
        score = self.features(observation) @ self.weights
        score += 0.3 * generator(self.seed, "act", self.round).standard_normal(score.shape)
        return Candidates(observation, np.argsort(-score, axis=1)[:, :2]).first_two()

    def learn(self, preferences: Preferences) -> Metrics:
        """A few gradient steps on the round's labels."""
        pair = preferences.decided().ordered()  # the winner in column 0
        if not len(pair.responses):
            return {}
        chosen = np.take_along_axis(self.features(pair.observation), pair.responses[:, :, None], axis=1)
        difference = chosen[:, 0] - chosen[:, 1]
        for _ in range(20):
            surprise = 1 / (1 + np.exp(difference @ self.weights))
            self.weights += 0.5 * (surprise[:, None] * difference).mean(axis=0)
        return {"surprise": float(surprise.mean())}

    def respond(self, observation: Observation) -> np.ndarray:
        """The best candidate of each prompt: what is deployed, and measured on held-out prompts."""
        return (self.features(observation) @ self.weights).argmax(axis=1)

    def save(self, folder):  # a run that was stopped goes on from here: what the agent has learnt must be in it
        super().save(folder)
        np.save(folder / "weights.npy", self.weights)

    def load(self, folder):
        super().load(folder)
        self.weights = np.load(folder / "weights.npy")


def main() -> list[float]:  # plays the agent; its offline win rates, one per 100 queries
    env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=BATCH, budget=QUERIES, task_kwargs=WORLD)
    agent = LinearDuelist(env.unwrapped.task.view(), LinearDuelist.configure({}), seed=0, budget=QUERIES)
    observation, wins = env.reset(seed=0)[0], []
    while env.unwrapped.remaining:
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        agent.update(duels.judged(info["preference"]))
        if agent.queries % 100 == 0:
            wins.append(env.unwrapped.evaluate(agent.respond)["offline_win_rate"])
            print(f"{agent.queries} queries: offline win rate {wins[-1]:.3f}")
    env.close()
    return wins


if __name__ == "__main__":
    main()
