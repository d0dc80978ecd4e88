"""Attention of many responses to one copy of their prompt's keys and values.

N responses to a prompt share all of the prompt's keys and values. Transformers would copy them N times (and again at
every generated token); here they are computed once per prompt and attended to where they lie. It is an attention
function, registered with transformers under its own name, so that one piece of code serves every model family that
goes through transformers' attention interface: Llama, GPT-NeoX, Qwen, Gemma, Mistral, and others. `works` compares it
with the model's own attention before it is relied on.

Letters: M prompts, R response rows, P prompt tokens (padded on the left), T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from llm_duel_env.packing import UNFIT

NAME = "llm_duel_shared_prefix"


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids (M, P) int64 and mask (M, P) bool, True on tokens; P is the longest prompt."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Prefix:
    """What responses need of their M prompts."""

    keys: list[Tensor]
    """Per layer (M, heads of keys, P, head size)."""
    values: list[Tensor]
    """Per layer, as `keys`."""
    mask: Tensor
    """(M, P) bool, False on padding."""
    logits: Tensor
    """(M, V) of the first response token."""

    def select(self, prompts: Tensor) -> Prefix:
        """The prompts at the indices `prompts` (m,)."""
        keys, values = [k[prompts] for k in self.keys], [v[prompts] for v in self.values]
        return Prefix(keys, values, self.mask[prompts], self.logits[prompts])


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Runs the prompts, token ids of any lengths, through the model once; with gradient where that is enabled."""
    ids, mask = pad_left(prompts, model.device)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    # A sliding-window layer's own cache would drop keys: without a config every layer keeps all of them.
    cache = DynamicCache()
    last = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    layers: list[Any] = cache.layers
    return Prefix([layer.keys for layer in layers], [layer.values for layer in layers], mask, last)


