"""TRL's OnlineDPOTrainer as an agent: its loss is ours, its steps are its own, and it learns the oracle's labels."""

import dataclasses
import importlib
import json
import random

import numpy as np
import pytest
import torch

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies.ranked import RankedLogProbs
from llm_duel_env.baselines.global_seed import global_seed
from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.extras import MissingExtraError
from llm_duel_env.tasks import make_task

NAME = "trl_online_dpo"
RATE = {"policy.learning_rate": 1e-3}


@pytest.fixture(scope="module")
def task():
    return make_task("tiny_tldr")


def build(task, seed=0, budget=64, **overrides):
    pytest.importorskip("trl", reason="THE EXTRA trl IS NOT INSTALLED: its baseline goes untested")
    agent_class = load_agent(NAME)
    return agent_class(task.view(), agent_class.configure(RATE | overrides), seed=seed, budget=budget)


def weights(agent):
    return torch.cat([p.detach().ravel() for p in agent.policy.model.parameters()])


def gradient(agent):
    return torch.cat([p.grad.ravel() for p in agent.policy.model.parameters()])


def judged(agent, observation, seed=0):
    """The agent's duels with labels at random."""
    duels = agent.act(observation)
    return duels.judged(np.random.default_rng(seed).integers(2, size=len(duels.query)).astype(float))


def trained(agent, task, rounds=2):
    """The agent after some rounds: its policy is no longer the reference."""
    for number in range(rounds):
        agent.update(judged(agent, task.observe(np.arange(8) + 8 * number)))
    return agent


# The loss


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.1), ("dpo", 0.7), ("ipo", 0.3)])
def test_its_loss_and_gradient_are_ours_on_the_same_batch(task, loss, beta):
    agent = trained(build(task, loss=loss, beta=beta), task)
    preferences = judged(agent, task.observe(np.arange(40, 52)))
    assert len(set(preferences.pair.lengths.ravel().tolist())) > 2  # prompts and responses of many lengths
    assert len({len(text) for text in preferences.pair.observation["prompt"]}) > 2
    agent.policy.learner.begin(1e-3)
    theirs = agent.backward(preferences)
    their_gradient = gradient(agent)
    ranked = preferences.ordered()
    agent.policy.learner.begin(1e-3)
    value, metrics = direct_optimizer(loss, beta, {})(
        RankedLogProbs(
            policy=agent.policy._learning_score(ranked, per_token=False),
            reference=agent.policy.reference_log_prob(ranked),
            lengths=torch.from_numpy(ranked.lengths),
            from_reference=torch.zeros(ranked.shape, dtype=torch.bool),
        )
    )
    value.backward()
    assert theirs["loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert theirs["margin"] == pytest.approx(metrics["margin"], abs=1e-4)
    assert abs(theirs["margin"]) > 1e-2  # else any loss would agree
    ours = gradient(agent)
    assert float((ours - their_gradient).norm() / ours.norm()) < 1e-4


def test_a_flipped_label_flips_the_gradient(task):
    agent = build(task)  # the policy is the reference: every pair weighs alike
    preferences = judged(agent, task.observe(np.arange(8)))
    flipped = dataclasses.replace(preferences, first_wins=1 - preferences.first_wins)
    found = []
    for told in (preferences, flipped):
        agent.policy.learner.begin(1e-3)
        agent.backward(told)
        found.append(gradient(agent))
    assert float(found[0].norm()) > 0.01
    torch.testing.assert_close(found[0], -found[1], rtol=1e-3, atol=1e-5)


# The loop


def test_the_weights_are_those_of_the_trainer_s_own_train(task, tmp_path, monkeypatch):
    """Three rounds here, three steps of ``train()`` there: same prompts, same random numbers, labels by one rule."""
    trl = pytest.importorskip("trl.experimental.online_dpo", reason="THE EXTRA trl IS NOT INSTALLED")
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rounds, batch = 3, 8

    def score(text):
        return len(text) % 7

    agent = build(task, **{"policy.final_learning_rate": 1.0})
    for number in range(rounds):
        duels = agent.act(task.observe(np.arange(batch) + batch * number))
        first, second = ([score(text) for text in column] for column in duels.pair.responses.T)
        agent.update(duels.judged((np.array(first) >= np.array(second)).astype(float)))

    class Trainer(trl.OnlineDPOTrainer):
        def _generate(self, model, prompts, images=None):
            with global_seed(0, "trl", "act", self.state.global_step):
                return super()._generate(model, prompts, images)

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(task.view().model)
    prompts = task.observe(np.arange(rounds * batch))["prompt"]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(task.view().model, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(score(text.strip())) for text in completions],
        args=trl.OnlineDPOConfig(
            output_dir=str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
            per_device_train_batch_size=batch, learning_rate=1e-3, lr_scheduler_type="constant", num_train_epochs=1,
            max_new_tokens=task.view().max_new_tokens, gradient_checkpointing=False,
        ),
        train_dataset=[{"prompt": tokenizer.bos_token + prompt} for prompt in prompts],
        data_collator=lambda rows: {"prompt": [row["prompt"] for row in rows]},
        processing_class=tokenizer,
    )  # fmt: skip
    start = torch.cat([p.detach().ravel() for p in trainer.model.parameters()])
    trainer.train()
    theirs = torch.cat([p.detach().ravel() for p in trainer.model.parameters()])
    assert trainer.state.global_step == agent.policy.gradient_steps == rounds
    assert float((theirs - start).norm()) > 0.1
    torch.testing.assert_close(weights(agent), theirs, rtol=0, atol=1e-6)


