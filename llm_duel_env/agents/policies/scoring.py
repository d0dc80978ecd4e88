"""Log-probabilities and hidden states of given responses (teacher forcing), with or without gradient.

Each prompt is run once. Its responses stand behind it in one row (`packed_rows`), or, where that would be too long, attend
to its keys and values, in chunks of like length (`shared_prefix`). Logits exist at response positions only, where they are many for some
positions at a time (`output_layer`). Models that neither fits run with their prompts copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_duel_env.agents.policies import output_layer, packed_rows
from llm_duel_env.agents.policies.shared_prefix import Prefix, PrefixRows, attending, pad_left, prefill
from llm_duel_env.packing import PackedRows, pack

LOGITS = 1 << 26
"""Logits of a chunk are at most this many numbers (256 MB in float32)."""
TOKENS = 16_384
"""Response tokens of a chunk, padding included, are at most this many."""
PROMPT_TOKENS = 65_536
"""Prompt tokens whose keys are held at a time are at most this many, where no gradient is wanted."""

Prompts = Sequence[Sequence[int]]


def log_probs(
    model: PreTrainedModel,
    prompts: Prompts,
    tokens: Tensor,
    lengths: Tensor,
    *,
    share_prefix: bool = True,
    linear_head: bool = False,
    packed: bool = False,
    one_call: bool = False,
    per_token: bool = False,
) -> Tensor:
    """Log-probability of each response at temperature 1: summed over its tokens (EOS included), or token by token.

    Args:
        model: a causal language model.
        prompts: ids of M prompts.
        tokens: (M, N, T) response ids on the model's device.
        lengths: (M, N), at least 1.
        share_prefix: whether `shared_prefix.works` for this model.
        linear_head: whether `output_layer.is_linear` for this model: what bounds the memory of logits.
        packed: whether `packed_rows.works` for this model, and its head is linear.
        one_call: run everything in one call of the model, packed or with prompts copied. The modules then run in the
            same order whatever the lengths, which ZeRO 3 wants of its ranks and gradient checkpointing of the model.
        per_token: whether the tokens stay apart.

    Returns:
        (M, N) float32, or, per token, (M, N, T), 0 behind a response's end; with gradient where it is enabled.
    """
    _check(prompts, tokens, lengths)
    vocabulary = model.config.get_text_config().vocab_size
    # Where logits are few there is nothing to save, and making them once is faster than making them twice.
    sparing = linear_head and (one_call or int(lengths.sum()) * vocabulary > output_layer.CHUNK)
    if packed and linear_head and packed_rows.fits(model, prompts, lengths):
        spread = (rows.spread(picked) for rows, picked, _ in _packed(model, prompts, tokens, lengths, sparing=sparing))
        return torch.cat([values if per_token else values.sum(-1) for values in spread])
    share_prefix = share_prefix and not one_call
    made = output_layer.hidden_states_only if sparing else _logits_made

    def score(prompts: Prompts, prompt: Tensor, rows: Iterator[Tensor], ids: Tensor, ends: Tensor) -> Iterator[Tensor]:
        prefix, first = None, ids.new_empty(0)
        if share_prefix:
            with made(model) as of_prompts:
                prefix = prefill(model, prompts)
            first = of_prompts[0][:, -1] if sparing else prefix.logits
        for chunk in rows:
            width = int(ends[chunk].max())
            y = ids[chunk, :width]
            # Logits, or the hidden states that they would be made of.
            with made(model) as outputs:
                if prefix is None:
                    result = _plain(model, prompts, prompt[chunk], y, width + 1).logits
                    values = (outputs[0] if sparing else result)[:, :-1]
                else:
                    values = first[prompt[chunk], None]
                    if width > 1:
                        result = _shared(model, prefix, prompt[chunk], y[:, :-1])(model).logits
                        values = torch.cat([values, outputs[0] if sparing else result], dim=1)
            inside = torch.arange(width, device=y.device) < ends[chunk, None]
            if sparing:
                picked = output_layer.answer(model, values[inside], y[inside])
                picked = picked.new_zeros(y.shape).masked_scatter(inside, picked)
            else:
                picked = torch.where(inside, _picked(values, y), 0.0)
            yield nn.functional.pad(picked, (0, ids.shape[1] - width)) if per_token else picked.sum(1)

    most = None if one_call else min(TOKENS, TOKENS if sparing else max(LOGITS // vocabulary, 1))
    return _by_chunks(score, prompts, tokens, lengths, most)


def _packed(
    model: PreTrainedModel, prompts: Prompts, tokens: Tensor, lengths: Tensor, *, sparing: bool
) -> Iterator[tuple[PackedRows, Tensor, Tensor]]:
    """Groups of prompts with all their responses: their rows, and of the K response tokens the log-probabilities (K,) and
    the last hidden states (K, H). With a gradient one group: the caller's microbatch bounds memory."""
    longest = max(len(prompt) for prompt in prompts) + int(lengths.sum(1).max())
    group = len(prompts) if torch.is_grad_enabled() else max(TOKENS // longest, 1)
    for start in range(0, len(prompts), group):
        part = slice(start, start + group)
        rows = pack(prompts[part], tokens[part], lengths[part])
        states, y = packed_rows.states(model, **rows.inputs), tokens[part][rows.inside]
        foretold = states[rows.row, rows.before]
        if sparing:
            picked = output_layer.answer(model, foretold, y)
        else:
            picked = _picked(output_layer.logits(model, foretold)[None], y[None])[0]
        yield rows, picked, states[rows.row, rows.place]


@torch.no_grad()
def features(
    model: PreTrainedModel,
    prompts: Prompts,
    tokens: Tensor,
    lengths: Tensor,
    *,
    share_prefix: bool = True,
    linear_head: bool = False,
    packed: bool = False,
) -> Tensor:
    """What a frozen model makes of each response: its last hidden states, and how likely it finds the response.

    The mean over the response of the last hidden states, then the sum, the mean and the least of its tokens'
    log-probabilities, then its length. A slip (a wrong name, a made-up fact) is a single unlikely token: the mean of
    the hidden states hardly shows it, and the least log-probability does.

    Takes what `log_probs` takes. Returns (M, N, hidden size + 4) float32.
    """
    _check(prompts, tokens, lengths)
    vocabulary = model.config.get_text_config().vocab_size
    if packed and linear_head and packed_rows.fits(model, prompts, lengths):
        sparing = int(lengths.sum()) * vocabulary > output_layer.CHUNK
        groups = []
        for rows, picked, states in _packed(model, prompts, tokens, lengths, sparing=sparing):
            groups.append(_summary(rows.spread(picked), rows.spread(states), rows.inside))
        return torch.cat(groups)

    def score(prompts: Prompts, prompt: Tensor, rows: Iterator[Tensor], ids: Tensor, ends: Tensor) -> Iterator[Tensor]:
        prefix = prefill(model, prompts) if share_prefix else None
        for chunk in rows:
            width = int(ends[chunk].max())
            y = ids[chunk, :width]
            with _head_inputs(model) as states:
                if prefix is None:
                    logits = _plain(model, prompts, prompt[chunk], y, width + 1).logits[:, :-1]
                    hidden = states[-1][:, 1:]
                else:
                    rest = _shared(model, prefix, prompt[chunk], y)(model).logits[:, :-1]
                    logits = torch.cat([prefix.logits[prompt[chunk], None], rest], dim=1)
                    hidden = states[-1]
            inside = torch.arange(width, device=y.device) < ends[chunk, None]
            yield _summary(_picked(logits, y), hidden, inside)

    return _by_chunks(score, prompts, tokens, lengths, min(TOKENS, max(LOGITS // vocabulary, 1)))


def _summary(picked: Tensor, hidden: Tensor, inside: Tensor) -> Tensor:
    """Features (..., H + 4) of responses: log-probabilities (..., T) and hidden states (..., T, H) of their tokens, and
    which of the T are theirs."""
    length = inside.sum(-1, keepdim=True)
    total = torch.where(inside, picked, 0.0).sum(-1, keepdim=True)
    least = torch.where(inside, picked, torch.inf).amin(-1, keepdim=True)
    mean = torch.where(inside[..., None], hidden.float(), 0.0).sum(-2) / length
    return torch.cat([mean, total, total / length, least, length.float()], dim=-1)


def _logits_made(model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """Nothing is changed within the block: the model makes its logits."""
    return nullcontext([])


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens (R, T) under logits (R, T, V): (R, T) float32."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return -losses.view_as(tokens)


@contextmanager
def _head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the block, collects what the model's output layer is given: last hidden states, after the last norm."""
    caught: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()


def _shared(model: PreTrainedModel, prefix: Prefix, prompt: Tensor, ids: Tensor) -> Callable[[nn.Module], Any]:
    """A call of the model, or of its body, on response ids (R, T) whose prompts are in a prefix."""
    used, place = torch.unique_consecutive(prompt, return_inverse=True)
    whole = len(used) == len(prefix.mask)
    rows = PrefixRows(prefix if whole else prefix.select(used), place)

    def call(part: nn.Module) -> Any:
        with attending(model):
            return part(input_ids=ids, position_ids=rows.positions(0, ids.shape[1]), use_cache=False, prefix_rows=rows)

    return call


def _plain(part: nn.Module, prompts: Prompts, prompt: Tensor, ids: Tensor, keep: int) -> Any:
    """A call of the model (its last `keep` logits), or of its body (`keep` 0), on copies of prompts with responses."""
    left, mask = pad_left([prompts[int(m)] for m in prompt], ids.device)
    mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    whole = torch.cat([left, ids], dim=1)
    kept = {"logits_to_keep": keep} if keep else {}
    return part(input_ids=whole, attention_mask=mask, position_ids=positions, use_cache=False, **kept)


def _check(prompts: Prompts, tokens: Tensor, lengths: Tensor) -> None:
    m, n, t = tokens.shape
    if len(prompts) != m or lengths.shape != (m, n):
        got = f"{len(prompts)} prompts and lengths {tuple(lengths.shape)}"
        raise ValueError(f"tokens {tuple(tokens.shape)}: expected {m} prompts and lengths {(m, n)}, got {got}")
    if int(lengths.min()) < 1 or int(lengths.max()) > t:
        raise ValueError(f"lengths: expected 1 to {t}, got {int(lengths.min())} to {int(lengths.max())}")


def _by_chunks(score: Callable, prompts: Prompts, tokens: Tensor, lengths: Tensor, most: int | None) -> Tensor:
    """Calls `score` on groups of prompts, with the rows of each in chunks of like length, and puts results in order.
    All in one group and one chunk where `most` (see `_chunks`) is None."""
    m, n, _ = tokens.shape
    longest = max(len(prompt) for prompt in prompts)
    # With a gradient the caller's microbatch bounds memory, and a prompt's keys are used by one backward pass.
    group = m if torch.is_grad_enabled() or most is None else max(PROMPT_TOKENS // longest, 1)
    results = []
    for start in range(0, m, group):
        part = tokens[start : start + group]
        ids, ends = part.flatten(0, 1), lengths[start : start + group].flatten()
        prompt = torch.arange(len(part), device=ids.device).repeat_interleave(n)
        chunks = [torch.arange(len(ends), device=ids.device)] if most is None else list(_chunks(ends, most))
        values = list(score(prompts[start : start + group], prompt, iter(chunks), ids, ends))
        order = torch.cat(chunks)
        results.append(torch.cat(values)[torch.argsort(order)].unflatten(0, (len(part), n)))
    return torch.cat(results)


def _chunks(lengths: Tensor, most: int) -> Iterator[Tensor]:
    """Row indices in chunks, shorter rows first, ascending within a chunk: rows times the longest is at most `most`
    (one row at least), and the longest is at most half as long again as the shortest, and 8."""
    order = torch.argsort(lengths, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes):
        end = start + 1
        while end < len(sizes) and sizes[end] * (end + 1 - start) <= most and sizes[end] <= 8 + 1.5 * sizes[start]:
            end += 1
        yield order[start:end].sort().values
        start = end
