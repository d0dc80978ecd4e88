"""Real text: any causal language model, any prompts, any oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.catalogue import OF_WEIGHTS, check_oracle, make_oracle
from llm_duel_env.pretrained import hub_commit
from llm_duel_env.randomness import generator
from llm_duel_env.spaces import Utf8Text
from llm_duel_env.tasks.base import Task, TaskView
from llm_duel_env.tasks.fingerprint import digest, once
from llm_duel_env.tasks.prompt_files import PRESETS, PromptRow, columns, load_rows, read_prompts
from llm_duel_env.types import Observation

CHARACTERS_PER_TOKEN = 256
"""No token of a usual vocabulary decodes to more characters."""
PLAIN = {
    "prompt_column": "prompt",
    "reference_column": "reference",
    "responses_column": "responses",
    "template": "{prompt}",
}
"""How rows are read where nothing else is said."""


class Text(Task):
    """Prompts from a JSONL file or a hub data set, answered by a language model, judged by an oracle.

    Args:
        model: folder or hub name of the supervised policy.
        oracle: ``reward_model:NAME`` with the folder or hub name of a reward model, ``remote:URL``, ``pairwise:NAME``,
            ``judge:MODEL``, ``human``, or an `Oracle`; see `llm_duel_env.oracles.catalogue`.
        oracle_kwargs: further arguments of the oracle that a spec names.
        preset: tldr, ultrafeedback, hh_rlhf or shp2: the data set's schema, its hub name and its split.
        prompts: JSONL file or hub data set; None takes the preset's hub data set.
        prompt_column: without a preset, the column of the prompt.
        reference_column: without a preset, the column of the reference response; None where there is none.
        responses_column: without a preset, the column that may hold a list of recorded responses, for methods that
            label given pairs (`TaskView.given`).
        template: without a preset, what a prompt becomes; ``{prompt}`` stands for the column's text.
        split: split of a hub data set; None takes the preset's, or "train".
        heldout: how many prompts are held out, drawn once and for all, or a JSONL file or hub data set of them, read
            like the prompts (a prompt that is in both is held out).
        heldout_split: split of a hub data set of held-out prompts; None takes `split`.
        references: JSONL file of ``prompt`` and ``reference`` that overrides the data's references, e.g. stored samples
            of the supervised policy. Every held-out prompt must be in it.
        limit: most distinct prompts read, at least 1; None for all.
        max_prompt_tokens: a longer prompt loses its beginning.
        max_new_tokens: the longest response, EOS included.
        feedback: how a probability becomes a label.

    Raises:
        FileNotFoundError: no such file, or no such folder of a model.
        ValueError: arguments that contradict each other, malformed rows (with their number), or too few prompts.
    """

    name = "text"
    kind = "text"

    def __init__(
        self,
        model: str,
        oracle: str | Oracle,
        oracle_kwargs: dict[str, Any] | None = None,
        preset: str | None = None,
        prompts: str | None = None,
        prompt_column: str = "prompt",
        reference_column: str | None = "reference",
        responses_column: str = "responses",
        template: str = "{prompt}",
        split: str | None = None,
        heldout: int | str = 512,
        heldout_split: str | None = None,
        references: str | None = None,
        limit: int | None = None,
        max_prompt_tokens: int = 512,
        max_new_tokens: int = 64,
        feedback: Literal["bernoulli", "threshold"] = "threshold",
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
        schema = PRESETS[preset] if preset is not None else None
        source = prompts if prompts is not None or schema is None else schema.hub
        if source is None:
            raise ValueError("expected prompts (a JSONL file or a hub data set) or a preset, got neither")
        if "{prompt}" not in template:
            raise ValueError(f"template: expected {{prompt}} in it, got {template!r}")
        given = {
            "prompt_column": prompt_column,
            "reference_column": reference_column,
            "responses_column": responses_column,
            "template": template,
        }
        contradicting = [name for name, value in given.items() if preset is not None and value != PLAIN[name]]
        if contradicting:
            raise ValueError(f"preset {preset!r} fixes how rows are read: expected no {', '.join(contradicting)}")
        for name, size in (("max_prompt_tokens", max_prompt_tokens), ("max_new_tokens", max_new_tokens)):
            _check_count(name, size)
        if limit is not None:
            _check_count("limit", limit)
        if not isinstance(heldout, str):
            _check_count("heldout", heldout)
            if heldout_split is not None:
                raise ValueError(f"heldout_split goes with a data set to hold out, but heldout is {heldout!r}")
        check_oracle(oracle, oracle_kwargs)
        if looks_like_a_folder(model) and not Path(model).expanduser().is_dir():
            raise FileNotFoundError(f"model: expected a model's folder or a hub name, got {model!r}: no such folder")
        self.feedback = feedback
        self._judge = oracle
        self.model, self.max_prompt_tokens, self.max_new_tokens = model, max_prompt_tokens, max_new_tokens
        plain = columns(prompt_column, [reference_column] if reference_column else [], template, responses_column)
        read = schema.read if schema else plain
        split = split or (schema.split if schema else "train")
        rows = read_prompts(load_rows(source, split), read, source, limit)
        if isinstance(heldout, str):
            held = read_prompts(load_rows(heldout, heldout_split or split), read, heldout)
            seen = {row.prompt for row in held}
            train = [row for row in rows if row.prompt not in seen]
        else:
            train, held = split_off(rows, heldout, source)
        if not train:
            raise ValueError(f"{source}: every prompt is held out, none is left to train on")
        self._rows = [*train, *held]
        self.train_prompts, self.heldout_prompts = len(train), len(held)
        self.recorded = min(len(row.responses) for row in train)
        """Responses that every training prompt has on record."""
        if references is not None:
            self._rows = self._with_references(references)
        longest = max(len(row.prompt) for row in self._rows)
        self.observation_space = spaces.Dict(prompt=Utf8Text(longest), prompt_id=spaces.Discrete(len(self._rows)))
        self.response_space = Utf8Text(CHARACTERS_PER_TOKEN * max_new_tokens, min_length=0)
        self.oracle = make_oracle(oracle, oracle_kwargs)  # last: it may load a large model

    def _with_references(self, source: str) -> list[PromptRow]:
        rows = read_prompts(load_rows(source, "train"), columns("prompt", ["reference"]), source)
        stored = {row.prompt: row.reference for row in rows}
        for number, row in enumerate(self._rows[self.train_prompts :]):
            if stored.get(row.prompt) is None:
                raise ValueError(f"{source}: no reference for held-out prompt {number}, {row.prompt[:80]!r}")
        return [row._replace(reference=stored.get(row.prompt)) for row in self._rows]

    def observe(self, prompt_ids: np.ndarray) -> Observation:
        """Prompts, M str, and ids (M,) int64."""
        ids = np.asarray(prompt_ids, np.int64)
        return {"prompt": tuple(self._rows[int(i)].prompt for i in ids), "prompt_id": ids}

    def reference(self, prompt_ids: np.ndarray) -> np.ndarray | None:
        """The data's or the stored responses, (M,): str, None for a prompt without one; None where all are without."""
        return some_texts([self._rows[int(i)].reference for i in np.asarray(prompt_ids)])

    def given(self, observation: Observation) -> np.ndarray:
        """Recorded responses, (M, G) str in dtype object: the first G of each prompt, as many as every one has."""
        rows = [self._rows[int(i)].responses[: self.recorded] for i in observation["prompt_id"]]
        return np.array(rows, dtype=object).reshape(len(rows), self.recorded)

    @once
    def fingerprint(self) -> str:
        """Of the prompts, their references, and the policy and the oracle: of a folder its files, of a hub model its
        name and commit, of an `Oracle` its class's name, of a server, a judge or a person what the spec says."""
        rows = json.dumps([(row.prompt, row.reference) for row in self._rows])
        judge = self._judge
        known = type(judge).__name__ if isinstance(judge, Oracle) else _known_by(judge)
        return digest(self.name, rows, str(self.train_prompts), _weights(self.model), known)

    def view(self) -> TaskView:
        """Spaces, training prompts and the supervised policy."""
        return TaskView(
            name=self.name,
            kind="text",
            observation_space=self.observation_space,
            response_space=self.response_space,
            train_prompts=self.train_prompts,
            observe=self.observe_training,
            model=self.model,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            provides=self.oracle_tells | ({"offline_pairs"} if self.recorded > 1 else frozenset()),
            given=self.given if self.recorded > 1 else None,
        )


