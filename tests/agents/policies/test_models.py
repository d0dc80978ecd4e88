from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.models import Models
from llm_duel_env.tasks.synthetic import Synthetic

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=1e-2, warmup=0.0, batch=5, microbatch=2)
IDS = np.array([3, 11, 3, 40, 8])


def make(folder, **changes):
    return LanguageModelPolicy(fixtures.make_view(folder), replace(CONFIG, **changes), seed=0, device="cpu")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_gradient_checkpointing_teaches_the_same(model_folder, family, monkeypatch):
    policies = [make(model_folder(family), gradient_checkpointing=on) for on in (False, True)]
    pairs = policies[0].sample(fixtures.observe(IDS), 2, ("a",))
    kept, own = [], GradientCheckpointingLayer.__call__

    def watched(layer, *args, **kwargs):
        if layer.gradient_checkpointing and layer.training:
            kept.append(any(child.training for child in layer.children()))
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", watched)
    for policy in policies:
        policy.learn(direct_optimizer("dpo", 0.5), pairs, progress=0.0, key=("learn",))
    assert kept  # the layers were checkpointed ...
    assert not any(kept)  # ... and nothing in them was in training mode
    assert not any(module.training for module in policies[1].model.modules())
    # Adam's first moments after one step are a tenth of the gradient.
    plain, checkpointed = (
        {name: policy.learner.optimizer.state[p]["exp_avg"] for name, p in policy.model.named_parameters()}
        for policy in policies
    )
    scale = max(float(value.abs().max()) for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-5 * scale)
        if "query_key_value.bias" not in name:
            assert value.abs().max() > 1e-4 * scale, name
    # A policy whose layers can be checkpointed still samples with their cache.
    fresh = [make(model_folder(family), gradient_checkpointing=on) for on in (False, True)]
    one, other = (policy.sample(fixtures.observe(IDS), 3, ("b",)).tokens for policy in fresh)
    assert np.array_equal(one, other)


class Elsewhere:
    """Stands for a model, and remembers where it was put."""

    def __init__(self) -> None:
        self.device, self.moves = torch.device("cuda"), []

    def to(self, device: torch.device) -> None:
        self.device = device
        self.moves.append(device.type)


def models(offload: bool) -> tuple[Models, Elsewhere]:
    held = Models.__new__(Models)
    held.config, held.device = replace(CONFIG, offload_reference=offload), torch.device("cuda")
    held.policy, frozen = object(), Elsewhere()
    held.encoder = held.reference = frozen
    held.learner = SimpleNamespace()
    return held, frozen


def test_an_offloaded_reference_comes_and_goes():
    held, frozen = models(offload=True)
    held._move(frozen, held._rest(frozen))  # as after start_learning
    with held.using(frozen):
        assert frozen.device.type == "cuda"
        with held.using(frozen):  # the encoder samples for its own statistics
            pass
        assert frozen.device.type == "cuda"
    assert frozen.moves == ["cpu", "cuda", "cpu"]
    with pytest.raises(RuntimeError, match="in use"), held.using(frozen):
        raise RuntimeError("in use")
    assert frozen.device.type == "cpu"
    held, frozen = models(offload=False)
    with held.using(frozen):
        pass
    assert frozen.moves == []


def test_offloading_changes_no_result(model_folder):
    one, other = make(model_folder()), make(model_folder(), offload_reference=True)
    pairs = one.sample(fixtures.observe(IDS), 2, ("a",))
    for policy in (one, other):
        policy.learn(direct_optimizer("dpo", 0.5), pairs, progress=0.0, key=("learn",))
    assert torch.equal(one.log_prob(pairs), other.log_prob(pairs))
    assert torch.equal(one.reference_log_prob(pairs), other.reference_log_prob(pairs))
    assert torch.equal(one.embed(pairs), other.embed(pairs))


@pytest.mark.parametrize(
    "changes",
    [{"learner": "deepspeed"}, {"lora_rank": 4}, {"gradient_checkpointing": True}, {"offload_reference": True}],
)
def test_finite_tasks_refuse_what_is_for_text(changes):
    view = Synthetic(candidates=12, train_prompts=64).view()
    with pytest.raises(ValueError, match=f"policy.{next(iter(changes))}=.* is for text"):
        make_policy(view, replace(CONFIG, **changes), seed=0)


def test_the_export_is_the_model(model_folder, tmp_path):
    policy = make(model_folder())
    pairs = policy.sample(fixtures.observe(IDS), 2, ("a",))
    policy.learn(direct_optimizer("dpo", 0.5), pairs, progress=0.0, key=("learn",))
    policy.export(tmp_path / "out")
    again = make(str(tmp_path / "out"))
    assert torch.equal(again.log_prob(pairs), policy.log_prob(pairs))
