"""An oracle in one file: a judge who prefers the shorter summary, on the posts of TinyTLDR.

    python examples/my_oracle.py

An oracle says with what probability one response beats another. Whatever can say that (rules, a reward model, people
behind a web form) can be duelled before.
"""

import numpy as np

from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.oracles.base import Oracle
from llm_duel_env.tasks.tiny_tldr import TinyTLDR
from llm_duel_env.types import Observation

WORDS_FOR_SURE = 4.0
"""A difference of so many words multiplies the odds by e."""


class Brevity(Oracle):
    """P(first wins) rises with how many words fewer it has."""

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """One probability per pair: float64 (M,)."""
        words = [np.array([len(text.split()) for text in texts]) for texts in (first, second)]
        return 1 / (1 + np.exp((words[0] - words[1]) / WORDS_FOR_SURE))


def main() -> list[float]:
    """Asks the oracle about two pairs of summaries; returns the preferences."""
    task = TinyTLDR()
    task.oracle = Brevity()
    env = DuelVectorEnv(2, task=task, budget=10)
    observation, _ = env.reset(seed=0)
    first = tuple(" ".join(post.split()[:3]) for post in observation["prompt"])
    second = tuple(" ".join(post.split()[:9]) for post in observation["prompt"])
    # The first prompt is shown a short summary and a long one, the second prompt the other way round.
    action = {"first": (first[0], second[1]), "second": (second[0], first[1]), "query": np.array([1, 1])}
    _, _, _, _, info = env.step(action)
    for row, preference in enumerate(info["preference"]):
        shown = f"{action['first'][row]!r} against {action['second'][row]!r}"
        print(f"{shown}: the {'first' if preference == 1 else 'second'} wins")
    env.close()
    return info["preference"].tolist()


if __name__ == "__main__":
    main()
