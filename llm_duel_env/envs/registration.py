"""The ``duel/`` ids."""

from __future__ import annotations

import gymnasium

IDS = {
    "duel/Synthetic-v0": "synthetic",
    "duel/Pool-v0": "pool",
    "duel/TinyTLDR-v0": "tiny_tldr",
    "duel/Text-v0": "text",
}
"""The task behind each id."""


def register_envs() -> None:
    """Registers the ``duel/`` environments with Gymnasium; does nothing for those that are registered."""
    for name, task in IDS.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                name,
                entry_point="llm_duel_env.envs.duel_env:DuelEnv",
                vector_entry_point="llm_duel_env.envs.vector_env:DuelVectorEnv",
                kwargs={"task": task},
            )
