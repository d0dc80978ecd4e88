"""Log-probabilities of given tokens without ever holding all of their logits.

Logits of N tokens over V words are N x V numbers, three times over with a gradient: for a large vocabulary more than
the model itself. Here they exist for some tokens at a time, in the forward pass and again in the backward pass, and the
peak is that of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 1 << 24
"""Logits that exist at a time (64 MB in float32), unless one token has more."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    *,
    cap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Log-probabilities of tokens under softmax(cap tanh((hidden W' + b) / cap)); no cap where that is None.

    Products run in autocast's type where autocast is on, else in the weights'; the softmax is in float32 (float64 for
    float64 weights).

    Args:
        hidden: (N, H), what the output layer is given.
        weight: (V, H).
        bias: (V,) or None.
        tokens: (N,) int64.
        cap: Gemma 2's cap of the logits.
        chunk: logits that exist at a time; None is `CHUNK`.

    Returns:
        (N,) float32 (float64 for float64 weights), with gradients for hidden, weight and bias where they want one.
    """
    if hidden.ndim != 2 or tokens.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        got = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, tokens {tuple(tokens.shape)}"
        raise ValueError(f"expected hidden (N, H), weight (V, H) and tokens (N,), got {got}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return _TokenLogProbs.apply(hidden, weight, bias, tokens, cap, max((chunk or CHUNK) // len(weight), 1), dtype)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps (N,) normalisers, and computes the logits again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        cap: float | None,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        picked, normaliser = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for part, ids in zip(hidden.split(rows), tokens.split(rows)):
                logits = _capped(_logits(part, matrix, bias), cap)
                normaliser.append(logits.logsumexp(1))
                picked.append(logits.gather(1, ids[:, None])[:, 0] - normaliser[-1])
        # The weight itself is kept, not `matrix`: under ZeRO 3 it is scattered meanwhile and gathered for the gradient.
        ctx.save_for_backward(hidden, weight, bias, tokens, torch.cat(normaliser))
        ctx.cap, ctx.rows, ctx.dtype = cap, rows, dtype
        return torch.cat(picked)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden, to_weight, to_bias = [], None, None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            parts = (value.split(ctx.rows) for value in (hidden, tokens, normaliser, gradient))
            for part, ids, total, slope in zip(*parts):
                raw = _logits(part, matrix, bias)
                # d log p(y) / d logits = onehot(y) - softmax(logits)
                inner = torch.exp(_capped(raw, ctx.cap) - total[:, None]).neg_()
                inner[torch.arange(len(ids), device=ids.device), ids] += 1
                inner *= slope[:, None].to(inner.dtype)
                if ctx.cap is not None:
                    inner *= 1 - torch.tanh(raw / ctx.cap) ** 2
                if wants_bias:
                    to_bias = inner.sum(0) if to_bias is None else to_bias + inner.sum(0)
                inner = inner.to(ctx.dtype)
                if wants_hidden:
                    to_hidden.append((inner @ matrix).to(hidden.dtype))
                if wants_weight:
                    added = inner.t() @ part.to(ctx.dtype)
                    to_weight = added.to(weight.dtype) if to_weight is None else to_weight.add_(added)
        return torch.cat(to_hidden) if wants_hidden else None, to_weight, to_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return logits if logits.dtype == torch.float64 else logits.float()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def hidden_states_only(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the block the model's output layer makes no logits; collects what it was given: last hidden states."""
    head: Any = model.get_output_embeddings()
    given: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    with _forward(head, keep):
        yield given


def answer(model: PreTrainedModel, hidden: Tensor, tokens: Tensor, chunk: int | None = None) -> Tensor:
    """`token_log_probs` (N,) under the output layer of a model for which `is_linear` holds.

    The layer is called as the module that it is, so that what is hooked to it (ZeRO 3 gathers its weights) happens.
    """
    head: Any = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def log_probs(states: Tensor) -> Tensor:
        return token_log_probs(states, head.weight, head.bias, tokens, cap=cap, chunk=chunk)

    with _forward(head, log_probs):
        return head(hidden)


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N, V) of hidden states (N, H), all at once, under the output layer of a model for which `is_linear` holds."""
    head: Any = model.get_output_embeddings()
    return _capped(head(hidden), getattr(model.config.get_text_config(), "final_logit_softcapping", None))


@contextmanager
def _forward(head: Any, function: Any) -> Iterator[None]:
    """Within the block calls of a module run `function` in place of its forward."""
    own = head.__dict__.get("forward")
    head.forward = function
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


@torch.no_grad()
def is_linear(model: PreTrainedModel, tolerance: float = 1e-4) -> bool:
    """Whether a model's logits are one linear layer of its last hidden states, with Gemma 2's cap or without.

    Compared on two prompts: a model that scales its logits, or whose output layer is adapted or quantised, fails here
    and has all its logits made at once.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    top = min(int(model.config.get_text_config().vocab_size), 50)
    ids = torch.tensor([[(7 * k + 3) % top for k in range(6)], [(5 * k + 1) % top for k in range(6)]])
    ids = ids.to(model.device)
    whole = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with hidden_states_only(model) as given:
        model(input_ids=ids, use_cache=False)
    if len(given) != 1 or given[0].shape[:2] != ids.shape:
        return False
    wanted = whole.gather(-1, ids[..., None]).flatten()
    got = answer(model, given[0].flatten(0, 1), ids.flatten(), chunk=4 * whole.shape[-1])
    return bool(((got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1.0)).item())
