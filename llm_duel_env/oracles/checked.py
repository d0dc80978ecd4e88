"""The one place where an oracle's answers are checked before anything is made of them."""

from __future__ import annotations

import numpy as np

from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.types import Observation, batch_size, rows_of


def compare(oracle: Oracle, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """P(first beats second), float64 (M,): exactly 1/2 where the two are identical, which the oracle is not asked.

    Raises:
        OracleError: an unusable answer.
    """
    probability = np.full(batch_size(prompts), 0.5)
    differ = np.flatnonzero(first != second)
    probability[differ] = checked_win_probability(oracle, rows_of(prompts, differ), first[differ], second[differ])
    return probability


def checked_win_probability(oracle: Oracle, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`oracle.win_probability` as float64 (M,), surely in [0, 1], or NaN where the oracle may skip and does. The oracle
    is not called where M is 0.

    Raises:
        OracleError: a wrong count, a NaN of an oracle that may not skip, an infinity, or a value outside [0, 1].
    """
    if batch_size(prompts) == 0:
        return np.empty(0)
    answer = _floats(oracle, "win_probability", oracle.win_probability(prompts, first, second), batch_size(prompts))
    good = (answer >= 0) & (answer <= 1)  # a NaN fails both
    bad = np.flatnonzero(~(good | np.isnan(answer)) if oracle.may_skip else ~good)
    if bad.size:
        raise OracleError(_complaint(oracle, "win_probability", "probabilities in [0, 1]", answer, prompts, bad))
    return answer


def checked_utility(oracle: Oracle, prompts: Observation, responses: np.ndarray) -> np.ndarray:
    """`oracle.utility` as float64 (M,), surely finite. The oracle is not called where M is 0.

    Raises:
        OracleError: a wrong count, a NaN or an infinity.
    """
    if batch_size(prompts) == 0:
        return np.empty(0)
    answer = _floats(oracle, "utility", oracle.utility(prompts, responses), batch_size(prompts))
    bad = np.flatnonzero(~np.isfinite(answer))
    if bad.size:
        raise OracleError(_complaint(oracle, "utility", "finite numbers", answer, prompts, bad))
    return answer


def _floats(oracle: Oracle, method: str, answer: object, count: int) -> np.ndarray:
    try:
        array = np.array(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OracleError(f"{type(oracle).__name__}.{method}: expected {count} numbers, got {answer!r}") from error
    if array.shape != (count,):
        raise OracleError(f"{type(oracle).__name__}.{method}: expected shape ({count},), got {array.shape}")
    return array


def _complaint(
    oracle: Oracle, method: str, wanted: str, answer: np.ndarray, prompts: Observation, bad: np.ndarray
) -> str:
    got = f"{answer[bad[0]]} for prompt {prompts['prompt_id'][bad[0]]}"
    return f"{type(oracle).__name__}.{method}: expected {wanted}, got {got} ({bad.size} of {len(answer)} are bad)"
