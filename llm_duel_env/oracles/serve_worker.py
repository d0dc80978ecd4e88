"""What a worker of the server does with a batch of requests. Imported only where LitServe is installed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import litserve
import numpy as np

from llm_duel_env.oracles.scored import Text

if TYPE_CHECKING:
    from llm_duel_env.oracles.serve import ServerSettings

LOG = logging.getLogger(__name__)
Scores = list[float | None]


class ScoreAPI(litserve.LitAPI):
    """Scores the texts of several requests together. Requests were checked before (`serve.Gate`)."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(max_batch_size=settings.max_batch, batch_timeout=settings.batch_wait, api_path="/score")
        self.settings = settings

    def setup(self, device: Any) -> None:
        """Loads the model onto this worker's device."""
        from llm_duel_env.oracles.reward_model import RewardModelOracle

        settings = self.settings
        self.oracle = RewardModelOracle(
            settings.model,
            device=str(device),
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            text_template=settings.text_template,
        )

    def decode_request(self, request, **_: Any) -> list[Text]:
        """The texts of one request. Not annotated: LitServe would take that for the schema of a query."""
        return [(text["prompt"], text["response"]) for text in request["texts"]]

    def batch(self, inputs: list[list[Text]]) -> list[list[Text]]:
        """Requests as they came: `predict` takes them together."""
        return inputs

    def predict(self, x: Any, **_: Any) -> Any:
        """The scores of each request's texts; where max_batch is 1, LitServe gives and takes one request alone."""
        if self.settings.max_batch == 1:
            return self._score([x])[0]
        return self._score(x)

    def unbatch(self, output: list[Scores]) -> list[Scores]:
        """One entry per request."""
        return output

    def encode_response(self, output: Scores, **_: Any):
        """What one request is answered, a dict; not annotated, for the same reason."""
        return {"model": self.settings.served_name, "scores": output}

    def _score(self, requests: list[list[Text]]) -> list[Scores]:
        """The scores of each request's texts; None for one that cannot be scored alone either.

        An exception would be LitServe's answer to every request of the batch, so whatever fails is tried again in
        smaller parts: request by request, then text by text.
        """
        texts = list(dict.fromkeys(text for request in requests for text in request))
        try:
            scores = dict(zip(texts, _finite(self.oracle.score(texts))))
        except Exception as error:
            what = f"{len(texts)} texts of {len(requests)} requests"
            LOG.warning("could not score %s: %s: %s", what, type(error).__name__, error)
            if len(requests) > 1:
                return [self._score([request])[0] for request in requests]
            if len(texts) > 1:
                scores = {text: self._score([[text]])[0][0] for text in texts}
            else:
                scores = {texts[0]: None}
        return [[scores[text] for text in request] for request in requests]


def _finite(scores: np.ndarray) -> Scores:
    return [float(score) if np.isfinite(score) else None for score in scores]
