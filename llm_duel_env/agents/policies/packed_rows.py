"""Prompts followed by all of their responses, one row for each prompt.

A response sees its prompt and itself, and counts its positions from the prompt's end, so that each stands as if it were
alone; a mask says so to the attention of torch. The prompt is run once, and one call of the model does everything,
forward and back. Where a row is so long that its attention, mostly masked, would cost more than it saves,
`shared_prefix` is better.

Letters: M prompts, N responses to each, T tokens of a response, W of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_duel_env.agents.policies.output_layer import hidden_states_only
from llm_duel_env.agents.policies.shared_prefix import UNFIT


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
    """(K,) int64: the place of the token that it comes after: where it is foretold."""

    def states(self, model: PreTrainedModel) -> Tensor:
        """(M, W, H): what the model's output layer is given."""
        with hidden_states_only(model) as given:
            # What the layer makes of it is not looked at.
            model(input_ids=self.ids, attention_mask=self.seen, position_ids=self.positions, use_cache=False)
        return given[0]

    def spread(self, values: Tensor) -> Tensor:
        """(K, ...) -> (M, N, T, ...), 0 behind a response's end."""
        shape = self.inside.shape + values.shape[1:]
        inside = self.inside.view(*self.inside.shape, *[1] * (values.ndim - 1))
        return values.new_zeros(shape).masked_scatter(inside, values)


def pack(prompts: Sequence[Sequence[int]], tokens: Tensor, lengths: Tensor) -> PackedRows:
    """Makes rows.

    Args:
        prompts: ids of M prompts.
        tokens: (M, N, T) response ids.
        lengths: (M, N), 1 to T.
    """
    m, n, t = tokens.shape
    assert len(prompts) == m and lengths.shape == (m, n)
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


def pays(width: int, alone: int, hidden_size: int) -> bool:
    """Whether rows of `width` tokens are cheaper than apart, where one prompt and one response are `alone` tokens.

    Attention costs a token 4 x width x hidden operations in a layer, the layer's matrices some 24 x hidden^2: rows of up
    to 4 x hidden tokens add less than the prompts' copies would. Two responses are always packed.
    """
    return width <= max(2 * alone, 4 * hidden_size)


def fits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], lengths: Tensor) -> bool:
    """Whether packing is right and pays for these prompts and lengths (M, N), for a model for which `works` holds.

    A sliding window must be as long as the row, since the mask takes its place.
    """
    starts = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)
    width, alone = int((starts + lengths.sum(1)).max()), int((starts + lengths.amax(1)).max())
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return pays(width, alone, int(config.hidden_size)) and (window is None or width <= window)


@torch.no_grad()
def works(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether packed rows give this model the same last hidden states (relative to their size) as one row at a time.

    Two prompts of different lengths, two responses each. Only torch's own attention takes the mask as it is; a model
    with another, or one that keeps other states than keys and values, fails here.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    top = min(int(model.config.get_text_config().vocab_size), 50)
    prompts = [[(7 * k + 3) % top for k in range(9)], [(5 * k + 1) % top for k in range(6)]]
    numbers = (torch.arange(20, device=model.device) * 11 + 2) % top
    tokens, lengths = numbers.view(2, 2, 5), torch.tensor([[5, 3], [4, 5]], device=model.device)
    try:
        rows = pack(prompts, tokens, lengths)
        got = rows.states(model)[rows.row, rows.before].float()
        alone: list[Any] = []
        for prompt, answers, sizes in zip(prompts, tokens, lengths.tolist()):
            for answer, size in zip(answers, sizes):
                ids = torch.cat([torch.tensor(prompt, device=model.device), answer[: size - 1]])
                with hidden_states_only(model) as given:
                    model(input_ids=ids[None], use_cache=False)
                alone.append(given[0][0, -size:])
        expected = torch.cat(alone).float()
    except UNFIT:
        return False
    return bool(((got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)).item())
