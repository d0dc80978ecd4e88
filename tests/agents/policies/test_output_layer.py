from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_duel_env.agents.policies import output_layer
from llm_duel_env.agents.policies.output_layer import is_linear, token_log_probs
from llm_duel_env.agents.policies.scoring import log_probs

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

PROMPTS = [[1, 9, 8, 7], [1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 20]]


def plain(hidden, weight, bias, tokens, cap=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def values(dtype, bias: bool, n: int = 13, v: int = 29, h: int = 7):
    draw = torch.Generator().manual_seed(0)
    shapes = [(n, h), (v, h), (v,)][: 2 + bias]
    leaves = [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]
    tokens = torch.randint(0, v, (n,), generator=draw)
    return (*leaves, *([] if bias else [None])), tokens


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk", [1, 29 * 4, 10**6])
def test_values_and_gradients_are_the_plain_ones(dtype, tolerance, bias, cap, chunk):
    inputs, tokens = values(dtype, bias)
    got = token_log_probs(*inputs, tokens, cap=cap, chunk=chunk)
    expected = plain(*inputs, tokens, cap)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 2, len(tokens), dtype=dtype)
    leaves = [x for x in inputs if x is not None]
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves)
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_frozen_inputs_get_no_gradient_and_autocast_decides_the_type():
    (hidden, weight, _), tokens = values(torch.float32, bias=False)
    frozen = weight.detach()
    token_log_probs(hidden, frozen, None, tokens, chunk=29).sum().backward()
    assert hidden.grad.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(hidden, weight, None, tokens, chunk=29)
        expected = torch.nn.functional.linear(hidden, weight)
    assert expected.dtype == torch.bfloat16
    expected = expected.float().log_softmax(-1)[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, plain(hidden, weight, None, tokens))
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    (hidden, weight, _), tokens = values(torch.float32, bias=False)
    with pytest.raises(ValueError, match=r"hidden \(13, 7\), weight \(29, 7\), tokens \(12,\)"):
        token_log_probs(hidden, weight, None, tokens[:12])


def batch(seed: int = 0, n: int = 4, t: int = 12):
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, t + 1, (len(PROMPTS), n)))
    lengths[0, 0], lengths[1, 1] = 1, t
    tokens = torch.from_numpy(rng.integers(2, 48, (len(PROMPTS), n, t)))
    return tokens.masked_fill(torch.arange(t) >= lengths[..., None], 0), lengths


@pytest.mark.parametrize("family", list(fixtures.CONFIGS))
@pytest.mark.parametrize("ways", [{"share_prefix": True}, {"share_prefix": False}, {"one_call": True}])
def test_models_are_scored_and_taught_alike(family, ways, monkeypatch):
    monkeypatch.setattr(output_layer, "CHUNK", 5 * 48)
    model, (tokens, lengths) = fixtures.make_model(family), batch()
    assert is_linear(model)
    weights = torch.linspace(-1, 1, lengths.numel()).view_as(lengths)
    results = []
    for linear in (True, False):
        for per_token in (True, False):
            model.zero_grad()
            got = log_probs(model, PROMPTS, tokens, lengths, linear_head=linear, per_token=per_token, **ways)
            (got * (weights[..., None] if per_token else weights)).sum().backward()
            results.append((got.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (sparing_tokens, _), (sparing, gradient), (whole_tokens, _), (whole, expected) = results
    torch.testing.assert_close(sparing_tokens, whole_tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparing, whole, rtol=1e-5, atol=1e-4)
    assert whole.std() > 1
    for name, value in expected.items():
        assert (gradient[name] - value).abs().max() <= 1e-4 * (value.abs().max() + 1e-6), name


def test_a_model_that_scales_its_logits_is_not_taken_for_linear():
    model = fixtures.make_model("llama")
    own = model.forward

    def scaled(*args, **kwargs):
        result = own(*args, **kwargs)
        result.logits = result.logits * 1.1
        return result

    model.forward = scaled
    assert not is_linear(model)
    adapted = fixtures.make_model("llama")
    adapted.set_output_embeddings(torch.nn.Sequential(adapted.get_output_embeddings()))
    assert not is_linear(adapted)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("gradient", [True, False])
def test_logits_never_exist_all_at_once(gradient):
    vocabulary, n, t = 3000, 8, 20
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, vocabulary, (len(PROMPTS), n, t)))
    lengths = torch.full((len(PROMPTS), n), t)
    largest = {}
    for sparing in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(gradient), Largest() as mode:
            patch.setattr(output_layer, "CHUNK", 30 * vocabulary)
            got = log_probs(model, PROMPTS, tokens, lengths, linear_head=sparing)
            if gradient:
                got.sum().backward()
        largest[sparing] = mode.numbers
    assert largest[False] >= len(PROMPTS) * n * t * vocabulary  # 480 positions
    assert largest[True] == 30 * vocabulary
