"""Games between one agent and a small world, for the tests of single agents."""

import json

import numpy as np
import pytest

from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.tasks import make_task


class Game:
    """Makes agents and environments on one task, and plays them against each other."""

    def __init__(self, task):
        self.task = task

    def make(self, name, *, seed=0, budget=40, batch=4, ledger=None, **overrides):
        """(environment, agent)."""
        agent_class = load_agent(name)
        env = DuelVectorEnv(batch, task=self.task, budget=budget, scores="scores" in agent_class.needs, ledger=ledger)
        settings = {"policy.learning_rate": 1e-3, "policy.temperature": 1.0, **overrides}
        return env, agent_class(self.task.view(), agent_class.configure(settings), seed=seed, budget=budget)

    @staticmethod
    def play(env, agent, rounds, observation=None):
        """The next observation, and (duels, preferences, metrics) of each round."""
        if observation is None:
            observation, _ = env.reset(seed=0)
        log = []
        for _ in range(rounds):
            duels = agent.act(observation)
            observation, reward, _, _, info = env.step(duels.action())
            preferences = duels.judged(info["preference"], **agent.told(reward, info))
            log.append((duels, preferences, agent.update(preferences)))
        return observation, log

    def check_resume(self, name, folder, *, rounds=(1, 1), **settings):
        """Plays, saves, plays on; and loads and plays on: the same duels, queries and metrics. The whole log."""
        env, agent = self.make(name, **settings)
        observation, before = self.play(env, agent, rounds[0])
        agent.save(folder)
        state = json.loads(json.dumps(env.state_dict()))
        _, expected = self.play(env, agent, rounds[1], observation)
        other_env, other = self.make(name, **settings)
        other_env.reset(seed=0)
        other.load(folder)
        other_env.load_state_dict(state)
        _, again = self.play(other_env, other, rounds[1], other_env.observe())
        for mine, theirs in zip(expected, again, strict=True):
            assert mine[0].pair.responses.tolist() == theirs[0].pair.responses.tolist()
            assert mine[0].query.tolist() == theirs[0].query.tolist()
            assert mine[2] == theirs[2]
        assert agent.queries == other.queries == env.query_count == other_env.query_count
        log = before + expected
        assert all(np.isfinite(list(learnt.values())).all() for _, _, learnt in log)
        return log


@pytest.fixture(scope="session")
def finite_game():
    """Twelve candidates for each of eight prompts: a round of eight is a whole epoch."""
    return Game(make_task("synthetic", candidates=12, train_prompts=8, heldout_prompts=8))


@pytest.fixture(scope="session")
def tiny_game():
    """TinyTLDR."""
    return Game(make_task("tiny_tldr"))
