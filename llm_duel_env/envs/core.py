"""What both environments stand on: prompts in order, duels judged, labels bought, written down and counted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium.error import ResetNeeded

from llm_duel_env.ledger import Ledger, LedgerMismatch, Record
from llm_duel_env.metrics import Respond, duel_metrics, evaluate, evaluate_prompts
from llm_duel_env.oracles.checked import checked_utility, checked_win_probability
from llm_duel_env.oracles.feedback import Feedback
from llm_duel_env.randomness import generator
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.base import Task
from llm_duel_env.timing import Stopwatch
from llm_duel_env.types import Metrics, Observation, rows_of

_STATE = ("seed", "served", "round", "query_count")


class BudgetExceeded(RuntimeError):  # noqa: N818 (an exception that says what happened)
    """An action asks for more queries than the budget has left. Nothing was spent."""


@dataclass(frozen=True)
class Outcome:
    """What became of M duels; all arrays are (M,)."""

    preference: np.ndarray
    """1 the first won, 0 the second, 1/2 a tie, NaN abstained."""
    charged: np.ndarray
    """A query was paid for it."""
    reward: np.ndarray
    """Probability of beating the reference, mean over both responses; the preference where the prompt has no reference;
    0 where abstained."""
    metrics: dict[str, np.ndarray]
    """What only an evaluator may know; NaN where unknown or abstained."""
    scores: np.ndarray | None = None
    """(M, 2) the oracle's utility of both responses, NaN where nothing was charged; None where they are not asked for.
    """


class DuelCore:
    """One run: its task, its feedback, its ledger, and how far it has come.

    The state of a run is four numbers and the prompts that it keeps (`state_dict`): the order of prompts and the noise
    of labels are keyed by its seed, so they need no generator and do not depend on how many prompts come in a round.

    Both environments take these arguments:

    Args:
        task: Name of a task, or a Task itself; with the latter the environment's spec is not JSON-serialisable.
        task_kwargs: Arguments of a task given by name.
        budget: Queries in all; None for no limit.
        max_rounds: Steps in all; None for no limit.
        feedback: "bernoulli" or "threshold"; None for the task's own.
        flip_rate: Probability with which a label is turned round.
        tie_margin: A tie where the oracle's probability is this close to 1/2.
        ledger: File that every label is written to; None for no ledger. Give a str where the environment's spec is to
            be JSON-serialisable: JSON knows no paths.
        scores: Whether ``info`` tells the oracle's utilities; OracleError on the first step where it has none.

    Raises:
        TypeError: an argument of another name.
        ValueError: an unknown task or a value out of range.
    """

    def __init__(
        self,
        task: str | Task,
        *,
        task_kwargs: dict[str, Any] | None = None,
        budget: int | None = None,
        max_rounds: int | None = None,
        feedback: Literal["bernoulli", "threshold"] | None = None,
        flip_rate: float = 0.0,
        tie_margin: float = 0.0,
        ledger: str | os.PathLike[str] | None = None,
        scores: bool = False,
    ) -> None:
        for name, limit in (("budget", budget), ("max_rounds", max_rounds)):
            if limit is not None and (not _whole(limit) or limit < 1):
                raise ValueError(f"{name}: expected a whole number of at least 1 or None, got {limit!r}")
        if feedback not in (None, "bernoulli", "threshold"):
            raise ValueError(f"feedback: expected 'bernoulli', 'threshold' or None, got {feedback!r}")
        if ledger is not None and not os.fspath(ledger):
            raise ValueError(f"ledger: expected a file or None, got {ledger!r}")
        if isinstance(task, Task) and task_kwargs:
            raise ValueError(f"task_kwargs go with a task's name, but the task is given as an object: {task_kwargs}")
        self.task = task if isinstance(task, Task) else make_task(task, **(task_kwargs or {}))
        self.feedback = Feedback(feedback or self.task.feedback, flip_rate, tie_margin)
        self.budget, self.max_rounds, self.scores = budget, max_rounds, bool(scores)
        self.ledger: Ledger | None = None
        self._ledger_path = ledger
        self._identity = {
            "task": self.task.name,
            "task_kwargs": task_kwargs or {},
            "fingerprint": self.task.fingerprint(),
            "feedback": self.feedback.kind,
            "flip_rate": float(flip_rate),
            "tie_margin": float(tie_margin),
        }
        self.clock = Stopwatch()
        self.seed: int | None = None
        self.served = self.round = self.query_count = 0
        self.kept: list[int] = []
        """By place in the round the id of a prompt that is shown again, -1 for a new one; empty: all are new."""
        self._epoch: tuple[int, int, np.ndarray] | None = None

    @property
    def remaining(self) -> int | None:
        """Queries left in the budget; None where there is no budget."""
        return None if self.budget is None else max(self.budget - self.query_count, 0)

    @property
    def finished(self) -> bool:
        """The budget or the rounds are spent."""
        return self.remaining == 0 or (self.max_rounds is not None and self.round >= self.max_rounds)

    def reset(self, seed: int) -> None:
        """Starts the run of this seed. Where its ledger holds labels already, they will be replayed, not bought.

        Raises:
            LedgerMismatch: the ledger holds labels of a different run.
        """
        self._start({"seed": int(seed), "served": 0, "round": 0, "query_count": 0})

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come, as JSON has it."""
        return {name: getattr(self, name) for name in _STATE} | {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. What the ledger holds beyond it is replayed.

        Raises:
            ValueError: not a state.
            LedgerMismatch: the ledger belongs to a different run, or lacks labels that were bought before `state`.
        """
        kept = self._check_state(state)
        self._start({name: int(state[name]) for name in _STATE})
        self.kept = kept

    def _check_state(self, state: Any) -> list[int]:
        """The ids that a state keeps. ValueError where it is not a state of such a run."""
        if not isinstance(state, Mapping) or set(state) - {"kept"} != set(_STATE):
            raise ValueError(f"expected a state, a mapping with {_STATE} and kept, got {state!r}")
        for name in _STATE:
            if not _whole(state[name]) or state[name] < 0:
                raise ValueError(f"state: {name}: expected a whole number of at least 0, got {state[name]!r}")
        if self.budget is not None and state["query_count"] > self.budget:
            wanted = f"expected at most {self.budget}, the budget"
            raise ValueError(f"state: query_count: {wanted}, got {state['query_count']}")
        kept = state.get("kept", [])  # checkpoints of earlier versions keep none
        prompts = self.task.train_prompts
        if not isinstance(kept, list) or not all(_whole(i) and -1 <= i < prompts for i in kept):
            raise ValueError(f"state: kept: expected a list of training prompt ids below {prompts} or -1, got {kept!r}")
        return list(kept)

    def _start(self, state: dict[str, Any]) -> None:
        if self._ledger_path is not None:
            self.close()
            ledger = Ledger(self._ledger_path, {**self._identity, "seed": state["seed"]})
            if len(ledger) < state["query_count"]:
                ledger.close()
                wanted = f"expected at least the {state['query_count']} labels bought before this state"
                raise LedgerMismatch(f"{ledger.path}: {wanted}, got {len(ledger)}")
            self.ledger = ledger
            self.task.oracle.open(ledger.path.parent)
        for name in _STATE:
            setattr(self, name, state[name])
        self.kept = []

    def prompt_ids(self, count: int) -> np.ndarray:
        """Ids of the present `count` prompts, (count,) int64: those kept stand where they stood, and the others are
        the next ones in order; every epoch is another permutation of the training ids."""
        ids = np.array(self.kept if self.kept else [-1] * count, np.int64)
        if len(ids) != count:
            raise ValueError(
                f"expected {len(ids)} prompts, as in the round before, some of which are kept; got {count}"
            )
        new = np.flatnonzero(ids < 0)
        epochs, offsets = np.divmod(self.served + np.arange(len(new)), self.task.train_prompts)
        ids[new] = [self._order(int(epoch))[offset] for epoch, offset in zip(epochs, offsets)]
        return ids

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            raise ResetNeeded("call reset() before asking for prompts or stepping")
        if self._epoch is None or self._epoch[:2] != (self.seed, epoch):
            order = generator(self.seed, "prompts", epoch).permutation(self.task.train_prompts)
            self._epoch = (self.seed, epoch, order)
        return self._epoch[2]

    def duel(
        self,
        prompt_ids: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        query: np.ndarray,
        again: np.ndarray | None = None,
    ) -> Outcome:
        """Shows M pairs and buys the labels asked for: recorded durably, then counted, then returned.

        Args:
            prompt_ids: (M,) the prompts.
            first: (M,) responses; as `parse_action` gives them.
            second: (M,) responses.
            query: (M,) bool; False abstains: the pair is not shown.
            again: (M,) bool; True keeps the prompt for the next round. None keeps none.

        Raises:
            ResetNeeded: before the first reset, or after the last round.
            BudgetExceeded: more queries than are left.
            OracleError: an unusable answer.
            LedgerMismatch: the ledger remembers other duels. In all these cases nothing has changed.
        """
        if self.seed is None or (self.max_rounds is not None and self.round >= self.max_rounds):
            raise ResetNeeded(
                "call reset() before stepping" if self.seed is None else f"round {self.round} was the last"
            )
        if self._ledger_path is not None and self.ledger is None:
            raise ResetNeeded(f"the ledger {self._ledger_path} is closed: call reset() or load_state_dict()")
        charged = query & (first != second)
        if self.remaining is not None and charged.sum() > self.remaining:
            raise BudgetExceeded(
                f"expected at most {self.remaining} queries, all that the budget has left, got {charged.sum()}"
            )
        prompts = self.task.observe(prompt_ids)
        count, shown = len(prompt_ids), np.flatnonzero(query)
        with self.clock("metrics"):
            metrics = duel_metrics(self.task, rows_of(prompts, shown), first[shown], second[shown])
        rows = np.flatnonzero(charged)
        with self.clock("oracle"):
            scores = self._score(rows_of(prompts, rows), first[rows], second[rows]) if self.scores else None
            records = self._buy(rows_of(prompts, rows), first[rows], second[rows])

        preference = np.where(query, 0.5, np.nan)
        probability = np.where(query, 0.5, np.nan)
        for row, record in zip(rows, records):
            preference[row] = np.nan if record is None else record["label"]
            probability[row] = np.nan if record is None else record["probability"]
        charged[rows] = [record is not None for record in records]
        spread = {name: _spread(value, shown, count) for name, value in metrics.items()}
        wins = spread["online_win_probability"]
        reward = np.nan_to_num(np.where(np.isnan(wins), preference, wins), nan=0.0)
        self.query_count += int(charged.sum())
        self.round += 1
        self.served += count - sum(kept >= 0 for kept in self.kept)
        self.kept = np.where(again, prompt_ids, -1).tolist() if again is not None and again.any() else []
        told = None
        if scores is not None:
            told = np.stack([_spread(column, rows, count) for column in scores], axis=1)
        return Outcome(preference, charged, reward, {**spread, "probability": probability}, told)

    def _score(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's utility of both responses, (R,) each. Labels that are replayed are scored again: an oracle that
        has a utility is a program or a model, and says the same twice."""
        oracle = self.task.oracle
        return checked_utility(oracle, prompts, first), checked_utility(oracle, prompts, second)

    def _buy(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> list[Record | None]:
        """The records of these duels: replayed where the ledger has them, else bought in one batch and appended.

        None for a duel that the oracle skipped: it has no record, and the next one takes its number.
        """
        assert self.seed is not None
        asked = [self._question(prompts, first, second, row) for row in range(len(first))]
        records, known = self._replay(asked)
        new = np.arange(known, len(asked))
        probability = checked_win_probability(self.task.oracle, rows_of(prompts, new), first[new], second[new])
        answered = np.flatnonzero(~np.isnan(probability))
        begin = self.query_count + sum(record is not None for record in records)
        numbers = begin + np.arange(len(answered))
        labels = self.feedback.label(probability[answered], self.seed, numbers)
        bought = [
            {"query": int(number), **asked[known + row], "label": float(label), "probability": float(probability[row])}
            for number, row, label in zip(numbers, answered, labels)
        ]
        if self.ledger is not None:
            self.ledger.append(bought)
        by_row = dict(zip(answered.tolist(), bought))
        return records + [by_row.get(row) for row in range(len(new))]

    def _question(self, prompts: Observation, first: np.ndarray, second: np.ndarray, row: int) -> Record:
        text = self.task.kind == "text"
        return {
            "round": self.round,
            "prompt_id": int(prompts["prompt_id"][row]),
            "prompt": str(prompts["prompt"][row]) if text else None,
            "first": str(first[row]) if text else int(first[row]),
            "second": str(second[row]) if text else int(second[row]),
        }

    def _replay(self, asked: list[Record]) -> tuple[list[Record | None], int]:
        """What the ledger has of this round's duels, and how many of them that settles; the rest must be bought.

        Where the oracle may skip, a duel that the next record is not about was skipped, so long as that record is of
        this round or a later one.
        """
        records: list[Record | None] = []
        if self.ledger is None:
            return records, 0
        number = self.query_count
        for question in asked:
            if number >= len(self.ledger):
                break
            if self.task.oracle.may_skip and self.ledger.skipped(number, question):
                records.append(None)
            else:
                records.append(self.ledger.replay(number, question))
                number += 1
        return records, len(records)

    def close(self) -> None:
        """Closes the ledger, so that another run may open it."""
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None
        self.task.oracle.close()


def whole_seed(seed: int | None) -> int | None:
    """A seed as Gymnasium takes it, which knows no NumPy numbers; TypeError for what is not a whole number."""
    if seed is not None and not _whole(seed):
        raise TypeError(f"seed: expected one whole number for the run, got {seed!r}")
    return None if seed is None else int(seed)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _spread(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    full = np.full(count, np.nan)
    full[rows] = values
    return full


class CoreEnv:
    """What both environments offer beyond Gymnasium's interface; `core` is their run."""

    core: DuelCore

    @property
    def task(self) -> Task:
        """The task."""
        return self.core.task

    @property
    def budget(self) -> int | None:
        """Queries in all; None where there is no limit."""
        return self.core.budget

    @property
    def query_count(self) -> int:
        """Queries paid so far."""
        return self.core.query_count

    @property
    def round(self) -> int:
        """Steps taken so far."""
        return self.core.round

    @property
    def remaining(self) -> int | None:
        """Queries left; None where there is no limit."""
        return self.core.remaining

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds inside `step` since this object was made: oracle (labels bought and written down), metrics."""
        return self.core.clock.seconds

    @property
    def ledger(self) -> Ledger | None:
        """The ledger, open from the first reset to `close`; None where there is none."""
        return self.core.ledger

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come, as JSON has it: enough to go on exactly, with the ledger."""
        return self.core.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken; `observe` then gives the present prompts.

        Raises:
            ValueError: not a state.
            LedgerMismatch: the ledger does not belong to this state.
        """
        self.core.load_state_dict(state)

    def evaluate(self, respond: Respond, prompts: int | None = None) -> Metrics:
        """A deployed policy on the first `prompts` held-out prompts: see `llm_duel_env.metrics.evaluate`."""
        return evaluate(self.core.task, respond, prompts)

    def evaluate_prompts(self, respond: Respond, prompts: int | None = None) -> dict[str, np.ndarray]:
        """The same prompt by prompt: see `llm_duel_env.metrics.evaluate_prompts`."""
        return evaluate_prompts(self.core.task, respond, prompts)
