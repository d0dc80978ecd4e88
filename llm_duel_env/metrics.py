"""Win rates, utilities and regret: computed here and nowhere else, so that no agent computes them differently.

A tie, and a response identical to the reference, counts one half in every win rate. What is not known is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.checked import checked_utility, compare
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Metrics, Observation, batch_size, rows_of

Respond = Callable[[Observation], np.ndarray]
"""A deployed policy: (M,) responses to a batch observation of M prompts."""


def hard(probability: np.ndarray) -> np.ndarray:
    """1 where the probability is above 1/2, 0 below, 1/2 at 1/2, NaN at NaN.

    >>> hard(np.array([0.7, 0.5, 0.2, np.nan]))
    array([1. , 0.5, 0. , nan])
    """
    return np.where(np.isnan(probability), np.nan, (np.sign(probability - 0.5) + 1) / 2)


def true_utility(task: Task, prompts: Observation, responses: np.ndarray) -> np.ndarray:
    """The utility of each response by the task's truth, else by its oracle: float64 (M,), NaN where neither has one."""
    judge = _judge(task)
    if not judge.has_utility or judge.metered:
        return np.full(batch_size(prompts), np.nan)
    return checked_utility(judge, prompts, responses)


def optimum(task: Task, prompts: Observation) -> np.ndarray:
    """The utility of the best response to each prompt: float64 (M,), NaN where it is not known."""
    best = task.optimum(prompts["prompt_id"]) if _judge(task).has_utility else None
    return np.full(batch_size(prompts), np.nan) if best is None else np.asarray(best, np.float64)


def optimal_win_probability(
    task: Task, prompts: Observation, responses: np.ndarray, utility: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """P(the best response beats the response), float64 (M,), NaN where it is not known.

    By Bradley-Terry from the `utility` (M,) of the responses and the `best` (M,) where there are utilities, against the
    von Neumann winner where there are only preferences.
    """
    if _judge(task).has_utility:
        return expit(best - utility)
    known = _judge(task).optimal_win_probability(prompts, responses)
    return np.full(batch_size(prompts), np.nan) if known is None else np.asarray(known, np.float64)


def beats_reference(task: Task, prompts: Observation, responses: np.ndarray) -> np.ndarray:
    """P(the response beats the reference) by the task's oracle, float64 (M,); NaN where a prompt has no reference, and
    everywhere where the oracle's answers are metered: those are for labels."""
    probability = np.full(batch_size(prompts), np.nan)
    reference = None if task.oracle.metered else task.reference(prompts["prompt_id"])
    if reference is None:
        return probability
    rows = np.flatnonzero([stored is not None for stored in reference])
    probability[rows] = compare(task.oracle, rows_of(prompts, rows), responses[rows], reference[rows])
    return probability


def known_mean(values: np.ndarray) -> float:
    """Mean of what is known; NaN where nothing is.

    >>> known_mean(np.array([1.0, np.nan, 0.0]))
    0.5
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def duel_metrics(task: Task, prompts: Observation, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """What an evaluator may know of M duels that were shown: float64 (M,) by name.

    online_win_rate and online_win_probability: mean over both responses of winning against the reference, hard and as
    a probability. regret: P(a* > first) + P(a* > second) - 1. utility_regret: optimum minus the mean of utility_first
    and utility_second.

    Raises:
        OracleError: an unusable answer.
    """
    against = [beats_reference(task, prompts, responses) for responses in (first, second)]
    best = optimum(task, prompts)
    utilities = [true_utility(task, prompts, responses) for responses in (first, second)]
    lost = [
        optimal_win_probability(task, prompts, responses, utility, best)
        for responses, utility in zip((first, second), utilities)
    ]
    return {
        "online_win_rate": (hard(against[0]) + hard(against[1])) / 2,
        "online_win_probability": (against[0] + against[1]) / 2,
        "regret": lost[0] + lost[1] - 1,
        "utility_regret": best - (utilities[0] + utilities[1]) / 2,
        "utility_first": utilities[0],
        "utility_second": utilities[1],
    }


def evaluate_prompts(task: Task, respond: Respond, prompts: int | None = None) -> dict[str, np.ndarray]:
    """A deployed policy on the first `prompts` held-out prompts (all by default): arrays (prompts,), for bootstraps.

    `respond` is called once with all of them. Names: prompt_id, offline_win_rate (hard), offline_win_probability,
    true_utility, optimum, and on text response_words (white-space separated).

    Raises:
        ValueError: `prompts` is not 1 to the number of held-out prompts, or `respond` gave a wrong number of responses
            or one outside the response space.
        OracleError: an unusable answer.
    """
    count = task.heldout_prompts if prompts is None else prompts
    if not 1 <= count <= task.heldout_prompts:
        raise ValueError(f"prompts: expected 1 to {task.heldout_prompts} held-out prompts, got {prompts}")
    ids = task.heldout_ids[:count]
    observation = task.observe(ids)
    responses = _as_responses(task, respond(observation), count)
    probability = beats_reference(task, observation, responses)
    result = {
        "prompt_id": ids,
        "offline_win_rate": hard(probability),
        "offline_win_probability": probability,
        "true_utility": true_utility(task, observation, responses),
        "optimum": optimum(task, observation),
    }
    if task.kind == "text":
        result["response_words"] = np.array([len(text.split()) for text in responses], np.float64)
    return result


def evaluate(task: Task, respond: Respond, prompts: int | None = None) -> Metrics:
    """The means of `evaluate_prompts`, with optimum_share and simple_regret in the place of optimum.

    Means are over the prompts where a value is known, so prompts without a reference count in no win rate.
    optimum_share is mean utility / mean optimum; simple_regret is mean (optimum - utility).
    """
    return summarise(evaluate_prompts(task, respond, prompts))


def summarise(per_prompt: dict[str, np.ndarray]) -> Metrics:
    """What `evaluate` says of the arrays that `evaluate_prompts` gives, or of a resample of their rows."""
    means = {name: known_mean(value) for name, value in per_prompt.items() if name != "prompt_id"}
    best, utility = means.pop("optimum"), means["true_utility"]
    means["optimum_share"] = utility / best if best != 0 else float("nan")
    means["simple_regret"] = best - utility
    return means


def _judge(task: Task) -> Oracle:
    return task.oracle if task.truth is None else task.truth


def _as_responses(task: Task, responses: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64 or str in dtype object, surely in the response space."""
    if len(responses) != count:
        raise ValueError(f"respond: expected {count} responses, got {len(responses)}")
    for number, response in enumerate(responses):
        if response not in task.response_space:
            raise ValueError(f"respond: expected an element of {task.response_space}, got {response!r} at {number}")
    array = np.empty(count, object if task.kind == "text" else np.int64)
    array[:] = responses
    return array
