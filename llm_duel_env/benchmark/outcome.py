"""What a finished run leaves: the content of its ``result.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llm_duel_env.benchmark.labels import KINDS
from llm_duel_env.benchmark.origin import origin
from llm_duel_env.benchmark.run_folder import finite, rounded, sha256

if TYPE_CHECKING:
    from llm_duel_env.benchmark.session import Session

CURVE = (
    *("queries", "offline_win_rate", "win_low", "win_high", "offline_win_probability", "true_utility"),
    *("simple_regret", "kl", "entropy", "length", "mean_online_win_rate", "cumulative_regret", "claimed_queries"),
    "true_win_rate",
)
"""What of an evaluation goes into the result's curve, where the task knows it."""
LENGTH_CONTROLLED = "length_controlled_win_rate"
"""Of the last evaluation, on tasks of text."""
TOLD_MORE = {"reward", "scores"}
"""Needs that cost oracle evaluations beyond labels."""
CURVE_POINTS = 101
"""Evaluations in the result's curve; of more, this many are kept. The metrics file has them all."""


def outcome(session: Session) -> dict[str, Any]:
    """The result of a session that is over and saved; floats at five significant digits, NaN as None."""
    config, agent = session.config, type(session.agent)
    curve = [session.curve[i] for i in thinned(len(session.curve), CURVE_POINTS)]
    found = {
        "agent": config.agent,
        "label": config.label or config.agent,
        "provenance": agent.provenance,
        "needs": sorted(agent.needs),
        "env": config.env,
        "kind": session.core.task.kind,
        "env_kwargs": config.env_kwargs,
        "feedback": session.core.core.feedback.kind,
        "overrides": config.overrides,
        "seed": config.seed,
        "budget": config.budget,
        "batch": config.batch,
        "eval_prompts": len(session.heldout),
        "eval_every": config.eval_every,
        "queries": session.queries,
        "evaluations": int(session.sums["evaluations"]),
        "labels": {name: int(session.sums[f"labels/{name}"]) for name in KINDS},
        "oracle": session.core.task.oracle.usage(),
        "rounds": int(session.core.round),
        "status": "stalled" if session.queries < config.budget and session.stalled else "finished",
        "curve": {name: [p.get(name) for p in curve] for name in CURVE if known(curve[-1].get(name))},
        "beliefs": session.examiner.curves(),
        LENGTH_CONTROLLED: session.curve[-1].get(LENGTH_CONTROLLED),
        "online_win_rate": session.so_far()["mean_online_win_rate"],
        "cumulative_regret": session.sums["regret"],
        "gradient_steps": int(session.sums["gradient_steps"]),
        "generated_tokens": int(session.sums["generated_tokens"]) if session.core.task.kind == "text" else None,
        "seconds": session.seconds(),
        "time": session.all_seconds(),
        "fingerprint": session.fingerprint,
        "ledger_sha256": sha256(session.folder.ledger),
    }
    return finite(rounded(found)) | origin(config, session.folder)


def thinned(count: int, most: int) -> np.ndarray:
    """Numbers of at most `most` of `count` points, evenly spread, the first and the last among them.

    >>> thinned(7, 4).tolist()
    [0, 2, 4, 6]
    """
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)


def known(value: float | None) -> bool:
    """False for what the task does not know: absent, NaN, or, read back from JSON, None."""
    return value is not None and not np.isnan(value)
