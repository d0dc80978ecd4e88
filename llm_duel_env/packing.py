"""Texts with a common beginning in one row: the beginning, then what follows it in each of them.

What follows, a response, sees the beginning, a prompt, and itself, and counts its positions from the prompt's end, so
that each stands as if it were alone; a mask says so to the attention of torch. The prompt is run once, and one call of
the model does everything, forward and back.

Letters: M prompts, N responses to each, T tokens of a response, W of the longest row, K tokens of all responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

UNFIT = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, NotImplementedError)
"""What a model raises that is not run the way one tries: its family's own code, so almost anything."""


@dataclass(frozen=True)
class PackedRows:
    """Rows, and where in them each of the K response tokens is, and is foretold."""

    ids: Tensor
    """(M, W) int64, 0 behind a row's end."""
    positions: Tensor
    """(M, W) int64: of the prompt's tokens from 0, of each response's from the prompt's length."""
    seen: Tensor
    """(M, 1, W, W) bool: which tokens each token attends to."""
    inside: Tensor
    """(M, N, T) bool: the tokens of the responses."""
    row: Tensor
    """(K,) int64: the row of each response token, in the order of `inside`."""
    place: Tensor
    """(K,) int64: its place in the row."""
    before: Tensor
    """(K,) int64: the place of the token that it comes after: where it is foretold; -1 where there is none."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.seen, "position_ids": self.positions}

    def spread(self, values: Tensor) -> Tensor:
        """(K, ...) -> (M, N, T, ...), 0 behind a response's end."""
        shape = self.inside.shape + values.shape[1:]
        inside = self.inside.view(*self.inside.shape, *[1] * (values.ndim - 1))
        return values.new_zeros(shape).masked_scatter(inside, values)


def pack(prompts: Sequence[Sequence[int]], tokens: Tensor, lengths: Tensor) -> PackedRows:
    """Makes rows.

    Args:
        prompts: ids of M prompts; one may be empty.
        tokens: (M, N, T) response ids.
        lengths: (M, N), 0 to T; 0 where a prompt has fewer responses than others.
    """
    m, n, t = tokens.shape
    assert len(prompts) == m
    assert lengths.shape == (m, n)
    device = tokens.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None, None]
    width = int((starts[:, 0, 0] + lengths.sum(1)).max())
    at = torch.arange(t, device=device)
    inside = at < lengths[..., None]
    place = starts + (lengths.cumsum(1) - lengths)[..., None] + at
    before = torch.where(at == 0, starts, place) - 1
    row, number = (torch.arange(k, device=device) for k in (m, n))
    row, own = row[:, None, None].expand(m, n, t)[inside], place[inside]
    ids = torch.tensor([[*prompt] + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    ids[row, own] = tokens[inside]
    positions = torch.arange(width, device=device).repeat(m, 1)
    positions[row, own] = (starts + at).expand(m, n, t)[inside]
    # 0 in the prompt, k in the k-th response; what is behind a row's end belongs to nobody and is not looked at.
    part = torch.zeros(m, width, dtype=torch.int64, device=device)
    part[row, own] = (number + 1)[:, None].expand(m, n, t)[inside]
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))
    return PackedRows(ids, positions, seen[:, None], inside, row, own, before[inside])


def widest(model: PreTrainedModel) -> int:
    """The longest row that is right: a sliding window, if any, must be as long, since the mask takes its place."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(window) for window in windows if window is not None), default=2**31)


def trial(model: PreTrainedModel) -> tuple[list[list[int]], Tensor, Tensor]:
    """Something to try a model with: two prompts of different lengths, two responses each, as `pack` takes them."""
    top = min(int(model.config.get_text_config().vocab_size), 50)
    prompts = [[(7 * k + 3) % top for k in range(9)], [(5 * k + 1) % top for k in range(6)]]
    numbers = (torch.arange(20, device=model.device) * 11 + 2) % top
    return prompts, numbers.view(2, 2, 5), torch.tensor([[5, 3], [4, 5]], device=model.device)


@torch.no_grad()
def works(model: PreTrainedModel, states: Callable[..., Tensor], tolerance: float) -> bool:
    """Whether packed rows give the same last hidden states (relative to their size) as one row at a time.

    Only torch's own attention takes the mask as it is; a model with another, one whose tokens see those after them, or
    one that keeps other states than keys and values, fails here.

    Args:
        model: a model.
        states: its last hidden states (M, W, H) of `PackedRows.inputs`, or of input_ids alone.
        tolerance: how far they may differ.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    try:
        prompts, tokens, lengths = trial(model)
        rows = pack(prompts, tokens, lengths)
        got = states(**rows.inputs)[rows.row, rows.place]
        alone: list[Any] = []
        for prompt, answers, sizes in zip(prompts, tokens, lengths.tolist()):
            for answer, size in zip(answers, sizes):
                ids = torch.cat([torch.tensor(prompt, device=model.device), answer[:size]])
                alone.append(states(input_ids=ids[None])[0, -size:])
        return close(got, torch.cat(alone), tolerance)
    except UNFIT:
        return False


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether values are what was expected, relative to the largest; never where one of them is NaN."""
    got, expected = got.float(), expected.float()
    return bool(((got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)).item())
