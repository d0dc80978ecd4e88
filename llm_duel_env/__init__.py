"""LLM-Duel-Env: LLM alignment from preferences as a Gymnasium environment. Importing it registers the ``duel/`` ids."""

__version__ = "0.1.0"

from llm_duel_env.envs.registration import register_envs

register_envs()
