"""What the torch learner writes, and who does."""

import torch
from torch import nn

from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner


def trained():
    learner = TorchLearner(nn.Linear(2, 3), PolicyConfig())
    learner.begin(1e-3)
    learner.backward(learner.model(torch.ones(1, 2)).sum(), True)
    learner.step()
    return learner


def test_only_rank_0_writes_the_optimizer_s_state(tmp_path):
    learner = trained()
    learner.rank = 1
    learner.save(tmp_path)
    assert not list(tmp_path.iterdir())
    learner.rank = 0
    learner.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"optimizer.safetensors", "optimizer.json"}
    other = trained()
    other.rank = 1  # every rank loads
    other.reset()
    other.load(tmp_path)
    assert other.gradient_steps == 1
    for name, parameter in learner.parameters.items():
        moments, loaded = learner.optimizer.state[parameter], other.optimizer.state[other.parameters[name]]
        assert moments.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[kind]) for kind, value in moments.items())
