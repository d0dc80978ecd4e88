import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.candidate import CandidatePolicy, CandidateScorer
from llm_duel_env.randomness import torch_generator
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates, Preferences

CONFIG = PolicyConfig(learning_rate=1e-2, temperature=1.0, warmup=0.0, batch=8, microbatch=8)
DPO = direct_optimizer("dpo", 0.5)


@pytest.fixture(scope="module")
def task():
    return Synthetic(candidates=12, train_prompts=64, heldout_prompts=8)


@pytest.fixture
def policy(task):
    return CandidatePolicy(task.view(), CONFIG, seed=0)


def preferences(task, count=16, seed=0, labels=None):
    draw = np.random.default_rng(seed)
    responses = np.array([draw.choice(task.candidates, 2, replace=False) for _ in range(count)])
    observation = task.observe(draw.integers(task.train_prompts, size=count))
    labels = draw.integers(2, size=count).astype(np.float32) if labels is None else labels
    return Preferences(Candidates(observation, responses), labels, np.ones(count, bool))


def trained(policy, task, rounds=5):
    for r in range(rounds):
        policy.update(DPO, preferences(task, seed=r), progress=r / rounds, key=("train", r))
    return policy


@pytest.mark.parametrize(("c", "d", "kind"), [(5, 7, "outer"), (40, 40, "product"), (40, 30, "concat")])
def test_scores_are_a_network_on_phi_without_building_phi(c, d, kind):
    scorer = CandidateScorer(c, d, torch_generator(0)).double()
    assert scorer.kind == kind
    draw = torch.Generator().manual_seed(0)
    for value in [*scorer.parameters(), scorer.context_mean, scorer.candidate_mean]:
        value.data.normal_(generator=draw)
    scorer.candidate_std.fill_(2.0)
    x, a = torch.randn(3, c, dtype=torch.float64), torch.randn(3, 4, d, dtype=torch.float64)
    phi = scorer.features(x, a)
    assert phi.shape == (3, 4, scorer.feature_size)
    pair = scorer.pair.reshape(-1, 64) if kind != "concat" else None
    weight = {
        "outer": lambda: torch.cat([scorer.context, scorer.candidate, pair]),
        "product": lambda: torch.cat([scorer.candidate, pair]),
        "concat": lambda: torch.cat([scorer.context, scorer.candidate]),
    }[kind]()
    expected = (phi @ weight + scorer.bias).relu() @ scorer.out
    torch.testing.assert_close(scorer(x, a), expected, rtol=1e-10, atol=1e-10)
    xs, as_ = scorer.standardise(x, a)
    by_hand = {
        "outer": torch.cat([xs[1], as_[1, 2], torch.outer(xs[1], as_[1, 2]).flatten()]),
        "product": torch.cat([as_[1, 2], xs[1] * as_[1, 2]]) if c == d else None,
        "concat": torch.cat([xs[1], as_[1, 2]]),
    }[kind]
    torch.testing.assert_close(phi[1, 2], by_hand)


def test_starts_as_its_reference_and_uniform(task, policy):
    everything = Candidates(task.observe(np.arange(4)), np.tile(np.arange(12), (4, 1)))
    torch.testing.assert_close(policy.log_prob(everything), torch.full((4, 12), -math.log(12)))
    torch.testing.assert_close(policy.reference_log_prob(everything), torch.full((4, 12), -math.log(12)))
    report = policy.diagnose(everything.observation, ("d",))
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["entropy"] == pytest.approx(math.log(12))


def test_samples_follow_log_prob_at_temperature_one(task, policy):
    trained(policy, task)
    observation = task.observe(np.array([3]))
    everything = Candidates(observation, np.arange(12)[None])
    drawn = policy.sample(observation, 20_000, ("s",)).responses[0]
    share = np.bincount(drawn, minlength=12) / 20_000
    np.testing.assert_allclose(share, policy.log_prob(everything).exp()[0], atol=0.012)
    assert policy.log_prob(everything).exp().sum().item() == pytest.approx(1)
    cold = policy.sample(observation, 500, ("s",), temperature=1e-4).responses
    assert (cold == policy.greedy(observation).responses).all()
    assert policy.greedy(observation).responses[0, 0] == policy.log_prob(everything)[0].argmax()


def test_a_prompts_draws_do_not_depend_on_its_batch(task, policy):
    trained(policy, task)
    batch = policy.sample(task.observe(np.array([9, 3, 40, 3])), 20, ("s", 1)).responses
    alone = policy.sample(task.observe(np.array([3])), 20, ("s", 1)).responses
    np.testing.assert_array_equal(batch[1], alone[0])
    assert (batch[3] != batch[1]).any()  # the second visit to a prompt has draws of its own
    fewer = policy.sample(task.observe(np.array([3])), 5, ("s", 1)).responses
    np.testing.assert_array_equal(fewer[0], alone[0, :5])


def test_samples_are_keyed_and_reference_samples_are_tagged(task, policy):
    trained(policy, task)
    observation = task.observe(np.arange(6))
    one, same, other = (policy.sample(observation, 30, key) for key in (("a", 1), ("a", 1), ("a", 2)))
    np.testing.assert_array_equal(one.responses, same.responses)
    assert (one.responses != other.responses).any()
    assert one.from_reference is None
    reference = policy.sample(observation, 2000, ("r",), reference=True)
    assert reference.from_reference.all()
    counts = np.bincount(reference.responses.ravel(), minlength=12) / 12_000
    np.testing.assert_allclose(counts, 1 / 12, atol=0.01)  # still uniform after training


