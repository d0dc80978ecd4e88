"""An oracle made of a person at a terminal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llm_duel_env.oracles.base import Oracle, OracleError, OracleStopped
from llm_duel_env.oracles.journal import Journal, content_key
from llm_duel_env.oracles.terminal import Stopped, printable, read_key, standard_input
from llm_duel_env.types import Metrics, Observation

KEYS = {
    "left": "left", "l": "left", "1": "left",
    "right": "right", "r": "right", "2": "right",
    "t": "tie", "=": "tie", "3": "tie",
    "s": "skip", "q": "quit",
}  # fmt: skip
"""What each key, or each line, says."""
LEFT_WINS = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": float("nan")}
FILE = "answers.jsonl"
"""The answers' name in a run's folder."""
HELP = "[1, l, <-] left   [2, r, ->] right   [t] tie   [s] skip, no label   [q] stop, go on later"


class HumanOracle(Oracle):
    """Shows a pair, takes a key: left, right, tie, skip (no label: not charged, the agent learns nothing), or stop.

    Which response stands left is a fair toss of a coin, keyed by the texts, so that no agent gains by its order. Every
    answer is on the disk before the next question comes, in ``answers.jsonl`` in the run's folder, or the file
    `answers`; a pair that was answered once, in either order, is not asked again.
    """

    metered = True
    may_skip = True

    def __init__(
        self,
        *,
        answers: str | os.PathLike[str] | None = None,
        keys: TextIO | None = None,
        screen: TextIO | None = None,
    ) -> None:
        """A person who has not been asked yet.

        Args:
            answers: File of answers; None for ``answers.jsonl`` in the run's folder.
            keys: Where keys, or lines, come from; None for standard input.
            screen: Where questions go; None for standard output.
        """
        self.answers, self._keys, self._screen = answers, keys, screen
        self._journal, self._known = Journal(), dict[str, dict[str, Any]]()
        if answers is not None:
            self._read_journal(Path(answers))

    def open(self, folder: Path) -> None:
        """Takes up the run's answers, or those of the file that was given."""
        if self.answers is None:
            self._read_journal(folder / FILE)

    def _read_journal(self, path: Path) -> None:
        self._journal.open(path)
        self._known.clear()
        for entry in self._journal.entries:
            if entry.get("answer") not in LEFT_WINS or not isinstance(entry.get("left"), str):
                raise OracleError(f"{path}: expected answers of a person, got {entry}")
            self._known[str(entry.get("key"))] = entry

    def usage(self) -> Metrics:
        """answers: pairs that were answered, skips included; skipped: those among them without a label."""
        skipped = sum(entry["answer"] == "skip" for entry in self._known.values())
        return {"answers": float(len(self._known)), "skipped": float(skipped)}

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """1 where the first was preferred, 0 the second, 1/2 a tie, NaN skipped: float64 (M,).

        Raises:
            OracleStopped: the person stopped. Answers given so far are kept.
        """
        pairs = list(zip(map(str, prompts["prompt"]), map(str, first), map(str, second), strict=True))
        keys = [content_key(prompt, *sorted((a, b))) for prompt, a, b in pairs]
        left_to_ask = list(dict.fromkeys(key for key in keys if key not in self._known))
        by_key = dict(zip(keys, pairs))
        for number, key in enumerate(left_to_ask, 1):
            self._ask(key, by_key[key], f"{number} of {len(left_to_ask)}")
        return np.array([self._probability(key, pair[1]) for key, pair in zip(keys, pairs)], np.float64)

    def _probability(self, key: str, first: str) -> float:
        entry = self._known[key]
        wins = LEFT_WINS[entry["answer"]]
        return wins if entry["left"] == first else 1 - wins

    def _ask(self, key: str, pair: tuple[str, str, str], which: str) -> None:
        prompt, one, other = pair[0], *sorted(pair[1:])
        left, right = (one, other) if int(key[-1], 16) % 2 else (other, one)
        line = "-" * min(shutil.get_terminal_size().columns, 100)
        self._say(f"\n{line}\n{which}. PROMPT\n{printable(prompt)}\n{line}\nLEFT\n{printable(left)}")
        self._say(f"{line}\nRIGHT\n{printable(right)}\n{line}\n{HELP}")
        while (answer := KEYS.get(self._key().lower())) is None:
            self._say(f"expected one of {HELP}")
        if answer == "quit":
            raise OracleStopped(self._told())
        entry = {"key": key, "prompt": prompt, "left": left, "right": right, "answer": answer}
        self._journal.append(entry)
        self._known[key] = entry
        self._say(answer)

    def _key(self) -> str:
        try:
            return read_key(self._keys or standard_input())
        except Stopped:
            raise OracleStopped(self._told()) from None

    def _told(self) -> str:
        where = f" and kept in {self._journal.path}" if self._journal.path else ""
        return f"stopped by the person who answers; {len(self._known)} pairs are answered{where}"

    def _say(self, text: str) -> None:
        print(text, file=self._screen, flush=True)
