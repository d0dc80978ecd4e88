"""An oracle made of a reward model behind a server: ours, vLLM's, or text-embeddings-inference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.http_client import BadAnswer, JsonClient, Patience, field, finite_number, rows, shown
from llm_duel_env.oracles.scored import ScoringOracle, Text, check_template, fill
from llm_duel_env.pretrained import loading
from llm_duel_env.types import Metrics

Protocol = Literal["llm-duel", "vllm-classify", "vllm-pooling", "tei"]
PATHS: dict[str, str] = {
    "llm-duel": "/score",
    "vllm-classify": "/classify",
    "vllm-pooling": "/pooling",
    "tei": "/predict",
}
"""Where each protocol's scores come from."""


class RemoteOracle(ScoringOracle):
    """P(first beats second) = sigmoid(scale (s(first) - s(second))) for the scores s that a server gives.

    Scores are raw, never squashed into (0, 1): vLLM and text-embeddings-inference are asked for them so. Each distinct
    (prompt, response) is asked for once; what a failed batch had learnt already is remembered, and what it had not is
    all that is asked again.
    """

    def __init__(
        self,
        url: str,
        *,
        protocol: Protocol = "llm-duel",
        model: str | None = None,
        text_template: str | None = None,
        tokenizer: str | None = None,
        token_env: str | None = None,
        scale: float = 1.0,
        batch: int = 32,
        cache_size: int = 65536,
        **patience: Any,
    ) -> None:
        """An oracle that has not called its server yet.

        Args:
            url: Address of the server, e.g. ``http://127.0.0.1:8765``; ``$NAME`` takes it from the environment.
            protocol: "llm-duel" for `llm-duel serve-oracle`, "vllm-classify" or "vllm-pooling" for vLLM, "tei" for
                text-embeddings-inference.
            model: vLLM: the name it serves the model under. llm-duel: the model that must be there, where one is given.
            text_template: What vLLM and text-embeddings-inference are sent, with ``{prompt}`` and ``{response}``;
                None is ``"{prompt} {response}"``. Unlike `RewardModelOracle` these servers add no end-of-text token
                where the tokenizer adds none: write it at the template's end. llm-duel sends both apart: the server's
                model has its own template.
            tokenizer: Folder or hub name of a tokenizer whose chat template makes the text, in the template's place.
                vLLM is then told to add no special tokens, because the template writes them; give it to
                text-embeddings-inference only where its tokenizer adds none.
            token_env: Environment variable with the bearer token.
            scale: Inverse temperature: how many logits one unit of score is worth.
            batch: Texts per request.
            cache_size: How many scores are remembered.
            patience: Fields of `Patience`: connect_timeout, read_timeout, deadline, attempts, backoff, in_flight, ...

        Raises:
            ValueError: arguments that are out of range or contradict each other; nothing was sent.
        """
        super().__init__(scale=scale, cache_size=cache_size)
        if protocol not in PATHS:
            raise ValueError(f"protocol: expected one of {sorted(PATHS)}, got {protocol!r}")
        if protocol.startswith("vllm") and not model:
            raise ValueError("model: expected the name under which vLLM serves the model, got none")
        if protocol == "llm-duel" and (text_template or tokenizer):
            raise ValueError("text_template, tokenizer: the llm-duel server has its own; expected none")
        if text_template and tokenizer:
            raise ValueError("text_template, tokenizer: expected at most one of them")
        if text_template:
            check_template(text_template, "prompt", "response")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected a whole number of at least 1, got {batch!r}")
        self.protocol, self.model, self.batch = protocol, model, batch
        self.text_template = text_template or "{prompt} {response}"
        self._tokenizer = _chat_tokenizer(tokenizer) if tokenizer else None
        self.client = JsonClient(url, token_env=token_env, patience=patience_of(patience))

    def score(self, texts: Sequence[Text]) -> np.ndarray:
        """The server's score of each text: float64 (R,).

        Raises:
            OracleError: no usable answer.
        """
        chunks = [texts[begin : begin + self.batch] for begin in range(0, len(texts), self.batch)]
        bodies = [self._body(chunk) for chunk in chunks]

        def read(answer: Any, number: int) -> list[float]:
            scores = self._read(answer, len(chunks[number]))
            for text, score in zip(chunks[number], scores):
                self.remember(text, score)  # kept even where another chunk fails
            self.rows_scored += len(scores)
            return scores

        answers = self.client.post_all(PATHS[self.protocol], bodies, read)
        return np.array([score for scores in answers for score in scores], np.float64)

    def _body(self, texts: Sequence[Text]) -> dict[str, Any]:
        if self.protocol == "llm-duel":
            return {"texts": [{"prompt": prompt, "response": response} for prompt, response in texts]}
        written = [self._write(*text) for text in texts]
        if self.protocol == "tei":
            # One list per text: a plain list of two would be a pair.
            return {"inputs": [[text] for text in written], "raw_scores": True, "truncate": False}
        body: dict[str, Any] = {"model": self.model, "input": written, "use_activation": False}
        if self._tokenizer is not None:
            body["add_special_tokens"] = False
        return body | ({"task": "classify"} if self.protocol == "vllm-pooling" else {})

    def _write(self, prompt: str, response: str) -> str:
        if self._tokenizer is None:
            return fill(self.text_template, prompt=prompt, response=response)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self._tokenizer.apply_chat_template(turns, tokenize=False)

    def _read(self, answer: Any, count: int) -> list[float]:
        """The scores of an answer to `count` texts, in their order; BadAnswer where they are not all there."""
        if self.protocol == "llm-duel":
            served = field(answer, "model")
            if self.model is not None and served != self.model:
                raise OracleError(f"{self.client.url}: expected the model {self.model!r}, it serves {shown(served)}")
            return [finite_number(score, "score") for score in rows(field(answer, "scores"), count, "scores")]
        if self.protocol == "tei":
            found = [rows(row, 1, "classes of a text") for row in rows(answer, count, "predictions")]
            return [finite_number(field(row[0], "score"), "score") for row in found]
        column = "probs" if self.protocol == "vllm-classify" else "data"
        data = rows(field(answer, "data"), count, "data")
        order = [field(row, "index") for row in data]
        if any(type(index) is not int for index in order) or sorted(order) != list(range(count)):
            raise BadAnswer(f"data: expected index 0 to {count - 1}, once each, got {shown(order)}")
        by_index = dict(zip(order, (rows(field(row, column), 1, column)[0] for row in data)))
        return [finite_number(by_index[number], column) for number in range(count)]

    def usage(self) -> Metrics:
        """requests: sent in this sitting, repeated ones included; scored: texts that got a score in it."""
        return {"requests": float(self.client.requests), "scored": float(self.rows_scored)}

    def close(self) -> None:
        """Lets connections go."""
        self.client.close()


def patience_of(settings: dict[str, Any]) -> Patience:
    """`Patience` from its fields' names and values. ValueError for another name or a value out of range."""
    known = Patience.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such setting of this oracle; limits are {', '.join(known)}")
    try:
        return Patience(**settings)
    except TypeError as error:  # text where a number belongs
        raise ValueError(f"expected numbers, got {settings}: {error}") from error


def _chat_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {name!r} has no chat template: expected one, or a text_template")
    return tokenizer
