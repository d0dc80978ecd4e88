"""Samples responses with torch: each prompt is run once, its samples share it, finished responses make room.

The randomness is one uniform number per (response, token), turned into a token through the distribution's cumulative
sum. It is drawn beforehand by the caller, so a token depends neither on the batch that it is sampled in nor on which
other responses have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llm_duel_env.agents.policies.samplers.base import Sampled
from llm_duel_env.agents.policies.shared_prefix import PrefixRows, ResponseCache, attending, pad_left, prefill
from llm_duel_env.randomness import generator

RETIRE = 0.25
"""Finished rows are taken out of the batch once they are this share of it."""
ROWS = 2048
"""Responses sampled at a time, at most."""
LOGITS = 1 << 27
"""Logits of one step of sampling, at most; fewer responses at a time where the vocabulary is large."""
CACHED = 1 << 16
"""Tokens whose keys and values are held at a time, at most (those of one prompt and its responses at least)."""


class TorchSampler:
    """Draws from a transformers model, or from a mixture of two: a `Sampler`.

    Args:
        model: a causal language model in eval mode.
        eos: ids that end a response, kept as its last token.
        max_new_tokens: longest response, EOS included.
        share_prefix: whether `shared_prefix.works` for it.
        precision: makes the context in which its matrix products run.
        other: a second model with the same tokens, for a mixture; see `sample_tokens`.
        mixture: its weight in [0, 1].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos: Sequence[int],
        max_new_tokens: int,
        share_prefix: bool = True,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        other: PreTrainedModel | None = None,
        mixture: float = 0.0,
    ) -> None:
        self.model, self.eos, self.limit = model, sorted(eos), max_new_tokens
        self.share_prefix, self.precision = share_prefix, precision
        self.other, self.mixture = other, mixture

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        draws: np.ndarray,
        stream: tuple | None,
        *,
        n: int,
        temperature: float = 1.0,
    ) -> Sampled:
        """See `Sampler.sample`. No log-probs are told."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        longest = max(map(len, prompts), default=0)
        group = prompts_at_a_time(vocabulary, n, longest, self.limit)
        uniform = None if stream is None else keyed_uniforms(stream, draws, n, self.limit)
        parts = []
        for start in range(0, len(prompts), group):
            own = None
            if uniform is not None:
                own = torch.from_numpy(uniform[start : start + group]).to(self.model.device)
            with self.precision():
                sampled = sample_tokens(
                    self.model,
                    prompts[start : start + group],
                    own,
                    n=n,
                    max_new_tokens=self.limit,
                    eos=self.eos,
                    temperature=temperature,
                    share_prefix=self.share_prefix,
                    other=self.other,
                    mixture=self.mixture,
                )
            parts.append([part.cpu().numpy() for part in sampled])
        lengths = np.concatenate([part[1] for part in parts])
        return Sampled(np.concatenate([part[0] for part in parts])[:, :, : int(lengths.max())], lengths)


def prompts_at_a_time(vocabulary: int, n: int, prompt_tokens: int, new_tokens: int) -> int:
    """How many prompts of up to `prompt_tokens` are sampled together, n responses of up to `new_tokens` each."""
    rows = min(ROWS, LOGITS // vocabulary) // n
    return max(min(rows, CACHED // (prompt_tokens + n * new_tokens)), 1)


def keyed_uniforms(stream: tuple, draws: np.ndarray, n: int, tokens: int) -> np.ndarray:
    """(M, n, tokens) float64 in [0, 1), one stream for each of `draws`, (M, 2) of `numbered`. `stream` is the seed and
    the key of the draw."""
    seed, *key = stream
    uniform = np.empty((len(draws), n, tokens))
    for row, draw in enumerate(draws):
        uniform[row] = generator(seed, *key, *map(int, draw)).random((n, tokens))
    return uniform


def choose(logits: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """The next tokens, (R,) int64: of logits (R, V) the likeliest where `uniform` is None, else the token at which
    the cumulative distribution at `temperature` passes `uniform` (R,) in [0, 1)."""
    if uniform is None:
        return logits.argmax(-1)
    total = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1, dtype=torch.float64)
    # The last value is 1 up to rounding; scaling by it keeps the search inside the vocabulary.
    target = uniform[:, None] * total[:, -1:]
    return torch.searchsorted(total, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor | None,
    *,
    n: int,
    max_new_tokens: int,
    eos: Sequence[int],
    temperature: float = 1.0,
    share_prefix: bool = True,
    other: PreTrainedModel | None = None,
    mixture: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Samples n responses to each of M prompts.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids of each prompt, of any lengths.
        uniform: (M, n, max_new_tokens) float64 in [0, 1) on the model's device; None decodes greedily.
        n: responses per prompt.
        max_new_tokens: T, the longest response, EOS included.
        eos: ids that end a response, kept as its last token. A response cut at T has none.
        temperature: divides the logits; positive.
        share_prefix: attend to one copy of each prompt (`shared_prefix.works` must hold); else copy the prompts.
        other: a second model with the same tokens; None: `model` alone.
        mixture: its weight in [0, 1]: every token is drawn from the geometric mixture of the two models' distributions,
            model^(1 - mixture) other^mixture, normalised.

    Returns:
        Tokens (M, n, T) int64, 0 after the end, and lengths (M, n) int64, on the model's device.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    rows, device = len(prompts) * n, model.device
    kind = _SharedDecoder if share_prefix else _PlainDecoder
    decoder: _Decoder = kind(model, prompts, n, max_new_tokens)
    if other is not None:
        decoder = _MixedDecoder(decoder, kind(other, prompts, n, max_new_tokens), mixture)
    ends = torch.tensor(sorted(eos), device=device)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
    draws = None if uniform is None else uniform.reshape(rows, max_new_tokens)
    lengths = torch.full((rows,), max_new_tokens, dtype=torch.int64, device=device)
    alive = torch.arange(rows, device=device)  # which response each row of the batch is
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    logits = decoder.first()
    # 0, unless logits are not finite: then NaN from there on. Read once, as every look at the device waits for it.
    spoilt = torch.zeros((), device=device)
    for step in range(max_new_tokens):
        spoilt = spoilt + 0 * logits.sum(dtype=torch.float32)
        chosen = choose(logits, None if draws is None else draws[alive, step], temperature)
        tokens[alive, step] = chosen.masked_fill(done, 0)
        ended = torch.isin(chosen, ends) & ~done
        lengths[alive[ended]] = step + 1
        done = done | ended
        left = len(done) - int(done.sum())
        if left == 0 or step + 1 == max_new_tokens:
            break
        if left <= (1 - RETIRE) * len(done):
            keep = (~done).nonzero()[:, 0]
            decoder.select(keep)
            alive, chosen, done = alive[keep], chosen[keep], done[keep]
        logits = decoder.next(chosen, step)
    if not torch.isfinite(spoilt):
        raise FloatingPointError("the model's logits are not finite: its weights have diverged")
    return tokens.view(-1, n, max_new_tokens), lengths.view(-1, n)


class _Decoder(Protocol):
    """Decodes R rows token by token."""

    def first(self) -> Tensor:
        """Logits (R, V) of the first tokens."""

    def select(self, keep: Tensor) -> None:
        """Keeps only the rows at these indices."""

    def next(self, tokens: Tensor, step: int) -> Tensor:
        """Logits (R, V) of the tokens after `tokens` (R,), the ones number `step`."""


class _MixedDecoder:
    """Two models on the same rows, their logits mixed: what normalises each cancels in the softmax of the mixture."""

    def __init__(self, one: _Decoder, other: _Decoder, mixture: float) -> None:
        self.one, self.other, self.mixture = one, other, mixture

    def first(self) -> Tensor:
        return torch.lerp(self.one.first().float(), self.other.first().float(), self.mixture)

    def select(self, keep: Tensor) -> None:
        self.one.select(keep)
        self.other.select(keep)

    def next(self, tokens: Tensor, step: int) -> Tensor:
        one, other = self.one.next(tokens, step), self.other.next(tokens, step)
        return torch.lerp(one.float(), other.float(), self.mixture)


class _SharedDecoder:
    """Decodes R rows that attend to one copy of their prompts."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, tokens: int) -> None:
        self.model = model
        prefix = prefill(model, prompts)
        self.rows = PrefixRows(prefix, torch.arange(len(prompts), device=model.device).repeat_interleave(n))
        self.cache = ResponseCache(len(prefix.keys), tokens)

    def first(self) -> Tensor:
        return self.rows.prefix.logits[self.rows.prompt]

    def select(self, keep: Tensor) -> None:
        used, prompt = torch.unique_consecutive(self.rows.prompt[keep], return_inverse=True)
        prefix = self.rows.prefix
        self.rows = PrefixRows(prefix if len(used) == len(prefix.mask) else prefix.select(used), prompt)
        self.cache.select(keep)

    def next(self, tokens: Tensor, step: int) -> Tensor:
        with attending(self.model):
            return self.model(
                input_ids=tokens[:, None],
                position_ids=self.rows.positions(step, 1),
                past_key_values=self.cache,
                use_cache=True,
                prefix_rows=self.rows,
            ).logits[:, -1]


class _PlainDecoder:
    """Decodes R rows with transformers' own cache, for models that `shared_prefix` does not fit."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, tokens: int) -> None:
        self.model = model
        ids, mask = pad_left(prompts, model.device)
        self.position = mask.sum(1).repeat_interleave(n)
        self.mask = mask.repeat_interleave(n, 0)
        self.cache = DynamicCache(config=model.config)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self.logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].repeat_interleave(n, 0)  # fmt: skip
        self.cache.batch_repeat_interleave(n)

    def first(self) -> Tensor:
        return self.logits

    def select(self, keep: Tensor) -> None:
        self.mask, self.position = self.mask[keep], self.position[keep]
        self.cache.batch_select_indices(keep)

    def next(self, tokens: Tensor, step: int) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=(self.position + step)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
