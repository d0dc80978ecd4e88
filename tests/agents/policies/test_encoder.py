"""Whose features the ensemble sees: the supervised policy's, the task's encoder's, or a folder's."""

import dataclasses

import numpy as np
import pytest
import torch

from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.encoder import load_model
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks import tiny_language as language


@pytest.fixture(scope="module")
def task():
    return make_task("tiny_tldr")


def features_of(task, encoder):
    policy = make_policy(task.view(), PolicyConfig(encoder=encoder), seed=0)
    candidates = policy.sample(task.observe(np.arange(40)), 6, ("test",))
    return policy, candidates, policy.embed(candidates)


def test_the_encoder_changes_features_and_nothing_else(task):
    own, drawn, features = features_of(task, "policy")
    other, again, described = features_of(task, "task")
    assert drawn.responses.tolist() == again.responses.tolist()
    assert features.shape == described.shape == (40, 6, own.feature_size)
    assert not torch.allclose(features, described)
    torch.testing.assert_close(own.reference_log_prob(drawn), other.reference_log_prob(drawn))
    assert own.embedder.model is own.encoder
    assert not any(p is q for p in other.embedder.model.parameters() for q in other.model.parameters())


def test_the_task_s_encoder_describes_better_than_the_policy(task):
    """A ridge regression reads the facts that are not the post's out of its features, on prompts it has not seen."""
    scores = {}
    for encoder in ("policy", "task"):
        _, candidates, features = features_of(task, encoder)
        pairs = zip(candidates.observation["prompt"], candidates.responses)
        counts = np.array([[language.describe(prompt, text)[:3] for text in row] for prompt, row in pairs]).sum(-1)
        x, y = features.flatten(0, 1).double().numpy(), counts.ravel()
        train, test = slice(0, 180), slice(180, None)
        weights = np.linalg.solve(x[train].T @ x[train] + 30 * np.eye(x.shape[1]), x[train].T @ (y[train] - y.mean()))
        scores[encoder] = np.corrcoef(x[test] @ weights, y[test])[0, 1]
    assert scores["task"] > scores["policy"] + 0.05
    assert scores["task"] > 0.8


def test_an_encoder_that_does_not_fit_is_refused(task, tmp_path):
    view = dataclasses.replace(task.view(), encoder=None)
    with pytest.raises(ValueError, match="offers no encoder"):
        make_policy(view, PolicyConfig(encoder="task"), seed=0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(view.model)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_policy(view, PolicyConfig(encoder=str(tmp_path)), seed=0)
    with pytest.raises(ValueError, match="features are its own, got 'task'"):
        make_policy(make_task("synthetic", candidates=4).view(), PolicyConfig(encoder="task"), seed=0)


@pytest.mark.parametrize("name", ["/no/such/folder", "no such/hub//name"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"cannot load model '{name}': expected a folder"):
        load_model(name, torch.device("cpu"))
