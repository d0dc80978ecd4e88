"""Prompts followed by all of their responses, one row for each prompt: what a policy learns from in one call.

A row is the prompt, then each response but its last token. A response sees its prompt and itself, and counts its
positions from the prompt's end, so that each stands as if it were alone; a mask says so to the attention of torch. The
prompt is run once, and one call of the model does everything, forward and back. With many responses the attention's
table would be mostly empty; `shared_prefix` is for those.

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


@dataclass(frozen=True)
class PackedRows:
    """Rows, and where in them each response token is foretold."""

    ids: Tensor
    """(M, W) int64, 0 behind a row's end."""
    positions: Tensor
    """(M, W) int64: of the prompt's tokens from 0, of each response's from the prompt's length."""
    seen: Tensor
    """(M, 1, W, W) bool: which tokens each token attends to."""
    inside: Tensor
    """(M, N, T) bool: the tokens of the responses."""
    row: Tensor
    """(K,) int64: the row of each of the K response tokens, in the order of `inside`."""
    before: Tensor
    """(K,) int64: the place in the row after which that token comes."""

    def states(self, model: PreTrainedModel) -> Tensor:
        """(K, H): what the model's output layer is given where each response token is foretold."""
        with hidden_states_only(model) as given:
            # What the layer makes of it is not looked at.
            model(input_ids=self.ids, attention_mask=self.seen, position_ids=self.positions, use_cache=False)
        return given[0][self.row, self.before]


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
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = starts + (lengths - 1).sum(1)
    width = int(ends.max())
    at = torch.arange(t, device=device)
    inside, placed = at < lengths[..., None], at < lengths[..., None] - 1
    offset = starts[:, None] + (lengths - 1).cumsum(1) - (lengths - 1)  # where a response begins
    place, row = offset[..., None] + at, torch.arange(m, device=device)[:, None, None].expand(m, n, t)
    ids = torch.tensor([[*prompt] + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    positions = torch.arange(width, device=device).repeat(m, 1)
    positions[row[placed], place[placed]] = (starts[:, None, None] + at).expand(m, n, t)[placed]
    ids[row[placed], place[placed]] = tokens[placed]
    # 0 in the prompt, k in the k-th response; what is behind a row's end belongs to nobody and is not looked at.
    part = torch.zeros(m, width, dtype=torch.int64, device=device)
    part[row[placed], place[placed]] = torch.arange(1, n + 1, device=device)[:, None].expand(m, n, t)[placed]
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))
    before = torch.where(at == 0, starts[:, None, None], place) - 1
    return PackedRows(ids, positions, seen[:, None], inside, row[inside], before[inside])


def fits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], lengths: Tensor) -> bool:
    """Whether packing is right and pays for these prompts and lengths (M, N), for a model for which `works` holds.

    The longest row is at most twice what one prompt and one response would be: attention grows with its square. A
    sliding window must be as long as the row, since the mask takes its place.
    """
    starts = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)
    width, alone = int((starts + lengths.sum(1)).max()), int((starts + lengths.amax(1)).max())
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return width <= 2 * alone and (window is None or width <= window)


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
        got = pack(prompts, tokens, lengths).states(model).float()
        alone: list[Any] = []
        for prompt, answers, sizes in zip(prompts, tokens, lengths.tolist()):
            for answer, size in zip(answers, sizes):
                ids = torch.cat([torch.tensor(prompt, device=model.device), answer[: size - 1]])
                with hidden_states_only(model) as given:
                    model(input_ids=ids[None], use_cache=False)
                alone.append(given[0][0, -size:])
        expected = torch.cat(alone).float()
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, NotImplementedError):
        return False
    return bool(((got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)).item())
