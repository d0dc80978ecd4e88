from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_duel_env.agents.policies import scoring
from llm_duel_env.agents.policies.scoring import features, log_probs

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

PROMPTS = [[1, 9, 8, 7], [1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 20]]


def batch(seed: int = 0, n: int = 4, t: int = 12):
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, t + 1, (len(PROMPTS), n)))
    lengths[0, 0], lengths[1, 1] = 1, t
    tokens = torch.from_numpy(rng.integers(2, 48, (len(PROMPTS), n, t)))
    return tokens.masked_fill(torch.arange(t) >= lengths[..., None], 0), lengths


def naive(model, tokens, lengths):
    """One row at a time, without padding: sums of log-probabilities, and features."""
    sums, states = torch.zeros(lengths.shape), []
    for m, prompt in enumerate(PROMPTS):
        for k in range(tokens.shape[1]):
            answer = tokens[m, k, : lengths[m, k]]
            with torch.no_grad():
                out = model(torch.cat([torch.tensor(prompt), answer])[None], output_hidden_states=True)
            table = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1], -1)
            picked = table[torch.arange(len(answer)), answer]
            sums[m, k] = picked.sum()
            hidden = out.hidden_states[-1][0, len(prompt) :]
            size = torch.tensor(float(len(answer)))
            states.append(torch.cat([hidden.mean(0), torch.stack([picked.sum(), picked.mean(), picked.min(), size])]))
    return sums, torch.stack(states).view(*lengths.shape, -1)


@pytest.mark.parametrize("family", list(fixtures.CONFIGS))
@pytest.mark.parametrize("share", [True, False])
def test_equal_to_one_row_at_a_time(family, share):
    model, (tokens, lengths) = fixtures.make_model(family), batch()
    expected, states = naive(model, tokens, lengths)
    with torch.no_grad():
        got = log_probs(model, PROMPTS, tokens, lengths, share_prefix=share)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 1  # there was something to tell apart
    torch.testing.assert_close(
        features(model, PROMPTS, tokens, lengths, share_prefix=share), states, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3"])
def test_gradients_flow_through_the_shared_prompt(family):
    tokens, lengths = batch()
    weights = torch.linspace(-1, 1, lengths.numel()).view_as(lengths)
    gradients = []
    for share in (True, False):
        model = fixtures.make_model(family)
        (log_probs(model, PROMPTS, tokens, lengths, share_prefix=share) * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        scale = expected.abs().max() + 1e-6
        assert (gradients[0][name] - expected).abs().max() <= 1e-4 * scale, name


def test_small_chunks_change_nothing(monkeypatch):
    model, (tokens, lengths) = fixtures.make_model("llama"), batch()
    with torch.no_grad():
        whole = log_probs(model, PROMPTS, tokens, lengths), features(model, PROMPTS, tokens, lengths)
        monkeypatch.setattr(scoring, "TOKENS", 20)
        monkeypatch.setattr(scoring, "PROMPT_TOKENS", 12)
        parts = log_probs(model, PROMPTS, tokens, lengths), features(model, PROMPTS, tokens, lengths)
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_chunks_hold_every_row_once_and_keep_their_bounds():
    lengths = torch.from_numpy(np.random.default_rng(1).integers(1, 60, 200))
    chunks = list(scoring._chunks(lengths, 300))
    assert sorted(torch.cat(chunks).tolist()) == list(range(200))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * int(lengths[chunk].max()) <= 300
        assert torch.equal(chunk, chunk.sort().values)


@pytest.mark.parametrize("bad", [0, 13])
def test_impossible_lengths_are_refused(bad):
    tokens, lengths = batch()
    lengths[2, 1] = bad
    with pytest.raises(ValueError, match="lengths: expected 1 to 12"):
        log_probs(fixtures.make_model("llama"), PROMPTS, tokens, lengths)
