"""One environment for all ranks: rank 0 asks the oracle and keeps the ledger, and tells the others what came of it.

The other ranks hold the environment too, without a ledger: they know the prompts, and are told how far the run is.
"""

from __future__ import annotations

import zlib
from typing import Any, cast

import gymnasium
import numpy as np
import torch

from llm_duel_env import ranks
from llm_duel_env.oracles.base import OracleStopped


def step(env: gymnasium.vector.VectorEnv, action: dict[str, Any]) -> tuple[Any, ...]:
    """`env.step` on rank 0, what it returned on all.

    Raises:
        OracleStopped: on all ranks, where rank 0's oracle says so.
        RanksDiffer: the ranks would have shown different duels.
    """
    if ranks.world() == 1:
        return env.step(action)
    ranks.check_alike("the duels of a round", [torch.tensor([_digest(action)])])
    core = cast(Any, env.unwrapped)
    if ranks.rank() == 0:
        try:
            observation, *rest = env.step(action)
        except OracleStopped:
            ranks.lead(None)
            raise
        ranks.lead([*rest, core.state_dict()])
        return (observation, *rest)
    told = ranks.follow()
    if told is None:
        raise OracleStopped("rank 0 was told to stop")
    *rest, state = told
    core.load_state_dict(state)
    return (core.observe(), *rest)


def evaluate_prompts(core: Any, responses: np.ndarray) -> dict[str, np.ndarray]:
    """`core.evaluate_prompts` of responses (M,) to the first M held-out prompts: rank 0 evaluates, and tells all."""
    if ranks.rank() == 0:
        return ranks.lead(core.evaluate_prompts(lambda _: responses, len(responses)))
    return ranks.follow()


def _digest(action: dict[str, Any]) -> int:
    return zlib.crc32(repr([(name, [str(value) for value in action[name]]) for name in sorted(action)]).encode())
