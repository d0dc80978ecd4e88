"""What a sampler is: prompts in, token ids out, every draw keyed by its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from llm_duel_env.randomness import generator, visits


@dataclass(frozen=True)
class Sampled:
    """n responses to each of M prompts; T is the longest of them."""

    tokens: np.ndarray
    """(M, n, T) int64, EOS included where one was sampled, 0 after the end."""
    lengths: np.ndarray
    """(M, n) int64."""
    log_probs: np.ndarray | None = None
    """(M, n, T) float32: of each token at temperature 1, 0 after the end; None where the sampler tells none."""


class Sampler(Protocol):
    """Draws responses from one policy."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        draws: np.ndarray,
        stream: tuple | None,
        *,
        n: int,
        temperature: float = 1.0,
    ) -> Sampled:
        """n responses to each of M prompts, cut at the policy's limit.

        Args:
            prompts: token ids of each prompt.
            draws: (M, 2) int64 of `numbered`: what draws are keyed by, so that they do not depend on the rest of the
                batch.
            stream: the seed and the key of the draw; None decodes greedily.
            n: responses per prompt.
            temperature: divides the logits; positive. Greedy decoding takes none.
        """


def numbered(prompt_ids: np.ndarray) -> np.ndarray:
    """(M, 2) int64: each prompt's id, and how often it came earlier in the batch, so that a second visit has draws of
    its own."""
    ids = np.asarray(prompt_ids, np.int64)
    return np.stack([ids, visits(ids)], axis=1)


def keyed_seeds(stream: tuple, draws: np.ndarray) -> list[int]:
    """A seed in [0, 2^62) for each of M prompts, (M, 2) of `numbered`. `stream` is the seed and the key of the draw."""
    seed, *key = stream
    return [int(generator(seed, *key, *map(int, draw)).integers(1 << 62)) for draw in draws]


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by name, as its checkpoint has them, tied ones once.

    Parameters that DeepSpeed's ZeRO-3 has sharded are gathered one at a time, so that never more than one is whole;
    every rank must then go through all of them.
    """
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            yield name, parameter.detach()


def _gathered(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
