from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_duel_env.agents.losses import dpo
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.ways import Ways
from llm_duel_env.types import Candidates, Preferences

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=4, microbatch=3, temperature=0.9)
LOSS = partial(dpo, beta=0.1)
IDS = np.array([3, 11, 3, 40, 8])


def make(folder: str, config: PolicyConfig = CONFIG, seed: int = 0, **view) -> LanguageModelPolicy:
    return LanguageModelPolicy(fixtures.make_view(folder, **view), config, seed=seed, device="cpu")


def one_round(policy: LanguageModelPolicy, number: int) -> dict:
    """Samples pairs; the response with the lower mean id wins; trains."""
    candidates = policy.sample(fixtures.observe(IDS + number), 2, ("round", number))
    means = candidates.tokens.sum(-1) / candidates.lengths
    labels = (means[:, 0] < means[:, 1]).astype(np.float32)
    preferences = Preferences(candidates, labels, np.ones(len(labels), bool))
    return policy.update(LOSS, preferences, progress=number / 5, key=("shuffle", number))


def same_candidates(one: Candidates, other: Candidates) -> bool:
    return (
        np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.lengths, other.lengths)
        and np.array_equal(one.responses, other.responses)
    )


@pytest.fixture
def policy(model_folder) -> LanguageModelPolicy:
    return make(model_folder())


def test_samples_have_the_shapes_texts_and_lengths_they_should(policy):
    candidates = policy.sample(fixtures.observe(IDS), 6, ("a",))
    assert candidates.shape == (5, 6)
    assert candidates.responses.dtype == object
    assert candidates.tokens.shape[:2] == (5, 6)
    assert candidates.lengths.min() >= 1
    assert candidates.lengths.max() <= 10
    for ids, length, text in zip(candidates.tokens.reshape(30, -1), candidates.lengths.flat, candidates.responses.flat):
        ended = ids[length - 1] in (2, 5)
        assert ended or length == 10
        assert text == policy.tokenizer.decode(ids[: length - ended], skip_special_tokens=True).strip()
    assert policy.generated_tokens == candidates.lengths.sum()


def test_draws_follow_seed_key_and_prompt_only(policy, model_folder):
    whole = policy.sample(fixtures.observe(IDS), 4, ("a", 1))
    assert same_candidates(whole, policy.sample(fixtures.observe(IDS), 4, ("a", 1)))
    part = policy.sample(fixtures.observe(IDS[3:]), 4, ("a", 1))
    width = part.tokens.shape[2]
    assert np.array_equal(part.tokens, whole.tokens[3:, :, :width])
    assert not np.array_equal(whole.responses, policy.sample(fixtures.observe(IDS), 4, ("a", 2)).responses)
    assert not np.array_equal(
        whole.responses, make(model_folder(), seed=1).sample(fixtures.observe(IDS), 4, ("a", 1)).responses
    )
    assert not np.array_equal(whole.tokens[0], whole.tokens[2])  # the same prompt, visited twice in one batch


def test_large_batches_are_cut_without_changing_draws(policy, monkeypatch):
    whole = policy.sample(fixtures.observe(IDS), 4, ("a",))
    monkeypatch.setattr("llm_duel_env.agents.policies.samplers.torch_sampler.ROWS", 8)
    assert same_candidates(whole, policy.sample(fixtures.observe(IDS), 4, ("a",)))


def test_reference_samples_are_tagged_and_come_from_the_reference(policy):
    before = policy.sample(fixtures.observe(IDS), 3, ("a",))
    assert before.from_reference is None
    one_round(policy, 0)
    after = policy.sample(fixtures.observe(IDS), 3, ("a",), reference=True)
    assert after.from_reference.all()
    assert same_candidates(before, after)
    assert not same_candidates(before, policy.sample(fixtures.observe(IDS), 3, ("a",)))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3"])
@pytest.mark.parametrize("chat", [False, True])
def test_log_prob_is_that_of_the_text_s_own_tokens(model_folder, family, chat):
    policy = make(model_folder(family, chat))
    assert policy.ways.share_prefix
    candidates = policy.sample(fixtures.observe(IDS), 3, ("a",))
    got = policy.log_prob(candidates)
    assert got.shape == (5, 3)
    assert got.dtype == torch.float32
    for m, text in enumerate(candidates.observation["prompt"]):
        if chat:
            prompt = policy.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert prompt[0] == 1
            assert prompt[-1] == 9  # w3, the generation prompt
        else:
            prompt = policy.tokenizer(text)["input_ids"]
        for k in range(3):
            answer = candidates.tokens[m, k, : candidates.lengths[m, k]].tolist()
            with torch.no_grad():
                logits = policy.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1)[range(len(answer)), answer].sum()
            assert abs(float(got[m, k] - expected)) < 1e-4


