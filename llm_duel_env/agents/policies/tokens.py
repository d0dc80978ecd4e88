"""From prompts to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

CACHED_PROMPTS = 65_536


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """All ids that end a response: the generation config's and the tokenizer's.

    Raises:
        ValueError: there is none, so that no response could ever end.
    """
    named = None if generation is None else generation.eos_token_id
    ids = {*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError("neither the tokenizer nor the generation config names an end-of-sequence token")
    return tuple(sorted(int(i) for i in ids if i is not None))


class Tokens:
    """Encodes prompts and responses for one model.

    Args:
        tokenizer: its chat template is used where it has one, with the generation prompt added.
        eos: ids that end a response.
        max_prompt_tokens: a longer prompt loses its beginning, but not a BOS.
        max_new_tokens: T, the longest response, EOS included.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, eos: Sequence[int], max_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        if max_prompt_tokens < 2 or max_new_tokens < 1:
            wanted = "expected max_prompt_tokens >= 2 and max_new_tokens >= 1"
            raise ValueError(f"{wanted}, got {max_prompt_tokens} and {max_new_tokens}")
        self.tokenizer, self.eos = tokenizer, frozenset(eos)
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self.prompt = lru_cache(maxsize=CACHED_PROMPTS)(self._prompt)

    def _prompt(self, text: str) -> tuple[int, ...]:
        """Ids of one prompt. ValueError where it has none."""
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            encoded: Any = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            ids = list(encoded["input_ids"])
        else:
            ids = list(self.tokenizer(text)["input_ids"])
            # Some tokenizers close every text with EOS: a policy would answer as if the text were over.
            while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
        bos = self.tokenizer.bos_token_id
        if not ids and bos is not None:
            ids = [bos]
        if not ids:
            raise ValueError(f"prompt {text!r} has no tokens, and the tokenizer has no BOS to stand for it")
        if len(ids) > self.max_prompt_tokens:
            head = [bos] if ids[0] == bos else []
            ids = head + ids[len(ids) - self.max_prompt_tokens + len(head) :]
        return tuple(ids)

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of each of M prompts."""
        return [self.prompt(text) for text in texts]

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Texts (M, N), dtype object, of ids (M, N, T) with lengths (M, N): no EOS, no special tokens, no blanks at
        the ends. A response of nothing else is ''."""
        rows = []
        for ids, length in zip(tokens.reshape(-1, tokens.shape[-1]).tolist(), lengths.ravel().tolist()):
            ended = length > 0 and ids[length - 1] in self.eos
            rows.append(ids[: length - ended])
        texts = np.empty(len(rows), dtype=object)
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts[:] = [text.strip() for text in decoded]
        return texts.reshape(lengths.shape)

    def encode_responses(self, prompts: Sequence[str], texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (M, N, T) int64 and lengths (M, N) of texts (M, N) that were not sampled (edited, or recorded ones).

        EOS ends each; a text longer than T - 1 tokens is cut at T without one. A blank is put between a prompt and its
        response where no chat template stands between them and the prompt ends without one.
        """
        end = self.tokenizer.eos_token_id
        end = min(self.eos) if end is None else end
        tokens = np.zeros((*texts.shape, self.max_new_tokens), np.int64)
        lengths = np.zeros(texts.shape, np.int64)
        for m, prompt in enumerate(prompts):
            glue = "" if self.tokenizer.chat_template or not prompt or prompt[-1].isspace() else " "
            for n, text in enumerate(texts[m]):
                ids = self.tokenizer(glue + text, add_special_tokens=False)["input_ids"] if text else []
                ids = [*ids, end][: self.max_new_tokens]
                tokens[m, n, : len(ids)], lengths[m, n] = ids, len(ids)
        return tokens, lengths
