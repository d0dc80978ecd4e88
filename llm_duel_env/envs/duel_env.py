"""One prompt, one duel a step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from llm_duel_env.envs.actions import action_space, parse_again, parse_single_action
from llm_duel_env.envs.core import CoreEnv, DuelCore, whole_seed
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Observation


class DuelEnv(CoreEnv, gymnasium.Env):
    """One duel a step. As `DuelVectorEnv`, without the batch dimension, and with plain numbers in ``info``.

    What is not known (the metrics of an abstained step, the regret where the optimum is unknown, ...) is absent from
    ``info`` rather than NaN, as Gymnasium compares the infos of equal steps, and a NaN equals nothing. An abstained
    step has no ``preference``, and only a charged one has ``scores`` (2,).

    Gymnasium's `SyncVectorEnv` around it makes M separate runs; for M duels of one run take `DuelVectorEnv`, which
    `make_vec` returns by default. `AsyncVectorEnv` is not supported.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(
        self,
        *,
        task: str | Task,
        render_mode: str | None = None,
        **run: Any,
    ) -> None:
        """One duel a step.

        Args:
            task: Name of a task, or a Task itself.
            render_mode: None: there is nothing to see.
            **run: The other arguments of `llm_duel_env.envs.core.DuelCore`, which says what each means.

        Raises:
            TypeError: an argument of another name.
            ValueError: an unknown task or a value out of range.
        """
        if render_mode is not None:
            raise ValueError(f"render_mode: expected None, got {render_mode!r}")
        self.core = DuelCore(task, **run)
        self.render_mode = None
        self.observation_space = self.core.task.observation_space
        self.action_space = action_space(self.core.task.response_space)

    def observe(self) -> Observation:
        """The present prompt.

        Raises:
            ResetNeeded: neither `reset` nor `load_state_dict` was called.
        """
        batch = self.core.task.observe(self.core.prompt_ids(1))
        return {name: _item(value[0], self.core.task.observation_space[name]) for name, value in batch.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts a run, of `seed` or, where it is None, of one drawn from the environment's generator.

        Raises:
            TypeError: a seed that is not a whole number.
            LedgerMismatch: the ledger holds labels of a different run.
        """
        seed = whole_seed(seed)
        super().reset(seed=seed, options=options)
        self.core.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.observe(), {"query_count": self.core.query_count}

    def step(self, action: dict[str, Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Shows a pair and returns the next prompt, reward, terminated (False), truncated and info.

        Raises:
            TypeError, ValueError: a malformed action.
            ResetNeeded, BudgetExceeded, OracleError, LedgerMismatch: see `DuelCore.duel`. Nothing changes in any case.
        """
        first, second, query = parse_single_action(action, self.core.task.response_space)
        again = parse_again({name: [value] for name, value in action.items()}, 1)
        outcome = self.core.duel(self.core.prompt_ids(1), first, second, query, again)
        preference = float(outcome.preference[0])
        known = {"preference": preference, **{f"metrics/{name}": float(v[0]) for name, v in outcome.metrics.items()}}
        info = {
            "tie": preference == 0.5,
            "charged": bool(outcome.charged[0]),
            "query_count": self.core.query_count,
            **{name: value for name, value in known.items() if not np.isnan(value)},
            **{f"oracle/{name}": spent for name, spent in self.task.oracle.usage().items()},
        }
        if outcome.scores is not None:
            told = ~np.isnan(outcome.scores[0])
            info["evaluations"] = int(told.sum())
            if told.all():
                info["scores"] = outcome.scores[0]
        return self.observe(), float(outcome.reward[0]), False, self.core.finished, info

    def close(self) -> None:
        """Closes the ledger."""
        self.core.close()


def _item(value: Any, space: spaces.Space) -> Any:
    """One prompt's part of a batch observation, in the type its space asks for."""
    if isinstance(space, spaces.Box):
        return np.asarray(value, space.dtype)
    return np.int64(value) if isinstance(space, spaces.Discrete) else value
