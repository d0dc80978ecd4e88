"""Win rates, utilities and regret: computed here and nowhere else, so that no agent computes them differently.

A tie, and a response identical to the reference, counts one half in every win rate. What is not known is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import optimize
from scipy.special import expit

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.checked import checked_utility, compare
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Metrics, Observation, batch_size, rows_of

LENGTH_PRIOR = 0.01
"""Precision of the prior on the length term of `length_controlled`."""
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
    return _beats(task, task.oracle, prompts, responses)


def _beats(task: Task, judge: Oracle, prompts: Observation, responses: np.ndarray) -> np.ndarray:
    """P(the response beats the reference) by `judge`."""
    probability = np.full(batch_size(prompts), np.nan)
    reference = None if judge.metered else task.reference(prompts["prompt_id"])
    if reference is None:
        return probability
    rows = np.flatnonzero([stored is not None for stored in reference])
    probability[rows] = compare(judge, rows_of(prompts, rows), responses[rows], reference[rows])
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
    true_utility, optimum; on text response_words (white-space separated) and length_difference (characters of the
    response less those of the reference, NaN without one); where the task's truth is another than its oracle,
    true_win_rate and true_win_probability, the win rate as the truth has it.

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
    if task.truth is not None and task.truth is not task.oracle:
        truly = _beats(task, task.truth, observation, responses)
        result |= {"true_win_rate": hard(truly), "true_win_probability": truly}
    if task.kind == "text":
        result["response_words"] = np.array([len(text.split()) for text in responses], np.float64)
        result["length_difference"] = _length_difference(task, ids, responses)
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


def length_controlled(wins: np.ndarray, length_difference: np.ndarray) -> float:
    """The win rate that responses as long as the reference would have: AlpacaEval 2's (arXiv 2404.04475), simplified.

    A logistic regression, P(win) = sigmoid(theta + phi tanh(d / std(d))), read off at d = 0. AlpacaEval's terms for the
    difficulty of an instruction are left out: they are shared by many models, and here is one. phi has a weak Gaussian
    prior (precision `LENGTH_PRIOR`), so that it exists where length tells every win.

    Args:
        wins: (M,) in [0, 1], a tie is 1/2; rows that are NaN in either array are left out.
        length_difference: (M,) d, the response's length less the reference's.

    Returns:
        NaN where nothing is known, or where all responses differ from the reference by one length that is not 0.

    >>> longer = np.array([8.0] * 60 + [-8.0] * 20)
    >>> wins = np.array([1.0] * 54 + [0.0] * 6 + [1.0] * 2 + [0.0] * 18)  # 9 of 10 when longer, 1 of 10 when shorter
    >>> (wins.mean().round(2), round(length_controlled(wins, longer), 2))
    (np.float64(0.7), 0.5)
    """
    if wins.shape != length_difference.shape or wins.ndim != 1:
        raise ValueError(f"length_controlled: expected two vectors, got {wins.shape} and {length_difference.shape}")
    known = ~(np.isnan(wins) | np.isnan(length_difference))
    y, d = wins[known], length_difference[known]
    if not len(y):
        return float("nan")
    if not d.any() or (y == 0).all() or (y == 1).all():
        return float(y.mean())  # there is nothing to control for, or nothing that length could tell
    scale = d.std(ddof=1) if len(d) > 1 else 0.0
    if scale == 0:
        return float("nan")
    rows = np.column_stack([np.ones(len(d)), np.tanh(d / scale)])
    prior = np.array([0.0, LENGTH_PRIOR])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = rows @ weights
        value = np.logaddexp(0, z) - y * z
        return float(value.sum() + (prior * weights**2).sum() / 2), rows.T @ (expit(z) - y) + prior * weights

    return float(expit(optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS").x[0]))


def _length_difference(task: Task, ids: np.ndarray, responses: np.ndarray) -> np.ndarray:
    reference = task.reference(ids)
    stored = [None] * len(ids) if reference is None else reference
    return np.array([np.nan if r is None else len(text) - len(r) for text, r in zip(responses, stored)], np.float64)


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
