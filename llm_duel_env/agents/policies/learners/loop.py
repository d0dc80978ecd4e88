"""The one loop in which policies train: passes, shuffled batches, microbatches whose gradients add up, metrics."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from llm_duel_env.agents.policies.base import PolicyConfig, learning_rate
from llm_duel_env.agents.policies.learners.lesson import Lesson, Score
from llm_duel_env.agents.policies.ranked import DirectOptimizer
from llm_duel_env.types import Metrics


class Engine(Protocol):
    """What takes the optimizer's steps."""

    def begin(self, learning_rate: float) -> None:
        """Sets the learning rate and drops gradients."""

    def backward(self, value: Tensor) -> None:
        """Adds the gradients of a scalar to those there are."""

    def step(self) -> float:
        """Clips the gradients, takes a step and drops them; the norm before clipping. FloatingPointError, and no step,
        where it is not finite."""


def train(
    engine: Engine,
    loss: DirectOptimizer,
    lesson: Lesson,
    score: Score,
    *,
    config: PolicyConfig,
    progress: float,
    rng: np.random.Generator,
) -> Metrics:
    """`passes` passes over a lesson's B rows, in shuffled batches of one optimizer step each.

    A batch's loss is the mean over its rows, whatever the microbatch: a microbatch's mean is weighted by its share of
    the batch, and a loss that normalises by statistics of the batch is handed them (`RankedLogProbs.batch_scores`).

    Args:
        engine: takes the steps.
        loss: called on each microbatch.
        lesson: what is taught.
        score: the policy's log-probabilities, with gradient.
        config: passes, batch, microbatch and the learning rate's schedule.
        progress: share of the budget spent; sets the learning rate.
        rng: shuffles.

    Returns:
        See `Policy.learn`.
    """
    rate, count = learning_rate(config, progress), len(lesson)
    totals: dict[str, float] = {}
    norms: list[float] = []
    for _ in range(config.passes):
        order = rng.permutation(count)
        for batch in (order[i : i + config.batch] for i in range(0, count, config.batch)):
            engine.begin(rate)
            for rows in (batch[i : i + config.microbatch] for i in range(0, len(batch), config.microbatch)):
                value, metrics = loss(lesson.part(rows, batch, score))
                engine.backward(value * (len(rows) / len(batch)))
                for name, number in {"loss": float(value.detach()), **metrics}.items():
                    totals[name] = totals.get(name, 0.0) + number * len(rows)
            norms.append(engine.step())
    return {name: total / (config.passes * count) for name, total in totals.items()} | {
        "grad_norm": float(np.mean(norms)),
        "learning_rate": rate,
        "gradient_steps": float(len(norms)),
        "pairs": float(count),
    }