def _known_by(spec: str) -> str | Path:
    kind, _, name = spec.partition(":")
    return _weights(name) if kind in OF_WEIGHTS else spec


def _weights(model: str) -> str | Path:
    """What `digest` knows a model by: its folder, or its name on the hub with the commit, where that is to be had."""
    if Path(model).is_dir():
        return Path(model)
    commit = hub_commit(model)
    return f"{model}@{commit}" if commit else model


def as_texts(texts: list) -> np.ndarray:
    """(M,) of dtype object."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def some_texts(texts: list) -> np.ndarray | None:
    """`as_texts`, in which an entry may be None; None where every one is."""
    return None if all(text is None for text in texts) else as_texts(texts)


def split_off(rows: list[PromptRow], count: int, source: str) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and `count` held-out rows, drawn by a fixed stream: files are often sorted by subject."""
    if not 1 <= count < len(rows):
        raise ValueError(f"heldout: expected 1 to {len(rows) - 1} of the {len(rows)} prompts of {source}, got {count}")
    held = set(generator(0, "heldout").permutation(len(rows))[:count].tolist())
    return [row for k, row in enumerate(rows) if k not in held], [rows[k] for k in sorted(held)]


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def looks_like_a_folder(name: str) -> bool:
    """A hub name is ``name`` or ``owner/name``; what begins like a path or goes deeper is a folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