def test_the_runner_pays_for_every_label_and_not_for_one_too_many(task, tmp_path):
    pytest.importorskip("trl", reason="THE EXTRA trl IS NOT INSTALLED: its baseline goes untested")
    config = RunConfig(
        agent=NAME, env="duel/TinyTLDR-v0", folder=str(tmp_path / "run"), budget=13, batch=8, overrides=RATE,
        eval_every=1.0, eval_prompts=8,
    )  # fmt: skip
    result = run(config, say=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert result["queries"] == sum("label" in record for record in records) == 13
    assert result["rounds"] >= 2
    assert result["gradient_steps"] == result["rounds"]
    assert result["generated_tokens"] > 0
    assert result["needs"] == []
    assert not (tmp_path / "run/trainer_output").exists()


def test_rows_without_a_label_are_left_out_and_a_tie_is_the_first_s(task):
    agent = build(task)
    duels = agent.act(task.observe(np.arange(4)))
    cut = duels.judged(np.array([1.0, np.nan, 0.5, np.nan]))
    seen = []
    reward = agent.trainer.reward_funcs[0]
    agent.trainer.reward_funcs[0] = lambda **told: seen.append(told["completions"]) or reward(**told)
    before = weights(agent)
    learnt = agent.update(cut)
    assert learnt["pairs"] == 2
    shown = duels.pair.responses
    stripped = [text.strip() for text in seen[0]]
    assert stripped == [shown[0, 0], shown[2, 0], shown[0, 1], shown[2, 1]]
    assert (weights(agent) != before).any()
    after = weights(agent)
    assert agent.update(agent.act(task.observe(np.arange(4))).judged(np.full(4, np.nan))) == {}
    assert (weights(agent) == after).all()
    tie, win = (build(task), build(task))
    for other, label in ((tie, 0.5), (win, 1.0)):
        other.update(other.act(task.observe(np.arange(4))).judged(np.full(4, label)))
    assert (weights(tie) == weights(win)).all()


def test_a_round_larger_than_the_batch_takes_several_steps(task):
    agent = build(task, **{"policy.batch": 3})
    learnt = agent.update(judged(agent, task.observe(np.arange(8))))
    assert (learnt["gradient_steps"], learnt["pairs"]) == (3, 8)


# Seeds, checkpoints


def test_the_same_seed_gives_the_same_run_whatever_the_global_generators_do(task):
    found = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)
        random.seed(disturbance)
        before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        agent = build(task, seed=seed)
        responses = [judged(agent, task.observe(np.arange(4))).pair.responses.tolist()]
        trained(agent, task, rounds=1)
        responses.append(agent.act(task.observe(np.arange(4))).pair.responses.tolist())
        found.append((responses, weights(agent).tolist()))
        assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_save_and_load_go_on_exactly(task, tmp_path):
    agent, env = build(task), DuelVectorEnv(4, task=task, budget=64)
    observation, _ = env.reset(seed=0)

    def play(agent, observation, rounds):
        log = []
        for _ in range(rounds):
            duels = agent.act(observation)
            log.append((duels.pair.responses.tolist(), agent.update(judged(agent, observation))))
        return log

    play(agent, observation, 2)
    agent.save(tmp_path)
    expected = play(agent, observation, 3)
    other = build(task, seed=0)
    other.load(tmp_path)
    assert play(other, observation, 3) == expected
    assert (weights(other) == weights(agent)).all()
    assert other.policy.gradient_steps == agent.policy.gradient_steps == 5
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]


# What is refused


def test_finite_tasks_other_losses_and_more_passes_are_refused_before_anything(task):
    agent_class = load_agent(NAME)
    finite = make_task("synthetic", candidates=4, train_prompts=8, heldout_prompts=4).view()
    with pytest.raises(ValueError, match="TRLOnlineDPO plays text tasks only, and synthetic is a finite task"):
        agent_class(finite, agent_class.configure({}), seed=0, budget=4)
    for settings, said in (
        ({"loss": "slic"}, r"loss: TRL's trainer has \['dpo', 'ipo'\], got 'slic'"),
        ({"beta": 0.0}, "beta: expected a finite positive number, got 0.0"),
        ({"policy.sampler": "vllm"}, "policy.sampler: TRL's trainer takes 'torch' only, got 'vllm'"),
        ({"policy.passes": 3}, "policy.passes: TRL's trainer takes 1 only, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            agent_class(task.view(), agent_class.configure(settings), seed=0, budget=4)


def test_without_the_extra_the_error_names_it(task, monkeypatch):
    there = importlib.import_module

    def absent(name):
        if name == "trl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return there(name)

    agent_class = load_agent(NAME)
    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=r"agent TRLOnlineDPO needs .*llm-duel-env\[trl\]"):
        agent_class(task.view(), agent_class.configure({}), seed=0, budget=4)


def test_the_defaults_are_the_trainer_s(task):
    trl = pytest.importorskip("trl.experimental.online_dpo", reason="THE EXTRA trl IS NOT INSTALLED")
    theirs, ours = trl.OnlineDPOConfig(use_cpu=True, bf16=False), load_agent(NAME).configure({})
    assert (theirs.beta, theirs.temperature) == (ours.beta, ours.policy.temperature)
    assert (theirs.adam_beta1, theirs.adam_beta2) == ours.policy.betas
    assert (theirs.learning_rate, theirs.weight_decay) == (ours.policy.learning_rate, ours.policy.weight_decay)
    assert (theirs.max_grad_norm, theirs.warmup_steps) == (ours.policy.grad_clip, ours.policy.warmup)
    assert (theirs.missing_eos_penalty, theirs.loss_type) == (None, "sigmoid")