@dataclass(frozen=True)
class PrefixRows:
    """A prefix, and which of its prompts each of R response rows belongs to."""

    prefix: Prefix
    prompt: Tensor
    """(R,) int64: the row's prompt, non-decreasing."""
    grid: Tensor | None = field(init=False)
    """(M * n,) int64: rows laid out prompt by prompt, n for each, row 0 where a prompt has fewer; None where the rows
    are that layout already."""
    slot: Tensor = field(init=False)
    """(R,) int64: where in the grid a row stands."""
    bias: Tensor = field(init=False)
    """(R, 1, 1, P) float32: 0 on prompt tokens, -inf on padding."""

    def __post_init__(self) -> None:
        m, rows = len(self.prefix.mask), len(self.prompt)
        counts = torch.bincount(self.prompt, minlength=m)
        n = int(counts.max())
        first = counts.cumsum(0) - counts
        slot = self.prompt * n + torch.arange(rows, device=self.prompt.device) - first[self.prompt]
        grid = None
        if rows != m * n:
            grid = torch.zeros(m * n, dtype=torch.int64, device=self.prompt.device)
            grid[slot] = torch.arange(rows, device=self.prompt.device)
        bias = torch.zeros(self.prefix.mask.shape, device=self.prompt.device)
        bias = bias.masked_fill(~self.prefix.mask, -torch.inf)[self.prompt][:, None, None]
        for name, value in (("grid", grid), ("slot", slot), ("bias", bias)):
            object.__setattr__(self, name, value)

    def positions(self, start: int, count: int) -> Tensor:
        """Positions of the response tokens start .. start + count - 1: (R, count) int64."""
        lengths = self.prefix.mask.sum(1)[self.prompt]
        return lengths[:, None] + torch.arange(start, start + count, device=lengths.device)

    def to_grid(self, rows: Tensor) -> Tensor:
        """(R, H, Q, x) -> (M, H, n * Q, x)."""
        if self.grid is not None:
            rows = rows[self.grid]
        m, (total, heads, queries, size) = len(self.prefix.mask), rows.shape
        grouped = rows.view(m, total // m, heads, queries, size).transpose(1, 2)
        return grouped.reshape(m, heads, total // m * queries, size)

    def from_grid(self, grid: Tensor, queries: int) -> Tensor:
        """(M, H, n * Q, x) -> (R, H, Q, x)."""
        m, heads, many, size = grid.shape
        n = many // queries
        rows = grid.view(m, heads, n, queries, size).transpose(1, 2).reshape(m * n, heads, queries, size)
        return rows if self.grid is None else rows[self.slot]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    prefix_rows: PrefixRows,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of T new response tokens to their prompt and to the S response tokens so far, T the last of them.

    Args:
        module: the model's attention layer; its `layer_idx` says whose keys of the prefix are read.
        query: (R, heads, T, head size).
        key: (R, heads of keys, S, head size), of the response only.
        value: as `key`.
        attention_mask: unused; padding of the prompt is the prefix's, and within the response attention is causal.
        scaling: factor of the scores; None is 1 / sqrt(head size).
        prefix_rows: the prompts.
        softcap: Gemma 2's tanh cap of the scores.
        sliding_window: how many tokens back a token sees, itself included; None is all.
        kwargs: what other attention functions take. Attention sinks are refused.

    Returns:
        (R, T, heads, head size), and no attention weights.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("shared-prefix attention knows no attention sinks")
    rows, heads, t, size = query.shape
    groups, s = key.shape[1], key.shape[2]
    p = prefix_rows.prefix.mask.shape[1]
    layer = cast(int, module.layer_idx)
    prompt_keys, prompt_values = prefix_rows.prefix.keys[layer], prefix_rows.prefix.values[layer]
    # Heads that share keys become further queries of the same keys: (R, groups, Q, size), Q = heads / groups * T.
    queries = query.reshape(rows, groups, heads // groups * t, size) * (size**-0.5 if scaling is None else scaling)
    to_prompt = prefix_rows.to_grid(queries) @ prompt_keys.transpose(2, 3)
    to_prompt = prefix_rows.from_grid(to_prompt, queries.shape[2])
    to_response = queries @ key.transpose(2, 3)
    scores = torch.cat([to_prompt, to_response], dim=-1).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores[..., :p] += prefix_rows.bias
    if t > 1 or sliding_window is not None:
        at = torch.arange(s - t, s, device=query.device)[:, None]  # the query's place in the response
        back = at - torch.arange(-p, s, device=query.device)  # padding is on the left: no gap before the response
        seen = (back >= 0) if sliding_window is None else (back >= 0) & (back < sliding_window)
        seen = seen.repeat(heads // groups, 1)
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    from_prompt = prefix_rows.to_grid(weights[..., :p]) @ prompt_values
    mixed = prefix_rows.from_grid(from_prompt, queries.shape[2]) + weights[..., p:] @ value
    return mixed.reshape(rows, heads, t, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_attention)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends with `shared_prefix_attention`, and must be given ``prefix_rows``."""
    own = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = own


class ResponseLayer(CacheLayerMixin):
    """One layer's keys and values of R responses, in buffers made once for `capacity` tokens."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, (R, heads, capacity, head size), like the first token's states."""
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, size)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        """Appends tokens; returns views on all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows."""
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        """Response tokens held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys after the next `query_length` tokens, and the first one's offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity


class ResponseCache(Cache):
    """Keys and values of R responses, without their prompts."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[ResponseLayer(capacity) for _ in range(layers)])

    def select(self, rows: Tensor) -> None:
        """Keeps only the rows at these indices."""
        for layer in self.layers:
            assert isinstance(layer, ResponseLayer)
            layer.select(rows)


@torch.no_grad()
def works(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether this model gives the same logits (relative to their size) with the shared prefix as without it.

    Two prompts of different lengths, two responses each. A family that does not go through transformers' attention
    interface, or that keeps other states than keys and values, fails here and is run in the ordinary way.
    """
    top = min(int(model.config.get_text_config().vocab_size), 50)
    prompts = [[(7 * k + 3) % top for k in range(9)], [(5 * k + 1) % top for k in range(6)]]
    responses = torch.tensor([[(11 * r + 3 * k + 2) % top for k in range(5)] for r in range(4)], device=model.device)
    try:
        rows = PrefixRows(prefill(model, prompts), torch.tensor([0, 0, 1, 1], device=model.device))
        with attending(model):
            # The last token through the cache, as in sampling; the others at once, as in scoring.
            cache = ResponseCache(len(rows.prefix.keys), 5)
            shared = [
                model(
                    input_ids=responses[:, a:b], position_ids=rows.positions(a, b - a), past_key_values=cache,
                    use_cache=True, prefix_rows=rows,
                ).logits
                for a, b in ((0, 4), (4, 5))
            ]  # fmt: skip
        for row in range(4):
            ids = torch.cat([torch.tensor(prompts[row // 2], device=model.device), responses[row]])
            plain = model(input_ids=ids[None]).logits[0, -5:].float()
            error = (torch.cat(shared, dim=1)[row].float() - plain).abs().max()
            if not error <= tolerance * plain.abs().max().clamp(min=1.0):
                return False
    except UNFIT:
        return False
    return True