def test_greedy_is_the_likeliest_token_by_token(policy):
    candidates = policy.greedy(fixtures.observe(IDS[:2]))
    assert candidates.shape == (2, 1)
    for m, text in enumerate(candidates.observation["prompt"]):
        ids = policy.tokenizer(text)["input_ids"]
        for token in candidates.tokens[m, 0, : candidates.lengths[m, 0]]:
            with torch.no_grad():
                assert int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(int(token))
    assert policy.generated_tokens == 0  # evaluation is not counted


def test_features_are_frozen_standardised_and_shaped(policy):
    candidates = policy.sample(fixtures.observe(np.arange(30)), 4, ("a",), temperature=1.0)
    before = policy.embed(candidates)
    assert before.shape == (30, 4, policy.feature_size)
    assert before.mean().abs() < 0.2
    assert 0.7 < before.std() < 1.3
    one_round(policy, 0)
    policy.move_reference()
    assert torch.equal(policy.embed(candidates), before)


def test_training_makes_winners_likelier_than_losers(policy):
    candidates = policy.sample(fixtures.observe(IDS), 2, ("a",))
    preferences = Preferences(candidates, np.array([1, 0, 1, 0, 1], np.float32), np.ones(5, bool))
    ordered = preferences.ordered()
    start = policy.log_prob(ordered)
    torch.testing.assert_close(start, policy.reference_log_prob(ordered), rtol=1e-5, atol=1e-5)
    for step in range(8):
        metrics = policy.update(LOSS, preferences, progress=0.1, key=(step,))
    gain = policy.log_prob(ordered) - start
    assert (gain[:, 0] > gain[:, 1]).all()
    assert metrics["loss"] < 0.6
    assert metrics["accuracy"] == 1.0
    assert metrics["gradient_steps"] == 2.0  # 5 pairs in batches of 4
    assert metrics["pairs"] == 5.0
    assert policy.gradient_steps == 16
    torch.testing.assert_close(policy.reference_log_prob(ordered), start, rtol=1e-5, atol=1e-5)
    assert policy.diagnose(fixtures.observe(IDS), ("d",))["kl"] > 0.01


def test_ties_and_unlabelled_pairs_do_not_train(policy):
    candidates = policy.sample(fixtures.observe(IDS), 2, ("a",))
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    labels = np.array([0.5, np.nan, 0.5, 0.5, np.nan], np.float32)
    assert policy.update(LOSS, Preferences(candidates, labels, np.ones(5, bool)), progress=0.0, key=(0,)) == {}
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())


def test_microbatches_change_memory_not_results(model_folder):
    weights = []
    for size in (1, 3, 64):
        policy = make(model_folder(), replace(CONFIG, microbatch=size, batch=64))
        metrics = one_round(policy, 0)
        weights.append((policy.model.state_dict()["model.norm.weight"], metrics["loss"], metrics["grad_norm"]))
    for other in weights[1:]:
        torch.testing.assert_close(other[0], weights[0][0], rtol=1e-4, atol=1e-5)
        assert other[1:] == pytest.approx(weights[0][1:], rel=1e-3)


def test_the_stored_reference_log_prob_is_used_unless_stale(policy):
    candidates = policy.sample(fixtures.observe(IDS), 2, ("a",))
    true = policy.reference_log_prob(candidates)
    marked = replace(candidates, reference_log_prob=np.full((5, 2), -7.0, np.float32))
    assert (policy.reference_log_prob(marked) == -7).all()
    one_round(policy, 0)
    policy.move_reference()
    assert policy.reference_version == 1
    moved = policy.reference_log_prob(marked)
    assert not torch.allclose(moved, true, atol=1e-3)
    torch.testing.assert_close(moved, policy.log_prob(candidates))


