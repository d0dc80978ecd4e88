"""The one loop in which policies train: passes, shuffled batches, microbatches whose gradients add up, metrics."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from llm_duel_env.agents.policies.base import PolicyConfig, learning_rate
from llm_duel_env.agents.policies.learners.batches import microbatches
from llm_duel_env.agents.policies.learners.lesson import Lesson, Score
from llm_duel_env.agents.policies.ranked import DirectOptimizer
from llm_duel_env.types import Metrics


class Engine(Protocol):
    """What takes the optimizer's steps, on one rank or on several that hold equal weights."""

    rank: int
    """Of this process."""
    world: int
    """Ranks that share each optimizer step."""

    def begin(self, learning_rate: float) -> None:
        """Sets the learning rate and drops gradients."""

    def backward(self, value: Tensor, last: bool) -> None:
        """Adds the gradients of a scalar, summed over ranks, to those there are. `last`: a step comes next."""

    def step(self) -> float:
        """Clips the gradients, takes a step and drops them; the norm before clipping. FloatingPointError, and no step,
        where it is not finite."""

    def total(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""


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
    the batch, and a loss that normalises by statistics of the batch is handed them (`RankedLogProbs.batch_scores`). So
    it is with ranks: each is given the whole lesson and takes its share of each batch (`microbatches`).

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
            parts = microbatches(batch, lesson.sizes(batch), config.microbatch, engine.rank, engine.world)
            for number, (rows, weight) in enumerate(parts, start=1):
                value, metrics = loss(lesson.part(rows, batch, score))
                engine.backward(value * weight, number == len(parts))
                for name, mean in {"loss": float(value.detach()), **metrics}.items():
                    totals[name] = totals.get(name, 0.0) + mean * weight * len(batch)
            norms.append(engine.step())
    sums = dict(zip(totals, engine.total(list(totals.values()))))
    return {name: total / (config.passes * count) for name, total in sums.items()} | {
        "grad_norm": float(np.mean(norms)),
        "learning_rate": rate,
        "gradient_steps": float(len(norms)),
        "pairs": float(count),
    }
