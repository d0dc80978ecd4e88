"""Scores of several responses to a prompt in one row behind it (`packing`), for causal reward models.

Such a model reads its score at a text's last token that is not padding. What texts begin with alike is found on their
token ids, so neither a template nor a tokenizer has to keep prompt and response apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_duel_env import packing

Rows = Sequence[list[int]]


@dataclass(frozen=True)
class Piece:
    """Texts that are scored in one row; one alone is left to the model itself."""

    rows: list[list[int]]
    """Their token ids."""
    read: list[list[int]]
    """The same up to the token that the score is read at: a causal model does not look further."""
    prefix: int
    """How many tokens all of `read` begin with alike."""
    width: int
    """Tokens of the row."""


def cut(rows: Rows, padding: int | None, hidden_size: int, widest: int) -> list[Piece]:
    """Texts in pieces, in order: a text joins those before it where that costs less than a row of its own.

    Args:
        rows: token ids of texts, of one prompt where anything is to be gained.
        padding: the model's padding token.
        hidden_size: the model's.
        widest: tokens of a piece of several texts are at most this many; 0 keeps all apart.
    """
    read = [_up_to_score(row, padding) for row in rows]
    prefix = _common(read)
    pieces: list[Piece] = []
    for whole, row in zip(rows, read):
        if pieces:
            last, width = pieces[-1], pieces[-1].width + len(row) - prefix
            apart = _cost(last.width, hidden_size) + _cost(len(row), hidden_size)
            if width <= widest and _cost(width, hidden_size) < apart:
                pieces[-1] = Piece([*last.rows, whole], [*last.read, row], prefix, width)
                continue
        pieces.append(Piece([whole], [row], prefix, len(whole)))
    return pieces


@torch.inference_mode()
def scores(model: Any, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """The scores of each piece's texts, float64 (N,), in one call of a model for which `works` holds."""
    answers = [[row[piece.prefix :] for row in piece.read] for piece in pieces]
    n, t = max(map(len, answers)), max(len(row) for part in answers for row in part)
    padded = [[row + [0] * (t - len(row)) for row in part] + [[0] * t] * (n - len(part)) for part in answers]
    lengths = [[len(row) for row in part] + [0] * (n - len(part)) for part in answers]
    prompts = [piece.read[0][: piece.prefix] for piece in pieces]
    rows = packing.pack(prompts, *(torch.tensor(part, device=model.device) for part in (padded, lengths)))
    last = rows.spread(rows.place).amax(2)  # (M, N); 0 where there is no response, which is cut off below
    states = _states(model, **rows.inputs)[torch.arange(len(pieces), device=last.device)[:, None], last]
    made = model.score(states)[..., 0].float().cpu().numpy().astype(np.float64)
    return [row[: len(part)] for row, part in zip(made, answers)]


@torch.no_grad()
def works(model: Any, tolerance: float) -> bool:
    """Whether `scores` are those of the model itself, called on one text at a time, and its hidden states as well.

    Tried on texts with the padding token inside and at the end, where a model has one. A model whose score is no layer
    named `score` of its body's states, read at the last token, fails here, and what fails `packing.works`.
    """
    if not packing.works(model, lambda **inputs: _states(model, **inputs), tolerance):
        return False
    try:
        padding = model.config.get_text_config().pad_token_id
        texts = []
        for prompt, answers, sizes in zip(*packing.trial(model)):
            texts.append([prompt + answer[:size] for answer, size in zip(answers.tolist(), sizes.tolist())])
        if padding is not None:
            texts[0][0][-1] = texts[0][1][-2] = texts[1][0][2] = padding
        # For a model so large everything pays.
        pieces = [piece for rows in texts for piece in cut(rows, padding, hidden_size=10**6, widest=10**6)]
        assert len(pieces) == len(texts)
        alone = [model(input_ids=torch.tensor([row], device=model.device)).logits for rows in texts for row in rows]
        got = torch.from_numpy(np.concatenate(scores(model, pieces)))
        return packing.close(got, torch.cat(alone)[:, 0].cpu(), tolerance)
    except packing.UNFIT:
        return False


def _states(model: Any, **inputs: Tensor) -> Tensor:
    """(M, W, H): the last hidden states of a classifier's body, which its head is given."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _up_to_score(row: list[int], padding: int | None) -> list[int]:
    """A text up to its last token that is not padding, or its first token."""
    end = len(row)
    while end > 1 and row[end - 1] == padding:
        end -= 1
    return row[:end]


def _common(rows: Rows) -> int:
    """How many tokens all rows begin with alike; of each at least one is left over."""
    most = min(map(len, rows)) - 1
    for count, column in enumerate(zip(*rows)):
        if count == most or len(set(column)) > 1:
            return count
    return most


def _cost(width: int, hidden_size: int) -> int:
    """What a row costs: attention takes 4 x width x hidden operations a token in a layer, the layer's matrices some
    24 x hidden^2. In units of 4 x hidden."""
    return width * (width + 6 * hidden_size)