@pytest.mark.parametrize("move", [False, True])
def test_a_run_goes_on_exactly_after_save_and_load(model_folder, tmp_path, move):
    def play(policy, rounds):
        for number in rounds:
            metrics = one_round(policy, number)
            policy.embed(policy.sample(fixtures.observe(IDS), 2, ("e", number)))
            if move and number == 0:
                policy.move_reference()
        return metrics

    straight = make(model_folder())
    metrics = play(straight, range(3))
    first = make(model_folder())
    play(first, range(1))
    first.save(tmp_path / "policy")
    resumed = make(model_folder())
    resumed.load(tmp_path / "policy")
    assert play(resumed, range(1, 3)) == metrics
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for counter in ("generated_tokens", "gradient_steps", "reference_version"):
        assert (
            getattr(straight, counter) == getattr(resumed, counter) != (0 if counter != "reference_version" else None)
        )
    candidates = straight.sample(fixtures.observe(IDS), 3, ("end",))
    assert same_candidates(candidates, resumed.sample(fixtures.observe(IDS), 3, ("end",)))
    assert torch.equal(straight.embed(candidates), resumed.embed(candidates))
    assert torch.equal(straight.reference_log_prob(candidates), resumed.reference_log_prob(candidates))
    assert (
        sorted(
            p.suffix for p in (tmp_path / "policy").rglob("*") if p.is_file() and p.suffix in (".pt", ".bin", ".pkl")
        )
        == []
    )
    assert set(load_file(tmp_path / "policy" / "optimizer.safetensors")) != set()


def test_a_saved_policy_is_a_model_folder(model_folder, tmp_path, policy):
    one_round(policy, 0)
    policy.save(tmp_path)
    loaded = make(str(tmp_path / "model"))
    assert same_candidates(policy.greedy(fixtures.observe(IDS)), loaded.greedy(fixtures.observe(IDS)))


def test_recorded_text_becomes_candidates(policy):
    texts = np.array([["w1 w2", ""]] * 2, dtype=object)
    candidates = policy.from_text(fixtures.observe(IDS[:2]), texts)
    assert candidates.lengths.tolist() == [[3, 1]] * 2
    assert torch.isfinite(policy.log_prob(candidates)).all()


@pytest.mark.parametrize("missing", [("shared_prefix",), ("packed_rows",), ("shared_prefix", "packed_rows")])
def test_a_model_that_a_way_does_not_fit_runs_another(model_folder, monkeypatch, missing):
    expected = make(model_folder())
    for module in missing:
        monkeypatch.setattr(f"llm_duel_env.agents.policies.{module}.works", lambda model, tolerance: False)
    plain = make(model_folder())
    assert expected.ways == Ways(share_prefix=True, linear_head=True, packed=True)
    assert plain.ways == Ways("shared_prefix" not in missing, True, "packed_rows" not in missing)
    one, other = (p.sample(fixtures.observe(IDS), 4, ("a",)) for p in (expected, plain))
    assert same_candidates(one, other)
    torch.testing.assert_close(expected.log_prob(one), plain.log_prob(one), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(expected.embed(one), plain.embed(one), rtol=1e-3, atol=1e-3)


def test_bfloat16_stays_close(model_folder):
    exact = make(model_folder())
    view = fixtures.make_view(model_folder())
    rough = LanguageModelPolicy(view, CONFIG, seed=0, device="cpu", bf16=True)
    assert rough.ways == Ways(share_prefix=True, linear_head=True, packed=True)
    candidates = exact.sample(fixtures.observe(IDS), 2, ("a",))
    difference = (rough.log_prob(candidates) - exact.log_prob(candidates)).abs()
    assert 0 < difference.max() < 1.5
    assert np.isfinite(one_round(rough, 0)["grad_norm"])


def test_mistakes_are_refused(model_folder, policy):
    with pytest.raises(ValueError, match="at most 96 tokens"):
        make(model_folder(), max_prompt_tokens=90)
    with pytest.raises(ValueError, match="needs model"):
        make(model_folder(), max_new_tokens=None)
    with pytest.raises(ValueError, match="positive temperature"):
        policy.sample(fixtures.observe(IDS), 2, ("a",), temperature=0.0)
    with pytest.raises(ValueError, match="text prompt"):
        policy.greedy({"prompt_id": IDS})
    with pytest.raises(ValueError, match="no token ids"):
        policy.log_prob(Candidates(fixtures.observe(IDS), np.full((5, 1), "w1", dtype=object)))


def test_divergence_stops_before_the_weights_are_lost(policy):
    candidates = policy.sample(fixtures.observe(IDS), 2, ("a",))
    before = policy.model.state_dict()["model.norm.weight"].clone()
    with pytest.raises(FloatingPointError, match="diverged"):
        policy.update(
            lambda pairs: (pairs.policy.sum() * torch.inf, {}),
            Preferences(candidates, np.ones(5, np.float32), np.ones(5, bool)),
            progress=0.0,
            key=(0,),
        )
    assert torch.equal(policy.model.state_dict()["model.norm.weight"], before)


def test_stages_are_timed(policy):
    one_round(policy, 0)
    assert {"sample", "reference", "learn"} <= set(policy.seconds)
    assert all(seconds > 0 for seconds in policy.seconds.values())
