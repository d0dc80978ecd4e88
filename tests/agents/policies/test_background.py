"""Learning one round off: what the policy acts by, when it takes on what it learnt, and that both sides go on at once."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.final_states import final_states
from llm_duel_env.tasks.synthetic import Synthetic

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=6, microbatch=2, temperature=1.0)
DPO = direct_optimizer("dpo", 0.5)
IDS = np.array([3, 11, 3, 40, 8, 21])


@pytest.fixture(params=["finite", "text"])
def make(request, model_folder):
    """make(**changes of the config) -> a policy, the same each time, and its prompts."""
    if request.param == "finite":
        task = Synthetic(candidates=12, train_prompts=64)
        view, prompts = task.view(), task.observe(IDS)
    else:
        view, prompts = fixtures.make_view(model_folder()), fixtures.observe(IDS)
    return lambda **changes: (make_policy(view, replace(CONFIG, **changes), seed=0), prompts)


def acting(policy):
    model = policy.scorer if hasattr(policy, "scorer") else policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def teach(policy, prompts, number, loss=DPO):
    ranked = policy.sample(prompts, 2, ("ranked",), reference=True)
    return policy.learn(loss, ranked, progress=0.1 * number, key=("learn", number))


def test_the_policy_acts_as_one_lesson_before(make):
    plain, prompts = make()
    late, _ = make(asynchronous=True)
    weights, told = [acting(plain)], []
    for number in range(4):
        told.append(teach(plain, prompts, number))
        weights.append(acting(plain))
    for number in range(4):
        assert teach(late, prompts, number) == (told[number - 1] if number else {})
        assert torch.equal(acting(late), weights[number])  # lesson `number` is under way, or over and not taken on
    assert late.settle() == told[3]
    assert torch.equal(acting(late), weights[4])
    assert late.settle() == {}
    assert late.gradient_steps == plain.gradient_steps


def test_sampling_goes_on_while_a_lesson_is_under_way(make):
    policy, prompts = make(asynchronous=True)
    before = policy.sample(prompts, 3, ("a",)).responses
    go_on, begun = threading.Event(), threading.Event()

    def waits(ranked):
        begun.set()
        assert go_on.wait(60)
        return DPO(ranked)

    teach(policy, prompts, 0, waits)
    assert begun.wait(60)
    assert (policy.sample(prompts, 3, ("a",)).responses == before).all()  # the lesson waits, and this does not
    policy.greedy(prompts)
    policy.diagnose(prompts, ("d",))
    go_on.set()
    assert policy.settle()["gradient_steps"] == 1


def test_a_saved_policy_goes_on_one_lesson_off(make, tmp_path):
    policy, prompts = make(asynchronous=True)
    for number in range(2):
        teach(policy, prompts, number)
    policy.save(tmp_path / "checkpoint")
    again, _ = make(asynchronous=True)
    again.load(tmp_path / "checkpoint")
    assert torch.equal(acting(again), acting(policy))
    for number in (2, 3):
        assert teach(again, prompts, number) == teach(policy, prompts, number)
        assert torch.equal(acting(again), acting(policy))
    assert again.settle() == policy.settle()
    assert torch.equal(acting(again), acting(policy))


def test_reset_and_a_moved_reference_take_on_what_was_learnt_first(make):
    policy, prompts = make(asynchronous=True)
    start = acting(policy)
    teach(policy, prompts, 0)
    policy.move_reference()
    ranked = policy.sample(prompts, 2, ("x",))
    torch.testing.assert_close(policy.log_prob(ranked), policy.reference_log_prob(ranked))
    assert not torch.equal(acting(policy), start)
    teach(policy, prompts, 1)
    policy.reset()
    assert torch.equal(acting(policy), start)


def test_a_lesson_that_fails_is_told_when_it_is_waited_for(make):
    policy, prompts = make(asynchronous=True)

    def breaks(ranked):
        return ranked.policy.sum() * torch.nan, {}

    teach(policy, prompts, 0, breaks)
    with pytest.raises(FloatingPointError, match="diverged"):
        teach(policy, prompts, 1)


def test_an_auxiliary_head_reads_the_states_of_what_trains(model_folder):
    view = fixtures.make_view(model_folder())
    policy = make_policy(view, replace(CONFIG, asynchronous=True), seed=0)
    final_states(policy, policy.sample(fixtures.observe(IDS), 2, ("a",))).sum().backward()
    assert any(value.grad is not None for value in policy.models.policy.parameters())
    assert all(value.grad is None for value in policy.model.parameters())


def test_lora_is_refused(model_folder):
    view = fixtures.make_view(model_folder())
    with pytest.raises(ValueError, match=r"policy.asynchronous: .*lora_rank=0"):
        make_policy(view, replace(CONFIG, asynchronous=True, lora_rank=2), seed=0)