def test_embed_is_frozen_and_standardised(task, policy):
    everything = Candidates(task.observe(np.arange(64)), np.tile(np.arange(12), (64, 1)))
    before = policy.embed(everything)
    assert before.shape == (64, 12, policy.feature_size)
    torch.testing.assert_close(before.mean(dim=(0, 1)), torch.zeros(policy.feature_size), atol=1e-4, rtol=0)
    torch.testing.assert_close(before.flatten(0, 1).std(dim=0), torch.ones(policy.feature_size), atol=1e-2, rtol=0)
    trained(policy, task)
    policy.move_reference()
    torch.testing.assert_close(policy.embed(everything), before, rtol=0, atol=0)
    some = Candidates(everything.observation, np.tile([7, 2], (64, 1)))
    torch.testing.assert_close(policy.embed(some), before[:, [7, 2]], rtol=0, atol=0)


def test_update_moves_towards_winners_and_leaves_the_reference(task, policy):
    judged = preferences(task)
    ordered = judged.ordered()
    metrics = [policy.update(DPO, judged, progress=0.0, key=("u", i)) for i in range(20)]
    gap = policy.log_prob(ordered)
    assert (gap[:, 0] > gap[:, 1]).double().mean() > 0.9
    assert metrics[-1]["loss"] < metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert metrics[0]["gradient_steps"] == 2
    assert metrics[0]["pairs"] == 16
    assert metrics[0]["learning_rate"] == CONFIG.learning_rate
    torch.testing.assert_close(policy.reference_log_prob(ordered), torch.full((16, 2), -math.log(12)))


def test_microbatches_change_nothing_but_rounding(task):
    results = []
    for microbatch in (8, 3):
        policy = trained(CandidatePolicy(task.view(), replace(CONFIG, microbatch=microbatch), seed=0), task)
        results.append([value.detach().clone() for value in policy.scorer.parameters()])
    for whole, parts in zip(*results):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_ties_and_missing_labels_are_left_out(task, policy):
    labels = np.array([0.5, np.nan, 0.5], np.float32)
    assert policy.update(DPO, preferences(task, 3, labels=labels), progress=0.0, key=("u",)) == {}
    mixed = preferences(task, 4, labels=np.array([1, np.nan, 0, 0.5], np.float32))
    alone = CandidatePolicy(task.view(), CONFIG, seed=0)
    assert policy.update(DPO, mixed, progress=0.0, key=("u",)) == alone.update(
        DPO, mixed.rows(np.array([0, 2])), progress=0.0, key=("u",)
    )


def test_gradient_norm_is_clipped(task):
    policy = CandidatePolicy(task.view(), replace(CONFIG, grad_clip=1e-12, betas=(0.0, 0.0)), seed=0)
    before = policy.scorer.out.detach().clone()
    assert policy.update(DPO, preferences(task), progress=0.0, key=("u",))["grad_norm"] > 1e-12
    # Adam divides a gradient of 1e-12 by itself plus 1e-8: next to nothing is left of the step.
    assert (policy.scorer.out - before).abs().max() < 1e-5


def test_save_and_load_go_on_bit_for_bit(task, tmp_path):
    policy = trained(CandidatePolicy(task.view(), CONFIG, seed=0), task)
    policy.move_reference()
    trained(policy, task, 2)
    policy.save(tmp_path)
    other = CandidatePolicy(task.view(), CONFIG, seed=0)
    other.load(tmp_path)
    assert other.reference_version == 1
    for r in range(3):
        judged = preferences(task, seed=100 + r)
        assert policy.update(DPO, judged, progress=0.5, key=("c", r)) == other.update(
            DPO, judged, progress=0.5, key=("c", r)
        )
    everything = Candidates(task.observe(np.arange(4)), np.tile(np.arange(12), (4, 1)))
    assert torch.equal(policy.log_prob(everything), other.log_prob(everything))
    assert torch.equal(policy.reference_log_prob(everything), other.reference_log_prob(everything))


def test_an_untrained_policy_can_be_saved(task, policy, tmp_path):
    policy.save(tmp_path)
    other = trained(CandidatePolicy(task.view(), CONFIG, seed=0), task, 1)
    other.load(tmp_path)
    judged = preferences(task)
    assert policy.update(DPO, judged, progress=0.0, key=("c",)) == other.update(DPO, judged, progress=0.0, key=("c",))


def test_move_reference_makes_the_present_policy_the_reference(task, policy):
    trained(policy, task)
    some = preferences(task).pair
    policy.move_reference()
    torch.testing.assert_close(policy.reference_log_prob(some), policy.log_prob(some), rtol=0, atol=0)
    before = policy.log_prob(some)
    trained(policy, task, 1)
    torch.testing.assert_close(policy.reference_log_prob(some), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_the_weights(task, policy):
    before = [value.detach().clone() for value in policy.scorer.parameters()]
    with pytest.raises(FloatingPointError, match="weights were left as they were"):
        policy.update(lambda p: (p.policy.sum() * float("nan"), {}), preferences(task), progress=0.0, key=("u",))
    for value, old in zip(policy.scorer.parameters(), before):
        assert torch.equal(value, old)


def test_make_policy_finds_it_and_text_tasks_are_refused(task):
    assert isinstance(make_policy(task.view(), CONFIG, seed=0), CandidatePolicy)
    text = replace(task.view(), kind="text", observation_space=spaces.Dict())
    with pytest.raises(ValueError, match="finite task"):
        CandidatePolicy(text, CONFIG, seed=0)
