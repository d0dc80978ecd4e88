"""What a new agent must beat."""

if __name__ != "llm_duel_env.baselines":
    raise ImportError(f"import llm_duel_env.baselines, not {__name__}: the short name is only a link for readers")
