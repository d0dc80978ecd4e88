from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from llm_duel_env.agents.policies.samplers import torch_sampler
from llm_duel_env.agents.policies.samplers.base import numbered
from llm_duel_env.agents.policies.samplers.torch_sampler import choose, sample_tokens
from llm_duel_env.agents.policies.shared_prefix import NAME, works

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

PROMPTS = [[1, 9, 8, 7], [1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 20], [1, 30, 31, 9, 9, 9]]
EOS = [2, 5, 6, 7, 8]


def uniforms(m: int, n: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((m, n, t)))


class SameDraws(LogitsProcessor):
    """Leaves `generate` only the token that the given uniform numbers choose."""

    def __init__(self, draws: torch.Tensor, temperature: float, prompt_tokens: int) -> None:
        self.draws, self.temperature, self.prompt_tokens = draws, temperature, prompt_tokens

    def __call__(self, input_ids, scores):
        probabilities = torch.softmax(scores.double() / self.temperature, -1).cumsum(-1)
        step = input_ids.shape[1] - self.prompt_tokens
        token = (probabilities <= self.draws[:, step, None]).sum(-1).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -1e9).scatter(1, token[:, None], 0.0)


def generate(model, prompts, draws, n, tokens, temperature):
    """Transformers' own generation, left padded, with the same uniform numbers (None: greedy)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).repeat_interleave(n, 0)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(n, 0)
    processors = LogitsProcessorList()
    if draws is not None:
        processors.append(SameDraws(draws.flatten(0, 1), temperature, width))
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=EOS, pad_token_id=0,
        logits_processor=processors,
    )[:, width:]  # fmt: skip
    out = torch.nn.functional.pad(out, (0, tokens - out.shape[1]))
    ended = torch.isin(out, torch.tensor(EOS))
    lengths = torch.where(ended.any(1), ended.float().argmax(1) + 1, tokens)
    out = out.masked_fill(torch.arange(tokens) >= lengths[:, None], 0)
    return out.view(len(prompts), n, tokens), lengths.view(len(prompts), n)


@pytest.mark.parametrize("family", list(fixtures.CONFIGS))
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("greedy", [False, True])
def test_samples_equal_transformers_generation_with_the_same_draws(family, share, greedy):
    model = fixtures.make_model(family)
    n, tokens = 6, 12
    draws = None if greedy else uniforms(len(PROMPTS), n, tokens)
    expected, expected_lengths = generate(model, PROMPTS, draws, n, tokens, 0.7)
    got, lengths = sample_tokens(
        model, PROMPTS, draws, n=n, max_new_tokens=tokens, eos=EOS, temperature=0.7, share_prefix=share
    )
    if not greedy:
        assert 1 < lengths.float().mean() < tokens  # some end early: rows were retired
        assert len(lengths.unique()) > 2
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", list(fixtures.CONFIGS))
def test_the_shared_prefix_serves_every_family(family):
    model = fixtures.make_model(family)
    own = model.config._attn_implementation
    assert works(model)
    assert model.config._attn_implementation == own != NAME


def test_a_model_with_other_attention_is_found_out():
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert not works(AutoModelForCausalLM.from_config(config).eval())


def test_a_draw_depends_neither_on_the_batch_nor_on_retirement():
    model = fixtures.make_model("llama")
    draws = uniforms(4, 5, 12)
    settings = {"max_new_tokens": 12, "eos": EOS, "temperature": 1.0}
    together, lengths = sample_tokens(model, PROMPTS, draws, n=5, **settings)
    for m, prompt in enumerate(PROMPTS):
        for k in range(5):
            alone, length = sample_tokens(model, [prompt], draws[m : m + 1, k : k + 1], n=1, **settings)
            assert torch.equal(alone[0, 0], together[m, k])
            assert length[0, 0] == lengths[m, k]


def test_frequencies_are_the_model_s_probabilities():
    model = fixtures.make_model("llama")
    n = 4000
    tokens, _ = sample_tokens(model, [PROMPTS[0]], uniforms(1, n, 1), n=n, max_new_tokens=1, eos=EOS, temperature=0.7)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7, -1)
    counts = torch.bincount(tokens.flatten(), minlength=48)
    spread = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 5 * spread + 1).all()
    assert (counts > 0).sum() > 5


def test_choose_at_the_edges():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]] * 4)
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-12], dtype=torch.float64)
    assert choose(logits, uniform, 1.0).tolist() == [0, 0, 1, 1]
    assert choose(torch.tensor([[1.0, 3.0, 2.0]]), None, 1.0).tolist() == [1]


def test_eos_is_the_last_token_and_a_cut_response_has_none():
    model = fixtures.make_model("llama")
    tokens, lengths = sample_tokens(model, PROMPTS, uniforms(4, 8, 6, seed=1), n=8, max_new_tokens=6, eos=[5])
    ended = lengths < 6
    assert ended.any()
    assert (~ended).any()
    for row, length in zip(tokens.flatten(0, 1), lengths.flatten()):
        assert 5 not in row[: length - 1]
        assert (row[length:] == 0).all()
        if length < 6:
            assert row[length - 1] == 5


def test_diverged_weights_are_reported():
    model = fixtures.make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        sample_tokens(model, PROMPTS, None, n=1, max_new_tokens=2, eos=EOS)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_weights_that_spoil_a_later_token_are_reported(share_prefix):
    model = fixtures.make_model("llama")
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 3 else output  # the prompts, the second token, the third

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="diverged"):
        sample_tokens(model, PROMPTS, uniforms(4, 2, 6), n=2, max_new_tokens=6, eos=[], share_prefix=share_prefix)


def test_what_is_sampled_at_a_time_is_bounded_and_changes_nothing(monkeypatch):
    model = fixtures.make_model("llama")
    sampler = torch_sampler.TorchSampler(model, eos=EOS, max_new_tokens=6)
    draws = numbered(np.arange(4))
    whole = sampler.sample(PROMPTS, draws, (0, "a"), n=3)
    sizes = []
    original = torch_sampler.sample_tokens

    def counted(model, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(torch_sampler, "sample_tokens", counted)
    for cached, expected in ((2 * (10 + 3 * 6), [2, 2]), (1, [1] * 4)):  # the longest prompt has 10 tokens
        monkeypatch.setattr(torch_sampler, "CACHED", cached)
        sizes.clear()
        parts = sampler.sample(PROMPTS, draws, (0, "a"), n=3)
        assert sizes == expected
        assert (parts.tokens == whole.tokens).all()
        assert (parts.lengths == whole.lengths).all()
    assert torch_sampler.prompts_at_a_time(vocabulary=torch_sampler.LOGITS, n=3, prompt_tokens=1, new_tokens=1) == 1
