from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_duel_env.agents.policies import packed_rows, scoring
from llm_duel_env.agents.policies.packed_rows import fits
from llm_duel_env.agents.policies.scoring import features, log_probs

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

PROMPTS = [[1, 9, 8, 7], [1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 20]]
PACKED = {"packed": True, "linear_head": True}


def batch(seed: int = 0, n: int = 2, t: int = 6):
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, t + 1, (len(PROMPTS), n)))
    lengths[0, 0], lengths[1, -1] = 1, t
    tokens = torch.from_numpy(rng.integers(2, 48, (len(PROMPTS), n, t)))
    return tokens.masked_fill(torch.arange(t) >= lengths[..., None], 0), lengths


def naive(model, tokens, lengths):
    """(M, N, T): one row at a time, in float64."""
    model = model.double()
    values = torch.zeros(tokens.shape, dtype=torch.float64)
    for m, prompt in enumerate(PROMPTS):
        for k in range(tokens.shape[1]):
            answer = tokens[m, k, : lengths[m, k]]
            logits = model(torch.cat([torch.tensor(prompt), answer])[None]).logits
            table = torch.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
            values[m, k, : len(answer)] = table[torch.arange(len(answer)), answer]
    return values


def wide(family: str):
    """A model whose sliding window, where it has one, is longer than our rows."""
    return fixtures.make_model(family, **({"sliding_window": 64} if family in ("gemma3", "mistral") else {}))


@pytest.mark.parametrize("family", [name for name in fixtures.CONFIGS if name != "gemma2"])
@pytest.mark.parametrize("spare", [True, False])
def test_values_and_gradients_are_those_of_one_row_at_a_time(family, spare, monkeypatch):
    monkeypatch.setattr(scoring.output_layer, "CHUNK", 100 if spare else 1 << 24)
    tokens, lengths = batch()
    model = wide(family)
    assert packed_rows.works(model)
    called = []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: called.append(k["input_ids"]) or f(*a, **k))
    got = log_probs(model, PROMPTS, tokens, lengths, per_token=True, **PACKED)
    assert [len(ids) for ids in called] == [len(PROMPTS)]  # one call, one row for each prompt
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    (got * weights).sum().backward()

    other = wide(family)
    expected = naive(other, tokens, lengths)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 0.5
    summed = log_probs(model, PROMPTS, tokens, lengths, **PACKED)
    torch.testing.assert_close(summed.double(), expected.sum(-1), rtol=1e-5, atol=1e-4)
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in other.named_parameters():
        scale = parameter.grad.abs().max() + 1e-6
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


def test_prompts_in_several_calls_change_nothing(monkeypatch):
    model, (tokens, lengths) = fixtures.make_model("llama"), batch()
    with torch.no_grad():
        whole = log_probs(model, PROMPTS, tokens, lengths, **PACKED)
        monkeypatch.setattr(scoring, "TOKENS", 40)
        sizes = []
        monkeypatch.setattr(model, "forward", lambda f=model.forward, **k: sizes.append(k["input_ids"].shape) or f(**k))
        parts = log_probs(model, PROMPTS, tokens, lengths, **PACKED)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    assert len(sizes) > 1
    assert all(rows == 1 or rows * width <= 40 for rows, width in sizes)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3"])
@pytest.mark.parametrize("spare", [True, False])
def test_features_are_those_of_copied_prompts(family, spare, monkeypatch):
    monkeypatch.setattr(scoring.output_layer, "CHUNK", 100 if spare else 1 << 24)
    model, (tokens, lengths) = wide(family), batch(n=6)
    expected = features(model, PROMPTS, tokens, lengths, share_prefix=False)
    called = []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: called.append(k["input_ids"]) or f(*a, **k))
    got = features(model, PROMPTS, tokens, lengths, **PACKED)
    assert [len(ids) for ids in called] == [len(PROMPTS)]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_are_long_for_the_model_are_not_packed():
    model = fixtures.make_model("llama")
    assert model.config.hidden_size == 32
    assert fits(model, [[1] * 200], torch.tensor([[10, 10]]))  # twice the longest response or less
    assert fits(model, [[1]], torch.tensor([[200, 200]]))
    assert fits(model, [[1] * 28], torch.tensor([[10] * 10]))  # 128 tokens
    assert not fits(model, [[1] * 28], torch.tensor([[10] * 9 + [11]]))
    tokens, lengths = batch(n=40)
    assert not fits(model, PROMPTS, lengths)
    for score in (log_probs, features):
        expected = score(model, PROMPTS, tokens, lengths)
        assert torch.equal(score(model, PROMPTS, tokens, lengths, **PACKED), expected)


def test_a_sliding_window_shorter_than_the_row_is_respected():
    model = fixtures.make_model("gemma3", sliding_window=24)
    prompts, lengths = [list(range(2, 22))], torch.tensor([[4, 3]])
    tokens = torch.tensor([[[5, 6, 7, 8], [9, 10, 11, 0]]])
    assert packed_rows.works(model)
    assert not fits(model, prompts, lengths)
    assert fits(model, [prompts[0][:13]], lengths)
    got = log_probs(model, prompts, tokens, lengths, **PACKED)
    expected = log_probs(model, prompts, tokens, lengths, share_prefix=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_model_with_another_attention_is_not_packed():
    assert not packed_rows.works(fixtures.make_model("gemma2", sliding_window=64))  # its attention is eager


def test_a_window_shorter_than_any_row_is_noticed():
    assert not packed_rows.works(fixtures.make_model("mistral"))


def test_a_model_that_sees_more_than_the_mask_says_is_found_out(monkeypatch):
    model = fixtures.make_model("llama")
    monkeypatch.setattr(model, "forward", lambda f=model.forward, **k: f(**{**k, "attention_mask": None}))
    assert not packed_rows.works(model)
