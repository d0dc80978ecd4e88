"""The native batch: M prompts in, M duels judged in one oracle batch, the next M prompts out."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llm_duel_env.envs.actions import action_space, parse_action, parse_again
from llm_duel_env.envs.core import CoreEnv, DuelCore, whole_seed
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Observation


class DuelVectorEnv(CoreEnv, VectorEnv):
    """M duels a step, of one run: one seed, one budget, one ledger.

    Observation: ``prompt`` (M str) or ``context`` (M, C) and ``candidates`` (M, K, D), with ``prompt_id`` (M,).

    Action: ``first`` and ``second``, M responses each, and ``query`` (M,) of 0 or 1 (all 1 where left out). 0 abstains:
    the pair is not shown, costs nothing and gets no label. An identical pair is shown and is a tie, but the oracle is
    not asked and nothing is charged. ``again`` (M,) of 0 or 1 (all 0 where left out): 1 keeps the prompt for the next
    round, so that several duels can be about it, each charged. A malformed action is refused and changes nothing.

    Reward (M,): P(first beats the reference response) and P(second beats it), averaged; 0 where abstained. Where the
    prompt has no reference response it is the preference observed.

    An episode is a run: ``terminated`` is never True, ``truncated`` is all True when budget or rounds are spent. There
    is no autoreset. Wrappers of `gymnasium.wrappers.vector` go around the environment that `make_vec` returned.

    ``info``, each (M,): ``preference`` (1 first, 0 second, 1/2 tie, NaN abstained), ``tie``, ``charged``,
    ``query_count`` (the run's total), and for evaluators only ``metrics/...``: online_win_rate, online_win_probability,
    regret, utility_regret, utility_first, utility_second, probability; NaN where unknown or abstained. Made with
    ``scores=True`` also ``scores`` (M, 2), the oracle's utility of both responses, NaN where nothing was charged, and
    ``evaluations``, how many of those were told in this step: richer feedback than labels, and counted apart.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: str | Task,
        render_mode: str | None = None,
        **run: Any,
    ) -> None:
        """A batch of duels.

        Args:
            num_envs: M, the prompts in a round.
            task: Name of a task, or a Task itself.
            render_mode: None: there is nothing to see.
            **run: The other arguments of `llm_duel_env.envs.core.DuelCore`, which says what each means.

        Raises:
            TypeError: an argument of another name.
            ValueError: an unknown task or a value out of range.
        """
        if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs: expected a whole number of at least 1, got {num_envs!r}")
        if render_mode is not None:
            raise ValueError(f"render_mode: expected None, got {render_mode!r}")
        self.core = DuelCore(task, **run)
        self.num_envs, self.render_mode = int(num_envs), None
        self.single_observation_space = self.core.task.observation_space
        self.single_action_space = action_space(self.core.task.response_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def observe(self) -> Observation:
        """The present M prompts.

        Raises:
            ResetNeeded: neither `reset` nor `load_state_dict` was called.
        """
        observation = self.core.task.observe(self.core.prompt_ids(self.num_envs))
        return {name: value if isinstance(value, np.ndarray) else tuple(value) for name, value in observation.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts a run, of `seed` or, where it is None, of one drawn from the environment's generator.

        Raises:
            TypeError: a list of seeds: all M duels belong to one run.
            ValueError: a partial ``reset_mask``, for the same reason.
            LedgerMismatch: the ledger holds labels of a different run.
        """
        seed = whole_seed(seed)
        if options and not np.all(options.get("reset_mask", True)):
            raise ValueError("reset_mask: expected all True, since all duels belong to one run")
        super().reset(seed=seed, options=options)
        self.core.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.observe(), {"query_count": np.full(self.num_envs, self.core.query_count)}

    def step(self, actions: dict[str, Any]) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Shows M pairs and returns the next M prompts, rewards, terminated, truncated and info.

        Raises:
            TypeError, ValueError: a malformed action.
            ResetNeeded, BudgetExceeded, OracleError, LedgerMismatch: see `DuelCore.duel`. Nothing changes in any case.
        """
        first, second, query = parse_action(actions, self.core.task.response_space, self.num_envs)
        again = parse_again(actions, self.num_envs)
        outcome = self.core.duel(self.core.prompt_ids(self.num_envs), first, second, query, again)
        info = {
            "preference": outcome.preference,
            "tie": outcome.preference == 0.5,
            "charged": outcome.charged,
            "query_count": np.full(self.num_envs, self.core.query_count),
            **{f"metrics/{name}": value for name, value in outcome.metrics.items()},
            **{f"oracle/{name}": np.full(self.num_envs, spent) for name, spent in self.task.oracle.usage().items()},
        }
        if outcome.scores is not None:
            info |= {"scores": outcome.scores, "evaluations": (~np.isnan(outcome.scores)).sum(axis=1)}
        truncated = np.full(self.num_envs, self.core.finished)
        return self.observe(), outcome.reward, np.zeros(self.num_envs, bool), truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the ledger."""
        self.core.close()
