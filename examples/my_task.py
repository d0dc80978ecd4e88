"""A task in one file: recorded responses as arrays, here dishes that guests with different tastes are offered.

    python examples/my_task.py

Any table of prompts, candidate responses and utilities becomes a task in this way, and every agent plays it.
"""

import numpy as np
from gymnasium import spaces

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.tasks.base import Task, TaskView

GUESTS, DISHES, TASTES = 60, 5, 3


class Dishes(Task):
    """`contexts` (P, C), `candidates` (P, K, D) and `utilities` (P, K); the last `heldout` prompts are held out."""

    name, kind, feedback = "dishes", "finite", "bernoulli"

    def __init__(self, contexts, candidates, utilities, heldout):
        self.contexts, self.candidates, self.utilities = contexts, candidates, utilities
        self.train_prompts, self.heldout_prompts = len(contexts) - heldout, heldout
        self.oracle = UtilityOracle(lambda prompts, chosen: self.utilities[prompts["prompt_id"], chosen])
        self.observation_space = spaces.Dict(
            context=spaces.Box(-np.inf, np.inf, contexts.shape[1:], np.float32),
            candidates=spaces.Box(-np.inf, np.inf, candidates.shape[1:], np.float32),
            prompt_id=spaces.Discrete(len(contexts)),
        )
        self.response_space = spaces.Discrete(candidates.shape[1])

    def observe(self, prompt_ids):
        """What an agent sees of these prompts."""
        ids = np.asarray(prompt_ids, np.int64)
        return {"context": self.contexts[ids], "candidates": self.candidates[ids], "prompt_id": ids}

    def reference(self, prompt_ids):
        """Win rates are measured against the first dish."""
        return np.zeros(len(prompt_ids), np.int64)

    def optimum(self, prompt_ids):
        """The best utility there is, so that regret is known."""
        return self.utilities[prompt_ids].max(axis=1)

    def view(self):
        """What agents may know: everything but the oracle."""
        spaces_of_one = (self.observation_space, self.response_space)
        return TaskView(self.name, "finite", *spaces_of_one, self.train_prompts, self.observe_training)


def main() -> float:
    """Plays online DPO on it; returns the offline win rate after 400 queries."""
    draw = np.random.default_rng(0)
    contexts = draw.normal(size=(GUESTS, TASTES)).astype(np.float32)
    candidates = draw.normal(size=(GUESTS, DISHES, TASTES)).astype(np.float32)
    task = Dishes(contexts, candidates, 2.0 * np.einsum("pc,pkc->pk", contexts, candidates), heldout=20)
    env = DuelVectorEnv(8, task=task, budget=400)
    settings = {"policy.learning_rate": 0.01, "policy.temperature": 1.0}
    agent = OnlineDPO(task.view(), OnlineDPO.configure(settings), seed=0, budget=400)
    observation, _ = env.reset(seed=0)
    while env.remaining > 8:  # a round asks at most 8 questions
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        agent.update(duels.judged(info["preference"]))
    win_rate = env.evaluate(agent.respond)["offline_win_rate"]
    print(f"online DPO after {env.query_count} queries: offline win rate {win_rate:.3f}")
    return win_rate


if __name__ == "__main__":
    main()
